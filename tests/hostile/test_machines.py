"""Machines that fail in the middle: one clear line, the right exit code, and what was saved stays
whole."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import forked
import pytest

from greenvis.cli import failures
from greenvis.experiment import checkpoint
from greenvis.meters import record

RECIPE = """\
name: tiny
data: {name: digits, train: 256, test: 32, img_size: 8}
model: {ref: plain/mlp, img_size: 8, hidden: [512, 512]}
train: {epochs: 200, batch_size: 8, checkpoint_every_s: 0.01, eval_every: 0}
meter: {codecarbon: false}
arms: {full: {}}
"""


def start(folder: Path, limits: Sequence[tuple[int, int]] = ()) -> forked.Greenvis:
    """Start the recipe there."""
    (folder / "tiny.yaml").write_text(RECIPE)
    return forked.Greenvis("run", "tiny.yaml", cwd=folder, limits=limits)


def said(folder: Path, *words: str, limit: Callable[[], object]) -> tuple[int, str, str]:
    """Return what a new interpreter, which has all to import, comes to below a limit: its exit
    code, and what it writes."""
    (folder / "tiny.yaml").write_text(RECIPE)
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-u", "-m", "greenvis", *words]
    done = subprocess.run(
        command, cwd=folder, env=env, preexec_fn=limit, capture_output=True, text=True,
        timeout=forked.HANGS_S, check=False,
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


def no_more_than(kind: int, most: int) -> Callable[[], None]:
    """Return what sets a limit of the system for a process, before it begins."""
    return lambda: resource.setrlimit(kind, (most, most))


def test_a_full_disk_at_a_checkpoint(tmp_path: Path) -> None:
    process = start(tmp_path, [(resource.RLIMIT_FSIZE, 100_000)])  # to it, the disk is full then
    assert process.wait() == 1
    err = process.stderr
    assert "the disk is full, or takes no more" in err
    assert "the same command goes on" in err
    assert "Traceback" not in err
    assert list((tmp_path / "runs").rglob("*.part")) == []
    (run,) = [record.read(p) for p in (tmp_path / "runs").rglob("*.jsonl")]
    assert run.status == "failed"


def data(pid: int) -> int:
    """Return the bytes that the system counts against a process's RLIMIT_DATA."""
    status = Path(f"/proc/{pid}/status").read_text()
    return 1024 * int(status.split("VmData:")[1].split()[0])


def descriptors(pid: int) -> int:
    """Return a limit of descriptors under which a process can open one more, but not write; none
    that counts while it writes, or has ended."""
    folder, names = Path(f"/proc/{pid}/fd"), {}
    with contextlib.suppress(OSError):  # closed since it was listed
        names = {int(fd): os.readlink(folder / fd) for fd in os.listdir(folder)}
    if not names or any(name.endswith(".part") for name in names.values()):
        return 1000
    return next(n for n in range(1, 1000) if sum(fd >= n for fd in names) + n > len(names))


LIMITS: dict[str, tuple[int, Callable[[int], int], str]] = {
    "disk": (resource.RLIMIT_FSIZE, lambda pid: 100_000, "the disk is full, or takes no more"),
    "memory": (resource.RLIMIT_DATA, data, "out of memory"),
    "descriptors": (resource.RLIMIT_NOFILE, descriptors, "too many open files"),
}


@pytest.mark.parametrize("of", LIMITS)
def test_what_runs_out_after_a_checkpoint(of: str, tmp_path: Path) -> None:
    limit, least, says = LIMITS[of]
    process = start(tmp_path)
    while not list((tmp_path / "runs").rglob("*checkpoint.pt")):
        assert process.wait(0.02) is None, process.stderr
    now = least(process.pid)
    while process.wait(0.02) is None:  # what it holds for a moment is not what it needs
        with contextlib.suppress(OSError, IndexError):  # ended since
            now = min(now, least(process.pid))
            resource.prlimit(process.pid, limit, (now, now))
    assert process.wait() == 1, process.stderr
    err = process.stderr
    assert "Traceback" not in err
    assert says in err.splitlines()[-1].lower(), err
    (saved,) = (tmp_path / "runs").rglob("*checkpoint.pt")
    assert checkpoint.read(saved)["progress"]["step"] > 0
    assert list((tmp_path / "runs").rglob("*.part")) == []
    (run,) = [record.read(p) for p in (tmp_path / "runs").rglob("*.jsonl")]
    assert run.damaged_lines == 0
    assert run.status == "failed"


