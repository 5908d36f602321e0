"""What a tracker reads on this machine: every source that can be read here, and which of them
prices each component.

Measured comes before estimated, and that before a constant; what sees the whole machine comes
before what sees a part. The meter returns running observations; `greenvis.meters.pricing` turns
them into joules, on reading.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Collection, Iterable
from typing import Any, Protocol

from greenvis.core import files
from greenvis.errors import BadInput
from greenvis.meters import devices, host
from greenvis.meters.coefficients import load_coefficients
from greenvis.meters.processes import TICK_S
from greenvis.meters.record import MOST_BYTES, PARTLY_UNKNOWN, PROVENANCES
from greenvis.meters.sources import installed
from greenvis.meters.sources.base import ONE as ONE
from greenvis.meters.sources.base import MeterSource, in_words
from greenvis.meters.sources.wall import Wall

CHEAP_S = 0.05  # counters that cost a driver call are read at most this often when phases are short
SLEPT_S = 1.0  # a machine that slept for longer may have begun its counters anew
MACHINE = "machine"  # the component that holds all others
COMPONENTS = (MACHINE, "cpu", "ram", "gpu")  # as records list them


class Source(Protocol):
    """What a tracker reads. `components` go into the record's header; quantities are running totals
    since opening."""

    components: list[dict[str, Any]]

    def read(self, full: bool = True) -> dict[str, float]:
        """Return wall_s and whatever else is observed; `full` False leaves out what is slow to
        read."""
        ...

    def corrections(self) -> list[dict[str, Any]]:
        """Return components that turned out otherwise since the start."""
        ...


class Meter:
    """The live source of this process on this machine.

    Args:
        coefficients: a file of the user's, over ours (see `load_coefficients`).
        wall_meter: a function returning joules of the whole machine so far (a smart plug, a
            server's management board), which then replaces every other component.
        sources: asked in place of those installed; the earlier first among equals.
    """

    def __init__(
        self,
        coefficients: str | os.PathLike[str] | None = None,
        wall_meter: Callable[[], float] | None = None,
        sources: Iterable[MeterSource] | None = None,
    ) -> None:
        self._table = load_coefficients(coefficients)
        self._noted: set[str] = set()
        self._notes: list[str] = []
        if sources is None:
            sources, problems = installed()
            for problem in problems:
                self._note(problem)
        self.sources = list(sources)
        if wall_meter is not None:
            self.sources = [Wall(wall_meter), *(s for s in self.sources if s.name != Wall.name)]
        self._open()
        self.model_on: set[str] = set()  # kinds of the devices the tracked model lies on
        self.components = self._chosen()
        self._fresh_at, self._slept = host.clocks()
        self._steal_s, self._steal_from = 0.0, host.steal_ticks()

    def _open(self) -> None:
        taken: dict[str, str] = {}
        for source in self.sources:
            source.open(self._table)
            for quantity in {c["observation"] for c in source.components}:
                if taken.setdefault(quantity, source.name) != source.name:
                    source.close(f"{taken[quantity]} records '{quantity}' already")

    def read(self, full: bool = True) -> dict[str, float]:
        """Return running totals: wall_s, what the sources observe (cpu_s, ram_gb_s, cpu_j, dram_j,
        gpu_j, meter_j, …), and steal_s where the system tells it.

        Beside a counter that was not to be believed for some time stands that time
        ("cpu_j_unseen_s").
        """
        now, slept = host.clocks()
        if slept - self._slept > SLEPT_S:
            for source in self.sources:
                if source.external:
                    source.lose(now, f"the machine slept for {slept - self._slept:.0f} s")
            self._slept = slept
        fresh = full or now - self._fresh_at > CHEAP_S
        if fresh:
            self._fresh_at = now
        out = {"wall_s": now}
        for source in self.sources:
            out |= source.read(now, fresh=fresh or not source.external)
        if self._steal_from is not None:
            if full:
                ticks = (host.steal_ticks() or 0) - self._steal_from
                self._steal_s = max(self._steal_s, ticks * TICK_S)
            out["steal_s"] = self._steal_s
        return out

    def _note(self, text: str) -> None:
        if text not in self._noted:
            self._noted.add(text)
            self._notes.append(text)

    def new_notes(self) -> list[str]:
        """Return in words what was amiss with the readings since the last call."""
        notes, self._notes = self._notes, []
        return notes + [note for source in self.sources for note in source.new_notes()]

    def corrections(self) -> list[dict[str, Any]]:
        """Return the components that turned out otherwise since the last call.

        A device in use that no counter covers gives a component without a figure; CUDA devices are
        told by the UUIDs that torch knows once it has opened them.
        """
        for source in self.sources:
            try:
                source.revise()
            except Exception as error:  # it stays what it was: no run ends for it
                self._note(f"meter source '{source.name}': {in_words(error)}")
        before, self.components = self.components, self._chosen()
        return [c for c in self.components if c not in before]

    def _chosen(self) -> list[dict[str, Any]]:
        """Return the component of the best source for each part of the machine, none counted
        twice."""
        offers = [c for source in self.sources for c in source.components]
        offers.sort(key=lambda c: (PROVENANCES.index(c["provenance"]), c["name"] != MACHINE))
        chosen: dict[str, dict[str, Any]] = {}
        for offer in offers:
            name = offer["name"]
            if name not in chosen and MACHINE not in chosen and not (chosen and name == MACHINE):
                chosen[name] = offer
        if MACHINE not in chosen:
            chosen |= self._missing(chosen)
        for name, component in chosen.items():
            if not component["reason"] and component.get("provenance") != "measured":
                closed = [s.reason for s in self.sources if s.reason and name in s.quantities]
                component = component | {"reason": "; ".join(closed)}
            chosen[name] = component | {"table": self._table["version"]}
        known = [name for name in COMPONENTS if name in chosen]
        return [chosen[name] for name in dict.fromkeys([*known, *chosen])]

    def _missing(self, chosen: Collection[str]) -> dict[str, dict[str, Any]]:
        """Return components without a figure: of sources whose part is in the machine but cannot be
        read, and of accelerators in use that no source covers."""
        out = {
            name: _without_figure(name, source.reason)
            for source in self.sources
            if source.missing
            for name in source.quantities
            if name not in chosen
        }
        covered = {kind for s in self.sources if s.components for kind in s.accelerators}
        closed = {kind: s.reason for s in self.sources if s.reason for kind in s.accelerators}
        reason = devices.uncounted((self.model_on | devices.in_use()) - covered, closed)
        if reason:
            name = "other gpu" if "gpu" in chosen else "gpu"
            out[name] = _without_figure(name, reason) | {"provenance": PARTLY_UNKNOWN}
        return out


def _without_figure(name: str, reason: str) -> dict[str, Any]:
    return {
        "name": name, "source": "none", "scope": "machine", "observation": "", "coefficient": {},
        "reason": reason,
    }  # fmt: skip


class Replay:
    """Plays back a recorded log: no hardware, no waiting.

    The log is JSON lines: first {"components": [...]}, then one {"wall_s": …, "cpu_s": …, …} of
    running totals for each reading. Each `read` returns the next line; the last one repeats.
    """

    def __init__(self, log: str | os.PathLike[str]) -> None:
        try:
            lines = [
                json.loads(text)
                for text in files.read_text(log, "meter log", MOST_BYTES).splitlines()
                if text.strip()
            ]
            self.components: list[dict[str, Any]] = lines[0]["components"]
            self._readings: list[dict[str, float]] = lines[1:]
            self._readings[0]["wall_s"]
        except (ValueError, LookupError, TypeError, RecursionError) as error:
            raise BadInput(
                f"{log} is not a meter log (a line of components, then lines with wall_s): "
                f"{error!r}"
            ) from error
        self._next = 0

    def read(self, full: bool = True) -> dict[str, float]:
        """Return the log's next reading."""
        reading = self._readings[min(self._next, len(self._readings) - 1)]
        self._next += 1
        return dict(reading)

    def corrections(self) -> list[dict[str, Any]]:
        """Return nothing: a log's components stand."""
        return []
