"""What techniques share that go by the classifier: its parameters, its one linear layer, and what
it was when each task of a stream ended."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from greenvis.errors import BadInput
from greenvis.models.structure import View


def head_parameters(model: nn.Module, structure: View) -> list[nn.Parameter]:
    """Return the parameters of the model's classifier, all its layers.

    Where the last layer trains and others of the classifier were frozen before, those stay so: that
    was somebody's choice.
    """
    last = [p for path in structure.heads for p in model.get_submodule(path).parameters()]
    every = [p for path in structure.classifier for p in model.get_submodule(path).parameters()]
    chosen = bool(last) and all(p.requires_grad for p in last)
    return [p for p in every if p.requires_grad or not chosen]


def linear_head(model: nn.Module, structure: View, path: str, who: str) -> nn.Linear:
    """Return the classifier's last layer, which sees all that it is given.

    Args:
        model: The model.
        structure: Its view.
        path: Of `structure.heads`.
        who: What goes by it, for messages.

    Raises:
        BadInput: Where it is no linear layer, or its weight is read by another module.
    """
    head = model.get_submodule(path)
    if not isinstance(head, nn.Linear):
        raise BadInput(
            f"{who} goes by a linear classifier, and '{path}' is a {type(head).__name__}"
        )
    if path in structure.functional:
        raise BadInput(
            f"the weight of '{path}' is read by another module, so {who} does not see what it is "
            "given"
        )
    return head


class TaskHeads:
    """Copies of the classifier's parameters by task, shown in their place while a test tells its
    task."""

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self.parameters = list(parameters)
        self.saved: dict[int, list[Tensor]] = {}
        self._now: list[Tensor] | None = None

    def save(self, task: int) -> None:
        """Keep the classifier as task number `task`'s."""
        self.saved[task] = [p.detach().clone() for p in self.parameters]

    def select(self, task: int | None) -> None:
        """Show task number `task`'s classifier, if it has ended; None: the current one again."""
        if self._now is not None:
            self._fill(self._now)
            self._now = None
        if task in self.saved:
            self._now = [p.detach().clone() for p in self.parameters]
            self._fill(self.saved[task])

    def state_dict(self) -> dict[str, Tensor]:
        """Return the copies, as "head.TASK.NUMBER"."""
        return {
            f"head.{task}.{i}": t
            for task, parameters in self.saved.items()
            for i, t in enumerate(parameters)
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take the copies back."""
        tasks = {int(key.split(".")[1]) for key in state if key.startswith("head.")}
        self.saved = {
            task: [
                state[f"head.{task}.{i}"].to(p, copy=True) for i, p in enumerate(self.parameters)
            ]
            for task in sorted(tasks)
        }

    def _fill(self, values: list[Tensor]) -> None:
        with torch.no_grad():
            for parameter, value in zip(self.parameters, values, strict=True):
                parameter.copy_(value)
