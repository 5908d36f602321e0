"""What serving costs: readings repeated until they are steady, and settings of one model that take
turns."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import greenvis as gv
from greenvis.meters import measure, serving
from greenvis.meters.measure import compare
from greenvis.meters.serving import median_spread
from greenvis.tasks.regression import Regression


@pytest.fixture(autouse=True)
def _patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measure for as long as it takes; elsewhere tests are brief."""
    monkeypatch.setattr(measure, "MOST_S", 600.0)
    monkeypatch.setattr(measure, "PASSES_S", 600.0)


class Plug:
    """A smart plug on a machine whose model spends what `cost` says at each call, in joules."""

    def __init__(self, cost: Callable[[int], float]) -> None:
        self.cost, self.calls, self.joules = cost, 0, 0.0

    def __call__(self) -> float:
        return self.joules

    def work(self) -> None:
        self.joules += self.cost(self.calls)
        self.calls += 1


@given(st.lists(st.floats(0.5, 2.0), min_size=2, max_size=40))
def test_the_spread_is_the_quartile_range_over_the_root_of_the_count(values: list[float]) -> None:
    low, high = np.percentile(values, [25, 75])
    want = (high - low) / math.sqrt(len(values)) / statistics.median(values)
    assert median_spread(values) == pytest.approx(want, abs=1e-12)
    assert median_spread([2 * v for v in values]) == pytest.approx(want, abs=1e-12)


def test_one_reading_has_no_spread_and_one_disturbed_reading_does_not_widen_it() -> None:
    assert median_spread([1.0]) == math.inf
    assert median_spread([1.0] * 9 + [50.0]) == 0


class Spends(nn.Module):
    """Spends on the plug's machine at each call."""

    def __init__(self, plug: Plug) -> None:
        super().__init__()
        self.plug, self.linear = plug, nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        self.plug.work()
        return self.linear(x.flatten(1)[:, :4])


def test_one_image_is_read_until_it_is_steady(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "ROUND_S", 0.0)  # one call a reading
    plug = Plug(lambda call: 4.0 if call < 20 and call % 2 else 8.0)
    with gv.track("t", dir=tmp_path, wall_meter=plug) as run:
        served = measure.serve(Spends(plug), torch.randn(8, 1, 4, 4), run)["inference"]
        found = serving.image(served, run.header["components"])
    assert found["rounds"] > measure.LEAST  # 4 and 8 joules in turn are not steady
    assert found["spread"] <= measure.STEADY
    assert found["value"] == 1.0
    assert found["batch_size"] == 8


def test_unsteady_readings_end_in_time_and_say_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "ROUND_S", 0.0)
    monkeypatch.setattr(measure, "MOST_S", 0.0)
    plug = Plug(lambda call: 1.0 + call % 2)
    with gv.track("t", dir=tmp_path, wall_meter=plug) as run:
        served = measure.serve(Spends(plug), torch.randn(8, 1, 4, 4), run)["inference"]
        found = serving.image(served, run.header["components"])
    assert found["rounds"] == measure.LEAST
    assert found["spread"] > measure.STEADY


def test_settings_are_judged_by_their_tasks_metric(tmp_path: Path) -> None:
    x, y = torch.tensor([[1.0], [2.0], [3.0]]), torch.tensor([[1.5], [2.5], [3.5]])
    plug = Plug(lambda call: 1.0)

    def answer(x: Tensor, y: Tensor) -> Tensor:
        plug.work()
        return x

    with gv.track("t", dir=tmp_path, wall_meter=plug) as run:
        points = lambda: {"never": nullcontext({})}  # noqa: E731
        rows = compare(points, answer, lambda: [(x, y)], run, task=Regression(quantity="mm"))
    assert rows[0]["rmse"] == pytest.approx(0.5)


def test_settings_take_turns_and_their_facts_add_up(tmp_path: Path) -> None:
    drift = 1.5  # the machine gets dearer with every call: what is measured last would pay most
    order: list[str] = []
    cheap = {"whole": 1.0, "half": 0.5, "tenth": 0.1}
    plug = Plug(
        lambda call: cheap[order[-1]] * drift ** (call // 6)
    )  # 6 calls: each setting, warming up and counted

    def points() -> dict[str, Any]:
        return {name: setting(name) for name in cheap}

    @contextmanager
    def setting(name: str) -> Iterator[dict[str, Any]]:
        facts: dict[str, Any] = {}
        order.append(name)
        yield facts
        facts |= {"exits": [1, 2], "macs": float(len(order))}

    def answer(x: Tensor, y: Tensor) -> Tensor:
        plug.work()
        return x

    x = torch.eye(2)[[0, 1, 1, 0, 1]]
    y = torch.tensor([0, 1, 1, 1, 0])
    with gv.track("t", dir=tmp_path, wall_meter=plug) as run:
        observed = compare(points, answer, lambda: [(x[:3], y[:3]), (x[3:], y[3:])], run, turn=1)
        rows = serving.settings(observed, run.header["components"])
    names = list(cheap)
    turns = [*names, *names[::-1], *names[::-1], *names, *names, *names[::-1]]
    assert order == [name for name in turns for _ in ("warming up", "counted")]
    assert [r["setting"] for r in rows] == names
    assert [r["accuracy"] for r in rows] == [0.6] * 3
    assert [r["exits"] for r in rows] == [[2, 4]] * 3
    assert [r["macs"] for r in rows] == [
        (3 * 2 + 2 * 12) / 5,
        (3 * 4 + 2 * 10) / 5,
        (3 * 6 + 2 * 8) / 5,
    ]
    joules = [r["inference_energy_j"] for r in rows]
    assert [j["value"] / joules[0]["value"] for j in joules] == pytest.approx([1.0, 0.5, 0.1])
    assert [j["passes"] for j in joules] == [measure.PASSES] * 3
    assert [j["spread"] for j in joules] == pytest.approx([0, 0, 0], abs=1e-9)


def test_the_report_shows_how_far_readings_scatter(tmp_path: Path) -> None:
    rows = [
        {"setting": "never", "inference_energy_j": {"value": 2.0, "spread": 0.0}, "macs": 10.0},
        {
            "setting": "0.5",
            "inference_energy_j": {"value": 1.0, "spread": 0.04},
            "macs": 5.0,
            "exits": [3, 1],
        },
    ]
    with gv.track("t", dir=tmp_path) as run:
        run.fact(
            accuracy=0.5, operating_points=rows, inference_energy_j={"value": 2.0, "spread": 0.025}
        )
    gv.report([run.path], out=tmp_path / "out")
    arm = json.loads((tmp_path / "out" / "results.json").read_text())["arms"]["t"]
    assert [r["energy_spread"] for r in arm["operating_points"]] == [0.0, 0.04]
    assert arm["inference_energy_j"]["spread"] == 0.025
    shown = (tmp_path / "out" / "report.md").read_text()
    assert "| 0.50 ± 0.02 |" in shown
    assert "is 2.5 % of it or less in each run" in shown
