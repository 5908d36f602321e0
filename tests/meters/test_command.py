"""`greenvis track -- …`: children are counted, the exit code passes through, signals reach the
command."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from greenvis.errors import BadInput
from greenvis.meters import pricing
from greenvis.meters.command import track_command
from greenvis.meters.doctor import doctor
from greenvis.meters.record import find, read

BURN = (
    "import time\ne = time.process_time() + {s}\nwhile time.process_time() < e: sum(range(1000))\n"
)
WRAP = (
    "import sys; from greenvis.meters.command import track_command; "
    "sys.exit(track_command(sys.argv[1:], name='c')[0])"
)


def test_a_command_and_its_children_are_counted(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    child = BURN.format(s=0.5)
    script.write_text(
        f"import subprocess, sys\nsubprocess.run([sys.executable, '-c', {child!r}])\n"
        + BURN.format(s=0.3)
    )
    code, run = track_command([sys.executable, str(script)], dir=tmp_path)
    found = read(run.path)
    assert (code, run.name, found.status) == (0, "train", "done")
    assert 0.8 * 0.99 <= found.sum("cpu_s") <= 0.8 + 0.5
    assert run.energy().value == pytest.approx(pricing.run_energy(found).value)


def test_what_the_command_leaves_behind_is_counted_and_not_waited_for(tmp_path: Path) -> None:
    burnt = tmp_path / "burnt"
    os.mkfifo(burnt)
    background = BURN.format(s=0.4) + f"open({str(burnt)!r}, 'w').close()\ntime.sleep(600)"
    script = tmp_path / "left.py"
    script.write_text(background)
    code, run = track_command(
        ["sh", "-c", f'("{sys.executable}" {script} & cat {burnt})'], name="left", dir=tmp_path
    )
    (pid,) = [
        int(w.strip("(),;"))
        for w in run.notes[0].split()
        if w.strip("(),;").isdigit() and int(w.strip("(),;")) > 99
    ]
    os.kill(pid, signal.SIGKILL)  # it would have slept on for ten minutes
    assert code == 0
    assert 0.4 * 0.97 <= read(run.path).sum("cpu_s") <= 0.4 + 0.5


@pytest.mark.parametrize(
    ("body", "code", "status"), [("exit 3", 3, "failed"), ("kill -TERM $$", 143, "stopped")]
)
def test_the_exit_code_passes_through(tmp_path: Path, body: str, code: int, status: str) -> None:
    got, run = track_command(["sh", "-c", body], name="c", dir=tmp_path)
    assert (got, read(run.path).status) == (code, status)


def test_a_signal_reaches_the_command_which_ends_in_its_own_way(tmp_path: Path) -> None:
    script = (
        "import signal as s, sys, time; s.signal(15, lambda *a: sys.exit(9)); print('up', "
        "flush=True); time.sleep(600)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", WRAP, sys.executable, "-c", script],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
    )
    assert process.stdout is not None
    process.stdout.readline()
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=600) == 9
    (path,) = find([tmp_path])
    assert read(path).facts["exit_code"] == 9


def test_a_command_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="cannot start 'no-such-program'"):
        track_command(["no-such-program"], dir=tmp_path)
    with pytest.raises(BadInput, match="no command"):
        track_command([], dir=tmp_path)


@pytest.mark.parametrize(
    ("text", "mode"), [("", 0o644), ("#!/no/such/interpreter\n", 0o755), ("\x00\x01", 0o755)]
)
def test_what_cannot_be_started_leaves_no_run(tmp_path: Path, text: str, mode: int) -> None:
    program = tmp_path / "program"
    program.write_text(text)
    program.chmod(mode)
    (tmp_path / "old").mkdir()
    for folder in (tmp_path / "new" / "runs", tmp_path / "old"):
        with pytest.raises(BadInput, match="cannot start"):
            track_command([str(program)], dir=folder)
        with pytest.raises(BadInput, match="cannot start"):
            track_command(["no-such-program"], dir=folder)
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["old", "program"]


def test_doctor_names_source_and_reason_of_each_component() -> None:
    rows = {r["what"]: r for r in doctor()}
    assert {"cpu", "ram", "gpu", "grid", "codecarbon"} <= set(rows)
    assert rows["cpu"]["source"]
    assert rows["cpu"]["why"]
    assert rows["grid"]["provenance"] == "constant"
    assert {r["what"]: r for r in doctor("FRA")}["grid"]["provenance"] == "estimated"
