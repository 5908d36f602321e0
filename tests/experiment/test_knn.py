"""Nearest neighbours vote as Wu et al. write, on what the classifier is handed; they stand for a
pretext's accuracy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hosts import HOSTS
from torch import nn

from greenvis.errors import BadInput
from greenvis.experiment import session
from greenvis.experiment.knn import features, head_of, knn_accuracy, score
from greenvis.meters import record

RECIPE = """
name: pretext
data: {{name: digits, img_size: 16, train: 120, test: 60}}
model: {{ref: timm/vit_tiny_patch16_224, img_size: 16, patch_size: 4, embed_dim: 24, depth: 2, num_heads: 2}}
train: {{epochs: 2, batch_size: 40, threads: 1, eval_every: 0}}
arms:
  scratch: {{}}
  reused:
    stages:
      - {{name: pretrain, train: {{epochs: 2}}, techniques: [{{reuse: {{base: "run:scratch", rows: 5, decoder_depth: 1}}}}]}}
      - {{name: tune, train: {{epochs: 1}}}}
meter: {{codecarbon: false}}
"""


def test_votes_weigh_by_likeness() -> None:
    train = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.8, 0.6], [0.0, 1.0]])
    labels = torch.tensor([0, 1, 1, 2])
    test = torch.tensor([[2.0, 0.0]])
    like = torch.tensor([1.0, 0.8])
    votes = (like / 0.07).exp() * torch.tensor([1, 2])
    assert votes[0] > votes[1]
    assert knn_accuracy(train, labels, test, torch.tensor([0]), k=3) == 1.0
    assert (
        knn_accuracy(train, labels, test, torch.tensor([1]), k=3, temperature=10.0) == 1.0
    )  # two against one
    assert knn_accuracy(train, labels, test, torch.tensor([0]), k=100) == 1.0


def test_equals_a_search_by_hand() -> None:
    generator = torch.Generator().manual_seed(0)
    train, test = torch.randn(50, 4, generator=generator), torch.randn(30, 4, generator=generator)
    labels, target = (
        torch.randint(0, 3, (50,), generator=generator),
        torch.randint(0, 3, (30,), generator=generator),
    )
    right = 0
    for x, wanted in zip(test, target, strict=True):
        likeness = torch.tensor([torch.cosine_similarity(x, t, dim=0) for t in train])
        votes = [0.0] * 3
        for i in likeness.argsort(descending=True)[:7]:
            votes[labels[i]] += float((likeness[i] / 0.5).exp())
        right += votes.index(max(votes)) == int(wanted)
    assert knn_accuracy(train, labels, test, target, k=7, temperature=0.5) == pytest.approx(
        right / 30
    )


@pytest.mark.parametrize("name", ["timm-deit-distilled", "timm-resnet", "transformers-vit"])
def test_features_are_what_the_classifier_sees(name: str) -> None:
    model: Any = HOSTS[name].build()
    x, y = HOSTS[name].batch()
    found, labels = features(model, [(x, y), (x[:2], y[:2])])
    assert torch.equal(labels, torch.cat([y, y[:2]]))
    assert model.training
    head: Any = model.get_submodule(head_of(model))
    assert found.shape == (6, head.in_features)
    assert not head._forward_pre_hooks
    assert score(model, [(x, y)], [(x, y)]) == 1.0  # each image is its own neighbour


def test_refuses_a_model_without_a_classifier() -> None:
    with pytest.raises(BadInput, match="shows no classifier"):
        head_of(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 8, 3), nn.LayerNorm(28)))


def test_a_base_that_does_not_fit_is_refused_before_anything_trains(tmp_path: Path) -> None:
    path = tmp_path / "pretext.yaml"
    path.write_text(RECIPE.format().replace("rows: 5", "rows: 17"))
    with pytest.raises(
        BadInput, match=r"pretext\.yaml:.*: rows is 17, but VisionTransformer has 16 patches"
    ):
        session.run(path, runs=tmp_path / "runs")
    path.write_text(
        RECIPE.format().replace("scratch: {}", "scratch: {model: {ref: timm/resnet18}}")
    )
    with pytest.raises(
        BadInput, match="the base ResNet has no attention to learn from; set targets"
    ):
        session.run(path, runs=tmp_path / "runs")
    assert not list(tmp_path.glob("runs/**/*.jsonl"))


def test_stands_for_accuracy_where_a_stage_is_a_pretext(tmp_path: Path) -> None:
    path = tmp_path / "pretext.yaml"
    path.write_text(RECIPE.format())
    folder = session.run(path, runs=tmp_path / "runs")
    (run,) = [r for r in map(record.read, record.find([folder])) if r.header["arm"] == "reused"]
    pretrain, tune = run.facts["stages"]
    assert (pretrain["stage"], tune["stage"]) == ("pretrain", "tune")
    assert 0.2 < pretrain["accuracy"] <= 1
    assert any(
        "a pretext trains no classifier; the accuracy is that of 20 nearest neighbours" in note
        for note in run.notes
    )
    (kept,) = run.facts["reuse_targets"]
    assert (kept["misses"], kept["hits"]) == (120, 120)
    assert (
        run.sum("wall_s", "base_reuse")
        or run.sum("wall_s", "train/pretrain/epoch1/base_reuse")
        or 0
    ) > 0
    assert [u["role"] for u in run.uses] == ["base"]
