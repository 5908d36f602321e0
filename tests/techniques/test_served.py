"""Models that answer otherwise than they train: averaged weights, the target's statistics,
adaptation as they go."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from own_parts import Own, of_batches
from torch import Tensor, nn

import greenvis as gv
from greenvis import data
from greenvis.errors import BadInput, GreenvisError
from greenvis.experiment import loop
from greenvis.experiment.recipe import TrainSpec
from greenvis.techniques._shared.norms import Moments
from greenvis.techniques.data.adapt.adabn import Adabn
from greenvis.techniques.data.generalise.ema import Ema, decay_at

X = torch.randn(24, 2, 5, 5, generator=torch.Generator().manual_seed(1))
Y = torch.arange(24) % 3


def _net() -> Any:
    torch.manual_seed(5)
    return nn.Sequential(
        nn.BatchNorm2d(2), nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(),
        nn.Linear(54, 3),
    )  # fmt: skip


def _train(live: gv.Wrapped, steps: int = 3) -> list[dict[str, Tensor]]:
    """Take steps by hand, and return the state after each."""
    optimizer = torch.optim.SGD(live.param_groups(0.1), lr=0.1)
    states = []
    for step in range(steps):
        live.model.train()
        x, y = live.batch(X[step::3], Y[step::3])
        outputs = live.model(x)
        (F.cross_entropy(outputs, y) + live.loss(x, y, outputs)).backward()
        optimizer.step()
        live.step_end()
        optimizer.zero_grad()
        states.append(copy.deepcopy(live.model.state_dict()))
    return states


def _same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return all(torch.equal(v, b[n]) for n, v in a.items())


# -- averaged weights -----------------------------------------------------------------------------


@pytest.mark.parametrize("warmup", [True, False])
def test_the_average_is_the_recursion_of_all_steps(warmup: bool) -> None:
    live = gv.wrap(_net(), Ema(decay=0.6, warmup=warmup))
    states = _train(live, 4)
    expected = {n: v.clone() for n, v in states[0].items()}
    for step, state in enumerate(states[1:], 1):
        keep = min(0.6, (1 + step) / (10 + step)) if warmup else 0.6
        assert decay_at(step, 0.6, warmup) == keep
        for name, value in state.items():
            mean = keep * expected[name] + (1 - keep) * value
            expected[name] = mean if value.is_floating_point() else value
    with live.served() as model:
        for name, value in model.state_dict().items():
            assert torch.allclose(value, expected[name], atol=1e-6), name
    assert _same(live.model.state_dict(), states[-1])  # training goes on with its own
    merged = live.merge()
    for name, value in merged.state_dict().items():
        assert torch.allclose(value, expected[name], atol=1e-6), name


def test_an_average_comes_back_from_a_delta_and_goes_through_an_adapter(tmp_path: Path) -> None:
    from greenvis.testing import default_hosts

    host = default_hosts()[0]
    x, y = host.batch()
    requests = [Ema(decay=0.5), gv.Lora(rank=2)]
    live = gv.wrap(host.build(), requests)
    optimizer = torch.optim.SGD(live.param_groups(0.5), lr=0.5)
    for _ in range(3):
        F.cross_entropy(live.model(x), y).backward()
        optimizer.step()
        live.step_end()
        optimizer.zero_grad()
    with live.served() as model, torch.no_grad():
        served = model.eval()(x)
    live.save(tmp_path)
    again = gv.wrap(host.build(), requests)
    again.load(tmp_path)
    with torch.no_grad():
        assert not torch.allclose(again.model.eval()(x), served, atol=1e-4)
        assert torch.allclose(again.merge()(x), served, atol=1e-5)


def test_a_recipes_loop_evaluates_and_leaves_the_average(tmp_path: Path) -> None:
    spec = TrainSpec(epochs=2, lr=0.3, optimizer="sgd", schedule="constant", batch_size=24)
    part = of_batches(lambda e, s: [(X, Y)] * (4 - s), 4, lambda: [(X, Y)], spec, [Ema(decay=0.9)])
    with gv.track("ema", dir=tmp_path) as run:
        outcome = loop.run(Own(_net, [part]), run)
    model = outcome.live.merge().eval()
    accuracy = (model(X).argmax(1) == Y).float().mean().item()
    assert outcome.metrics["accuracy"] == pytest.approx(accuracy)


def test_lightning_validates_the_average_and_goes_on_with_its_own_weights(tmp_path: Path) -> None:
    import lightning

    from greenvis.integrations.lightning import GreenCallback

    live, seen = gv.wrap(_net(), Ema(decay=0.9)), []

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = live.model

        def training_step(self, batch: Any, index: int) -> Tensor:
            x, y = live.batch(*batch)
            outputs = self.net(x)
            return F.cross_entropy(outputs, y) + live.loss(x, y, outputs)

        def validation_step(self, batch: Any, index: int) -> None:
            seen.append(live.model[5].weight.detach().clone())  # type: ignore[index,operator]

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(live.param_groups(0.5), lr=0.5)

    loader = torch.utils.data.DataLoader(list(zip(X, Y, strict=True)), batch_size=8)  # type: ignore[arg-type]
    trainer = lightning.Trainer(
        max_epochs=1, callbacks=[GreenCallback(live, "ema", dir=tmp_path)], logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        accelerator="cpu", num_sanity_val_steps=0,
    )  # fmt: skip
    trainer.fit(Module(), loader, loader)
    average = live.installed[0].state_dict()["average.5.weight"]
    assert all(torch.equal(weight, average) for weight in seen)
    assert not torch.equal(live.model.get_parameter("5.weight"), average)


# -- the target's statistics ----------------------------------------------------------------------


def test_moments_are_those_of_all_that_was_shown_at_once() -> None:
    moments = Moments()
    for part in X.split([10, 9, 5]):
        moments.add(part)
    mean, variance = moments.result()
    flat = X.double().transpose(0, 1).flatten(1)
    assert torch.allclose(mean, flat.mean(1))
    assert torch.allclose(variance, flat.var(1))


def test_norms_serve_with_the_targets_statistics_and_train_with_the_sources() -> None:
    target = 3.0 * X + 1.0
    live = gv.wrap(_net(), Adabn())
    live.feed(target=[target[:16], target[16:]])
    before = _train(live)[-1]
    with live.served() as model:
        flat = target.double().transpose(0, 1).flatten(1)
        assert torch.allclose(model[0].running_mean.double(), flat.mean(1), atol=1e-5)  # type: ignore[index]
        assert torch.allclose(model[0].running_var.double(), flat.var(1), atol=1e-4)  # type: ignore[index]
        with torch.inference_mode():
            served = model.eval()(target)
    assert _same(live.model.state_dict(), before)
    live.model.train()
    one_batch = gv.wrap(copy.deepcopy(_net()), [])
    one_batch.model.load_state_dict(before)
    with torch.no_grad():  # of one batch, they are those by which it is normalised in training
        merged = live.merge().eval()(target)
    assert torch.equal(merged, served)
    assert not torch.allclose(one_batch.model.eval()(target), served, atol=1e-2)


def test_no_more_target_images_are_looked_at_than_asked_and_none_twice() -> None:
    live = gv.wrap(_net(), Adabn(images=10))
    seen: list[int] = []
    live.model.register_forward_pre_hook(lambda m, args: seen.append(len(args[0])))
    live.feed(target=[(X[:6], Y[:6]), (X[6:12], Y[6:12]), (X[12:], Y[12:])])
    for _ in range(2):
        with live.served():
            pass
    assert seen == [6, 4]  # the second time nothing had changed
    _train(live, 1)
    with live.served():
        pass
    assert seen[-2:] == [6, 4]


@pytest.mark.parametrize("sizes", [(8, 8, 8), (1, 1, 5, 17)])
def test_norms_go_by_the_stream_so_far_beside_the_source(sizes: tuple[int, ...]) -> None:
    """Of the first norm, whose input is the images: moments by hand."""
    prior, stream = 4, 3.0 * X + 1.0
    live = gv.wrap(_net(), Adabn(statistics="stream", prior=prior))
    before = _train(live)[-1]
    mean, variance = before["0.running_mean"].double(), before["0.running_var"].double()
    weight, bias = before["0.weight"], before["0.bias"]
    seen: list[Tensor] = []
    shown = 0
    with torch.inference_mode(), live.served() as model:
        model.eval()
        hook = model[0].register_forward_hook(lambda m, i, out: seen.append(out.clone()))  # type: ignore[index,operator]
        for x in stream.split(sizes):
            model(x)
            shown += len(x)
            so_far = stream[:shown].double().transpose(0, 1).flatten(1)
            n = shown / (prior + shown)
            first = (1 - n) * mean + n * so_far.mean(1)
            second = (1 - n) * (variance + mean**2) + n * so_far.square().mean(1)
            deviation = (second - first**2 + 1e-5).sqrt()
            by_hand = (x - first[:, None, None]) / deviation[:, None, None]
            expected = by_hand * weight[:, None, None] + bias[:, None, None]
            assert torch.allclose(seen[-1].double(), expected, atol=1e-4)
        hook.remove()
    assert _same(live.model.state_dict(), before)
    with pytest.raises(GreenvisError, match="goes by what it answers"):
        live.merge()
    with pytest.raises(BadInput, match="'prior' changes nothing with statistics"):
        Adabn(prior=3)


def test_a_network_without_batch_norms_and_a_missing_target_are_refused() -> None:
    with pytest.raises(BadInput, match="this Sequential has none that tracks any"):
        gv.wrap(nn.Sequential(nn.Linear(2, 2)), Adabn())
    live = gv.wrap(_net(), Adabn())
    with pytest.raises(GreenvisError, match=r"call live\.feed\(target=loader\)"), live.served():
        pass
    with pytest.raises(BadInput, match="can be gone through again"):
        live.feed(target=iter([X]))
    with pytest.raises(BadInput, match="no technique of this model draws from 'unlabeled'"):
        live.feed(unlabeled=[X])


RECIPE = """
name: served
data: {name: digits, train: 60, test: 40}
model: {ref: timm/resnet10t, in_chans: 1, block_args: {}}
train: {epochs: 1, batch_size: 30}
arms:
  plain: {}
  tent: {techniques: [test_time]}
  ema: {techniques: [ema]}
