"""Which images an epoch visits: the shares, the order, and a resume to the bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from own_parts import Own, of_batches
from torch import Tensor, nn

import greenvis as gv
from greenvis import data
from greenvis.core.technique import ClassNames, Installed, Stage, Technique
from greenvis.errors import BadInput, GreenvisError
from greenvis.experiment import loop
from greenvis.experiment.parts import Part
from greenvis.experiment.recipe import TrainSpec
from greenvis.techniques.data.sampling.balance import Balance, quotas, shares, visits

LABELS = torch.tensor([0] * 20 + [1] * 5 + [3] * 2 + [-1] * 4)


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_shares_are_powers_of_the_counts() -> None:
    counts = torch.tensor([16, 4, 0, 1])
    assert shares(counts, 1.0).tolist() == pytest.approx([16 / 21, 4 / 21, 0, 1 / 21])
    assert shares(counts, 0.5).tolist() == pytest.approx([4 / 7, 2 / 7, 0, 1 / 7])
    assert shares(counts, 0.0).tolist() == pytest.approx([1 / 3, 1 / 3, 0, 1 / 3])
    assert quotas(torch.tensor([0.5, 0.25, 0.25]).double(), 7).tolist() == [3, 2, 2]


def test_classes_come_alike_and_no_image_again_before_the_others() -> None:
    rows = visits(LABELS, 0.0, _generator())
    assert torch.bincount(LABELS[rows], minlength=4).tolist() == [9, 9, 0, 9]
    times = torch.bincount(rows, minlength=len(LABELS))
    for label in (0, 1, 3):
        assert times[label == LABELS].max() - times[label == LABELS].min() <= 1
    assert times[LABELS == -1].sum() == 0
    assert sorted(visits(LABELS, 1.0, _generator()).tolist()) == list(range(27))  # each once
    assert not torch.equal(rows, visits(LABELS, 0.0, _generator(1)))


SET = data.load(data.DataSpec(name="digits", train=80, test=30, augment="crop")).train


def _net() -> nn.Module:
    torch.manual_seed(5)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))


class Half(Technique):
    """Visit every other image, fewer each epoch."""

    name: ClassVar[str] = "half"
    stage: ClassVar[Stage] = "objective"

    def install(self, model: nn.Module) -> Installed:
        return _Halved()


class _Halved(Installed):
    def visit(self, epoch: int, images: Any) -> Tensor | None:
        return torch.arange(0, len(images), 2)[epoch * 7 :] if epoch else None


def _part(technique: Technique, seen: list[Any], stop_at: int | None = None) -> Part:
    spec = TrainSpec(epochs=3, batch_size=10, lr=0.01, warmup_epochs=1, checkpoint_every_s=1e-9)

    def batches(epoch: int, start: int, visits: Tensor | None = None) -> Any:
        loader = data.batches(SET, 10, epoch=epoch, start=start, shuffle=True, visits=visits,
                              positions=True)  # fmt: skip
        for x, y, rows in loader:
            if len(seen) == stop_at:
                raise KeyboardInterrupt
            seen.append((epoch, rows.tolist()))
            yield x, y

    part = of_batches(batches, 8, lambda: data.batches(SET, 40), spec, [technique])
    return Part(**{**vars(part), "images": SET})


@pytest.mark.one_in(2)
@pytest.mark.parametrize("technique", [Balance(), Half()])
def test_a_resumed_epoch_visits_what_is_left_of_it(tmp_path: Path, technique: Technique) -> None:
    def fit(part: Part, checkpoint: Path | None = None) -> nn.Module:
        with gv.track("visits", dir=tmp_path) as run:
            return loop.run(Own(_net, [part], 3, checkpoint), run).live.model

    whole: list[Any] = []
    uninterrupted = fit(_part(technique, whole))
    first: list[Any] = []
    second: list[Any] = []
    with pytest.raises(KeyboardInterrupt):
        fit(_part(technique, first, 10), tmp_path / "c.pt")
    resumed = fit(_part(technique, second), tmp_path / "c.pt")
    assert first + second == whole
    for name, value in uninterrupted.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name])
    last = [rows for epoch, rows in whole if epoch == 2]
    expected = gv.wrap(_net(), technique)
    expected.plan(1, 3)
    shown = expected.visit(2, SET)
    assert shown is not None
    assert [r for rows in last for r in rows] == shown.tolist()


def test_a_schedule_ends_with_the_last_epoch_however_many_images_are_visited(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    positions: list[float] = []
    real = loop.lr_factor

    def spy(step: float, *rest: Any) -> float:
        positions.append(step)
        return real(step, *rest)

    monkeypatch.setattr(loop, "lr_factor", spy)
    with gv.track("visits", dir=tmp_path) as run:
        loop.run(Own(_net, [_part(Half(), [])], 3), run)
    # 8 batches, then 33 images in 4, then 26 in 3; weights and biases are groups of their own
    assert positions[2::2] == pytest.approx(
        [*range(1, 9), 10, 12, 14, 16, 16 + 8 / 3, 16 + 16 / 3, 24]
    )


def test_what_cannot_choose_is_refused_and_a_loop_that_does_not_ask_is_told(tmp_path: Path) -> None:
    live = gv.wrap(_net(), Balance())
    with pytest.raises(GreenvisError, match=r"balance.* live\.visit\(epoch, images\)"):
        live.step_end()
    with pytest.raises(BadInput, match="this list shows none"):
        live.visit(0, [1, 2])
    assert live.visit(0, SET) is not None
    live.step_end()
    with pytest.raises(BadInput, match="each choose the images of an epoch"):
        gv.wrap(_net(), [Balance(), Half()])
    file = tmp_path / "r.yaml"
    file.write_text(
        "name: r\ndata: {name: digits, train: 40, test: 20, stream: {kind: class, tasks: 5}}\n"
        "model: {ref: timm/resnet10t, in_chans: 1}\ntrain: {epochs: 1}\narms:\n"
        "  even: {techniques: [balance]}\n"
    )
    with pytest.raises(BadInput, match=r"r\.yaml:6: 'balance' chooses .* a stream of tasks"):
        gv.run(file, runs=tmp_path / "runs")
    from greenvis.integrations import lightning

    with pytest.raises(BadInput, match="'balance' chooses the images of each epoch"):
        lightning.GreenCallback(gv.wrap(_net(), Balance()), "n", dir=tmp_path)


class Named(Technique):
    """Know the names of the classes."""

    name: ClassVar[str] = "named"
    stage: ClassVar[Stage] = "objective"
    classes: ClassNames = None

    def install(self, model: nn.Module) -> Installed:
        if self.classes is None:
            raise BadInput("named needs the names of the classes: wrap(…, classes=[…])")
        return Installed()


def test_names_of_classes_reach_a_request_that_asks_for_them() -> None:
    with pytest.raises(BadInput, match="needs the names"):
        gv.wrap(_net(), Named())
    live = gv.wrap(_net(), [Named(), Half()], classes=["cat", "dog"])
    assert live.recipe_form() == [{"half": {}}, {"named": {"classes": ["cat", "dog"]}}]
    live.undo()
    own = gv.wrap(_net(), Named(classes=("a", "b")), classes=["cat", "dog"])
    assert own.recipe_form() == [{"named": {"classes": ["a", "b"]}}]
