"""Every way a run can end, with real processes: each keeps its data and says how it ended."""

from __future__ import annotations

import os
import resource
import signal
import stat
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from greenvis.meters.record import Run, find, read

PRELUDE = """import os, signal, sys, time; import greenvis as gv
def burn(s):
    e = time.process_time() + s
    while time.process_time() < e: sum(range(1000))
"""


def _interruptible() -> None:
    """Undo what a shell does to jobs it starts in the background: they ignore SIGINT, and so would
    the child."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def start(folder: Path, body: str, **options) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", PRELUDE + textwrap.dedent(body)], cwd=folder, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, **{"preexec_fn": _interruptible, **options},
    )  # fmt: skip


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    _, errors = process.communicate(timeout=600)
    return process.returncode, errors


def only_run(folder: Path) -> Run:
    (path,) = find([folder / "runs"])
    return read(path)


WITH = 'with gv.track("t", interval_s=0.1) as run, run.phase("train"):\n    burn(0.7)\n    '
OPEN = 'run = gv.track("t", interval_s=0.1).start()\nwith run.phase("train"): burn(0.7)\n'


@pytest.mark.one_in(2)
@pytest.mark.parametrize(
    ("body", "code", "status", "word"),
    [
        (WITH + "pass", 0, "done", ""),
        (WITH + "raise ValueError('no luck')", 1, "failed", "no luck"),
        (OPEN + "raise ValueError('outside')", 1, "failed", "outside"),
        (WITH + "sys.exit(3)", 3, "failed", "3"),
        (WITH + "sys.exit(0)", 0, "done", ""),
        (OPEN, 0, "stopped", "without stop()"),
        (WITH + "os.kill(os.getpid(), signal.SIGTERM)", -signal.SIGTERM, "stopped", "SIGTERM"),
        (OPEN + "os.kill(os.getpid(), signal.SIGTERM)", -signal.SIGTERM, "stopped", "SIGTERM"),
        (WITH + "os.kill(os.getpid(), signal.SIGINT)", -signal.SIGINT, "stopped", "SIGINT"),
        (OPEN + "os.kill(os.getpid(), signal.SIGKILL)", -signal.SIGKILL, "crashed", ""),
        (WITH + "os.kill(os.getpid(), signal.SIGKILL)", -signal.SIGKILL, "crashed", ""),
        (WITH + "os._exit(5)", 5, "crashed", ""),
    ],
)
def test_an_ending_keeps_the_data(
    tmp_path: Path, body: str, code: int, status: str, word: str
) -> None:
    got, errors = finish(start(tmp_path, body))
    run = only_run(tmp_path)
    assert got == code, errors
    assert run.status == status
    assert word in (run.end or {}).get("reason", "")
    lost = (
        0.0 if status != "crashed" else 0.25
    )  # at most one sample, 0.1 s, and what its thread waits for a turn
    assert 0.7 - lost - 0.02 <= run.sum("cpu_s", "train") <= 0.9


def test_a_signal_handler_of_the_users_own_is_left_alone(tmp_path: Path) -> None:
    body = """
        signal.signal(signal.SIGTERM, lambda *a: sys.exit(7))
        with gv.track("t"):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)
    """
    assert finish(start(tmp_path, body))[0] == 7
    assert only_run(tmp_path).status == "failed"


def test_signal_handlers_are_given_back(tmp_path: Path) -> None:
    body = """
        with gv.track("t"): assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
        assert "GREENVIS_RUN" not in os.environ
    """
    code, errors = finish(start(tmp_path, body))
    assert code == 0, errors


def test_a_forked_child_neither_writes_nor_ends_the_run(tmp_path: Path) -> None:
    body = """
        with gv.track("t") as run:
            for ending in (lambda: sys.exit(1), lambda: os.kill(os.getpid(), signal.SIGTERM)):
                child = os.fork()
                if child == 0:
                    with run.phase("child"): run.log(x=1)
                    list(run.steps([1, 2]))
                    ending()
                os.waitpid(child, 0)
            with run.phase("train"): burn(0.1)
    """
    code, errors = finish(start(tmp_path, body))
    run = only_run(tmp_path)
    assert code == 0, errors
    assert run.status == "done"
    assert set(run.totals) == {"", "train"}
    assert run.logs == []


def test_six_processes_at_once_keep_six_records(tmp_path: Path) -> None:
    processes = [start(tmp_path, WITH + "pass") for _ in range(6)]
    for process in processes:
        code, errors = finish(process)
        assert code == 0, errors
    runs = [read(p) for p in find([tmp_path / "runs"])]
    assert len({r.id for r in runs}) == 6
    assert all(0.68 <= r.sum("cpu_s", "train") <= 0.9 for r in runs)


def test_a_full_disk_never_stops_the_training(tmp_path: Path) -> None:
    def small() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # as CPython does: the write fails with EFBIG
        resource.setrlimit(resource.RLIMIT_FSIZE, (6000, 6000))

    body = """
        with gv.track("t", interval_s=0.05) as run:
            for i in range(300):
                run.log(i=i)
            burn(0.3)
        assert run.notes and "cannot write" in run.notes[0], run.notes
        print(len(run.notes))
    """
    process = start(tmp_path, body, preexec_fn=small)
    out, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors
    assert out.strip() == "1"
    assert errors.count("the run goes on") == 1  # at once, and its last line says so again
    assert errors.count("cannot write") == errors.count("greenvis:") == 2
    run = only_run(tmp_path)
    assert run.status == "crashed"  # its end line found no room
    assert run.logs


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a file system of 64 kB needs root")
def test_a_disk_that_fills_up_and_is_freed_gets_the_held_lines(tmp_path: Path) -> None:
    disk = tmp_path / "runs"
    disk.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "none", disk], capture_output=True
    ).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        body = """
            filler = open("runs/filler", "wb", buffering=0)
            with gv.track("t", interval_s=0.1) as run:
                try:
                    while True: filler.write(b"0" * 4096)
                except OSError: pass
                for i in range(100): run.log(i=i, text="x" * 200)
                os.truncate("runs/filler", 0); os.remove("runs/filler"); filler.close()
                burn(0.3)
        """
        code, errors = finish(start(tmp_path, body))
        assert code == 0, errors
        run = only_run(tmp_path)
    finally:
        subprocess.run(["umount", "-l", disk], check=False)
    assert "No space left" in errors
    assert run.notes


def test_a_read_only_folder_never_stops_the_training(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("a file where the folder should be: refused to root, too")
    code, errors = finish(start(tmp_path, WITH + "pass"))
    assert code == 0, errors
    assert errors.count("greenvis: cannot write") == 1
    (tmp_path / "runs").unlink()
    (tmp_path / "runs").mkdir()
    os.chmod(tmp_path / "runs", stat.S_IRUSR | stat.S_IXUSR)
    code, errors = finish(start(tmp_path, WITH + "pass"))
    assert code == 0, errors


def test_a_clock_that_jumps_back_changes_nothing(tmp_path: Path) -> None:
    body = """
        import time as t
        real, start = t.time, t.time()
        t.time = lambda: start - 86400 + (real() - start)  # the wall clock, set back by a day
        with gv.track("t") as run, run.phase("train"): burn(0.3)
    """
    code, errors = finish(start(tmp_path, body))
    run = only_run(tmp_path)
    assert code == 0, errors
    assert 0.28 <= run.totals["train"]["wall_s"] < 5


def test_killed_from_outside_within_a_phase_loses_one_sample_at_most(tmp_path: Path) -> None:
    process = start(
        tmp_path,
        'with gv.track("t", interval_s=0.2) as run, run.phase("a"), run.phase("b"):\n    print(1, '
        "flush=True); burn(60)",
    )
    assert process.stdout is not None
    process.stdout.readline()
    read_before = 0.0
    while read_before < 1.0:  # each sample is in the file once it is taken
        assert process.poll() is None
        read_before = only_run(tmp_path).totals.get("a/b", {}).get("wall_s", 0.0)
    assert only_run(tmp_path).status == "running"
    process.kill()
    killed = time.monotonic()
    process.communicate()
    run = only_run(tmp_path)
    assert run.status == "crashed"
    assert read_before <= run.totals["a/b"]["wall_s"] <= killed - run.header["mono_s"]
