"""Learning from unlabelled images by agreement: what the model is sure of on a weak view, it is to
say of a strong one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from greenvis.core.technique import Installed, OnlyWith, Technique, logits_of
from greenvis.errors import BadInput, GreenvisError
from greenvis.tasks.answers import UNKNOWN
from greenvis.techniques._shared.views import strong_view

_RAMP = 0.4  # share of the training in which pseudo_label's weight grows


def sure_loss(teaching: Tensor, learning: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """Return the cross entropy with the likeliest class where that is sure (FixMatch: Sohn et al.,
    2020, equation 4).

    Args:
        teaching: logits (batch, classes) that name the class; no gradient flows there.
        learning: logits (batch, classes) of the same images, to be taught.
        threshold: the least probability that counts as sure.

    Returns:
        The mean over all images, those that are not sure counting 0, and the share that is.
    """
    sureness, classes = teaching.detach().float().softmax(1).max(1)
    sure = (sureness >= threshold).to(learning.dtype)
    losses = F.cross_entropy(learning.float(), classes, reduction="none")
    return (losses * sure).mean(), sure.mean()


class Consistency(Technique):
    """Learn from unlabelled images what the model is sure of (FixMatch: Sohn et al., 2020;
    pseudo-labels: Lee, 2013).

    Saves labels, not energy: a step takes (1 + 2 · ratio) times the images (pseudo_label: 1 +
    ratio), and thousands of steps are needed before it pays: compare with the strong augmentation
    alone. Draws from the stream "unlabeled", whose images come weakly augmented as the data says;
    strong views (crop, flip, contrast, brightness, a square cut out) are made here. Labelled, weak
    and strong images stand in one batch, so that batch norms see them together; the loss is a mean
    over all unlabelled images, not over the sure ones. Adds the term "consistency". Unlabelled rows
    have the label -1: a loop of your own takes its loss from `live.criterion(F.cross_entropy)`.

    Example:
        >>> live = gv.wrap(model, gv.Consistency(ratio=1))
        >>> live.feed(unlabeled=[x])  # a loader of images
        >>> images, labels = live.batch(x, y)
        >>> outputs = model(images)
        >>> task_loss = live.criterion(F.cross_entropy)(outputs, labels)
        >>> len(images) == 3 * len(x), sorted(live.terms(images, labels, outputs))
        (True, ['consistency'])
    """

    name = "consistency"
    stage = "objective"
    tasks = frozenset({"classification"})
    instead = "it takes the likeliest of one class per image for its label: leave it out"
    needs = frozenset({"gradients"})
    only_with: ClassVar[OnlyWith] = {
        "area": ("method", ("fixmatch",)), "colour": ("method", ("fixmatch",)),
    }  # fmt: skip
    examples: ClassVar = ({"threshold": 0.1}, {"method": "pseudo_label", "threshold": 0.1})

    method: Literal["fixmatch", "pseudo_label"] = Field(
        default="fixmatch", description="what is taught: a strong view, or the image itself"
    )
    ratio: int = Field(
        default=3, ge=1, description="unlabelled batches a step, each of the labelled one's size"
    )
    weight: float = Field(default=1.0, ge=0, description="factor of the term")
    threshold: float = Field(
        default=0.95, ge=0, lt=1, description="the least probability that is taken for sure"
    )
    area: float = Field(
        default=0.5, gt=0, le=1, description="smallest share of the image that a strong view shows"
    )
    colour: float = Field(
        default=0.6, ge=0, le=1, description="how far a strong view's contrast and brightness go"
    )

    def install(self, model: nn.Module) -> Installed:
        """Leave the model as it is."""
        return InstalledConsistency(self, model)


class InstalledConsistency(Installed):
    """Agreement at work."""

    wants = ("unlabeled",)

    def __init__(self, request: Consistency, model: nn.Module) -> None:
        super().__init__()
        self.request, self.model = request, model
        self.steps = 0
        self._rows: tuple[int, int] | None = None  # where the unlabelled begin, and how many
        self._sure: Tensor | None = None  # share of sure images, summed over the steps

    def batch(self, x: Any, y: Any) -> tuple[Any, Any]:
        """Put the unlabelled images behind the labelled ones."""
        if not isinstance(x, Tensor) or y.dim() != 1 or y.is_floating_point():
            raise BadInput("consistency takes images (batch, …) of one class each, int64 (batch,)")
        more = self.feed("unlabeled", x.device, self.request.ratio).to(x.dtype)
        self._rows = len(x), len(more)
        views = [more]
        if self.request.method == "fixmatch":
            views.append(strong_view(more, self.request.area, self.request.colour))
        unknown = y.new_full((sum(map(len, views)),), UNKNOWN)
        return torch.cat([x, *views]), torch.cat([y, unknown])

    def terms(self, x: Any, y: Any, logits: Tensor | None) -> Mapping[str, Tensor]:
        """Return {"consistency": weight · sure_loss}."""
        if self._rows is None or logits is None:
            raise GreenvisError(
                "consistency puts images into the batch: call batch(x, y) of the wrapped model "
                "before its forward"
            )
        first, count = self._rows
        rows = logits_of(logits)[first:]
        weak, learning = rows[:count], rows[-count:] if self._strong else rows[:count]
        loss, sure = sure_loss(weak, learning, self.request.threshold)
        if not self.repeated:
            self._sure = sure.detach() + (0.0 if self._sure is None else self._sure)
        return {"consistency": self.request.weight * self._ramp() * loss}

    @property
    def _strong(self) -> bool:
        return self.request.method == "fixmatch"

    def _ramp(self) -> float:
        if self._strong or not self.total_steps:
            return 1.0
        return min(1.0, self.steps / (_RAMP * self.total_steps))

    def step_end(self) -> None:
        """Count the step."""
        self.steps += 1
        self._rows = None

    def facts(self) -> Mapping[str, Any]:
        """Return the share of unlabelled images that was sure, over the training."""
        if self._sure is None or not self.steps:
            return {}
        return {"consistency_sure": round(float(self._sure) / self.steps, 4)}

    def state_dict(self) -> dict[str, Tensor]:
        """Return the steps taken, and what was sure in them."""
        sure = torch.zeros(()) if self._sure is None else self._sure.detach().cpu()
        return {"steps": torch.tensor(self.steps), "sure": sure}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Load what `state_dict` returned."""
        self.steps = int(state["steps"])
        device = next((p.device for p in self.model.parameters()), torch.device("cpu"))
        self._sure = state["sure"].to(device, copy=True)
