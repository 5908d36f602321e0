"""Who sees the row of tokens between the blocks of a model, where a technique makes it shorter or
longer than the patches.

Within the model's own forward nobody does. Whoever comes by another door (`forward_features`,
`forward_intermediates`, hidden states, a hook on a block) is shown it laid out behind each block: a
row for each first token, at its own place.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from greenvis.errors import BadInput, GreenvisError
from greenvis.models.structure.probing import probing


class Passing(dict[Any, Any]):
    """What one part of a forward leaves for a later one: a copy or a pickle of the model starts
    without it."""

    def __copy__(self) -> Passing:
        return Passing(self.items())

    def __deepcopy__(self, memo: Any) -> Passing:
        return Passing()

    def __reduce__(self) -> Any:
        return Passing, ()


def again() -> bool:
    """Whether checkpointing runs a part of a forward once more, within the backward."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def refuse_tracing(value: Any, what: str) -> None:
    """Raise GreenvisError where torch.fx traces the model: `what` depends on values, and a trace
    has none."""
    if isinstance(value, torch.fx.Proxy):
        raise GreenvisError(
            f"torch.fx (create_feature_extractor, FX quantisation) cannot trace {what}: trace the "
            "plain model, or read features by hooks"
        )


class Door:
    """Stands in for a method of a module, so that what runs within counts as the model's own
    forward."""

    def __init__(self, doors: Doors, module: nn.Module, method: str) -> None:
        self.doors, self.module, self.method = doors, module, method
        self.inner = vars(module).get(method)  # what another technique has put there

    @property
    def __wrapped__(self) -> Any:
        """What runs within: the name by which inspect.signature finds the model's own."""
        return self.inner or getattr(type(self.module), self.method).__get__(self.module)

    @property
    def __code__(self) -> Any:
        """The model's own, by which torch.export says where a forward stands."""
        return self.__wrapped__.__code__

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the method."""
        doors = self.doors
        before, doors.shown = doors.shown, doors.shown or doors.asks(kwargs)
        doors.under_way += 1
        try:
            if self.inner is not None:
                return self.inner(*args, **kwargs)
            return getattr(type(self.module), self.method)(self.module, *args, **kwargs)
        finally:
            doors.under_way -= 1
            doors.shown = before


class Doors:
    """The doors into one model. laid_out: whether the pass under way shows the row behind each
    block.

    closed: whether nobody sees it within the model's own forward. blocks: those between which the
    row is another.
    """

    def __init__(self, model: nn.Module, blocks: Iterable[nn.Module]) -> None:
        self.model, self.blocks = model, [*blocks]
        self.under_way, self.shown, self.closed, self.laid_out = 0, False, False, True
        configs = {
            id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None
        }
        self.configs = [*configs.values()]

    def put(self, *methods: str) -> None:
        """Stand in for the model's forward, and for these methods wherever a module of it has
        them."""
        vars(self.model)["forward"] = Door(self, self.model, "forward")
        for module in self.model.modules():
            for method in methods:
                if callable(getattr(type(module), method, None)):
                    vars(module)[method] = Door(self, module, method)

    def asks(self, kwargs: dict[str, Any]) -> bool:
        """Whether this call wants hidden states. Raises GreenvisError where it wants attention
        maps."""
        if self._is_requested("output_attentions", kwargs):
            raise GreenvisError(
                f"attention maps of {type(self.model).__name__} are of other tokens than its "
                "patches here: ask without output_attentions, or undo() first"
            )
        return self._is_requested("output_hidden_states", kwargs)

    def _is_requested(self, name: str, kwargs: dict[str, Any]) -> bool:
        value = kwargs.get(name)
        return bool(any(getattr(c, name, False) for c in self.configs) if value is None else value)

    def begin(self) -> None:
        """Settle for this pass whether the row is shown: the first block that changes it calls
        this."""
        if again():
            return
        inside = self.closed and self.under_way and not self.shown
        compiling = torch.compiler.is_compiling()
        self.laid_out = not inside or (not compiling and any(map(_watched, self.blocks)))

    def settle(self, example: Tensor, maps_only: bool = False) -> bool:
        """Find, by running the model both ways, whether nobody sees the row within its forward;
        return and note it.

        maps_only: only outputs (batch, channels, height, width) must be the same. Raises BadInput
        where neither runs.
        """
        hidden, error = self._outputs(example, closed=True)
        shown, _ = self._outputs(example, closed=False)
        if hidden is None and shown is None:
            raise BadInput(
                f"{type(self.model).__name__} does not run with other tokens: "
                f"{type(error).__name__}: {str(error)[:200]}"
            ) from error
        self.closed = hidden is not None and (shown is None or _same(hidden, shown, maps_only))
        return self.closed

    def _outputs(
        self, example: Tensor, closed: bool
    ) -> tuple[list[Tensor] | None, Exception | None]:
        self.closed = closed
        try:
            with probing(self.model):
                output: Any = self.model(example)
        except Exception as error:  # whatever a model raises here means: not this way
            return None, error
        output = output.to_tuple() if hasattr(output, "to_tuple") else output
        return [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)], None


def _same(one: list[Tensor], other: list[Tensor], maps_only: bool) -> bool:
    for a, b in zip(one, other, strict=True):
        if maps_only and a.dim() != 4:
            continue
        if a.shape != b.shape:
            return False
        loose = 1e-3 if a.dtype.itemsize >= 4 else 5e-2
        if a.device.type != "meta" and not torch.allclose(
            a, b, rtol=loose, atol=loose * float(b.abs().max())
        ):
            return False
    return True


def _watched(block: nn.Module) -> bool:
    """Whether somebody else's hook sees what this block is given or gives."""
    hooks = (*block._forward_hooks.values(), *block._forward_pre_hooks.values())
    return any(not _maker(hook).startswith("greenvis.") for hook in hooks)


def _maker(hook: Any) -> str:
    return getattr(getattr(hook, "func", hook), "__module__", None) or ""
