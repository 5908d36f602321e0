"""What this machine can observe of its energy: sources in order of trust, and the coefficients that price the rest.

1. a live counter (RAPL, NVML, or a wall meter the user reads): it advanced under a short load;
2. CPU-seconds of this process and its children × watts per busy CPU;
3. wall time × a constant, last.

The meter returns running observations; `greenvis.price` turns them into joules, on reading.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from greenvis.errors import BadInput, nearest
from greenvis.meters.nvml import Nvml, open_nvml
from greenvis.meters.processes import TICK_S, PortableTree, ProcessTree, open_tree
from greenvis.meters.rapl import POWERCAP, open_rapl

COEFFICIENTS = Path(__file__).with_name("coefficients.json")
OVERRIDE = "GREENVIS_COEFFICIENTS"  # environment variable: the user's own coefficients file
CHEAP_S = 0.05  # counters that cost a driver call are read at most this often when phases are short
ONE = {"low": 1.0, "central": 1.0, "high": 1.0, "unit": "J per J"}


class Source(Protocol):
    """What a tracker reads. `components` go into the record's header; quantities are running totals since opening."""

    components: list[dict[str, Any]]

    def read(self, full: bool = True) -> dict[str, float]:
        """Return wall_s and whatever else is observed; `full` False leaves out what is slow to read."""
        ...

    def corrections(self) -> list[dict[str, Any]]:
        """Return components that turned out otherwise since the start."""
        ...


class Meter:
    """The live source of this process on this machine.

    coefficients: a file of the user's, over ours (see `load_coefficients`); wall_meter: a function returning joules of
    the whole machine so far (a smart plug, a server's management board), which then replaces every other component.
    """

    def __init__(
        self,
        coefficients: str | os.PathLike[str] | None = None,
        wall_meter: Callable[[], float] | None = None,
        powercap: Path = POWERCAP,
    ) -> None:
        table = load_coefficients(coefficients)
        self._tree = _tree()
        self._rapl, why_rapl = open_rapl(powercap)
        self._nvml, why_nvml = open_nvml()
        self._wall_meter = wall_meter
        self.components = _components(table, self._rapl is not None, why_rapl, self._nvml, why_nvml)
        if self._tree is None:  # neither CPU time nor memory can be read here
            self.components = [c for c in self.components if c["observation"] not in ("cpu_s", "ram_gb_s")]
            if self._rapl is None:
                self.components.insert(0, _by_the_clock(table))
        if self._rapl is not None and "dram_j" in self._rapl.read():
            ram = _counted("ram", "rapl", "dram_j", "RAPL's memory counter advances with the package's")
            self.components = [ram if c["name"] == "ram" else c for c in self.components]
        if wall_meter is not None:
            self.components = [_counted("machine", "wall meter", "meter_j", "read by the user's own function")]
        self._corrected = False
        self._slow: dict[str, float] = {}
        self._slow_at = -1.0
        self._ram_gb_s = 0.0
        self._resident = (time.monotonic(), 0.0)
        self._steal_from = _steal_ticks()
        self.read()

    def read(self, full: bool = True) -> dict[str, float]:
        """Return running totals: wall_s, cpu_s, ram_gb_s, and steal_s, cpu_j, dram_j, gpu_j, meter_j where there are such."""
        used: dict[str, float] = {}
        now = time.monotonic()
        if self._tree is not None:
            used["cpu_s"] = self._tree.cpu_s()
            gb, (before, gb_before) = self._tree.resident_gb(), self._resident
            self._ram_gb_s += (gb + gb_before) / 2 * (now - before)
            self._resident = (now, gb)
            used["ram_gb_s"] = self._ram_gb_s
        if full or now - self._slow_at > CHEAP_S:
            self._read_slow(full)
            self._slow_at = now
        return {"wall_s": now, **used, **self._slow}

    def _read_slow(self, full: bool) -> None:
        if self._rapl is not None:
            self._slow.update(self._rapl.read())
        if self._nvml is not None:
            self._slow.update(self._nvml.read())
        if self._wall_meter is not None:
            try:
                self._slow["meter_j"] = float(self._wall_meter())
            except Exception:  # the user's function: a plug out of reach must not end the training
                self._slow.setdefault("meter_j", 0.0)
        if full and self._steal_from is not None:
            self._slow["steal_s"] = ((_steal_ticks() or 0) - self._steal_from) * TICK_S

    def corrections(self) -> list[dict[str, Any]]:
        """Return the GPU component anew, once, if its counter proved to stand still."""
        if self._corrected or self._nvml is None or self._wall_meter is not None or not self._nvml.stalled():
            return []
        self._corrected = True
        return [_missing("gpu", "NVML's counter opened but stood still")]

    def live_pids(self) -> list[int]:
        """Return the live descendants that were counted at the last reading."""
        return [] if self._tree is None else self._tree.live_pids()


