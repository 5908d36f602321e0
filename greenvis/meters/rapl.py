"""Energy counters of Intel and AMD processors (RAPL) through Linux powercap, used only where they move."""

from __future__ import annotations

import os
import time
from pathlib import Path

POWERCAP = Path("/sys/class/powercap")
LOAD_S = 0.03  # the longest load; RAPL steps every millisecond or so, and a live one ends the wait at its first step


class Rapl:
    """Package energy ("cpu_j") and, where the processor has it, memory energy ("dram_j"), since `open`. Whole machine."""

    def __init__(self, zones: list[tuple[str, Path]]) -> None:
        self._files = [
            (kind, os.open(zone / "energy_uj", os.O_RDONLY), _number(zone / "max_energy_range_uj")) for kind, zone in zones
        ]
        self._last = [_value(fd) for _, fd, _ in self._files]
        self._sums = dict.fromkeys((kind for kind, _, _ in self._files), 0.0)

    def read(self) -> dict[str, float]:
        """Return joules since opening, by quantity. A counter that wrapped around is continued."""
        for i, (kind, fd, wraps_at) in enumerate(self._files):
            try:
                now = _value(fd)
            except OSError:
                continue
            step = now - self._last[i]
            self._sums[kind] += (step if step >= 0 else step + wraps_at) / 1e6
            self._last[i] = now
        return dict(self._sums)

    def close(self) -> None:
        """Close the counters' files."""
        for _, fd, _ in self._files:
            os.close(fd)
        self._files = []


def open_rapl(powercap: Path = POWERCAP, load_s: float = LOAD_S) -> tuple[Rapl | None, str]:
    """Return the counters if they are live, else None with the reason. Live: they advance under a short load."""
    zones = [(kind, zone) for zone in sorted(powercap.glob("intel-rapl:*")) if (kind := _kind(zone))]
    if not any(kind == "cpu_j" for kind, _ in zones):
        return None, f"no RAPL package counter under {powercap}"
    try:
        rapl = Rapl(zones)
    except (OSError, ValueError) as error:
        return None, f"RAPL counters cannot be read ({error}); the system's owner can allow it: chmod a+r energy_uj"
    end = time.perf_counter() + load_s
    while time.perf_counter() < end and rapl.read()["cpu_j"] <= 0:
        sum(i * i for i in range(1000))
    if rapl.read()["cpu_j"] <= 0:
        rapl.close()
        return None, f"RAPL opens but stood still under {load_s * 1000:.0f} ms of load (common in virtual machines)"
    return rapl, "RAPL advanced under a short load"


def _kind(zone: Path) -> str:
    """Return the quantity of a powercap zone; "" for what would count energy twice (core, uncore, psys)."""
    try:
        name = (zone / "name").read_text().strip()
    except OSError:
        return ""
    if name.startswith("package"):
        return "cpu_j"
    return "dram_j" if name == "dram" else ""


def _number(path: Path) -> int:
    return int(path.read_text())


def _value(fd: int) -> int:
    return int(os.pread(fd, 64, 0))
