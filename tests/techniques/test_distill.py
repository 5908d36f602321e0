"""Logit distillation: the reference losses, a teacher that is left alone, and errors that help."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

import greenvis as gv
from greenvis.core.example import Example
from greenvis.errors import BadInput, GreenvisError
from greenvis.techniques.inference.distill.distill import kd_loss

FIXTURE = torch.load(Path(__file__).parents[1] / "fixtures" / "kd_losses.pt", weights_only=True)


def _net(classes: int = 5) -> nn.Module:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(12, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, classes)
    )


def test_loss_and_gradient_equal_the_reference() -> None:
    for case in FIXTURE["kd"] if isinstance(FIXTURE["kd"], list) else [FIXTURE["kd"]]:
        student = FIXTURE["student_logits"].clone().requires_grad_(True)
        loss = kd_loss(student, FIXTURE["teacher_logits"], float(case["T"]))
        loss.backward()
        assert torch.allclose(loss, torch.as_tensor(case["loss"]), atol=1e-6)
        assert torch.allclose(student.grad, case["grad_student"], atol=1e-6)


def test_loss_equals_the_formula() -> None:
    s, t = torch.randn(4, 6), torch.randn(4, 6)
    p, q = (t / 3).softmax(-1), (s / 3).softmax(-1)
    assert torch.allclose(kd_loss(s, t, 3.0), 9 * (p * (p / q).log()).sum(-1).mean(), atol=1e-6)
    assert float(kd_loss(s, s, 3.0)) == pytest.approx(0, abs=1e-6)


class _Bags(nn.Module):
    """The mean of a bag's images, then classes."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(12, 2)

    def forward(self, images: torch.Tensor, bag: torch.Tensor) -> torch.Tensor:
        hot = nn.functional.one_hot(bag).T.float()
        return self.inner(hot / hot.sum(1, keepdim=True) @ images.flatten(1))


def test_bags_learn_from_the_teachers_answer_to_each_bag() -> None:
    student, teacher = _Bags(), _Bags()
    bags = Example((torch.randn(6, 3, 2, 2),), {"bag": torch.tensor([0, 0, 1, 2, 2, 2])})
    live = gv.wrap(student, gv.Distill(teacher=teacher, temperature=2.0, weight=0.9), task="bags")
    logits = bags.call(student)
    s, t = (z / 2 for z in (logits, bags.call(teacher)))
    want = 0.9 * 4 * (t.softmax(1) * (t.log_softmax(1) - s.log_softmax(1))).sum(1).mean()
    value = live.loss(bags, torch.tensor([0, 1, 0]), logits)
    assert torch.allclose(value, want, atol=1e-6)
    value.backward()
    assert student.inner.weight.grad is not None
    assert teacher.inner.weight.grad is None
    live.undo()
    features = gv.Distill(teacher=teacher, losses=[{"kind": "hint", "layers": "last"}])
    assert "bags" not in (features.tasks or ())


def test_weights_of_both_losses() -> None:
    student, x, y = _net(), torch.randn(4, 3, 2, 2), torch.tensor([0, 1, 2, 3])
    teacher = _net()
    live = gv.wrap(
        student, gv.Distill(teacher=teacher, temperature=2.0, weight=0.9, task_weight=0.1)
    )
    logits = student(x)
    assert torch.allclose(live.loss(x, y, logits), 0.9 * kd_loss(logits, teacher(x), 2.0))
    task = nn.functional.cross_entropy
    assert torch.allclose(live.criterion(task)(logits, y), 0.1 * task(logits, y))
    live.undo()
    neutral = gv.wrap(student, gv.Distill(teacher=teacher, weight=0.0))
    assert neutral.loss(x, y, logits).item() == 0.0
    assert neutral.criterion(task) is task


def test_the_teacher_never_learns_and_gets_its_modes_back() -> None:
    student, teacher = _net(), _net().train()
    before = copy.deepcopy(teacher.state_dict())
    live = gv.wrap(student, gv.Distill(teacher=teacher))
    x = torch.randn(4, 3, 2, 2)
    live.loss(x, None, student(x)).backward()
    assert not any(m.training for m in teacher.modules())
    assert all(p.grad is None for p in teacher.parameters())
    assert all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())
    live.undo()
    assert all(m.training for m in teacher.modules())


def test_the_teacher_has_a_phase_of_its_own(tmp_path: Path) -> None:
    student = _net()
    live = gv.wrap(student, gv.Distill(teacher=_net()))
    with gv.track("phases", live, dir=tmp_path) as run, run.phase("train"):
        x = torch.randn(4, 3, 2, 2)
        live.loss(x, None, student(x))
    from greenvis.meters.record import find, read

    assert "train/teacher" in read(next(iter(find([run.path])))).totals


def test_teachers_that_cannot_work_are_refused() -> None:
    student = _net()
    for teacher, message in [
        (student, "shares"),
        (nn.Sequential(*student), "shares '1.weight'"),
        (3, "must be a model or a reference"),
        ("run:other", "only a recipe can resolve it"),
        ("timm/vit_tinny_patch16_224", "did you mean"),
    ]:
        with pytest.raises(BadInput, match=message):
            gv.wrap(student, gv.Distill(teacher=teacher))
    live = gv.wrap(student, gv.Distill(teacher=_net(7)))
    x = torch.randn(4, 3, 2, 2)
    with pytest.raises(
        GreenvisError, match=r"teacher's logits are \(4, 7\), the student's \(4, 5\)"
    ):
        live.loss(x, None, student(x))


def test_a_deep_copied_teacher_and_two_at_once() -> None:
    a, b = _net(), _net()
    x = torch.randn(4, 3, 2, 2)
    one = gv.wrap(a, gv.Distill(teacher=copy.deepcopy(a)))
    two = gv.wrap(b, gv.Distill(teacher=copy.deepcopy(a)))
    a.eval()
    assert one.loss(x, None, a(x)).item() == pytest.approx(0, abs=1e-6)
    assert two.loss(x, None, b(x)).item() > 1e-3


def test_a_distilled_steps_flops_are_the_students_step_and_the_teachers_forward(
    tmp_path: Path,
) -> None:
    from greenvis.meters.record import find, read

    student, teacher = (
        nn.Linear(16, 4),
        nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4)),
    )
    live = gv.wrap(student, gv.Distill(teacher=teacher))
    batch, steps = 8, 3
    with gv.track("flops", live, dir=tmp_path) as run:
        for x, y in run.steps(
            [(torch.randn(batch, 16), torch.zeros(batch).long())] * steps, phase="train"
        ):
            live.loss(x, y, student(x)).backward()
    forward = 2 * batch * 16 * 4
    teaching = 2 * batch * (16 * 32 + 32 * 4)
    found = read(next(iter(find([run.path]))))
    assert found.sum("flops", "train") == steps * (
        2 * forward + teaching
    )  # forward and the weights' gradient, as x has none
