"""Dense averaging against the paper's algorithm, step by step, and what is served of it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from own_parts import Own, of_batches, resumed_and_not
from torch import Tensor, nn

import greenvis as gv
from greenvis.errors import BadInput, GreenvisError
from greenvis.experiment import loop
from greenvis.experiment.parts import Part
from greenvis.experiment.recipe import TrainSpec
from greenvis.techniques.data.generalise._average import Mean
from greenvis.techniques.data.generalise.swad import Swad, Valley

X = torch.randn(24, 2, 5, 5, generator=torch.Generator().manual_seed(1))
Y = torch.arange(24) % 3


class _Images:
    """A stream as a recipe has it."""

    def at(self, number: int, times: int) -> Tensor:
        return X

    def sweep(self) -> Any:
        yield from (3.0 * X + 1.0).split(10)


def _net() -> Any:
    torch.manual_seed(5)
    return nn.Sequential(
        nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(54, 3)
    )


def _interval(losses: list[float], converge: int, overfit: int, ratio: float) -> tuple[int, int]:
    """The paper's algorithm 1 over all losses at once: the first look and the one after the last;
    at the end of training, the last below the threshold."""
    start, threshold = None, 0.0
    for t in range(len(losses)):
        if start is None:
            window = losses[t - converge + 1 : t + 1]
            if t + 1 >= converge and min(window) == window[0]:
                start, threshold = t - converge + 1, ratio * sum(window) / converge
        if start is not None:
            for s in range(start + overfit - 1, t + 1):
                if min(losses[s - overfit + 1 : s + 1]) > threshold:
                    return start, s - overfit + 1
    if start is None:
        return 0, 0
    return start, 1 + max(i for i in range(start, len(losses)) if losses[i] <= threshold)


@pytest.mark.parametrize("seed", range(40))
def test_a_valley_is_the_papers_interval_and_its_mean_that_of_all_its_steps(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    draw = torch.rand(25, generator=generator)
    losses = (draw + (torch.arange(25) - 9).abs() / 9).tolist()
    converge, overfit, ratio = 1 + seed % 4, 1 + seed % 5, 1.0 + 0.1 * (seed % 4)
    weights = torch.randn(25, 3, 4, generator=generator)  # of three steps each
    valley = Valley(converge, overfit, ratio)
    for loss, steps in zip(losses, weights, strict=True):
        segment = Mean()
        for w in steps:
            segment.add({"w": w})
        valley.look(loss, segment)
        again = Valley(converge, overfit, ratio)  # as a resumed training has it
        again.load_state_dict(copy.deepcopy(valley.state_dict()))
        valley = again
    first, last = _interval(losses, converge, overfit, ratio)
    assert valley.average.count == 3 * (last - first)
    if last > first:
        mean = weights[first:last].flatten(0, 1).mean(0)
        assert torch.allclose(valley.average.values["w"], mean, atol=1e-5)


def test_a_loss_that_never_has_a_minimum_is_no_valley() -> None:
    valley = Valley(3, 6, 1.3)
    for t in range(20):
        valley.look(20.0 - t, Mean({"w": torch.zeros(1)}, 1))
    assert not valley.converged
    assert valley.average.count == 0


def _train(live: gv.Wrapped, losses: list[float]) -> list[dict[str, Tensor]]:
    """Take steps by hand, and return the state after each."""
    remaining = iter(losses)
    live.assess_with(lambda: next(remaining))
    live.feed(train=_Images())
    optimizer = torch.optim.SGD(live.param_groups(0.1), lr=0.1)
    states = []
    for step in range(len(losses)):
        live.model.train()
        x, y = live.batch(X[step::3], Y[step::3])
        outputs = live.model(x)
        (F.cross_entropy(outputs, y) + live.loss(x, y, outputs)).backward()
        optimizer.step()
        live.step_end()
        optimizer.zero_grad()
        states.append(copy.deepcopy(live.model.state_dict()))
    return states


def test_the_model_answers_with_the_mean_and_the_statistics_that_go_with_it(tmp_path: Path) -> None:
    request = Swad(every=1, converge=2, overfit=2, ratio=1.0)
    live = gv.wrap(_net(), request)
    states = _train(live, [3.0, 1.0, 2.0, 1.4, 9.0, 9.0, 0.0])  # looks 1 to 3
    expected = {
        n: torch.stack([s[n] for s in states[1:4]]).mean(0)
        for n, _ in live.model.named_parameters()
    }
    with live.served() as model:
        for name, value in expected.items():
            assert torch.allclose(model.get_parameter(name), value, atol=1e-6), name
        inside = model[0](3.0 * X + 1.0).double().transpose(0, 1).flatten(1)  # type: ignore[index]
        assert torch.allclose(model[1].running_mean.double(), inside.mean(1), atol=1e-5)  # type: ignore[index]
        assert torch.allclose(model[1].running_var.double(), inside.var(1), atol=1e-4)  # type: ignore[index]
        answers = model.eval()(X)
    for name, value in live.model.state_dict().items():
        assert torch.equal(value, states[-1][name])  # training goes on with its own
    assert live.facts() == {"swad_steps": 3, "swad_overfit": True}
    live.save(tmp_path)
    again = gv.wrap(_net(), request)
    again.feed(train=_Images())
    again.load(tmp_path)
    assert torch.allclose(again.merge().eval()(X), answers, atol=1e-5)
    assert torch.allclose(live.merge().eval()(X), answers, atol=1e-5)


def test_before_convergence_the_model_answers_as_it_is() -> None:
    live = gv.wrap(_net(), Swad(every=1))
    states = _train(live, [3.0, 2.0, 1.0])
    with live.served() as model:
        for name, value in model.state_dict().items():
            assert torch.equal(value, states[-1][name])


def test_a_recipes_loop_looks_at_images_held_out_and_a_resumed_one_alike(tmp_path: Path) -> None:
    spec = TrainSpec(
        epochs=2, checkpoint_every_s=1e-9, batch_size=24, lr=0.5, optimizer="sgd", weight_decay=0
    )
    request = Swad(every=1, converge=1, overfit=2, ratio=1.5)

    def fit(batches: Any, checkpoint: Path | None = None) -> Any:
        def held_out() -> Any:
            return [(X[:10], Y[:10]), (X[10:15], Y[10:15])]

        from greenvis.data.image_set import ImageSet
        from greenvis.data.splits import Split
        from greenvis.data.transforms import Transform

        part = of_batches(batches, 3, lambda: [(X, Y)], spec, [request], held_out=held_out)
        pixels = ((X + 4) * 30).clamp(0, 255).to(torch.uint8)
        form = Transform(5, 2, mean=(0.4, 0.4), std=(0.1, 0.1))
        images = ImageSet(Split(pixels, Y), torch.arange(24), form)
        vars(part)["feeds"] = {"train": images}
        with gv.track("swad", dir=tmp_path) as run:
            return loop.run(Own(_net, [part], 3, checkpoint), run)

    def epoch(number: int, start: int) -> list[Any]:
        return [(X + number, Y)] * (3 - start)

    resumed, uninterrupted = resumed_and_not(fit, epoch, tmp_path / "c.pt")
    assert uninterrupted.live.facts()["swad_steps"] > 1
    assert resumed.live.facts() == uninterrupted.live.facts()
    one, other = resumed.live.merge().state_dict(), uninterrupted.live.merge().state_dict()
    for name, value in other.items():
        assert torch.equal(value, one[name]), name


def test_what_cannot_be_right_is_refused(tmp_path: Path) -> None:
    for fields in ({"ratio": 0.5}, {"converge": 0}, {"every": 0}):
        with pytest.raises(BadInput):
            Swad(**fields)
    live = gv.wrap(_net(), Swad(every=1))
    with pytest.raises(GreenvisError, match=r"call live\.assess_with\(loss\)"):
        live.step_end()
    part: Part = of_batches(lambda e, s: [(X, Y)], 1, lambda: [(X, Y)], TrainSpec(), [Swad()])
    vars(part)["feeds"] = {"train": None}
    with (
        pytest.raises(BadInput, match=r"'swad' .* set data\.held_out"),
        gv.track("swad", dir=tmp_path) as run,
    ):
        loop.run(Own(lambda: nn.Sequential(nn.Flatten(), nn.Linear(50, 3)), [part]), run)
