"""What a model's answer is, and what its labels are: named by the library or by their shapes, else
refused; never guessed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeGuard, cast

from greenvis.errors import BadInput, some

if TYPE_CHECKING:
    from torch import Tensor

# what answers and labels look like, by the form of a task
FORMS: dict[str, str] = {
    "classification": "one class per image: logits (batch, classes), labels (batch,) or "
    "probabilities (batch, classes)",
    "segmentation": "one class per pixel: logits (batch, classes, height, width), labels (batch, "
    "height, width)",
    "multilabel": "several classes per image, or one yes or no: each output is a probability of "
    "its own",
    "regression": "numbers, not classes",
    "detection": "boxes with classes; the model has its own loss",
    "bags": "one class per bag of images: logits (bags, classes), labels (bags,)",
    "image_text": "images and texts that belong together: embeddings of both",
    "vqa": "a question about each image, answered in words: logits (batch, tokens, vocabulary)",
    "generation": "images that the model draws; it has its own loss",
}
UNKNOWN = -1  # a label that is not known
CLASSES = frozenset({"classification"})  # forms of techniques that want a class number per image
# of those that compare distributions over classes, one per sample or per pixel
PIXELS_TOO = CLASSES | {"segmentation"}
# of those that work on batches of images as one tensor, whatever is answered
IMAGES = PIXELS_TOO | {"multilabel", "regression"}
# what those say to do with another batch
IMAGES_ALONE = (
    "it works on batches of images alone: take a first stage of these, and begin from its model"
)
# of those that go by the tokens of an image, which words follow in a vision–language model
ALL_BUT_VQA = frozenset(FORMS) - {"vqa"}
_SEGMENTERS = {"out", "aux"}  # torchvision's, whose answer is "out"


def is_tensor(value: Any) -> TypeGuard[Tensor]:
    """Whether a value is a tensor: asked without torch, which recipes are read without."""
    return hasattr(value, "shape") and callable(getattr(value, "dim", None))


def logits_of(output: Any) -> Tensor:
    """Return the logits in a model's output.

    Args:
        output: A tensor, a tuple of one, `.logits` (transformers), or "out" (torchvision).

    Returns:
        The tensor that is the answer.

    Raises:
        BadInput: For what says of no tensor that it is the answer: several heads, embeddings, a
            tuple of two.
    """
    if isinstance(output, Mapping):
        parts: Mapping[Any, Any] = {
            key: value for key, value in output.items() if value is not None
        }
        if is_tensor(parts.get("logits")):
            return parts["logits"]
        if is_tensor(parts.get("out")) and parts.keys() <= _SEGMENTERS:
            return parts["out"]
        raise BadInput(_no_logits(output, [str(key) for key in parts]))
    if is_tensor(getattr(output, "logits", None)):
        return output.logits
    if isinstance(output, (tuple, list)):
        tensors = [part for part in output if is_tensor(part)]
        if len(tensors) == 1 and tensors[0].dim() > 0:
            return tensors[0]
        raise BadInput(_no_logits(output, [str(tuple(t.shape)) for t in tensors]))
    if hasattr(output, "shape"):
        return cast(Any, output)
    names = [name for name, value in getattr(output, "__dict__", {}).items() if is_tensor(value)]
    raise BadInput(_no_logits(output, names))


def _no_logits(output: Any, names: Sequence[str]) -> str:
    what = type(output).__name__
    if "logits_per_image" in names:
        way = "where the texts are the classes, these are `logits_per_image`: return that tensor"
    elif any("embeds" in n or n in ("pooler_output", "last_hidden_state") for n in names):
        way = (
            "these are embeddings: use the library's model with a classifier, or a technique that "
            "reads features"
        )
    elif len(names) > 1:
        way = "say which of them is the answer: return that tensor"
    else:
        way = "return a tensor (batch, classes), or an object with `.logits`"
    return (
        f"cannot tell which tensor is the answer in an output of type {what} "
        f"({some(names) if names else 'no tensor'}): "
        f"{way}, from a small module around the model where it cannot be changed"
    )


def main_output(output: Any) -> Tensor:
    """Return the tensor by which two runs of one model are compared; it is not claimed to be
    logits.

    Args:
        output: What a model returned.

    Returns:
        Its logits, else its embedding, else the first tensor.

    Raises:
        BadInput: Where there is no tensor.
    """
    try:
        return logits_of(output)
    except BadInput:
        named = output if isinstance(output, Mapping) else getattr(output, "__dict__", {})
        parts = output if isinstance(output, (tuple, list)) else named.values()
        first = [
            named[key] for key in ("image_embeds", "pooler_output") if is_tensor(named.get(key))
        ]
        for part in (*first, *parts):
            if is_tensor(part) and part.dim() > 0:
                return part
        raise


def mask_classes(logits: Tensor, classes: Sequence[int] | None) -> Tensor:
    """Let some classes alone compete.

    Args:
        logits: (batch, outputs).
        classes: Those that compete; None: all.

    Returns:
        (batch, outputs), -inf for the other classes.
    """
    if classes is None:
        return logits
    away = logits.new_ones(logits.shape[1]).bool()
    away[list(classes)] = False
    return logits.masked_fill(away, -math.inf)


def cross_entropy(logits: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Return the mean cross entropy over labels that are known, 0 with a graph where none is.

    Args:
        logits: (batch, classes, …).
        labels: int64 (batch, …), -1 where not known, or probabilities (batch, classes, …).
        label_smoothing: Share of a label that all classes divide.

    Returns:
        A scalar.
    """
    import torch
    import torch.nn.functional as F

    if labels.is_floating_point():
        return F.cross_entropy(logits, labels, label_smoothing=label_smoothing)
    some_known = (labels != UNKNOWN).any()
    # where nothing is known, any label does: the mean of none is not a number
    targets = torch.where(some_known, labels, logits.detach().argmax(1))
    loss = F.cross_entropy(logits, targets, label_smoothing=label_smoothing, ignore_index=UNKNOWN)
    return loss * some_known.to(loss.dtype)


