"""Progressive networks: a column of weights for each task, which sees what the columns before it
make of the same image."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_unflatten

from greenvis.core.modes import in_mode
from greenvis.core.surgery import names_of
from greenvis.core.technique import Experience, InputShape, Installed, Technique
from greenvis.errors import BadInput
from greenvis.models.structure import reached, view
from greenvis.techniques._shared.attach import like, seat
from greenvis.techniques._shared.bottleneck import Bottleneck
from greenvis.techniques.iteration.continual._latent import taken_apart

_CHILD = "pnn"


class Pnn(Technique):
    """Learn each task in a column of its own, beside the frozen columns of earlier tasks (PNN: Rusu
    et al., 2016).

    Saves replay: a task that a test tells is answered by its own column, bit for bit as when it
    ended. Costs a model for each task, a forward of each earlier column for every image, in
    training and at test time, and adapters that grow with the
    square of the number of tasks: the dearest way to forget nothing. Where the test does not say
    the task, the latest column answers. Before each block a column adds, for each earlier one, a
    bottleneck of what enters that block there (eq. 2, with
    `width` hidden units; the last projection starts at zero, so a new column is the given model at
    first). Every column begins with the weights the model was given.

    Example:
        >>> live = gv.wrap(model, gv.Pnn(width=8))
        >>> live.begin_experience(experience)
        >>> print(live.summary())
        VisionTransformer with pnn
          pnn: {'width': 8}
          trains 32,389 of 32,389 parameters (100.00%); delta 0.13 MB
    """

    name = "pnn"
    stage = "weights"
    order = 1
    examples = ({"width": 4},)

    width: int = Field(
        default=16, ge=1, description="hidden units of each adapter between two columns"
    )
    input_shape: InputShape = None

    def install(self, model: nn.Module) -> Installed:
        """Find the blocks between which columns meet. Raises BadInput for a model without any."""
        structure = view(model, self.input_shape, probe=False)
        laterals = [
            Lateral(
                path, model.get_submodule(path), home, structure.layouts[path].inputs[axis], axis
            )
            for path in structure.blocks
            if path in structure.layouts and (home := seat(model, path)) is not None
            for axis in (structure.layouts[path].channels,)
        ]
        if not laterals:
            raise BadInput(
                f"columns meet at the blocks of a model, and {type(model).__name__} shows none; "
                "packnet takes any layer"
            )
        learning = reached(model, structure.example)
        own = tuple(n for n, p in model.named_parameters() if p.requires_grad and n in learning)
        return InstalledPnn(self, model, laterals, own)


class Lateral:
    """A block at whose entrance columns meet. home: the module in which its adapters live.
    channels: on axis `axis`."""

    def __init__(
        self, path: str, block: nn.Module, home: nn.Module, channels: int, axis: int
    ) -> None:
        self.path, self.block, self.home, self.channels = path, block, home, channels
        self.axis = axis
        self.adapters: list[list[Bottleneck]] = [[]]  # by column, one for each column before it


class InstalledPnn(Installed):
    """The columns at work. columns: weights and buffers of each ended task, by name."""

    unmergeable = (
        "its columns are models of their own, which no single one can hold; keep the model wrapped"
    )

    def __init__(
        self, request: Pnn, model: nn.Module, laterals: list[Lateral], own: tuple[str, ...]
    ) -> None:
        super().__init__(own, freezes=True)
        self.request, self.model, self.laterals, self.own = request, model, laterals, own
        self.start = {n: t.detach().clone() for n, t in self._values().items()}
        self.columns: list[dict[str, Tensor]] = []
        self.column = 0  # the one that runs
        self._latest = 0
        self._now: dict[str, Tensor] | None = (
            None  # the latest column's, while a test shows another
        )
        # by block: what entered there, column by column
        self._entered: dict[str, list[Tensor]] = {}
        self._running = False
        model.register_forward_pre_hook(self._before, with_kwargs=True)
        for lateral in laterals:
            lateral.block.register_forward_pre_hook(partial(self._meet, lateral), with_kwargs=True)

    def begin_experience(self, experience: Experience) -> None:
        """Begin a new column, with adapters from all before it."""
        if experience.index == 0:
            return
        self.column = self._latest = experience.index
        added: list[nn.Parameter] = []
        for lateral in self.laterals:
            nets = [
                Bottleneck(
                    lateral.channels,
                    self.request.width,
                    nn.ReLU(),
                    axis=lateral.axis,
                    scale=1.0,
                    dropout=0.0,
                    **like(self.model),
                )
                for _ in range(experience.index)
            ]
            lateral.home.add_module(f"{_CHILD}{experience.index}", nn.ModuleList(nets))
            lateral.adapters.append(nets)
            added += [p for net in nets for p in net.parameters()]
        self._fill(self.start)
        self.trainable = self.own + names_of(self.model, added)

    def end_experience(self, loader: Any) -> None:
        """Keep the column as it is."""
        now = self._values()
        self.columns.append({n: now[n].detach().clone() for n in self.start})

    def eval_experience(self, experience: Experience | None) -> None:
        """Run the column of the task, once it has ended; None: the latest again."""
        if self._now is not None:
            self._fill(self._now)
            self._now, self.column = None, self._latest
        if experience is not None and experience.index < min(len(self.columns), self._latest):
            now = self._values()
            self._now = {n: now[n].detach().clone() for n in self.start}
            self._fill(self.columns[experience.index])
            self.column = experience.index

    def _before(self, model: nn.Module, args: Any, kwargs: Any) -> None:
        """Run the columns before the one at work, for what enters their blocks."""
        if self._running or not self.column:
            return
        self._entered = {lateral.path: [] for lateral in self.laterals}
        with self._nested(), torch.no_grad(), in_mode(self.model, False), self.phase("columns"):
            for number, values in enumerate(self.columns[: self.column]):
                self.column = number
                functional_call(model, values, args, kwargs)

    @contextmanager
    def _nested(self) -> Iterator[None]:
        self._running, column = True, self.column
        try:
            yield
        finally:
            self._running, self.column = False, column

    def _meet(self, lateral: Lateral, module: nn.Module, args: Any, kwargs: Any) -> Any:
        """Add to what enters a block what adapters make of the earlier columns'."""
        if not self.column and not self._running:
            return None
        values, at, spec = taken_apart(args, kwargs)
        earlier = self._entered[lateral.path][: self.column]
        for net, features in zip(lateral.adapters[self.column], earlier, strict=True):
            values[at] = values[at] + net(features)
        if self._running:
            self._entered[lateral.path].append(values[at])
        return tree_unflatten(values, spec)

    def _values(self) -> dict[str, Tensor]:
        return {**dict(self.model.named_parameters()), **dict(self.model.named_buffers())}

    def _fill(self, values: Mapping[str, Tensor]) -> None:
        now = self._values()
        with torch.no_grad():
            for name, value in values.items():
                now[name].copy_(value)

    def facts(self) -> Mapping[str, Any]:
        """Return how many columns there are, and the bytes of those that are frozen."""
        return {
            "pnn_columns": self._latest + 1,
            "pnn_bytes": sum(t.nbytes for c in self.columns for t in c.values()),
        }

    def state_dict(self) -> dict[str, Tensor]:
        """Return the ended tasks' columns."""
        return {
            f"column.{i}.{name}": value
            for i, column in enumerate(self.columns)
            for name, value in column.items()
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take them back."""
        now = self._values()
        ended = sorted({int(key.split(".")[1]) for key in state})
        self.columns = [
            {n: state[f"column.{i}.{n}"].to(now[n].device, copy=True) for n in self.start}
            for i in ended
        ]
