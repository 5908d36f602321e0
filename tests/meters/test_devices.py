"""Devices: which cards are this process's own, which have no counter, and that readings wait for
them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import greenvis as gv
from greenvis.meters import devices, measure, pricing, speed
from greenvis.meters.cards import Card, visible
from greenvis.meters.record import read

FAST, SLOW = "GPU-aaaa1111", "GPU-bbbb2222"
UNLIKE = [Card(SLOW, "T4"), Card(FAST, "H100")]  # by bus; CUDA calls the H100 number 0
ALIKE = [Card(SLOW, "H100"), Card(FAST, "H100")]
SPLIT = [Card(SLOW, "H100"), Card(FAST, "H100", ("MIG-cccc3333", "MIG-dddd4444"), split=True)]


def env(mask: str | None, order: str | None = None) -> dict[str, str]:
    return {
        k: v
        for k, v in (("CUDA_VISIBLE_DEVICES", mask), ("CUDA_DEVICE_ORDER", order))
        if v is not None
    }


@pytest.mark.parametrize(
    ("cards", "environ", "uuids", "chosen", "why"),
    [
        (UNLIKE, env("0"), None, [], "cannot be told"),
        (UNLIKE, env("1"), None, [], "CUDA_DEVICE_ORDER=PCI_BUS_ID"),
        (UNLIKE, env("1", "FASTEST_FIRST"), None, [], "H100, T4"),
        (UNLIKE, env("1", "PCI_BUS_ID"), None, [1], ""),
        (UNLIKE, env(None), None, [0, 1], ""),
        (UNLIKE, env("0,1"), None, [0, 1], ""),  # all of them, in whatever order
        (UNLIKE, env("0"), ["aaaa1111"], [1], ""),  # torch has opened it: no guess
        (UNLIKE, env(FAST), None, [1], ""),
        (UNLIKE, env("GPU-aaaa"), None, [1], ""),
        (UNLIKE, env(f"{FAST},{SLOW}"), None, [1, 0], ""),
        (UNLIKE, env(f"GPU-zzzz,{SLOW}"), None, [], "hides every GPU"),
        (ALIKE, env("1"), None, [1], ""),
        (ALIKE, env(" 1 , 0"), None, [1, 0], ""),
        (ALIKE, env("1,1"), None, [], "twice"),
        (ALIKE, env("1,-1,0"), None, [1], ""),
        (ALIKE, env("7"), None, [], "hides every GPU"),
        (ALIKE, env(""), None, [], "hides every GPU"),
        (ALIKE, env("GPU-"), None, [], "hides every GPU"),
        # which of the two?
        ([Card("GPU-ab1", "T4"), Card("GPU-ab2", "T4")], env("GPU-ab"), None, [], "hides every "
                                                                                  "GPU"),
        (ALIKE, env(None), ["9999"], [], "does not know the GPU 9999"),
        (SPLIT, env("MIG-cccc3333"), None, [], f"MIG slice of {FAST}"),
        (SPLIT, env("MIG-GPU-aaaa1111/1/0"), None, [], "MIG slice"),
        (SPLIT, env(None), None, [], f"MIG slice of {FAST}"),
        (SPLIT, env(None), ["cccc3333"], [], f"MIG slice of {FAST}"),
        (SPLIT, env("1"), None, [], f"MIG slice of {FAST}"),
        (SPLIT, env("0"), None, [0], ""),
        (SPLIT, env(None), ["GPU-bbbb2222"], [0], ""),
    ],
)  # fmt: skip
def test_cards_are_told_by_uuid_or_not_at_all(
    cards: list[Card], environ: dict[str, str], uuids: list[str] | None, chosen: list[int], why: str
) -> None:
    answer, reason = visible(cards, environ, uuids)
    assert answer == chosen
    assert why in reason
    assert bool(reason) == (not chosen)


def torch_with(*opened: str, hip: str | None = None, other: str = "", mps_bytes: int = 0) -> Any:
    """A torch as a machine with these devices has it: none of them is at hand here."""
    module = SimpleNamespace(is_initialized=lambda: True)
    return SimpleNamespace(
        cuda=SimpleNamespace(
            is_initialized=lambda: "cuda" in opened,
            device_count=lambda: 1,
            get_device_properties=lambda i: SimpleNamespace(uuid="aaaa1111"),
        ),
        xpu=SimpleNamespace(is_initialized=lambda: "xpu" in opened),
        mps=SimpleNamespace(current_allocated_memory=lambda: mps_bytes),
        backends=SimpleNamespace(mps=SimpleNamespace(is_available=lambda: mps_bytes > 0)),
        version=SimpleNamespace(hip=hip),
        accelerator=SimpleNamespace(
            current_accelerator=lambda check_available=False: (
                SimpleNamespace(type=other) if other else None
            )
        ),
        get_device_module=lambda kind: module,
    )


@pytest.mark.parametrize(
    ("stand_in", "kinds"),
    [
        (torch_with(), set()),
        (torch_with("cuda"), {"cuda"}),
        (torch_with("cuda", hip="6.4"), {"rocm"}),
        (torch_with("xpu"), {"xpu"}),
        (torch_with(mps_bytes=4096), {"mps"}),
        (torch_with(other="hpu"), {"hpu"}),
        (SimpleNamespace(), set()),  # half imported by another thread
    ],
)
def test_devices_in_use_are_told_without_opening_any(stand_in: Any, kinds: set[str]) -> None:
    assert devices.in_use(stand_in) == kinds


def test_torch_tells_the_uuids_of_what_it_has_opened() -> None:
    assert devices.uuids(torch_with("cuda")) == ["aaaa1111"]
    assert devices.uuids(torch_with("cuda", hip="6.4")) is None
    assert devices.uuids(torch_with()) is None
    assert devices.uuids(torch) is None
    assert devices.in_use(torch) == set()


class Elsewhere(nn.Module):
    """A model whose parameters say they lie on another device."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.linear = kind, nn.Linear(2, 2)

    def parameters(self, recurse: bool = True) -> Iterator[Any]:
        for p in super().parameters(recurse):
            yield SimpleNamespace(device=torch.device(self.kind), numel=p.numel, requires_grad=True)