def class_rows(logits: Tensor) -> Tensor:
    """Return logits with a row per image, or per pixel.

    Args:
        logits: (batch, classes) or (batch, classes, height, width).

    Returns:
        (rows, classes).
    """
    return logits if logits.dim() == 2 else logits.movedim(1, -1).flatten(0, -2)


def class_numbers(y: Any, logits: Tensor, who: str) -> Tensor:
    """Return labels in the order of `class_rows(logits)`.

    Args:
        y: Class numbers, or probabilities.
        logits: (batch, classes) or (batch, classes, height, width).
        who: Who needs them, for the message.

    Returns:
        int64 (rows,).

    Raises:
        BadInput: For what is neither, for labels of another size, and for a label that is no class
            (−1, 255).
    """
    if not is_tensor(y):
        raise BadInput(
            f"{who} needs labels as one tensor, not {type(y).__name__}: give it, or a loss that "
            "reads no labels"
        )
    if y.shape == logits.shape and task_of(logits, y) in PIXELS_TOO:
        return class_rows(y).argmax(-1)
    if not _integer(y) or y.shape != logits.shape[:1] + logits.shape[2:]:
        raise BadInput(f"{who} wants a class number for each of {tuple(logits.shape)}, not labels "
                       f"{shape_of(y)}: resize answer "
                       "or labels so that both have the same places")  # fmt: skip
    numbers, classes = y.flatten().long(), logits.shape[1]
    if y.numel() and (int(numbers.min()) < 0 or int(numbers.max()) >= classes):
        raise BadInput(
            f"{who} reads the label of every place, and {int(numbers.min())} … "
            f"{int(numbers.max())} are not all among the "
            f"{classes} classes: leave places without a label out, or use a loss that reads no "
            "labels"
        )
    return numbers


