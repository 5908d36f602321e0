"""Grid intensity: known zones, nothing assumed in silence, and re-pricing that changes grams only."""

from __future__ import annotations

import subprocess
import sys

import pytest

from greenvis import grid, price
from greenvis.errors import BadInput
from greenvis.meters import carbon
from greenvis.record import Reading


@pytest.mark.parametrize(
    ("zone", "low", "high"),
    [
        ("FRA", 20, 120), ("fra", 20, 120), ("SWE", 5, 80), ("POL", 400, 1000), ("USA-CA", 100, 350),
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
    assert (found["value"], found["assumed"]) == (475.0, True)
    assert "iea.org" in found["source"]
    grams = price.carbon(Reading("energy_j", 3.6e6, 3.6e6, 3.6e6), found, pue=1.5)
    assert grams.value == pytest.approx(712.5)
    assert grams.provenance == "constant"


@pytest.mark.parametrize(
    ("zone", "word"),
    [("FRX", "did you mean 'F"), ("France", "'FRA'"), ("USA-XX", "no region"), ("FRA-75", "regions exist for"),
     ("gcp:mars1", "known|mean"), ("", "ISO-3"), (3, "ISO-3")],
)  # fmt: skip
def test_an_unknown_zone_is_refused_with_the_nearest(zone: object, word: str) -> None:
    with pytest.raises(BadInput, match=word):
        grid.lookup(zone)


@pytest.mark.parametrize(
    "options",
    [
        {"pue": 0.9}, {"pue": float("nan")}, {"intensity": -1}, {"country": "FRA", "intensity": 3}, {"embodied": {"kg": -1}},
        {"embodied": {"kilos": 3}}, {"embodied": {"kg": 3, "share": 2}},
    ],
)  # fmt: skip
def test_bad_options_are_refused(options: dict) -> None:
    with pytest.raises(BadInput):
        carbon.header(**options)


def test_the_embodied_share_is_a_part_of_the_lifetime() -> None:
    given = carbon.header(embodied={"kg": 1000, "lifetime_years": 4, "share": 0.5})["embodied"]
    day = price.embodied(given, 86400)
    assert day.value == pytest.approx(1000 * 1000 * 0.5 / (4 * 365.25))
    assert price.embodied(None, 86400).value is None


def test_looking_up_a_zone_imports_neither_codecarbon_nor_torch() -> None:
    code = (
        "import sys; from greenvis.grid import lookup; lookup('FRA'); lookup('gcp:us-east1');"
        "assert not {'codecarbon', 'torch', 'pandas'} & set(sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
