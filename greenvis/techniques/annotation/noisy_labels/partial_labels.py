"""Learning from candidates: of each image a few classes are known, one of which is right."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from pydantic import Field
from torch import Tensor, nn

from greenvis.core.technique import Installed, Technique, logits_of
from greenvis.techniques.annotation.noisy_labels._losses import BySample, among, candidates_loss


class PartialLabels(Technique):
    """Learn from images of which a few candidate classes are known, each weighed by the answers so
    far (PRODEN: Lv et al., 2020).

    Saves labels: ruling classes out is quicker than naming one. Costs nothing: one forward and
    backward a step, as before. Begins with all candidates alike, which is cross entropy with even
    labels, and trusts the likeliest more with each visit; early mistakes among candidates that
    often come together stay. Labels are probabilities (batch, classes), above 0 for candidates, as
    `data.noise: {rate: 0.3, kind: candidates}` makes them; classes int64 (batch,) are learned as
    ever. Where the loop says which samples a batch holds (recipes do), the weights are of an
    image's visit before, as published; else of the step's own answers.

    Example:
        >>> live = gv.wrap(model, gv.PartialLabels())
        >>> outputs = model(x)
        >>> right = F.one_hot(y, outputs.shape[1])
        >>> candidates = (right + right.roll(1, dims=1)) / 2
        >>> loss = live.criterion(F.cross_entropy)(outputs, candidates)
        >>> bool(loss > 0)
        True
    """

    name = "partial_labels"
    stage = "objective"
    tasks = frozenset({"classification"})
    instead = "its candidates are classes of which one is right: leave it out"
    needs = frozenset({"gradients"})
    examples: ClassVar = ({},)

    momentum: float = Field(
        default=0.0, ge=0, lt=1, description="share of an image's weights that a visit leaves"
    )

    def install(self, model: nn.Module) -> Installed:
        """Leave the model as it is."""
        return InstalledPartialLabels(self)


class InstalledPartialLabels(Installed):
    """Candidates at work."""

    def __init__(self, request: PartialLabels) -> None:
        super().__init__()
        self.request, self.weights = request, BySample()
        self.criterion = self._criterion

    def _criterion(self, task_loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def loss(outputs: Any, y: Tensor) -> Tensor:
            if not y.is_floating_point() or y.dim() != 2:
                return task_loss(outputs, y)
            logits, samples = logits_of(outputs).float(), self.samples
            now = among(logits, y > 0)
            if samples is None or len(samples.positions) != len(y):
                return candidates_loss(logits, now).mean()
            weights = self.weights.rows(samples, y.float() / y.sum(1, keepdim=True))
            if not self.repeated:
                keep = self.request.momentum
                self.weights.put(samples, keep * weights + (1 - keep) * now)
            return candidates_loss(logits, weights).mean()

        return loss

    def state_dict(self) -> dict[str, Tensor]:
        """Return the weights by sample."""
        return self.weights.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Load what `state_dict` returned."""
        self.weights.load_state_dict(state)
