"""A second network beside the one that is trained, with weights of its own."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from greenvis.core.attached import below, prefixed
from greenvis.core.distributed import require_single_process
from greenvis.core.technique import Installed, logits_of
from greenvis.errors import BadInput


def second(model: nn.Module, name: str, restart: bool) -> nn.Module:
    """Return a second network like a model.

    Args:
        model: The first.
        name: What asks, for messages.
        restart: Whether it begins with new weights; else with the model's and a new classifier.

    Raises:
        BadInput: Where techniques are in the model, whose copy they would not know.
    """
    require_single_process(name)
    for path, module in model.named_modules():
        if module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module):
            raise BadInput(
                f"{name} trains a second network like the model, and something hangs on "
                f"'{path or type(model).__name__}': leave out what changes the model"
            )
    peer = copy.deepcopy(model)
    learning = [m for m in peer.modules() if [*m.parameters(recurse=False)]]
    for module in learning if restart else learning[-1:]:
        reset = getattr(module, "reset_parameters", None)
        if callable(reset):
            reset()
    return peer


class TwoNetworks(Installed):
    """The model and its peer, trained together.

    Args:
        name: Of the technique.
        model: The first network.
        restart: See `second`.
    """

    def __init__(self, name: str, model: nn.Module, restart: bool) -> None:
        super().__init__()
        self.model, self.peer = model, second(model, name, restart)
        self.criterion = self._criterion

    def _criterion(self, task_loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """Return a loss of 0, with a graph: what both networks learn from is in `terms`."""
        return lambda outputs, *rest, **more: 0.0 * logits_of(outputs).float().sum()

    def peer_logits(self, x: Any) -> Tensor:
        """Return the peer's answers, float32 (batch, classes), in the mode the model is in."""
        self.peer.to(x.device).train(self.model.training)
        return logits_of(self.peer(x)).float()

    def param_groups(self, lr: float) -> list[dict[str, Any]]:
        """Return a group of the peer's parameters."""
        device = next(self.model.parameters()).device
        return [{"params": [*self.peer.to(device).parameters()], "lr": lr}]

    def state_dict(self) -> dict[str, Tensor]:
        """Return the peer's weights and buffers."""
        return prefixed("peer.", self.peer.state_dict())

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Load what `state_dict` returned."""
        self.peer.load_state_dict(below(state, "peer."))


def one_class_each(name: str, x: Any, y: Any) -> Tensor:
    """Return the rows whose label is known. Raises BadInput for a batch that is no images of one
    class each."""
    if not isinstance(x, Tensor) or y.dim() != 1 or y.is_floating_point():
        raise BadInput(f"{name} takes images (batch, …) of one class each, int64 (batch,)")
    return torch.nonzero(y >= 0).squeeze(1)
