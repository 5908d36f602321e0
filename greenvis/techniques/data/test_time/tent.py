"""Adaptation while the model answers: batch by batch towards surer answers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from greenvis.core.modes import forwarding
from greenvis.core.technique import Installed, Technique
from greenvis.errors import BadInput
from greenvis.tasks.answers import logits_of
from greenvis.techniques._shared.norms import batch_norms, batch_statistics

_NORMS = (nn.modules.batchnorm._BatchNorm, nn.LayerNorm, nn.GroupNorm)


def entropy(logits: Tensor) -> Tensor:
    """Return the entropy of each answer in nats, (batch,), of logits (batch, classes)."""
    logs = logits.float().log_softmax(-1)
    return -(logs.exp() * logs).sum(-1)


class Tent(Technique):
    """Adapt scale and shift of the norms to each batch that is answered, by the entropy of the
    answers (TENT: Wang et al., 2021).

    No labels, no training data; but serving costs a backward each batch, about three times the
    energy, where statistics of the batch alone bring most of the gain. Loses where batches are
    small, or of one class at a time. Batch norms go by the statistics of their batch; a batch of
    one image, which has none, is answered as the model was trained, and adapts nothing. A batch's
    answers are those from before its step. Each `live.served()` begins with the trained weights and
    gives them back at its end. It cannot be merged or exported.

    Example:
        >>> live = gv.wrap(resnet, gv.Tent())
        >>> with live.served() as adapting:
        ...     answers = adapting.eval()(x)
    """

    name = "tent"
    stage = "objective"
    tasks = frozenset({"classification"})
    instead = "entropy over classes is what it lowers: leave it out"
    neutral = None

    lr: float = Field(default=1e-3, gt=0, description="of the step after each batch")
    momentum: float = Field(default=0.9, ge=0, lt=1, description="of these steps")

    def install(self, model: nn.Module) -> Installed:
        """Leave the model as it is. Raises BadInput where it has no norm with scale and shift."""
        norms = [m for m in model.modules() if isinstance(m, _NORMS) and m.weight is not None]
        if not norms:
            raise BadInput(
                f"tent adapts scale and shift of norms, and this {type(model).__name__} has none"
            )
        return InstalledTent(self, model, norms)


class InstalledTent(Installed):
    """Adaptation at work, within `served`."""

    adapts = True
    unmergeable = "learns while it answers, so that no weights hold it"

    def __init__(self, request: Tent, model: nn.Module, norms: list[Any]) -> None:
        super().__init__()
        self.request, self.model = request, model
        parameters = [p for m in norms for p in (m.weight, m.bias) if p is not None]
        self._parameters: list[nn.Parameter] = list(dict.fromkeys(parameters))
        self._by_batch = bool(batch_norms(model))

    @contextmanager
    def served(self) -> Iterator[None]:
        """Have each forward be followed by a step."""
        model, forward = self.model, self.model.forward
        before = [p.detach().clone() for p in self._parameters]
        flags = {p: p.requires_grad for p in model.parameters()}
        velocity = [torch.zeros_like(p) for p in self._parameters]

        def adapting(x: Any, *args: Any, **kwargs: Any) -> Any:
            if self._by_batch and len(x) < 2:
                with torch.no_grad():
                    return forward(x, *args, **kwargs)
            with batch_statistics(model):
                out = forward(x, *args, **kwargs)
            loss = entropy(logits_of(out)).mean()
            gradients = torch.autograd.grad(loss, self._parameters, allow_unused=True)
            self._step(gradients, velocity)
            return out

        for parameter in model.parameters():
            parameter.requires_grad_(False)
        for parameter in self._parameters:
            parameter.requires_grad_(True)
        try:
            with forwarding(model, adapting):
                yield
        finally:
            for parameter, flag in flags.items():
                parameter.requires_grad_(flag)
            with torch.no_grad():
                for parameter, value in zip(self._parameters, before, strict=True):
                    parameter.copy_(value)

    def _step(self, gradients: tuple[Tensor | None, ...], velocity: list[Tensor]) -> None:
        """Go a step of SGD with momentum; one that is not finite is left out."""
        used = [g for g in gradients if g is not None]
        if not used or not torch.stack([g.isfinite().all() for g in used]).all():
            return
        with torch.no_grad():
            for p, v, gradient in zip(self._parameters, velocity, gradients, strict=True):
                if gradient is not None:
                    v.mul_(self.request.momentum).add_(gradient)
                    p.sub_(v, alpha=self.request.lr)
