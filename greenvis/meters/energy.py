"""What this machine can observe of its energy: sources in order of trust, and the coefficients that
price the rest.

1. a live counter (RAPL, NVML, or a wall meter the user reads): it advanced under a short load;
2. CPU-seconds of this process and its children × watts per busy CPU;
3. wall time × a constant, last.

The meter returns running observations; `greenvis.meters.pricing` turns them into joules, on
reading.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from greenvis.core import files
from greenvis.errors import BadInput, nearest, one_line
from greenvis.meters import devices, host, repeat
from greenvis.meters.counter import Counter, readings
from greenvis.meters.nvml import Nvml, open_nvml
from greenvis.meters.processes import TICK_S, PortableTree, ProcessTree, open_tree
from greenvis.meters.rapl import POWERCAP, Rapl, open_rapl
from greenvis.meters.record import MOST_BYTES
from greenvis.meters.wall import WallMeter

COEFFICIENTS = Path(__file__).with_name("coefficients.json")
OVERRIDE = "GREENVIS_COEFFICIENTS"  # environment variable: the user's own coefficients file
MOST = 1e6  # of any coefficient of a user's: watts, ratios
CHEAP_S = 0.05  # counters that cost a driver call are read at most this often when phases are short
# CPU time is counted in ticks and found late: a little more than all CPUs may show up at
# once
HEADROOM = 1.25
SLEPT_S = 1.0  # a machine that slept for longer may have begun its counters anew
ONE = {"low": 1.0, "central": 1.0, "high": 1.0, "unit": "J per J"}


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

    coefficients: a file of the user's, over ours (see `load_coefficients`); wall_meter: a function
    returning joules of the whole machine so far (a smart plug, a server's management board), which
    then replaces every other component.
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
        self._nvml, self._why_nvml = open_nvml()
        self.components = _components(
            table, self._rapl is not None, why_rapl, self._nvml, self._why_nvml
        )
        if self._tree is None:  # neither CPU time nor memory can be read here
            self.components = [
                c for c in self.components if c["observation"] not in ("cpu_s", "ram_gb_s")
            ]
            if self._rapl is None:
                self.components.insert(0, _by_the_clock(table))
        if self._rapl is not None and "dram_j" in self._rapl.read():
            ram = _counted(
                "ram", "rapl", "dram_j", "RAPL's memory counter advances with the package's"
            )
            self.components = [ram if c["name"] == "ram" else c for c in self.components]
        now, slept = host.clocks()
        self._opened, self._slept = now, slept
        self._wall = None if wall_meter is None else WallMeter(wall_meter, now)
        if wall_meter is not None:
            self.components = [
                _counted("machine", "wall meter", "meter_j", "read by the user's own function")
            ]
        self._cpu = Counter("CPU time", HEADROOM * host.cpus(), now)
        self._ram = Counter("resident memory", HEADROOM * host.memory_gb(), now)
        self.model_on: set[str] = set()  # kinds of the devices the tracked model lies on
        self._mapped = False  # whether the GPUs read were compared with those that torch opened
        self._missing: dict[str, Any] | None = None
        self._slow_at = -1.0
        self._gb_s, self._resident = 0.0, (now, 0.0)
        self._steal_s, self._steal_from = 0.0, host.steal_ticks()
        self._read(now, slept, full=True)

    def read(self, full: bool = True) -> dict[str, float]:
        """Return running totals: wall_s, cpu_s, ram_gb_s, and steal_s, cpu_j, dram_j, gpu_j,
        meter_j where there are such.

        Beside a counter that was not to be believed for some time stands that time
        ("cpu_j_unseen_s").
        """
        return self._read(*host.clocks(), full)

    def _read(self, now: float, slept: float, full: bool) -> dict[str, float]:
        if slept - self._slept > SLEPT_S:
            for counter in self._slow_counters():
                counter.lose(now, f"the machine slept for {slept - self._slept:.0f} s")
            self._slept = slept
        out = {"wall_s": now}
        if self._tree is not None:
            out |= self._read_process(self._tree, now)
        fresh = full or now - self._slow_at > CHEAP_S
        for counter in self._slow_counters():
            out |= counter.read(now) if fresh else counter.so_far(now)
        if full and self._steal_from is not None:
            self._steal_s = max(
                self._steal_s, ((host.steal_ticks() or 0) - self._steal_from) * TICK_S
            )
        if self._steal_from is not None:
            out["steal_s"] = self._steal_s
        if fresh:
            self._slow_at = now
        return out

    def _read_process(self, tree: ProcessTree | PortableTree, now: float) -> dict[str, float]:
        self._cpu.take(now, tree.cpu_s())
        gb, (before, gb_before) = tree.resident_gb(), self._resident
        if gb > 0:
            self._gb_s += (gb + gb_before) / 2 * (now - before)
            self._resident = (now, gb)
        self._ram.take(now, self._gb_s if gb > 0 else None, "no memory is resident")
        return readings("cpu_s", [self._cpu], now) | readings("ram_gb_s", [self._ram], now)

    def _slow_counters(self) -> list[Rapl | Nvml | WallMeter]:
        return [c for c in (self._rapl, self._nvml, self._wall) if c is not None]

    def new_notes(self) -> list[str]:
        """Return in words what was amiss with the readings since the last call."""
        return [
            note for c in (*self._slow_counters(), self._cpu, self._ram) for note in c.new_notes()
        ]

    def corrections(self) -> list[dict[str, Any]]:
        """Return the GPU component anew where it turned out otherwise than at the start.

        A device in use that no counter covers gives a component without a figure;
        CUDA devices are told by the UUIDs that torch knows once it has opened them.
        """
        if self._wall is not None:  # it sees them all
            return []
        kinds = self.model_on | devices.in_use()
        out: list[dict[str, Any]] = []
        if not self._mapped and (uuids := devices.uuids()) is not None:
            self._mapped = True
            out += self._use_cards(uuids)
        missing = devices.uncounted(
            kinds - {"cuda"} if self._nvml is not None else kinds, self._why_nvml
        )
        if missing is not None and missing != self._missing:
            self._missing = missing
            out.append(missing if self._nvml is None else missing | {"name": "other gpu"})
        return out

    def _use_cards(self, uuids: list[str]) -> list[dict[str, Any]]:
        """Read the cards torch uses from now on, where they are others than those read so far."""
        before = self._nvml
        reader, self._why_nvml = open_nvml(uuids)
        if before is not None and reader is not None:
            if set(reader.devices) == set(before.devices):
                return []
            reader, _ = open_nvml(uuids, self._opened, before.so_far(time.monotonic())["gpu_j"])
        self._nvml = reader
        return [] if reader is None else [_gpu(reader, self._why_nvml)]

    def live_pids(self) -> list[int]:
        """Return the live descendants that were counted at the last reading."""
        return [] if self._tree is None else self._tree.live_pids()


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


def load_coefficients(path: str | os.PathLike[str] | None = None) -> dict[str, Any]:
    """Return our table, with the user's file (or the one $GREENVIS_COEFFICIENTS names) over it.

    The file is JSON with any of our keys, each {"low", "central", "high", "citation"}; or
    "wall_meter": {"idle_w", "busy_w", "busy_cpus", "citation"}, a plug's two readings, from which
    the watts per busy CPU follow. Raises BadInput for a file that is not such a table.
    """
    table = json.loads(COEFFICIENTS.read_text())
    table["repeatability"] = repeat.band(cpu_name(), table["repeatability"])
    path = path or os.environ.get(OVERRIDE)
    if not path:
        return table
    content = files.read_json(path, "coefficients file")
    if not isinstance(content, dict):
        raise BadInput(f"cannot read the coefficients file {path}: it is no mapping")
    for key, value in content.items():
        if key == "wall_meter":
            table["cpu_w_per_busy_cpu"] = _from_wall_meter(path, value)
        elif key not in table:
            raise BadInput(
                f"{path}: unknown coefficient '{key}'{nearest(key, [*table, 'wall_meter'])}"
            )
        elif key == "version":
            table[key] = one_line(value)[:200]
        elif key == "processors":
            table[key] = _processors(path, value)
        else:
            table[key] = _checked(path, key, value)
        if key in ("cpu_w_per_busy_cpu", "wall_meter"):
            table["processors"] = []  # the user's own figure comes before a table of processors
    table["version"] = f"{table['version']} + {path}"
    return table


def _checked(path: Any, key: str, value: Any) -> dict[str, Any]:
    try:
        low, central, high = (float(value[k]) for k in ("low", "central", "high"))
        if not 0 <= low <= central <= high <= MOST:
            raise ValueError(f"0 <= low <= central <= high <= {MOST:,} does not hold")
    except (TypeError, KeyError, ValueError, OverflowError) as error:
        raise BadInput(
            f'{path}: {key} needs numbers {{"low", "central", "high"}} in order: {error}'
        ) from error
    words = {k: one_line(value[k])[:5000] for k in ("unit", "citation") if k in value}
    return {
        "citation": f"given by the user in {path}",
        **words,
        "low": low,
        "central": central,
        "high": high,
    }


def _processors(path: Any, value: Any) -> list[dict[str, Any]]:
    """Return a table of processors, as ours: a part of the name, its thermal design power and its
    threads."""
    try:
        return [
            {
                "match": str(row["match"])[:200]
                if row["match"]
                else _refuse("an empty match is in every name"),
                "tdp_w": watts
                if 0 < (watts := float(row["tdp_w"])) <= MOST
                else _refuse("tdp_w is out of range"),
                "threads": threads
                if 0 < (threads := float(row["threads"])) <= MOST
                else _refuse("threads is out of range"),
                "citation": one_line(row.get("citation", f"given by the user in {path}"))[:5000],
            }
            for row in value
        ]
    except (TypeError, KeyError, ValueError, AttributeError, OverflowError) as error:
        raise BadInput(
            f'{path}: processors is a list of {{"match", "tdp_w", "threads"}}: {error}'
        ) from error


def _refuse(why: str) -> Any:
    raise ValueError(why)


def _from_wall_meter(path: Any, value: Any) -> dict[str, Any]:
    """Turn a plug's readings into watts per busy CPU: low is the extra draw of work alone, high
    adds the idle machine."""
    try:
        idle, busy, cpus = (float(value[k]) for k in ("idle_w", "busy_w", "busy_cpus"))
        if not (0 <= idle < busy <= MOST and 0 < cpus <= MOST):
            raise ValueError(f"0 <= idle_w < busy_w <= {MOST:,} and busy_cpus > 0 do not hold")
    except (TypeError, KeyError, ValueError, OverflowError) as error:
        raise BadInput(
            f'{path}: wall_meter needs {{"idle_w", "busy_w", "busy_cpus"}}: {error}'
        ) from error
    low, high = (busy - idle) / cpus, busy / cpus
    return {
        "low": low, "central": high, "high": high, "unit": "W per busy logical CPU",
        "citation": one_line(value.get("citation", f"wall meter, {path}: {idle:g} W idle, {busy:g} "
                                                   f"W with {cpus:g} CPUs busy")),
    }  # fmt: skip


def _components(
    table: Mapping[str, Any], rapl: bool, why_rapl: str, nvml: Nvml | None, why_nvml: str
) -> list[dict[str, Any]]:
    if rapl:
        cpu = _counted("cpu", "rapl", "cpu_j", why_rapl)
    else:
        coefficient = _cpu_coefficient(table)
        cpu = {
            "name": "cpu", "source": "cpu-time model", "scope": "process", "observation": "cpu_s",
            "coefficient": coefficient, "provenance": "estimated",
            "citation": coefficient["citation"], "reason": why_rapl,
            "repeatability": table["repeatability"],
        }  # fmt: skip
    ram_table = table["ram_w_per_gb"]
    ram = {
        "name": "ram", "source": "resident memory model", "scope": "process",
        "observation": "ram_gb_s",
        "coefficient": ram_table, "provenance": "estimated", "citation": ram_table["citation"],
        "repeatability": table["repeatability"],
        "reason": "no live memory counter",
    }  # fmt: skip
    gpu = _missing("gpu", why_nvml) if nvml is None else _gpu(nvml, why_nvml)
    for component in (cpu, ram, gpu):
        component["table"] = table["version"]
    return [cpu, ram] if nvml is None and why_nvml.startswith("no NVIDIA") else [cpu, ram, gpu]


def _counted(name: str, source: str, observation: str, reason: str) -> dict[str, Any]:
    return {
        "name": name, "source": source, "scope": "machine", "observation": observation,
        "coefficient": ONE,
        "provenance": "measured", "citation": "", "reason": reason,
    }  # fmt: skip


def _gpu(nvml: Nvml, why: str) -> dict[str, Any]:
    gpu = _counted("gpu", "nvml", "gpu_j", why) | {"devices": nvml.devices, "hardware": nvml.names}
    return gpu if nvml.counter else gpu | {"provenance": "estimated"}


def _missing(name: str, reason: str) -> dict[str, Any]:
    return {
        "name": name,
        "source": "none",
        "scope": "machine",
        "observation": "",
        "coefficient": {},
        "reason": reason,
    }


def _tree() -> ProcessTree | PortableTree | None:
    try:
        tree = open_tree()
        tree.cpu_s()
    except (ImportError, OSError, RuntimeError, ValueError):
        return None
    return tree


def _by_the_clock(table: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "name": "cpu", "source": "wall time", "scope": "process", "observation": "wall_s",
        "coefficient": table["wall_w"],
        "provenance": "constant", "citation": table["wall_w"]["citation"], "reason": "CPU time "
                                                                                     "cannot be "
                                                                                     "read on this "
                                                                                     "system",
        "table": table["version"],
    }  # fmt: skip


def _cpu_coefficient(table: Mapping[str, Any]) -> dict[str, Any]:
    """Return watts per busy CPU: of this processor where the table knows its name, else the general
    band."""
    name = cpu_name()
    for known in table["processors"]:
        if known["match"] in name + " ":
            watts, band = known["tdp_w"] / known["threads"], table["cpu_band_of_tdp"]
            return {k: round(watts * band[k], 3) for k in ("low", "central", "high")} | {
                "unit": "W per busy logical CPU",
                "citation": f"{known['citation']}: {known['tdp_w']} W / {known['threads']} "
                f"threads; band: {band['citation']}",
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
    return next(
        (
            line.split(":", 1)[1].strip()
            for line in text.splitlines()
            if line.startswith("model name")
        ),
        "",
    )
