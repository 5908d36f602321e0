"""What trainers do around a model's forward that would lose a technique's gradients: noticed, put
right or refused."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable, Mapping
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointFunction

from greenvis.core import distributed
from greenvis.errors import BadInput

_WATCHED = "_greenvis_watched"


class UsedInTerms:
    """A hook on a model that tells DistributedDataParallel of parameters which only a technique's
    own loss uses.

    With find_unused_parameters=True (transformers' default) it follows what the model returns back
    to the parameters, and takes those it does not meet for unused: their gradients would come a
    second time, and end the training. names: theirs.
    """

    _greenvis_passing = True

    def __init__(self, names: Iterable[str]) -> None:
        self.names = frozenset(names)

    def __call__(self, model: nn.Module, args: Any, output: Any) -> Any:
        """Return the output, with the parameters in the graph of one of its tensors."""
        if not model.training or not torch.is_grad_enabled() or distributed.world_size() == 1:
            return None
        parameters = [p for n, p in model.named_parameters() if n in self.names and p.requires_grad]
        # a frozen base: none has
        for accepts in (lambda t: t.requires_grad, Tensor.is_floating_point) if parameters else ():
            new, done = _joined(output, parameters, accepts)
            if done:
                return new
        return None


class _Joined(torch.autograd.Function):
    """The tensor itself, with parameters in its graph that get no gradient from it."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, *parameters: Tensor) -> Tensor:
        ctx.count = len(parameters)
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return gradients[0], *([None] * ctx.count)


def _joined(
    output: Any, parameters: list[nn.Parameter], accepts: Callable[[Tensor], bool]
) -> tuple[Any, bool]:
    """Return what a model returned with the first tensor that is wanted joined, and whether there
    is one."""
    if isinstance(output, Tensor):
        return (_Joined.apply(output, *parameters), True) if accepts(output) else (output, False)
    if isinstance(output, Mapping):
        for key, value in output.items():
            new, done = _joined(value, parameters, accepts)
            if done:
                # a transformers output is a mapping and a dataclass
                changed: Any = copy.copy(output)
                changed[key] = new
                return changed, True
    elif isinstance(output, (tuple, list)):
        for i, value in enumerate(output):
            new, done = _joined(value, parameters, accepts)
            if done:
                parts = [*output[:i], new, *output[i + 1 :]]
                return type(output)(*parts) if hasattr(output, "_fields") else type(output)(
                    parts
                ), True
    return output, False


class Recomputed:
    """A hook on a module that trains a technique's parameters: it refuses re-entrant checkpointing
    where that loses them.

    The first forward of such a checkpoint runs without gradients: parameters get none where nothing
    that enters it has one (a frozen base), and what a technique read there for its own loss has
    none. reads: whether the technique has one.
    """

    _greenvis_passing = True

    def __init__(self, technique: str, reads: bool) -> None:
        self.technique, self.reads = technique, reads

    def __call__(self, module: nn.Module, args: Any) -> None:
        """Raise BadInput there."""
        if module.training:
            refuse_recomputed(self.technique, self.reads)


def refuse_recomputed(technique: str, always: bool = True) -> None:
    """Raise BadInput in the first forward of a re-entrant checkpoint: always, or where nothing with
    a gradient enters it."""
    if torch.is_grad_enabled():
        return
    frame: FrameType | None = inspect.currentframe()
    while frame is not None and frame.f_code is not CheckpointFunction.forward.__code__:
        frame = frame.f_back
    if frame is None:
        return
    entered = [t for t in frame.f_locals.get("args", ()) if isinstance(t, Tensor)]
    if always or not any(t.requires_grad for t in entered):
        raise BadInput(
            f"re-entrant gradient checkpointing loses the gradients of '{technique}': use the "
            "other kind, "
            "use_reentrant=False (transformers: gradient_checkpointing_kwargs={'use_reentrant': "
            "False}), or none"
        )


def watch(
    model: nn.Module, technique: str, parameters: Iterable[nn.Parameter], reads: bool
) -> None:
    """Put `Recomputed` on the modules that hold these parameters."""
    ids = {id(p) for p in parameters}
    for module in model.modules():
        if _WATCHED not in vars(module) and any(id(p) in ids for p in module._parameters.values()):
            module.register_forward_pre_hook(Recomputed(technique, reads))
            vars(module)[_WATCHED] = True
