"""What holds for a while: train and eval mode, hooks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn
    from torch.utils.hooks import RemovableHandle


@contextmanager
def in_mode(model: nn.Module, training: bool) -> Iterator[None]:
    """Hold a model in train or in eval mode; each of its modules gets its own mode back, however
    the block ends."""
    before = [(module, module.training) for module in model.modules()]
    model.train(training)
    try:
        yield
    finally:
        for module, mode in before:
            module.training = mode


@contextmanager
def learning(model: nn.Module) -> Iterator[None]:
    """Run the model's forward within with gradients, whatever mode it is called in: also in
    `torch.inference_mode`, whose tensors are copied. Answers come without a graph."""
    import torch
    from torch.utils._pytree import tree_map_only

    forward = model.forward

    def outside(*args: Any, **kwargs: Any) -> Any:
        with torch.inference_mode(False), torch.enable_grad():
            copied = tree_map_only(torch.Tensor, torch.Tensor.clone, (args, kwargs))
            out = forward(*copied[0], **copied[1])
            return tree_map_only(torch.Tensor, torch.Tensor.detach, out)

    with forwarding(model, outside):
        yield


@contextmanager
def forwarding(model: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Let a model answer by another forward within."""
    own = vars(model).get("forward")
    model.forward = forward
    try:
        yield
    finally:
        if own is None:
            del model.forward
        else:
            model.forward = own


@contextmanager
def untracked_norms(model: nn.Module) -> Iterator[None]:
    """Let batch norms in train mode go by the statistics of their batch within, and leave those
    that they track as they are."""
    tracking = [m for m in model.modules() if getattr(m, "track_running_stats", False)]
    for module in tracking:
        module.track_running_stats = False  # type: ignore[assignment]
    try:
        yield
    finally:
        for module in tracking:
            module.track_running_stats = True  # type: ignore[assignment]


@contextmanager
def removing(hooks: Iterable[RemovableHandle]) -> Iterator[None]:
    """Remove hooks, however the block ends."""
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
