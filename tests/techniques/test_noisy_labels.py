"""Learning from wrong labels: formulas in other code, who chooses for whom, and resumes."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from own_parts import Own, of_batches
from torch import Tensor, nn

import greenvis as gv
from greenvis import data
from greenvis.core.installed import Samples
from greenvis.data.assignment import assign
from greenvis.errors import BadInput, GreenvisError
from greenvis.experiment import loop
from greenvis.experiment.parts import Part
from greenvis.experiment.recipe import TrainSpec
from greenvis.techniques.annotation.noisy_labels import _losses, co_teaching, dividemix
from greenvis.techniques.annotation.noisy_labels._mixture import clean_probability
from greenvis.techniques.annotation.noisy_labels.co_teaching import CoTeaching
from greenvis.techniques.annotation.noisy_labels.dividemix import Dividemix
from greenvis.techniques.annotation.noisy_labels.noisy_labels import NoisyLabels
from greenvis.techniques.annotation.noisy_labels.partial_labels import PartialLabels

IMAGES = data.load(data.DataSpec(name="digits", train=60, test=30))
Y = torch.tensor([0, 2, -1, 1, 2])


def _logits(seed: int = 0) -> Tensor:
    return 2 * torch.randn(5, 3, generator=torch.Generator().manual_seed(seed))


def _net() -> nn.Module:
    torch.manual_seed(5)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10)
    )


def _loss(technique: gv.Technique) -> Any:
    return gv.wrap(nn.Linear(2, 3), technique).criterion(F.cross_entropy)


def _p(logits: Tensor) -> np.ndarray:
    e = np.exp(logits.double().numpy())
    return e / e.sum(1, keepdims=True)


def test_gce_and_sce_are_means_over_known_labels() -> None:
    p, known = _p(_logits()), [0, 1, 3, 4]
    own = p[known, Y[known]]
    gce = ((1 - own**0.7) / 0.7).mean()
    assert _loss(NoisyLabels())(_logits(), Y).item() == pytest.approx(gce, abs=1e-5)
    one_hot = np.where(F.one_hot(Y[known], 3) == 1, 0.0, -4.0)  # A for log 0
    sce = (0.3 * -np.log(own) + 2.0 * -(p[known] * one_hot).sum(1)).mean()
    loss = _loss(NoisyLabels(loss="sce", alpha=0.3, beta=2.0))
    assert loss(_logits(), Y).item() == pytest.approx(sce, abs=1e-5)
    assert _losses.generalised(_logits(), Y.clamp(min=0), 1e-5) == pytest.approx(
        F.cross_entropy(_logits(), Y.clamp(min=0), reduction="none"), abs=1e-3
    )
    none = loss(_logits().requires_grad_(), torch.full((5,), -1))
    none.backward()
    assert none.item() == 0.0
    with pytest.raises(BadInput, match="one class each"):
        loss(_logits(), F.one_hot(Y.clamp(min=0)).float())
    with pytest.raises(BadInput, match="'q' changes nothing"):
        NoisyLabels(loss="elr", q=0.5)


def _shown(live: Any, positions: list[int], length: int = 8) -> None:
    live.set_samples(Samples(Path(), {}, length, None, torch.tensor(positions)))


def test_elr_holds_answers_to_the_mean_of_earlier_ones() -> None:
    live = gv.wrap(nn.Linear(2, 3), NoisyLabels(loss="elr", weight=2.0, momentum=0.6))
    loss, y = live.criterion(F.cross_entropy), Y.clamp(min=0)
    targets = np.zeros((8, 3))
    for step in range(3):
        _shown(live, positions := [7, 1, 4, 0, 2 + step])
        p = _p(_logits(step))
        clamped = p.clip(1e-4, 1 - 1e-4)
        new = 0.6 * targets[positions] + 0.4 * clamped / clamped.sum(1, keepdims=True)
        targets[positions] = new
        ce = -np.log(p[np.arange(5), y])
        expected = (ce + 2.0 * np.log(1 - (new * clamped).sum(1))).mean()
        assert loss(_logits(step), y).item() == pytest.approx(expected, abs=1e-5)
    live.set_samples(None)
    with pytest.raises(GreenvisError, match=r"live\.set_samples"):
        loss(_logits(), y)


def test_candidates_are_weighed_by_the_answers_of_the_visit_before() -> None:
    candidates = torch.tensor([[1, 1, 0], [1, 0, 1], [1, 1, 1], [0, 1, 0], [0, 1, 1]])
    y, logits = candidates / candidates.sum(1, keepdim=True), [_logits(s) for s in range(3)]
    live = gv.wrap(nn.Linear(2, 3), PartialLabels())
    loss = live.criterion(F.cross_entropy)
    weights = y.double().numpy()
    for z in logits:
        _shown(live, [3, 1, 0, 6, 2])
        expected = -(weights * np.log(_p(z))).sum(1).mean()
        assert loss(z, y).item() == pytest.approx(expected, abs=1e-5)
        weights = _p(z) * candidates.numpy()
        weights /= weights.sum(1, keepdims=True)
    live.set_samples(None)
    now = -(weights * np.log(_p(logits[-1]))).sum(1).mean()  # of the step's own answers
    assert loss(logits[-1], y).item() == pytest.approx(now, abs=1e-5)
    hard = loss(_logits(), Y.clamp(min=0))
    assert torch.equal(hard, F.cross_entropy(_logits(), Y.clamp(min=0)))


def test_each_network_learns_from_the_others_choice_averaged_once() -> None:
    first, second = torch.tensor([4.0, 1.0, 3.0, 2.0]), torch.tensor([1.0, 5.0, 2.0, 9.0])
    own, other = co_teaching.exchanged(first, second, 0.5)
    assert own.item() == pytest.approx((4.0 + 3.0) / 2)  # of images 0 and 2, easy to the second
    assert other.item() == pytest.approx((5.0 + 9.0) / 2)  # of images 1 and 3
    assert [co_teaching.remembered(t, 0.4, 0.5) for t in (0, 0.25, 0.5, 1)] == [1, 0.8, 0.6, 0.6]
    assert len(co_teaching.smallest(first, 0.75)) == 3
    assert len(co_teaching.smallest(first, 0.01)) == 1


def test_co_teaching_trains_both_networks_and_serves_the_first() -> None:
    live = gv.wrap(_net(), CoTeaching(rate=0.5, ramp=0.0))
    peer: Any = live.installed[0].peer  # type: ignore[attr-defined]
    assert not torch.equal(peer[0].weight, live.model[0].weight)
    x, y = IMAGES.train.batch(range(10))
    y[3] = -1
    outputs = live.model(x)
    with torch.no_grad():
        known = [i for i in range(10) if i != 3]
        losses = [F.cross_entropy(z[known], y[known], reduction="none") for z in (outputs, peer(x))]
    chosen = [sorted(range(9), key=lambda i, own=own: own[i])[:4] for own in losses]
    expected = losses[0][chosen[1]].mean() + losses[1][chosen[0]].mean()
    loss = live.criterion(F.cross_entropy)(outputs, y) + live.loss(x, y, outputs)
    assert loss.item() == pytest.approx(expected.item(), abs=1e-5)
    optimizer = torch.optim.SGD(live.param_groups(0.1))
    before = peer[0].weight.detach().clone()
    loss.backward()
    optimizer.step()
    assert not torch.equal(peer[0].weight, before)
    keys = [*_net().state_dict()]
    assert [*live.merge().state_dict()] == keys
    hooked = _net()
    hooked[0].register_forward_hook(lambda module, args, out: out)
    with pytest.raises(BadInput, match="leave out what changes the model"):
        gv.wrap(hooked, CoTeaching())


def test_the_mixture_is_the_one_scikit_learn_fits() -> None:
    from sklearn.mixture import GaussianMixture

    generator = np.random.default_rng(0)
    losses = np.concatenate([generator.gamma(2, 0.2, 300), generator.normal(3, 0.8, 150)])
    x = ((losses - losses.min()) / (losses.max() - losses.min()))[:, None]
    fitted = GaussianMixture(
        2, max_iter=10, tol=1e-2, reg_covar=5e-4, weights_init=[0.5, 0.5],
        means_init=[[0.0], [1.0]], precisions_init=[[[100.0]], [[100.0]]],
    ).fit(x)  # fmt: skip
    expected = fitted.predict_proba(x)[:, fitted.means_.argmin()]
    own = clean_probability(torch.from_numpy(losses)).numpy()
    assert np.abs(own - expected).max() < 1e-5
    assert ((own > 0.5)[:300].mean(), (own > 0.5)[300:].mean()) > (0.95, 0.0)
    assert clean_probability(torch.full((4,), 2.0)).tolist() == [1.0] * 4


def test_dividemix_refines_guesses_and_penalises_one_class() -> None:
    y, clean = torch.tensor([0, 2]), torch.tensor([0.8, 0.3])
    own, both = torch.tensor([[0.2, 0.5, 0.3]] * 2), torch.tensor([[0.1, 0.6, 0.3]] * 2)
    targets = dividemix.refined(y, clean, own, both, 0.5).numpy()
    moved = np.array([0.8 + 0.2 * 0.2, 0.2 * 0.5, 0.2 * 0.3]) ** 2
    guess = np.array([0.1, 0.6, 0.3]) ** 2
    assert targets == pytest.approx(np.stack([moved / moved.sum(), guess / guess.sum()]), abs=1e-6)
    logits, labelled = _logits(), torch.tensor([True, False, True, False, False])
    wanted = torch.softmax(_logits(1), 1)
    p, t = _p(logits), wanted.double().numpy()
    parts = dividemix.divided_loss(logits, wanted, labelled, 25.0)
    assert parts[0].item() == pytest.approx(-(t * np.log(p)).sum(1)[[0, 2]].mean(), abs=1e-5)
    pulled = ((p - t) ** 2)[[1, 3, 4]].mean()
    assert parts[1].item() / 25 == pytest.approx(pulled, abs=1e-5)
    penalty = sum(math.log(1 / 3 / m) / 3 for m in p.mean(0))
    assert parts[2].item() == pytest.approx(penalty, abs=1e-5)
    for none in (labelled & False, labelled | True):
        assert all(part.isfinite() for part in dividemix.divided_loss(logits, wanted, none, 1.0))


def _part(technique: gv.Technique, stop_at: int | None = None, noisy: bool = True) -> Part:
    spec = TrainSpec(epochs=4, batch_size=20, lr=0.01, checkpoint_every_s=1e-9, eval_every=0)
    labels = IMAGES.train.targets
    images = IMAGES.train.relabeled(
        torch.where(torch.arange(60) % 4 == 0, (labels + 1) % 10, labels)
    )

    def batches(epoch: int, start: int, visits: Tensor | None = None) -> Any:
        loader = data.batches(
            images, 20, epoch=epoch, start=start, shuffle=True, positions=True, visits=visits
        )
        for number, batch in enumerate(loader, start):
            if stop_at == 3 * epoch + number:
                raise KeyboardInterrupt
            yield batch

    part = of_batches(batches, 3, lambda: data.batches(IMAGES.test, 30), spec, [technique])
    samples = lambda epoch, at: Samples(Path(), {}, 60, None, at)  # noqa: E731
    return Part(**{**vars(part), "images": images, "samples": samples})


@pytest.mark.one_in(4)
@pytest.mark.parametrize("technique", [
    NoisyLabels(loss="elr"), CoTeaching(), Dividemix(warmup=2, ramp=2),
])  # fmt: skip
@pytest.mark.parametrize("stop_at", [4, 7])
def test_a_training_on_wrong_labels_resumes_to_the_bit(
    tmp_path: Path, technique: gv.Technique, stop_at: int
) -> None:
    def fit(part: Part, checkpoint: Path | None = None) -> tuple[dict[str, Tensor], Any]:
        with gv.track("noisy", dir=tmp_path) as run:
            outcome = loop.run(Own(_net, [part], 3, checkpoint), run)
        state = {**outcome.live.model.state_dict(), **outcome.live.state_dict()}
        return {k: v.clone() for k, v in state.items()}, outcome.metrics

    file = tmp_path / "c.pt"
    with pytest.raises(KeyboardInterrupt):
        fit(_part(technique, stop_at), file)
    resumed, uninterrupted = fit(_part(technique), file), fit(_part(technique))
    assert resumed[1] == uninterrupted[1]
    for name, value in uninterrupted[0].items():
        assert torch.equal(resumed[0][name].nan_to_num(-1), value.nan_to_num(-1)), name


def test_dividemix_shows_each_image_once_and_knows_other_batches(tmp_path: Path) -> None:
    live = gv.wrap(_net(), Dividemix(warmup=1))
    images = IMAGES.train
    order = live.visit(0, images)
    assert sorted(order.tolist()) == list(range(60))
    x, y = images.batch(order[:20])
    assert live.batch(x, y)[0] is x
    live.terms(x, y, live.model(x))
    with pytest.raises(GreenvisError, match=r"sampler=positions"):
        live.batch(x, (y + 1) % 10)
    with pytest.raises(BadInput, match="all have a label"):
        live.batch(x, y.index_fill(0, torch.tensor([0]), -1))
    order = live.visit(1, images)
    x, y = images.batch(order[:20])
    mixed, labels = live.batch(x, y)
    assert len(mixed) == len(labels) == 40
    assert live.terms(mixed, labels, live.model(mixed))["dividemix"].isfinite()
    live.model.eval()
    peer: Any = live.installed[0].peer  # type: ignore[attr-defined]
    with live.served() as model, torch.no_grad():
        with pytest.raises((NotImplementedError, RuntimeError)):
            model(x.to("meta"))  # as FLOPs are counted: neither network may move there
        both = model(x)
    with torch.no_grad():
        assert torch.allclose(both, (live.model(x) + peer(x)) / 2, atol=1e-6)
    with pytest.raises(GreenvisError, match="together: false"):
        live.merge()


def test_a_recipe_learns_from_candidates(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(
        "name: r\ndata: {name: digits, train: 60, test: 20, noise: {rate: 0.3, kind: candidates}}\n"
        "model: {ref: plain/mlp, img_size: 8}\ntrain: {epochs: 2, batch_size: 20}\n"
        "arms:\n  even: {}\n  proden: {techniques: [partial_labels]}\n"
    )
    results = gv.run(tmp_path / "r.yaml", runs=tmp_path / "runs")
    assert results is not None
    spec = data.DataSpec(name="digits", train=60, noise={"rate": 0.3, "kind": "candidates"})
    pool = data.load(data.DataSpec(name="digits", train=60, test=20))
    drawn = assign(pool, spec, seed=0)
    y, truth = drawn.train.targets, drawn.truth
    assert truth is not None
    assert (y[torch.arange(60), truth] > 0).all()
    assert torch.allclose(y.sum(1), torch.ones(60))
    assert 0.2 < ((y > 0).sum() - 60) / 540 < 0.4
