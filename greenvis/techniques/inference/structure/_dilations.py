"""Dilated copies of one convolution with shared weights, and what has to follow its rate: padding,
and what a causal network adds before or cuts off behind."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from greenvis.core.modes import removing
from greenvis.errors import BadInput
from greenvis.models.structure.probing import probing

Rate = tuple[int, ...]
START = 0.01  # of branches' weights


def shares(weights: Tensor) -> Tensor:
    """Return α = |w| / Σ|w| (RF-Next: Gao et al., 2023, eq. 5).

    Args:
        weights: (branches,).

    Returns:
        (branches,), which add up to 1.
    """
    return weights.abs() / weights.abs().sum()


def expand(
    dilation: Sequence[int],
    spread: float,
    branches: int,
    least: int = 1,
    most: int | None = None,
    gap: int = 0,
) -> list[Rate]:
    """Return the rates around a dilation that are tried next: D - Δ to D + Δ in equal steps, Δ =
    spread · D, rounded half to even, without repetition (RF-Next, 3.3).

    Args:
        dilation: D, one per axis.
        spread: Δ as a share of D.
        branches: How many rates.
        least: The smallest rate.
        most: The largest rate; None for any.
        gap: With 1 rates stand at least 1 apart, so that a small D moves at all.

    Returns:
        Rates, ascending, each with one entry per axis; fewer than `branches` where some coincide.
    """
    if branches == 1:
        return [tuple(dilation)]
    steps = [2 * i / (branches - 1) - 1 for i in range(branches)]
    axes = []
    for rate in dilation:
        delta = max(spread * rate, gap * math.ceil((branches - 1) / 2))
        rounded = [max(least, round(rate + delta * step)) for step in steps]
        axes.append([value if most is None else min(most, value) for value in rounded])
    return [*dict.fromkeys(zip(*axes, strict=True))]


def estimate(rates: Sequence[Rate], weights: Tensor) -> Rate:
    """Return Σ α_i d_i, rounded half to even (RF-Next, eq. 6).

    Args:
        rates: The branches' dilations.
        weights: (branches,), before they are made shares.

    Returns:
        One rate per axis.
    """
    alphas = shares(weights.detach().double().cpu()).tolist()
    return tuple(
        round(sum(a * rate[axis] for a, rate in zip(alphas, rates, strict=True)))
        for axis in range(len(rates[0]))
    )


def branch_sum(
    branch: Callable[[Rate], Tensor],
    rates: Sequence[Rate],
    weights: Tensor,
    act: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Return Σ α_i · branch(d_i) (RF-Next, eq. 5).

    Args:
        branch: The convolution's output at a rate.
        rates: The branches' dilations.
        weights: (branches,).
        act: Applied to each branch before the sum, as the authors' one-dimensional code does with
            ReLU; None for the paper's sum of linear branches, which alone folds.

    Returns:
        Of the shape a branch has.
    """
    total: Tensor | None = None
    for rate, alpha in zip(rates, shares(weights), strict=True):
        y = branch(rate)
        y = alpha * (y if act is None else act(y))
        total = y if total is None else total + y
    assert total is not None
    return total


def merged_kernel(
    weight: Tensor, rates: Sequence[Rate], weights: Tensor, causal: bool = False
) -> Tensor:
    """Return the one undilated kernel that equals all branches.

    Args:
        weight: (out, in / groups, *kernel), of odd sides unless causal.
        rates: The branches' dilations.
        weights: (branches,).
        causal: Whether the branches agree in their last element, not in their middle.

    Returns:
        (out, in / groups, *larger kernel); a side k becomes (k - 1)·(largest rate) + 1.
    """
    sides = weight.shape[2:]
    largest = [max(rate[axis] for rate in rates) for axis in range(len(sides))]
    spans = [(k - 1) * d + 1 for k, d in zip(sides, largest, strict=True)]
    out = weight.new_zeros(*weight.shape[:2], *spans)
    for rate, alpha in zip(rates, shares(weights), strict=True):
        where = []
        for k, d, span in zip(sides, rate, spans, strict=True):
            start = (span - ((k - 1) * d + 1)) // (1 if causal else 2)
            where.append(slice(start, start + (k - 1) * d + 1, d if k > 1 else 1))
        out[(slice(None), slice(None), *where)] += alpha * weight
    return out


