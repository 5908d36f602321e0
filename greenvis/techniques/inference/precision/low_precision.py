"""Low precision: the finished model served with fewer bits, beside the precision it has."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from greenvis.core.modes import removing
from greenvis.core.technique import InputShape, Installed, Technique
from greenvis.errors import BadInput
from greenvis.models.structure import example_input
from greenvis.models.structure.probing import image, probing
from greenvis.models.structure.trace import tensors_in

_NAMES = {torch.float32: "fp32", torch.float64: "fp64"}


class LowPrecision(Technique):
    """Serve the finished model in bfloat16, as an operating point beside its own precision, with
    what each reaches and costs (bfloat16: Kalamkar et al., 2019).

    Saves time and memory of inference on hardware that multiplies bfloat16 (about a third of the
    time of a small vision transformer on such a processor), nothing elsewhere, where it may cost
    more; costs no training and about two decimal digits of the answers. Weights and images are
    rounded for as long as the setting holds; batch norms stay in float32, as do the answers. The
    model itself stays as it is: there is nothing to fold.

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

    input_shape: InputShape = None

    def install(self, model: nn.Module) -> Installed:
        """Try the model in bfloat16. Raises BadInput for one that does not run in it, or is of few
        bits already."""
        own = next((p.dtype for p in model.parameters() if p.is_floating_point()), None)
        if own not in _NAMES:
            raise BadInput(
                f"{type(model).__name__} is in {own}: low precision is for a model in float32"
            )
        example = (
            example_input(model) if self.input_shape is None else image(model, self.input_shape)
        )
        try:
            with probing(model), in_bfloat16(model):
                model(example)
        except Exception as error:  # whatever an operation raises that knows no bfloat16
            raise BadInput(
                f"{type(model).__name__} does not run in bfloat16: {str(error).strip()[:200]}"
            ) from error
        return InstalledLowPrecision(model, _NAMES[own])


class InstalledLowPrecision(Installed):
    """A model that can be served in bfloat16. own: the name of its own precision."""

    def __init__(self, model: nn.Module, own: str) -> None:
        super().__init__()
        self.model, self.own = model, own

    def operating_points(self) -> Mapping[str, AbstractContextManager[dict[str, Any]]]:
        """Return the model's own precision and bfloat16."""
        return {self.own: _as_it_is(), "bf16": in_bfloat16(self.model)}


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
