"""Queries of a prompt pool: what the frozen model, without prompts, says of an image."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from greenvis import models
from greenvis.core.modes import in_mode, removing
from greenvis.core.technique import Samples
from greenvis.errors import BadInput, GreenvisError, some
from greenvis.models.structure import View
from greenvis.models.structure.probing import probing
from greenvis.tasks.answers import main_output
from greenvis.techniques._shared.frozen import FrozenOutputs

if TYPE_CHECKING:
    from greenvis.techniques.iteration.continual.prompt_pool import Pool


class Asker:
    """Runs the frozen model without prompts before each forward, for the feature its head would
    read.

    heads, readers: paths, for somebody may put another classifier there. weights: what tells the
    frozen model from another, where queries are to be kept; else "".
    """

    def __init__(
        self, pool: Pool, heads: Sequence[str], readers: Sequence[str], weights: str
    ) -> None:
        self.pool, self.heads, self.readers, self.cache = pool, heads, readers, None
        self.samples: Samples | None = None
        if weights:
            self.cache = FrozenOutputs("the model without prompts: what its head reads", weights)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "samples": None}  # a copy is shown other batches

    def put(self, model: nn.Module) -> None:
        """Ask before each forward of `model`."""
        model.register_forward_pre_hook(self.ask, with_kwargs=True)

    def ask(self, model: nn.Module, args: Any, kwargs: Any) -> None:
        """Note the query (batch, dim) in the pool: of the model, or read back."""
        if self.pool.away:
            return
        if self.cache is None or self.samples is None or not model.training:
            self.pool.ask(self.answer(model, args, kwargs))
            return
        spared = {id(p) for part in (self.pool, *at(model, self.heads)) for p in part.parameters()}
        if moving := [
            n for n, p in model.named_parameters() if p.requires_grad and id(p) not in spared
        ]:
            raise GreenvisError(
                f"the queries cannot be kept, for {some(moving)} trains and changes them; set "
                "cache: false"
            )
        self.pool.ask(
            self.cache.outputs(
                self.samples, lambda: self.answer(model, args, kwargs), self.pool.keys.device
            )
        )

    def answer(self, model: nn.Module, args: Any, kwargs: Any) -> Tensor:
        """Return the query: one forward without prompts, in eval mode, without gradients; modes are
        given back."""
        self.pool.away = True
        try:
            with in_mode(model, False), torch.no_grad():
                # with the classifier around them
                gone = self.readers and not at(model, self.readers)
                return _run(model, self.heads if gone else self.readers, args, kwargs)
        finally:
            self.pool.away = False


def fingerprint(model: nn.Module, heads: list[nn.Module]) -> str:
    """Return a fingerprint of the model but its heads, which train and which no query depends
    on."""
    spared = {id(t) for head in heads for t in (*head.parameters(), *head.buffers())}
    return models.fingerprint(
        {n: t for n, t in model.state_dict(keep_vars=True).items() if id(t) not in spared}
    )


def feature(model: nn.Module, structure: View) -> Tensor:
    """Return what the head reads for the example. Raises BadInput where that is no vector per
    image."""
    with probing(model):
        feature = _run(model, readers(structure), (structure.example,), {})
    if feature.ndim != 2:
        raise BadInput(
            f"the head of {type(model).__name__} reads {tuple(feature.shape)}, not one vector "
            "(batch, dim) per image, so it gives no query; set query: patch"
        )
    return feature


def readers(structure: View) -> list[str]:
    """Return the classifier's layers: what the first of them reads does not change while they
    train."""
    return [
        p
        for p in (*structure.norms, *structure.linears, *structure.convs)
        if structure.in_classifier(p)
    ]


def at(model: nn.Module, paths: Sequence[str]) -> list[nn.Module]:
    """Return the modules that stand at these paths now."""
    named = dict(model.named_modules())
    return [named[path] for path in paths if path in named]


def _run(model: nn.Module, readers: Sequence[str], args: Any, kwargs: Any) -> Tensor:
    """Return what the first of `readers` reads in a forward of `model`, or the model's output where
    there are none."""
    read: list[Tensor] = []
    hooks = [
        module.register_forward_pre_hook(partial(_note, read)) for module in at(model, readers)
    ]
    with removing(hooks):
        output = model(*args, **kwargs)
    return (read[0] if read else main_output(output)).detach()


def _note(read: list[Tensor], module: nn.Module, args: Any) -> None:
    read.append(args[0])