@pytest.mark.parametrize(
    ("kind", "word"), [("mps", "MPS"), ("xpu", "XPU"), ("hpu", "hpu"), ("cuda", "no NVIDIA driver")]
)
def test_a_device_without_a_counter_is_a_component_that_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, word: str
) -> None:
    monkeypatch.setattr("greenvis.meters.sources.nvml.DRIVER", (str(tmp_path / "none"),))
    with gv.track("t", Elsewhere(kind), dir=tmp_path) as run, run.phase("train"):
        sum(range(100_000))
    record = read(run.path)
    for components in (record.header["components"], run.header["components"]):
        (gpu,) = (c for c in components if c["name"] == "gpu")
        assert (gpu["source"], gpu["observation"]) == ("none", "")
        assert gpu["reason"].startswith("none, because")
        assert word in gpu["reason"]
    whole = pricing.run_energy(record)
    assert whole.value == pytest.approx(run.energy().value)
    assert (whole.provenance, run.energy().provenance) == ("partly unknown", "partly unknown")
    gv.report([run.path], out=tmp_path / "report")
    text = (tmp_path / "report" / "report.md").read_text()
    assert word in text
    assert "<br>*partly unknown*" in text


def test_rocm_is_no_cuda(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("greenvis.meters.sources.nvml.DRIVER", (str(tmp_path / "none"),))
    monkeypatch.setattr(torch.version, "hip", "6.4")
    with gv.track("t", Elsewhere("cuda"), dir=tmp_path) as run:
        pass
    assert any("ROCm" in c["reason"] for c in read(run.path).header["components"])


def test_a_wall_meter_sees_every_device(tmp_path: Path) -> None:
    with gv.track("t", Elsewhere("mps"), dir=tmp_path, wall_meter=iter(range(100)).__next__) as run:
        run.energy()
    assert [c["name"] for c in run.header["components"]] == ["machine"]
    assert run.energy().provenance == "measured"


class Far(Tensor):
    """A tensor that says it lies on a device that answers later."""

    device = property(lambda self: torch.device("mps"))  # type: ignore[assignment]


class Asked(nn.Module):
    def __init__(self, log: list[str]) -> None:
        super().__init__()
        self.log = log

    def forward(self, x: Tensor) -> Tensor:
        self.log.append("asked")
        return x


def test_every_timed_call_waits_for_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []
    monkeypatch.setattr(torch.mps, "synchronize", lambda: log.append("done"))
    x = torch.ones(2, 3).as_subclass(Far)
    speed.latency(Asked(log), x, seconds=0, least=4)
    timed = log[speed.WARM_UP :]
    assert timed == ["done", "asked", "done"] * 4


def test_energy_is_read_when_the_device_has_finished(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    log: list[str] = []
    monkeypatch.setattr(torch.mps, "synchronize", lambda: log.append("done"))
    monkeypatch.setattr(measure, "GPU_ROUND_S", 0.0)
    with gv.track(
        "t", dir=tmp_path, wall_meter=lambda: float(log.append("read") or len(log))
    ) as run:
        del log[:]
        measure.serve(Asked(log), torch.ones(2, 3).as_subclass(Far), run)
    before = [log[i - 1] for i, word in enumerate(log) if word == "read" and "asked" in log[:i]]
    assert "asked" not in before
    assert log.count("done") > measure.LEAST


def test_nothing_waits_for_the_processor() -> None:
    assert devices.asynchronous(nn.Linear(2, 2), torch.ones(1), torch.ones(1, device="meta")) == []
    devices.wait([torch.device("cpu"), torch.device("meta")])
