"""What a source of energy readings is: which parts of a machine it covers, whether it can be read
here, and counters that are believed step by step."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple

from greenvis.meters import host
from greenvis.meters.counter import Counter, new_notes, readings

ONE = {"low": 1.0, "central": 1.0, "high": 1.0, "unit": "J per J"}
Reader = Callable[[float], float]


class Unavailable(Exception):
    """A source, or one of its counters, cannot be read.

    Args:
        reason: why, in words, for records and `greenvis doctor`.
        missing: whether what it would measure is in this machine all the same, so that its energy
            is missing where no other source covers it.
    """

    def __init__(self, reason: str, *, missing: bool = False) -> None:
        super().__init__(reason)
        self.missing = missing


class MeterSource(ABC):
    """One kind of counter. A new one is one file: a name, what it covers, and `connect`.

    Attributes:
        reason: why it cannot be read here; "" where it is open.
        missing: see `Unavailable`.
        components: what it offers to a record: see `component`.

    Example:
        >>> class Plug(MeterSource):
        ...     name, quantities = "plug", {"machine": "plug_j"}
        ...     def connect(self, coefficients):
        ...         self.watch("machine", lambda now: 60.0 * now, most=3680.0)
        ...         return [self.component("machine", reason="a lamp of 60 W")]
        >>> plug = Plug()
        >>> plug.open({})
        >>> plug.reason, [c["source"] for c in plug.components]
        ('', ['plug'])
    """

    name: ClassVar[str]
    # by component ("cpu", "ram", "gpu", or "machine": all there is), the quantity it is recorded
    # as; of joules it ends with "_j", and no other source has the same
    quantities: ClassVar[Mapping[str, str]]
    # kinds of accelerator (`meters.devices`) whose energy is in it
    accelerators: ClassVar[frozenset[str]] = frozenset()
    # whether its counters are a device's: slow to read, and maybe begun anew after a sleep
    external: ClassVar[bool] = True

    def __init__(self) -> None:
        self.close("it was not opened")

    @abstractmethod
    def connect(self, coefficients: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Find the counters, `watch` each, and return a `component` for each part they cover.

        Args:
            coefficients: what `meters.coefficients` loads, for what is no counter of joules.

        Raises:
            Unavailable: where they cannot be read here.
        """

    def revise(self) -> None:  # noqa: B027 (most have nothing to do)
        """Look again at what can be known only while the run goes on; `components` may change."""

    def open(self, coefficients: Mapping[str, Any]) -> None:
        """Connect; what prevents it becomes `reason`, and nothing is raised."""
        self.close("")
        try:
            self.components = self.connect(coefficients)
        except Exception as error:  # a driver's, a user's: the run goes on without it
            self.close(in_words(error), missing=getattr(error, "missing", False))

    def close(self, reason: str, *, missing: bool = False) -> None:
        """Read nothing any more."""
        self.reason, self.missing = reason, missing
        self.components: list[dict[str, Any]] = []
        self._watched: dict[str, list[_Watched]] = {}

    def watch(
        self,
        component: str,
        read: Reader,
        most: float,
        label: str = "",
        *,
        wraps_at: float = 0.0,
        patience_s: float = math.inf,
        since: float | None = None,
    ) -> Counter:
        """Count from now on. Several counters of one component add up.

        Args:
            component: a key of `quantities`.
            read: takes the monotonic clock's seconds and returns what the counter says, in joules
                (or the quantity's own unit) since any moment; whatever it raises is a reading that
                failed. See `Integral` where only a power is known.
            most: what it can grow by in a second, in W; a step beyond it is not believed.
            label: for notes.
            wraps_at: the value after which the counter starts again from 0; 0 for never.
            patience_s: how long a counter that is well may stand still.
            since: the moment from which it should have counted, where that is not now.

        Returns:
            The counter, of which the first reading is taken.
        """
        now = host.clocks()[0]
        opened = now if since is None else since
        counter = Counter(
            label or self.name, most, opened, wraps_at=wraps_at, patience_s=patience_s
        )
        watched = _Watched(counter, read)
        self._watched.setdefault(self.quantities[component], []).append(watched)
        watched.poll(now)
        return counter

    def component(self, name: str, reason: str = "", **fields: Any) -> dict[str, Any]:
        """Return what a record says of a part this source measures, from which `meters.pricing`
        gives its joules.

        Args:
            name: a key of `quantities`.
            reason: why it is believed.
            fields: where it is otherwise than a measured counter of the whole machine: "source"
                (the method's name), "scope", "coefficient", "provenance", "citation", "devices", …
        """
        return {
            "name": name, "source": self.name, "scope": "machine",
            "observation": self.quantities[name], "coefficient": ONE, "provenance": "measured",
            "citation": "", "reason": reason, **fields,
        }  # fmt: skip

    def read(self, now: float | None = None, *, fresh: bool = True) -> dict[str, float]:
        """Return running totals since opening, by quantity, and for each counter that was ever in
        doubt the seconds of which nothing is known ("plug_j_unseen_s").

        Args:
            now: the monotonic clock, in seconds.
            fresh: ask the counters; else what they said last.
        """
        now = host.clocks()[0] if now is None else now
        out: dict[str, float] = {}
        for quantity, watched in self._watched.items():
            for counter in watched:
                if fresh:
                    counter.poll(now)
            out |= readings(quantity, [w.counter for w in watched], now)
        return out

    def lose(self, now: float, why: str) -> None:
        """Give up the counters' baselines: what they did since the last reading cannot be told."""
        for counter in self._counters():
            counter.lose(now, why)

    def new_notes(self) -> list[str]:
        """Return in words what was amiss with the readings since the last call."""
        return new_notes(self._counters())

    def _counters(self) -> list[Counter]:
        return [w.counter for watched in self._watched.values() for w in watched]


class Integral:
    """A power (W) integrated over the time between readings, read as a counter of joules.

    Args:
        rate: returns the power now.
    """

    def __init__(self, rate: Callable[[], float]) -> None:
        self._rate, self._total = rate, 0.0
        self._last: tuple[float, float] | None = None

    def __call__(self, now: float) -> float:
        rate = self._rate()
        before, at = self._last or (rate, now)
        self._total += (before + rate) / 2 * (now - at)
        self._last = rate, now
        return self._total


class _Watched(NamedTuple):
    counter: Counter
    read: Reader

    def poll(self, now: float) -> None:
        try:
            value = self.read(now)
        except Exception as error:  # a plug out of reach, a GPU off the bus: training goes on
            self.counter.take(now, None, in_words(error))
        else:
            self.counter.take(now, value)


def in_words(error: Exception) -> str:
    """Return why in words; never empty."""
    text = str(error) if isinstance(error, Unavailable) else f"{type(error).__name__}: {error}"
    return text or "no reason was given"
