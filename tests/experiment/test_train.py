"""The training loop: schedule, groups, early stop, bad losses, and resuming to the same weights."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from own_parts import Own, of_batches
from torch import Tensor, nn
from torch.utils.data import DataLoader

import greenvis as gv
from greenvis import data
from greenvis.core.technique import Installed, Samples, Stage, Technique
from greenvis.errors import BadInput, GreenvisError
from greenvis.experiment import checkpoint, loggers, loop, optim, step
from greenvis.experiment.evaluate import evaluate
from greenvis.experiment.recipe import TrainSpec
from greenvis.meters.record import find, read
from greenvis.tasks.classification import Classification

X = torch.randn(40, 6, generator=torch.Generator().manual_seed(1))
Y = (X.sum(1) > 0).long()
Batch = tuple[Tensor, Tensor]


def _net(dropout: float = 0.3) -> nn.Module:
    torch.manual_seed(5)
    return nn.Sequential(
        nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(dropout), nn.ReLU(), nn.Linear(8, 2)
    )


class Batches:
    """An epoch's batches in an order fixed by its number, from `start` on; `stop_at` breaks off
    like a crash."""

    def __init__(self, stop_at: tuple[int, int] | None = None) -> None:
        self.stop_at = stop_at

    def __call__(self, epoch: int, start: int) -> torch.utils.data.DataLoader:
        order = torch.randperm(40, generator=torch.Generator().manual_seed(epoch)).split(10)[start:]
        return torch.utils.data.DataLoader(list(self._items(epoch, start, order)), batch_size=None)

    def _items(self, epoch: int, start: int, order: Any) -> Iterator[Batch]:
        for i, rows in enumerate(order, start):
            yield X[rows], (Y[rows] if (epoch, i) != self.stop_at else torch.tensor([0.5]))


def _fit(
    folder: Path,
    spec: TrainSpec,
    batches: Callable[..., Any],
    checkpoint: Path | None = None,
    dropout: float = 0.3,
    techniques: Sequence[Technique] = (),
    log_with: Sequence[str] = (),
    length: int = 4,
    **more: Any,
) -> tuple[nn.Module, loop.Outcome]:
    part = of_batches(batches, length, lambda: [(X, Y)], spec, techniques, **more)
    own = Own(lambda: _net(dropout), [part], seed=3, checkpoint=checkpoint)
    with gv.track("fit", dir=folder) as run:
        outcome = loop.run(own, run, log_with=log_with)
    return outcome.live.model, outcome


@pytest.mark.one_in(4)
@pytest.mark.parametrize(
    "options", [{}, {"accumulate": 2}, {"optimizer": "sgd", "clip_norm": 0.5, "schedule": "linear"}]
)
@pytest.mark.parametrize("crash", [(1, 2), (2, 0)])
def test_an_interrupted_training_ends_with_the_same_weights(
    tmp_path: Path, options: dict[str, Any], crash: tuple[int, int]
) -> None:
    spec = TrainSpec(
        epochs=4, batch_size=10, lr=0.01, warmup_epochs=1, checkpoint_every_s=1e-9, **options
    )
    whole, _ = _fit(tmp_path, spec, Batches())
    checkpoint = tmp_path / "checkpoint.pt"
    with pytest.raises(Exception):  # noqa: B017
        _fit(tmp_path, spec, Batches(stop_at=crash), checkpoint)
    assert checkpoint.exists()
    resumed, outcome = _fit(tmp_path, spec, Batches(), checkpoint)
    assert outcome.epochs == 4
    assert all(torch.equal(v, whole.state_dict()[k]) for k, v in resumed.state_dict().items())
    assert any("resumed at epoch" in note for path in find([tmp_path]) for note in read(path).notes)


def test_another_seed_or_no_resume_would_show(tmp_path: Path) -> None:
    """The test above can fail: dropout and order make the weights depend on the random state."""
    spec = TrainSpec(epochs=2, batch_size=10)
    a, _ = _fit(tmp_path, spec, Batches())
    b, _ = _fit(tmp_path, spec, Batches())
    assert all(torch.equal(v, a.state_dict()[k]) for k, v in b.state_dict().items())
    c, _ = _fit(tmp_path, spec, lambda epoch, start: Batches()(epoch + 9, start))
    assert not torch.equal(a.state_dict()["0.weight"], c.state_dict()["0.weight"])


def test_it_stops_when_the_target_is_reached(tmp_path: Path) -> None:
    _, outcome = _fit(
        tmp_path,
        TrainSpec(epochs=50, batch_size=10, lr=0.05, schedule="constant", target=0.8),
        Batches(),
    )
    assert outcome.reached
    assert outcome.epochs < 50
    assert outcome.metrics["accuracy"] >= 0.8


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_labels_are_smoothed_by_what_the_recipe_says(tmp_path: Path, smoothing: float) -> None:
    """One step of plain SGD by hand: the share of all classes in the target, as in
    `F.cross_entropy`."""
    spec = TrainSpec(
        epochs=1, lr=0.5, optimizer="sgd", momentum=0, weight_decay=0, schedule="constant"
    )
    once = lambda epoch, start: [(X, Y)] * (start == 0)  # noqa: E731
    task = Classification(label_smoothing=smoothing)
    model, _ = _fit(tmp_path, spec, once, dropout=0.0, length=1, task=task)
    mine: Any = _net(dropout=0.0)
    logs = mine(X).log_softmax(1)
    target = (1 - smoothing) * torch.nn.functional.one_hot(Y, 2) + smoothing / 2
    (-(target * logs).sum(1).mean()).backward()
    for a, b in zip(model.parameters(), mine.parameters(), strict=True):
        assert torch.allclose(a, b - 0.5 * b.grad, atol=1e-6)


@pytest.mark.parametrize("accumulate", [1, 2, 3])
def test_accumulated_batches_count_by_their_samples(tmp_path: Path, accumulate: int) -> None:
    """Batches of 12, 12, 12 and 4: each step is that of one big batch, the last of an epoch too."""
    batches = [(X[i : i + 12], Y[i : i + 12]) for i in range(0, 40, 12)]
    net = lambda: torch.nn.utils.skip_init(nn.Linear, 6, 2)  # noqa: E731
    start = {"weight": torch.ones(2, 6) / 3, "bias": torch.zeros(2)}
    spec = TrainSpec(
        epochs=1,
        accumulate=accumulate,
        lr=0.5,
        optimizer="sgd",
        momentum=0,
        weight_decay=0,
        schedule="constant",
        clip_norm=0.2,
    )
    model, mine = net(), net()
    model.load_state_dict(start)
    mine.load_state_dict(start)
    loader = lambda epoch, start: DataLoader(batches, batch_size=None)  # noqa: E731
    part = of_batches(loader, 4, lambda: [(X, Y)], spec)
    with gv.track("fit", dir=tmp_path) as run:
        loop.run(Own(lambda: model, [part]), run)
    for first in range(0, 4, accumulate):
        x, y = (torch.cat(part) for part in zip(*batches[first : first + accumulate], strict=True))
        mine.zero_grad()
        torch.nn.functional.cross_entropy(mine(x), y).backward()
        torch.nn.utils.clip_grad_norm_(mine.parameters(), 0.2)
        with torch.no_grad():
            for parameter in mine.parameters():
                parameter -= 0.5 * parameter.grad
    assert all(
        torch.allclose(v, mine.state_dict()[k], atol=1e-6) for k, v in model.state_dict().items()
    )


@pytest.mark.parametrize("held_out", [True, False])
def test_the_target_is_looked_for_on_images_held_out_or_the_record_says_where(
    tmp_path: Path, held_out: bool
) -> None:
    spec = TrainSpec(epochs=3, batch_size=10, lr=0.05, schedule="constant", target=0.8)
    unreachable = [(X, 1 - Y), (X, Y)]  # half of them are wrong, whatever the model answers
    more: dict[str, Any] = {"held_out": lambda: unreachable} if held_out else {}
    _, outcome = _fit(tmp_path, spec, Batches(), **more)
    assert outcome.metrics["accuracy"] >= 0.8  # the test reached it in either case
    assert (outcome.reached, outcome.epochs) == ((False, 3) if held_out else (True, outcome.epochs))
    run = read(next(iter(find([tmp_path]))))
    assert any("looked for on test images" in note for note in run.notes) == (not held_out)
    assert [log["held_out_accuracy"] for log in run.logs if "held_out_accuracy" in log] == [
        0.5
    ] * 3 * held_out


def test_no_epochs_is_an_evaluation(tmp_path: Path) -> None:
    model, outcome = _fit(tmp_path, TrainSpec(epochs=0), Batches())
    assert outcome.metrics == evaluate(model, [(X, Y)], Classification())


def test_a_loss_that_is_not_finite_stops_with_advice(tmp_path: Path) -> None:
    with pytest.raises(GreenvisError, match=r"the loss is nan at epoch 0, step .*lower train\.lr"):
        _fit(tmp_path, TrainSpec(epochs=2, lr=0.1), lambda epoch, start: [(X * math.nan, Y)])
    assert read(next(iter(find([tmp_path])))).status == "failed"
    with pytest.raises(GreenvisError, match=r"noted before: a weight below 2"):
        step.check_finite(torch.tensor(math.inf), loop.Progress(), ["a weight below 2"])


def test_a_damaged_checkpoint_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "c.pt").write_bytes(b"noise")
    with pytest.raises(GreenvisError, match="remove it to start this arm again"):
        _fit(tmp_path, TrainSpec(), Batches(), tmp_path / "c.pt")


class _Interrupted(io.BufferedWriter):
    """A file in whose fifth write an interrupt comes, when half of it is written."""

    writes = 0

    def write(self, data: Any) -> int:
        type(self).writes += 1
        if self.writes == 5:
            super().write(bytes(data)[: len(data) // 2])
            raise KeyboardInterrupt
        return super().write(data)


def test_an_interrupt_amid_a_checkpoint_is_no_full_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        checkpoint, "open", lambda path, _: _Interrupted(io.FileIO(path, "w")), raising=False
    )
    with pytest.raises(KeyboardInterrupt):
        _fit(tmp_path, TrainSpec(), Batches(), tmp_path / "c.pt")
    assert _Interrupted.writes >= 5
    assert not list(tmp_path.glob("*c.pt*")), "half a checkpoint is none"


def test_the_learning_rate_warms_up_and_falls_to_zero() -> None:
    cosine = [optim.lr_factor(s, 10, 2, "cosine") for s in range(11)]
    assert cosine[:3] == [0.5, 1.0, 1.0]
    assert cosine[6] == pytest.approx(0.5)
    assert cosine[10] == pytest.approx(0)
    assert optim.lr_factor(5, 10, 0, "linear") == 0.5
    assert optim.lr_factor(9, 10, 0, "constant") == 1.0


def test_weight_decay_spares_biases_and_norms() -> None:
    live = gv.wrap(_net(), [])
    groups = optim.make_optimizer(live, TrainSpec(weight_decay=0.1)).param_groups
    for group in groups:
        assert {p.ndim > 1 for p in group["params"]} == {group["weight_decay"] == 0.1}
    assert sum(len(g["params"]) for g in groups) == len(live.trainable)


def test_threads_are_put_back() -> None:
    before = torch.get_num_threads()
    with optim.threads(2):
        assert torch.get_num_threads() == 2
    assert torch.get_num_threads() == before


def test_tensorboard_gets_what_the_record_gets(tmp_path: Path) -> None:
    """The real one: accuracy, loss and the joules so far; and the same weights as without it."""
    event_accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator"
    )
    spec = TrainSpec(epochs=3, batch_size=10, lr=0.01)
    plain, _ = _fit(tmp_path / "plain", spec, Batches())
    model, _ = _fit(tmp_path / "logged", spec, Batches(), log_with=["tensorboard"])
    assert all(
        torch.equal(a, b) for a, b in zip(plain.parameters(), model.parameters(), strict=True)
    )
    [path] = find([tmp_path / "logged"])
    logs = read(path).logs
    [events] = [
        p for p in path.parent.rglob("events.out.tfevents*") if p.parent == path.parent / "fit"
    ]
    seen = event_accumulator.EventAccumulator(str(events))
    seen.Reload()
    for key in ("accuracy", "loss"):
        wanted = [(x["step"], pytest.approx(x[key])) for x in logs if key in x]
        assert [(e.step, e.value) for e in seen.Scalars(key)] == wanted
    joules = [e.value for e in seen.Scalars("energy_j")]
    assert joules == sorted(joules)
    assert joules[0] > 0


def test_a_tracker_that_is_not_there_is_refused_with_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = TrainSpec(epochs=1, batch_size=10, lr=0.01)
    with pytest.raises(BadInput, match="did you mean 'tensorboard'"):
        _fit(tmp_path, spec, Batches(), log_with=["tensorbord"])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(BadInput, match="pip install wandb"):
        loggers.check(["wandb"])


class _Watch(Technique):
    """Note which samples each step was said to hold."""

    name: ClassVar[str] = "watch"
    stage: ClassVar[Stage] = "objective"
    swap: bool = False

    def install(self, model: nn.Module) -> Installed:
        return _Watching(self.swap)


class _Watching(Installed):
    def __init__(self, swap: bool) -> None:
        super().__init__()
        self.swap, self.saw = swap, []

    def batch(self, x: Any, y: Any) -> tuple[Any, Any]:
        return (x.clone(), y) if self.swap else (x, y)

    def terms(self, x: Any, y: Any, logits: Any) -> dict[str, Tensor]:
        self.saw.append(
            None
            if self.samples is None
            else (self.samples.view, self.samples.positions.tolist(), y.tolist())
        )
        return {}


@pytest.mark.parametrize("swap", [False, True])
def test_techniques_are_told_which_samples_they_see(tmp_path: Path, swap: bool) -> None:
    images = data.load(data.DataSpec(name="digits", train=6, test=2)).train

    def samples(epoch: int, at: Tensor) -> Samples:
        return Samples(tmp_path, images.key(), len(images), 2, at, epoch % 2)

    def batches(epoch: int, start: int) -> Any:
        return data.batches(images, 3, epoch=epoch, shuffle=True, start=start, positions=True)

    part = of_batches(
        batches, 2, lambda: data.batches(images, 6), TrainSpec(epochs=2), [_Watch(swap=swap)],
        samples=samples,
    )  # fmt: skip
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    with gv.track("t", dir=tmp_path) as run:
        live = loop.run(Own(lambda: net, [part]), run).live
    installed = live.installed[0]
    assert isinstance(installed, _Watching)
    assert installed.samples is None
    if swap:  # what a technique has put in the batch's place has no place in a cache
        assert installed.saw == [None] * 4
    else:
        assert [view for view, *_ in installed.saw] == [0, 0, 1, 1]
        assert all(y == images.targets[at].tolist() for _, at, y in installed.saw)
        assert sorted(i for _, at, _ in installed.saw[:2] for i in at) == list(range(6))


class Unread(Technique):
    """Adds a parameter, and reads it only times a factor."""

    name: ClassVar[str] = "unread"
    stage: ClassVar[Stage] = "weights"
    factor: float = 0.0

    def install(self, model: nn.Module) -> Installed:
        extra = nn.Parameter(torch.ones(2))
        model[4].register_parameter("extra", extra)  # type: ignore[index,union-attr]
        model[4].register_forward_hook(partial(_scaled, self.factor))  # type: ignore[index]
        return Installed(("4.extra",))


def _scaled(factor: float, module: Any, args: Any, output: Tensor) -> Tensor:
    return output + factor * module.extra


@pytest.mark.parametrize("factor", [0.0, 1.0])
def test_a_training_in_which_what_a_technique_trains_stands_still_fails(
    tmp_path: Path, factor: float
) -> None:
    spec = TrainSpec(epochs=2, batch_size=10, lr=0.01, weight_decay=0.0)
    if factor:
        _, outcome = _fit(tmp_path, spec, Batches(), techniques=[Unread(factor=factor)])
        assert outcome.live.unmoved() == []
        return
    says = "'unread': none of the parameters it trains has moved in 8 steps"
    with pytest.raises(GreenvisError, match=says):
        _fit(tmp_path, spec, Batches(), techniques=[Unread(factor=factor)])


@pytest.mark.parametrize("optimizer", ["adamw", "adam", "sgd"])
def test_a_fused_step_is_the_plain_one(tmp_path: Path, optimizer: str) -> None:
    kinds = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam, "sgd": torch.optim.SGD}
    spec = TrainSpec(optimizer=optimizer, lr=0.1)  # type: ignore[arg-type]
    nets = [nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2)) for _ in range(2)]
    nets[1].load_state_dict(nets[0].state_dict())
    fused = optim.make_optimizer(gv.wrap(nets[0], []), spec)
    assert isinstance(fused, kinds[optimizer])
    assert fused.defaults["fused"]
    more = {"momentum": spec.momentum} if optimizer == "sgd" else {}
    decays = [{"params": [p for p in nets[1].parameters() if (p.ndim > 1) == d], "weight_decay":
               spec.weight_decay * d} for d in (True, False)]  # fmt: skip
    plain = kinds[optimizer](decays, lr=spec.lr, foreach=False, **more)
    for _ in range(5):
        for net, own in zip(nets, (fused, plain), strict=True):
            own.zero_grad()
            nn.functional.cross_entropy(net(X), Y).backward()
            own.step()
    for a, b in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_what_cannot_be_fused_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optim, "FUSED", ("cuda",))
    assert not optim.make_optimizer(gv.wrap(_net(), []), TrainSpec()).defaults["fused"]
