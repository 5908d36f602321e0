"""Grid intensity: known zones, nothing assumed in silence, and re-pricing that changes grams
only."""

from __future__ import annotations

import re
import statistics
import subprocess
import sys

import pytest

from greenvis.errors import BadInput
from greenvis.meters import carbon, grid
from greenvis.meters.record import Reading


@pytest.mark.parametrize(
    ("zone", "low", "high"),
    [
        ("FRA", 20, 120), ("fra", 20, 120), ("SWE", 5, 80), ("POL", 400, 1000), ("USA-CA", 100,
        350),
        ("usa-california", 100, 350),
        ("CAN-quebec", 20, 40), ("CHN-BJ", 300, 900), ("SE3", 5, 80), ("gcp:europe-west1", 1, 400),
    ],
)  # fmt: skip
def test_a_known_zone_has_a_value_and_its_source(zone: str, low: float, high: float) -> None:
    found = grid.lookup(zone)
    assert low < found["value"] < high
    assert found["source"]
    assert found["assumed"] is False


def test_no_zone_is_the_world_average_and_says_so() -> None:
    found = grid.lookup(None)
    assert (found["value"], found["assumed"], found["year"]) == (475.0, True, 2018)
    assert "iea.org" in found["source"]
    assert "IEA" in found["source"]
    grams = carbon.grams(Reading("energy_j", 3.6e6, 3.6e6, 3.6e6), found, pue=1.5)
    assert grams.value == pytest.approx(712.5)
    assert grams.provenance == "constant"


@pytest.mark.parametrize(
    ("zone", "word"),
    [("FRX", "did you mean 'F"), ("France", "'FRA'"), ("USA-XX", "no region"), ("FRA-75", "regions "
                                                                                          "exist "
                                                                                          "for"),
     ("gcp:mars1", "known|mean"), ("", "ISO-3"), (3, "ISO-3"),
     ("aws:us-east-1", "'USA-VA'"), ("azure:westeurope", "regions of 'azure'"), ("ibm:eu-de",
     "only of gcp"),
     ("SE7", "'SE1'"), ("CAN-XX", "no region 'XX'"), ("XKX", "zones are known"), ("EUR", "no "
                                                                                         "average "
                                                                                         "of "
                                                                                         "Europe"),
     ("WORLD", "leave the country out"), ("33", "zones are known"), ("ATA", "nothing is known of "
                                                                            "ATA")],
)  # fmt: skip
def test_an_unknown_zone_is_refused_with_the_nearest(zone: object, word: str) -> None:
    with pytest.raises(BadInput, match=word):
        grid.lookup(zone)


@pytest.mark.parametrize(
    ("word", "meant"),
    [
        ("UK", "GBR"), ("uk", "GBR"), ("England", "GBR"), ("great britain", "GBR"), ("GB", "GBR"),
        ("UA", "UKR"),
        ("FR", "FRA"), ("DE", "DEU"), ("GER", "DEU"), ("Germany", "DEU"), ("Germny", "DEU"), ("276",
        "DEU"),
        ("CH", "CHE"), ("SUI", "CHE"), ("CN", "CHN"), ("US", "USA"), ("CA", "CAN"), ("AT", "AUT"),
        ("AU", "AUS"),
        ("KR", "KOR"), ("South Korea", "KOR"), ("Holland", "NLD"), ("SE", "SWE"), ("IN", "IND"),
        ("UAE", "ARE"),
        ("California", "USA-CA"), ("New York", "USA-NY"), ("Quebec", "CAN-QC"), ("Beijing",
        "CHN-BJ"),
    ],
)  # fmt: skip
def test_what_people_write_for_a_country_is_understood_but_not_guessed(
    word: str, meant: str
) -> None:
    with pytest.raises(BadInput) as error:
        grid.lookup(word)
    assert re.findall(r"'([A-Z]{3}(?:-[A-Z]{2})?)'", str(error.value).split("did you mean")[1]) == [
        meant
    ]
    assert grid.lookup(meant)["value"] > 0


def test_a_name_of_two_places_is_answered_with_both() -> None:
    with pytest.raises(BadInput, match=r"'GEO' \(Georgia\) or 'USA-GA'"):
        grid.lookup("Georgia")


@pytest.mark.parametrize("code", sorted(grid.PROVINCES))
def test_canadian_provinces_go_by_their_codes(code: str) -> None:
    assert grid.lookup(f"CAN-{code}") == grid.lookup(f"CAN-{grid.PROVINCES[code]}")


def test_pounds_per_megawatt_hour_become_grams_per_kilowatt_hour() -> None:
    """eGRID2023: California 394.769 lb/MWh, which is 179.1 kg/MWh; a pound is 453.59 g."""
    assert grid.lookup("USA-CA")["value"] == pytest.approx(179.06, abs=0.01)
    raw = grid._load("2023/usa_emissions.json")
    assert raw["_unit"]["emissions"] == "lbs/MWh"
    states = {k: v["regionCode"] for k, v in raw.items() if not k.startswith("_")}
    for state, code in states.items():
        assert grid.lookup(f"USA-{code}")["value"] == pytest.approx(
            raw[state]["emissions"] / 2.20462262, rel=1e-4
        )
    middle = statistics.median(grid.lookup(f"USA-{code}")["value"] for code in states.values())
    assert middle == pytest.approx(
        grid.lookup("USA")["value"], rel=0.3
    )  # of another source, in g/kWh


@pytest.mark.parametrize(
    ("file", "unit"),
    [("2023/china_provincial_emissions.json", "gCO2/kWh"), ("nordic_emissions.json", "gCO2eq/kWh")],
)
def test_the_other_tables_are_in_grams_per_kilowatt_hour(file: str, unit: str) -> None:
    assert {z["unit"] for z in grid._load(file)["data"].values()} <= {unit, "gCO2eq/kWh"}
    assert grid._load("carbon_intensity_per_source.json")["unit"] == "gCO2.eq/kWh"


@pytest.mark.parametrize(
    "options",
    [
        {"pue": 0.9}, {"pue": float("nan")}, {"intensity": -1}, {"country": "FRA", "intensity": 3},
        {"embodied": {"kg": -1}},
        {"embodied": {"kilos": 3}}, {"embodied": {"kg": 3, "share": 2}},
    ],
)  # fmt: skip
def test_bad_options_are_refused(options: dict) -> None:
    with pytest.raises(BadInput):
        carbon.header(**options)


def test_the_embodied_share_is_a_part_of_the_lifetime() -> None:
    given = carbon.header(embodied={"kg": 1000, "lifetime_years": 4, "share": 0.5})["embodied"]
    day = carbon.embodied_grams(given, 86400)
    assert day.value == pytest.approx(1000 * 1000 * 0.5 / (4 * 365.25))
    assert carbon.embodied_grams(None, 86400).value is None


def test_looking_up_a_zone_imports_neither_codecarbon_nor_torch() -> None:
    code = (
        "import sys; from greenvis.meters.grid import lookup; lookup('FRA'); lookup('gcp:us-east1');"
        "assert not {'codecarbon', 'torch', 'pandas'} & set(sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
