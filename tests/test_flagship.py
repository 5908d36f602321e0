"""Techniques that go together: light tuning above a kept prefix, a kept teacher, merging tokens,
early exits."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hosts import HOSTS
from torch import Tensor

import greenvis as gv
from greenvis.core.technique import Samples, Technique, logits_of
from greenvis.core.wrap import Wrapped, wrap
from greenvis.errors import BadInput
from greenvis.techniques import registry
from greenvis.testing import check_together

PARTS: dict[str, dict[str, Any]] = {
    "partial": {"cache": True},
    "token_merge": {"r": 2},
    "early_exit": {"at": (1,)},
    "distill": {"teacher": copy.deepcopy, "cache": True},
}


def _together(
    names: list[str], more: Mapping[str, Mapping[str, Any]] | None = None
) -> list[tuple[type[Technique], Any]]:
    return [(registry.find(n), {**PARTS.get(n, {}), **(more or {}).get(n, {})}) for n in names]


@pytest.mark.one_in(4)
@pytest.mark.parametrize("without", [None, *PARTS])
@pytest.mark.parametrize("name", ["timm-vit", "transformers-vit"])
@pytest.mark.filterwarnings("ignore:distill. nothing is cached")
def test_the_whole_and_each_of_its_triples_keep_the_contract(
    name: str, without: str | None
) -> None:
    result = check_together(_together([n for n in PARTS if n != without]), HOSTS[name])
    assert result.outcome == "works", str(result)


@pytest.mark.slow
def test_a_probe_and_exits_of_a_frozen_base_keep_it_too() -> None:
    parts = _together(
        ["linear_probe", "token_merge", "early_exit"], {"linear_probe": {"cache": True}}
    )
    result = check_together(parts, HOSTS["timm-vit"])
    assert result.outcome == "works", str(result)


def _steps(
    x: Tensor, y: Tensor, folder: Path | None, *, r: int = 2, exits: Any = ("blocks.0",)
) -> Wrapped:
    """Train three epochs of two batches; in the second and third, nothing of the prefix need run
    where it is kept."""
    model = HOSTS["timm-vit"].build()
    torch.manual_seed(0)
    live = wrap(
        model, [gv.Partial(blocks=1, cache=True), gv.TokenMerge(r=r), gv.EarlyExit(at=exits)]
    )
    optimizer = torch.optim.SGD(live.param_groups(0.1))
    model.train()
    for _ in range(3):
        for at in (torch.tensor([0, 2, 4]), torch.tensor([5, 1, 3])):
            live.set_samples(
                None if folder is None else Samples(folder, {"images": "of the test"}, 6, 1, at)
            )
            logits = logits_of(model(x[at]))
            (F.cross_entropy(logits, y[at]) + live.loss(x[at], y[at], logits)).backward()
            optimizer.step()
            optimizer.zero_grad()
    live.set_samples(None)
    model.eval()
    return live


@pytest.fixture
def images() -> tuple[Tensor, Tensor]:
    return torch.rand(6, 3, 32, 32, generator=torch.Generator().manual_seed(3)), torch.arange(6) % 5


def test_merged_tokens_and_exits_above_a_kept_prefix_learn_what_they_learn_live(
    images: tuple[Tensor, Tensor], tmp_path: Path
) -> None:
    live, kept = _steps(*images, None), _steps(*images, tmp_path)
    facts = kept.facts()["prefix_cache"]
    assert (facts["misses"], facts["hits"]) == (6, 12)
    start = dict(HOSTS["timm-vit"].build().named_parameters())
    for (name, a), b in zip(live.trainable.items(), kept.trainable.values(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4, msg=name)
        assert name not in start or not torch.equal(b, start[name]) or ".bias" in name
    assert any("exit" in name for name in kept.trainable)
    with torch.no_grad():
        torch.testing.assert_close(
            live.model(images[0]), kept.model(images[0]), atol=1e-5, rtol=1e-4
        )


def test_sizes_of_merged_tokens_are_those_of_the_images_at_hand(
    images: tuple[Tensor, Tensor], tmp_path: Path
) -> None:
    live = _steps(*images, tmp_path, r=4)
    merging = next(i for i in live.installed if hasattr(i, "flow"))
    live.model.train()
    seen = []
    for at in (torch.tensor([0, 2, 4]), torch.tensor([5, 1, 3])):
        for samples in (None, Samples(tmp_path, {"images": "of the test"}, 6, 1, at)):
            live.set_samples(samples)
            live.model(images[0][at])
            seen.append((merging.flow.size[2].clone(), merging.flow.positions[2].clone()))
    for computed, read in (seen[:2], seen[2:]):
        torch.testing.assert_close(computed, read)
    assert not torch.equal(seen[0][1], seen[2][1])


def test_tokens_given_back_behind_the_last_block_are_refused_with_the_way_out(
    images: tuple[Tensor, Tensor],
) -> None:
    model = HOSTS["timm-vit"].build()
    live = wrap(model, [gv.Partial(blocks=1, cache=True), gv.TokenMerge(r=2, restore="always")])
    with pytest.raises(BadInput, match="restore: never"):
        model(images[0])
    live.undo()
