"""What comes before a converted model trains: which attentions to convert, and the stage in which
each learns what the original answers to the original's inputs."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from greenvis.models.structure.probing import probing
from greenvis.tasks.answers import main_output
from greenvis.techniques._shared.attach import first
from greenvis.techniques.inference.attention._modules import OwnAttention, Softmax


class Alignment:
    """While it is on, a training forward answers with the original attentions and without
    gradients, so that a step costs a forward and the attentions' backward; their losses are in
    `losses`.

    Args:
        model: Where the attentions are.
        pairs: Each new attention, and a copy of the original.
    """

    def __init__(self, model: nn.Module, pairs: Sequence[tuple[OwnAttention, nn.Module]]) -> None:
        self.pairs = [*pairs]
        self.active = False
        self.losses: list[Tensor] = []
        self.hooks = [
            model.register_forward_pre_hook(self._enter),
            model.register_forward_hook(self._leave, always_call=True),
        ]
        for own, original in self.pairs:
            original.eval().requires_grad_(False)
            own.forward = partial(self._answer, own, original)

    def end(self) -> None:
        """Let the new attentions answer from now on."""
        for hook in self.hooks:
            hook.remove()
        for own, _ in self.pairs:
            vars(own).pop("forward", None)
        self.pairs.clear()

    def _enter(self, model: nn.Module, args: Any) -> None:
        self.losses.clear()
        self.active = model.training and torch.is_grad_enabled()
        if self.active:
            torch.set_grad_enabled(False)

    def _leave(self, model: nn.Module, args: Any, output: Any) -> None:
        if self.active:
            torch.set_grad_enabled(True)
        self.active = False

    def _answer(self, own: OwnAttention, original: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not self.active:
            return OwnAttention.forward(own, *args, **kwargs)
        weight = next(own.parameters())
        target = original.to(weight.device)(*args, **kwargs)
        with torch.enable_grad():
            answer = first(OwnAttention.forward(own, *args, **kwargs)).float()
        goal = first(target).detach().float()
        scale = goal.var().clamp(min=1e-12)
        with torch.enable_grad():
            self.losses.append((answer - goal).square().mean() / scale)
        return target


@torch.no_grad()
def least_harmful(
    model: nn.Module, attentions: Mapping[str, OwnAttention], x: Tensor, count: int
) -> list[str]:
    """Return the attentions to convert, chosen one after another: each time the one whose
    conversion, beside those chosen, leaves the answers closest to the original ones.

    Args:
        model: With all of them converted; each has its core back afterwards.
        attentions: By path.
        x: Images (batch, channels, height, width) that no training step sees.
        count: How many to choose.

    Returns:
        Paths, least harmful first.
    """
    cores = {path: own.core for path, own in attentions.items()}
    softmax = Softmax()

    def answers(converted: Collection[str]) -> Tensor:
        for path, own in attentions.items():
            own.core = cores[path] if path in converted else softmax
        with probing(model):
            return main_output(model(x)).float().log_softmax(-1)

    chosen: list[str] = []
    try:
        exact = answers(())
        while len(chosen) < count:
            harms = {
                path: float(
                    F.kl_div(
                        answers([*chosen, path]), exact, reduction="batchmean", log_target=True
                    )
                )
                for path in attentions
                if path not in chosen
            }
            chosen.append(min(harms, key=lambda path: harms[path]))
    finally:
        for path, own in attentions.items():
            own.core = cores[path]
    return chosen
