"""Distillation beside techniques that change the tokens or let samples leave: resolved, or refused
with the reason."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_distill_features import KINDS, _batch, _cnn, _step, _vit
from torch import Tensor, nn

import greenvis as gv
from greenvis.errors import BadInput
from greenvis.models.structure import view
from greenvis.techniques.inference.distill._layers import Taps, features


@pytest.mark.parametrize(
    "other", [gv.Prompt(tokens=2), gv.TokenPrune(method="class_attention", blocks=(1,))]
)
def test_features_and_tokens_that_came_or_went_are_refused_answers_are_not(
    other: gv.Technique,
) -> None:
    student = _vit()
    with pytest.raises(
        BadInput, match=f"'{other.name}' and 'distill' do not go together: .* a row for each patch"
    ):
        gv.wrap(student, [other, gv.Distill(teacher=_vit(), losses=[{"kind": "hint"}])])
    gv.wrap(student, [other, gv.Distill(teacher=_vit())]).undo()


@pytest.mark.one_in(3)
@pytest.mark.parametrize(
    "loss", [*KINDS, {"kind": "minilm"}], ids=lambda k: k["kind"] + "-residual" * ("residual" in k)
)
def test_merged_tokens_are_compared_as_the_patches_they_hold(loss: dict[str, Any]) -> None:
    student, (x, y) = _vit(depth=3), _batch()
    live = gv.wrap(
        student,
        [
            gv.TokenMerge(r=3),
            gv.Distill(teacher=_cnn() if loss["kind"] != "minilm" else _vit(), losses=[loss]),
        ],
    )
    terms = _step(live, x, y)
    assert all(torch.isfinite(t) for t in terms.values())
    assert live.installed[0].sizes().shape == (4, 17 - 9)  # it did merge
    assert all(p.grad is not None and p.grad.isfinite().all() for p in live.trainable.values())
    live.undo()
    assert not any(m._forward_hooks for m in student.modules())


def test_what_is_read_of_merged_tokens_equals_the_map_of_the_merging() -> None:
    student, x = _vit(depth=3), _batch()[0]
    live = gv.wrap(student, gv.TokenMerge(r=3))
    student.eval()
    given: list[Tensor] = []

    def keep(module: nn.Module, args: Any, output: Tensor) -> None:
        given.append(output)

    keep.__module__ = "greenvis.a_technique"  # anybody else's hook is shown the row laid out
    hook = student.get_submodule("blocks.1").register_forward_hook(keep)
    found = view(student, probe=False)
    taps = Taps(student, features(student, found, (0, 1, 2)))
    given.clear()
    with torch.no_grad():
        student(x)
    read = taps.take()
    assert given[0].shape[1] == 17 - 6
    assert {t.shape for t in read.values()} == {(4, 17, 16)}
    assert torch.equal(read["blocks.1"], live.installed[0].unmerge(given[0], block=2))
    assert not torch.equal(read["blocks.1"], read["blocks.2"])
    taps.remove()
    hook.remove()


def test_a_teacher_that_merges_its_tokens_teaches_features() -> None:
    student, teacher, (x, y) = _cnn(), _vit(depth=3), _batch()
    merging = gv.wrap(teacher, gv.TokenMerge(r=3))
    live = gv.wrap(student, gv.Distill(teacher=teacher, losses=[{"kind": "hint"}]))
    assert torch.isfinite(_step(live, x, y)["distill_hint"])
    assert merging.installed[0].sizes().shape == (4, 17 - 9)


def test_exits_learn_while_answers_and_features_are_distilled() -> None:
    student, (x, y) = _vit(depth=3), _batch()
    losses = [{"kind": "kd"}, {"kind": "hint"}]
    live = gv.wrap(
        student, [gv.EarlyExit(at=(1,), threshold=0.1), gv.Distill(teacher=_vit(), losses=losses)]
    )
    terms = _step(live, x, y)
    assert set(terms) == {"early_exit", "distill_kd", "distill_hint"}
    assert all(p.grad is not None for p in live.trainable.values())
    alone = gv.wrap(_vit(depth=3), gv.Distill(teacher=_vit(), losses=losses))
    alone.model.load_state_dict(
        {k: v for k, v in student.state_dict().items() if k in alone.model.state_dict()}
    )
    assert (
        student.eval()(x).shape == alone.model.eval()(x).shape
    )  # in eval samples leave; nothing is tapped


def test_a_merging_student_learns_from_its_own_merging_mean() -> None:
    student, (x, y) = _vit(depth=3), _batch()
    live = gv.wrap(
        student, [gv.TokenMerge(r=3), gv.Distill(teacher="ema", losses=[{"kind": "cosine"}])]
    )
    (teacher,) = live.installed[1].teachers.values()
    assert _step(live, x, y)["distill_cosine"].item() == pytest.approx(0, abs=1e-5)
    live.step_end()
    with torch.no_grad():
        student.patch_embed.proj.weight.mul_(-1)
    assert _step(live, x, y)["distill_cosine"].item() > 1e-3
    assert live.installed[0].sizes().shape == (4, 17 - 9)
    assert teacher.module(x).shape == (4, 5)
