"""Grid carbon intensity by country or region, from the data files codecarbon ships (codecarbon
itself is not imported).

Standard library only. Zones: ISO-3 country ("FRA"); US state ("USA-CA"); Canadian or Chinese
province ("CAN-ontario" or "CAN-ON", "CHN-BJ"); Nordic bidding zone ("SE3", "NO4"); Google Cloud
region ("gcp:europe-west1"). codecarbon ships no figures of other clouds' regions: for those the
zone is where the machines stand.
"""

from __future__ import annotations

import difflib
import functools
import importlib.util
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from greenvis.errors import BadInput, nearest

G_PER_KWH_OF_LBS_PER_MWH = 0.45359237
# of the world average: the IEA's Global Energy & CO2 Status Report of 2019 reports on the year
# before
WORLD_YEAR = 2018
PROVINCES = {
    "AB": "alberta", "BC": "british columbia", "MB": "manitoba", "NB": "new brunswick",
    "NL": "newfoundland and labrador",
    "NS": "nova scotia", "NT": "northwest territories", "NU": "nunavut", "ON": "ontario",
    "PE": "prince edward island",
    "QC": "quebec", "SK": "saskatchewan", "YT": "yukon",
}  # fmt: skip
# what people write that is no ISO 3166 code or name: licence plates, sports, short and old names
OTHER_WORDS = {
    "UK": "GBR", "EN": "GBR", "ENG": "GBR", "SCO": "GBR", "WAL": "GBR", "NIR": "GBR",
    "BRITAIN": "GBR", "ENGLAND": "GBR",
    "SCOTLAND": "GBR", "WALES": "GBR", "GREAT BRITAIN": "GBR", "GER": "DEU", "SUI": "CHE",
    "NED": "NLD", "HOL": "NLD",
    "HOLLAND": "NLD", "DEN": "DNK", "SPA": "ESP", "POR": "PRT", "GRE": "GRC", "EL": "GRC",
    "CRO": "HRV", "SLO": "SVN",
    "BUL": "BGR", "LAT": "LVA", "LIT": "LTU", "ROM": "ROU", "IRE": "IRL", "KSA": "SAU",
    "UAE": "ARE", "RSA": "ZAF",
    "KOREA": "KOR", "JAP": "JPN", "TPE": "TWN", "INA": "IDN", "MAS": "MYS", "PHI": "PHL",
    "VIE": "VNM", "SIN": "SGP",
    "AMERICA": "USA", "RUSSIA": "RUS",
}  # fmt: skip
NO_COUNTRY = {
    **dict.fromkeys(("WORLD", "WLD", "GLOBAL"), "; leave the country out for the world's average"),
    **dict.fromkeys(
        ("EU", "EUR", "EUROPE", "EU27"),
        "; no average of Europe is known here: give a country, or intensity=",
    ),
}


def constant(intensity: float) -> dict[str, Any]:
    """Return a carbon intensity the user states, in the form of `lookup`.

    Args:
        intensity: g CO2e per kWh, 0 or more.

    Raises:
        BadInput: for no such number.
    """
    if not (isinstance(intensity, (int, float)) and 0 <= intensity < math.inf):
        raise BadInput(
            f"intensity is {intensity!r}; give grams of CO2e per kWh, 0 or more (coal is about "
            "1000)"
        )
    return {
        "value": float(intensity),
        "zone": "given",
        "year": None,
        "source": "given by the user",
        "assumed": False,
    }


