"""Nearest class mean: a classifier that is computed from a frozen model's features, not trained."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from greenvis.core import distributed
from greenvis.core.surgery import freeze, hold_in_eval
from greenvis.core.technique import InputShape, Installed, Technique
from greenvis.errors import BadInput
from greenvis.models.structure import View, view
from greenvis.tasks.answers import CLASSES, require_class_numbers
from greenvis.techniques._shared.heads import linear_head

Metric = Literal["euclidean", "cosine"]
_UNSEEN = -1e30  # the bias of a class without a mean


def mean_classifier(means: Tensor, metric: Metric = "euclidean") -> tuple[Tensor, Tensor]:
    """Return the linear classifier that answers with the nearest mean.

    Args:
        means: (classes, dim).
        metric: "euclidean": f·μ − ½‖μ‖², which ranks as −½‖f − μ‖² does (Mensink et al., 2013).
            "cosine": f·μ/‖μ‖.

    Returns:
        Weight (classes, dim) and bias (classes,).
    """
    if metric == "cosine":
        return F.normalize(means, dim=1), means.new_zeros(len(means))
    return means, -0.5 * means.square().sum(1)


class Ncm(Technique):
    """Answer with the class whose mean feature is nearest, on a frozen model: the floor that
    continual learning must beat (Mensink et al., 2013; Rebuffi et al., 2017).

    Saves the whole backward, all optimizer memory and any buffer; nothing is forgotten, because
    nothing is trained and each
    mean is that of all its images so far: give it one epoch. Costs accuracy where the features do
    not fit the task. The means are written into the model's own classifier after each step, so the
    merged model is a plain one. All runs in eval. The task loss is 0.

    Example:
        >>> live = gv.wrap(model, gv.Ncm())
        >>> loss = live.criterion(F.cross_entropy)(model(x), y) + live.loss(x, y, model(x))
        >>> live.end_experience([(x, y)])  # each class answers by its mean from here on
    """

    name = "ncm"
    stage = "objective"
    breaks = frozenset({"gradients"})
    tasks = CLASSES
    instead = "a mean is that of the images of one class: train a classifier"
    examples = ({"metric": "cosine"}, {})

    metric: Metric = Field(
        default="euclidean", description="euclidean needs a classifier with a bias"
    )
    input_shape: InputShape = None

    def install(self, model: nn.Module) -> Installed:
        """Freeze all but the classifier. Raises BadInput where that is no linear layer on one
        feature vector per image."""
        structure = view(model, self.input_shape, probe=False)
        heads = [_linear(model, structure, path, self.metric) for path in structure.role("head")]
        names = freeze(model, but=[p for head in heads for p in head.parameters()])
        for module in model.modules():
            hold_in_eval(module)
        return InstalledNcm(self.metric, heads, names)


def _linear(model: nn.Module, structure: View, path: str, metric: Metric) -> nn.Linear:
    head = linear_head(model, structure, path, "ncm")
    if head.bias is None and metric == "euclidean":
        raise BadInput(
            f"'{path}' has no bias, which a euclidean distance needs: choose metric cosine"
        )
    return head


class InstalledNcm(Installed):
    """Sums and counts by class. counts: images of each class so far."""

    def __init__(self, metric: Metric, heads: list[nn.Linear], trainable: tuple[str, ...]) -> None:
        super().__init__(trainable, freezes=True)
        self.metric: Metric = metric
        self.heads = heads
        self.sums = [torch.zeros(h.out_features, h.in_features, dtype=torch.float64) for h in heads]
        self.counts = torch.zeros(heads[0].out_features, dtype=torch.int64)
        self._features: dict[int, Tensor] = {}
        for head in heads:
            head.register_forward_pre_hook(self._note)
        self.criterion = self._nothing

    def _note(self, module: nn.Module, args: Any) -> None:
        if torch.is_grad_enabled():
            self._features[id(module)] = args[0].detach()

    def _nothing(self, task_loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """Return a loss of 0 with a gradient of 0, which takes in the step's features."""

        def loss(logits: Tensor, y: Tensor) -> Tensor:
            require_class_numbers(
                y, "ncm", "give labels as they are, without mixing or smoothing them"
            )
            hot = F.one_hot(y, len(self.counts)).double()
            new = {
                str(i): hot.T @ self._features.pop(id(head)).flatten(1).double()
                for i, head in enumerate(self.heads)
            }
            new["seen"] = hot.sum(0)
            distributed.all_reduce_sum(new, len(y))
            for i, sums in enumerate(self.sums):
                sums += new[str(i)].cpu()
            self.counts += new["seen"].long().cpu()
            return (
                0.0 * torch.stack([p.sum() for head in self.heads for p in head.parameters()]).sum()
            )

        return loss

    @torch.no_grad()
    def step_end(self) -> None:
        """Write the means so far into the classifier."""
        known = self.counts > 0
        if not known.any():
            return
        for head, sums in zip(self.heads, self.sums, strict=True):
            weight, bias = mean_classifier(sums / self.counts.clamp(min=1)[:, None], self.metric)
            head.weight.copy_(weight.to(head.weight))
            if head.bias is not None:
                least = max(_UNSEEN, torch.finfo(head.bias.dtype).min / 1000)
                head.bias.copy_(torch.where(known, bias, least).to(head.bias))

    def facts(self) -> Mapping[str, Any]:
        """Return how many classes have a mean."""
        return {"ncm_classes": int((self.counts > 0).sum())}

    def state_dict(self) -> dict[str, Tensor]:
        """Return sums and counts."""
        return {"seen": self.counts, **{f"sums.{i}": sums for i, sums in enumerate(self.sums)}}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take them back."""
        self.counts = state["seen"].cpu().clone()
        self.sums = [state[f"sums.{i}"].cpu().clone() for i in range(len(self.sums))]
