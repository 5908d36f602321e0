"""A pause is not the run's: wall time without processor time is neither idle power nor memory that
is held."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import greenvis as gv
from greenvis.meters import pricing
from greenvis.meters.processes import ProcessTree
from greenvis.meters.record import Run, find, read

PAUSE_S = 1.6
MACHINE = """
import hashlib, sys, time
import greenvis as gv
from greenvis.meters.energy import Meter
from greenvis.meters.sources.base import MeterSource
from greenvis.meters.sources.cpu_time import CpuTime

class HundredWatts(MeterSource):
    "A machine whose counter sees 100 W."
    name, quantities = "rapl", {"cpu": "cpu_j"}
    external = False  # read at each cut, so that it says what passed up to then
    def connect(self, coefficients):
        self.watch("cpu", lambda now: 100 * now, 1000)
        return [self.component("cpu")]

def Machine():
    return Meter(sources=[HundredWatts(), CpuTime()])

def burn(seconds):
    end = time.process_time() + seconds
    while time.process_time() < end: sum(range(1000))

"""


def run_it(folder: Path, body: str, stopped: bool) -> tuple[Run, float]:
    """Run a program under a tracker, stop it between its first word and its second, and return
    record and seconds stopped."""
    process = subprocess.Popen(
        [sys.executable, "-c", MACHINE + body, str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "now\n"
    begun = time.monotonic()
    if stopped:
        os.kill(process.pid, signal.SIGSTOP)
        os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WNOWAIT)
        time.sleep(PAUSE_S)
        os.kill(process.pid, signal.SIGCONT)
    seconds = time.monotonic() - begun
    process.communicate("go\n", timeout=600)
    assert process.returncode == 0
    (path,) = find([folder])
    return read(path), seconds


BUSY = (
    "with gv.track('t', dir=sys.argv[1], source=Machine(), interval_s=0.1) as run:\n    "
    "burn(0.3)\n    "
)
WAITING = BUSY.replace("burn(0.3)", "pass")


@pytest.mark.one_in(3)
@pytest.mark.parametrize(
    "body",
    [
        BUSY + "print('now', flush=True); burn(0.5); sys.stdin.readline()",  # it computes
        WAITING + "print('now', flush=True); sys.stdin.readline()",  # it waits
        BUSY
        + "with run.phase('train'):\n        print('now', flush=True); burn(0.5); run.log(epoch=1)",
    ],
)
def test_a_stopped_process_is_not_charged_for_the_time(tmp_path: Path, body: str) -> None:
    run, seconds = run_it(tmp_path, body, stopped=True)
    paused, wall = run.sum("paused_wall_s") or 0.0, run.sum("wall_s") or 0.0
    assert seconds - 0.3 < paused < seconds + 0.5
    assert wall + paused == pytest.approx(run.end["mono_s"] - run.header["mono_s"], rel=0.05)
    joules = pricing.run_energy(run).value or 0.0
    assert 100 * wall <= joules < 100 * wall + 5  # memory is little
    assert (run.sum("paused_cpu_j") or 0.0) == pytest.approx(100 * paused)  # observed, not charged
    assert (run.sum("paused_ram_gb_s") or 0.0) > 0
    assert run.sum("paused_cpu_s") is None


def test_what_only_waits_is_charged(tmp_path: Path) -> None:
    body = WAITING + f"time.sleep({PAUSE_S}); print('now', flush=True); sys.stdin.readline()"
    run, _ = run_it(tmp_path, body, stopped=False)
    assert run.sum("paused_wall_s") is None
    assert (pricing.run_energy(run).value or 0.0) >= 100 * PAUSE_S


@pytest.mark.slow
def test_a_long_computation_that_holds_the_interpreter_is_no_pause(tmp_path: Path) -> None:
    hog = (
        "n = 10**6\n    while True:\n        began = time.monotonic(); pow(3, n); n *= 2\n"
        "        if time.monotonic() - began > 1.5: break\n    print('now', flush=True); "
        "sys.stdin.readline()"
    )
    run, _ = run_it(tmp_path, BUSY + hog, stopped=False)
    assert run.sum("paused_wall_s") is None


def test_what_waits_for_a_processor_that_others_have_is_no_pause(tmp_path: Path) -> None:
    begin = (
        "import os, subprocess\n"
        "os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])\n"
        "os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))\n"
    )
    hog = (
        "others = subprocess.Popen([sys.executable, '-c', 'import os, time; "
        "os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0)); end = time.process_time() "
        "+ 3\\nwhile time.process_time() < end: pass'])\n    "
        "while others.poll() is None: burn(0.01)\n    "
        "print('now', flush=True); sys.stdin.readline()"
    )
    run, _ = run_it(tmp_path, begin + BUSY + hog, stopped=False)
    assert run.sum("paused_wall_s") is None


def test_a_command_that_is_stopped_is_not_charged(tmp_path: Path) -> None:
    command = "import os, signal; print(os.getpid(), flush=True); input()"
    body = (
        "from greenvis.meters.command import track_command\n"
        f"code, run = track_command([sys.executable, '-c', {command!r}], dir=sys.argv[1], "
        "source=Machine())\nsys.exit(code)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", MACHINE + body, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    pid = int(process.stdout.readline())
    begun = time.monotonic()
    os.kill(pid, signal.SIGSTOP)
    time.sleep(PAUSE_S)
    os.kill(pid, signal.SIGCONT)
    seconds = time.monotonic() - begun
    process.communicate("go\n", timeout=600)
    assert process.returncode == 0
    run = read(next(find([tmp_path])))
    assert seconds - 0.5 < (run.sum("paused_wall_s") or 0.0) < seconds + 0.5
    assert (run.sum("cpu_j") or 0.0) == pytest.approx(100 * (run.sum("wall_s") or 0.0))


def test_memory_of_a_stopped_child_is_not_counted() -> None:
    child = subprocess.Popen(
        [sys.executable, "-c", "import sys; b = bytearray(b'x' * 100_000_000); print('now', "
                               "flush=True); sys.stdin.read()"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    assert child.stdout is not None
    child.stdout.readline()
    tree = ProcessTree()
    tree.cpu_s()
    running = tree.resident_gb()
    os.kill(child.pid, signal.SIGSTOP)
    os.waitid(os.P_PID, child.pid, os.WSTOPPED | os.WNOWAIT)
    stopped = tree.resident_gb()
    os.kill(child.pid, signal.SIGCONT)
    child.communicate()
    assert running - stopped > 0.1


def test_the_report_says_what_stood_still(tmp_path: Path) -> None:
    run_it(
        tmp_path / "runs", WAITING + "print('now', flush=True); sys.stdin.readline()", stopped=True
    )
    gv.report([tmp_path / "runs"], out=tmp_path / "out")
    assert "stood still for" in (tmp_path / "out" / "report.md").read_text()
