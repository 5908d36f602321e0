"""The coefficients that price what is no counter of joules: our table, and the user's own over
it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from greenvis.core import files
from greenvis.errors import BadInput, nearest, one_line
from greenvis.meters import host, repeat

COEFFICIENTS = Path(__file__).with_name("coefficients.json")
OVERRIDE = "GREENVIS_COEFFICIENTS"  # environment variable: the user's own coefficients file
MOST = 1e6  # of any coefficient of a user's: watts, ratios
SHAPES = {
    "processors": 'is a list of {"match", "tdp_w", "threads"}',
    "wall_meter": 'needs {"idle_w", "busy_w", "busy_cpus"}',
}

# by observation: keys of a file that price it, and the table's own, "" for that of the processor
PRICED_BY: dict[str, tuple[frozenset[str], str]] = {
    "cpu_s": (frozenset({"cpu_w_per_busy_cpu", "processors", "cpu_band_of_tdp", "wall_meter"}), ""),
    "ram_gb_s": (frozenset({"ram_w_per_gb"}), "ram_w_per_gb"),
    "wall_s": (frozenset({"wall_w"}), "wall_w"),
}


def load_coefficients(path: str | os.PathLike[str] | None = None) -> dict[str, Any]:
    """Return our table, with the user's file over it.

    Args:
        path: JSON with any of our keys, each {"low", "central", "high", "citation"}; or
            "wall_meter": {"idle_w", "busy_w", "busy_cpus", "citation"}, a plug's two readings, from
            which the watts per busy CPU follow. By default what $GREENVIS_COEFFICIENTS names.

    Raises:
        BadInput: for a file that is not such a table.
    """
    table = json.loads(COEFFICIENTS.read_text())
    table["repeatability"] = repeat.band(host.cpu_name(), table["repeatability"])
    path = path or os.environ.get(OVERRIDE)
    return _with(table, path, _content(path)) if path else table


def _content(path: str | os.PathLike[str]) -> dict[str, Any]:
    content = files.read_json(path, "coefficients file")
    if not isinstance(content, dict):
        raise BadInput(f"cannot read the coefficients file {path}: it is no mapping")
    return content


def _with(
    table: dict[str, Any], path: str | os.PathLike[str], content: dict[str, Any]
) -> dict[str, Any]:
    for key, value in content.items():
        if key not in table and key not in SHAPES:
            raise BadInput(
                f"{path}: unknown coefficient '{key}'{nearest(key, [*table, 'wall_meter'])}"
            )
        try:
            _put(table, key, value, path)
        except (TypeError, KeyError, ValueError, AttributeError, OverflowError) as error:
            shape = SHAPES.get(key, 'needs numbers {"low", "central", "high"} in order')
            raise BadInput(f"{path}: {key} {shape}: {error}") from error
    table["version"] = f"{table['version']} + {path}"
    return table


def cpu_watts(table: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """Return watts per busy CPU: of the processor of that name where the table knows it, else the
    general band."""
    for known in table["processors"]:
        if known["match"] in name + " ":
            watts, band = known["tdp_w"] / known["threads"], table["cpu_band_of_tdp"]
            return {k: round(watts * band[k], 3) for k in ("low", "central", "high")} | {
                "unit": "W per busy logical CPU",
                "citation": f"{known['citation']}: {known['tdp_w']} W / {known['threads']} "
                f"threads; band: {band['citation']}",
            }
    return table["cpu_w_per_busy_cpu"]


class Repricing:
    """Coefficients of a file in the place of those that records hold; what it does not name stays.

    Args:
        path: As of `load_coefficients`.

    Raises:
        BadInput: For a file that is not such a table.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        content = _content(path)
        self._table = _with(json.loads(COEFFICIENTS.read_text()), path, content)
        self._keys = set(content)

    def components(
        self, components: Iterable[Mapping[str, Any]], cpu: str
    ) -> list[Mapping[str, Any]]:
        """Return a record's components with the file's coefficients; what was measured stays.

        Args:
            components: Of a header.
            cpu: Name of the processor they were recorded on.
        """
        return [self._component(c, cpu) for c in components]

    def _component(self, c: Mapping[str, Any], cpu: str) -> Mapping[str, Any]:
        if c.get("provenance") == "measured":
            return c
        keys, own = PRICED_BY.get(str(c.get("observation")), (frozenset[str](), ""))
        changed: dict[str, Any] = {}
        if keys & self._keys:
            new = self._table[own] if own else cpu_watts(self._table, cpu)
            changed = {"coefficient": new, "citation": new["citation"]}
        if "repeatability" in self._keys and c.get("repeatability"):
            changed["repeatability"] = self._table["repeatability"]
        return {**c, **changed, "table": self._table["version"]} if changed else c


def _put(table: dict[str, Any], key: str, value: Any, path: Any) -> None:
    """Put one entry of a user's file into the table; any error is what is wrong with its shape."""
    origin = f"given by the user in {path}"
    if key == "version":
        table[key] = one_line(value)[:200]
    elif key == "processors":
        table[key] = [_processor(row, origin) for row in value]
    elif key == "wall_meter":
        table["cpu_w_per_busy_cpu"] = _of_a_plug(value, path)
    else:
        low, central, high = (float(value[k]) for k in ("low", "central", "high"))
        if not 0 <= low <= central <= high <= MOST:
            raise ValueError(f"0 <= low <= central <= high <= {MOST:,} does not hold")
        words = {k: one_line(value[k])[:5000] for k in ("unit", "citation") if k in value}
        band = {"low": low, "central": central, "high": high}
        table[key] = {"citation": origin, **words, **band}
    if key in ("cpu_w_per_busy_cpu", "wall_meter"):
        table["processors"] = []  # the user's own figure comes before a table of processors


def _processor(row: Any, origin: str) -> dict[str, Any]:
    """Return a row of a table of processors: a part of the name, its thermal design power and its
    threads."""
    watts, threads = float(row["tdp_w"]), float(row["threads"])
    if not row["match"]:
        raise ValueError("an empty match is in every name")
    if not (0 < watts <= MOST and 0 < threads <= MOST):
        raise ValueError("tdp_w or threads is out of range")
    citation = one_line(row.get("citation", origin))[:5000]
    match = str(row["match"])[:200]
    return {"match": match, "tdp_w": watts, "threads": threads, "citation": citation}


def _of_a_plug(value: Any, path: Any) -> dict[str, Any]:
    """Turn a plug's readings into watts per busy CPU: low is the extra draw of work alone, high
    adds the idle machine."""
    idle, busy, cpus = (float(value[k]) for k in ("idle_w", "busy_w", "busy_cpus"))
    if not (0 <= idle < busy <= MOST and 0 < cpus <= MOST):
        raise ValueError(f"0 <= idle_w < busy_w <= {MOST:,} and busy_cpus > 0 do not hold")
    text = f"wall meter, {path}: {idle:g} W idle, {busy:g} W with {cpus:g} CPUs busy"
    low, high = (busy - idle) / cpus, busy / cpus
    return {
        "low": low, "central": high, "high": high, "unit": "W per busy logical CPU",
        "citation": one_line(value.get("citation", text)),
    }  # fmt: skip