class Replay:
    """Plays back a recorded log: no hardware, no waiting.

    The log is JSON lines: first {"components": [...]}, then one {"wall_s": …, "cpu_s": …, …} of running totals for each
    reading. Each `read` returns the next line; the last one repeats.
    """

    def __init__(self, log: str | os.PathLike[str]) -> None:
        try:
            lines = [json.loads(text) for text in Path(log).read_text().splitlines() if text.strip()]
            self.components: list[dict[str, Any]] = lines[0]["components"]
            self._readings: list[dict[str, float]] = lines[1:]
            self._readings[0]["wall_s"]
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise BadInput(f"{log} is not a meter log (a line of components, then lines with wall_s): {error!r}") from error
        self._next = 0

    def read(self, full: bool = True) -> dict[str, float]:
        """Return the log's next reading."""
        reading = self._readings[min(self._next, len(self._readings) - 1)]
        self._next += 1
        return dict(reading)

    def corrections(self) -> list[dict[str, Any]]:
        """Return nothing: a log's components stand."""
        return []


def load_coefficients(path: str | os.PathLike[str] | None = None) -> dict[str, Any]:
    """Return our table, with the user's file (or the one $GREENVIS_COEFFICIENTS names) over it.

    The file is JSON with any of our keys, each {"low", "central", "high", "citation"}; or "wall_meter":
    {"idle_w", "busy_w", "busy_cpus", "citation"}, a plug's two readings, from which the watts per busy CPU follow.
    Raises BadInput for a file that is not such a table.
    """
    table = json.loads(COEFFICIENTS.read_text())
    path = path or os.environ.get(OVERRIDE)
    if not path:
        return table
    try:
        given = json.loads(Path(path).read_text())
        items = list(given.items())
    except (OSError, ValueError, AttributeError) as error:
        raise BadInput(f"cannot read the coefficients file {path}: {error}") from error
    for key, value in items:
        if key == "wall_meter":
            table["cpu_w_per_busy_cpu"] = _from_wall_meter(path, value)
        elif key not in table:
            raise BadInput(f"{path}: unknown coefficient '{key}'{nearest(key, [*table, 'wall_meter'])}")
        elif key in ("version", "processors"):
            table[key] = value
        else:
            table[key] = _checked(path, key, value)
        if key in ("cpu_w_per_busy_cpu", "wall_meter"):
            table["processors"] = []  # the user's own figure comes before a table of processors
    table["version"] = f"{table['version']} + {path}"
    return table


def _checked(path: Any, key: str, value: Any) -> dict[str, Any]:
    try:
        low, central, high = (float(value[k]) for k in ("low", "central", "high"))
        if not 0 <= low <= central <= high < float("inf"):
            raise ValueError("0 <= low <= central <= high does not hold")
    except (TypeError, KeyError, ValueError) as error:
        raise BadInput(f'{path}: {key} needs numbers {{"low", "central", "high"}} in order: {error}') from error
    return {"citation": f"given by the user in {path}", **value}


