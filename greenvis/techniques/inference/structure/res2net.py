"""Res2Net: each bottleneck's convolution becomes a ladder of narrow ones, for more scales from
fewer MACs."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from greenvis.core.surgery import find, names_of, replace
from greenvis.core.technique import InputShape, Installed, Technique
from greenvis.errors import BadInput
from greenvis.models.structure.probing import image
from greenvis.models.structure.trace import Call, trace, trace_any
from greenvis.techniques._shared.attach import check_runs
from greenvis.techniques.inference.structure._bottlenecks import Bottleneck, bottlenecks

_POOLS: dict[int, Any] = {3: nn.AvgPool1d, 4: nn.AvgPool2d, 5: nn.AvgPool3d}


def multi_scale(
    x: Tensor,
    width: int,
    convs: Sequence[nn.Module],
    norms: Sequence[nn.Module],
    act: nn.Module | None = None,
    pool: nn.Module | None = None,
) -> Tensor:
    """Return what a Res2Net block computes between its pointwise convolutions (Gao et al., 2021,
    eq. 1).

    y_i = K_i(x_i + y_(i-1)), y_0 = 0, for the parts that have a convolution; the last part passes
    by, as in the authors' code (the paper has the first pass by, which is the same but for the
    order of channels).

    Args:
        x: (batch, channels, height, width), or with one or three axes of positions.
        width: Channels of each part that is convolved; what remains passes by.
        convs: One convolution per such part.
        norms: One norm per convolution.
        act: The activation behind each norm; None where norms have it inside, or there is none.
        pool: In the first block of a stage, where parts are not added up: what the part that
            passes by goes through. None elsewhere.

    Returns:
        (batch, channels, height / stride, width / stride).
    """
    out: list[Tensor] = []
    for i, (conv, norm) in enumerate(zip(convs, norms, strict=True)):
        part = x[:, i * width : (i + 1) * width]
        y = norm(conv(part if pool is not None or not out else out[-1] + part))
        out.append(y if act is None else act(y))
    if width * len(convs) < x.shape[1]:
        rest = x[:, width * len(convs) :]
        out.append(rest if pool is None else pool(rest))
    return torch.cat(out, 1)


class Split(nn.Module):
    """What stands in place of a bottleneck's k×k convolution; see `multi_scale`."""

    def __init__(
        self,
        width: int,
        convs: Sequence[nn.Module],
        norms: Sequence[nn.Module],
        act: nn.Module | None,
        pool: nn.Module | None,
    ) -> None:
        super().__init__()
        self.width = width
        self.convs, self.bns = nn.ModuleList(convs), nn.ModuleList(norms)
        self.act, self.pool = act, pool

    def forward(self, x: Tensor) -> Tensor:
        """Return the parts' outputs, one behind the other."""
        return multi_scale(x, self.width, [*self.convs], [*self.bns], self.act, self.pool)


