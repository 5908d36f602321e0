"""The contexts of a tracker: a phase of the run, a time in which it stands still, the lock its
state is changed under."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from greenvis.meters import endings

if TYPE_CHECKING:
    from greenvis.meters.track import Tracker


class Phase:
    """The context `Tracker.phase` returns. May be entered again after it was left."""

    __slots__ = ("_name", "_path", "_tracker")

    def __init__(self, tracker: Tracker, name: str) -> None:
        self._tracker, self._name, self._path = tracker, name, ""

    def __enter__(self) -> Phase:
        t = self._tracker
        with DeferSignals(t):
            if t._state == "running":
                self._path = t._ledger.enter(self._name)
        return self

    def __exit__(self, *_: object) -> None:
        t = self._tracker
        with DeferSignals(t):
            if t._state == "running":
                t._ledger.leave(self._path)


class Standstill:
    """A time in which what the tracker meters is stopped, though this process is not: nothing of it
    is charged to the run."""

    __slots__ = ("_tracker",)

    def __init__(self, tracker: Tracker) -> None:
        self._tracker = tracker

    def __enter__(self) -> None:
        self._say(True)

    def __exit__(self, *_: object) -> None:
        self._say(False)

    def _say(self, paused: bool) -> None:
        t = self._tracker
        with DeferSignals(t):
            if t._state == "running":
                t._ledger.cut()
                t._ledger.paused = paused


class DeferSignals:
    """Holds the tracker's lock; a signal that comes meanwhile is acted on when the state is whole
    again."""

    __slots__ = ("_before", "_tracker")

    def __init__(self, tracker: Tracker) -> None:
        self._tracker = tracker

    def __enter__(self) -> None:
        t = self._tracker
        t._lock.acquire()
        self._before, t._owner = t._owner, threading.get_ident()

    def __exit__(self, *_: object) -> None:
        t = self._tracker
        t._owner = self._before
        t._lock.release()
        if self._before is None:
            endings.deliver()
