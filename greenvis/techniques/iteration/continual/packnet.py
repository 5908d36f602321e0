"""PackNet: several tasks in one network, each in weights of its own that pruning set free."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from greenvis.core import distributed
from greenvis.core.modes import in_mode
from greenvis.core.surgery import hold_norms
from greenvis.core.technique import (
    Experience,
    InputShape,
    Installed,
    Technique,
    logits_of,
    mask_classes,
)
from greenvis.errors import BadInput, GreenvisError
from greenvis.models.structure import View, reached, view
from greenvis.tasks.answers import CLASSES
from greenvis.techniques._shared.heads import TaskHeads, head_parameters
from greenvis.techniques.iteration.continual._frozen_elements import FrozenElements

MOST_TASKS = 255  # owners are kept as bytes


def largest(weight: Tensor, free: Tensor, share: float) -> Tensor:
    """Return which of the free weights are the `share` of greatest magnitude, at least one where
    any is free.

    Args:
        weight: any shape.
        free: bool of that shape.
        share: of the free weights, 0 to 1.

    Returns:
        bool of that shape.
    """
    count = math.ceil(share * int(free.sum()))
    magnitude = weight.detach().abs().masked_fill(~free, -1.0).flatten()
    chosen = torch.zeros_like(magnitude, dtype=torch.bool)
    chosen[magnitude.topk(count).indices] = True
    return chosen.view_as(weight)


class PackNet(Technique):
    """Pack the tasks of a stream into one network: prune after each, freeze what it keeps, train
    the rest on the next (Mallya and Lazebnik, 2018).

    Saves the storage of a model per task (a byte per weight instead) and replay; a task that a test
    tells is answered by the weights up to it alone, bit for bit as when it ended. Costs
    retrain_epochs more after each task and memory for one more copy of the weights; saves no
    compute, in training or at inference: pruned weights are zeros, multiplied as others. Each task
    keeps `keep` of what is free in each layer, so that room runs out as (1 - keep)^tasks. All else
    but the classifier (biases, norms with their statistics, embeddings) learns in the first task
    only. Retraining lowers the cross entropy among the task's own classes, by Adam. Each task has
    its classifier as it was when it ended. In a loop of one's own call `step_end`
    after each optimizer step: it takes back what decay or momentum did to frozen weights.

    Example:
        >>> live = gv.wrap(model, gv.PackNet(keep=0.5))
        >>> live.begin_experience(experience)
        >>> print(live.summary())
        VisionTransformer with packnet
          packnet: defaults
          trains 32,389 of 32,389 parameters (100.00%); delta 0.13 MB
    """

    name = "packnet"
    stage = "weights"
    needs = frozenset({"trainable_base"})
    tasks = CLASSES
    instead = (
        "its training after pruning is by cross entropy; hold the weights by importances (MAS, SI)"
    )
    examples = ({}, {"keep": 0.25, "retrain_epochs": 0})

    keep: float = Field(
        default=0.5, gt=0, le=1, description="share of a layer's free weights that each task keeps"
    )
    retrain_epochs: int = Field(
        default=1, ge=0, description="epochs on the task's images after pruning"
    )
    retrain_lr: float = Field(default=1e-3, gt=0, description="learning rate of that")
    input_shape: InputShape = None

    def install(self, model: nn.Module) -> Installed:
        """Find the weights to pack. Raises BadInput for a model without layers but its
        classifier."""
        structure = view(model, self.input_shape, probe=False)
        heads = head_parameters(model, structure)
        learning = reached(model, structure.example)
        named = {n: p for n, p in model.named_parameters() if n in learning}
        body = {n: p for n, p in named.items() if not any(p is h for h in heads)}
        weights = _weights(model, structure)
        if not any(id(p) in weights for p in body.values()):
            raise BadInput(
                f"{type(model).__name__} has no layers but its classifier, so there is nothing to "
                "pack tasks into"
            )
        return InstalledPackNet(
            self,
            model,
            {n: Share(p, id(p) in weights) for n, p in body.items()},
            heads,
            tuple(named),
        )


def _weights(model: nn.Module, structure: View) -> set[int]:
    """Return the ids of the weights of layers, which are pruned: Linear, convolution, attention
    projections."""
    layers = [model.get_submodule(p) for p in (*structure.linears, *structure.convs)]
    layers += [m for m in model.modules() if isinstance(m, nn.MultiheadAttention)]
    return {id(p) for layer in layers for p in layer.parameters(recurse=False) if p.ndim > 1}


class Share(FrozenElements):
    """One parameter and whose its elements are. owner: uint8 of its shape, 0 free, else the number
    (from 1) of a task.

    pruned: whether a task keeps a part only; else the first takes all.
    """

    def __init__(self, parameter: nn.Parameter, pruned: bool) -> None:
        super().__init__(parameter)
        self.pruned = pruned
        self.owner = torch.zeros_like(parameter, dtype=torch.uint8)
        # in retraining, of task `number`, free elements are to stay zero
        self.resting, self.number = (False, 0)
        self._now: Tensor | None = None

    def frozen(self) -> Tensor:
        """Return what tasks before this one own; in retraining all but what this one owns."""
        self.owner = self.owner.to(self.parameter.device)
        return self.owner != (self.number if self.resting else 0)

    @torch.no_grad()
    def prune(self, number: int, share: float) -> None:
        """Give task `number` its share of the free elements, and rest the others at zero until
        `pack`."""
        free = ~self.frozen()
        self.owner[largest(self.parameter, free, share) if self.pruned else free] = number
        self.number, self.resting = number, True
        self.values = self.values.to(self.parameter.device).masked_fill(self.owner == 0, 0.0)
        self.hold()

    def pack(self) -> None:
        """Freeze what the task in retraining has learned; the free elements learn again, from
        zero."""
        self.take()
        self.resting = False

    @torch.no_grad()
    def select(self, number: int | None) -> None:
        """Show the elements of tasks up to `number` alone, the others as zeros; None: all as they
        were."""
        if self._now is not None:
            self.parameter.copy_(self._now)
            self._now = None
        if number is not None:
            self._now = self.parameter.detach().clone()
            self.parameter.masked_fill_(~self.frozen() | (self.owner > number), 0.0)


class InstalledPackNet(Installed):
    """The packing at work. shares: by parameter name. done: tasks packed."""

    def __init__(
        self,
        request: PackNet,
        model: nn.Module,
        shares: dict[str, Share],
        heads: list[nn.Parameter],
        trainable: tuple[str, ...],
    ) -> None:
        super().__init__(trainable, freezes=True)
        self.request, self.model, self.shares = request, model, shares
        self.heads = TaskHeads(heads)
        self.done = 0
        self.classes: tuple[int, ...] = ()

    def begin_experience(self, experience: Experience) -> None:
        """Take the task's classes, for retraining. Raises GreenvisError where no room is left."""
        self.classes = experience.classes
        if experience.index == self.done:
            self._check_room()

    def step_end(self) -> None:
        """Take back what the optimizer did to frozen weights."""
        if self.done:
            for share in self.shares.values():
                share.hold()

    def eval_experience(self, experience: Experience | None) -> None:
        """Use the weights up to the task, once it is packed, and all of them again when the test is
        over."""
        number = None
        if experience is not None and experience.index < self.done:
            number = experience.index + 1
        for share in self.shares.values():
            share.select(number)
        self.heads.select(number)

    def end_experience(self, loader: Any) -> None:
        """Prune, retrain on the task's images, and freeze what the task keeps. Raises GreenvisError
        where no room is left."""
        self._check_room()
        for share in self.shares.values():
            share.prune(self.done + 1, self.request.keep)
        self._retrain(loader)
        distributed.sync([*(s.parameter for s in self.shares.values()), *self.heads.parameters])
        for share in self.shares.values():
            share.pack()
        self.done += 1
        self.heads.save(self.done)
        hold_norms(self.model)

    def facts(self) -> Mapping[str, Any]:
        """Return the share of prunable weights that each task owns, and what is free."""
        owners = torch.cat([s.owner.flatten() for s in self.shares.values() if s.pruned])
        counts = torch.bincount(owners.to(torch.int64), minlength=self.done + 1) / len(owners)
        return {
            "packnet_free": round(counts[0].item(), 4),
            "packnet_shares": [round(c, 4) for c in counts[1:].tolist()],
        }

    def state_dict(self) -> dict[str, Tensor]:
        """Return whose each weight is (uint8), how many tasks are packed, and their classifiers."""
        owners = {f"owner.{n}": s.owner for n, s in self.shares.items()} if self.done else {}
        return {"done": torch.tensor(self.done), **owners, **self.heads.state_dict()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take that back; the frozen values are those the model has now."""
        self.done = int(state["done"])
        for name, share in self.shares.items():
            if self.done:
                share.owner.copy_(state[f"owner.{name}"])
            share.take()
        self.heads.load_state_dict(state)
        if self.done:
            hold_norms(self.model)

    def undo(self) -> None:
        """Let go of the gradients."""
        for share in self.shares.values():
            share.hook.remove()

    def _check_room(self) -> None:
        if self.done == MOST_TASKS or not any(
            (s.owner == 0).any() for s in self.shares.values() if s.pruned
        ):
            raise GreenvisError(
                f"no weight is left for task {self.done + 1}: give packnet a lower `keep` than "
                f"{self.request.keep}"
            )

    def _retrain(self, loader: Any) -> None:
        parameters = [
            p
            for p in (*(s.parameter for s in self.shares.values()), *self.heads.parameters)
            if p.requires_grad
        ]
        optimizer = torch.optim.Adam(parameters, lr=self.request.retrain_lr)
        with in_mode(self.model, True):
            for _ in range(self.request.retrain_epochs):
                for x, y in loader:
                    x, y = x.to(parameters[0].device), y.to(parameters[0].device)
                    optimizer.zero_grad()
                    logits = mask_classes(logits_of(self.model(x)), self.classes or None)
                    F.cross_entropy(logits, y).backward()
                    optimizer.step()
                    for share in self.shares.values():
                        share.hold()
        optimizer.zero_grad()