class Res2Net(Technique):
    """Replace the convolution of each bottleneck by a ladder of narrow ones, so that one block sees
    several scales from fewer MACs (Res2Net: Gao et al., 2021).

    Saves the k×k convolution's MACs where `width` is keep: (s-1)/s² of before, 3/16 for s = 4. With
    `width: equal` a block has the MACs it had and, in the authors' trials, loses accuracy nowhere;
    but it costs 1.1 to 1.25 times the time per MAC, for narrow convolutions fill a processor less
    well: at equal MACs it loses energy, and only a width below the original's saves. (`keep` with s
    = 4 has 0.68 of a ResNet-26's MACs and took 0.75 of its joules; in a small network trained for
    few epochs it lost 1.4 points.) A number is the paper's base width w: ⌊n·w/64⌋ channels per part
    (26 with s = 4 has about the MACs of a ResNet-50, 18 has 69 %). Parts begin as the diagonal
    blocks of the convolution's kernel with `keep`, else at random: for s > 1 the answers change, so
    train anew, or distil from the original. It cannot be merged, as a norm and an activation stand
    between parts; batch norms fold (`gv.fold_norms`).

    Example:
        >>> live = gv.wrap(bottleneck_resnet, gv.Res2Net(scale=4))
        >>> live.facts()["res2net_widths"]["layer3.0.conv2"]
        4
        >>> live.undo() is bottleneck_resnet
        True
    """

    name = "res2net"
    stage = "base"
    needs = frozenset({"trainable_base"})
    examples = ({}, {"scale": 2, "width": "equal"}, {"scale": 3, "width": 24})
    neutral = {"scale": 1, "width": "keep"}
    nothing = {"targets": ["no_such_convolution"]}

    scale: int = Field(default=4, ge=1, description="parts s that a block's channels are split in")
    width: Literal["keep", "equal"] | int = Field(
        default="keep",
        description="keep: as many channels as before; equal: as many MACs; a number: the paper's "
        "base width, of 64",
    )
    targets: list[str] | None = Field(
        default=None, description="shell patterns on the k×k convolutions' paths; default all"
    )
    input_shape: InputShape = None

    def install(self, model: nn.Module) -> Installed:
        """Convert the bottlenecks. Raises BadInput for a model without any, or whose parts do not
        fit."""
        if isinstance(self.width, int) and self.width < 1:
            raise BadInput(f"width is {self.width}; it is keep, equal or a base width from 1 on")
        chosen = None if self.targets is None else find(model, self.targets, nn.Module)
        traced = (
            trace_any(model)
            if self.input_shape is None
            else trace(model, image(model, self.input_shape))
        )
        sites = [
            site
            for site in bottlenecks(model, traced)
            if chosen is None or site.conv.path in chosen
        ]
        if not sites:
            raise BadInput(
                f"{type(model).__name__} has no bottleneck (pointwise, k×k, pointwise convolution)"
                + ("" if chosen is None else f" among {chosen}")
                + ", which is what is converted; its other convolutions stay as they are"
            )
        for site in sites:
            if site.obstacle:
                raise BadInput(
                    f"'{site.conv.path}' cannot be converted: {site.obstacle}; name others by "
                    "targets"
                )
        widths = {site.conv.path: self._width(model, site) for site in sites}
        before = {id(p) for p in model.parameters()}
        for site in sites:
            self._convert(model, site, widths[site.conv.path])
        added = [p for p in model.parameters() if id(p) not in before]
        check_runs(model, traced.input, added, "narrow convolutions")
        return InstalledRes2Net(widths, names_of(model, added))

    def _width(self, model: nn.Module, site: Bottleneck) -> int:
        """Return the channels of each part that is convolved."""
        conv: Any = model.get_submodule(site.conv.path)
        channels, depthwise = conv.in_channels, conv.groups == conv.in_channels
        step = 1 if depthwise else conv.groups
        if conv.in_channels != conv.out_channels:
            raise BadInput(
                f"'{site.conv.path}' makes {conv.out_channels} channels of {conv.in_channels}: "
                "parts cannot be added up; name others by targets"
            )
        if self.width == "keep":
            width = channels // self.scale
        elif self.width == "equal":
            most = _macs(site, channels, channels, 1, step if not depthwise else channels)
            width = 1
            while (
                _macs(site, self.scale * (width + 1), width + 1, max(1, self.scale - 1),
                      width + 1 if depthwise else step)
                <= most
            ):  # fmt: skip
                width += 1
        else:
            width = channels * self.width // 64
        width = width // step * step
        if width < 1:
            raise BadInput(
                f"'{site.conv.path}' has {channels} channels in {conv.groups} groups, too few for "
                f"{self.scale} parts of width {self.width}: lower scale, or raise width"
            )
        return width

    def _convert(self, model: nn.Module, site: Bottleneck, width: int) -> None:
        conv: Any = model.get_submodule(site.conv.path)
        channels = conv.in_channels
        inside = channels if self.width == "keep" else self.scale * width
        first = (
            any(step > 1 for step in conv.stride)
            or site.conv.in_shape[2:] != site.conv.out_shape[2:]
            or site.reduce.in_features != site.expand.out_features
        )
        convs, norms = [], []
        for i in range(max(1, self.scale - 1)):
            rows = slice(i * width, (i + 1) * width) if inside == channels else None
            convs.append(_part(conv, width, rows))
            norms.append(nn.Identity() if site.norm is None else _norm(site.norm, width, rows))
        pool = _POOLS[conv.weight.dim()](3, conv.stride, 1) if first else None
        act = copy.deepcopy(site.act)
        split = Split(width, convs, norms, act, pool).train(conv.training)
        replace(model, conv, split)
        if site.norm is not None:
            replace(model, site.norm, nn.Identity())
        if site.act is not None and not site.act_stays:
            replace(model, site.act, nn.Identity())
        if inside != channels:
            _resize(model, site, inside)


