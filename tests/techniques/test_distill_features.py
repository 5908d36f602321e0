"""Distillation across architectures, of several teachers, kept and live; hooks that never leak;
requests that cannot be."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hosts import HOSTS
from torch import Tensor, nn

import greenvis as gv
from greenvis.core.technique import Samples
from greenvis.errors import BadInput, GreenvisError
from greenvis.models.structure import view
from greenvis.techniques.inference.distill._layers import TapPoint, Taps, features, thinned
from greenvis.techniques.inference.distill.distill import CacheOptions


def _vit(depth: int = 2, dim: int = 16, heads: int = 2, **more: Any) -> nn.Module:
    from timm.models.vision_transformer import VisionTransformer

    return VisionTransformer(
        img_size=32,
        patch_size=8,
        embed_dim=dim,
        depth=depth,
        num_heads=heads,
        num_classes=5,
        **more,
    )


def _cnn(width: int = 8) -> nn.Module:
    from timm.models.resnet import BasicBlock, ResNet

    return ResNet(BasicBlock, (1, 1, 1, 1), num_classes=5, channels=(width,) * 4, stem_width=8)  # type: ignore[arg-type]


def _batch(size: int = 32, n: int = 4) -> tuple[Tensor, Tensor]:
    return torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(0)), torch.arange(
        n
    ) % 5


def _step(live: Any, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    logits = live.model(x)
    terms = live.terms(x, y, logits)
    (live.criterion(F.cross_entropy)(logits, y) + sum(terms.values())).backward()
    return terms


KINDS = [
    {"kind": "hint"},
    {"kind": "hint", "residual": True},
    {"kind": "attention_transfer"},
    {"kind": "review"},
    {"kind": "rkd"},
    {"kind": "cosine"},
]


@pytest.mark.one_in(3)
@pytest.mark.parametrize("loss", KINDS, ids=lambda k: k["kind"] + "-residual" * ("residual" in k))
@pytest.mark.parametrize("pair", ["vit<cnn", "cnn<vit"])
def test_features_of_another_architecture(loss: dict[str, Any], pair: str) -> None:
    """Tokens learn from maps and maps from tokens, at another resolution; the student is itself
    again after."""
    student, teacher = (_vit(), _cnn()) if pair == "vit<cnn" else (_cnn(), _vit(depth=3, dim=24))
    x, y = _batch(32 if pair == "vit<cnn" else 64)
    before = {n: v.clone() for n, v in student.state_dict().items()}
    live = gv.wrap(
        student, gv.Distill(teacher=teacher, losses=[loss], size=64 if pair == "vit<cnn" else 32)
    )
    terms = _step(live, x, y)
    assert list(terms) == [f"distill_{loss['kind']}"]
    assert terms[f"distill_{loss['kind']}"].item() > 0
    for name in live.installed[0].trainable:
        assert student.get_parameter(name).grad is not None, name
    first = student.patch_embed.proj if pair == "vit<cnn" else student.conv1
    assert first.weight.grad.abs().sum() > 0
    assert all(p.grad is None for p in teacher.parameters())
    assert all(not m._forward_hooks for m in teacher.modules())
    live.undo()
    assert list(student.state_dict()) == list(before)
    assert all(torch.equal(v, before[n]) for n, v in student.state_dict().items())


def test_projections_are_in_the_delta_and_gone_after_merge(tmp_path: Path) -> None:
    teacher = _cnn()

    def wrapped() -> Any:
        torch.manual_seed(1)
        return gv.wrap(_vit(), gv.Distill(teacher=teacher, losses=[{"kind": "hint"}], size=64))

    live, other = wrapped(), wrapped()
    keys = list(_vit().state_dict())
    with torch.no_grad():
        for p in live.model.parameters():
            p.add_(0.01)
    other.load(live.save(tmp_path))
    assert any("distill_projections" in n for n in live.trainable)
    assert all(
        torch.equal(a, b)
        for a, b in zip(live.trainable.values(), other.trainable.values(), strict=True)
    )
    x, y = _batch()
    assert torch.equal(live.loss(x, y, live.model(x)), other.loss(x, y, other.model(x)))
    weight = live.model.head.weight.detach().clone()
    merged = live.merge()
    assert list(merged.state_dict()) == keys
    assert torch.equal(merged.head.weight, weight)


@pytest.mark.parametrize(
    "teacher", ["torchvision-vit", "transformers-vit", "timm-dinov2-registers"]
)
def test_relations_between_attentions_of_all_kinds(teacher: str) -> None:
    """Fused, separate and multi-head projections, with other widths, heads and prefix tokens."""
    student = _vit(dim=24, heads=6)
    live = gv.wrap(
        student,
        gv.Distill(teacher=HOSTS[teacher].build(), losses=[{"kind": "minilm", "layers": "block"}]),
    )
    terms = _step(live, *_batch())
    assert terms["distill_minilm"].item() > 0
    assert student.blocks[0].attn.qkv.weight.grad.abs().sum() > 0


def test_queries_read_off_a_multihead_are_those_it_uses() -> None:
    from greenvis.techniques.inference.distill._layers import attentions

    model = HOSTS["torchvision-vit"].build().eval()
    ((attention, points),) = attentions(model, view(model, probe=False), "last")
    mha = model.get_submodule(attention.path)
    seen: list[Tensor] = []
    hook = mha.register_forward_hook(lambda m, args, output: seen.append(args[0]))
    taps = Taps(model, list(points.values()))
    model(_batch()[0])
    q, k, v = (taps.take()[points[part].key] if part == "q" else torch.empty(0) for part in "qkv")
    hook.remove()
    assert k.numel() == v.numel() == 0
    width = mha.embed_dim
    assert torch.allclose(
        q, seen[0] @ mha.in_proj_weight[:width].T + mha.in_proj_bias[:width], atol=1e-6
    )


TOKENS = [{"kind": kind} for kind in ("hint", "cosine", "attention_transfer", "review", "minilm")]


def _lesson(loss: dict[str, Any], teacher: nn.Module, **student: Any) -> tuple[Tensor, Tensor, Any]:
    """Return the term, its gradient for what each token of the last layer holds, and the wrapped
    student."""
    torch.manual_seed(3)
    model = _vit(**student)
    live = gv.wrap(model, gv.Distill(teacher=teacher, losses=[{"layers": "last", **loss}]))
    where = model.blocks[-1].attn.qkv if loss["kind"] == "minilm" else model.blocks[-1]
    held: list[Tensor] = []
    hook = where.register_forward_hook(lambda module, args, output: held.append(output))
    x, y = _batch()
    term = live.terms(x, y, live.model(x))[f"distill_{loss['kind']}"]
    hook.remove()
    (gradient,) = torch.autograd.grad(term, held[0], retain_graph=True)
    return term, gradient, live


@pytest.mark.one_in(4)
@pytest.mark.parametrize("registers", [0, 4])
@pytest.mark.parametrize("loss", TOKENS, ids=lambda k: k["kind"])
def test_class_and_register_tokens_get_a_lesson(loss: dict[str, Any], registers: int) -> None:
    """The classifier reads the class token: it must not be what the teacher says nothing of, unless
    asked for."""
    teacher = _vit(depth=3, dim=24, reg_tokens=registers)
    for tokens, taught in (("all", True), ("patches", False)):
        _, gradient, _ = _lesson({**loss, "tokens": tokens}, teacher, reg_tokens=registers)
        assert bool(gradient[:, 0].abs().sum() > 0) is taught
        assert all(bool(gradient[:, 1 + i].abs().sum() > 0) is taught for i in range(registers))
        assert gradient[:, 1 + registers :].abs().sum() > 0
    assert torch.equal(_lesson(loss, teacher)[0], _lesson({**loss, "tokens": "all"}, teacher)[0])


@pytest.mark.parametrize("registers", [(0, 0), (2, 2), (0, 4), (4, 1)])
def test_what_is_compared_are_all_tokens_that_both_have(registers: tuple[int, int]) -> None:
    """Against the formulas, on the tokens as the two models give them."""
    own, theirs = registers
    teacher = _vit(depth=3, reg_tokens=theirs).eval()
    x, _ = _batch()
    for kind in ("cosine", "hint", "attention_transfer", "minilm"):
        term, _, live = _lesson({"kind": kind}, teacher, reg_tokens=own)
        both = []
        for model, count in ((live.model, own), (teacher, theirs)):
            read: list[Tensor] = []
            hook = (
                model.blocks[-1].attn.qkv if kind == "minilm" else model.blocks[-1]
            ).register_forward_hook(lambda module, args, output, read=read: read.append(output))
            with torch.no_grad():
                model(x)
            hook.remove()
            tokens = read[0]
            both.append(torch.cat([tokens[:, : 1 + min(own, theirs)], tokens[:, 1 + count :]], 1))
        s, t = both
        match kind:
            case "cosine":
                expected = (1 - F.cosine_similarity(s, t, dim=2)).mean()
            case "hint":
                ((projection,),) = live.installed[0]._projections.get_submodule("0")
                expected = F.mse_loss(s @ projection.weight[:, :, 0, 0].T + projection.bias, t)
            case "attention_transfer":
                expected = F.mse_loss(*(F.normalize(m.square().mean(2)) for m in (s, t)))
            case _:
                expected = torch.zeros(())
                for a, b in ((0, 1), (2, 2)):
                    logs = []
                    for m in (s, t):
                        q, k = (
                            m.chunk(3, 2)[i].unflatten(2, (2, 8)).transpose(1, 2) for i in (a, b)
                        )
                        logs.append((q @ k.mT / 8**0.5).log_softmax(-1))
                    expected = expected + (logs[1].exp() * (logs[1] - logs[0])).sum(-1).mean()
        assert torch.allclose(term, expected, atol=1e-5), kind


def test_a_teacher_without_class_token_teaches_patches() -> None:
    for kind in ("hint", "cosine", "attention_transfer", "review"):
        terms = [
            _lesson({"kind": kind, "tokens": t}, _cnn().eval())[1][:, 0].abs().sum()
            for t in ("all", "patches")
        ]
        assert terms == [0, 0]


def test_tokens_behind_the_patches_are_put_first() -> None:
    tokens = torch.randn(2, 11, 3)
    turned = torch.cat([tokens[:, 2:], tokens[:, :2]], 1)
    first, behind = TapPoint("x", prefix=2), TapPoint("x", prefix=2, behind=True)
    assert torch.equal(behind.map(turned, 1.0), first.map(tokens, 1.0))
    assert torch.equal(behind.tokens(turned, 1), first.tokens(tokens, 1))


def test_triple_loss_is_three_terms() -> None:
    live = gv.wrap(
        _vit(),
        gv.Distill(
            teacher=_vit(dim=32), losses=[{"kind": "kd"}, {"kind": "cosine", "weight": 0.5}]
        ),
    )
    assert set(_step(live, *_batch())) == {"distill_kd", "distill_cosine"}


@pytest.mark.parametrize("hard", [True, False])
def test_a_distillation_token_learns_apart_from_the_class_token(hard: bool) -> None:
    student = HOSTS["timm-deit-distilled"].build()
    live = gv.wrap(
        student,
        gv.Distill(teacher=_vit(), losses=[{"kind": "token", "hard": hard}], temperature=2.0),
    )
    x, y = _batch()
    logits = student(x)
    live.criterion(F.cross_entropy)(logits, y).backward(retain_graph=True)
    assert student.head_dist.weight.grad is None
    assert student.head.weight.grad.abs().sum() > 0
    student.head.weight.grad = None
    live.loss(x, y, logits).backward()
    assert student.head.weight.grad is None
    assert student.head_dist.weight.grad.abs().sum() > 0
    with pytest.raises(BadInput, match="has no distillation token"):
        gv.wrap(_vit(), gv.Distill(teacher=_vit(), losses=[{"kind": "token"}]))


# -- hooks ----------------------------------------------------------------------------------------


def test_a_copy_of_a_distilled_student_taps_nothing() -> None:
    student, x = _vit(), _batch()[0]
    live = gv.wrap(student, gv.Distill(teacher=_vit(), losses=[{"kind": "attention_transfer"}]))
    logits = student(x)
    twin = copy.deepcopy(student)
    with torch.no_grad():
        for p in twin.parameters():
            p.add_(1.0)
    want = live.terms(x, None, logits)["distill_attention_transfer"].item()
    logits = student(x)
    twin(x)
    assert live.terms(x, None, logits)["distill_attention_transfer"].item() == pytest.approx(want)
    another = gv.wrap(
        twin, gv.Distill(teacher=copy.deepcopy(student), losses=[{"kind": "attention_transfer"}])
    )
    assert another.loss(x, None, twin(x)).item() > 0
    another.undo()
    live.undo()
    assert not any(m._forward_hooks for m in student.modules())


def test_two_students_of_one_teacher_at_once() -> None:
    teacher, x = _vit().train(), _batch()[0]
    students = [_vit(), _cnn()]
    lives = [gv.wrap(s, gv.Distill(teacher=teacher, losses=[{"kind": "hint"}])) for s in students]
    outputs = [s(x) for s in students]
    alone = [live.loss(x, None, o).item() for live, o in zip(lives, outputs, strict=True)]
    lives[0].undo()
    assert not any(m.training for m in teacher.modules())
    assert lives[1].loss(x, None, students[1](x)).item() == pytest.approx(alone[1], rel=1e-4)
    lives[1].undo()
    assert all(m.training for m in teacher.modules())
    assert not any(m._forward_hooks for m in teacher.modules())


def test_a_forward_that_fails_leaves_no_hooks_and_says_what_to_do() -> None:
    student, teacher = _cnn(), _vit()
    live = gv.wrap(student, gv.Distill(teacher=teacher, losses=[{"kind": "hint"}]))
    x, y = _batch(64)
    with pytest.raises(GreenvisError, match=r"does not take images .* give the `size`"):
        live.loss(x, y, student(x))
    assert not any(m._forward_hooks for m in teacher.modules())
    with torch.no_grad():
        logits = student(x)
    with pytest.raises(GreenvisError, match="did not run, with gradients"):
        live.loss(x, y, logits)


def test_taps_hold_nothing_between_steps() -> None:
    model = _vit()
    taps = Taps(model, [TapPoint("blocks.0")], learning=True)
    model(_batch()[0])
    assert taps.take()["blocks.0"].requires_grad
    with pytest.raises(GreenvisError, match="nothing was read"):
        taps.take()
    taps.remove()
    assert not model.blocks[0]._forward_hooks


# -- several teachers -----------------------------------------------------------------------------


@pytest.mark.parametrize("combine", ["fixed", "agreement", "confidence", "learned"])
def test_several_teachers_and_their_conflict(combine: str) -> None:
    torch.manual_seed(0)
    teachers = {"a": _vit(), "b": {"model": _cnn(), "weight": 2.0}, "c": _cnn()}
    losses = [
        {"kind": "kd"},
        {"kind": "hint", "teacher": "a"},
        {"kind": "attention_transfer", "teacher": "b"},
    ]
    live = gv.wrap(_vit(), gv.Distill(teachers=teachers, combine=combine, losses=losses))
    terms = _step(live, *_batch())
    assert {"distill_kd", "distill_hint", "distill_attention_transfer"} <= set(terms)
    assert ("distill_teachers" in terms) == (combine == "learned")
    live.epoch_end()
    facts = live.facts()
    assert set(facts["distill_conflict"]) == {"disagreement", "kl", "cosine"}
    assert facts["distill_conflict"]["kl"][0] > 0
    assert ("distill_teachers" in facts) == (combine == "learned")


def test_equal_teachers_are_as_one() -> None:
    student, teacher = _vit(), _vit()
    x, y = _batch()
    one = gv.wrap(student, gv.Distill(teacher=teacher, losses=[{"kind": "dkd"}]))
    want = one.loss(x, y, student(x)).item()
    one.undo()
    two = gv.wrap(
        student,
        gv.Distill(teachers={"a": teacher, "b": copy.deepcopy(teacher)}, losses=[{"kind": "dkd"}]),
    )
    assert two.loss(x, y, student(x)).item() == pytest.approx(want, rel=1e-3)


# -- cheaper teachers -----------------------------------------------------------------------------


def _train(
    cache: Any, folder: Path, losses: list[dict[str, Any]], epochs: int = 2
) -> tuple[dict[str, Tensor], dict, int]:
    torch.manual_seed(0)
    student, teacher = _cnn(), _vit()
    x, y = _batch(n=12)
    asked: list[int] = []
    live = gv.wrap(student, gv.Distill(teacher=teacher, losses=losses, cache=cache))
    teacher.register_forward_hook(lambda m, args, output: asked.append(len(output)))
    optimizer = torch.optim.SGD(live.param_groups(0.05), momentum=0.9)
    for epoch in range(epochs):
        order = torch.randperm(12, generator=torch.Generator().manual_seed(epoch))
        for at in order.split(4):
            live.set_samples(Samples(folder, {"data": "twelve"}, 12, 1, at))
            _step(live, x[at], y[at])
            optimizer.step()
            optimizer.zero_grad()
            live.step_end()
        live.epoch_end()
    facts = live.facts()
    weights = {n: v.clone() for n, v in live.merge().state_dict().items()}
    return weights, facts, sum(asked)


@pytest.mark.parametrize(
    "losses", [[{"kind": "kd"}], [{"kind": "kd"}, {"kind": "hint"}]], ids=["answers", "features"]
)
def test_cached_and_live_teachers_give_the_same_weights(
    tmp_path: Path, losses: list[dict[str, Any]]
) -> None:
    live, _, asked = _train(False, tmp_path, losses)
    kept, facts, once = _train(True, tmp_path, losses)
    assert (asked, once) == (24, 12)
    assert all(torch.equal(v, kept[n]) for n, v in live.items())
    assert all((f["hits"], f["misses"]) == (12, 12) for f in facts["distill_cache"])
    with pytest.warns(UserWarning, match="computed by an earlier run"):
        again, _, never = _train(True, tmp_path, losses)
    assert never == 4  # the first batch that an earlier run left is asked for again, and compared
    assert all(torch.equal(v, again[n]) for n, v in live.items())


def test_smaller_caches_are_close_and_say_so(tmp_path: Path) -> None:
    student, teacher = _cnn(), _vit()
    x, y = _batch()
    losses, sizes = [], []
    for cache in (False, True, CacheOptions(dtype="fp16"), CacheOptions(dtype="fp16", top_k=1)):
        live = gv.wrap(student, gv.Distill(teacher=teacher, cache=cache, temperature=1.0))
        live.set_samples(Samples(tmp_path, {"data": "four"}, 4, 1, torch.arange(4)))
        losses.append(live.loss(x, y, student(x)).item())
        sizes += [f["bytes"] for f in live.facts().get("distill_cache", [])]
        live.undo()
    assert losses[0] == losses[1]
    assert losses[2] == pytest.approx(losses[0], rel=1e-2)
    assert losses[3] != losses[0]
    assert max(sizes[1:]) < sizes[0]


def test_another_teacher_is_another_cache(tmp_path: Path) -> None:
    x, y = _batch()
    samples = Samples(tmp_path, {"data": "four"}, 4, 1, torch.arange(4))
    for seed, noted in ((0, False), (1, True)):
        torch.manual_seed(seed)
        live = gv.wrap(_cnn(), gv.Distill(teacher=_vit(), cache=True))
        notes: list[str] = []
        live.installed[0].note = notes.append
        live.set_samples(samples)
        _step(live, x, y)
        assert any("weights changed" in n for n in notes) == noted
        live.undo()


def test_a_loop_that_shows_no_samples_is_told() -> None:
    live = gv.wrap(_cnn(), gv.Distill(teacher=_vit(), cache=True))
    with pytest.warns(UserWarning, match="nothing is cached"):
        _step(live, *_batch())


def test_a_teacher_for_the_first_epochs_only() -> None:
    student, teacher = _vit(), _vit()
    asked: list[int] = []
    teacher.register_forward_hook(lambda m, args, output: asked.append(1))
    request = gv.Distill(
        teacher=teacher,
        teacher_epochs=1,
        task_weight=0.5,
        losses=[{"kind": "kd", "warmup_epochs": 2}],
    )
    live = gv.wrap(student, request)
    x, y = _batch()
    logits = student(x)
    task = live.criterion(F.cross_entropy)
    assert task(logits, y).item() == pytest.approx(0.5 * F.cross_entropy(logits, y).item())
    half = live.terms(x, y, logits)["distill_kd"].item()
    state = live.state_dict()
    live.epoch_end()
    assert live.terms(x, y, student(x)) == {}
    assert task(logits, y).item() == pytest.approx(F.cross_entropy(logits, y).item())
    assert len(asked) == 1
    live.load_state_dict(state)
    assert live.terms(x, y, student(x))["distill_kd"].item() == pytest.approx(half)
    live.undo()
    full = gv.wrap(student, gv.Distill(teacher=teacher))
    assert full.loss(x, y, student(x)).item() == pytest.approx(2 * half, rel=1e-5)


def test_a_teacher_that_is_the_students_own_mean() -> None:
    student = _vit()
    live = gv.wrap(student, gv.Distill(teacher="ema", momentum=0.75))
    x, y = _batch()
    own = student.head.weight
    (teacher,) = live.installed[0].teachers.values()
    means = [own.detach().clone()]
    for step in range(5):
        _step(live, x, y)
        with torch.no_grad():
            own.add_(1.0 + step)
        live.step_end()
        momentum = min(0.75, 1 - 1 / (step + 1))
        means.append(momentum * means[-1] + (1 - momentum) * own.detach())
        assert torch.allclose(teacher.module.head.weight, means[-1], atol=1e-5)
    assert not any(p.requires_grad for p in teacher.module.parameters())
    assert "distill.teacher.head.weight" in live.state_dict()


def test_a_teacher_in_half_precision_is_close() -> None:
    student, teacher = _vit(), _vit()
    x, y = _batch()
    losses = []
    for precision in (None, "fp32", "bf16"):
        live = gv.wrap(student, gv.Distill(teacher=teacher, precision=precision))
        losses.append(live.loss(x, y, student(x)).item())
        live.undo()
    assert losses[0] == losses[1]
    assert losses[2] != losses[0]
    assert losses[2] == pytest.approx(losses[0], rel=0.1)


def test_a_teacher_of_colours_sees_grey_images_in_all_three() -> None:
    student = nn.Sequential(nn.Flatten(), nn.Linear(32 * 32, 5))
    teacher = _vit()
    x = torch.rand(2, 1, 32, 32)
    live = gv.wrap(student, gv.Distill(teacher=teacher, temperature=1.0))
    want = F.kl_div(
        student(x).log_softmax(-1),
        teacher(x.expand(-1, 3, -1, -1)).softmax(-1),
        reduction="batchmean",
    )
    assert live.loss(x, None, student(x)).item() == pytest.approx(want.item(), rel=1e-4)


# -- layers and requests --------------------------------------------------------------------------


def test_layers_by_role_number_and_path() -> None:
    model = _vit(depth=3, dim=16)
    found = view(model, probe=False)
    assert [p.path for p in features(model, found, "block")] == ["blocks.0", "blocks.1", "blocks.2"]
    assert [p.path for p in features(model, found, (0, "last", "blocks.1.mlp"))] == [
        "blocks.0",
        "blocks.2",
        "blocks.1.mlp",
    ]
    (head,) = features(model, found, "head")
    assert (head.part, head.width) == ("input", 16)
    assert thinned([1, 2, 3, 4, 5, 6], 3) == [2, 4, 6]
    assert thinned([1, 2, 3], 3) == [1, 2, 3]


@pytest.mark.parametrize(
    ("request_of", "message"),
    [
        ({}, "give either 'teacher' or 'teachers'"),
        ({"teacher": "ema", "teachers": {"a": "ema"}}, "give either"),
        ({"teacher": "ema", "cache": True}, "nothing to cache"),
        ({"teacher": "ema", "losses": [{"kind": "hnt"}]}, "did you mean 'hint'"),
        (
            {"teacher": "ema", "losses": [{"kind": "hint", "beta": 2.0}]},
            "'beta' is no setting of 'hint', which has",
        ),
        (
            {"teacher": "ema", "losses": [{"kind": "kd", "layers": "block"}]},
            "'layers' is no setting of 'kd'",
        ),
        (
            {"teacher": "ema", "losses": [{"kind": "kd", "hard": True, "smoothing": 0.1}]},
            "set one of them",
        ),
        (
            {"teachers": {"one": "ema"}, "losses": [{"kind": "kd", "teacher": "on"}]},
            "no teacher 'on' among 'teachers'; did you mean 'one'",
        ),
        (
            {"teacher": "ema", "losses": [{"kind": "kd", "teacher": "x"}]},
            "no teacher 'x' among 'teachers'",
        ),
        (
            {"teachers": {"a": "ema", "b": "ema"}, "losses": [{"kind": "hint"}]},
            "of one teacher: say which",
        ),
    ],
)
def test_requests_that_cannot_be(request_of: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        gv.Distill(**request_of)


@pytest.mark.parametrize(
    ("losses", "message"),
    [
        (
            [{"kind": "hint", "layers": "blocks.7"}],
            "has no layer 'blocks.7'; did you mean 'blocks.1'",
        ),
        ([{"kind": "hint", "layers": 5}], "has 2 blocks, so there is no block 5"),
        (
            [{"kind": "hint", "layers": "blocks.1", "teacher_layers": "layer9"}],
            "has no layer 'layer9'",
        ),
        ([{"kind": "minilm"}], "ResNet has none"),
    ],
)
def test_layers_that_are_not_there(losses: list[dict[str, Any]], message: str) -> None:
    student = _vit()
    with pytest.raises(BadInput, match=message):
        gv.wrap(student, gv.Distill(teacher=_cnn(), losses=losses))
    assert not any(m._forward_hooks for m in student.modules())


def test_labels_are_asked_for_where_they_are_needed() -> None:
    student, x = _vit(), _batch()[0]
    live = gv.wrap(student, gv.Distill(teacher=_vit(), losses=[{"kind": "dkd"}]))
    with pytest.raises(BadInput, match="needs labels"):
        live.loss(x, None, student(x))
    soft = torch.eye(5)[:4]
    assert live.loss(x, soft, student(x)).item() == live.loss(x, soft.argmax(-1), student(x)).item()


@pytest.mark.slow
def test_a_recipe_resolves_several_teachers_and_keeps_what_they_say(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    from greenvis.meters.record import find, read

    path = tmp_path / "few.yaml"
    path.write_text(
        """