@dataclass
class Site:
    """A convolution and what follows its rate.

    Args:
        path: Of the convolution.
        size: The positions of its input.
        causal: "" where both sides are padded alike, else who pads a causal one: "itself" (on both
            sides, cut behind), "before" (something before it), "own" (its class).
        follows: Modules with the attribute that is to be the reach, (kernel - 1)·rate.
    """

    path: str
    size: tuple[int, ...]
    causal: str = ""
    follows: list[tuple[nn.Module, str]] = field(default_factory=list)


def sites(model: nn.Module, paths: Sequence[str], x: Tensor) -> list[Site]:
    """Return where dilations can be searched, with what follows them.

    Args:
        model: The model.
        paths: Of convolutions.
        x: Images (batch, channels, height, width).

    Returns:
        One entry per convolution.

    Raises:
        BadInput: For a causal one of which it cannot be seen who pads or cuts.
    """
    inputs: dict[nn.Module, Tensor] = {}
    outputs: dict[nn.Module, Tensor] = {}  # held, so that no id comes twice

    def note(module: nn.Module, args: Any, output: Any) -> None:
        if args and isinstance(args[0], Tensor) and isinstance(output, Tensor):
            inputs[module], outputs[module] = args[0], output

    hooks = [m.register_forward_hook(note) for m in model.modules()]
    with removing(hooks), probing(model):
        model(x)
    out = []
    for path in paths:
        conv: Any = model.get_submodule(path)
        site = Site(path, tuple(inputs[conv].shape[2:]))
        one_axis = len(conv.kernel_size) == 1 and conv.kernel_size[0] > 1
        if one_axis and conv.padding_mode == "zeros":
            parent = model.get_submodule(path.rpartition(".")[0])
            before = [m for m in outputs if m is not conv and outputs[m] is inputs[conv]]
            behind = [m for m in inputs if m is not conv and inputs[m] is outputs[conv]]
            added = 0
            if parent in inputs and inputs[parent].dim() == inputs[conv].dim():
                added = inputs[conv].shape[-1] - inputs[parent].shape[-1]
            _look(site, conv, parent, before, behind, added)
        out.append(site)
    return out


def _look(
    site: Site,
    conv: Any,
    parent: nn.Module,
    before: list[nn.Module],
    behind: list[nn.Module],
    added: int,
) -> None:
    """Note who pads a causal convolution along one axis. added: positions its input has more than
    that of the module it is in."""
    reach = (conv.kernel_size[0] - 1) * conv.dilation[0]
    if own := _numbers(conv, reach):
        site.causal, site.follows = "own", [(conv, name) for name in own]
    elif conv.padding == (reach,):
        site.causal = "itself"
        site.follows = [(m, name) for m in (*behind, parent) for name in _numbers(m, reach)][:1]
    elif conv.padding == (0,):
        pads = [(m, "padding") for m in before if getattr(m, "padding", None) == (reach, 0)]
        names = [(parent, name) for name in _numbers(parent, reach)] if added == reach else []
        if pads or added == reach:
            site.causal, site.follows = "before", [*pads, *names][:1]
    if site.causal and not site.follows:
        raise BadInput(
            f"'{site.path}' is padded by its whole reach ({reach}), as a causal convolution is, "
            "but nothing around it names that number, so that it would not follow another "
            "dilation; leave it out of targets"
        )