class InstalledRes2Net(Installed):
    """Narrow convolutions in a live model. widths: channels per part, by the convolution's path."""

    unmergeable = (
        "norms and activations stand between its narrow convolutions, so that no single "
        "convolution equals them; keep the model wrapped"
    )

    def __init__(self, widths: Mapping[str, int], trainable: tuple[str, ...]) -> None:
        super().__init__(trainable)
        self.widths = dict(widths)

    def facts(self) -> Mapping[str, Any]:
        """Return the channels of each part, by path of the convolution that was there."""
        return {"res2net_widths": self.widths}


def _macs(site: Bottleneck, inside: int, width: int, convs: int, groups: int) -> int:
    """Return the MACs of a bottleneck with `inside` channels and so many convolutions in it."""
    kernel = math.prod(site.conv.weight_shape[2:])
    return (
        site.reduce.in_features * inside * _positions(site.reduce)
        + convs * kernel * width * width // groups * _positions(site.conv)
        + inside * site.expand.out_features * _positions(site.expand)
    )


def _positions(call: Call) -> int:
    return math.prod(call.out_shape[2:])


def _part(conv: Any, width: int, rows: slice | None) -> nn.Module:
    """Return a convolution like `conv` of `width` channels, with that part of its kernel where
    there is one."""
    depthwise = conv.groups == conv.in_channels
    groups = width if depthwise else conv.groups
    part = copy.deepcopy(conv)
    part.in_channels = part.out_channels = width
    part.groups = groups
    shape = (width, width // groups, *conv.kernel_size)
    columns = slice(None) if depthwise or width == conv.in_channels else rows
    sliceable = depthwise or conv.groups == 1 or width == conv.in_channels
    with torch.no_grad():
        if rows is not None and columns is not None and sliceable:
            weight = conv.weight[rows][:, columns].clone()
        else:
            weight = nn.init.kaiming_normal_(conv.weight.new_empty(shape), mode="fan_out")
        part.weight = nn.Parameter(weight.reshape(shape), conv.weight.requires_grad)
        if conv.bias is not None:
            bias = conv.bias.new_zeros(width) if rows is None else conv.bias[rows].clone()
            part.bias = nn.Parameter(bias, conv.bias.requires_grad)
    return part


def _norm(norm: Any, width: int, rows: slice | None) -> nn.Module:
    """Return a batch norm like `norm` of `width` channels: those rows of it, or a fresh one."""
    part = copy.deepcopy(norm)
    part.num_features = width
    fresh = {"weight": 1.0, "bias": 0.0, "running_mean": 0.0, "running_var": 1.0}
    with torch.no_grad():
        for name, value in fresh.items():
            old = getattr(norm, name, None)
            if old is None:
                continue
            new = old.new_full((width,), value) if rows is None else old[rows].clone()
            setattr(
                part,
                name,
                nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new,
            )
    return part


def _resize(model: nn.Module, site: Bottleneck, inside: int) -> None:
    """Give the pointwise convolutions around `inside` channels, with fresh weights."""
    for path, axis in ((site.reduce.path, 0), (site.expand.path, 1)):
        old: Any = model.get_submodule(path)
        new = copy.deepcopy(old)
        shape = [*old.weight.shape]
        shape[axis] = inside
        fresh = nn.init.kaiming_normal_(old.weight.new_empty(shape), mode="fan_out")
        new.weight = nn.Parameter(fresh, old.weight.requires_grad)
        if axis == 0:
            new.out_channels = inside
            if old.bias is not None:
                new.bias = nn.Parameter(old.bias.new_zeros(inside), old.bias.requires_grad)
        else:
            new.in_channels = inside
        replace(model, old, new)
    if site.norm_before is not None:
        replace(model, site.norm_before, _norm(site.norm_before, inside, None))
