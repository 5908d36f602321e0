"""What a model says of its pixels and classes is read: a frozen one is shown its own, and answers
go by name."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import greenvis as gv
from greenvis import models
from greenvis.core import weights
from greenvis.errors import BadInput
from greenvis.experiment import session
from greenvis.meters import record
from greenvis.models.preprocessing import (
    Pixels,
    Renormalise,
    classes_of,
    describe,
    order_of,
    pixels_of,
)

IMAGENET = Pixels((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HALF = Pixels((0.5,) * 3, (0.5,) * 3)
UNEQUAL = Pixels((0.1, 0.2, 0.3), (0.4, 0.7, 0.9))
NAMES = ["cat", "dog", "bird"]


def _timm(name: str = "resnet10t", **options: Any) -> nn.Module:
    return timm.create_model(name, num_classes=3, **options)


def _vit(**options: Any) -> nn.Module:
    size: dict[str, Any] = {
        "img_size": 32,
        "patch_size": 8,
        "embed_dim": 16,
        "depth": 2,
        "num_heads": 2,
    }
    return _timm("vit_tiny_patch16_224", **size, **options)


def _hf(labels: list[str] | None = None) -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    own = (
        {}
        if labels is None
        else {"id2label": dict(enumerate(labels)), "label2id": {n: i for i, n in enumerate(labels)}}
    )
    sizes: dict[str, Any] = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 32,
    }
    return ViTForImageClassification(
        ViTConfig(**sizes, image_size=32, patch_size=8, **own, **({} if own else {"num_labels": 3}))
    )


def _hf_with_processor(folder: Path, **options: Any) -> nn.Module:
    from transformers import ViTForImageClassification, ViTImageProcessor

    _hf(NAMES).save_pretrained(folder)  # type: ignore[operator]
    ViTImageProcessor(**options).save_pretrained(folder)
    return ViTForImageClassification.from_pretrained(folder)


def _plain() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, stride=4),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 3),
    )


def _torchvision() -> nn.Module:
    from torchvision.models import ResNet18_Weights, resnet18

    model: Any = resnet18(num_classes=1000)
    model.weights = ResNet18_Weights.IMAGENET1K_V1  # named, not loaded
    return model


def _watched(model: nn.Module) -> list[Tensor]:
    seen: list[Tensor] = []
    model.register_forward_pre_hook(lambda module, args: seen.append(args[0].clone()))
    return seen


def _images(source: Pixels, channels: int = 3) -> tuple[Tensor, Tensor]:
    """Return pixels from 0 to 1, and the same normalised."""
    torch.manual_seed(0)
    pixels = torch.rand(4, channels, 32, 32)
    of = source.of(channels)
    assert of is not None
    return pixels, _normal(pixels, of)


def _normal(pixels: Tensor, how: Pixels) -> Tensor:
    mean, std = (torch.tensor(v).view(1, -1, 1, 1) for v in how)
    return (pixels - mean) / std


def test_libraries_say_how_their_images_are_normalised(tmp_path: Path) -> None:
    from transformers import TimmWrapperConfig, TimmWrapperForImageClassification

    wrapped = TimmWrapperForImageClassification(
        TimmWrapperConfig(
            architecture="resnet10t", pretrained_cfg={"mean": HALF.mean, "std": HALF.std}
        )
    )
    own = _hf_with_processor(
        tmp_path / "own", image_mean=list(UNEQUAL.mean), image_std=list(UNEQUAL.std)
    )
    plain = _hf_with_processor(tmp_path / "plain", do_normalize=False)
    other = _hf_with_processor(tmp_path / "other", rescale_factor=1 / 127.5)
    for model, want in [
        (_timm(), pixels_of(_timm())),
        (_vit(), HALF),
        (wrapped, HALF),
        (_torchvision(), IMAGENET),
        (own, UNEQUAL),
        (plain, Pixels((0.0,), (1.0,))),
        (other, None),
        (_hf(), None),
        (_plain(), None),
    ]:
        assert pixels_of(model) == want, type(model)
    assert pixels_of(_timm("resnet18")) == IMAGENET
    model = _vit()
    describe(model, mean=UNEQUAL.mean, std=UNEQUAL.std)
    assert pixels_of(model) == UNEQUAL
    describe(model)  # said to be unknown, whatever the library says
    assert pixels_of(model) is None
    with pytest.raises(BadInput, match="as many channels"):
        describe(model, mean=(0.5,))


def test_libraries_name_their_classes() -> None:
    assert classes_of(_hf(NAMES)) == tuple(NAMES)
    assert classes_of(_hf()) is None  # LABEL_0, … are no names
    assert classes_of(_vit()) is None
    assert classes_of(_vit(pretrained_cfg_overlay={"label_names": NAMES})) == tuple(NAMES)
    assert (
        classes_of(_vit(pretrained_cfg_overlay={"label_names": [*NAMES, "fish"]})) is None
    )  # of another head than it has
    named = classes_of(_torchvision())
    assert named is not None
    assert len(named) == 1000


@pytest.mark.parametrize("kind", ["kd", "hint", "reuse", "feature_distill"])
def test_a_frozen_model_is_shown_its_own_pixels(kind: str) -> None:
    student, frozen = _vit(), _vit()
    describe(student, mean=UNEQUAL.mean, std=UNEQUAL.std)
    technique: Any = {
        "kd": lambda: gv.Distill(teacher=frozen),
        "hint": lambda: gv.Distill(teacher=frozen, losses=({"kind": "hint"},)),
        "reuse": lambda: gv.Reuse(base=frozen, rows=4),
        "feature_distill": lambda: gv.FeatureDistill(base=frozen),
    }[kind]()
    pixels, x = _images(UNEQUAL)
    live = gv.wrap(student, technique)
    seen = _watched(frozen)
    live.loss(x, None, None if live.pretext else student(x))
    assert torch.allclose(seen[-1], _normal(pixels, HALF), atol=1e-5)
    assert not torch.allclose(seen[-1], x, atol=1e-2)
    assert "converted from" in str(live.facts())


@pytest.mark.parametrize("teacher", ["timm", "torchvision", "transformers", "file"])
def test_teachers_of_every_library_are_shown_their_own(teacher: str, tmp_path: Path) -> None:
    student = _timm("resnet18")
    if teacher == "file":
        saved = _vit()
        describe(saved, mean=UNEQUAL.mean, std=UNEQUAL.std)
        options = {
            "img_size": 32,
            "patch_size": 8,
            "embed_dim": 16,
            "depth": 2,
            "num_heads": 2,
            "num_classes": 3,
        }
        models.save(
            saved, tmp_path / "t.safetensors", ref="timm/vit_tiny_patch16_224", options=options
        )
        frozen, want = models.build(f"file:{tmp_path / 't.safetensors'}"), UNEQUAL
    elif teacher == "transformers":
        frozen, want = (
            _hf_with_processor(
                tmp_path, image_mean=list(UNEQUAL.mean), image_std=list(UNEQUAL.std)
            ),
            UNEQUAL,
        )
    elif teacher == "torchvision":
        frozen, want = _torchvision(), IMAGENET
        student = _timm("resnet18").eval()
        student.fc = nn.Linear(512, 1000)
        describe(student, mean=HALF.mean, std=HALF.std)
    else:
        frozen, want = _vit(), HALF
    source = pixels_of(student)
    assert source is not None
    pixels, x = _images(source)
    live = gv.wrap(student, gv.Distill(teacher=frozen))
    seen = _watched(frozen)
    student.eval()
    live.loss(x, None, student(x))
    assert torch.allclose(seen[-1], _normal(pixels, want), atol=1e-5)


def test_grey_images_are_converted_and_made_colour() -> None:
    pixels, x = _images(Pixels((0.3,), (0.2,)), 1)
    for channels in (1, 3):
        shown = Renormalise(
            "it",
            Pixels((0.3,), (0.2,)),
            UNEQUAL if channels == 3 else Pixels((0.5,), (0.25,)),
            channels,
        )
        want = UNEQUAL if channels == 3 else Pixels((0.5,), (0.25,))
        assert torch.allclose(
            shown(x), _normal(pixels.expand(-1, channels, -1, -1), want), atol=1e-5
        )
    colour, x = _images(UNEQUAL)
    grey = Renormalise("it", UNEQUAL, Pixels((0.5,), (0.25,)), 1)(x)
    assert torch.allclose(
        grey, _normal(colour.mean(1, keepdim=True), Pixels((0.5,), (0.25,))), atol=1e-5
    )
    same = Renormalise("it", UNEQUAL, UNEQUAL, 3)
    assert same(x) is x
    half = x.bfloat16()
    assert Renormalise("it", UNEQUAL, HALF, 3)(half).dtype == torch.bfloat16


@pytest.mark.parametrize("who", ["teacher", "student", "grey student", "base"])
def test_what_is_not_known_is_noted_once(who: str) -> None:
    x = torch.rand(2, 3, 32, 32)
    if who == "base":
        live: Any = gv.wrap(_vit(), gv.FeatureDistill(base=_hf()))
    elif who == "grey student":  # its library's three channels say nothing of one
        live, x = (
            gv.wrap(_timm("resnet18", in_chans=1), gv.Distill(teacher=_vit(in_chans=1))),
            x[:, :1],
        )
    else:
        pair = (_timm(), _plain()) if who == "teacher" else (_plain(), _timm())
        live = gv.wrap(pair[0], gv.Distill(teacher=pair[1]))
    live.model.eval()
    said: list[str] = []
    for one in live.installed:
        one.note = said.append
    for _ in range(3):
        live.loss(x, None, None if live.pretext else live.model(x))
    assert len(said) == 1
    assert "not known" in said[0]
    assert "greenvis.models.describe" in said[0]
    assert "not known" in str(live.facts())


def test_two_that_say_the_same_are_left_alone() -> None:
    student, teacher = _vit(), _vit()
    x = torch.rand(2, 3, 32, 32)
    live = gv.wrap(student, gv.Distill(teacher=teacher))
    seen = _watched(teacher)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        live.loss(x, None, student(x))
        plain = gv.wrap(_plain(), gv.Distill(teacher=_plain()))
        plain.loss(x, None, plain.model(x))
    assert torch.equal(seen[-1], x)
    assert plain.facts()["distill_images"]["teacher"].startswith("as they come; not known")


def _kd(student: Tensor, teacher: Tensor) -> float:
    p, q = teacher.softmax(1), student.log_softmax(1)
    return float((p * (p.log() - q)).sum(1).mean())


@pytest.mark.parametrize("order", [[2, 0, 1], [1, 0, 2], [0, 1, 2]])
def test_answers_are_compared_by_the_names_of_classes(order: list[int]) -> None:
    student, teacher = _hf(NAMES), _hf([NAMES[i].upper() for i in order])
    x, y = torch.rand(4, 3, 32, 32), torch.tensor([0, 1, 2, 0])
    a, b = student(x).logits.detach(), teacher(x).logits.detach()
    b = 20 * (b - b.mean(0))  # apart, so that another order shows
    with torch.no_grad():
        teacher.classifier.weight.mul_(20)
        teacher.classifier.bias.mul_(20)
    b = teacher(x).logits.detach()
    by_name = torch.stack([b[:, order.index(i)] for i in range(3)], 1)
    live = gv.wrap(student, gv.Distill(teacher=teacher, temperature=1.0))
    assert live.loss(x, y, student(x)).item() == pytest.approx(_kd(a, by_name), rel=1e-4)
    if order != [0, 1, 2]:
        assert abs(_kd(a, by_name) - _kd(a, b)) > 1e-3


def test_a_teacher_of_more_classes_answers_for_the_students() -> None:
    student, teacher = _hf(NAMES), _hf(["fish", "bird", "cat", "horse", "dog"])
    x = torch.rand(4, 3, 32, 32)
    live = gv.wrap(student, gv.Distill(teacher=teacher, temperature=1.0))
    want = _kd(student(x).logits.detach(), teacher(x).logits.detach()[:, [2, 4, 1]])
    assert live.loss(x, None, student(x)).item() == pytest.approx(want, rel=1e-4)


def test_names_that_do_not_match_are_refused_before_anything_changes() -> None:
    for theirs, words in [
        (["cat", "dog", "ship"], "no class 'bird'"),
        (["cat", "dog", "dog", "bird"], "more than one"),
    ]:
        student = _hf(NAMES)
        with pytest.raises(BadInput, match=words):
            gv.wrap(student, gv.Distill(teacher=_hf(theirs)))
        gv.wrap(
            student, gv.Distill(teacher=_hf(theirs), losses=({"kind": "hint"},))
        )  # features have no names
    assert order_of(NAMES, None, "it") is None
    assert order_of(None, NAMES, "it") is None
    assert (
        order_of(["a", "a"], ["a", "a"], "it") is None
    )  # ImageNet has two cranes: alike, place by place
    with pytest.raises(BadInput, match="twice"):
        order_of(["a", "a", "b"], ["b", "a", "c"], "it")


def test_a_kept_answer_is_not_taken_for_another_students(tmp_path: Path) -> None:
    from greenvis.core.technique import Samples
    from greenvis.data.output_cache_files import caches

    x, teacher = torch.rand(3, 3, 32, 32), _vit()
    stored = []
    for mean in (0.5, 0.1, 0.5):
        student = _plain()
        describe(student, mean=(mean,) * 3, std=(0.5,) * 3)
        live = gv.wrap(student, gv.Distill(teacher=teacher, cache=True))
        live.set_samples(Samples(tmp_path, {"images": "x"}, 3, 1, torch.arange(3)))
        live.loss(x, None, student(x))
        stored.append(len([*caches(tmp_path)]))
        live.undo()
    assert stored == [1, 2, 2]


def test_a_file_says_what_its_model_knows_and_an_older_one_nothing(tmp_path: Path) -> None:
    model = _vit()
    options = {
        "img_size": 32,
        "patch_size": 8,
        "embed_dim": 16,
        "depth": 2,
        "num_heads": 2,
        "num_classes": 3,
    }
    place: dict[str, Any] = {"ref": "timm/vit_tiny_patch16_224", "options": options}
    models.save(model, tmp_path / "timm.safetensors", **place)
    assert pixels_of(models.build(f"file:{tmp_path / 'timm.safetensors'}")) == HALF
    describe(model, mean=UNEQUAL.mean, std=UNEQUAL.std, classes=NAMES)
    models.save(model, tmp_path / "own.safetensors", **place)
    again = models.build(f"file:{tmp_path / 'own.safetensors'}")
    assert (pixels_of(again), classes_of(again)) == (UNEQUAL, tuple(NAMES))
    assert classes_of(models.build(f"file:{tmp_path / 'own.safetensors'}", num_classes=5)) is None
    weights.write(tmp_path / "old.safetensors", model.state_dict(), {**place, "card": {}})
    assert (
        pixels_of(models.build(f"file:{tmp_path / 'old.safetensors'}")) is None
    )  # trained on nobody knows what


RECIPE = """\
name: shown
data: {name: digits, train: 40, test: 20, img_size: 8}
model: {ref: timm/vit_tiny_patch16_224, img_size: 8, patch_size: 4, embed_dim: 16, depth: 1, num_heads: 2}
train: {epochs: 1, batch_size: 20, threads: 1}
arms:
  big: {}
  small: {techniques: [{distill: {teacher: run:big}}]}
  other: {techniques: [{distill: {teacher: file:other.safetensors}}]}
