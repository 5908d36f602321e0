"""The coefficients that price what is no counter of joules: our table, and the user's own over
it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from greenvis.core import files
from greenvis.errors import BadInput, nearest, one_line
from greenvis.meters import host, repeat

COEFFICIENTS = Path(__file__).with_name("coefficients.json")
OVERRIDE = "GREENVIS_COEFFICIENTS"  # environment variable: the user's own coefficients file
MOST = 1e6  # of any coefficient of a user's: watts, ratios


def load_coefficients(path: str | os.PathLike[str] | None = None) -> dict[str, Any]:
    """Return our table, with the user's file (or the one $GREENVIS_COEFFICIENTS names) over it.

    The file is JSON with any of our keys, each {"low", "central", "high", "citation"}; or
    "wall_meter": {"idle_w", "busy_w", "busy_cpus", "citation"}, a plug's two readings, from which
    the watts per busy CPU follow. Raises BadInput for a file that is not such a table.
    """
    table = json.loads(COEFFICIENTS.read_text())
    table["repeatability"] = repeat.band(host.cpu_name(), table["repeatability"])
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
