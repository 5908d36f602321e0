"""Grid carbon intensity by country or region, from the data files codecarbon ships (codecarbon itself is not imported).

Standard library only. Zones: ISO-3 country ("FRA"); US state ("USA-CA"); Canadian or Chinese province ("CAN-ontario",
"CHN-BJ"); Nordic bidding zone ("SE3", "NO4"); cloud region ("gcp:europe-west1", "aws:us-east-1", "azure:westeurope").
"""

from __future__ import annotations

import functools
import importlib.util
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from greenvis.errors import BadInput, nearest

G_PER_KWH_OF_LBS_PER_MWH = 0.45359237


def given(intensity: float) -> dict[str, Any]:
    """Return a carbon intensity the user states, in g CO2e per kWh."""
    if not (isinstance(intensity, (int, float)) and 0 <= intensity < math.inf):
        raise BadInput(f"intensity is {intensity!r}; give grams of CO2e per kWh, 0 or more (coal is about 1000)")
    return {"value": float(intensity), "zone": "given", "year": None, "source": "given by the user", "assumed": False}


def lookup(zone: str | None) -> dict[str, Any]:
    """Return {"value": g CO2e per kWh, "zone", "name", "year", "source", "assumed"} of a zone.

    None gives the world average, marked `assumed`. Raises BadInput, with the nearest zone, for one that is not known.
    """
    if zone is None:
        return _world()
    word = zone.strip() if isinstance(zone, str) else ""
    if ":" in word:
        return _cloud(word.lower())
    country, _, region = word.upper().partition("-")
    if region:
        return _region(word, country, region)
    mix = _load("global_energy_mix.json")
    if country in mix:
        m = mix[country]
        return _entry(
            m["carbon_intensity"],
            country,
            m["country_name"],
            m["year"],
            "Our World in Data, by way of codecarbon's global_energy_mix.json",
        )
    nordic = _load("nordic_emissions.json")
    if country in nordic["data"]:
        z = nordic["data"][country]
        return _entry(z["emission_factor"], country, z["description"], z["year"], nordic["metadata"]["source"])
    names = {m["country_name"].lower(): code for code, m in mix.items()}
    if word.lower() in names:
        raise BadInput(f"country '{zone}' is not an ISO-3 code; did you mean '{names[word.lower()]}'?")
    raise BadInput(
        f"no carbon intensity for country '{zone}' (ISO-3 codes such as 'FRA'){nearest(country, [*mix, *nordic['data']])}"
    )


def _world() -> dict[str, Any]:
    by_source = _load("carbon_intensity_per_source.json")
    out = _entry(by_source["world_average"], "world", "world average", None, by_source["world_average_source"])
    return out | {"assumed": True}


def _region(word: str, country: str, region: str) -> dict[str, Any]:
    if country in ("USA", "US"):
        states = {k: v for k, v in _load("2023/usa_emissions.json").items() if not k.startswith("_")}
        codes = {v["regionCode"].upper(): (k, v["emissions"]) for k, v in states.items()}
        codes |= {k.upper(): (k, v["emissions"]) for k, v in states.items()}
        name, pounds = _pick(word, region, codes)
        return _entry(
            pounds * G_PER_KWH_OF_LBS_PER_MWH,
            f"USA-{states[name]['regionCode']}",
            name,
            2023,
            "EPA eGRID2023, by way of codecarbon",
        )
    if country in ("CHN", "CN"):
        table = _load("2023/china_provincial_emissions.json")
        zones = {k[3:]: v for k, v in table["data"].items()}
        found = _pick(word, region, zones)
        return _entry(
            found["emission_factor"], f"CHN-{region}", found["description"], found["year"], table["metadata"]["source"]
        )
    if country in ("CAN", "CA"):
        found = _pick(word, region, {k.upper(): (k, v) for k, v in _load("2023/canada_energy_mix.json").items()})
        return _entry(
            _of_mix(found[1]), f"CAN-{found[0]}", found[0], 2023, "codecarbon's generation mix × its factor per source"
        )
    raise BadInput(
        f"no regions are known in '{country}' (zone '{word}'); regions exist for USA, CAN and CHN: give the country alone"
    )


def _of_mix(mix: Mapping[str, float]) -> float:
    factors = _load("carbon_intensity_per_source.json") | {"naturalGas": 0.0, "hydro": 0.0, "tidal": 0.0, "other": 0.0}
    factors |= {
        "naturalGas": factors["natural_gas"],
        "hydro": factors["hydroelectricity"],
        "tidal": factors["hydroelectricity"],
    }
    factors["other"] = factors["fossil"]  # unknown plants: the careful reading
    return sum(part / 100 * factors[kind] for kind, part in mix.items() if kind != "total")


def _cloud(word: str) -> dict[str, Any]:
    import csv

    provider, _, region = word.partition(":")
    with open(_folder() / "cloud" / "impact.csv", encoding="utf-8-sig", newline="") as f:
        rows = {(r["provider"], r["region"]): r for r in csv.DictReader(f)}
    if (provider, region) not in rows:
        raise BadInput(f"no carbon intensity for cloud region '{word}'{nearest(word, [':'.join(k) for k in rows])}")
    row = rows[provider, region]
    return _entry(row["impact"], word, f"{row['city'] or row['regionName']}, {row['country_name']}", None, row["source"])


def _pick(word: str, region: str, table: Mapping[str, Any]) -> Any:
    if region not in table:
        raise BadInput(f"no region '{region}' in zone '{word}'{nearest(region, table)}")
    return table[region]


def _entry(value: Any, zone: str, name: str, year: int | None, source: str) -> dict[str, Any]:
    return {"value": round(float(value), 3), "zone": zone, "name": name, "year": year, "source": source, "assumed": False}


@functools.cache
def _folder() -> Path:
    spec = importlib.util.find_spec("codecarbon")
    if spec is None or not spec.submodule_search_locations:
        raise BadInput(
            "the grid data comes with codecarbon, which is not installed: pip install codecarbon, or give intensity="
        )
    return Path(next(iter(spec.submodule_search_locations))) / "data"


@functools.cache
def _load(name: str) -> dict[str, Any]:
    try:
        return json.loads((_folder() / "private_infra" / name).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadInput(
            f"codecarbon's data file {name} cannot be read ({error}): reinstall codecarbon, or give intensity="
        ) from error