def require_class_numbers(y: Any, who: str, instead: str) -> None:
    """Refuse labels that are not one class number per image.

    Args:
        y: Labels.
        who: Who needs them, for the message.
        instead: What to do, for the message.

    Raises:
        BadInput: Unless `y` is integers (batch,).
    """
    if not is_tensor(y) or y.dim() != 1 or not _integer(y):
        raise BadInput(
            f"{who} needs one class number per image, integers (batch,), not {shape_of(y)}: "
            f"{instead}"
        )


def task_of(logits: Tensor | None, y: Any) -> str:
    """Return which of `FORMS` an answer and its labels are, by their shapes and values.

    Args:
        logits: The answer; None where the technique works before there is one.
        y: Labels; None, or no tensor, where there are none: then axis 1 of the answer is taken for
            classes.

    Returns:
        A key of `FORMS`.

    Raises:
        BadInput: Where they are none.
    """
    labels = y if is_tensor(y) else None
    if logits is not None:
        if logits.dim() not in (2, 4):
            raise BadInput(
                f"an answer {tuple(logits.shape)} is neither (batch, classes) nor (batch, classes, "
                "height, width): which of "
                "its axes the classes are on is not known; bring it into one of these forms"
            )
        if logits.shape[1] == 1:
            return (
                "regression"
                if labels is not None and labels.is_floating_point() and not _within_one(labels)
                else "multilabel"
            )
    dim = logits.dim() if logits is not None else 2
    of_classes = "classification" if dim == 2 else "segmentation"
    if labels is None:
        return of_classes
    if labels.shape[1:] == logits.shape[1:] if logits is not None else labels.dim() in (2, 4):
        return _of_values(labels, of_classes)
    if _integer(labels) and labels.dim() in ((dim - 1,) if logits is not None else (1, 3)):
        return "classification" if labels.dim() == 1 else "segmentation"
    if labels.is_floating_point():
        return "regression"
    raise BadInput(f"labels {shape_of(labels)} do not go with an answer "
                   f"{tuple(logits.shape) if logits is not None else ''}: "
                   + "; ".join(FORMS.values()))  # fmt: skip


def refuse_task(name: str, forms: frozenset[str] | None, instead: str, form: str) -> None:
    """Refuse a technique for a task it is not right for.

    Args:
        name: Of the technique.
        forms: Of the tasks it is right for; None: of all.
        instead: What to do, for the message.
        form: Of the task, such as a key of `FORMS`.

    Raises:
        BadInput: Where `form` is not among `forms`.
    """
    if forms is not None and form not in forms:
        way = instead or "leave it out"
        words = f" ({FORMS[form]})" if form in FORMS else ""
        raise BadInput(
            f"'{name}' is right for {some(sorted(forms))}, and this is {form}{words}: {way}"
        )


def declared_task(model: Any) -> str | None:
    """Return the task that a transformers model's configuration names, None where it names none."""
    problem_type = getattr(getattr(model, "config", None), "problem_type", None)
    return {"multi_label_classification": "multilabel", "regression": "regression"}.get(
        problem_type or ""
    )


def _of_values(labels: Tensor, of_classes: str) -> str:
    """Tell probabilities, which sum to 1 over classes (axis 1), from independent ones and from
    other numbers."""
    values = labels.float()
    if not values.numel() or bool((values >= 0).all() and (values.sum(1) - 1).abs().max() < 1e-3):
        return of_classes
    return "multilabel" if _within_one(values) else "regression"


def _within_one(values: Tensor) -> bool:
    return not values.numel() or bool(values.min() >= 0 and values.max() <= 1)


def _integer(values: Tensor) -> bool:
    return not (
        values.is_floating_point() or values.is_complex() or str(values.dtype) == "torch.bool"
    )


def shape_of(y: Any) -> str:
    """Return what labels are, in words: dtype and shape, or the type."""
    return (
        f"{str(y.dtype).removeprefix('torch.')} {tuple(y.shape)}"
        if is_tensor(y)
        else type(y).__name__
    )
