"""A classifier of names: an image is of the class whose texts lie nearest."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Annotated, Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field, field_validator
from torch import Tensor, nn

from greenvis import models
from greenvis.core.modes import in_mode
from greenvis.core.technique import ClassNames, Installed, Technique
from greenvis.data.captions import Vocabulary
from greenvis.errors import BadInput
from greenvis.tasks.answers import CLASSES, is_tensor
from greenvis.techniques._shared.attach import like

_CHILD = "zero_shot"
Template = Annotated[str, Field(min_length=1)]


def text_classifier(embeddings: Tensor) -> Tensor:
    """Return the direction of each class: its texts' embeddings of length 1, averaged, of length 1
    again (Radford et al., 2021, section 3.1.4).

    Args:
        embeddings: (classes, templates, features).

    Returns:
        (classes, features).
    """
    return F.normalize(F.normalize(embeddings, dim=-1).mean(1), dim=-1)


class ZeroShot(Technique):
    """Make an image–text model answer with classes that it knows by name alone (CLIP: Radford et
    al., 2021).

    A new class costs a forward of the text encoder for each template: no images, no labels, no
    training. Served it is the image encoder with a linear classifier; the text encoder rests. Loses
    where images and texts of training do not cover the classes: a small encoder knows little of a
    name it has not read, and some training on a few labelled images from here on does better: its
    classifier is a layer like another, which an optimizer may train. The model is a `plain/clip`
    trained here, whose words are known, or any of transformers with `get_text_features` and
    `get_image_features`, with its tokenizer.

    Example:
        >>> from greenvis import models
        >>> clip = models.build("plain/clip", img_size=32, tokens=64)
        >>> models.describe(clip, words=["cat", "dog"])
        >>> live = gv.wrap(clip, gv.ZeroShot(classes=("cat", "dog")))
        >>> tuple(live.model(torch.rand(3, 3, 32, 32)).shape)
        (3, 2)
    """

    name = "zero_shot"
    stage = "base"
    tasks = CLASSES
    instead = "it answers with classes: set `task: classification`"
    neutral = None
    examples: ClassVar = ({"classes": ("cat", "dog")},)

    classes: ClassNames = None
    templates: tuple[Template, ...] = Field(
        default=("{name}",),
        min_length=1,
        description='texts of a class, such as "a picture of {name}"; several are averaged',
    )
    tokenize: Any = Field(
        default=None,
        description="of texts: int64 (texts, length), or what a tokenizer of transformers gives; "
        "the words the model was trained with where absent",
    )

    @field_validator("templates")
    @classmethod
    def _named(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for template in value:
            if "{name}" not in template:
                raise ValueError(f'each template holds "{{name}}", and "{template}" does not')
        return value

    def for_classes(self, names: tuple[str, ...]) -> ZeroShot:
        """Return the request for classes of these names, or of its own, of which there must be as
        many."""
        if self.classes is not None and len(self.classes) != len(names):
            raise BadInput(
                f"zero_shot names {len(self.classes)} classes, and the data has {len(names)}: name "
                "each in its order, or leave `classes` out"
            )
        return super().for_classes(names)

    def install(self, model: nn.Module) -> Installed:
        """Put the classifier on the model, which answers by it. Raises BadInput for a model without
        texts, classes without names, and words that nothing reads."""
        encoder = getattr(model, "model", model)
        if not all(callable(getattr(encoder, f"get_{k}_features", None)) for k in _KINDS):
            raise BadInput(
                f"zero_shot goes by the names of classes, and this {type(model).__name__} reads no "
                "texts: take an image–text model, as plain/clip or hf/clip"
            )
        if not self.classes:
            raise BadInput("zero_shot goes by the names of classes: give `classes`")
        weight = embed(encoder, self.classes, self.templates, self._tokenizer(model))
        scale = getattr(encoder, "logit_scale", None)
        factor = 1.0 if scale is None else scale.detach().exp()
        head = nn.Linear(weight.shape[1], len(weight), bias=False).to(**like(encoder))
        with torch.no_grad():
            head.weight.copy_(factor * weight)
        model.add_module(_CHILD, head)
        model.forward = partial(_answer, encoder, head)
        return InstalledZeroShot()

    def _tokenizer(self, model: nn.Module) -> Callable[[Sequence[str]], Any]:
        if self.tokenize is None:
            words = models.description(model).get("words")
            if words is None:
                raise BadInput(
                    f"nothing says which words this {type(model).__name__} reads: give zero_shot "
                    "`tokenize`, as the model's tokenizer"
                )
            return Vocabulary(tuple(words), int(model.length)).encode  # type: ignore[arg-type]
        if hasattr(self.tokenize, "pad_token"):  # of transformers
            return partial(self.tokenize, padding=True, truncation=True, return_tensors="pt")
        return self.tokenize


_KINDS = ("text", "image")


@torch.no_grad()
def embed(
    encoder: Any,
    classes: Sequence[str],
    templates: Sequence[str],
    tokenize: Callable[[Sequence[str]], Any],
) -> Tensor:
    """Return the directions of classes, (classes, features), by an image–text model's own texts.

    Args:
        encoder: With `get_text_features`.
        classes: Names.
        templates: Each with "{name}".
        tokenize: As `ZeroShot.tokenize`.
    """
    texts = [template.replace("{name}", name) for name in classes for template in templates]
    tokens = tokenize(texts)
    device = next(encoder.parameters()).device
    if is_tensor(tokens):
        inputs = {"input_ids": tokens, "attention_mask": (tokens != 0).long()}
    else:
        inputs = {k: v for k, v in dict(tokens).items() if k in ("input_ids", "attention_mask")}
    with in_mode(encoder, False):
        out = _pooled(encoder.get_text_features(**{k: v.to(device) for k, v in inputs.items()}))
    return text_classifier(out.float().unflatten(0, (len(classes), len(templates))))


def _pooled(output: Any) -> Tensor:
    """Return embeddings, as transformers gives them: alone, or among others."""
    return output if is_tensor(output) else output.pooler_output


def _answer(encoder: Any, head: nn.Module, images: Tensor) -> Tensor:
    return head(F.normalize(_pooled(encoder.get_image_features(pixel_values=images)), dim=-1))


class InstalledZeroShot(Installed):
    """The classifier, on the model."""

    unmergeable = "answers by a classifier that the image–text model has no place for"