def test_track_says_that_its_record_is_lost(tmp_path: Path) -> None:
    limit = no_more_than(resource.RLIMIT_FSIZE, 0)
    code, out, _ = said(tmp_path, "track", "--json", "--", "true", limit=limit)
    assert code == 0
    assert json.loads(out.splitlines()[-1])["record"] is None
    _, _, err = said(tmp_path, "track", "--", "true", limit=limit)
    assert "the record is lost: cannot write" in err
    assert "record: " not in err.replace("the record is lost: ", "")


def test_two_interrupts(tmp_path: Path) -> None:
    process = start(tmp_path)
    while not list((tmp_path / "runs").rglob("*checkpoint.pt")):
        assert process.wait(0.02) is None, process.stderr
    os.kill(process.pid, signal.SIGINT)
    os.kill(process.pid, signal.SIGINT)
    assert process.wait() == 130, process.stderr
    err = process.stderr
    assert "Traceback" not in err
    (run,) = [record.read(p) for p in (tmp_path / "runs").rglob("*.jsonl")]
    assert run.status == "stopped"
    (saved,) = (tmp_path / "runs").rglob("*checkpoint.pt")
    assert checkpoint.read(saved)["progress"]


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (OSError(28, "No space left on device", "x"), r"disk is full.*\(x\)"),
        (OSError(24, "Too many open files"), "ulimit"),
        (OSError(30, "Read-only file system", "x"), "not allowed to write"),
        (MemoryError(), "out of memory"),
        (ImportError("libtorch_cpu.so: failed to map segment from shared object"), "out of memory"),
        (RuntimeError("CUDA out of memory. Tried to allocate"), "out of memory"),
        (
            RuntimeError(
                "DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"
            ),
            "out of memory",
        ),
        (
            RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed."),
            "loads images was killed",
        ),
        (
            RuntimeError(
                "[../gloo/transport/tcp/pair.cc:547] Connection closed by peer [10.0.0.1]:1"
            ),
            "another process of this",
        ),
        (RuntimeError("NCCL communicator was aborted on rank 1."), "another process of this"),
        (
            RuntimeError(
                "[enforce fail at inline_container.cc:1] . PytorchStreamWriter failed writing file"
            ),
            "disk is full",
        ),
        (KeyError("a"), "GREENVIS_DEBUG"),
    ],
)
def test_each_failure_is_a_line(error: Exception, says: str) -> None:
    import re

    text = failures.describe(error)
    assert re.search(says, text)
    assert "\n" not in text


def test_a_loader_that_hangs_up_is_a_killed_loader() -> None:
    """Its end may be seen as that of a connection, before it is seen to be dead."""
    for name, says in (("torch/utils/data/dataloader", "loads images"), ("a", "another process")):
        code = compile("raise ConnectionResetError(104, 'Connection reset by peer')",
                       f"/lib/{name}.py", "exec")  # fmt: skip
        with pytest.raises(ConnectionResetError) as error:
            exec(code)
        assert says in failures.describe(error.value)


@pytest.mark.parametrize("bytes_", [300 * 2**20, 1500 * 2**20])
def test_no_memory_to_begin_with(bytes_: int, tmp_path: Path) -> None:
    limit = no_more_than(resource.RLIMIT_AS, bytes_)
    code, _, err = said(tmp_path, "run", "tiny.yaml", limit=limit)
    assert code == 1
    *_, line = err.strip().splitlines()  # behind what it says as it begins
    assert line.startswith("greenvis: out of memory")
    assert "Traceback" not in err


@pytest.mark.parametrize("most", [5, 6, 8])  # with fewer Python itself does not start
def test_hardly_any_file_descriptors(most: int, tmp_path: Path) -> None:
    limit = no_more_than(resource.RLIMIT_NOFILE, most)
    code, _, err = said(tmp_path, "track", "--", "true", limit=limit)
    assert "Traceback" not in err
    assert code == 0 or (code == 1 and "too many open files" in err.lower()), err


def test_debugging_shows_the_traceback(tmp_path: Path) -> None:
    code = (
        "from greenvis.cli import main as cli; from greenvis.report import listing; import sys; "
        "listing.ls = lambda *args, **options: 1 / 0; "
        "sys.exit(cli.main(['ls', '.']))"
    )
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    for debug in ("", "1"):
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=tmp_path, env={**env, "GREENVIS_DEBUG": debug},
            capture_output=True, text=True,
            check=False,
        )  # fmt: skip
        assert done.returncode == 1
        assert ("Traceback" in done.stderr) == bool(debug)
        assert "ZeroDivisionError" in done.stderr
