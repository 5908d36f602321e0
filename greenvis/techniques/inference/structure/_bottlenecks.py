"""Bottlenecks (pointwise, k×k, pointwise convolution) of any model, found in a traced forward."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from greenvis.core.modes import removing
from greenvis.models.structure.probing import probing
from greenvis.models.structure.trace import Call, Trace, weights_in


@dataclass(frozen=True)
class Bottleneck:
    """One bottleneck and what lies between its convolutions.

    Args:
        reduce: The pointwise convolution into it.
        conv: The k×k convolution.
        expand: The pointwise convolution out of it.
        norm_before: The batch norm behind `reduce`, where there is one.
        norm: The batch norm behind `conv`, where there is one.
        act: The activation behind that; None where there is none, or the norm has it inside.
        act_stays: Whether what applies the activation has other uses, so that it cannot be taken
            away (it changes nothing that it has been applied to).
        obstacle: Why the k×k convolution cannot be replaced; "" where it can.
    """

    reduce: Call
    conv: Call
    expand: Call
    norm_before: nn.Module | None
    norm: nn.Module | None
    act: nn.Module | None
    act_stays: bool = False
    obstacle: str = ""


def bottlenecks(model: nn.Module, traced: Trace) -> list[Bottleneck]:
    """Return the bottlenecks of a model.

    Args:
        model: The model.
        traced: A forward of it.

    Returns:
        One entry per k×k convolution, in order of execution.
    """
    triples = list(_triples(traced))
    flow = _Flow(model, traced.input) if triples else None
    return [_describe(model, flow, *triple) for triple in triples] if flow else []


def _triples(traced: Trace) -> list[tuple[Call, Call, Call]]:
    convs = {c.path: c for c in traced.calls if c.kind == "conv" and c.direct and not c.functional}
    times = [c.path for c in traced.calls]
    once = {path: call for path, call in convs.items() if times.count(path) == 1}
    out: dict[str, tuple[Call, Call, Call]] = {}
    for expand in once.values():
        if not _pointwise(expand) or ("sum", None) in expand.sources:
            continue
        for conv in (once[p] for kind, p in expand.sources if kind == "weight" and p in once):
            inner = weights_in(conv.sources)
            if _pointwise(conv) or len(inner) != 1 or inner[0] not in once:
                continue
            reduce = once[inner[0]]
            if not _pointwise(reduce) or ("sum", None) in conv.sources:
                continue
            # nothing else is joined on the way (a dense or inception block)
            if reduce.out_shape[1] == conv.in_shape[1] and conv.out_shape[1] == expand.in_shape[1]:
                # the last to read it: before that stands a gate (squeeze-and-excitation)
                out[conv.path] = reduce, conv, expand
    return [*out.values()]


def _pointwise(call: Call) -> bool:
    dense = call.in_features == call.in_shape[1]
    return dense and math.prod(call.weight_shape[2:]) == 1


class _Flow:
    """Which module reads what a module gave, and the values of one forward."""

    def __init__(self, model: nn.Module, x: Tensor) -> None:
        self.readers: dict[int, list[nn.Module]] = defaultdict(list)  # by id of a tensor
        self.outputs: dict[nn.Module, Tensor] = {}  # held, so that no id comes twice
        self.inputs: dict[nn.Module, Tensor] = {}
        self.values: dict[nn.Module, tuple[Tensor, Tensor]] = {}
        self.runs: dict[nn.Module, int] = defaultdict(int)
        parts = [m for m in model.modules() if not m._modules or isinstance(m, _BatchNorm)]
        hooks = [m.register_forward_pre_hook(self._before) for m in parts]
        hooks += [m.register_forward_hook(self._after) for m in parts]
        with removing(hooks), probing(model):
            model(x)

    def _before(self, module: nn.Module, args: Any) -> None:
        if args and isinstance(args[0], Tensor):
            self.inputs[module] = args[0]
            self.readers[id(args[0])].append(module)
            if isinstance(module, (_ConvNd, _BatchNorm)):
                self.values[module] = args[0].clone(), args[0]

    def _after(self, module: nn.Module, args: Any, output: Any) -> None:
        self.runs[module] += 1
        if isinstance(output, Tensor):
            self.outputs[module] = output
            if isinstance(module, _BatchNorm):  # an activation may change it in place
                self.values[module] = output.clone(), output

    def behind(self, module: nn.Module) -> list[nn.Module]:
        """Return the modules that read what `module` gave, but itself."""
        output = self.outputs.get(module)
        return [] if output is None else [m for m in self.readers[id(output)] if m is not module]


def _describe(model: nn.Module, flow: _Flow, reduce: Call, conv: Call, expand: Call) -> Bottleneck:
    modules = [model.get_submodule(c.path) for c in (reduce, conv, expand)]
    norm_before, norm = (_norm(flow, m) for m in modules[:2])
    parts = reduce, conv, expand, norm_before, norm
    if not all(isinstance(m, _ConvNd) and not hasattr(m, "parametrizations") for m in modules):
        return Bottleneck(*parts, None, obstacle="it computes its weights")
    if any(isinstance(n, nn.Module) and flow.runs[n] > 1 for n in (norm_before, norm)):
        return Bottleneck(*parts, None, obstacle="its batch norm is shared")
    if norm is not None and any(not isinstance(m, nn.Identity) for m in norm.children()):
        return Bottleneck(*parts, None)
    last = norm or modules[1]
    if ("act", None) not in expand.sources:
        return Bottleneck(*parts, None)
    value = flow.values[norm][0] if norm is not None else flow.outputs[last]
    act = next((m for m in flow.behind(last) if _is_activation(m, value)), None)
    if act is not None and flow.runs[act] == 1 and next(act.parameters(), None) is None:
        return Bottleneck(*parts, act)
    candidates = [act] if act is not None else [nn.ReLU(), nn.ReLU6()]
    got = flow.values[modules[2]][0]
    for one in candidates:
        answer = one(value.clone())
        fits = act is not None or (answer.shape == got.shape and torch.equal(answer, got))
        if fits and torch.equal(one(answer.clone()), answer):
            return Bottleneck(*parts, one, act_stays=True)
    return Bottleneck(*parts, None, obstacle="its activation has other uses and is no ReLU")


def _norm(flow: _Flow, conv: nn.Module) -> nn.Module | None:
    return next((m for m in flow.behind(conv) if isinstance(m, _BatchNorm)), None)


def _is_activation(module: nn.Module, value: Tensor) -> bool:
    """Whether a module changes each element by itself, and some."""
    if isinstance(module, (_ConvNd, _BatchNorm)) or next(module.parameters(), None) is not None:
        return False
    order = torch.randperm(value.numel(), generator=torch.Generator().manual_seed(0))
    shuffled = value.flatten()[order.to(value.device)].view_as(value)
    with torch.no_grad():
        one, other = module(value.clone()), module(shuffled.clone())
    if not isinstance(one, Tensor) or one.shape != value.shape or torch.equal(one, value):
        return False
    return torch.allclose(one.flatten()[order.to(value.device)].view_as(value), other)
