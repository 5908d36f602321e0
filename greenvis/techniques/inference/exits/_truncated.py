"""A model that ends at one of its exits: static, plain, without the weights of what lies behind."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from greenvis.core.example import tensors_in
from greenvis.core.modes import removing
from greenvis.core.technique import logits_of
from greenvis.models.structure.probing import probing
from greenvis.techniques.inference.exits._early_exit_runtime import Exits


class TruncatedModel(nn.Module):
    """A model that ends at an exit."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        """x: (batch, channels, height, width). Returns logits (batch, classes)."""
        return logits_of(self.model(x))


class Blank(nn.Module):
    """Stands where nothing is computed any more: gives zeros of the shape that was given there,
    which export leaves out."""

    def __init__(self, taken: Tensor, output: Any) -> None:
        super().__init__()
        self.rows = len(taken)
        self.shapes = [(tuple(t.shape), t.dtype) for t in tensors_in(output)]
        self.single = isinstance(output, Tensor)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return zeros for the batch there is now."""
        x = next(tensors_in((args, kwargs)))
        out = tuple(
            x.new_zeros(x.shape[0] * s[0] // self.rows, *s[1:], dtype=kind)
            for s, kind in self.shapes
        )
        return out[0] if self.single else out


def drop_unused(model: nn.Module, exits: Exits, example: Tensor) -> None:
    """Put blanks in the place of modules that run in the whole model and not in one that stops at
    `exits.only`."""
    only = exits.only
    exits.only = None
    with exits.record():
        full = _executed(model, example)
    exits.only = only
    stopped = _executed(model, example)
    blanks: dict[nn.Module, nn.Module] = {}
    for parent in [*model.modules()]:
        for name, child in parent._modules.items():
            if (
                child in full
                and child not in stopped
                and all(isinstance(t, Tensor) for t in _parts(full[child][1]))
            ):
                parent._modules[name] = blanks.setdefault(child, Blank(*full[child]))
    exits.heads[:] = [
        head if k == only else nn.Identity().eval() for k, head in enumerate(exits.heads)
    ]


def _parts(output: Any) -> tuple[Any, ...]:
    return output if isinstance(output, tuple) else (output,)


def _executed(model: nn.Module, example: Tensor) -> dict[nn.Module, tuple[Tensor, Any]]:
    """Return the modules that run, each with its first tensor in, and what it gave."""
    executed: dict[nn.Module, tuple[Tensor, Any]] = {}

    def note(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        taken = next(tensors_in((args, kwargs)), None)
        if taken is not None:
            executed[module] = (taken, output)

    with probing(model):
        hooks = [
            m.register_forward_hook(note, with_kwargs=True, always_call=True)
            for m in model.modules()
        ]
        with removing(hooks):
            model(example)
    return executed
