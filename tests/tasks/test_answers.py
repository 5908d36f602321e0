"""What a model's answer and its labels are: named or refused, and compared over classes whatever
their shape."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hosts import HOSTS
from torch import Tensor, nn

import greenvis as gv
from greenvis.errors import BadInput
from greenvis.tasks.answers import class_numbers, logits_of, main_output, task_of

CLASSES, SHAPE = 3, (3, 32, 48)  # unequal, so that a wrong axis shows


def _plain(classes: int = CLASSES) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, classes, 1))


def _lraspp(classes: int = CLASSES) -> nn.Module:
    from torchvision.models.segmentation import lraspp_mobilenet_v3_large

    return lraspp_mobilenet_v3_large(
        weights=None, weights_backbone=None, num_classes=classes
    ).eval()


def _segformer(classes: int = CLASSES) -> nn.Module:
    from transformers import SegformerConfig, SegformerForSemanticSegmentation

    sizes: dict[str, Any] = {
        "hidden_sizes": [16, 32], "patch_sizes": [3, 3], "strides": [4, 2], "sr_ratios": [2, 1],
        "decoder_hidden_size": 16
    }  # fmt: skip
    config = SegformerConfig(
        num_encoder_blocks=2,
        depths=[1, 1],
        num_attention_heads=[1, 2],
        mlp_ratios=[2, 2],
        num_labels=classes,
        **sizes,
    )
    model = SegformerForSemanticSegmentation(config).eval()
    nn.init.normal_(
        model.decode_head.classifier.weight, std=2.0
    )  # it starts so near zero that nothing would differ
    return model


SEGMENTERS = {"plain": _plain, "torchvision": _lraspp, "transformers": _segformer}


def _net(outputs: int = 5) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, stride=4),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, outputs),
    )


class _Returns(nn.Module):
    """A network that answers with what `form` makes of its logits."""

    def __init__(self, form: Any, outputs: int = 5) -> None:
        super().__init__()
        self.net, self.form = _net(outputs), form

    def forward(self, x: Tensor) -> Any:
        return self.form(self.net(x))


@pytest.mark.parametrize("kind", SEGMENTERS)
def test_a_segmenters_answer_is_named(kind: str) -> None:
    assert logits_of(SEGMENTERS[kind]()(torch.rand(2, *SHAPE))).shape[:2] == (2, CLASSES)


def test_what_a_model_leaves_empty_names_nothing() -> None:
    answer = torch.rand(2, CLASSES, 4, 4)
    assert logits_of({"out": answer, "aux": None, "features": None}) is answer
    assert logits_of((None, answer)) is answer
    with pytest.raises(BadInput, match="cannot tell"):
        logits_of({"out": answer, "features": answer})


def test_what_cannot_be_named_is_refused() -> None:
    from transformers import (
        CLIPConfig,
        CLIPModel,
        CLIPVisionConfig,
        CLIPVisionModel,
        CLIPVisionModelWithProjection,
    )

    tiny: dict[str, Any] = {
        "hidden_size": 32,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
    }
    vision = {**tiny, "image_size": 32, "patch_size": 8}
    clip = CLIPModel(
        CLIPConfig(vision_config=vision, text_config={**tiny, "vocab_size": 20}, projection_dim=8)
    )
    x = torch.rand(2, 3, 32, 32)
    ids = torch.tensor([[1, 2, 3]])
    a, b = torch.rand(2, 5), torch.rand(2, 5)
    for output, words in [
        (clip(input_ids=ids, pixel_values=x), "logits_per_image"),
        (
            CLIPVisionModelWithProjection(CLIPVisionConfig(**vision, projection_dim=8))(x),
            "embeddings",
        ),
        (CLIPVisionModel(CLIPVisionConfig(**vision))(x), "embeddings"),
        ((a, b), r"'\(2, 5\)', '\(2, 5\)'"),
        ([a, torch.rand(2, 7)], "say which"),
        ({"colour": a, "shape": b}, "'colour', 'shape'"),
        ({"out": a, "depth": b}, "'out', 'depth'"),
        ({"features": a}, "tensor"),
        ([{"boxes": a, "scores": b}], "no tensor"),
        (None, "NoneType"),
    ]:
        with pytest.raises(BadInput, match=words):
            logits_of(output)
    for output in (a, (a,), (a, None), {"logits": a, "loss": None}, {"out": a, "aux": b}):
        assert logits_of(output) is a
    assert main_output({"colour": a, "shape": b}) is a  # to compare two runs by, not as logits
    assert main_output(
        CLIPVisionModelWithProjection(CLIPVisionConfig(**vision, projection_dim=8))(x)
    ).shape == (2, 8)


def test_tasks_are_told_by_shapes_and_values() -> None:
    logits, dense, ints = torch.rand(4, 3), torch.rand(4, 3, 5, 7), torch.tensor([0, 2, 1, 0])
    one_hot, many = F.one_hot(ints, 3), torch.tensor([[1, 1, 0], [0, 0, 0], [1, 0, 0], [0, 1, 0]])
    for answer, y, task in [
        (logits, ints, "classification"),
        (logits, None, "classification"),
        (logits, one_hot, "classification"),
        (logits, 0.7 * one_hot + 0.1, "classification"),
        (None, ints, "classification"),
        (logits, many, "multilabel"),
        (logits, many.float(), "multilabel"),
        (logits, many.bool(), "multilabel"),
        (None, many.float(), "multilabel"),
        (torch.rand(4, 1), ints, "multilabel"),
        (torch.rand(4, 1), None, "multilabel"),
        (logits, torch.randn(4, 3), "regression"),
        (logits, torch.rand(4), "regression"),
        (torch.rand(4, 1), torch.randn(4, 1), "regression"),
        (None, torch.rand(4), "regression"),
        (dense, torch.zeros(4, 5, 7, dtype=torch.int64), "segmentation"),
        (dense, None, "segmentation"),
        (dense, dense.softmax(1), "segmentation"),
        (dense, torch.rand(4, 5, 7), "regression"),
        (dense, (dense > 0.5).float(), "multilabel"),
    ]:
        assert task_of(answer, y) == task, (answer is not None and answer.shape, y)
    for answer, y, words in [
        (torch.rand(4, 9, 3), ints, "neither"),
        (torch.rand(4), ints, "neither"),
        (dense, ints, "do not go with"),
        (logits, torch.zeros(4, 5, 7, dtype=torch.int64), "do not go with"),
    ]:
        with pytest.raises(BadInput, match=words):
            task_of(answer, y)


def _pixelwise(term: Any, student: Tensor, teacher: Tensor, y: Tensor) -> Tensor:
    """Return a loss of (1, classes) averaged over pixels, one pixel at a time."""
    values = []
    for b in range(len(student)):
        for i in range(student.shape[2]):
            for j in range(student.shape[3]):
                values.append(
                    term(student[b, :, i, j][None], teacher[b, :, i, j][None], y[b, i, j][None])
                )
    return torch.stack(values).mean()


@pytest.mark.parametrize("kind", SEGMENTERS)
def test_distilled_segmenters_are_compared_over_classes_at_each_pixel(kind: str) -> None:
    torch.manual_seed(0)
    student, teacher, x = SEGMENTERS[kind](), SEGMENTERS[kind](), torch.rand(2, *SHAPE)
    s, t = logits_of(student(x)).detach(), logits_of(teacher(x)).detach()
    y = torch.randint(0, CLASSES, (2, *s.shape[2:]))
    losses: dict[str, Any] = {
        "kd": lambda a, b, c: gv_kd(a, b, 4.0),
        "dkd": lambda a, b, c: gv_dkd(a, b, c, 1.0, 8.0, 4.0),
        "hard": lambda a, b, c: F.cross_entropy(a, b.argmax(1)),
    }
    for name, term in losses.items():
        loss = {"kind": "kd", "hard": True} if name == "hard" else {"kind": name}
        live = gv.wrap(student, gv.Distill(teacher=teacher, losses=(loss,)))
        small = (slice(None), slice(None), slice(0, 3), slice(0, 5))
        got = live.loss(x, y, student(x)).item()
        live.undo()
        assert got == pytest.approx(_rows_mean(term, s, t, y).item(), rel=1e-4)
        want = _pixelwise(term, s[small], t[small], y[:, :3, :5])  # and rows are pixels
        assert _rows_mean(term, s[small], t[small], y[:, :3, :5]).item() == pytest.approx(
            want.item(), rel=1e-4
        )


def gv_kd(a: Tensor, b: Tensor, temperature: float) -> Tensor:
    p, q = (b / temperature).softmax(1), (a / temperature).log_softmax(1)
    return temperature**2 * (p * (p.log() - q)).sum(1).mean()


def gv_dkd(
    a: Tensor, b: Tensor, y: Tensor, alpha: float, beta: float, temperature: float
) -> Tensor:
    from greenvis.techniques.inference.distill.distill import dkd_loss

    return dkd_loss(a, b, y, alpha, beta, temperature)


def _rows_mean(term: Any, s: Tensor, t: Tensor, y: Tensor) -> Tensor:
    flat = [z.permute(0, 2, 3, 1).reshape(-1, CLASSES) for z in (s, t)]
    return term(*flat, y.reshape(-1))


def test_several_teachers_of_segmenters_and_labels_that_are_no_classes() -> None:
    student, x = _plain(), torch.rand(2, *SHAPE)
    y = torch.randint(0, CLASSES, (2, *SHAPE[1:]))
    for combine in ("fixed", "agreement", "confidence", "learned"):
        live = gv.wrap(
            student, gv.Distill(teachers={"a": _plain(), "b": _plain()}, combine=combine)
        )
        assert live.loss(x, y, student(x)).isfinite()
        live.undo()
    y[0, 0, 0] = 255
    live = gv.wrap(student, gv.Distill(teacher=_plain(), losses=({"kind": "dkd"},)))
    with pytest.raises(BadInput, match="255 are not all among the 3 classes"):
        live.loss(x, y, student(x))
    live.undo()
    live = gv.wrap(student, gv.Distill(teacher=_plain()))
    assert live.loss(x, y, student(x)).isfinite()  # reads no labels
    with pytest.raises(BadInput, match="resize"):
        class_numbers(y[:, ::2, ::2], student(x), "dkd")


@pytest.mark.parametrize("kind", SEGMENTERS)
def test_a_segmenter_answers_as_before_over_classes(kind: str) -> None:
    torch.manual_seed(0)
    model, x = SEGMENTERS[kind](), torch.rand(2, *SHAPE)
    y = torch.zeros(2, *SHAPE[1:], dtype=torch.int64)
    before = logits_of(model(x)).detach()
    live = gv.wrap(model, gv.Lwf())
    live.end_experience([(x, y)])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    now = logits_of(model(x)).detach()
    p, q = (before / 2).softmax(1), (now / 2).log_softmax(1)
    want = (p * (p.log() - q)).sum(1).mean()
    assert want > 1e-7
    assert live.loss(x, y, model(x)).item() == pytest.approx(want.item(), rel=1e-3)


def _teacher(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model)


READ_CLASSES = {
    "distill": lambda model: gv.Distill(teacher=_teacher(model)),
    "dkd": lambda model: gv.Distill(teacher=_teacher(model), losses=({"kind": "dkd"},)),
    "early_exit": lambda model: gv.EarlyExit(at=(1,), input_shape=(3, 32, 32)),
    "lwf": lambda model: gv.Lwf(),
    "ewc": lambda model: gv.Regularize(),
    "replay": lambda model: gv.Replay(size=4),
    "der": lambda model: gv.Replay(size=4, method="derpp"),
    "gdumb": lambda model: gv.Replay(size=4, method="gdumb", policy="greedy"),
    "ncm": lambda model: gv.Ncm(),
    "packnet": lambda model: gv.PackNet(),
}
WRONG = {
    "multilabel": lambda: torch.tensor(
        [[1.0, 1, 0, 0, 1], [0, 0, 0, 0, 0], [1, 1, 0, 0, 0], [0, 0, 1, 0, 0]]
    ),
    "integer multilabel": lambda: torch.tensor(
        [[1, 1, 0, 0, 1], [0, 0, 0, 0, 0], [1, 1, 0, 0, 0], [0, 0, 1, 0, 0]]
    ),
    "regression": lambda: torch.tensor([0.5, 2.0, -1.0, 0.1]),
    "several numbers": lambda: torch.randn(4, 5),
}


@pytest.mark.one_in(3)
@pytest.mark.parametrize("labels", WRONG)
@pytest.mark.parametrize("technique", READ_CLASSES)
def test_labels_that_are_no_class_per_image_are_refused(technique: str, labels: str) -> None:
    model = HOSTS["timm-vit"].build()
    live = gv.wrap(model, READ_CLASSES[technique](model))
    model.train()
    x, y = torch.rand(4, 3, 32, 32), WRONG[labels]()
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(BadInput, match=r"is right for|one class number per image"):
        live.loss(*live.batch(x, y), None if live.pretext else model(x))
    if technique in ("ncm", "der"):
        with pytest.raises(BadInput, match=r"is right for|one class number per image"):
            live.criterion(F.mse_loss)(model(x), y)
    if technique == "ewc":
        with pytest.raises(BadInput, match="method mas, or si"):
            live.end_experience([(x, y)])
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_one_number_is_no_distribution() -> None:
    for technique in (gv.Distill(teacher=_net(1)), gv.Lwf(), gv.Regularize()):
        model = _net(1)
        live = gv.wrap(model, technique)
        x = torch.rand(4, 3, 32, 32)
        for y in (torch.tensor([0, 1, 1, 0]), torch.rand(4, 1), torch.randn(4)):
            with pytest.raises(BadInput, match="is right for"):
                live.loss(x, y, model(x))
    with pytest.raises(BadInput, match="two or more"):
        gv.wrap(_net(1), gv.EarlyExit(at=("1",), input_shape=(3, 32, 32)))


def test_a_configuration_that_names_its_task_is_read_at_once() -> None:
    for kind in ("multi_label_classification", "regression"):
        for technique in (gv.Distill(teacher=_net()), gv.Lwf(), gv.EarlyExit(at=(1,))):
            model = HOSTS["transformers-vit"].build()
            model.config.problem_type = kind
            with pytest.raises(BadInput, match="is right for"):
                gv.wrap(model, technique)


@pytest.mark.parametrize("labels", WRONG)
def test_what_reads_no_labels_takes_any(labels: str) -> None:
    x, y = torch.rand(4, 3, 32, 32), WRONG[labels]()
    cosine = gv.Distill(
        teacher=_net(7), losses=({"kind": "cosine", "layers": ("0",)},), input_shape=(3, 32, 32)
    )
    for technique in (gv.Regularize(method="mas"), gv.Regularize(method="si"), gv.Bitfit(), cosine):
        model = _net()
        live = gv.wrap(model, technique)
        assert live.loss(x, y, model(x)).isfinite()
        live.end_experience([(x, y)])


@pytest.mark.parametrize(
    "form", [lambda z: {"colour": z, "shape": z}, lambda z: (z, z), lambda z: [{"scores": z}]]
)
def test_without_a_technique_that_reads_answers_any_output_will_do(form: Any) -> None:
    x, y = torch.rand(2, 3, 32, 32), torch.tensor([0, 1])
    model = _Returns(form)
    assert gv.wrap(model).loss(x, y, model(x)).item() == 0.0
    hint = {"kind": "hint", "layers": ("net.0",)}
    features = gv.Distill(teacher=_Returns(form), losses=(hint,), input_shape=(3, 32, 32))
    for technique in (gv.Regularize(method="si"), features):
        model = _Returns(form)
        live = gv.wrap(model, technique)
        assert live.loss(x, y, model(x)).isfinite()
    for technique in (gv.Distill(teacher=_net()), gv.Lwf()):
        model = _Returns(form)
        with pytest.raises(BadInput, match="cannot tell which tensor is the answer"):
            gv.wrap(model, technique).loss(x, y, model(x))
    model = _net()
    with pytest.raises(BadInput, match="cannot tell which tensor is the answer"):
        gv.wrap(model, gv.Distill(teacher=_Returns(form))).loss(x, y, model(x))


def test_mixed_labels_are_classes_still() -> None:
    x = torch.rand(4, 3, 32, 32)
    y = 0.9 * F.one_hot(torch.tensor([0, 1, 2, 3]), 5) + 0.02
    for technique in (gv.Distill(teacher=_net(), losses=({"kind": "dkd"},)), gv.Lwf()):
        model = _net()
        assert gv.wrap(model, technique).loss(x, y, model(x)).isfinite()
