"""Features that are alike in two domains: labels of one, images of both."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from greenvis.core.technique import InputShape, Installed, OnlyWith, Technique, logits_of
from greenvis.errors import BadInput, GreenvisError
from greenvis.models.structure import view
from greenvis.models.structure.probing import probing
from greenvis.tasks.answers import CLASSES, UNKNOWN
from greenvis.techniques._shared.representation import Representation
from greenvis.techniques.data.adapt import _alignment as losses
from greenvis.techniques.data.adapt._head_input import HeadInput

_CHILD = "align"
_LARGEST = 4096  # a product of features and classes beyond it is randomised,
_RANDOM = 1024  # to so many dimensions
_ADVERSARIAL = ("method", ("dann", "cdan"))


class Align(Technique):
    """Train features that do not tell the source from an unlabelled target domain (DANN: Ganin et
    al., 2016; CDAN: Long et al., 2018; MMD: Long et al., 2015; CORAL: Sun and Saenko, 2016).

    Saves the target's labels; costs twice the images per step, and the source's images each time a
    target comes. `adabn` costs no training at all: compare with it. dann: a discriminator beside
    the classifier learns to tell the domains, and its reversed gradient the features not to; its
    weight grows from 0 to 1 as training goes on, and it differs from seed to seed more than the
    others. cdan: the discriminator sees features by class. mmd, coral: the distance of the means in
    five kernels, of the covariances. Classes in other shares are pulled over each other. Draws from
    the stream "target"; source and target stand in one batch, so that batch norms see both. Adds
    the term "align". `merge` drops the discriminator. Target rows have the label -1: a loop of your
    own takes its loss from `live.criterion(F.cross_entropy)`.

    Example:
        >>> live = gv.wrap(model, gv.Align(method="coral"))
        >>> live.feed(target=[x])  # a loader of images
        >>> images, labels = live.batch(x, y)
        >>> outputs = model(images)
        >>> task_loss = live.criterion(F.cross_entropy)(outputs, labels)
        >>> len(images) == 2 * len(x), sorted(live.terms(images, labels, outputs))
        (True, ['align'])
    """

    name = "align"
    stage = "objective"
    tasks = CLASSES
    instead = "it puts images without a class into the batch: leave it out"
    needs = frozenset({"gradients", "trainable_base"})
    only_with: ClassVar[OnlyWith] = {"hidden": _ADVERSARIAL, "entropy": ("method", ("cdan",))}
    examples: ClassVar = (
        {"hidden": 8}, {"method": "cdan", "hidden": 8}, {"method": "mmd"}, {"method": "coral"},
    )  # fmt: skip

    method: Literal["dann", "cdan", "mmd", "coral"] = Field(
        default="dann", description="what is to be alike"
    )
    weight: float = Field(default=1.0, ge=0, description="factor of the term")
    hidden: int = Field(default=256, ge=1, description="width of the discriminator's two layers")
    entropy: bool = Field(
        default=False, description="images with sure answers count more in telling the domains"
    )
    input_shape: InputShape = None

    def install(self, model: nn.Module) -> Installed:
        """Put the discriminator in, where there is one. Raises BadInput for a model that shows no
        classifier."""
        structure = view(model, self.input_shape, probe=False)
        representation = Representation(model, structure)
        width, random = representation.dim, None
        if self.method == "cdan":
            with probing(model), torch.no_grad():
                classes = logits_of(model(structure.example)).shape[-1]
            if classes * width > _LARGEST:
                random = _matrices(width, classes)
            width = classes * width if random is None else _RANDOM
        names: tuple[str, ...] = ()
        discriminator = None
        if self.method in ("dann", "cdan"):
            discriminator = nn.Sequential(
                nn.Linear(width, self.hidden), nn.ReLU(),
                nn.Linear(self.hidden, self.hidden), nn.ReLU(), nn.Linear(self.hidden, 1),
            )  # fmt: skip
            names = representation.add(_CHILD, discriminator)
        return InstalledAlign(self, names, HeadInput(representation), discriminator, random)


def _matrices(width: int, classes: int) -> tuple[Tensor, Tensor]:
    """Return the random matrices of CDAN's product, the same each time."""
    generator = torch.Generator().manual_seed(0)
    return (
        torch.randn(width, _RANDOM, generator=generator),
        torch.randn(classes, _RANDOM, generator=generator),
    )


class InstalledAlign(Installed):
    """Alignment at work."""

    wants = ("target",)

    def __init__(
        self,
        request: Align,
        names: tuple[str, ...],
        features: HeadInput,
        discriminator: nn.Module | None,
        random: tuple[Tensor, Tensor] | None,
    ) -> None:
        super().__init__(names)
        self.request, self.features = request, features
        self.discriminator, self.random = discriminator, random
        self.steps = 0
        self._rows: tuple[int, int] | None = None  # where the target begins, and how many

    def batch(self, x: Any, y: Any) -> tuple[Any, Any]:
        """Put the target's images behind the labelled ones."""
        if not isinstance(x, Tensor) or y.dim() != 1 or y.is_floating_point():
            raise BadInput("align takes images (batch, …) of one class each, int64 (batch,)")
        target = self.feed("target", x.device).to(x.dtype)
        self._rows = len(x), len(target)
        return torch.cat([x, target]), torch.cat([y, y.new_full((len(target),), UNKNOWN)])

    def terms(self, x: Any, y: Any, logits: Tensor | None) -> Mapping[str, Tensor]:
        """Return {"align": weight · the loss}."""
        if self._rows is None or logits is None:
            raise GreenvisError(
                "align puts images into the batch: call batch(x, y) of the wrapped model before "
                "its forward"
            )
        first, count = self._rows
        rows = slice(0, first + count)
        features = self.features.take(len(x))[rows]
        loss = self._loss(features, logits_of(logits)[rows], first)
        return {"align": self.request.weight * loss}

    def _loss(self, features: Tensor, logits: Tensor, source: int) -> Tensor:
        request = self.request
        if self.discriminator is None:
            distance = losses.mmd if request.method == "mmd" else losses.coral
            return distance(features[:source], features[source:])
        seen = features
        if request.method == "cdan":
            random = self.random and tuple(m.to(features) for m in self.random)
            seen = losses.outer(features, logits, random)  # type: ignore[arg-type]
        factor = losses.reversal_at(self.steps / self.total_steps if self.total_steps else 1.0)
        scores = self.discriminator(losses.reverse_gradient(seen, factor)).squeeze(1)
        return losses.domain_loss(
            scores, source, losses.surety(logits) if request.entropy else None
        )

    def step_end(self) -> None:
        """Count the step."""
        self.steps += 1
        self._rows = None

    def state_dict(self) -> dict[str, Tensor]:
        """Return the steps taken."""
        return {"steps": torch.tensor(self.steps)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Load what `state_dict` returned."""
        self.steps = int(state["steps"])
