"""Energy counters of Intel and AMD processors (RAPL) through Linux powercap, used only where they
move."""

from __future__ import annotations

import os
import time
from pathlib import Path

from greenvis.meters.counter import Counter, new_notes, readings

POWERCAP = Path("/sys/class/powercap")
# the longest load; RAPL steps every millisecond or so, and a live one ends the wait at its first
# step
LOAD_S = 0.03
MOST_W = 1000.0  # no package or memory of one draws more; a step beyond it is no step
PATIENCE_S = 2.0  # even an idle package draws watts


class Rapl:
    """Package energy ("cpu_j") and, where the processor has it, memory energy ("dram_j"), since
    `open`. Whole machine."""

    def __init__(self, zones: list[tuple[str, Path]]) -> None:
        now = time.monotonic()
        self._files: list[tuple[int, Counter]] = []
        self._kinds: dict[str, list[Counter]] = {}
        for kind, zone in zones:
            counter = Counter(
                f"RAPL {zone.name}",
                MOST_W,
                now,
                wraps_at=_wraps_at(zone) / 1e6,
                patience_s=PATIENCE_S,
            )
            fd = os.open(zone / "energy_uj", os.O_RDONLY)
            counter.take(now, _joules(fd))
            self._files.append((fd, counter))
            self._kinds.setdefault(kind, []).append(counter)

    def read(self, now: float | None = None) -> dict[str, float]:
        """Return joules since opening, by quantity, and how long they could not be told. now:
        monotonic seconds."""
        now = time.monotonic() if now is None else now
        for fd, counter in self._files:
            try:
                counter.take(now, _joules(fd))
            except (OSError, ValueError) as error:
                counter.take(now, None, str(error))
        return self.so_far(now)

    def so_far(self, now: float) -> dict[str, float]:
        """Return the same without reading anew."""
        return {
            k: v
            for kind, counters in self._kinds.items()
            for k, v in readings(kind, counters, now).items()
        }

    def live(self) -> bool:
        """Say whether the package counters advanced; memory counters that did not are left out from
        now on."""
        self._kinds = {
            kind: counters
            for kind, counters in self._kinds.items()
            if any(c.total > 0 for c in counters)
        }

        return "cpu_j" in self._kinds

    def lose(self, now: float, why: str) -> None:
        """Give up the counters' baselines."""
        for _, counter in self._files:
            counter.lose(now, why)

    def new_notes(self) -> list[str]:
        """Return what was amiss since the last call."""
        return new_notes(counter for _, counter in self._files)

    def close(self) -> None:
        """Close the counters' files."""
        for fd, _ in self._files:
            os.close(fd)
        self._files = []


def open_rapl(powercap: Path = POWERCAP, load_s: float = LOAD_S) -> tuple[Rapl | None, str]:
    """Return the counters if they are live, else None with the reason. Live: they advance under a
    short load."""
    zones = [
        (kind, zone) for zone in sorted(powercap.glob("intel-rapl:*")) if (kind := _kind(zone))
    ]
    if not any(kind == "cpu_j" for kind, _ in zones):
        return None, f"no RAPL package counter under {powercap}"
    try:
        rapl = Rapl(zones)
    except (OSError, ValueError) as error:
        return (
            None,
            f"RAPL counters cannot be read ({error}); the system's owner can allow it: chmod a+r "
            "energy_uj",
        )
    end = time.perf_counter() + load_s
    while time.perf_counter() < end and min(rapl.read()[kind] for kind, _ in zones) <= 0:
        sum(i * i for i in range(1000))
    if not rapl.live():
        rapl.close()
        return (
            None,
            f"RAPL opens but stood still under {load_s * 1000:.0f} ms of load (common in virtual "
            "machines)",
        )
    return rapl, "RAPL advanced under a short load"


def _kind(zone: Path) -> str:
    """Return the quantity of a powercap zone; "" for what would count energy twice (core, uncore,
    psys)."""
    try:
        name = (zone / "name").read_text().strip()
    except OSError:
        return ""
    if name.startswith("package"):
        return "cpu_j"
    return "dram_j" if name == "dram" else ""


def _wraps_at(zone: Path) -> int:
    """Return where the counter starts again, in microjoules; 0 where that cannot be read: then a
    fall is dropped."""
    try:
        return max(0, int((zone / "max_energy_range_uj").read_text()))
    except (OSError, ValueError):
        return 0


def _joules(fd: int) -> float:
    return int(os.pread(fd, 64, 0)) / 1e6
