"""Mixed batches against the formulas, and what they leave alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import greenvis as gv
from greenvis.errors import BadInput
from greenvis.experiment.mixing import Mixing, blend, paste
from greenvis.experiment.recipe import TrainSpec
from greenvis.meters import record

X = torch.rand(7, 3, 6, 8, generator=torch.Generator().manual_seed(0))
Y = torch.tensor([0, 1, 2, 0, 2, 1, 1])
LOGITS = torch.randn(7, 3, generator=torch.Generator().manual_seed(1))


def test_mixup_is_equation_1_of_images_and_of_labels() -> None:
    torch.manual_seed(3)
    mixing = Mixing(0.8, None)
    x = mixing.batch(X, Y)
    share = mixing._share
    assert torch.allclose(x, blend(X, X.roll(1, 0), share))
    soft = share * F.one_hot(Y, 3) + (1 - share) * F.one_hot(Y.roll(1), 3)
    assert torch.allclose(mixing.loss(F.cross_entropy)(LOGITS, Y), F.cross_entropy(LOGITS, soft))


def test_cutmix_counts_the_area_really_pasted() -> None:
    for at in ((0.5, 0.5), (0.02, 0.9), (1.0, 0.0)):
        x, share = paste(torch.zeros(2, 1, 12, 16), torch.ones(2, 1, 12, 16), 0.4, at)
        assert share == pytest.approx(1 - float(x.mean()), abs=1e-6)
    assert share > 0.7  # most of that rectangle lay outside


def test_unknown_labels_are_neither_mixed_nor_mixed_in() -> None:
    y = torch.tensor([0, -1, 2, -1, 1, 0, -1])
    mixing = Mixing(1.0, None)
    x = mixing.batch(X, y)
    unknown = y < 0
    assert torch.equal(x[unknown], X[unknown])
    known = X[~unknown]
    assert torch.allclose(x[~unknown], blend(known, known.roll(1, 0), mixing._share))
    loss = mixing.loss(lambda o, t: F.cross_entropy(o, t, ignore_index=-1))
    own = Mixing(1.0, None)
    own._other, own._share = y[~unknown].roll(1), mixing._share
    assert torch.allclose(loss(LOGITS, y), own.loss(F.cross_entropy)(LOGITS[~unknown], y[~unknown]))


def test_rows_put_behind_the_batch_have_one_label() -> None:
    mixing = Mixing(None, 1.0)
    mixing.batch(X[:5], Y[:5])
    loss = mixing.loss(lambda o, t: t.float())  # which labels it is asked for
    assert torch.equal(loss(LOGITS, Y)[5:], Y[5:].float())


def test_nothing_asked_for_changes_nothing() -> None:
    before = torch.get_rng_state()
    mixing = Mixing(None, None)
    assert mixing.batch(X, Y) is X
    assert mixing.loss(F.cross_entropy) is F.cross_entropy
    assert torch.equal(before, torch.get_rng_state())
    assert "mixup" not in TrainSpec().inputs()
    assert TrainSpec(cutmix=1.0).inputs()["cutmix"] == 1.0


def test_labels_that_are_no_classes_are_refused() -> None:
    with pytest.raises(BadInput, match="one class each"):
        Mixing(1.0, None).batch(X, torch.rand(7, 3))


def test_a_recipe_trains_on_mixed_images_and_refuses_streams(tmp_path: Path) -> None:
    text = (
        "name: mixed\ndata: {name: digits, train: 200, test: 60}\n"
        "model: {ref: plain/mlp, hidden: [32], img_size: 8}\n"
        "train: {epochs: 12, batch_size: 20, lr: 0.01, mixup: 0.2, cutmix: 1.0, eval_every: 0}\n"
        "arms: {plain: {}}\n"
    )
    recipe = tmp_path / "mixed.yaml"
    recipe.write_text(text)
    folder = gv.run(recipe, runs=tmp_path / "runs")
    (run,) = (record.read(file) for file in record.find([folder]))
    assert run.facts["accuracy"] > 0.7
    recipe.write_text(text.replace("test: 60}", "test: 60, stream: {tasks: 2}}"))
    with pytest.raises(BadInput, match="buffers of a stream would keep mixed images"):
        gv.run(recipe, runs=tmp_path / "other")
