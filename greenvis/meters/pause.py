"""Time in which a process stood still: stopped by a signal, frozen with its container,
suspended."""

from __future__ import annotations

import time
from pathlib import Path

LATE_S = 1.0  # less is no pause, where the system does not say who was kept waiting
QUEUED = ("/proc/self/schedstat", "/proc/thread-self/schedstat")  # of the main thread, of this one
IDLE = 0.1  # CPUs: what a process that seems to do nothing may still use


class Pauses:
    """Tells from the clock and the processor time of this process how much of the time between two
    looks it stood still.

    A sampler looks at it every `interval_s`. A look that comes later than it should, in a time that
    took next to no processor time and in which nothing waited for a processor, is one that could
    not come: pauses shorter than about a second more than the interval are not noticed.
    """

    def __init__(self, interval_s: float) -> None:
        self._interval_s = interval_s
        self._at, self._cpu = time.monotonic(), time.process_time()
        self._queued_s = _queued_s()
        self._ran_s = self._used_s = 0.0

    def share(self) -> float:
        """Return the share of the time since the last look in which the process stood still, 0 to
        1."""
        at, cpu, queued_s = time.monotonic(), time.process_time(), _queued_s()
        elapsed, used = at - self._at, cpu - self._cpu
        waited = max(0.0, queued_s - self._queued_s)  # below: another thread looks than before
        self._at, self._cpu, self._queued_s = at, cpu, queued_s
        # CPUs it usually keeps busy
        rate = max(self._used_s / self._ran_s if self._ran_s else 1.0, IDLE)
        late = elapsed > self._interval_s + LATE_S and used + waited < rate * elapsed / 2
        ran = min(self._interval_s, used / rate) if late else elapsed
        self._ran_s, self._used_s = self._ran_s + ran, self._used_s + used
        return 1 - ran / elapsed if late else 0.0


def _queued_s() -> float:
    """Return for how long this process was ready to run and got no processor; 0 where the system
    does not say."""
    try:
        return sum(int(Path(file).read_text().split()[1]) for file in QUEUED) / 1e9
    except (OSError, IndexError, ValueError):
        return 0.0