"""


@pytest.mark.slow
def test_a_model_is_tested_and_measured_in_the_batches_it_is_served_in(tmp_path: Path) -> None:
    from greenvis.experiment.recipe import load_recipe
    from greenvis.meters.record import find, read

    file = tmp_path / "served.yaml"
    text = RECIPE.replace(", block_args: {}", "").split("  ema:")[0]
    tests = "test: 40, domains: {test: [noise, 'sorted:noise']}}"
    file.write_text(text.replace("test: 40}", tests) + "serve: {batch_size: 8}\n")
    folder = gv.run(file, runs=tmp_path / "runs")
    runs = {read(path).header["arm"]: read(path) for path in find([folder])}
    facts = runs["tent"].facts
    assert facts["inference"]["batch_size"] == 8
    assert [row["batches"] for row in facts["test_time"]] == [5, 5]  # both tests
    plain = runs["plain"].facts["tests"]
    assert plain["noise"]["accuracy"] == pytest.approx(plain["sorted:noise"]["accuracy"])
    arm = load_recipe(file, ["arms.plain.serve={batch_size: 2}"]).arm("plain")
    assert arm.test_batch == 2
    loaded = data.load(load_recipe(file).data).tests["sorted:noise"]
    assert loaded.targets.tolist() == sorted(loaded.targets.tolist())


def test_a_run_measures_what_is_served_and_export_refuses_what_adapts(tmp_path: Path) -> None:
    from greenvis.integrations.export import export
    from greenvis.meters.record import find, read

    file = tmp_path / "served.yaml"
    file.write_text(RECIPE.replace(", block_args: {}", ""))
    folder = gv.run(file, runs=tmp_path / "runs")
    runs = {read(path).header["arm"]: read(path) for path in find([folder])}
    assert runs["tent"].facts["adapts"] == ["test_time"]
    assert [row["batches"] for row in runs["tent"].facts["test_time"]] == [1]
    assert {run.status for run in runs.values()} == {"done"}
    with pytest.raises(BadInput, match="test_time learns while it answers, which no file holds"):
        export(folder / "tent" / "seed0", "safetensors", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert export(folder / "ema" / "seed0", "safetensors", tmp_path / "out")["max_difference"] == 0
    images = data.load(data.DataSpec(name="digits", train=60, test=40)).test
    x, y = images.batch(range(40))
    from greenvis import models

    model = models.build(f"file:{folder / 'ema' / 'seed0' / 'model.safetensors'}").eval()
    accuracy = (model(x).argmax(1) == y).float().mean().item()
    assert runs["ema"].facts["accuracy"] == pytest.approx(accuracy)
