"""Ends of a process that would otherwise lose the last second: exit without stop, SIGTERM, SIGHUP,
fork.

Only default signal handlers are replaced, only from the main thread, and the process still dies of
the signal.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import sys
import threading
from typing import Protocol

SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name))


class Tracked(Protocol):
    """What an active tracker must offer here."""

    def busy_here(self) -> bool:
        """Say whether the calling thread is just changing the tracker's state."""
        ...

    def stop(self, status: str = "done", reason: str = "") -> None:
        """End the run."""
        ...

    def forget(self) -> None:
        """Become inert: this is a forked child, and the run is its parent's."""
        ...


_active: list[Tracked] = []
_handled: list[int] = []
_pending: list[int] = []
_hooked = False


def enter(tracker: Tracked) -> None:
    """Watch over a tracker until `leave`."""
    global _hooked
    if not _hooked:
        _hooked = True
        atexit.register(_at_exit)
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=_after_fork)
    if not _active and threading.current_thread() is threading.main_thread():
        for number in SIGNALS:
            if signal.getsignal(number) is signal.SIG_DFL:
                signal.signal(number, _on_signal)
                _handled.append(number)
    _active.append(tracker)


def leave(tracker: Tracked) -> None:
    """Stop watching over a tracker; the last one gives the signals back, unless somebody took them
    over since."""
    if tracker in _active:
        _active.remove(tracker)
    if not _active and threading.current_thread() is threading.main_thread():
        _give_back()


def active() -> list[Tracked]:
    """Return the trackers of this process that run now, outermost first."""
    return list(_active)


def deliver() -> None:
    """Act on a signal that arrived while a tracker's state was being changed."""
    if _pending and threading.current_thread() is threading.main_thread():
        _die_of(_pending.pop())


def _on_signal(number: int, frame: object) -> None:
    if any(t.busy_here() for t in _active):
        _pending.append(number)  # `deliver` is called as soon as the state is whole again
    else:
        _die_of(number)


def _die_of(number: int) -> None:
    for tracker in reversed(active()):
        tracker.stop("stopped", signal.Signals(number).name)
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)


def _give_back() -> None:
    for number in _handled:
        with contextlib.suppress(ValueError):  # not the main thread of this process
            if signal.getsignal(number) is _on_signal:
                signal.signal(number, signal.SIG_DFL)
    _handled.clear()


def _at_exit() -> None:
    error = getattr(sys, "last_value", None)
    for tracker in reversed(active()):
        if error is not None:
            status = "stopped" if isinstance(error, KeyboardInterrupt) else "failed"
            tracker.stop(status, f"{type(error).__name__}: {error}")
        else:
            tracker.stop("stopped", "the program ended without stop()")


def _after_fork() -> None:
    for tracker in _active:
        tracker.forget()
    _active.clear()
    _pending.clear()
    _give_back()
