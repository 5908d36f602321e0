"""Gradients that vary alike in all domains: the variance of the classifier's, in closed form."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from greenvis.core.technique import InputShape, Installed, Technique, logits_of
from greenvis.errors import BadInput, GreenvisError, some
from greenvis.models.structure import view
from greenvis.tasks.answers import CLASSES, require_class_numbers
from greenvis.techniques._shared.heads import linear_head


def gradient_variance(features: Tensor, residuals: Tensor, bias: bool = True) -> Tensor:
    """Return the variance over samples of the gradients of a linear classifier's parameters.

    A sample's gradient of the cross entropy is r·hᵀ, and r for the bias: so that the mean of its
    squares is that of r²·(h²)ᵀ, and no gradient of a sample is ever held.

    Args:
        features: What the classifier is given, h: (batch, dim).
        residuals: Probabilities less the labels, one hot, r: (batch, classes).
        bias: Whether it has one.

    Returns:
        (classes, dim), or (classes, dim + 1) with the bias last; the biased variance.
    """
    h = F.pad(features, (0, 1), value=1.0) if bias else features
    squares = residuals.square().T @ h.square() / len(h)
    return squares - (residuals.T @ h / len(h)).square()


def spread(variances: Tensor) -> Tensor:
    """Return how far the domains' variances lie from their mean, squared, on average.

    Args:
        variances: (domains, …).

    Returns:
        A scalar (equation 4, over the number of parameters, as the authors' code has it).
    """
    return (variances - variances.mean(0)).square().mean()


class Fishr(Technique):
    """Have the classifier's gradients vary alike in all domains of training (Fishr: Rame et al.,
    2022, equation 4).

    For domains unlike those of training, of which there must be two or more: a recipe names them in
    `data.domains.train`, a loop of your own says by `live.set_domains(domains)` before each step
    of which each image is. Costs two small products a step and nothing when served. Seldom better
    than tuned training without it (half a point in DomainBed's average, by its authors). Variances
    are averaged over steps, per domain; the penalty begins after the share `warmup` of all steps,
    for it goes by gradients of a classifier that has learned something. Adds the term "fishr".

    Example:
        >>> live = gv.wrap(model, gv.Fishr(warmup=0.0))
        >>> live.set_domains(torch.arange(len(y)) % 2)
        >>> sorted(live.terms(x, y, model.train()(x)))
        ['fishr']
    """

    name = "fishr"
    stage = "objective"
    needs = frozenset({"gradients"})
    tasks = CLASSES
    instead = "it knows the gradient of a classifier with one class per image: leave it out"
    examples: ClassVar = ({"warmup": 0.0, "weight": 1.0}, {"warmup": 0.0, "decay": 0.0})

    weight: float = Field(default=1000.0, ge=0, description="of the penalty, lambda")
    decay: float = Field(
        default=0.95, ge=0, lt=1, description="share of a domain's variance that a step leaves"
    )
    warmup: float = Field(
        default=0.3, ge=0, lt=1, description="share of the steps before the penalty begins"
    )
    input_shape: InputShape = None

    def install(self, model: nn.Module) -> Installed:
        """Leave the model as it is. Raises BadInput where its classifier is not one linear
        layer."""
        structure = view(model, self.input_shape, probe=False)
        path, *others = structure.role("head")
        if others:
            raise BadInput(
                f"fishr takes one classifier, and this {type(model).__name__} has several: "
                f"{some([path, *others])}"
            )
        return InstalledFishr(self, linear_head(model, structure, path, "fishr"))


class InstalledFishr(Installed):
    """The domains' variances so far."""

    by_domain = True

    def __init__(self, request: Fishr, head: nn.Linear) -> None:
        super().__init__()
        self.request, self.bias = request, head.bias is not None
        self.steps = 0
        self.variances: dict[int, Tensor] = {}
        self._new: dict[int, Tensor] = {}  # with the step's, which its end makes those so far
        self._features: Tensor | None = None
        head.register_forward_pre_hook(self._note)

    def _note(self, module: nn.Module, args: Any) -> None:
        if torch.is_grad_enabled():
            self._features = args[0]

    def terms(self, x: Any, y: Any, logits: Any) -> Mapping[str, Tensor]:
        """Return the penalty; none while it warms up."""
        variances = self._by_domain(y, logits_of(logits))
        if not self._penalised() or len(variances) < 2:
            return {}
        return {"fishr": self.request.weight * spread(torch.stack(list(variances.values())))}

    def _penalised(self) -> bool:
        if not self.request.warmup:
            return True
        if self.total_steps is None:
            raise GreenvisError(
                "fishr begins after a share of all steps: call live.plan(steps) before the first "
                "one, or set warmup: 0"
            )
        return self.steps >= self.request.warmup * self.total_steps

    def _by_domain(self, y: Any, logits: Tensor) -> dict[int, Tensor]:
        """Return each domain's variance with the step's, whose gradient counts as if it alone were
        there (over 1 − decay, as the authors have it)."""
        require_class_numbers(y, "fishr", "give labels as they are, without mixing them")
        features, self._features = self._features, None
        if self.domains is None:
            raise GreenvisError(
                "fishr must know what domain each image is of: call live.set_domains(domains) "
                "before each step; in a recipe name two or more in data.domains.train"
            )
        if features is None or features.shape[:-1] != logits.shape[:-1]:
            raise GreenvisError(
                "fishr did not see what the classifier was given for these answers: give terms the "
                "model's own"
            )
        decay, count = self.request.decay, min(len(self.domains), len(y))
        domains = self.domains[:count].to(y.device)
        known = (domains >= 0) & (y[:count] >= 0)
        h, labels = features[:count].float(), y[:count].clamp(min=0)
        residuals = logits[:count].float().softmax(1) - F.one_hot(labels, logits.shape[1])
        out = {d: v.to(h) / (1 - decay) for d, v in self.variances.items()}
        self._new = dict(self.variances)
        for domain in domains[known].unique().tolist():
            rows = known & (domains == domain)
            if rows.sum() < 2:
                continue
            now = gradient_variance(h[rows], residuals[rows], self.bias)
            before = self.variances.get(domain, torch.zeros_like(now)).to(now)
            mean = decay * before + (1 - decay) * now
            self._new[domain], out[domain] = mean.detach(), mean / (1 - decay)
        return out

    def step_end(self) -> None:
        """Take the step's variances over."""
        self.steps, self.variances = self.steps + 1, self._new

    def state_dict(self) -> dict[str, Tensor]:
        """Return the variances by domain, and the steps so far."""
        return {"steps": torch.tensor(self.steps), **{str(d): v for d, v in self.variances.items()}}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take them back."""
        self.steps = int(state["steps"])
        self.variances = {int(d): v.clone() for d, v in state.items() if d != "steps"}
        self._new = dict(self.variances)
