"""A wall meter: the user's own function that reads a smart plug or a server's management board."""

from __future__ import annotations

from collections.abc import Callable

from greenvis.meters.counter import Counter, readings

MOST_W = 20_000.0  # no machine of eight GPUs draws more
PATIENCE_S = 1800.0  # a plug that counts whole watt-hours moves rarely


class WallMeter:
    """The user's own function that returns joules of the whole machine so far, in whatever state it
    is."""

    def __init__(self, function: Callable[[], float], opened: float) -> None:
        self._function = function
        self._counter = Counter("wall meter", MOST_W, opened, patience_s=PATIENCE_S)

    def read(self, now: float) -> dict[str, float]:
        """Return {"meter_j"}: joules since opening, and how long they could not be told."""
        try:
            self._counter.take(now, self._function())
        except (
            Exception
        ) as error:  # the user's function: a plug out of reach must not end the training
            self._counter.take(now, None, f"{type(error).__name__}: {error}")
        return self.so_far(now)

    def so_far(self, now: float) -> dict[str, float]:
        """Return the same without reading anew."""
        return readings("meter_j", [self._counter], now)

    def lose(self, now: float, why: str) -> None:
        """Give up the baseline."""
        self._counter.lose(now, why)

    def new_notes(self) -> list[str]:
        """Return what was amiss since the last call."""
        return self._counter.new_notes()
