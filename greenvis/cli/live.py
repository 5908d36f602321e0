"""How a training goes, as it goes: one live display on a terminal, plain lines without."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from greenvis.errors import printable
from greenvis.experiment.watch import Watch, epochs_of, title
from greenvis.meters.units import duration, figures, si
from greenvis.report.formatting import gain
from greenvis.report.measures import written
from greenvis.tasks.base import Measure

EVERY_S = 30.0  # between two lines of one run, where no terminal shows them live
LEAST_SHARE = 0.02  # of the work, from which on the rest of the time is estimated
SEPARATOR = "  ·  "


class Progress(Watch):
    """Which run of how many is at work, its epoch, loss, metric and joules, and how long all of
    them will take.

    Args:
        say: Takes a line.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        super().__init__(say)
        self._number, self._total = 0, 0
        self._left: list[int] = []  # epochs of the jobs that are not over, the present one first
        self._trained, self._epoch, self._epochs = 0, 0, 0
        self._earlier = 0  # epochs of these that an interrupted call trained
        self._begun: float | None = None
        self._name = ""
        self._tracker: Any = None
        self._measure = Measure("")
        self._values: dict[str, float] = {}
        self._spent_j, self._now_j = 0.0, None
        self._last = 0.0

    def planned(self, jobs: Sequence[Any]) -> None:
        self._number, self._total = 0, len(jobs)
        self._left = [epochs_of(job) for job in jobs]

    def skipped(self, job: Any, why: str) -> None:
        self._next()
        self.say(f"{self.heading}{title(job)}: done before, kept{why}")
        self._left = self._left[1:]

    def began(self, job: Any, why: str) -> None:
        self._next()
        self._begun = self._begun or time.monotonic()
        self._name, self._tracker, self._values = title(job), None, {}
        self._epoch, self._epochs, self._now_j = 0, epochs_of(job), None
        self._last = time.monotonic()
        self.announce(f"{self.heading}{self._name}: training{why}", bool(why))

    def metered(self, tracker: Any, measure: Measure) -> None:
        self._tracker, self._measure = tracker, measure
        tracker.on_log = self._heard

    def ended(self, job: Any, tracker: Any, metrics: dict[str, float]) -> None:
        joules = tracker.energy().value
        self._spent_j += joules or 0.0
        self._trained += self._epochs
        self._left, self._tracker, self._now_j = self._left[1:], None, None
        value = metrics.get(self._measure.name)
        took = duration(tracker.observed().get("wall_s"))
        parts = [self._written(value), f"{si(joules, 'J')} with start-up and measuring", took]
        self.say(f"{self.heading}{title(job)}: {', '.join([*parts, *self._remaining()])}")

    @property
    def heading(self) -> str:
        """Which run of how many: "run 3 of 13: "."""
        return f"run {self._number} of {self._total}: " if self._total else ""

    def announce(self, text: str, unusual: bool) -> None:
        """Say that a run begins. unusual: whether there is more to say than that."""
        self.say(text)

    def state(self) -> list[str]:
        """Return how far the present run has come, in parts: "epoch 4 of 6", "loss 0.41", …."""
        parts = [f"epoch {min(self._epoch + 1, self._epochs)} of {self._epochs}"]
        if "loss" in self._values:
            parts.append(f"loss {figures(self._values['loss'])}")
        if self._measure.name in self._values:
            parts.append(self._written(self._values[self._measure.name]))
        parts.append(f"{si(self._now_j, 'J')} so far" if self._now_j else "starting")
        if self._spent_j:
            parts.append(f"all runs {si(self._spent_j + (self._now_j or 0.0), 'J')}")
        return [*parts, *self._remaining()]

    def read(self) -> None:
        """Read the joules so far."""
        tracker = self._tracker
        if tracker is not None:
            self._now_j = tracker.energy().value

    def _written(self, value: float | None) -> str:
        """Return the metric with its name: "accuracy 71.2 %"."""
        return f"{written(self._measure)} {gain(self._measure, value)}".replace("\u00a0", " ")

    def _next(self) -> None:
        self._number += 1

    def _heard(self, values: Mapping[str, Any]) -> None:
        known = {k: v for k, v in values.items() if isinstance(v, (int, float))}
        self._values |= known
        if "loss" in known:
            if not self._epoch:
                self._epoch = int(known.get("epoch", 1)) - 1
                self._earlier += self._epoch
            self._epoch += 1
        if time.monotonic() - self._last > EVERY_S:
            self._last = time.monotonic()
            self.read()
            self.tell()

    def tell(self) -> None:
        """Say in a line how far the present run has come."""
        self.say(f"{self.heading}{self._name}: {', '.join(self.state())}")

    def _remaining(self) -> list[str]:
        """Return how long all that is left will take, [] where nothing tells it yet."""
        done = self._trained + min(self._epoch, self._epochs) * (self._tracker is not None)
        planned = self._trained + sum(self._left)
        here = done - self._earlier
        if self._begun is None or here < 1 or not LEAST_SHARE <= done / planned < 1:
            return []
        rest = (time.monotonic() - self._begun) * (planned - done) / here
        return [f"about {duration(rest) if rest >= 60 else f'{rest:.0f} s'} left"]

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        """Stop showing anything."""


class Live(Progress):
    """The same on a terminal: two lines that change, above them one for each run that is over."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.live import Live

        super().__init__(self._print)
        # what it draws is read first and drawn then: no lock of the meter's is held while drawing
        self._live = Live(console=Console(stderr=True), auto_refresh=False, transient=True)
        self._over = threading.Event()
        self._ticking = threading.Thread(target=self._tick, name="greenvis-live", daemon=True)

    def announce(self, text: str, unusual: bool) -> None:
        """Say what is unusual; that it begins is seen."""
        if unusual:
            self.say(text)

    def tell(self) -> None:
        """Leave it to the display."""

    def __enter__(self) -> Live:
        self._live.start()
        self._ticking.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop, and leave the lines of the runs."""
        self._over.set()
        self._ticking.join()
        self._live.stop()

    def shown(self) -> Any:
        """Return what is drawn, each line cut to the terminal."""
        from rich.console import Group
        from rich.text import Text

        if not self._name or not self._left:
            return Text("")
        first = Text.assemble((self.heading, "bold green"), (printable(self._name), "bold"))
        second = Text("  " + SEPARATOR.join(self.state()), style="dim")
        for text in (first, second):
            text.no_wrap, text.overflow = True, "ellipsis"
        return Group(first, second)

    def _tick(self) -> None:
        while not self._over.wait(1.0):
            self.read()
            self._live.update(self.shown(), refresh=True)

    def _print(self, text: str) -> None:
        self._live.console.print(printable(text), markup=False, highlight=False, soft_wrap=True)


def watch(as_json: bool, say: Callable[[str], None]) -> Progress:
    """Return what shows a training: live on a terminal, as lines without, not at all where the
    answer is for programs.

    Args:
        as_json: Whether it is.
        say: Takes a line.
    """
    if as_json:
        return Progress(lambda text: None)
    live = sys.stderr.isatty() and os.environ.get("TERM") != "dumb"
    return Live() if live else Progress(say)
