"""Boxes with classes, by detectors that compute their own loss, as torchvision's do."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from greenvis.errors import BadInput
from greenvis.tasks import answers
from greenvis.tasks.base import Measure, Task, TaskExample

if TYPE_CHECKING:
    from torch import Tensor
    from torchmetrics import Metric

_PARTS = {"boxes", "labels", "scores"}


class Detection(Task):
    """Boxes with classes: labels are a list of {"boxes": float32 (n, 4), x1 y1 x2 y2 in pixels,
    "labels": int64 (n,), from 1 on}, one per image.

    The model is called as torchvision's detectors are: in training with a list of images and the
    labels, for which it returns its losses; else with the images alone, for which it returns a
    list of {"boxes", "scores", "labels"}.
    """

    name: ClassVar[str] = "detection"
    form: ClassVar[str] = "detection"
    primary: ClassVar[Measure] = Measure("map")
    secondary: ClassVar[tuple[Measure, ...] | None] = (Measure("map_50"),)
    class_axis: ClassVar[int | None] = None
    model_loss: ClassVar[bool] = True

    def answer(self, model: Callable[..., Any], x: Any, labels: Any = None) -> Any:
        """Return the model's losses by name in training, else its boxes per image."""
        images = list(x)
        training = bool(getattr(model, "training", False))
        try:
            raw = model(images, labels) if training else model(images)
        except (AttributeError, TypeError) as error:
            if "list" not in str(error) and "positional argument" not in str(error):
                raise
            raise BadInput(
                f"detection calls a model with a list of images, and {type(model).__name__} takes "
                "none: give it `head: boxes`, or take a detector of torchvision"
            ) from error
        return self.outputs(raw)

    def outputs(self, raw: Any) -> Any:
        """Return boxes per image, or losses by name. Raises BadInput for what is neither."""
        if isinstance(raw, list) and all(
            isinstance(o, Mapping) and o.keys() >= _PARTS for o in raw
        ):
            return raw
        if (
            isinstance(raw, Mapping)
            and raw
            and all(answers.is_tensor(v) and v.dim() == 0 for v in raw.values())
        ):
            return raw
        raise BadInput(
            "detection wants a list of {boxes, scores, labels}, one per image, or in training the "
            f"model's losses by name, not {type(raw).__name__}: take a detector as torchvision's, "
            "or give the model `head: boxes`"
        )

    def losses(self, outputs: Any, labels: Any) -> Tensor:
        """Refused: a detector has one loss for a batch."""
        raise BadInput("a detector returns one loss for a batch, none per image")

    def loss(self, outputs: Any, labels: Any) -> Tensor:
        """Return the sum of the model's losses. Raises BadInput for boxes, which have none."""
        import torch

        if not isinstance(outputs, Mapping):
            raise BadInput("these are boxes, without a loss: call the detector in train mode")
        return torch.stack(list(outputs.values())).sum()

    def metrics(self, classes: int) -> dict[str, Metric]:
        """Return {"map": COCO's, over overlaps of 0.5 to 0.95, "map_50"}, 0 to 1."""
        from greenvis.tasks._detection import BoxPrecision

        return {"map": BoxPrecision(), "map_50": BoxPrecision((0.5,))}

    def check(self, outputs: Any, labels: Any, classes: int | None = None) -> None:
        """Refuse outputs and labels that are not one entry per image, and classes below 1."""
        if isinstance(outputs, list):
            for one in outputs:
                if one["boxes"].dim() != 2 or one["scores"].shape != one["boxes"].shape[:1]:
                    raise BadInput(f"boxes are (n, 4), not {tuple(one['boxes'].shape)}")
        if labels is None:
            return
        if not isinstance(labels, list) or (
            isinstance(outputs, list) and len(labels) != len(outputs)
        ):
            raise BadInput(
                "detection wants a list of {boxes, labels}, one per image, not "
                f"{answers.shape_of(labels)}"
            )
        for one in labels:
            if len(one["labels"]) != len(one["boxes"]) or (one["labels"] < 1).any():
                raise BadInput(
                    "each box has a class from 1 on (0 is background): give an image whose boxes "
                    "are not known no training"
                )

    def example(self, size: int) -> TaskExample:
        """Return boxes beside the right ones, the right ones, and losses."""
        import torch

        generator = torch.Generator().manual_seed(0)
        corners = 20 * torch.rand(size, 2, 2, generator=generator)
        boxes = torch.cat(
            [corners, corners + 4 + 8 * torch.rand(size, 2, 2, generator=generator)], 2
        )
        labels = torch.randint(1, 3, (size, 2), generator=generator)
        truths = [{"boxes": b, "labels": n} for b, n in zip(boxes, labels, strict=True)]
        scores = torch.rand(size, 2, generator=generator)
        best = [{**t, "scores": s} for t, s in zip(truths, scores, strict=True)]
        beside = [{**o, "boxes": o["boxes"] + torch.rand((), generator=generator)} for o in best]
        return TaskExample(beside, truths, best, {"box": torch.ones(()), "kind": torch.ones(())})
