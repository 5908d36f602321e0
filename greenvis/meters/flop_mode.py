"""A dispatch mode that looks at operators and runs them untouched: same kernels, same numbers,
FLOPs beside.

torch's own `FlopCounterMode` undercounts fused attention on the CPU and splits operators apart
while it counts; this one uses torch's formulas and adds those it lacks.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import (
    conv_flop_count,
    flop_registry,
    sdpa_backward_flop_count,
    sdpa_flop_count,
)

aten = torch.ops.aten
Formula = Callable[[tuple[Any, ...], dict[str, Any], Any], int]

# Work that may be large and that no formula covers: shown as not counted. Elementwise work, norms,
# pooling and moves are left out by the field's convention.
_HEAVY = re.compile(
    r"fft|cdist|lstm|gru|rnn|quantized|onednn|mkldnn|linalg|einsum|conv"
    r"|mm|matmul|attention|bilinear"
    r"|sparse|mkl|fbgemm|svd"
    r"|cholesky|solve|inverse|grid_sampler|transformer|embedding_bag|dot|kron|mv$|vv"
    r"|addr|ger$|outer"
)
_LIGHT = re.compile(r"upsample|comm|norm|common|sparse_resize|to_mkldnn|to_dense|qscheme|dense_dim")


class FlopMode(TorchDispatchMode):
    """Adds up FLOPs (1 MAC = 2) of what runs inside, in this thread and its backward. Numbers and
    kernels stay.

    total; by_path: FLOPs by each name on `path`, which the caller pushes and pops; by_phase: FLOPs
    by what `phase` says at the time; unhandled: calls of heavy operators without a formula.
    """

    def __init__(self, phase: Callable[[], str] | None = None) -> None:
        super().__init__()
        self._phase = phase
        self.by_phase: Counter[str] = Counter()
        self.total = 0
        self.path: list[str] = []
        self.by_path: Counter[str] = Counter()
        self.unhandled: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operator as it is and add its FLOPs."""
        out = func(*args, **kwargs) if kwargs else func(*args)
        try:
            formula = _routes[func]
        except KeyError:
            formula = _routes[func] = _route(func)
        if formula is not None:
            self._add(func, formula(args, kwargs or {}, out))
        return out

    def _add(self, func: Any, flops: int) -> None:
        if flops < 0:
            self.unhandled[str(getattr(func, "_overloadpacket", func))] += 1
        elif flops:
            self.total += flops
            for name in dict.fromkeys(self.path):
                self.by_path[name] += flops
            if self._phase is not None:
                self.by_phase[self._phase()] += flops


# by operator: its formula, or None where nothing is to be counted
_routes: dict[Any, Formula | None] = {}


def _route(func: Any) -> Formula | None:
    packet = getattr(func, "_overloadpacket", func)
    if packet in FORMULAS:
        return FORMULAS[packet]
    if packet in flop_registry:
        torchs = flop_registry[packet]
        return lambda args, kwargs, out: int(torchs(*args, **kwargs, out_val=out))
    space, _, op = str(packet).partition(".")
    known = space in ("aten", "prim", "prims", "profiler") and not (
        _HEAVY.search(op) and not _LIGHT.search(op)
    )
    return None if known else _unknown


def _unknown(args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> int:
    return -1


def _linear(args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> int:
    """Of x (…, in) and a result (…, out), whatever form the weight has: 2 × in × numel(result)."""
    return 2 * args[0].shape[-1] * out.numel()


def _matmul(args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> int:
    return 2 * args[0].shape[-1] * out.numel()


def _conv(args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> int:
    return conv_flop_count(
        list(args[0].shape), list(args[1].shape), list(out.shape), transposed=False
    )


def _conv_backward(args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> int:
    """Gradients to input and weight cost the forward's products each; torch's own formula forgets
    the groups."""
    grad_out, x, weight = args[:3]
    once = conv_flop_count(
        list(x.shape), list(weight.shape), list(grad_out.shape), transposed=bool(args[7])
    )
    return once * sum(args[10][:2])


def _sdpa(args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> int:
    """Of query (batch…, heads, L, E), key (…, S, E), value (…, S, Ev); grouped-query heads count as
    repeated."""
    query, key, value = args[:3]
    return 2 * math.prod(query.shape[:-1]) * key.shape[-2] * (query.shape[-1] + value.shape[-1])


def _sdpa_cpu(args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> int:
    return sdpa_flop_count(*(tuple(a.shape) for a in args[:3]))


def _sdpa_cpu_backward(args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> int:
    return sdpa_backward_flop_count(*(tuple(a.shape) for a in args[:4]))


def _mha(args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> int:
    """nn.MultiheadAttention's native path: query, key, value (batch, tokens, dim), dim, heads, qkv
    weight, …, out weight."""
    query, key, value, dim = args[:4]
    batch, rows, columns = query.shape[0], query.shape[1], key.shape[1]
    project = 2 * batch * dim * dim * (rows + columns + value.shape[1] + rows)
    return project + 4 * batch * rows * columns * dim


def _encoder_layer(args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> int:
    """nn.TransformerEncoderLayer's native path: src (batch, tokens, dim), dim, heads, …, MLP weight
    (hidden, dim) at 14."""
    src, dim = args[0], args[1]
    batch, rows = src.shape[0], src.shape[1]
    hidden = args[14].shape[0]
    return (
        8 * batch * rows * dim * dim
        + 4 * batch * rows * rows * dim
        + 4 * batch * rows * dim * hidden
    )


_LINEAR_ELSEWHERE = (
    ("quantized", "linear"),
    ("quantized", "linear_relu"),
    ("quantized", "linear_dynamic"),
    ("quantized", "linear_relu_dynamic"),
    ("mkldnn", "_linear_pointwise"),
    ("aten", "mkldnn_linear"),
)


def _formulas() -> dict[Any, Formula]:
    """Return the formulas torch's registry lacks. Composite operators arrive whole only under
    `inference_mode`."""
    table: dict[Any, Formula] = {
        aten.linear: _linear,
        aten.matmul: _matmul,
        aten.convolution_backward: _conv_backward,
        aten.scaled_dot_product_attention: _sdpa,
        aten._scaled_dot_product_attention_math: _sdpa,
        aten._scaled_dot_product_flash_attention_for_cpu: _sdpa_cpu,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: _sdpa_cpu_backward,
        aten._native_multi_head_attention: _mha,
        aten._transformer_encoder_layer_fwd: _encoder_layer,
        aten._int_mm: _linear,
        aten.mv: _linear,
        aten.dot: lambda args, kwargs, out: 2 * args[0].numel(),
        aten.vdot: lambda args, kwargs, out: 2 * args[0].numel(),
        aten.addmv: lambda args, kwargs, out: 2 * args[1].numel(),
    }
    table |= dict.fromkeys((aten.conv1d, aten.conv2d, aten.conv3d), _conv)
    for space, name in _LINEAR_ELSEWHERE:
        op = getattr(getattr(torch.ops, space), name, None)
        if op is not None:
            table[op] = _linear
    return table


FORMULAS = _formulas()
