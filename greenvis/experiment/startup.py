"""What starting a process costs before an arm is trained: imports, checks, data, first calls. A
line of its own, in no arm."""

from __future__ import annotations

import contextlib
import tempfile
import time
from pathlib import Path

from greenvis.core import distributed
from greenvis.core.wrap import wrap
from greenvis.experiment import loop
from greenvis.experiment.prepare import Prepared, Short
from greenvis.meters.processes import TICK_S, open_tree
from greenvis.meters.record import STARTUP
from greenvis.meters.track import Tracker

_warm: set[str] = set()  # what this process has called before


class Beginning:
    """When a call began, or, of a process that was started for it, when that did; `book` writes
    down what passed since."""

    def __init__(self, fresh_process: bool) -> None:
        fresh_process &= not _warm  # a worker is new but once
        self._cpu_s = 0.0 if fresh_process else time.process_time()
        self._begun_s = time.monotonic() - (_age_s() if fresh_process else 0.0)
        self._booked = False

    def book(self, tracker: Tracker, prepared: Prepared) -> None:
        """Write down, once, what passed since the beginning, and make the first calls that this
        process has not made."""
        if self._booked:
            return
        self._booked = True
        wall_s, cpu_s = time.monotonic() - self._begun_s, time.process_time() - self._cpu_s
        gb_s = _resident_gb() / 2 * wall_s  # it grew from nothing to that
        tracker.add(STARTUP, wall_s=wall_s, cpu_s=cpu_s, ram_gb_s=gb_s)
        if "steps" not in _warm:
            _warm.add("steps")
            # what cannot be trained says so in its arm
            with tracker.phase(STARTUP), contextlib.suppress(Exception):
                warm_up(prepared)


def warm_up(prepared: Prepared) -> None:
    """Train a step of a job on a model that is thrown away, so that no arm pays for what happens
    once in a process."""
    first = (prepared.stages or [prepared])[0]
    spec = first.job.arm.train.model_copy(update={"epochs": 1, "target": None})
    images = prepared.images.train
    short = first.cut_short(Short(batches=1, tests=1), spec, images, images)
    if distributed.world_size() > 1:  # the others' share of so little is none
        wrap(short.build(), short.techniques(), task=short.task).undo()
        return
    with tempfile.TemporaryDirectory() as folder, short.tracker(Path(folder)) as run:
        outcome = loop.run(short, run)
    outcome.live.undo()


def _resident_gb() -> float:
    try:
        return open_tree().resident_gb()
    except (ImportError, OSError, RuntimeError, ValueError):
        return 0.0


def _age_s() -> float:
    """Return for how long this process has run; 0 where the system does not say."""
    try:
        ticks = int(Path("/proc/self/stat").read_bytes().rsplit(b")", 1)[1].split()[19])
        return float(Path("/proc/uptime").read_text().split()[0]) - ticks * TICK_S
    except (OSError, IndexError, ValueError):
        return 0.0
