"""Meter sources: the contract over all of them, and which of them prices what."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from test_nvml import Driver

from greenvis.errors import GreenvisError
from greenvis.meters import host, pricing
from greenvis.meters.doctor import doctor
from greenvis.meters.energy import Meter
from greenvis.meters.ledger import Ledger
from greenvis.meters.sources import DOOR, Integral, MeterSource, Unavailable, nvml, rapl
from greenvis.meters.sources.cpu_time import CpuTime
from greenvis.meters.sources.wall import Wall
from greenvis.testing import check_meter_source


class Steady(MeterSource):
    """A counter that says the same power at all times."""

    name, quantities = "steady", {"cpu": "steady_j"}
    fields: Mapping[str, Any] = {}
    watts = 60.0

    def connect(self, coefficients: Mapping[str, Any]) -> list[dict[str, Any]]:
        self.watch("cpu", lambda now: self.watts * now, most=200.0)
        return [self.component("cpu", "a test's", **self.fields)]


class Running(Driver):
    """GPUs whose counters advance with the clock."""

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: int) -> int:  # noqa: N802
        super().nvmlDeviceGetTotalEnergyConsumption(handle)
        return int(time.monotonic() * 90_000)


@pytest.fixture
def zones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package and its memory whose counters advance with the clock."""
    monkeypatch.setattr(rapl, "POWERCAP", tmp_path)
    for zone, name in (("intel-rapl:0", "package-0"), ("intel-rapl:0:0", "dram")):
        (tmp_path / zone).mkdir()
        (tmp_path / zone / "name").write_text(name)
        (tmp_path / zone / "max_energy_range_uj").write_text("262143328850")
        (tmp_path / zone / "energy_uj").write_text("1000")
    monkeypatch.setattr(rapl, "_joules", lambda zone: 40 * (time.monotonic() % 1000))
    return tmp_path


@pytest.fixture
def driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Driver:
    (tmp_path / "version").write_text("NVRM")
    monkeypatch.setattr(nvml, "DRIVER", (str(tmp_path / "version"),))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setitem(sys.modules, "pynvml", stand_in := Running())
    return stand_in


@pytest.fixture
def no_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rapl, "POWERCAP", tmp_path / "none")
    monkeypatch.setattr(nvml, "DRIVER", (str(tmp_path / "none"),))


@pytest.mark.usefixtures("zones", "driver")
@pytest.mark.parametrize("name", sorted(DOOR.own))
def test_every_source_keeps_the_contract_where_it_can_be_read(name: str) -> None:
    make = DOOR.find(name) if name != "wall" else lambda: Wall(lambda: 300 * time.monotonic())
    assert check_meter_source(make) == ""


def test_gpus_without_a_counter_keep_the_contract(driver: Driver) -> None:
    driver.counter = False
    assert check_meter_source(nvml.Nvml) == ""


@pytest.mark.usefixtures("no_device")
@pytest.mark.parametrize(
    ("name", "word"), [("rapl", "no RAPL"), ("nvml", "no NVIDIA driver"), ("wall", "wall_meter=")]
)
def test_a_source_that_cannot_be_read_says_why(name: str, word: str) -> None:
    assert word in check_meter_source(DOOR.find(name))


class Believer(Steady):
    """It takes what its counter says, and no care."""

    def watch(self, component: str, read: Any, *args: Any, **kwargs: Any) -> Any:
        self.reader = read

    def read(self, now: float | None = None, *, fresh: bool = True) -> dict[str, float]:
        return {"steady_j": self.reader(time.monotonic() if now is None else now)}


class Raises(Steady):
    """It ends the run where it cannot be read."""

    def open(self, coefficients: Mapping[str, Any]) -> None:
        raise OSError("no such device")


class Says(Steady):
    """It cannot be read, and has figures."""

    def read(self, now: float | None = None, *, fresh: bool = True) -> dict[str, float]:
        return {"steady_j": 5.0}

    def connect(self, coefficients: Mapping[str, Any]) -> list[dict[str, Any]]:
        raise Unavailable("it is off")


class Wordless(Steady):
    """It covers nothing and says nothing."""

    def connect(self, coefficients: Mapping[str, Any]) -> list[dict[str, Any]]:
        return []


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (type("Milli", (Steady,), {"__doc__": "mJ.", "watts": 60_000.0}), "is it in joules"),
        (type("Back", (Steady,), {"__doc__": "It runs back.", "watts": -60.0}), "in joules"),
        (Believer, "is possible"),
        (Raises, "OSError: no such device"),
        (Says, "a reason and readings"),
        (Wordless, "covers nothing"),
        (type("Mute", (Steady,), {}), "docstring"),
        (
            type("Twice", (Steady,), {"__doc__": "As RAPL.", "quantities": {"cpu": "cpu_j"}}),
            "recorded by 'rapl' already",
        ),
        (
            type("Odd", (Steady,), {"__doc__": "x", "fields": {"provenance": "guessed"}}),
            "no provenance",
        ),
        (
            type("Order", (Steady,), {"__doc__": "x", "fields": {"coefficient": {
                "low": 2.0, "central": 1.0, "high": 3.0}}}),
            "in order",
        ),
        (
            type("Both", (Steady,), {"__doc__": "x", "quantities": {"cpu": "b_j", "ram": "b_j"}}),
            "as one quantity",
        ),
        (type("Else", (Steady,), {"__doc__": "x", "fields": {"observation": "y"}}), "recorded as"),
    ],
)  # fmt: skip
def test_a_source_that_breaks_the_contract_is_told_how(
    make: Callable[[], MeterSource], word: str
) -> None:
    with pytest.raises(GreenvisError, match=re.escape(word)):
        check_meter_source(make)


