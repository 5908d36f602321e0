"""Time in which a process stood still: stopped by a signal, frozen with its container,
suspended."""

from __future__ import annotations

import time

LATE_S = 1.0  # a sampler that is as late as this was not merely kept waiting by busy neighbours
IDLE = 0.1  # CPUs: what a process that seems to do nothing may still use


class Pauses:
    """Tells from the clock and the processor time of this process how much of the time between two
    looks it stood still.

    A sampler looks at it every `interval_s`. A look that comes later than it should, in a time that
    took next to no processor
    time, is one that could not come: pauses shorter than about a second more than the interval are
    not noticed.
    """

    def __init__(self, interval_s: float) -> None:
        self._interval_s = interval_s
        self._at, self._cpu = time.monotonic(), time.process_time()
        self._ran_s = self._used_s = 0.0

    def share(self) -> float:
        """Return the share of the time since the last look in which the process stood still, 0 to
        1."""
        at, cpu = time.monotonic(), time.process_time()
        elapsed, used = at - self._at, cpu - self._cpu
        self._at, self._cpu = at, cpu
        # CPUs it usually keeps busy
        rate = max(self._used_s / self._ran_s if self._ran_s else 1.0, IDLE)
        late = elapsed > self._interval_s + LATE_S and used < rate * elapsed / 2
        ran = min(self._interval_s, used / rate) if late else elapsed
        self._ran_s, self._used_s = self._ran_s + ran, self._used_s + used
        return 1 - ran / elapsed if late else 0.0
