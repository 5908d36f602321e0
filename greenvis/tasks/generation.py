"""Images that a model draws, judged by the Fréchet distance of features to those of real ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, NamedTuple

from pydantic import Field

from greenvis.errors import BadInput
from greenvis.tasks import answers
from greenvis.tasks.base import Measure, Task, TaskExample

if TYPE_CHECKING:
    from torch import Tensor
    from torchmetrics import Metric


class Drawn(NamedTuple):
    """Images drawn, beside real ones of the same labels.

    Args:
        images: (batch, channels, height, width), in the range of the data.
        real: The same.
    """

    images: Tensor
    real: Tensor


class Generation(Task):
    """Images drawn for labels. The model trains by its own loss: `model(x, y)` returns "loss", or
    {"loss": …}; `model.sample(y)` draws an image for each label.

    Real images are divided in halves by what they show. `frechet` is the distance of what was drawn
    for the labels of one half to the other half, `frechet_floor` that of the two halves: what
    images without fault would reach. Both are of as many images, for the distance falls with their
    number.
    """

    name: ClassVar[str] = "generation"
    form: ClassVar[str] = "generation"
    primary: ClassVar[Measure] = Measure("frechet", "", higher_is_better=False)
    secondary: ClassVar[tuple[Measure, ...] | None] = (
        Measure("frechet_floor", "", higher_is_better=False),
        Measure("class_entropy", "bit"),
    )
    class_axis: ClassVar[int | None] = None
    unit: ClassVar[str] = "generated image"
    model_loss: ClassVar[bool] = True

    features: Annotated[
        Literal["pixels", "random"],
        Field(description="means of 8×8 areas, or 64 features of a fixed random network"),
    ] = "pixels"

    def answer(self, model: Callable[..., Any], x: Any, labels: Any = None) -> Any:
        """Return what the model returns in training, else images drawn for the labels."""
        if getattr(model, "training", False):
            return self.outputs(model(x, labels))
        return Drawn(self._sampled(model, labels), x)

    def serve(self, model: Callable[..., Any], x: Any, labels: Any = None) -> int:
        """Draw an image for each label, and return how many."""
        return len(self._sampled(model, labels))

    def _sampled(self, model: Any, labels: Any) -> Tensor:
        sample = getattr(model, "sample", None)
        if sample is None:
            raise BadInput(
                f"{type(model).__name__} has no `sample`: generation wants a model whose "
                "`sample(labels)` draws images, as plain/vae, or diffusers/UNet2DModel with "
                "`head: images`"
            )
        return sample(labels)

    def outputs(self, raw: Any) -> Any:
        """Return images drawn, or what has a loss. Raises BadInput for what is neither."""
        if isinstance(raw, Drawn):
            return raw
        loss = raw.get("loss") if isinstance(raw, Mapping) else getattr(raw, "loss", None)
        if not answers.is_tensor(loss):
            raise BadInput(
                f"generation wants a model that returns its loss in training, not "
                f"{type(raw).__name__}: return {{'loss': …}} from model(x, y)"
            )
        return raw

    def losses(self, outputs: Any, labels: Any) -> Tensor:
        """Refused: a generator has one loss for a batch."""
        raise BadInput("a generator returns one loss for a batch, none per image")

    def loss(self, outputs: Any, labels: Any) -> Tensor:
        """Return the model's own loss. Raises BadInput for images, which have none."""
        if isinstance(outputs, Drawn):
            raise BadInput("these are images, without a loss: call the generator in train mode")
        return outputs["loss"] if isinstance(outputs, Mapping) else outputs.loss

    def metrics(self, classes: int) -> dict[str, Metric]:
        """Return {"frechet", "frechet_floor", "class_entropy": in bits, of the classes that what
        was drawn looks like}."""
        from greenvis.tasks._frechet import ClassEntropy, Frechet

        return {
            "frechet": Frechet(self.features),
            "frechet_floor": Frechet(self.features, floor=True),
            "class_entropy": ClassEntropy(self.features),
        }

    def check(self, outputs: Any, labels: Any, classes: int | None = None) -> None:
        """Refuse images of another shape than the real ones."""
        if isinstance(outputs, Drawn) and outputs.images.shape != outputs.real.shape:
            raise BadInput(
                f"the model draws {tuple(outputs.images.shape)}, and the data has "
                f"{tuple(outputs.real.shape)}: set in_chans and img_size of the model"
            )
        if isinstance(outputs, Drawn) and outputs.images.dim() != 4:
            raise BadInput(f"images are (batch, …), four axes, not {tuple(outputs.images.shape)}")

    def example(self, size: int) -> TaskExample:
        """Return images by chance beside real ones, labels, the real ones again, and a loss."""
        import torch

        generator = torch.Generator().manual_seed(0)
        drawn, real = torch.rand(2, size, 1, 4, 4, generator=generator)
        labels = torch.arange(size) % 2
        real = real + labels.view(-1, 1, 1, 1)
        return TaskExample(
            Drawn(3 + drawn, real), labels, Drawn(real, real), {"loss": torch.ones(())}
        )
