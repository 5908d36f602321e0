"""A counter is believed step by step, never because a number arrived. Standard library only.

A step is possible where 0 <= step <= elapsed time × the most the device can draw. Any other (the
counter began anew after a suspend, a driver's reload or a plug's restart; a garbled reading) is
dropped and noted, and the time it spans is unseen. A reading that fails is no baseline; one that
fails in between is bridged by the next that is possible.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from greenvis.meters.record import UNSEEN

GRACE_S = 0.1  # a counter steps at times of its own, not at ours
# what a dropped step leaves unseen at least, so that a clock that stood still does not hide
# it
LEAST_S = 1e-6


class Counter:
    """`total`: the sum of a counter's possible steps since `opened`. All times are of the monotonic
    clock, in seconds.

    name: for notes; most: what it can grow by in a second (W, where it counts joules); wraps_at:
    the value after which it starts again from 0 (0: never); patience_s: how long a live one may
    stand still.
    """

    def __init__(
        self,
        name: str,
        most: float,
        opened: float,
        *,
        wraps_at: float = 0.0,
        patience_s: float = math.inf,
    ) -> None:
        self.name, self.total = name, 0.0
        self._most, self._wraps_at, self._patience_s = most, wraps_at, patience_s
        self._last: float | None = None
        self._failing = False
        self._dropped_s = 0.0
        self._read_at = self._moved_at = opened
        # small steps in a row do not outgrow time × most either
        self._credit, self._credit_at = (most * GRACE_S, opened)
        self._notes: dict[str, str] = {}
        self._new_notes: list[str] = []

    def take(self, now: float, reading: Any, why: str = "") -> None:
        """Take a reading, in the counter's own unit; None where it could not be read, for the
        reason `why`."""
        value = _number(reading)
        if value is None:
            self._failing = True
            self._note("unreadable", f"could not be read ({why or repr(reading)})")
            return
        grown = self._credit + self._most * max(0.0, now - self._credit_at)
        self._credit = min(grown, self._most * (GRACE_S + max(0.0, now - self._moved_at)))
        self._credit_at = now
        if self._last is None:
            if now > self._read_at:
                self._note(
                    "late",
                    f"tells nothing of the {now - self._read_at:.3g} s before its first reading",
                )
            self._drop(now, LEAST_S if self._failing else 0.0)
        elif value != self._last:
            self._step(now, value, self._last)
        self._last, self._read_at, self._failing = value, now, False

    def lose(self, now: float, why: str) -> None:
        """Give up the baseline: what the counter did since the last reading cannot be told."""
        if self._last is not None:
            self._note("lost", f"may have begun anew: {why}")
            self._drop(now)
            self._last, self._read_at = None, now

    def unseen_s(self, now: float) -> float:
        """Return the seconds since `opened` of which nothing is known. It falls again when a
        reading bridges a gap."""
        since = self._blind_since(now)
        return self._dropped_s + (0.0 if since is None else max(0.0, now - since))

    @property
    def doubted(self) -> bool:
        """Whether anything was ever amiss."""
        return bool(self._notes) or self._dropped_s > 0

    def new_notes(self) -> list[str]:
        """Return what was amiss since the last call, each kind once."""
        out, self._new_notes = self._new_notes, []
        return out

    def _step(self, now: float, value: float, last: float) -> None:
        step = value - last
        turns = self._wraps_at > 0 and max(value, last) <= self._wraps_at
        if step < 0 and turns:
            step += self._wraps_at
        if turns and (now - self._read_at) * self._most >= self._wraps_at:
            self._note(
                "seldom",
                f"was not read for {now - self._read_at:.3g} s, in which it may have wrapped "
                "around unseen",
            )
            self._drop(now)
        elif 0 <= step <= self._credit:
            self.total += step
            self._credit -= step
        else:
            waited = now - self._moved_at
            self._note(
                "jump",
                f"went from {last:.7g} to {value:.7g} within {waited:.2g} s, which cannot be: step "
                "dropped",
            )
            self._drop(now)
        self._moved_at = now

    def _drop(self, now: float, least: float = LEAST_S) -> None:
        since = self._blind_since(now)
        self._dropped_s += max(least, now - (self._read_at if since is None else since))
        self._moved_at = now

    def _blind_since(self, now: float) -> float | None:
        """Return since when the counter has told nothing; None where it is well."""
        if self._last is not None and now - self._moved_at > self._patience_s:
            self._note("still", "stood still")
            return self._moved_at
        return self._read_at if self._failing or self._last is None else None

    def _note(self, kind: str, text: str) -> None:
        if kind not in self._notes:
            self._notes[kind] = text
            self._new_notes.append(f"{self.name}: the counter {text}")


def readings(quantity: str, counters: Sequence[Counter], now: float) -> dict[str, float]:
    """Return {quantity: the counters' sum} and, where any was ever amiss, the mean of their unseen
    seconds."""
    out = {quantity: math.fsum(c.total for c in counters)}
    unseen = math.fsum(c.unseen_s(now) for c in counters) / len(counters)
    return out | {quantity + UNSEEN: unseen} if any(c.doubted for c in counters) else out


def new_notes(counters: Iterable[Counter]) -> list[str]:
    """Return the counters' new notes, in order."""
    return [note for c in counters for note in c.new_notes()]


def _number(reading: Any) -> float | None:
    try:
        value = float(reading)
    except (TypeError, ValueError, OverflowError):
        return None
    return value if math.isfinite(value) else None