def _numbers(module: nn.Module, reach: int) -> list[str]:
    """Return the names of attributes that hold the reach and are no setting of the library's."""
    settings = {"in_channels", "out_channels", "groups", "num_features"}
    values = vars(module).items()
    return [n for n, v in values if type(v) is int and v == reach and n not in settings]


def settings(conv: Any, rate: Rate) -> dict[str, Any]:
    """Return the attributes of a convolution at another rate, at which its output has the same
    size.

    Args:
        conv: The convolution, of odd sides.
        rate: One entry per axis.

    Returns:
        Values by attribute.
    """
    if conv.padding == "same":
        padding: Any = "same"
        reaches = [(k - 1) * d for k, d in zip(conv.kernel_size, rate, strict=True)]
        pads = [(reach // 2, reach - reach // 2) for reach in reaches]
    else:
        old = (0,) * len(rate) if conv.padding == "valid" else conv.padding
        each = zip(old, conv.kernel_size, conv.dilation, rate, strict=True)
        padding = tuple(p + (k - 1) * (new - was) // 2 for p, k, was, new in each)
        pads = [(p, p) for p in padding]
    return {
        "dilation": tuple(rate),
        "padding": padding,
        "_reversed_padding_repeated_twice": [side for pair in reversed(pads) for side in pair],
    }


class Branches(nn.Module):
    """A convolution at several rates at once, with one weight: Σ α_i conv(x, d_i).

    Args:
        conv: The convolution, of any class; its own forward is what runs.
        site: What follows its rate.
        branches: How many rates at most.
    """

    def __init__(self, conv: nn.Module, site: Site, branches: int) -> None:
        super().__init__()
        self.conv, self.site = conv, site
        inner: Any = conv
        self.rates: list[Rate] = [tuple(inner.dilation)]
        self.weights = nn.Parameter(inner.weight.detach().new_full((branches,), START))

    def forward(self, x: Tensor) -> Tensor:
        """Return the sum of the branches; the convolution's own answer at one rate."""
        weights = self.weights[: len(self.rates)]
        return branch_sum(lambda rate: self.at(rate, x), self.rates, weights)

    def at(self, rate: Rate, x: Tensor) -> Tensor:
        """Return the convolution's output at a rate, of the size it has at its own."""
        conv: Any = self.conv
        changes, own = self._changes(rate), vars(conv)
        before = {name: own[name] for name in changes}
        if self.site.causal in ("itself", "before"):
            x = F.pad(x, self._sides(rate))
        try:
            own.update(changes)
            return conv(x)
        finally:
            own.update(before)

    def _reach(self, rate: Rate) -> int:
        conv: Any = self.conv
        return (conv.kernel_size[0] - 1) * rate[0]

    def _changes(self, rate: Rate) -> dict[str, Any]:
        conv: Any = self.conv
        reach = self._reach(rate)
        if self.site.causal == "own":
            out: dict[str, Any] = {name: reach for _, name in self.site.follows}
            out["padding"] = (0,) if conv.padding == (0,) else (reach,)
            return {**out, "dilation": tuple(rate)}
        if self.site.causal:
            return {"dilation": tuple(rate), "padding": (0,)}
        return settings(conv, rate)

    def _sides(self, rate: Rate) -> tuple[int, int]:
        conv: Any = self.conv
        reach, own = self._reach(rate), self._reach(conv.dilation)
        return (reach, own) if self.site.causal == "itself" else (reach - own, 0)

    def settled(self, rate: Rate) -> dict[nn.Module, dict[str, Any]]:
        """Return the attributes, by module, of the convolution at this rate for good: its own, and
        those of what pads or cuts."""
        changes, reach = self._changes(rate), self._reach(rate)
        out = {self.conv: changes}
        if self.site.causal in ("itself", "before"):
            module, name = self.site.follows[0]
            out[module] = {name: (reach, 0) if name == "padding" else reach}
        if self.site.causal == "itself":
            changes |= {"padding": (reach,), "_reversed_padding_repeated_twice": [reach, reach]}
        return out
