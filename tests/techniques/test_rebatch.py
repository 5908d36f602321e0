"""Samples of several batches go on together behind an exit: the same answers, in order, by whole
batches."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hosts import HOSTS
from hypothesis import given, settings
from hypothesis import strategies as st
from test_early_exit import RECIPE, wrapped
from torch import Tensor

import greenvis as gv
from greenvis.core.technique import logits_of
from greenvis.core.wrap import Wrapped
from greenvis.errors import BadInput, GreenvisError
from greenvis.meters import record
from greenvis.techniques.inference.exits.early_exit import InstalledEarlyExit, rebatched


def stream(host: str, sizes: list[int]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.rand(n, *HOSTS[host].input_shape, generator=generator) for n in sizes]


def mixed(installed: InstalledEarlyExit, batches: list[Tensor]) -> list[float]:
    """Return thresholds by which about half leave at each exit (patience: once the answer
    stayed)."""
    if installed.request.criterion == "patience":
        return [1.0, 1.0]
    sure = installed.sureness([(x, torch.zeros(len(x))) for x in batches])
    first = float(sure[0].median())
    return [first, float(sure[1][sure[0] < first].median())]


def one_by_one(live: Wrapped, batches: list[Tensor]) -> list[Tensor]:
    with torch.no_grad():
        return [logits_of(live.model(x)) for x in batches]


@pytest.mark.one_in(7)
@pytest.mark.parametrize("criterion", ["max_prob", "patience"])
@pytest.mark.parametrize("host", HOSTS)
def test_answers_are_those_of_each_batch_alone(host: str, criterion: str) -> None:
    live, installed, _ = wrapped(host, criterion=criterion)
    batches = stream(host, [6, 6, 5, 6, 1])
    thresholds = mixed(installed, batches)
    with installed.at(thresholds) as facts:
        want = one_by_one(live, batches)
    with installed.at(thresholds) as told:
        got = [*rebatched(live, iter(batches))]
    assert told["exits"] == facts["exits"]
    assert told["macs"] == facts["macs"]
    assert criterion == "patience" or all(facts["exits"])
    for a, b in zip(got, want, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


@given(
    st.lists(st.integers(0, 7), max_size=6),
    st.integers(1, 20),
    st.lists(st.floats(0.15, 1.0), min_size=2, max_size=2),
)
@settings(max_examples=30)
def test_any_sizes_and_thresholds(sizes: list[int], size: int, limits: list[float]) -> None:
    live, installed, _ = _SHARED
    batches = stream("timm-vit", sizes)
    installed.thresholds = limits
    got = [*rebatched(live, batches, size)]
    assert [len(a) for a in got] == sizes
    for a, b in zip(got, one_by_one(live, batches), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


_SHARED = wrapped()


def test_whole_batches_go_on_and_nobody_waits_long() -> None:
    live, installed, _ = wrapped()
    batches = stream("timm-vit", [6] * 12)
    installed.thresholds = mixed(installed, batches)
    seen: list[int] = []
    live.model.blocks[-1].register_forward_pre_hook(lambda m, a: seen.append(len(a[0])))
    handed: list[int] = []

    def handing() -> Iterator[Tensor]:
        for i, x in enumerate(batches):
            handed.append(i)
            yield x

    open_ = []
    for done, _answer in enumerate(rebatched(live, handing()), 1):
        open_.append(len(handed) - done)
    assert all(n == 6 for n in seen[:-1])
    assert len(seen) == -(-sum(seen) // 6) > 1
    assert max(open_) < 8  # answers come while the stream goes on


def test_without_thresholds_all_go_to_the_end() -> None:
    live, installed, _ = wrapped()
    batches = stream("timm-vit", [3, 3])
    with installed.at(float("inf")) as facts:
        got = [*rebatched(live, batches)]
    assert facts["exits"] == [0, 0, 6]
    assert torch.equal(torch.cat(got), torch.cat(one_by_one(live, batches)))
    assert [*rebatched(live, [])] == []


def test_what_cannot_wait_is_refused() -> None:
    live, _, x = wrapped()
    with pytest.raises(BadInput, match="size is 0: give"):
        rebatched(live, [x], 0)
    live.model.train()
    with pytest.raises(GreenvisError, match=r"call model.eval\(\) first"):
        next(rebatched(live, [x]))
    for other in (gv.TokenMerge(r=2), gv.TokenPrune(blocks=(1,), method="class_attention")):
        live = gv.wrap(
            HOSTS["timm-vit"].build().eval(), [other, gv.EarlyExit(at=(1, 2), threshold=0.2)]
        )
        live.model.eval()
        with pytest.raises(BadInput, match=r"where tokens merge or are pruned.*batch by batch"):
            next(rebatched(live, [x]))
        assert [*live.operating_points()][-1] == "set"
    with pytest.raises(BadInput, match="has no early exits"):
        rebatched(gv.wrap(HOSTS["timm-vit"].build(), ()), [x])


@pytest.mark.slow
def test_a_recipe_reports_the_rebatched_setting(tmp_path: Path) -> None:
    (tmp_path / "tiny.yaml").write_text(RECIPE)
    gv.run(tmp_path / "tiny.yaml", runs=tmp_path / "runs")
    facts = next(
        r.facts
        for r in map(record.read, record.find([tmp_path / "runs"]))
        if r.header["arm"] == "frozen"
    )
    points = {p["setting"]: p for p in facts["operating_points"]}
    each, together = points["calibrated"], points["calibrated, rebatched"]
    assert {k: together[k] for k in ("accuracy", "exits", "macs", "images")} == {
        k: each[k] for k in ("accuracy", "exits", "macs", "images")
    }
    gv.report([tmp_path / "runs"], out=tmp_path / "out")
    rows = json.loads((tmp_path / "out" / "results.json").read_text())["arms"]["frozen"][
        "operating_points"
    ]
    assert "calibrated, rebatched" in [r["setting"] for r in rows]
