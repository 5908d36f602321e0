"""Energy counters of Intel and AMD processors (RAPL) through Linux powercap, used only where they
move."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from greenvis.meters.sources.base import MeterSource, Unavailable

POWERCAP = Path("/sys/class/powercap")
# the longest load; RAPL steps every millisecond or so, and a live one ends the wait at its first
# step
LOAD_S = 0.03
MOST_W = 1000.0  # no package or memory of one draws more; a step beyond it is no step
PATIENCE_S = 2.0  # even an idle package draws watts


class Rapl(MeterSource):
    """Energy of the packages and, where the processor counts it, of their memory. Whole machine.

    Args:
        zones: (quantity, folder of a powercap zone) to count from now on, without `open`.
        powercap: where `open` looks for zones.
    """

    name: ClassVar[str] = "rapl"
    quantities: ClassVar[Mapping[str, str]] = {"cpu": "cpu_j", "ram": "dram_j"}

    def __init__(
        self, zones: Sequence[tuple[str, Path]] = (), powercap: Path | None = None
    ) -> None:
        super().__init__()
        self._powercap = powercap or POWERCAP
        for quantity, zone in zones:
            self.watch_zone({q: part for part, q in self.quantities.items()}[quantity], zone)

    def connect(self, coefficients: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Open the counters that advance under a short load."""
        zones = [
            (part, zone)
            for zone in sorted(self._powercap.glob("intel-rapl:*"))
            if (part := _part(zone))
        ]
        if "cpu" not in dict(zones):
            raise Unavailable(f"no RAPL package counter under {self._powercap}")
        try:
            for _, zone in zones:
                _joules(zone)
        except (OSError, ValueError) as error:
            raise Unavailable(
                f"RAPL counters cannot be read ({error}); the system's owner can allow it: "
                "chmod a+r energy_uj"
            ) from error
        for part, zone in zones:
            self.watch_zone(part, zone)
        end = time.perf_counter() + LOAD_S
        while time.perf_counter() < end and not all(self.read()[q] > 0 for q in self._watched):
            sum(i * i for i in range(1000))
        totals = self.read(fresh=False)
        self._watched = {q: watched for q, watched in self._watched.items() if totals[q] > 0}
        if self.quantities["cpu"] not in self._watched:
            raise Unavailable(
                f"RAPL opens but stood still under {LOAD_S * 1000:.0f} ms of load (common in "
                "virtual machines)"
            )
        why = {
            "cpu": "RAPL advanced under a short load",
            "ram": "RAPL's memory counter advances with the package's",
        }
        return [self.component(c, why[c]) for c, q in self.quantities.items() if q in self._watched]

    def watch_zone(self, part: str, zone: Path) -> None:
        """Count what a powercap zone counts as energy of "cpu" or "ram"."""
        self.watch(
            part,
            lambda now: _joules(zone),
            MOST_W,
            f"RAPL {zone.name}",
            wraps_at=_wraps_at(zone) / 1e6,
            patience_s=PATIENCE_S,
        )


def open_rapl(powercap: Path = POWERCAP) -> tuple[Rapl | None, str]:
    """Return the counters below `powercap` and why they are believed, or None and why not."""
    rapl = Rapl(powercap=powercap)
    rapl.open({})
    return None if rapl.reason else rapl, rapl.reason or rapl.components[0]["reason"]


def _part(zone: Path) -> str:
    """Return the component of a powercap zone; "" for what would count energy twice (core, uncore,
    psys)."""
    try:
        name = (zone / "name").read_text().strip()
    except OSError:
        return ""
    if name.startswith("package"):
        return "cpu"
    return "ram" if name == "dram" else ""


def _wraps_at(zone: Path) -> int:
    """Return where the counter starts again, in microjoules; 0 where that cannot be read: then a
    fall is dropped."""
    try:
        return max(0, int((zone / "max_energy_range_uj").read_text()))
    except (OSError, ValueError):
        return 0


def _joules(zone: Path) -> float:
    return int((zone / "energy_uj").read_bytes()) / 1e6
