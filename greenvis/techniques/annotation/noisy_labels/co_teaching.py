"""Two networks that choose for each other which labels to learn from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from greenvis.core.technique import Installed, Technique, logits_of
from greenvis.techniques.annotation.noisy_labels._peer import TwoNetworks, one_class_each


def remembered(progress: float, rate: float, ramp: float) -> float:
    """Return R, the share of a batch that is learned from (Han et al., 2018, algorithm 1): all at
    first, 1 - rate from a share `ramp` of the training on."""
    return 1 - rate * min(1.0, progress / ramp if ramp else 1.0)


def smallest(losses: Tensor, share: float) -> Tensor:
    """Return the rows of the smallest losses, int64: a share of them, one at least."""
    count = max(1, int(share * len(losses) + 1e-9))
    return losses.detach().argsort(stable=True)[:count]


def exchanged(first: Tensor, second: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """Return each network's mean loss over the images that are easy to the other, averaged once.

    Args:
        first: Losses of the first network, (batch,).
        second: Of the second, of the same images.
        share: Of the images.
    """
    return first[smallest(second, share)].mean(), second[smallest(first, share)].mean()


class CoTeaching(Technique):
    """Train two networks, each on the images whose label the other finds easy (co-teaching: Han et
    al., 2018).

    Saves labels: those of a crowd will do. Costs a second network in training, so twice the joules
    and memory; served is the first alone, at its own cost. Networks learn right labels before wrong
    ones, and two that began apart make different mistakes. Needs the share of wrong labels (`rate`;
    `greenvis labels` estimates it), and loses where hard images are few: they are taken for wrong.
    The loss is the networks' mean over what was chosen, taken once: published code divides it by
    the count again. Replaces the task loss by the term "co_teaching"; the task's label smoothing is
    not used.

    Example:
        >>> live = gv.wrap(model, gv.CoTeaching(rate=0.25))
        >>> outputs = model(x)
        >>> task_loss = live.criterion(F.cross_entropy)(outputs, y)
        >>> bool(task_loss == 0), sorted(live.terms(x, y, outputs))
        (True, ['co_teaching'])
    """

    name = "co_teaching"
    stage = "objective"
    tasks = frozenset({"classification"})
    instead = "it chooses images by the loss of their one class: leave it out"
    needs = frozenset({"gradients", "trainable_base"})
    examples: ClassVar = ({"rate": 0.5, "ramp": 0.0},)

    rate: float = Field(default=0.2, ge=0, lt=1, description="share of the labels that are wrong")
    ramp: float = Field(
        default=0.1, ge=0, le=1, description="share of the training in which fewer images remain"
    )
    restart: bool = Field(
        default=True,
        description="the second network begins with new weights; else with the model's and a new "
        "classifier, as for pretrained ones",
    )

    def install(self, model: nn.Module) -> Installed:
        """Make the second network. Raises BadInput where other techniques are in the model."""
        return InstalledCoTeaching(self, model)


class InstalledCoTeaching(TwoNetworks):
    """Two networks at work."""

    def __init__(self, request: CoTeaching, model: nn.Module) -> None:
        super().__init__(request.name, model, request.restart)
        self.request, self.steps = request, 0

    def terms(self, x: Any, y: Any, logits: Tensor | None) -> Mapping[str, Tensor]:
        """Return {"co_teaching": the sum of both networks' means}."""
        rows, own = one_class_each(self.request.name, x, y), logits_of(logits).float()
        if not len(rows):
            return {"co_teaching": 0.0 * own.sum()}
        progress = self.steps / self.total_steps if self.total_steps else 1.0
        share = remembered(progress, self.request.rate, self.request.ramp)
        with torch.set_grad_enabled(not self.repeated):  # the peer has its gradient by then
            other = self.peer_logits(x)
        losses = [F.cross_entropy(z[rows], y[rows], reduction="none") for z in (own, other)]
        return {"co_teaching": sum(exchanged(losses[0], losses[1], share), own.new_zeros(()))}

    def step_end(self) -> None:
        """Count the step."""
        self.steps += 1

    def state_dict(self) -> dict[str, Tensor]:
        """Return the second network, and the steps taken."""
        return {**super().state_dict(), "steps": torch.tensor(self.steps)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Load what `state_dict` returned."""
        super().load_state_dict(state)
        self.steps = int(state["steps"])
