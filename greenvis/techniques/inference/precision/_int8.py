"""Linears and pointwise convolutions in eight bits: each row of a weight has its own scale, the
activations that of their batch, measured when they come."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from greenvis.core.modes import forwarding
from greenvis.errors import BadInput


def layers(model: nn.Module) -> dict[str, Any]:
    """Return the layers that can run in eight bits, by path: those that multiply by their own
    weight, in a forward of their own that nothing has replaced."""
    return {
        path: module
        for path, module in model.named_modules()
        if "forward" not in vars(module) and (_is_plain_linear(module) or _is_pointwise(module))
    }


def _is_plain_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward


def _is_pointwise(conv: Any) -> bool:
    if type(conv).forward is not nn.Conv2d.forward:
        return False
    single = conv.kernel_size == conv.stride == (1, 1)
    return single and conv.groups == 1 and conv.padding in ((0, 0), 0, "valid", "same")


def refuse_int8(model: nn.Module) -> None:
    """Refuse a model that torch's kernels for eight bits do not serve.

    Raises:
        BadInput: On a GPU, on a processor without such kernels, and without layers for them.
    """
    device = next((p.device.type for p in model.parameters()), "cpu")
    if device != "cpu":
        raise BadInput(
            f"int8 is served by torch's kernels for processors, and this model is on {device}: "
            "use bf16 there"
        )
    engine = torch.backends.quantized.engine
    if engine in (None, "none") or not hasattr(torch, "quantize_per_channel"):
        raise BadInput("this build of torch has no kernels for int8: use bf16")
    if not layers(model):
        raise BadInput(f"{type(model).__name__} has no Linear or pointwise convolution for int8")


@contextmanager
def in_int8(model: nn.Module) -> Iterator[dict[str, Any]]:
    """Let a model's Linears and pointwise convolutions multiply in eight bits within the block.

    Its parameters are not touched; other layers are as they were. For inference alone.

    Args:
        model: The model, on a processor.

    Yields:
        An empty mapping.
    """
    with ExitStack() as stack:
        for layer in layers(model).values():
            stack.enter_context(forwarding(layer, _Int8(layer)))
        yield {}


class _Int8:
    """The forward of a layer in eight bits."""

    def __init__(self, layer: Any) -> None:
        self.exact = layer.forward
        self.maps = isinstance(layer, nn.Conv2d)
        weight, bias = layer.weight.detach().float().flatten(1), layer.bias
        packed = None if bias is None else bias.detach().float()
        self.packed: Any = torch.ops.quantized.linear_prepack(rounded(weight), packed)

    def __call__(self, x: Tensor) -> Tensor:
        if not x.numel():
            return self.exact(x)
        rows = x.movedim(1, -1) if self.maps else x
        out = torch.ops.quantized.linear_dynamic(rows.float(), self.packed, not _wide())
        return (out.movedim(-1, 1) if self.maps else out).to(x.dtype)


def _wide() -> bool:
    """Whether this processor adds up products of eight bits in 32, else activations get seven."""
    return torch.backends.cpu.get_cpu_capability() == "AVX512" and torch.cpu._is_vnni_supported()


def rounded(weight: Tensor) -> Tensor:
    """Return a weight of eight bits: each row as whole multiples of its largest entry / 127.

    Args:
        weight: (out, in), float32.

    Returns:
        The same, as a quantized tensor.
    """
    scale = (weight.abs().amax(1) / 127).clamp(min=torch.finfo(torch.float32).tiny).double()
    zero = torch.zeros(len(weight), dtype=torch.int64)
    with warnings.catch_warnings():  # torch may take it away some day; `refuse_int8` says so then
        warnings.simplefilter("ignore", UserWarning)
        return torch.quantize_per_channel(weight, scale, zero, 0, torch.qint8)