name: few
data: {name: digits, train: 64, test: 32}
model: {ref: timm/vit_tiny_patch16_224, img_size: 8, patch_size: 4, embed_dim: 24, depth: 1, num_heads: 3}
train: {epochs: 2, batch_size: 32, eval_every: 0, threads: 1}
arms:
  wide: {model: {embed_dim: 48}}
  deep: {model: {depth: 2}}
  live:
    techniques: [{distill: {teachers: {a: "run:wide", b: {model: "run:deep", weight: 2}}, losses: [{kind: kd}]}}]
  kept:
    techniques: [{distill: {teachers: {a: "run:wide", b: {model: "run:deep", weight: 2}}, losses: [{kind: kd}], cache: true}}]
"""
    )
    folder = gv.run(path, runs=tmp_path / "runs")
    live, kept = (
        load_file(folder / arm / "seed0" / "model.safetensors") for arm in ("live", "kept")
    )
    assert all(torch.equal(v, kept[n]) for n, v in live.items())
    facts = read(next(iter(find([folder / "kept"])))).facts
    assert [(f["teacher"], f["hits"], f["misses"]) for f in facts["distill_cache"]] == [
        ("a", 64, 64),
        ("b", 64, 64),
    ]
    assert len(facts["distill_conflict"]["kl"]) == 2
