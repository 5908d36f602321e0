"""Feature distillation: pretraining again what a frozen base knows, so that fine-tuning gets more
out of it."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, Literal

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from greenvis import models
from greenvis.core.surgery import names_of
from greenvis.core.technique import InputShape, Installed, Technique
from greenvis.errors import BadInput
from greenvis.models.structure import view
from greenvis.models.structure.layout import as_map
from greenvis.tasks.answers import IMAGES, IMAGES_ALONE
from greenvis.techniques._shared.attach import first, like, precise, seat
from greenvis.techniques._shared.frozen import FrozenOutputs, fingerprint, other_model
from greenvis.techniques.iteration.reuse._bases import Base

_CHILD = "feature_distill"


def whitened_loss(predicted: Tensor, target: Tensor, beta: float = 2.0) -> Tensor:
    """Return the smooth L1 distance of predicted features from a base's whitened ones (Wei et al.,
    2022, equation 2).

    Args:
        predicted: (batch, positions, channels).
        target: `whitened` already, of that shape.
        beta: squared below this difference, absolute above.

    Returns:
        A scalar.
    """
    return F.smooth_l1_loss(predicted.to(precise(predicted)), target.to(precise(target)), beta=beta)


def whitened(features: Tensor) -> Tensor:
    """Return features with mean 0 and variance 1 over the channels of each position.

    A layer norm without weights, as Wei et al. (2022) have it: of the biased variance.

    Args:
        features: (batch, positions, channels).

    Returns:
        Of that shape.
    """
    return F.layer_norm(features.to(precise(features)), features.shape[-1:])


class FeatureDistill(Technique):
    """Pretrain a model to give a frozen base's last features, whitened over their channels (FD: Wei
    et al., 2022).

    Saves the energy already spent on the base; costs a forward of the base for each image in the
    phase "base_reuse": once, where views of the images repeat (`data.augment: none`, or
    `data.views`), for its features are kept on disk. A step costs what a supervised one does, for
    all patches are shown. A pretext: labels are not used, and the classifier stays untrained. Adds
    the term "feature_distill", from a linear projection of the model's last block that `merge`
    drops. The base may be any model with blocks, of another width, grid or library; it never
    changes, and is shown the images in its own size, channels, mean and deviation, as far as both
    say theirs. (Of the paper's, a relative position bias and stochastic depth are the model's own
    affair.)

    Example:
        >>> live = gv.wrap(model, gv.FeatureDistill(base=teacher, beta=0.5))
        >>> sorted(live.terms(x, y, model(x)))
        ['feature_distill']
    """

    name = "feature_distill"
    stage = "objective"
    tasks = IMAGES
    instead = IMAGES_ALONE
    role = "base"
    needs = frozenset({"token_grid", "trainable_base"})
    examples = ({"base": copy.deepcopy},)

    base: Any = Field(
        description='a model, or a reference to one: "run:NAME", "file:PATH", "timm/NAME", …'
    )
    beta: float = Field(
        default=2.0,
        gt=0,
        description="difference from which on errors count absolutely, not squared",
    )
    cache: Literal["fp16", "fp32", "off"] = Field(
        default="fp16", description="precision in which the base's features are kept on disk"
    )
    input_shape: InputShape = None

    def install(self, model: nn.Module) -> Installed:
        """Put the projection behind the last block. Raises BadInput for a model or a base without
        blocks."""
        base, what = other_model("the base", self.base, model), type(model).__name__
        structure = view(model, self.input_shape, probe=False)
        last = structure.blocks[-1] if structure.blocks else ""
        layout, block = structure.layouts.get(last), seat(model, last) if last else None
        if layout is None or block is None or len(layout.output) not in (3, 4):
            raise BadInput(
                f"{what} shows no last block whose features could become a base's; `greenvis "
                "inspect` says what it has"
            )
        aspect = structure.input_shape[1] / structure.input_shape[2]
        shape = as_map(
            structure.example.new_zeros(layout.output),
            layout.channels,
            structure.prefix_tokens,
            aspect,
        ).shape
        shown = Base(
            base, structure.input_shape, (shape[2], shape[3]), 1, False, models.pixels_of(model)
        )
        projection = nn.Linear(shape[1], shown.width).to(**like(model))
        block.add_module(_CHILD, projection)
        names = names_of(model, projection.parameters())
        form = {"channels": layout.channels, "prefix": structure.prefix_tokens, "aspect": aspect}
        return InstalledFeatureDistill(
            self, names, model, block, projection, shown, structure.input_shape, form
        )


class InstalledFeatureDistill(Installed):
    """Pretraining at work: the loop's forward is its own."""

    pretext = True

    def __init__(
        self,
        request: FeatureDistill,
        names: tuple[str, ...],
        model: nn.Module,
        block: nn.Module,
        projection: nn.Module,
        base: Base,
        image: tuple[int, int, int],
        form: dict[str, Any],
    ) -> None:
        super().__init__(names)
        self.request, self.model, self.block, self.projection, self.base, self._form = (
            request, model, block, projection, base, form,
        )  # fmt: skip
        self._modes = [(m, m.training) for m in base.model.modules()]
        self._cache: FrozenOutputs | None = None
        self._base_grid = (image, base.grid)
        self._see(base)
        base.model.eval()

    def terms(self, x: Any, y: Any, logits: Tensor | None) -> Mapping[str, Tensor]:
        """Return {"feature_distill"}: `whitened_loss` of images x (batch, channels, height,
        width)."""
        outputs: list[Tensor] = []
        hook = self.block.register_forward_hook(
            lambda module, args, output: outputs.append(first(output))
        )
        with hook:
            self.model(x)
        features = as_map(outputs[-1], **self._form)
        target = self._target(x, (features.shape[2], features.shape[3]))
        predicted = self.projection(features.flatten(2).transpose(1, 2))
        return {"feature_distill": whitened_loss(predicted, target, self.request.beta)}

    def _see(self, base: Base) -> None:
        self.base = base
        base.images.note = lambda text: self.note(text)

    def _target(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """Return the base's features, whitened, (batch, places, channels) on a grid: kept from
        earlier or asked for."""
        shape = (x.shape[1], x.shape[2], x.shape[3])
        # a model that takes images of any size shows its grid only now
        if (shape, grid) != self._base_grid:
            self._base_grid = (shape, grid)
            self._close()
            self._see(Base(self.base.model, shape, grid, 1, False, self.base.images.source))

        def ask() -> Tensor:
            with self.phase("base_reuse"):
                return whitened(self.base.ask(x).features)

        if self.samples is None or self.request.cache == "off":
            return ask()
        if self._cache is None:
            part = (
                f"base {self.base.what}: last block under a layer norm, on "
                f"{self.base.grid}{self.base.images.key}"
            )
            note = lambda text: self.note(text)  # noqa: E731
            self._cache = FrozenOutputs(
                part, fingerprint(self.base.model), dtype=self.request.cache, note=note
            )
        return self._cache.outputs(self.samples, ask, x.device)

    def facts(self) -> Mapping[str, Any]:
        """Return how many of the base's features were read back and computed, and how it was shown
        the images."""
        cached = (
            {"feature_distill_targets": [self._cache.facts()]} if self._cache is not None else {}
        )
        if self.base.images.fact:
            return {**cached, "feature_distill_images": self.base.images.fact}
        return cached

    def undo(self) -> None:
        """Close the cache and give the base its own modes back."""
        self._close()
        for module, training in self._modes:
            module.training = training

    def _close(self) -> None:
        if self._cache is not None:
            self._cache.close()
        self._cache = None
