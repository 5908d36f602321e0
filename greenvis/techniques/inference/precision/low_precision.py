"""Low precision: the finished model served with fewer bits, beside the precision it has."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from greenvis.core.example import tensors_in
from greenvis.core.modes import removing
from greenvis.core.technique import InputShape, Installed, Technique
from greenvis.errors import BadInput
from greenvis.models.structure import example_input
from greenvis.models.structure.probing import image, probing
from greenvis.techniques.inference.precision._int8 import in_int8, layers, refuse_int8

_NAMES = {torch.float32: "fp32", torch.float64: "fp64"}


class LowPrecision(Technique):
    """Serve the finished model with fewer bits, in bfloat16 (Kalamkar et al., 2019) and with int8
    weights and activations (Jacob et al., 2018, eq. 3), as operating points beside its own
    precision, with what each reaches and costs.

    Saves time and memory of inference on hardware that multiplies such numbers (a third to a half
    of the time of a small vision transformer on such a processor), little or nothing elsewhere: on
    one with AVX2 alone int8 took 0.8 to 0.9 of the time of a DeiT-Ti and bfloat16 7 times it. With
    `token_merge` savings multiply, or better: 0.82 in int8 and 0.76 with r = 8 were 0.52 of the
    time together. Costs no
    training and about two decimal digits of the answers. Weights and images are rounded for as long
    as the setting holds; batch norms stay in float32, as do the answers. The model itself stays as
    it is: there is nothing to fold.

    `int8` is for processors, by torch's own kernels: Linears and pointwise convolutions, each row
    of a weight with a scale of its own; other layers stay as they are. Activations have the scale
    of their batch, so that an answer depends, in its last digits, on the images beside it. (Those
    of torchao, which have one per token, took 1.7 times the time of float32 here uncompiled.) A
    convolutional net gains more from bfloat16 in `channels_last`; hold that against the same in
    float32.

    Example:
        >>> live = gv.wrap(model, gv.LowPrecision())
        >>> sorted(live.operating_points())
        ['bf16', 'fp32']
        >>> with live.operating_points()["bf16"], torch.inference_mode():
        ...     model(x).dtype, model.head.weight.dtype
        (torch.float32, torch.bfloat16)
    """

    name = "low_precision"
    stage = "objective"
    examples = ({}, {"precisions": ["bf16", "int8"]})

    precisions: list[Literal["bf16", "int8"]] = Field(
        default=["bf16"], min_length=1, description="which to serve in, beside its own"
    )
    input_shape: InputShape = None

    def install(self, model: nn.Module) -> Installed:
        """Try the model in each precision. Raises BadInput for one that does not run in it, or is
        of few bits already."""
        own = next((p.dtype for p in model.parameters() if p.is_floating_point()), None)
        if own not in _NAMES:
            raise BadInput(
                f"{type(model).__name__} is in {own}: low precision is for a model in float32"
            )
        example = (
            example_input(model) if self.input_shape is None else image(model, self.input_shape)
        )
        if "int8" in self.precisions:
            refuse_int8(model)
        for name in self.precisions:
            try:
                with probing(model), _WITHIN[name](model):
                    model(example)
            except Exception as error:  # whatever an operation raises that knows no such numbers
                raise BadInput(
                    f"{type(model).__name__} does not run in {_SPELLED[name]}: "
                    f"{str(error).strip()[:200]}"
                ) from error
        return InstalledLowPrecision(model, _NAMES[own], tuple(dict.fromkeys(self.precisions)))


class InstalledLowPrecision(Installed):
    """A model that can be served with fewer bits. own: the name of its own precision."""

    def __init__(self, model: nn.Module, own: str, precisions: tuple[str, ...]) -> None:
        super().__init__()
        self.model, self.own, self.precisions = model, own, precisions

    def operating_points(self) -> Mapping[str, AbstractContextManager[dict[str, Any]]]:
        """Return the model's own precision and those asked for."""
        return {self.own: _as_it_is(), **{n: _WITHIN[n](self.model) for n in self.precisions}}

    def facts(self) -> Mapping[str, Any]:
        """Return how many weights, of all, are of eight bits in that setting."""
        if "int8" not in self.precisions:
            return {}
        weights = sum(m.weight.numel() for m in layers(self.model).values())
        everything = sum(p.numel() for p in self.model.parameters())
        return {"low_precision": {"int8_weights": weights, "parameters": everything}}


@contextmanager
def _as_it_is() -> Iterator[dict[str, Any]]:
    yield {}


@contextmanager
def in_bfloat16(model: nn.Module) -> Iterator[dict[str, Any]]:
    """Hold a model's parameters and images in bfloat16 within the block, but for batch norms.

    Its parameters have their own values back afterwards, bit for bit. For inference alone.

    Args:
        model: The model.

    Yields:
        An empty mapping.
    """
    spared = {id(p) for m in model.modules() if _is_norm(m) for p in m.parameters(recurse=False)}
    tensors = {id(p): p for p in model.parameters() if id(p) not in spared}
    buffers = (b for m in model.modules() if not _is_norm(m) for b in m.buffers(recurse=False))
    tensors |= {id(b): b for b in buffers}
    wide = {key: t.data for key, t in tensors.items() if t.is_floating_point()}
    hooks = [
        model.register_forward_pre_hook(_narrow, with_kwargs=True),
        model.register_forward_hook(_widen),
    ]
    try:
        with removing(hooks):
            for key, value in wide.items():
                tensors[key].data = value.to(torch.bfloat16)
            yield {}
    finally:
        for key, value in wide.items():
            tensors[key].data = value


def _is_norm(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.batchnorm._BatchNorm)


def _narrow(module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
    return _mapped(args, torch.bfloat16), _mapped(kwargs, torch.bfloat16)


def _widen(module: nn.Module, args: Any, output: Any) -> Any:
    if isinstance(output, Mapping):  # and a library's own class of outputs
        for key, value in output.items():
            output[key] = _mapped(value, torch.float32)  # type: ignore[index]
        return output
    return _mapped(output, torch.float32)


def _mapped(value: Any, dtype: torch.dtype) -> Any:
    """Return the value with its floating-point tensors in this type."""
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, (tuple, list)):
        return type(value)(_mapped(v, dtype) for v in value)
    if isinstance(value, dict) and any(True for _ in tensors_in(value)):
        return {k: _mapped(v, dtype) for k, v in value.items()}
    return value


_WITHIN = {"bf16": in_bfloat16, "int8": in_int8}
_SPELLED = {"bf16": "bfloat16", "int8": "int8"}
