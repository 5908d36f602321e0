"""Replay from a layer on: what enters it is kept, and kept examples join there, so that nothing
below runs for them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from greenvis.core import surgery
from greenvis.errors import BadInput, GreenvisError, nearest
from greenvis.models.structure import View, view
from greenvis.models.structure.probing import probing
from greenvis.tasks.answers import main_output


class Entrance:
    """The way into one layer: all below it is frozen.

    open: what the next forward in training is to do there: hand over what enters, and let kept
    examples join.
    """

    def __init__(
        self, model: nn.Module, layer: int | str, shape: tuple[int, int, int] | None
    ) -> None:
        """Raises BadInput, with nothing changed, where no such layer is, nothing learns above it or
        something goes past it."""
        structure = view(model, shape, probe=False)
        self.path = _path(model, structure, layer)
        self.module = model.get_submodule(self.path)
        layout = structure.layouts.get(self.path)
        self._axis = layout.channels if layout is not None else 1
        self._take: Callable[[Tensor], None] | None = None
        self._join: Tensor | None = None
        if structure.example.device.type == "meta":
            raise BadInput(
                "latent replay looks at what enters its layer, and a model on the meta device "
                "gives nothing"
            )
        example = torch.cat([structure.example[:1], structure.example[:1].flip(-1) + 0.5])
        below = self._below(model, example)
        learning = {n for n, p in model.named_parameters() if p.requires_grad}
        if not below or learning <= below:
            side = "below" if not below else "from"
            raise BadInput(
                f"nothing {side} '{self.path}' learns, so latent replay has nothing to "
                f"{'save' if not below else 'train'}"
            )
        self._check(model, example)
        self._freeze(model, below)
        self.module.register_forward_pre_hook(self._enter, with_kwargs=True)

    def open(self, take: Callable[[Tensor], None], join: Tensor | None) -> None:
        """Next time in training, give what enters to `take` (n, channels, …), and let `join`, of
        the same form, follow."""
        self._take, self._join = take, join

    def _enter(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        if self._take is None or not torch.is_grad_enabled():
            return None
        values, at, spec = taken_apart(args, kwargs)
        take, self._take = self._take, None
        if values[at].requires_grad:
            raise GreenvisError(
                f"something below '{self.path}' learns (another technique's?), so what was kept "
                "there would be out of date: let it learn from that layer on only, or replay images"
            )
        take(self._channels_first(values[at].detach()))
        if self._join is None:
            return None
        values[at] = torch.cat([values[at], self._channels_back(self._join).to(values[at])])
        return tree_unflatten(values, spec)

    def _channels_first(self, x: Tensor) -> Tensor:
        return x.movedim(self._axis, 1)

    def _channels_back(self, x: Tensor) -> Tensor:
        return x.movedim(1, self._axis)

    def _below(self, model: nn.Module, example: Tensor) -> set[str]:
        """Return the names of the parameters on which depends what enters."""
        named = {n: p for n, p in model.named_parameters() if p.is_floating_point()}
        flags = [(p, p.requires_grad) for p in model.parameters()]
        try:
            with probing(model), torch.enable_grad(), self._watched() as entered:
                for parameter in named.values():
                    parameter.requires_grad_()
                model(example)
                if len(entered) != 1:
                    raise BadInput(
                        f"'{self.path}' runs {len(entered)} times in a forward; latent replay "
                        "needs a layer that runs once"
                    )
                if len(entered[0]) != len(example):
                    raise BadInput(f"what enters '{self.path}' does not have a row for each image")
                total = entered[0].float().sum()
                grads = []
                if total.requires_grad:
                    grads = torch.autograd.grad(total, list(named.values()), allow_unused=True)
        finally:
            for parameter, flag in flags:
                parameter.requires_grad_(flag)
        return {n for n, g in zip(named, grads, strict=False) if g is not None}

    def _check(self, model: nn.Module, example: Tensor) -> None:
        """Raise BadInput where something of what lies below goes past the layer: kept examples have
        no such thing."""
        with probing(model):
            with self._watched() as entered:
                expected = main_output(model(example))
            rest = entered[0][1:]

            def join(module: nn.Module, args: Any, kwargs: Any) -> Any:
                values, at, spec = taken_apart(args, kwargs)
                values[at] = torch.cat([values[at], rest])
                return tree_unflatten(values, spec)

            handle = self.module.register_forward_pre_hook(join, with_kwargs=True)
            try:
                got = main_output(model(example[:1]))
                fits = got.shape == expected.shape and torch.allclose(
                    got.float(), expected.float(), rtol=1e-3, atol=1e-4
                )
            except RuntimeError:  # of shapes that disagree: what goes past has another batch
                fits = False
            finally:
                handle.remove()
        if not fits:
            raise BadInput(
                f"in {type(model).__name__}, more than what enters '{self.path}' reaches what lies "
                "above it (a skip past it?): choose another layer for latent replay"
            )

    @contextmanager
    def _watched(self) -> Iterator[list[Tensor]]:
        entered: list[Tensor] = []

        def look(module: nn.Module, args: Any, kwargs: Any) -> None:
            values, at, _ = taken_apart(args, kwargs)
            entered.append(values[at])

        handle = self.module.register_forward_pre_hook(look, with_kwargs=True)
        try:
            yield entered
        finally:
            handle.remove()

    def _freeze(self, model: nn.Module, below: set[str]) -> None:
        frozen = {id(p) for n, p in model.named_parameters() if n in below}
        for parameter in model.parameters():
            parameter.requires_grad_(parameter.requires_grad and id(parameter) not in frozen)
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and any(
                id(p) in frozen for p in module.parameters()
            ):
                surgery.hold_in_eval(module)


def _path(model: nn.Module, structure: View, layer: int | str) -> str:
    if isinstance(layer, str):
        paths = [n for n, _ in model.named_modules() if n]
        if layer not in paths:
            raise BadInput(
                f"latent: no module '{layer}' in {type(model).__name__}{nearest(layer, paths)}"
            )
        return layer
    if not -len(structure.blocks) <= layer < len(structure.blocks):
        raise BadInput(
            f"latent: block {layer} of {len(structure.blocks)} of {type(model).__name__} (counted "
            "from 0; negative: from the end); or give a module's path"
        )
    return structure.blocks[layer]


def taken_apart(args: Any, kwargs: Any) -> tuple[list[Any], int, Any]:
    """Return all a module was handed, which of it is the first tensor, and how to put it together
    again."""
    values, spec = tree_flatten((args, kwargs))
    at = next((i for i, value in enumerate(values) if isinstance(value, Tensor)), None)
    if at is None:
        raise BadInput("latent replay needs a layer that is handed a tensor")
    return values, at, spec
