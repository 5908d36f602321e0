"""Blocks of a denoising network that are not run again at every step: what they gave is used
again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from greenvis.errors import BadInput

# from the calls since the last whole one, and how far the first block's change differs from its
Decide = Callable[[int, Callable[[], float]], bool]


class Blocks(NamedTuple):
    """The blocks of a network.

    Args:
        first: The block that runs at every call.
        later: Those that need not, in order of execution.
        residual: Whether each changes what it is called with and has the same shape: what is used
            again is then the sum of their changes, else what they gave.
    """

    first: nn.Module
    later: tuple[nn.Module, ...]
    residual: bool


def blocks_of(network: nn.Module) -> Blocks:
    """Return a network's blocks; those that need not run are, of a U-Net, all but the first way
    down and the last way up (DeepCache: Ma et al., 2024), of a chain all but the first.

    Raises:
        BadInput: For a network that is neither.
    """
    down, up, middle = (
        getattr(network, n, None) for n in ("down_blocks", "up_blocks", "mid_block")
    )
    if isinstance(down, nn.ModuleList) and isinstance(up, nn.ModuleList):
        if len(down) < 2:
            raise BadInput(
                f"{type(network).__name__} has one resolution: nothing lies below its first block"
            )
        inner = [] if middle is None else [middle]
        return Blocks(down[0], (*down[1:], *inner, *up[:-1]), residual=False)
    chains = [m for m in network.modules() if isinstance(m, nn.ModuleList) and len(m) > 2]
    alike = [m for m in chains if len({type(block) for block in m}) == 1]
    if not alike:
        raise BadInput(
            f"{type(network).__name__} is neither a U-Net nor a chain of at least three blocks "
            "alike, so that nothing in it can be used again"
        )
    longest = max(alike, key=len)
    return Blocks(longest[0], tuple(longest[1:]), residual=True)


class Branch:
    """What one branch of guidance has left of its last whole call in a run."""

    def __init__(self) -> None:
        self.since = 0  # calls since then
        self.change: Tensor | None = None  # of the first block
        self.outputs: dict[int, Any] = {}


class Reuse:
    """The blocks of a network, whose forwards it stands in for until it is undone.

    A run is known by its times, which fall; a call at the same time as the one before is of another
    branch of guidance. Nothing is used again across runs, branches or shapes.

    Args:
        network: Of diffusers.
        run: Returns the number of the run.

    Attributes:
        decide: Whether a call is whole; None: each is.
        calls: Calls of the network so far, and how many of them were whole.
        changes: Where it is a list, the first block's changes are added to it.
    """

    def __init__(self, network: nn.Module, run: Callable[[], int]) -> None:
        self.blocks, self.run = blocks_of(network), run
        self.decide: Decide | None = None
        self.calls = [0, 0]
        self.changes: list[Tensor] | None = None
        self.restart()
        network.register_forward_pre_hook(self._begin, with_kwargs=True)
        self.blocks.first.forward = _First(self, self.blocks.first)
        last = len(self.blocks.later) - 1
        for i, block in enumerate(self.blocks.later):
            block.forward = _Later(self, block, i, i == last)

    def restart(self) -> None:
        """Forget the run before."""
        self.branches: dict[int, Branch] = {}
        self.branch, self.whole = Branch(), True
        self._last = (float("inf"), self.run(), None)  # time, run and shape of a call
        self._number = 0  # of its branch

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x: Any = args[0] if args else kwargs.get("sample", kwargs.get("hidden_states"))
        t = args[1] if len(args) > 1 else kwargs.get("timestep")
        now = float(torch.as_tensor(t).flatten()[0])
        time, *same = self._last
        if now > time or [self.run(), x.shape] != same:
            self.restart()
        self._number = self._number + 1 if now == self._last[0] else 0
        self._last = (now, self.run(), x.shape)
        self.branch = self.branches.setdefault(self._number, Branch())
        self.calls[0] += 1

    def judge(self, change: Tensor) -> None:
        """Decide whether this call is whole, by the first block's change of what went in."""
        own = self.branch
        if self.changes is not None:
            self.changes.append(change.detach().float())
        before = own.change
        self.whole = (
            self.decide is None
            or before is None
            or self.decide(own.since, lambda: relative(change, before))
        )
        if self.whole:
            own.since, own.outputs = 0, {}
            own.change = change.detach() if self.decide is not None else None
            self.calls[1] += 1
        own.since += 1


def relative(now: Tensor, before: Tensor) -> float:
    """Return the mean absolute difference of two changes, as a share of the earlier one's mean."""
    return float((now - before).abs().mean() / before.abs().mean().clamp(min=1e-12))


def whole_calls(changes: Sequence[Tensor], threshold: float) -> int:
    """Return how many of a run's calls would be whole: those whose first block's change differs
    from that of the last whole one by the threshold or more.

    Args:
        changes: Of each call, in order.
        threshold: As a share (`relative`).
    """
    count, last = 0, None
    for change in changes:
        if last is None or relative(change, last) >= threshold:
            count, last = count + 1, change
    return count


def _hidden(value: Any) -> Tensor:
    return value[0] if isinstance(value, tuple) else value


class _First:
    """The forward of the block that always runs."""

    def __init__(self, reuse: Reuse, block: nn.Module) -> None:
        self.reuse, self.own, self.block = reuse, block.forward, block

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        out = self.own(*args, **kwargs)
        x, y = args[0] if args else kwargs["hidden_states"], _hidden(out)
        self.reuse.judge(y - x if x.shape == y.shape else y)
        return out


class _Later:
    """The forward of a block that may be left out."""

    def __init__(self, reuse: Reuse, block: nn.Module, index: int, last: bool) -> None:
        self.reuse, self.own, self.index, self.last = reuse, block.forward, index, last

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        reuse, outputs = self.reuse, self.reuse.branch.outputs
        x = args[0] if args else kwargs["hidden_states"]
        if reuse.whole:
            if reuse.blocks.residual and self.index == 0:
                outputs[-1] = x
            out = self.own(*args, **kwargs)
            if reuse.decide is not None and not reuse.blocks.residual:
                outputs[self.index] = out
            elif reuse.decide is not None and self.last:
                outputs[self.index] = _hidden(out) - outputs.pop(-1)
            return out
        if not reuse.blocks.residual:
            return outputs[self.index]
        return x + outputs[self.index] if self.last else x
