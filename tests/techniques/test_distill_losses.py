"""The losses of distillation: published values and gradients, the formulas, and alignment of maps,
tokens and vectors."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from greenvis.errors import GreenvisError
from greenvis.models.structure.layout import as_map
from greenvis.techniques._shared import features as of
from greenvis.techniques.inference.distill import _teachers as teaching
from greenvis.techniques.inference.distill._comparison import Review
from greenvis.techniques.inference.distill._comparison import _hint as hint
from greenvis.techniques.inference.distill._kd import (
    corrected_targets,
    dkd_loss,
    hard_loss,
    kd_loss,
    kd_task_loss,
    soft_target_loss,
)

FIXTURE = torch.load(Path(__file__).parents[1] / "fixtures" / "kd_losses.pt", weights_only=True)


def _student() -> torch.Tensor:
    return FIXTURE["student_logits"].clone().requires_grad_(True)


@pytest.mark.parametrize("case", FIXTURE["dkd"], ids=lambda c: f"beta{c['beta']}")
def test_dkd_equals_the_reference(case: dict) -> None:
    student = _student()
    loss = dkd_loss(
        student,
        FIXTURE["teacher_logits"],
        FIXTURE["target"],
        case["alpha"],
        case["beta"],
        case["T"],
    )
    loss.backward()
    assert torch.allclose(loss, case["loss"], atol=1e-6, rtol=1e-6)
    assert torch.allclose(student.grad, case["grad_student"], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("case", FIXTURE["torchdistill_kdloss"], ids=lambda c: f"alpha{c['alpha']}")
def test_kd_with_the_task_equals_the_reference(case: dict) -> None:
    loss = kd_task_loss(
        _student(), FIXTURE["teacher_logits"], FIXTURE["target"], case["T"], case["alpha"]
    )
    assert torch.allclose(loss, case["loss"], atol=1e-6, rtol=1e-6)


def test_attention_transfer_equals_the_reference() -> None:
    case = FIXTURE["attention_transfer"]
    assert torch.allclose(
        of.attention_transfer_loss(case["f_s"], case["f_t"], case["p"]), case["loss"], atol=1e-6
    )
    same = case["f_s"][0]
    assert of.attention_transfer_loss([same], [torch.cat([same, same], 1)]).item() == pytest.approx(
        0, abs=1e-6
    )


def test_dkd_with_the_teachers_own_weight_of_the_rest_is_kd() -> None:
    s, t, y = torch.randn(1, 6), torch.randn(1, 6), torch.tensor([2])
    rest = 1 - (t / 3).softmax(-1)[0, 2].item()  # equation 7: KD = TCKD + (1 − p(label)) · NCKD
    assert torch.allclose(dkd_loss(s, t, y, 1.0, rest, 3.0), kd_loss(s, t, 3.0), atol=1e-5)


def test_wrong_answers_of_a_teacher_are_replaced_by_the_smoothed_label() -> None:
    teacher = torch.tensor([[4.0, 0.0, 0.0], [4.0, 0.0, 0.0]])
    targets = corrected_targets(teacher, torch.tensor([0, 1]), 2.0, 0.3).exp()
    assert torch.allclose(targets[0], (teacher[0] / 2).softmax(-1))
    assert torch.allclose(targets[1], torch.tensor([0.1, 0.8, 0.1]), atol=1e-6)
    s = torch.randn(2, 3)
    right = torch.tensor([0, 0])
    assert torch.allclose(
        soft_target_loss(s, corrected_targets(teacher, right, 2.0, 0.3), 2.0),
        kd_loss(s, teacher, 2.0),
    )


def test_a_hard_lesson_is_the_class_the_teacher_chose() -> None:
    s, t = torch.randn(3, 4), torch.randn(3, 4)
    assert torch.allclose(hard_loss(s, t), F.cross_entropy(s, t.argmax(-1)))


def test_rkd_equals_the_formula_and_knows_no_scale() -> None:
    s, t = torch.randn(5, 3), torch.randn(5, 7)
    gaps = [torch.cdist(x, x) for x in (s, t)]
    scaled = [g / (g.sum() / 20) for g in gaps]  # 5 · 4 ordered pairs
    assert torch.allclose(of.rkd_distance_loss(s, t), F.smooth_l1_loss(*scaled), atol=1e-5)
    a, b, c = t[0], t[1], t[2]
    assert torch.allclose(
        of._angles(t)[1, 0, 2], F.cosine_similarity(a - b, c - b, dim=0), atol=1e-5
    )
    for loss in (of.rkd_distance_loss, of.rkd_angle_loss):
        assert loss(3 * t, t).item() == pytest.approx(0, abs=1e-6)
        x = s.clone().requires_grad_(True)
        loss(x, t).backward()
        assert x.grad is not None
        assert x.grad.isfinite().all()
    assert of.rkd_distance_loss(s[:1], t[:1]).item() == 0


def test_relations_of_tokens_equal_the_formula() -> None:
    q, k = torch.randn(2, 4, 6), torch.randn(2, 4, 6)
    wide = torch.randn(2, 4, 12), torch.randn(2, 4, 12)
    want = torch.zeros(())
    for head in range(2):
        s = (q[..., 3 * head : 3 * head + 3] @ k[..., 3 * head : 3 * head + 3].mT / 3**0.5).softmax(
            -1
        )
        t = (
            wide[0][..., 6 * head : 6 * head + 6]
            @ wide[1][..., 6 * head : 6 * head + 6].mT
            / 6**0.5
        ).softmax(-1)
        want = want + (t * (t / s).log()).sum(-1).mean() / 2
    assert torch.allclose(of.relation_loss((q, k), wide, 2), want, atol=1e-6)
    assert of.relation_loss((q, k), (q, k), 3).item() == pytest.approx(0, abs=1e-6)


def test_the_hierarchical_loss_weighs_levels_by_halves() -> None:
    a, b = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    pooled = [F.mse_loss(F.adaptive_avg_pool2d(a, n), F.adaptive_avg_pool2d(b, n)) for n in (2, 1)]
    want = (F.mse_loss(a, b) + pooled[0] / 2 + pooled[1] / 4) / 1.75
    assert torch.allclose(of.hierarchical_loss(a, b), want, atol=1e-6)
    assert of.cosine_loss(a, 3 * a).item() == pytest.approx(0, abs=1e-6)


def test_features_of_all_kinds_become_maps() -> None:
    x = torch.randn(2, 6, 8, 4)  # 6 channels, 8 high, 4 wide
    tokens = torch.cat([torch.full((2, 3, 6), 9.0), x.flatten(2).mT], 1)
    assert torch.equal(as_map(tokens, -1, prefix=3, aspect=2.0), x)
    assert torch.equal(as_map(x.permute(0, 2, 3, 1), -1), x)
    assert torch.equal(as_map(x, 1), x)
    assert as_map(x[:, :, 0, 0], -1).shape == (2, 6, 1, 1)
    with pytest.raises(GreenvisError, match="35 tokens lie on no grid"):
        as_map(tokens, -1)
    small, large = torch.randn(1, 2, 4, 4), torch.randn(1, 2, 8, 2)
    assert [m.shape[2:] for m in of.on_one_grid(small, large)] == [(4, 2), (4, 2)]


def test_review_gives_each_level_the_teachers_shape_and_reads_the_deeper_ones() -> None:
    review = Review([(4, 6), (5, 7)], width=3)
    maps = [torch.randn(2, 4, 8, 8), torch.randn(2, 5, 4, 4, requires_grad=True)]
    first, last = review(maps, [(8, 8), (2, 2)])
    assert (first.shape, last.shape) == ((2, 6, 8, 8), (2, 7, 2, 2))
    (grad,) = torch.autograd.grad(first.sum(), maps[1])
    assert grad.abs().sum() > 0


def test_teachers_are_weighed() -> None:
    y = torch.tensor([0, 1])
    right, wrong = F.one_hot(y, 3) * 4.0, F.one_hot(1 - y, 3) * 4.0
    logits = torch.stack([right, right, wrong])
    weigh = {how: teaching.weights_of(how, logits, y, [1, 1, 1], 1.0, torch.zeros(3)) for how in
             ("fixed", "agreement", "confidence", "learned")}  # fmt: skip
    assert all(torch.allclose(w.sum(0), torch.ones(2)) for w in weigh.values())
    assert torch.allclose(weigh["fixed"], torch.full((3, 2), 1 / 3))
    assert torch.allclose(weigh["learned"], weigh["fixed"])
    for how in ("agreement", "confidence"):
        assert (weigh[how][0] > 1.05 * weigh[how][2]).all()
    ce = torch.stack([F.cross_entropy(z, y, reduction="none") for z in logits]).exp()
    assert torch.allclose(weigh["confidence"], (1 - ce / ce.sum(0)) / 2, atol=1e-6)
    together = teaching.mixed(logits.log_softmax(-1), weigh["fixed"])
    assert torch.allclose(together.exp(), logits.softmax(-1).mean(0), atol=1e-6)


def test_learned_weights_go_to_the_teacher_who_is_right() -> None:
    y = torch.arange(12) % 3
    logits = torch.stack([F.one_hot(y, 3) * 3.0, F.one_hot((y + 1) % 3, 3) * 3.0])
    learned = torch.zeros(2, requires_grad=True)
    for _ in range(40):
        weights = teaching.weights_of("learned", logits, None, [1, 1], 1.0, learned)
        loss = F.nll_loss(teaching.mixed(logits.log_softmax(-1), weights), y)
        (grad,) = torch.autograd.grad(loss, learned)
        with torch.no_grad():
            learned -= grad
    assert learned.softmax(0)[0] > 0.9


def test_a_residual_hint_teaches_only_what_the_student_lacks() -> None:
    student = torch.randn(2, 4, 3, 3, requires_grad=True)
    extra = torch.randn(2, 4, 3, 3)
    known, lacking = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
    has = known(student).detach()
    loss = hint([known, lacking], student, has + extra)
    assert loss.item() == pytest.approx(
        (extra.square().mean() + (lacking(student) - extra).square().mean()).item(), rel=1e-5
    )
    (grad,) = torch.autograd.grad(loss, student)
    (want,) = torch.autograd.grad(F.mse_loss(lacking(student), extra), student)
    assert torch.allclose(
        grad, want, atol=1e-6
    )  # what can be read off the student already pulls at nothing
    assert torch.allclose(hint([known], student, has), torch.tensor(0.0), atol=1e-6)


def test_conflict_is_none_among_twins_and_total_among_opposites() -> None:
    a = torch.tensor([[5.0, 0.0], [0.0, 5.0]])
    student = torch.zeros(2, 2)
    twins = teaching.conflict(student, torch.stack([a, a]), 1.0)
    opposites = teaching.conflict(student, torch.stack([a, -a]), 1.0)
    assert [round(float(twins[k]), 5) for k in ("disagreement", "kl", "cosine")] == [0, 0, 1]
    assert float(opposites["disagreement"]) == 1
    assert float(opposites["cosine"]) == pytest.approx(-1)
    p, q = a.softmax(-1), (-a).softmax(-1)
    assert float(opposites["kl"]) == pytest.approx(
        float(((p - q) * (p / q).log()).sum(-1).mean() / 2), rel=1e-5
    )