meter: {codecarbon: false}
"""


def test_a_recipes_teacher_is_shown_what_it_was_trained_on(tmp_path: Path) -> None:
    options = {
        "img_size": 8,
        "patch_size": 4,
        "embed_dim": 16,
        "depth": 1,
        "num_heads": 2,
        "num_classes": 10,
        "in_chans": 1,
    }
    other = timm.create_model("vit_tiny_patch16_224", **options)
    describe(other, mean=(0.5,), std=(0.25,), classes=[str(i) for i in reversed(range(10))])
    models.save(
        other, tmp_path / "other.safetensors", ref="timm/vit_tiny_patch16_224", options=options
    )
    (tmp_path / "shown.yaml").write_text(RECIPE)
    runs = session.run(tmp_path / "shown.yaml", runs=tmp_path / "runs")
    facts = {r.header["arm"]: r.facts for r in map(record.read, record.find([runs]))}
    assert facts["small"]["distill_images"] == {
        "teacher": "as they come"
    }  # of one recipe, whatever timm's defaults say
    assert facts["other"]["distill_images"]["teacher"].startswith("converted from mean 0.3")
    left = models.build(f"file:{runs / 'small/seed0/model.safetensors'}")
    assert classes_of(left) == tuple(str(i) for i in range(10))
    assert pixels_of(left) == Pixels(
        tuple(facts["small"]["data"]["mean"]), tuple(facts["small"]["data"]["std"])
    )
    assert F.softmax(left(torch.rand(2, 1, 8, 8)), 1).shape == (2, 10)