def lookup(zone: str | None) -> dict[str, Any]:
    """Return the carbon intensity of a zone.

    Args:
        zone: an ISO-3 country or a region of one ("FRA", "USA-CA"); None for the world average,
            which is marked `assumed`.

    Returns:
        {"value": g CO2e per kWh, "zone", "name", "year", "source", "assumed"}.

    Raises:
        BadInput: for a zone that is not known, with the nearest.
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
        return _entry(
            z["emission_factor"], country, z["description"], z["year"], nordic["metadata"]["source"]
        )
    names = {c: m["country_name"] for c, m in mix.items()} | {
        c: z["description"] for c, z in nordic["data"].items()
    }
    raise BadInput(
        f"no carbon intensity for country '{zone}' (ISO-3 codes such as "
        f"'FRA'){_hint(word.upper(), names)}"
    )


def _hint(word: str, names: Mapping[str, str]) -> str:
    """Return "; did you mean 'GBR' (United Kingdom)?" for what such a word can mean: no country
    rather than a wrong one.

    names: of the zones there are, by code.
    """
    if word in NO_COUNTRY:
        return NO_COUNTRY[word]
    by_name = {name.upper(): code for code, name in names.items()}
    meant = OTHER_WORDS | _iso_words() | by_name
    code, region = meant.get(f"{int(word):03}" if word.isdecimal() else word), _regions().get(word)
    if code and code not in names:
        return f"; nothing is known of {code} here: give intensity= in g CO2e per kWh"
    codes = [code] if code else []
    if not codes and not region and len(word) == 3:
        codes = [c for c in names if c[:2] == word[:2]]
    if not codes and not region and len(word) > 3:
        codes = [by_name[n] for n in difflib.get_close_matches(word, by_name, n=3, cutoff=0.75)]
    shown = [f"'{c}' ({names[c]})" for c in codes[:4]] + ([f"'{region}'"] if region else [])
    many = f"; {len(names)} zones are known, or give intensity= in g CO2e per kWh"
    return f"; did you mean {' or '.join(shown)}?" if shown else many


def _regions() -> dict[str, str]:
    """Return the zones of states and provinces by their names."""
    states = _load("2023/usa_emissions.json")
    out = {k.upper(): f"USA-{v['regionCode']}" for k, v in states.items() if not k.startswith("_")}
    out |= {name.upper(): f"CAN-{code}" for code, name in PROVINCES.items()}
    china = _load("2023/china_provincial_emissions.json")["data"]
    return out | {n.upper(): f"CHN-{code[3:]}" for code, v in china.items() for n in v["names"]}


@functools.cache
def _iso_words() -> dict[str, str]:
    """Return ISO-3 codes by ISO-2 code, number and name, from the package that codecarbon brings
    along; {} without it."""
    spec = importlib.util.find_spec("pycountry")
    if spec is None or not spec.submodule_search_locations:
        return {}
    try:
        file = Path(next(iter(spec.submodule_search_locations))) / "databases" / "iso3166-1.json"
        entries = json.loads(file.read_text(encoding="utf-8"))["3166-1"]
    except (OSError, ValueError, KeyError):
        return {}
    keys = ("alpha_2", "alpha_3", "numeric", "name", "common_name", "official_name")
    return {e[k].upper(): e["alpha_3"] for e in entries for k in keys if k in e}


def _world() -> dict[str, Any]:
    by_source = _load("carbon_intensity_per_source.json")
    source = (
        "IEA, Global Energy & CO2 Status Report 2019, by way of codecarbon: "
        f"{by_source['world_average_source']}"
    )
    out = _entry(by_source["world_average"], "world", "world average", WORLD_YEAR, source)
    return out | {"assumed": True}


def _region(word: str, country: str, region: str) -> dict[str, Any]:
    if country in ("USA", "US"):
        states = {
            k: v for k, v in _load("2023/usa_emissions.json").items() if not k.startswith("_")
        }
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
        entry = _pick(word, region, zones)
        return _entry(
            entry["emission_factor"],
            f"CHN-{region}",
            entry["description"],
            entry["year"],
            table["metadata"]["source"],
        )
    if country in ("CAN", "CA"):
        provinces = {k.upper(): (k, v) for k, v in _load("2023/canada_energy_mix.json").items()}
        entry = _pick(word, PROVINCES.get(region, region).upper(), provinces)
        return _entry(
            _of_mix(entry[1]),
            f"CAN-{entry[0]}",
            entry[0],
            2023,
            "codecarbon's generation mix × its factor per source",
        )
    raise BadInput(
        f"no regions are known in '{country}' (zone '{word}'); regions exist for USA, CAN and CHN: "
        "give the country alone"
    )


def _of_mix(mix: Mapping[str, float]) -> float:
    factors = _load("carbon_intensity_per_source.json") | {
        "naturalGas": 0.0,
        "hydro": 0.0,
        "tidal": 0.0,
        "other": 0.0,
    }
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
    providers = sorted({p for p, _ in rows})
    if provider not in providers:
        raise BadInput(
            f"no carbon intensity is at hand for regions of '{provider}' (zone '{word}'), only of "
            f"{', '.join(providers)}: "
            "give the country or state the machines stand in, as 'IRL' or 'USA-VA', or intensity= "
            "in g CO2e per kWh"
        )
    if (provider, region) not in rows:
        raise BadInput(
            "no carbon intensity for cloud region "
            f"'{word}'{nearest(word, [':'.join(k) for k in rows])}"
        )
    row = rows[provider, region]
    return _entry(
        row["impact"],
        word,
        f"{row['city'] or row['regionName']}, {row['country_name']}",
        None,
        row["source"],
    )


def _pick(word: str, region: str, table: Mapping[str, Any]) -> Any:
    if region not in table:
        raise BadInput(f"no region '{region}' in zone '{word}'{nearest(region, table)}")
    return table[region]


def _entry(value: Any, zone: str, name: str, year: int | None, source: str) -> dict[str, Any]:
    return {
        "value": round(float(value), 3),
        "zone": zone,
        "name": name,
        "year": year,
        "source": source,
        "assumed": False,
    }


@functools.cache
def _folder() -> Path:
    spec = importlib.util.find_spec("codecarbon")
    if spec is None or not spec.submodule_search_locations:
        raise BadInput(
            "the grid data comes with codecarbon, which is not installed: pip install codecarbon, "
            "or give intensity="
        )
    return Path(next(iter(spec.submodule_search_locations))) / "data"


@functools.cache
def _load(name: str) -> dict[str, Any]:
    try:
        return json.loads((_folder() / "private_infra" / name).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadInput(
            f"codecarbon's data file {name} cannot be read ({error}): reinstall codecarbon, or "
            "give intensity="
        ) from error
