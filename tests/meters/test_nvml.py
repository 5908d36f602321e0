"""GPU energy by NVML, on a stand-in for the driver's library: no GPU is at hand here. Marked `gpu`:
on a real one."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from types import ModuleType

import pytest

import greenvis as gv
from greenvis.meters import devices, pricing
from greenvis.meters.energy import Meter
from greenvis.meters.record import read
from greenvis.meters.sources import nvml, rapl


class Driver(ModuleType):
    """Answers as pynvml does, for GPUs whose energy (mJ) and power (mW) the test sets."""

    class NVMLError(Exception):
        pass

    def __init__(self, count: int = 3, *, counter: bool = True) -> None:
        super().__init__("pynvml")
        self.energy, self.power, self.counter = [1000] * count, 50_000, counter
        self.cards = ["Test GPU"] * count
        self.lost: set[int] = set()  # off the bus

    def nvmlInit(self) -> None:  # noqa: N802
        pass

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802
        return len(self.energy)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:  # noqa: N802
        return index

    def nvmlDeviceGetName(self, handle: int) -> bytes:  # noqa: N802
        return self.cards[handle].encode()

    def nvmlDeviceGetUUID(self, handle: int) -> str:  # noqa: N802
        return f"GPU-{handle}"

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: int) -> int:  # noqa: N802
        if not self.counter:
            raise self.NVMLError("not supported")
        if handle in self.lost:
            error = self.NVMLError("GPU is lost")
            error.value = 15
            raise error
        return self.energy[handle]

    def nvmlDeviceGetPowerUsage(self, handle: int) -> int:  # noqa: N802
        return self.power


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Driver:
    (tmp_path / "version").write_text("NVRM")
    monkeypatch.setattr(nvml, "DRIVER", (str(tmp_path / "version"),))
    monkeypatch.setattr(rapl, "POWERCAP", tmp_path)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    stand_in = Driver()
    monkeypatch.setitem(sys.modules, "pynvml", stand_in)
    return stand_in


@pytest.mark.parametrize(
    ("visible", "devices"),
    [
        (None, ["GPU-0", "GPU-1", "GPU-2"]), ("2,0", ["GPU-2", "GPU-0"]), ("GPU-1", ["GPU-1"]),
        ("1,-1,0", ["GPU-1"]), ("", []),
        ("MIG-x", []),
    ],
)  # fmt: skip
def test_only_visible_gpus_are_read(
    driver: Driver, monkeypatch: pytest.MonkeyPatch, visible: str | None, devices: list[str]
) -> None:
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    source = nvml.Nvml()
    source.open({})
    assert [uuid for c in source.components for uuid in c["devices"]] == devices
    assert bool(source.reason) == (not devices)


def test_the_counters_joules_since_opening_are_a_measured_component(
    driver: Driver, tmp_path: Path
) -> None:
    meter = Meter()
    gpu = next(c for c in meter.components if c["name"] == "gpu")
    assert (gpu["source"], gpu["provenance"], gpu["scope"], gpu["devices"]) == (
        "nvml", "measured", "machine", ["GPU-0", "GPU-1", "GPU-2"],
    )  # fmt: skip
    driver.energy = [3000, 1000, 2500]
    assert meter.read()["gpu_j"] == 3.5
    assert pricing.energy(meter.read(), meter.components)["gpu"].value == 3.5


def test_without_a_counter_power_is_integrated_and_called_an_estimate(
    driver: Driver, tmp_path: Path
) -> None:
    driver.counter = False
    before = time.monotonic()
    meter = Meter()
    opened = time.monotonic()
    assert next(c for c in meter.components if c["name"] == "gpu")["provenance"] == "estimated"
    time.sleep(0.2)
    asked = time.monotonic()
    joules = meter.read()["gpu_j"]
    after = time.monotonic()
    assert 3 * 50 * (asked - opened) <= joules <= 3 * 50 * (after - before)


def test_a_counter_that_stands_still_is_taken_back(
    driver: Driver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nvml, "PATIENCE_S", 0.1)
    with gv.track("t", dir=tmp_path / "runs", interval_s=0.05) as run:
        time.sleep(0.5)
    found = read(run.path)
    parts = pricing.phases(found)[""]
    assert parts["gpu"].value is None
    assert "stood still" in parts["gpu"].reason
    assert found.header["components"] == run.header["components"]


def test_a_driver_that_began_anew_takes_no_joules_back(driver: Driver, tmp_path: Path) -> None:
    meter = Meter()
    driver.energy = [3000, 1000, 2000]
    assert meter.read()["gpu_j"] == 3.0
    driver.energy = [0, 1500, 2000]
    reading = meter.read()
    assert reading["gpu_j"] == 3.5
    assert reading["gpu_j_unseen_s"] > 0
    assert pricing.energy(reading, meter.components)["gpu"].provenance == "partly unknown"
    assert [note.split(":")[0] for note in meter.new_notes()] == ["NVML GPU-0"]


def test_a_gpu_that_falls_off_the_bus_leaves_the_others_measured(
    driver: Driver, tmp_path: Path
) -> None:
    meter = Meter()
    driver.lost = {1}
    driver.energy = [3000, 1000, 1000]
    reading = meter.read()
    assert reading["gpu_j"] == 2.0
    assert reading["gpu_j_unseen_s"] > 0
    assert "GPU is lost" in meter.new_notes()[0]


def test_a_gpu_out_of_reach_at_first_has_no_baseline(driver: Driver, tmp_path: Path) -> None:
    driver.lost, driver.energy = {0, 1, 2}, [10**12] * 3
    meter = Meter()
    assert pricing.energy(meter.read(), meter.components)["gpu"].value is None
    driver.lost = set()
    meter.read()
    driver.energy = [10**12 + 5000] * 3
    reading = meter.read()
    assert reading["gpu_j"] == 15.0
    assert reading["gpu_j_unseen_s"] > 0


def test_unlike_cards_by_number_wait_for_torch_to_tell_their_uuids(
    driver: Driver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver.cards = ["T4", "H100", "T4"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    with gv.track("t", dir=tmp_path, interval_s=60) as run:
        assert (
            "cannot be told"
            in next(c for c in run.header["components"] if c["name"] == "gpu")["reason"]
        )
        monkeypatch.setattr(devices, "in_use", lambda: {"cuda"})
        monkeypatch.setattr(devices, "uuids", lambda: ["1"])
        run._correct()
        run.energy()
        driver.energy = [9000, 3000, 9000]
    gpu = next(c for c in read(run.path).header["components"] if c["name"] == "gpu")
    assert (gpu["devices"], gpu["hardware"], gpu["source"]) == (["GPU-1"], ["H100"], "nvml")
    reading = pricing.energy(
        {q: read(run.path).sum(q) for q in ("wall_s", "gpu_j", "gpu_j_unseen_s")}, [gpu]
    )["gpu"]
    assert (reading.value, reading.provenance) == (
        2.0,
        "partly unknown",
    )  # the time before is not known


def test_other_cards_than_the_mask_said_are_read_once_torch_has_opened_them(
    driver: Driver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    meter = Meter()
    driver.energy = [2000, 1000, 1000]
    assert meter.read()["gpu_j"] == 1.0
    monkeypatch.setattr(devices, "uuids", lambda: ["GPU-2"])
    (gpu,) = meter.corrections()
    assert gpu["devices"] == ["GPU-2"]
    driver.energy = [9000, 9000, 4000]
    reading = meter.read()
    assert reading["gpu_j"] == 4.0  # never less than before
    assert reading["gpu_j_unseen_s"] > 0
    assert meter.corrections() == []


@pytest.mark.parametrize(("uuids", "mask"), [(["0", "1", "2"], None), (["1"], "1")])
def test_the_cards_torch_opens_are_mostly_those_read(
    driver: Driver,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    uuids: list[str],
    mask: str | None,
) -> None:
    if mask:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", mask)
    meter = Meter()
    monkeypatch.setattr(devices, "in_use", lambda: {"cuda"})
    monkeypatch.setattr(devices, "uuids", lambda: uuids)
    assert meter.corrections() == []


def test_no_driver_is_no_gpu_and_costs_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(nvml, "DRIVER", (str(tmp_path / "none"),))
    source = nvml.Nvml()
    source.open({})
    assert source.components == []
    assert "no NVIDIA driver" in source.reason
    assert not source.missing


@pytest.mark.gpu
def test_a_real_gpu_under_load_advances_by_its_power(tmp_path: Path) -> None:
    import torch

    x = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    with gv.track("gpu", dir=tmp_path) as run, run.phase("train"):
        end = time.monotonic() + 5
        while time.monotonic() < end:
            x @ x
            torch.cuda.synchronize()
    gpu = pricing.phases(read(run.path))["train"]["gpu"]
    assert gpu.provenance == "measured"
    assert 5 * 30 < gpu.value < 5 * 1500
