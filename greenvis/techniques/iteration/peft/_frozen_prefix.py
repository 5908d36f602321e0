"""A frozen prefix that runs once: what enters the first trained part is cached per sample, and
what lies before is skipped.

`_frozen_split` finds where. In a step on known samples (`Wrapped.set_samples`), the frozen
modules answer with zeros of the right shape, and the trained parts get what was cached. So, in such
a step, only the logits are right, and those of heads that train: what else the model's output may
hold of its frozen part (hidden states) is zeros.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from greenvis import models
from greenvis.core.technique import Installed
from greenvis.errors import some
from greenvis.models.structure.probing import image, probing
from greenvis.techniques._shared.frozen import FrozenOutputs
from greenvis.techniques.iteration.peft._frozen_split import (
    Split,
    find_split,
    frozen_part,
    skipping,
)

_IMAGE = "images"


def _digest(x: Tensor) -> Tensor:
    """Return a number for each image, (batch, 1), that other images do not have: a fixed projection
    of its pixels."""
    flat = x.detach().flatten(1).float()
    return (flat * torch.arange(flat.shape[1], device=flat.device).mul(0.7).cos()).mean(
        1, keepdim=True
    )


class InstalledPrefix(Installed):
    """A model whose frozen prefix is kept; all outside of the trained parts runs in eval while it
    trains."""

    def __init__(
        self,
        model: nn.Module,
        trainable: tuple[str, ...],
        example: Tensor,
        cache: Literal[True, "fp16"],
    ) -> None:
        super().__init__(trainable, freezes=True)
        # refuses what cannot work; others may still change the model, so it is found again
        find_split(model, example[:1])
        self._dtype: Literal["fp32", "fp16"] = "fp16" if cache == "fp16" else "fp32"
        self._splits: dict[tuple[int, ...], tuple[Split, FrozenOutputs]] = {}
        self._modes: list[tuple[nn.Module, bool]] = []
        self._open = ExitStack()
        model.register_forward_pre_hook(self._enter, with_kwargs=True)
        model.register_forward_hook(self._leave, always_call=True)

    def facts(self) -> Mapping[str, Any]:
        """Return {"prefix_cache": hits, misses, bytes, …}."""
        facts = [cache.facts() for _, cache in self._splits.values()]
        sums = {
            k: sum(f[k] for f in facts) for k in ("hits", "misses", "earlier", "checked", "bytes")
        }
        return {"prefix_cache": {"part": facts[0]["part"], **sums}} if facts else {}

    def replacement_blocker(self, path: str) -> str:
        """Return "": nothing of a module that is not its own."""
        return ""

    def undo(self) -> None:
        """Let go of the cache's files."""
        for _, cache in self._splits.values():
            cache.close()

    def _tell(self, text: str) -> None:
        self.note(text)  # a tracked run may begin after this

    def _enter(self, model: nn.Module, args: Any, kwargs: Any) -> None:
        if not model.training:
            return
        x = next(leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor))
        split, cache = self._split(model, x)
        self._modes = [(m, m.training) for m in model.modules()]
        for module, _ in self._modes:
            module.training = False
        samples, outputs = self.samples, {}
        if samples is not None and torch.is_grad_enabled() and len(samples.positions) == len(x):
            own = {_IMAGE: _digest(x)}
            with self.phase("prefix"):
                names = (*split.inputs, *split.state_names, _IMAGE)
                outputs = cache.layers(
                    samples,
                    lambda: {**frozen_part(model, split, args, kwargs), **own},
                    names,
                    x.device,
                )
            # not the images of these positions
            if not torch.allclose(outputs[_IMAGE], own[_IMAGE], rtol=1e-3, atol=1e-4):
                outputs = {}
        trained = {id(m) for path in split.trained for m in model.get_submodule(path).modules()}
        for module, training in self._modes:
            module.training = training and id(module) in trained
        if outputs:
            self._open.enter_context(skipping(model, split, outputs, len(x)))

    def _leave(self, model: nn.Module, args: Any, output: Any) -> None:
        self._open.close()
        for module, training in self._modes:
            module.training = training
        self._modes = []

    def _split(self, model: nn.Module, x: Tensor) -> tuple[Split, FrozenOutputs]:
        size = tuple(x.shape[1:])
        if (
            size not in self._splits
            # in a thread of its own: who counts this step's FLOPs would take it for part of each
            # step
        ):
            with ThreadPoolExecutor(1) as aside:
                self._splits[size] = aside.submit(
                    self._look, model, image(model, (size[0], size[1], size[2])).to(x)
                ).result()
        return self._splits[size]

    def _look(self, model: nn.Module, example: Tensor) -> tuple[Split, FrozenOutputs]:
        split = find_split(model, example)
        with probing(model):
            answers = frozen_part(model, split, (example,), {})
        # hooks have no weights to compare
        summary = ", ".join(f"{n} {a.float().abs().mean():.4g}" for n, a in answers.items())
        learned = {n for n, p in model.named_parameters() if p.requires_grad}
        state = {
            n: t for n, t in model.state_dict().items() if not split.holds(n) and n not in learned
        }
        state[f"{model!r} {summary}"] = torch.empty(0)
        part = f"{type(model).__name__}: what enters {some(split.trained, 2)}"
        return split, FrozenOutputs(
            part, models.fingerprint(state), dtype=self._dtype, note=self._tell
        )
