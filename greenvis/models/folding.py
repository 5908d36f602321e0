"""Batch norms of a finished model, folded into the convolutions before them: the same answers for
fewer passes over memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils.fusion import fuse_conv_bn_eval

from greenvis.core.modes import removing
from greenvis.core.surgery import is_skippable, replace
from greenvis.errors import BadInput
from greenvis.models.structure import example_input
from greenvis.models.structure.probing import probing
from greenvis.tasks.answers import main_output

TOLERANCE = 1e-4  # of the greatest absolute value: folded weights round otherwise


@dataclass(frozen=True)
class Folding:
    """Batch norms folded in a model. convolutions: the paths of those that took one up."""

    model: nn.Module
    convolutions: tuple[str, ...]
    swapped: tuple[tuple[nn.Module, nn.Module], ...]  # what was there, and what stands in its place

    def undo(self) -> None:
        """Put the convolutions and batch norms back, with the weights they have."""
        for old, new in self.swapped:
            replace(self.model, new, old)


def fold_norms(model: nn.Module, x: Tensor | None = None) -> Folding:
    """Fold each batch norm into the convolution right before it, in place (Jacob et al., 2018,
    3.2).

    In eval w′ = w · γ / √(σ² + ε) and b′ = β + (b − μ) · γ / √(σ² + ε) give the same answers up to
    rounding, and what stood between the norm and the next layer (timm's activation) stays. The
    model is put into eval and is for inference alone: training it on would move weights that `undo`
    throws away. A norm is left where it is if its convolution computes its weights, has other
    readers, runs more than once, or carries a technique's change.

    Args:
        model: The model.
        x: Images (batch, channels, height, width) to find pairs and to compare answers on; guessed
            where absent.

    Returns:
        What was done, with its `undo`.

    Raises:
        BadInput: Where no norm can be folded or the answers would change by more than 1e-4 of the
            greatest; nothing is changed then.

    Example:
        >>> folding = gv.fold_norms(resnet)
        >>> sum(isinstance(module, torch.nn.BatchNorm2d) for module in resnet.modules())
        0
        >>> folding.undo()
    """
    what = type(model).__name__
    example = example_input(model) if x is None else x
    with probing(model):
        pairs = _pairs(model, example)
        before = main_output(model(example))
    if not pairs:
        norms = sum(isinstance(m, _BatchNorm) for m in model.modules())
        has = "no batch norm"
        if norms:
            has = (
                f"{norms} batch norms, none of them right behind a convolution that can take it up"
            )
        raise BadInput(f"{what} has {has}: there is nothing to fold")
    swaps = tuple(swap for _, pair in pairs for swap in pair)
    for old, new in swaps:
        replace(model, old, new)
    folding = Folding(model, tuple(path for path, _ in pairs), swaps)
    try:
        with probing(model):
            after = main_output(model(example))
        if not _close(before, after):
            raise BadInput(
                f"{what} answers otherwise with its batch norms folded, because something else "
                "reads what one of those convolutions gives: use it as it is"
            )
    except BaseException:
        folding.undo()
        raise
    for module in (model, *(old for old, _ in swaps)):
        module.eval()
    return folding


@contextmanager
def folded(model: nn.Module, x: Tensor | None = None) -> Iterator[nn.Module]:
    """Hold the model folded within the block (`fold_norms`).

    Args:
        model: The model.
        x: As `fold_norms` takes it.

    Yields:
        The model.
    """
    folding = fold_norms(model, x)
    try:
        yield model
    finally:
        folding.undo()


Swap = tuple[nn.Module, nn.Module]


def _pairs(model: nn.Module, x: Tensor) -> list[tuple[str, tuple[Swap, Swap]]]:
    """Return the path of each convolution that can take a norm up, with what goes and what comes in
    its place."""
    names: dict[nn.Module, str] = {
        m: n for n, m in model.named_modules() if isinstance(m, (_ConvNd, _BatchNorm)) and _plain(m)
    }
    # by id of what a convolution gave, which is held: no id comes twice
    outputs: dict[int, tuple[_ConvNd, Tensor, Tensor]] = {}
    runs = dict.fromkeys(names, 0)
    # a convolution and the folded one, its norm and what is left of it
    pairs: list[tuple[Swap, Swap]] = []

    def note(module: nn.Module, args: Any, output: Any) -> None:
        runs[module] += 1
        if isinstance(module, _ConvNd):
            outputs[id(output)] = (module, args[0], output)
        elif id(args[0]) in outputs and module.running_mean is not None:
            conv, x_in, _ = outputs[id(args[0])]
            fuse: Any = fuse_conv_bn_eval
            fused: nn.Module = fuse(conv, module, conv.transposed)
            fused.requires_grad_(False)
            fused._forward_hooks.clear()  # this one
            fused._forward_pre_hooks.clear()
            rest = nn.Sequential(*module.children()) if [*module.children()] else nn.Identity()
            # now: what follows may change either in place
            if _close(output, rest.eval()(fused(x_in))):
                pairs.append(((conv, fused), (module, rest)))

    hooks = [m.register_forward_hook(note, prepend=True) for m in names]
    with removing(hooks):
        model(x)
    return [
        (names[conv], pair) for pair in pairs if runs[conv := pair[0][0]] == runs[pair[1][0]] == 1
    ]


def _plain(module: nn.Module) -> bool:
    """Whether it can be folded, nobody listens to it and nobody has changed how it runs."""
    # torch folds none of these
    if isinstance(module, _ConvNd) and module.transposed and module.groups > 1:
        return False
    changed = (
        "forward" in vars(module) or hasattr(module, "parametrizations") or module._forward_hooks
    )
    return not changed and all(map(is_skippable, module._forward_pre_hooks.values()))


def _close(a: Tensor, b: Tensor) -> bool:
    limit = TOLERANCE if a.dtype.itemsize >= 4 else 5e-2
    return a.shape == b.shape and bool(
        (a.float() - b.float()).abs().max() <= limit * a.float().abs().max()
    )
