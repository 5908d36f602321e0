"""wrap: order, conflicts, rollback, delta, merge, undo."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

import greenvis as gv
from greenvis.core.surgery import freeze, replace
from greenvis.core.technique import Experience, Installed, Stage, Technique
from greenvis.errors import BadInput, GreenvisError


class Probe(gv.Technique):
    """Freeze all but the last layer, and add a term."""

    name: ClassVar[str] = "probe"
    stage: ClassVar[Stage] = "weights"
    needs: ClassVar[frozenset[str]] = frozenset({"token_grid"})

    def install(self, model: nn.Module) -> gv.Installed:
        freeze(model, but=model[-1].parameters())
        return _WithTerm(("2.weight", "2.bias"), freezes=True)


class Widen(gv.Technique):
    """Add a trainable, neutral layer before the last; folds into it."""

    name: ClassVar[str] = "widen"
    stage: ClassVar[Stage] = "base"

    def install(self, model: nn.Module) -> gv.Installed:
        return _Widened(model)


class Breaks(gv.Technique):
    """Break the token grid."""

    name: ClassVar[str] = "breaks"
    stage: ClassVar[Stage] = "tokens"
    breaks: ClassVar[frozenset[str]] = frozenset({"token_grid"})

    def install(self, model: nn.Module) -> gv.Installed:
        return gv.Installed()


class Fails(gv.Technique):
    """Change the model, then fail."""

    name: ClassVar[str] = "fails"
    stage: ClassVar[Stage] = "objective"

    def install(self, model: nn.Module) -> gv.Installed:
        model[0] = nn.Identity()
        model.extra = nn.Linear(1, 1)
        raise BadInput("does not fit")


class TaskLoss(gv.Technique):
    """Replace the task loss."""

    name: ClassVar[str] = "task_loss"
    stage: ClassVar[Stage] = "objective"
    twice: bool = False

    def install(self, model: nn.Module) -> gv.Installed:
        return _HalfLoss()


class OtherTaskLoss(TaskLoss):
    """Replace it as well."""

    name: ClassVar[str] = "other_task_loss"


class _HalfLoss(gv.Installed):
    unmergeable = "it is only a loss in this test"

    def __init__(self) -> None:
        super().__init__()
        self.criterion: Callable[..., Any] = lambda task: lambda *a: 0.5 * task(*a)


class _WithTerm(gv.Installed):
    def terms(self, x: Any, y: Any, logits: Any) -> Mapping[str, Tensor]:
        return {"probe": logits.sum() * 2}


class _Widened(gv.Installed):
    def __init__(self, model: nn.Module) -> None:
        self.added, self.last = nn.Linear(4, 4), model[2]
        with torch.no_grad():
            self.added.weight.copy_(torch.eye(4))
            self.added.bias.zero_()
        replace(model, model[2], nn.Sequential(self.added, self.last))
        super().__init__(("2.0.weight", "2.0.bias"))

    def merge(self) -> None:
        with torch.no_grad():
            self.last.bias += self.last.weight @ self.added.bias
            self.last.weight.copy_(self.last.weight @ self.added.weight)


def _net() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def _train(model: nn.Module, live: gv.Wrapped, steps: int = 3) -> None:
    optimizer = torch.optim.SGD(live.param_groups(lr=0.1))
    for _ in range(steps):
        model(torch.ones(2, 3)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def test_order_is_by_stage_not_by_list() -> None:
    live = gv.wrap(_net(), [TaskLoss(), Breaks(), Widen()])
    assert [t.name for t in live.techniques] == ["widen", "breaks", "task_loss"]


def test_a_pair_that_cannot_work_is_refused_with_both_names_and_the_reason() -> None:
    model = _net()
    keys = list(model.state_dict())
    with pytest.raises(
        BadInput,
        match=r"'breaks' and 'probe' do not go together: 'probe' needs a fixed grid of tokens",
    ):
        gv.wrap(model, [Probe(), Breaks()])
    assert list(model.state_dict()) == keys


def test_a_failing_install_rolls_back_the_ones_before_it() -> None:
    model = _net()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    first = model[0]
    with pytest.raises(BadInput, match="does not fit"):
        gv.wrap(model, [Probe(), Fails()])
    assert model[0] is first
    assert not hasattr(model, "extra")
    assert all(p.requires_grad for p in model.parameters())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    gv.wrap(model, Probe())  # and it can be wrapped afterwards


@pytest.mark.parametrize(
    ("techniques", "message"),
    [
        (["lora"], "takes techniques, not 'lora'"),
        ([Probe], r"write Probe\("),
        ([Probe(), Probe()], "'probe' is listed twice"),
        ([TaskLoss(), OtherTaskLoss()], "each replace the task loss"),
    ],
)
def test_bad_requests_say_what_to_do(techniques: list[Any], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        gv.wrap(_net(), techniques)


def test_a_wrapped_model_is_not_wrapped_again_until_undone() -> None:
    model = _net()
    live = gv.wrap(model, Probe())
    with pytest.raises(BadInput, match=r"wrapped already \(with 'probe'\)"):
        gv.wrap(model, Widen())
    live.undo()
    gv.wrap(model, Widen())


def test_loss_sums_terms_and_is_zero_without_any() -> None:
    model, x = _net(), torch.ones(2, 3)
    live = gv.wrap(model, Probe())
    logits = model(x)
    assert torch.equal(live.loss(x, None, logits), logits.sum() * 2)
    live.undo()
    bare = gv.wrap(model, [])
    assert float(bare.loss(x, None, logits)) == 0.0
    assert bare.criterion(max) is max
    assert gv.wrap(_net(), TaskLoss()).criterion(max)(2.0, 4.0) == 2.0


def test_undo_is_bit_exact_after_training() -> None:
    model, x = _net(), torch.randn(2, 3)
    before, out = {k: v.clone() for k, v in model.state_dict().items()}, model(x)
    live = gv.wrap(model, [Widen()])
    _train(model, live)
    assert not torch.equal(model(x), out)
    live.undo()
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert torch.equal(model(x), out)


def test_merge_gives_a_plain_model_with_what_was_learned() -> None:
    model, x = _net(), torch.randn(2, 3)
    keys = list(model.state_dict())
    live = gv.wrap(model, [Widen()])
    _train(model, live)
    learned = model(x)
    assert live.merge() is model
    assert list(model.state_dict()) == keys
    assert torch.allclose(model(x), learned, atol=1e-6)


def test_undo_still_works_after_merge() -> None:
    model, x = _net(), torch.randn(2, 3)
    out = model(x)
    live = gv.wrap(model, [Widen()])
    _train(model, live)
    live.merge()
    live.undo()
    assert torch.equal(model(x), out)


def test_what_cannot_be_merged_says_why_and_changes_nothing() -> None:
    model = _net()
    live = gv.wrap(model, [Widen(), TaskLoss()])
    keys = list(model.state_dict())
    with pytest.raises(GreenvisError, match="task_loss cannot be merged: it is only a loss"):
        live.merge()
    assert list(model.state_dict()) == keys


def test_the_delta_is_small_saved_and_loaded(tmp_path: Path) -> None:
    model, x = _net(), torch.randn(2, 3)
    live = gv.wrap(model, Probe())
    _train(model, live)
    assert sorted(live.state_dict()) == ["model.2.bias", "model.2.weight"]
    live.save(tmp_path / "delta")
    fresh = _net()
    other = gv.wrap(fresh, Probe())
    other.load(tmp_path / "delta")
    assert torch.equal(fresh(x), model(x))


def test_a_delta_is_refused_by_another_base_other_techniques_or_when_damaged(
    tmp_path: Path,
) -> None:
    live = gv.wrap(_net(), Probe())
    live.save(tmp_path)
    stranger = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    with pytest.raises(BadInput, match="belongs to another base"):
        gv.wrap(stranger, Probe()).load(tmp_path)
    with pytest.raises(BadInput, match="was saved with"):
        gv.wrap(_net(), Widen()).load(tmp_path)
    with pytest.raises(BadInput, match=r"missing '2\.weight', '2\.bias'"):
        gv.wrap(_net(), Probe()).load_state_dict({})
    file = tmp_path / "delta.safetensors"
    file.write_bytes(file.read_bytes()[:20])
    with pytest.raises(BadInput, match="cannot load a delta"):
        gv.wrap(_net(), Probe()).load(tmp_path)


def test_the_delta_holds_buffers_that_changed() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    live = gv.wrap(model, [])
    model(torch.randn(5, 3))
    assert "model.1.running_mean" in live.state_dict()


def test_summary_says_what_learns() -> None:
    text = gv.wrap(_net(), Probe()).summary()
    assert "probe" in text
    assert "trains 10 of 26 parameters" in text


def test_a_wrong_argument_names_the_nearest_right_one() -> None:
    with pytest.raises(BadInput, match=r"Lora: rnak: unknown field 'rnak'; did you mean 'rank'\?"):
        gv.Lora(rnak=8)  # type: ignore[call-arg]
    with pytest.raises(BadInput, match="greater than or equal to 1, not 0"):
        gv.Lora(rank=0)


def test_loss_without_terms_takes_a_models_whole_output() -> None:
    class Output:
        logits = torch.ones(2, 3)

    assert gv.wrap(_net(), []).loss(None, None, Output()).item() == 0.0


def test_merge_keeps_the_mode_the_model_is_in() -> None:
    model = _net().train()
    live = gv.wrap(model, [Widen()])
    model.eval()
    assert not any(m.training for m in live.merge().modules())
    live.undo()
    assert all(m.training for m in model.modules())


def test_order_within_a_stage_is_not_the_lists_either() -> None:
    import timm

    for techniques in (
        [gv.Adapter(), gv.Lora(rank=2, targets=("mlp",))],
        [gv.Lora(rank=2, targets=("mlp",)), gv.Adapter()],
    ):
        model = timm.create_model(
            "vit_tiny_patch16_224",
            img_size=32,
            patch_size=8,
            embed_dim=32,
            depth=2,
            num_heads=2,
            num_classes=5,
        )
        live = gv.wrap(model, techniques)
        assert [t.name for t in live.techniques] == ["lora", "adapter"]
        assert any("lora_A" in n for n in live.trainable)
        assert any(".adapter." in n for n in live.trainable)


class _Column(Technique):
    """Add a scale for each task, and note what it is told."""

    name: ClassVar[str] = "column"
    stage: ClassVar[Stage] = "weights"

    def install(self, model: nn.Module) -> Installed:
        return _Columns(model)


class _Columns(Installed):
    def __init__(self, model: nn.Module) -> None:
        super().__init__(freezes=True)
        self.model, self.told = model, []

    def begin_experience(self, experience: Experience) -> None:
        self.told.append(experience.index)
        self.model.register_parameter(f"scale{experience.index}", nn.Parameter(torch.ones(3)))
        self.trainable = (f"scale{experience.index}",)

    def eval_experience(self, experience: Experience | None) -> None:
        self.told.append(None if experience is None else experience.classes)


def test_a_technique_hears_of_tasks_and_may_grow_at_their_start() -> None:
    model = nn.Sequential(nn.Linear(4, 3))
    keys = list(model.state_dict())
    live = gv.wrap(model, _Column())
    for index in range(2):
        task = Experience(
            index, (2 * index, 2 * index + 1), tuple(range(2 * index + 2)), 2, known=True
        )
        live.begin_experience(task)
        assert list(live.trainable) == [
            f"scale{index}"
        ]  # this task's own learns, the one before is kept
        live.eval_experience(task)
        with torch.no_grad():
            live.trainable[f"scale{index}"].fill_(index + 5.0)
    live.eval_experience(None)
    assert live.installed[0].told == [0, (0, 1), 1, (2, 3), None]  # type: ignore[attr-defined]
    again = gv.wrap(nn.Sequential(nn.Linear(4, 3)), _Column())
    for index in range(2):
        again.begin_experience(Experience(index, (index,), (index,)))
    again.load_state_dict(live.state_dict())
    assert (
        again.model.get_parameter("scale0").tolist() == [5.0] * 3
    )  # what an earlier task learned is state, too
    live.undo()
    assert list(model.state_dict()) == keys
    assert all(p.requires_grad for p in model.parameters())