def _from_wall_meter(path: Any, value: Any) -> dict[str, Any]:
    """Turn a plug's readings into watts per busy CPU: low is the extra draw of work alone, high adds the idle machine."""
    try:
        idle, busy, cpus = (float(value[k]) for k in ("idle_w", "busy_w", "busy_cpus"))
        if not (0 <= idle < busy and cpus > 0):
            raise ValueError("0 <= idle_w < busy_w and busy_cpus > 0 do not hold")
    except (TypeError, KeyError, ValueError) as error:
        raise BadInput(f'{path}: wall_meter needs {{"idle_w", "busy_w", "busy_cpus"}}: {error}') from error
    low, high = (busy - idle) / cpus, busy / cpus
    return {
        "low": low, "central": high, "high": high, "unit": "W per busy logical CPU",
        "citation": value.get("citation", f"wall meter, {path}: {idle:g} W idle, {busy:g} W with {cpus:g} CPUs busy"),
    }  # fmt: skip


def _components(table: Mapping[str, Any], rapl: bool, why_rapl: str, nvml: Nvml | None, why_nvml: str) -> list[dict[str, Any]]:
    if rapl:
        cpu = _counted("cpu", "rapl", "cpu_j", why_rapl)
    else:
        coefficient = _cpu_coefficient(table)
        cpu = {
            "name": "cpu", "source": "cpu-time model", "scope": "process", "observation": "cpu_s",
            "coefficient": coefficient, "provenance": "estimated", "citation": coefficient["citation"], "reason": why_rapl,
        }  # fmt: skip
    ram_table = table["ram_w_per_gb"]
    ram = {
        "name": "ram", "source": "resident memory model", "scope": "process", "observation": "ram_gb_s",
        "coefficient": ram_table, "provenance": "estimated", "citation": ram_table["citation"],
        "reason": "no live memory counter",
    }  # fmt: skip
    if nvml is None:
        gpu = _missing("gpu", why_nvml)
    else:
        gpu = _counted("gpu", "nvml", "gpu_j", why_nvml) | {"devices": nvml.devices, "hardware": nvml.names}
        if not nvml.counter:
            gpu["provenance"] = "estimated"
    for component in (cpu, ram, gpu):
        component["table"] = table["version"]
    return [cpu, ram] if nvml is None and why_nvml.startswith("no NVIDIA") else [cpu, ram, gpu]


def _counted(name: str, source: str, observation: str, reason: str) -> dict[str, Any]:
    return {
        "name": name, "source": source, "scope": "machine", "observation": observation, "coefficient": ONE,
        "provenance": "measured", "citation": "", "reason": reason,
    }  # fmt: skip


def _missing(name: str, reason: str) -> dict[str, Any]:
    return {"name": name, "source": "none", "scope": "machine", "observation": "", "coefficient": {}, "reason": reason}


def _tree() -> ProcessTree | PortableTree | None:
    try:
        tree = open_tree()
        tree.cpu_s()
    except (ImportError, OSError, RuntimeError, ValueError):
        return None
    return tree


def _by_the_clock(table: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "name": "cpu", "source": "wall time", "scope": "process", "observation": "wall_s", "coefficient": table["wall_w"],
        "provenance": "constant", "citation": table["wall_w"]["citation"], "reason": "CPU time cannot be read on this system",
        "table": table["version"],
    }  # fmt: skip


def _cpu_coefficient(table: Mapping[str, Any]) -> dict[str, Any]:
    """Return watts per busy CPU: of this processor where the table knows its name, else the general band."""
    name = cpu_name()
    for known in table["processors"]:
        if known["match"] in name + " ":
            watts, band = known["tdp_w"] / known["threads"], table["cpu_band_of_tdp"]
            return {k: round(watts * band[k], 3) for k in ("low", "central", "high")} | {
                "unit": "W per busy logical CPU",
                "citation": f"{known['citation']}: {known['tdp_w']} W / {known['threads']} threads; band: {band['citation']}",
            }
    return table["cpu_w_per_busy_cpu"]


def cpu_name() -> str:
    """Return the processor's name as the system gives it; "" where it is unknown."""
    try:
        with open("/proc/cpuinfo", "rb") as f:
            text = f.read(2048).decode("utf-8", "replace")
    except OSError:
        import platform

        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in text.splitlines() if line.startswith("model name")), "")


def _steal_ticks() -> int | None:
    """Return the ticks other machines took from this one since boot, or None where the system does not say."""
    try:
        with open("/proc/stat", "rb") as f:
            return int(f.readline().split()[8])
    except (OSError, IndexError, ValueError):
        return None