def source(name: str, part: str, provenance: str = "measured", **more: Any) -> MeterSource:
    """Return a source of one part of the machine."""
    fields = {"provenance": provenance}
    quantity = more.pop("quantity", f"{name}_j")

    def connect(self: MeterSource, coefficients: Mapping[str, Any]) -> list[dict[str, Any]]:
        self.watch(part, lambda now: 60.0 * now, most=200.0)
        return [self.component(part, **fields)]

    body = {"name": name, "quantities": {part: quantity}, "connect": connect, **more}
    return type(name, (MeterSource,), body)()


def used(*sources: MeterSource) -> dict[str, str]:
    return {c["name"]: c["source"] for c in Meter(sources=sources).components}


def test_the_surest_source_prices_each_part_and_none_is_counted_twice() -> None:
    plug, guess = source("plug", "machine"), source("guess", "machine", "estimated")
    counter, other = source("counter", "cpu"), source("other", "cpu")
    estimate = {"cpu": "cpu-time model", "ram": "resident memory model"}
    assert used(CpuTime()) == estimate
    assert used(CpuTime(), counter) == {"cpu": "counter", "ram": "resident memory model"}
    assert used(other, counter, CpuTime())["cpu"] == "other"  # the earlier among equals
    assert used(counter, plug, CpuTime()) == {"machine": "plug"}
    assert used(guess, CpuTime()) == {"machine": "guess"}
    assert used(guess, counter, CpuTime())["cpu"] == "counter"  # it would be counted twice
    assert "machine" not in used(guess, counter, CpuTime())
    assert used(source("late", "cpu", "constant"), CpuTime()) == estimate


def test_two_sources_do_not_write_over_each_others_readings() -> None:
    meter = Meter(sources=[source("a", "cpu"), source("b", "gpu", quantity="a_j")])
    assert [c["source"] for c in meter.components] == ["a"]
    assert meter.sources[1].reason == "a records 'a_j' already"


@pytest.mark.usefixtures("no_device")
def test_reasons_are_data() -> None:
    def fails(self: MeterSource, coefficients: Mapping[str, Any]) -> list[dict[str, Any]]:
        raise Unavailable("the NPU's driver is too old", missing=True)

    def breaks(self: MeterSource, coefficients: Mapping[str, Any]) -> list[dict[str, Any]]:
        raise KeyError("card0")

    meter = Meter(
        sources=[
            source("npu", "npu", connect=fails), source("broken", "cpu", connect=breaks),
            rapl.Rapl(), nvml.Nvml(), CpuTime(),
        ]
    )  # fmt: skip
    components = {c["name"]: c for c in meter.components}
    assert set(components) == {"cpu", "ram", "npu"}  # no driver, no GPU: nothing is missing
    assert (components["npu"]["source"], components["npu"]["reason"]) == (
        "none",
        "the NPU's driver is too old",
    )
    assert "KeyError: 'card0'; no RAPL package counter" in components["cpu"]["reason"]
    ledger = Ledger(meter)
    ledger.cut()
    assert pricing.energy(ledger.sums(), meter.components)["npu"].reason


def test_a_power_is_integrated_over_time() -> None:
    powers = iter([50.0, 100.0, 100.0])
    integral = Integral(lambda: next(powers))
    assert [integral(10.0), integral(12.0), integral(13.0)] == [0.0, 150.0, 250.0]


def test_a_plug_in_that_does_not_load_is_noted_and_ends_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(name: str) -> type[MeterSource]:
        if name == "outside":
            raise GreenvisError("the plug-in meter source 'outside' (x:Y) does not load: no x")
        return find(name)

    find, names = DOOR.find, DOOR.names()
    monkeypatch.setattr(DOOR, "names", lambda: [*names, "outside"])
    monkeypatch.setattr(DOOR, "find", refuse)
    assert [n for n in Meter().new_notes() if "does not load" in n]
    rows = [row["why"] for row in doctor() if row["what"] == "meter source"]
    assert rows == ["the plug-in meter source 'outside' (x:Y) does not load: no x"]


def test_a_source_that_fails_to_look_again_is_noted_once_and_stays() -> None:
    def breaks(self: MeterSource) -> None:
        raise OSError("unplugged")

    meter = Meter(sources=[source("plug", "machine", revise=breaks), CpuTime()])
    assert meter.corrections() == meter.corrections() == []
    assert [c["source"] for c in meter.components] == ["plug"]
    assert meter.new_notes() == ["meter source 'plug': OSError: unplugged"]


def test_doctor_lists_every_source_with_its_reason() -> None:
    rows = {row["what"]: row for row in doctor()}
    for name in DOOR.own:
        row = rows[f"meter source {name}"]
        assert row["source"] in ("available", "not available")
        assert row["why"]
    assert rows["meter source wall_time"]["provenance"] == "constant"


def test_rapl_counts_the_zones_it_is_given(tmp_path: Path) -> None:
    zone = tmp_path / "intel-rapl:0"
    zone.mkdir()
    (zone / "energy_uj").write_text("5000000\n")
    counted = rapl.Rapl([("cpu_j", zone)])
    (zone / "energy_uj").write_text("15000000\n")
    assert counted.read(now=host.clocks()[0] + 1.0)["cpu_j"] == 10.0
    assert rapl.open_rapl(tmp_path) == (None, f"no RAPL package counter under {tmp_path}")
