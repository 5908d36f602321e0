"""Running totals by phase: every cut gives what was used since the last one to the phase it was
used in."""

from __future__ import annotations

from collections.abc import Iterator

from greenvis.meters.counter import Counter, new_notes
from greenvis.meters.energy import Meter, Source
from greenvis.meters.pause import Pauses
from greenvis.meters.record import PAUSED, UNSEEN

MOST_W = 20_000.0  # of a whole machine: above the largest of eight GPUs
MOST = {"cpu_s": 4096.0, "ram_gb_s": 65536.0}  # CPUs and GB that one machine may have


class Ledger:
    """Nested phases over one source. Phases are disjoint paths ("train/epoch3"): they sum to the
    run exactly.

    Whatever the source, what prices energy is believed only step by step: see `meters.counter`.
    What passes while the process stands still is kept apart, as "paused_wall_s" and the like: it is
    not the run's.
    Not safe for threads by itself: the tracker holds a lock around it.
    """

    def __init__(self, source: Source, interval_s: float = 1.0) -> None:
        self.source = source
        self.paused = (
            False  # said from outside: what is metered stands still, though this process does not
        )
        self._pauses = Pauses(interval_s)
        self.totals: dict[str, dict[str, float]] = {}
        self._counters: dict[str, Counter] = {}
        first = source.read()
        self._opened = first["wall_s"]
        self._last = self._believed(first)
        self._stack: list[str] = []
        self._changed: set[str] = set()

    @property
    def phase(self) -> str:
        """The path of the innermost open phase; "" outside of any."""
        return self._stack[-1] if self._stack else ""

    def enter(self, name: str) -> str:
        """Open a phase below the current one and return its path."""
        self.cut(full=False)
        path = f"{self._stack[-1]}/{name}" if self._stack else name
        self._stack.append(path)
        return path

    def leave(self, path: str) -> None:
        """Close a phase (the innermost of that path); closing one that is not open does nothing."""
        self.cut(full=False)
        for i in range(len(self._stack) - 1, -1, -1):
            if self._stack[i] == path:
                del self._stack[i]
                return

    def cut(self, *, full: bool = True) -> None:
        """Read the source and give the difference to the current phase."""
        now = self._believed(self.source.read(full))
        phase = self.phase
        totals = self.totals.setdefault(phase, {})
        still = self._pauses.share()
        still = 1.0 if self.paused else still
        for quantity, value in now.items():
            step = value - self._last.get(quantity, 0.0)
            if quantity == "wall_s":
                step = max(0.0, step)  # a clock that was put back takes no time away
            if still and quantity != "cpu_s":  # processor time is work, whenever it was used
                totals[PAUSED + quantity] = totals.get(PAUSED + quantity, 0.0) + step * still
                step *= 1 - still
            totals[quantity] = totals.get(quantity, 0.0) + step
        self._last.update(now)
        self._changed.add(phase)

    def new_notes(self) -> list[str]:
        """Return what was amiss with the source's readings since the last call."""
        own = self.source.new_notes() if isinstance(self.source, Meter) else []
        return own + new_notes(self._counters.values())

    def _believed(self, reading: dict[str, float]) -> dict[str, float]:
        """Return the reading with the counters' impossible steps left out, and the seconds they
        leave unseen."""
        out, now = dict(reading), reading["wall_s"]
        for quantity, value in reading.items():
            if quantity in MOST or quantity.endswith("_j"):
                counter = self._counters.get(quantity)
                if counter is None:
                    most = MOST.get(quantity, MOST_W)
                    counter = self._counters[quantity] = Counter(quantity, most, self._opened)
                counter.take(now, value)
                out[quantity] = counter.total
                if counter.doubted:
                    out[quantity + UNSEEN] = reading.get(quantity + UNSEEN, 0.0) + counter.unseen_s(
                        now
                    )
        return out

    def add(self, phase: str | None = None, **quantities: float) -> None:
        """Add counts (samples, steps, flops) to a phase; None: the current one."""
        phase = self.phase if phase is None else phase
        totals = self.totals.setdefault(phase, {})
        for quantity, value in quantities.items():
            totals[quantity] = totals.get(quantity, 0.0) + value
        self._changed.add(phase)

    def changed(self) -> Iterator[tuple[str, dict[str, float]]]:
        """Yield each phase that changed since the last call, with its totals."""
        changed, self._changed = self._changed, set()
        for phase in sorted(changed):
            if phase in self.totals:
                yield phase, self.totals[phase]

    def sums(self) -> dict[str, float]:
        """Return each quantity over all phases."""
        out: dict[str, float] = {}
        for totals in self.totals.values():
            for quantity, value in totals.items():
                out[quantity] = out.get(quantity, 0.0) + value
        return out
