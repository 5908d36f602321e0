"""FLOPs of a model, counted once by signature: on the meta device, by operator, with a second
counter beside.

1 MAC = 2 FLOPs. By the field's convention elementwise work, norms and pooling count nothing; heavy
operators without a formula are listed in `unhandled`, never passed over in silence.
"""

from __future__ import annotations

import copy
import io
import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from greenvis.core.example import Example, call, tensors_in
from greenvis.core.modes import in_mode
from greenvis.errors import BadInput
from greenvis.meters.flop_mode import FlopMode
from greenvis.meters.speed import quantile

# What fvcore counts and the convention does not.
_APART = (
    "batch_norm", "layer_norm", "group_norm", "instance_norm", "rms_norm", "adaptive_avg_pool1d",
    "adaptive_avg_pool2d",
    "upsample_nearest2d", "upsample_bilinear2d", "grid_sampler",
)  # fmt: skip


@dataclass(frozen=True)
class FlopCount:
    """What one image costs.

    by_module: MACs of the forward by qualified name ("" is the model); counters: MACs by counter;
    with_data: whether it was run where it is, for the work may depend on the data.
    """

    macs: int
    flops: int
    train_flops: int | None = None
    by_module: dict[str, int] = field(default_factory=dict)
    unhandled: dict[str, int] = field(default_factory=dict)
    counters: dict[str, int | None] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    with_data: bool = False

    def as_dict(self) -> dict[str, Any]:
        """Return the fields as JSON can hold them."""
        return asdict(self)


def count(
    model: nn.Module, example: Any, *, train: bool = False, cross_check: bool = True
) -> FlopCount:
    """Count one image's forward (in eval mode) and, with `train`, its forward and backward (in
    train mode, as it learns now).

    The model is not changed: a copy without data is run on the meta device; one that cannot run
    there is run where it is, and put back.

    Args:
        model: any module.
        example: an input shape (C, H, W), or what the model takes: a tensor (batch, …), a dict of
            them, or an `Example`.
        train: count a training step, too.
        cross_check: also count with fvcore.

    Returns:
        MACs and FLOPs per image, in all and by module.

    Raises:
        BadInput: where the model does not take the example.
    """
    inputs, size = _inputs(model, example)
    notes: list[str] = []
    with_data = False
    try:
        with _stand_in(model, "meta") as twin:
            forward = _forward(twin, _to(inputs, "meta"))
            learned = _train(twin, _to(inputs, "meta"), size) if train else None
    except Exception as error:  # work that depends on the data, or a model that cannot be copied
        with_data = True
        notes.append(f"run with data, not on the meta device: {_first_line(error)}")
        with _in_place(model) as device:
            try:
                forward = _forward(model, _to(inputs, device))
            except Exception as error:
                raise BadInput(
                    f"{type(model).__name__} does not take this input ({_shapes(inputs)}): {error}"
                ) from error
            learned = _train(model, _to(inputs, device), size) if train else None
    other, why = _fvcore(model, inputs) if cross_check else (None, "")
    if why:
        notes.append(f"fvcore did not count it: {why}")
    macs = _each(forward.total, 2 * size)
    return FlopCount(
        macs, _each(forward.total, size), learned, {k: _each(v, 2 * size) for k,
        v in forward.by_path.items()},
        dict(forward.unhandled), {"torch": macs, "fvcore": None if other is None else _each(other,
        size)}, notes, with_data,
    )  # fmt: skip


def distribution(model: nn.Module, samples: Iterable[Any], *, limit: int = 256) -> dict[str, float]:
    """Count a model whose work depends on its input, one real image at a time.

    Args:
        model: any module.
        samples: tensors (C, H, W) or batches (batch, C, H, W), or (x, y) pairs of either.
        limit: the most images to count.

    Returns:
        MACs per image: mean, p5, p50, p95, min and max.
    """
    macs: list[float] = []
    with _in_place(model) as device:
        for sample in samples:
            x = sample[0] if isinstance(sample, (tuple, list)) else sample
            for one in _single(x):
                if len(macs) >= limit:
                    break
                macs.append(_forward(model, _to(one, device)).total / 2)
    if not macs:
        raise BadInput("no sample was given to count on: pass real images, (C, H, W) each")
    ordered = sorted(macs)
    return {
        "mean": statistics.fmean(macs),
        **{f"p{q}": quantile(ordered, q / 100) for q in (5, 50, 95)},
        "min": ordered[0],
        "max": ordered[-1],
        "images": len(macs),
    }


def _single(x: Any) -> Iterator[Any]:
    """Yield the samples of a batch, or of one image (C, H, W), each as a batch of one."""
    if isinstance(x, Tensor) and x.dim() == 3:
        x = x.unsqueeze(0)
    for row in range(len(x)):
        yield x[row : row + 1]


def _forward(model: nn.Module, inputs: Any) -> FlopMode:
    """Run one forward, in eval mode, under the counter, with MACs by module."""
    mode = FlopMode()
    handles = []
    for name, module in model.named_modules():
        handles.append(
            module.register_forward_pre_hook(lambda m, a, name=name: mode.path.append(name))
        )
        handles.append(
            module.register_forward_hook(lambda m, a, o: _drop(mode.path), always_call=True)
        )
    try:
        with in_mode(model, False), _plain_attention(), torch.no_grad(), mode:
            _call(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    return mode


def _drop(path: list[str]) -> None:
    path.pop()


def _train(model: nn.Module, inputs: Any, size: int) -> int:
    """Return FLOPs of one image's forward and backward, of a batch of two at least (batch norm
    needs two)."""
    if size == 1:
        inputs, size = _map(inputs, lambda t: torch.cat([t, t]) if t.dim() else t), 2
    mode = FlopMode()
    with in_mode(model, True), _plain_attention(), torch.enable_grad(), mode:
        loss = [t.float().sum() for t in tensors_in(_call(model, inputs)) if t.requires_grad]
        if loss:
            torch.stack(loss).sum().backward()
    return _each(mode.total, size)


@contextmanager
def _stand_in(model: nn.Module, device: str) -> Iterator[nn.Module]:
    """Yield a copy of the model without its data: on "meta", or of zeros (which the system maps to
    one page) on "cpu"."""
    memo: dict[int, Any] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        empty = torch.zeros_like(tensor, device=device)
        memo[id(tensor)] = (
            nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
        )
    yield copy.deepcopy(model, memo)


@contextmanager
def _in_place(model: nn.Module) -> Iterator[torch.device]:
    """Run on the model itself, and put back what running changes: buffers, gradients, modes, random
    state."""
    buffers = {name: b.detach().clone() for name, b in model.named_buffers()}
    gradients = {p: p.grad for p in model.parameters()}
    for p in model.parameters():
        p.grad = None
    first = next(iter([*model.parameters(), *model.buffers()]), torch.empty(0))
    devices = [first.device] if first.device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices=devices):
            yield first.device
    finally:
        with torch.no_grad():
            for name, b in model.named_buffers():
                if name in buffers and b.shape == buffers[name].shape:
                    b.copy_(buffers[name])
        for p, gradient in gradients.items():
            p.grad = gradient


@contextmanager
def _fused_path_off() -> Iterator[None]:
    """Keep torch's own transformer fast path out: it hides its layers from every counter."""
    was = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(was)


@contextmanager
def _plain_attention() -> Iterator[None]:
    """Let attention run as plain products, as every backend counts the same there."""
    with _fused_path_off(), sdpa_kernel(SDPBackend.MATH):
        yield


def _fvcore(model: nn.Module, inputs: Any) -> tuple[int | None, str]:
    """Return fvcore's MACs (what it calls flops) of one forward, norms and pooling apart, or None
    with the reason."""
    import warnings

    if not isinstance(inputs, Tensor):
        return None, "it takes models of one tensor"
    try:
        with warnings.catch_warnings():  # its import scripts functions, which torch frowns upon
            warnings.simplefilter("ignore")
            from fvcore.nn import FlopCountAnalysis
    except ImportError as error:
        return None, str(error)
    try:
        with (
            warnings.catch_warnings(),
            redirect_stderr(io.StringIO()),
            _stand_in(model, "cpu") as twin,
            torch.no_grad(),
        ):
            warnings.simplefilter("ignore")
            analysis = FlopCountAnalysis(_Flat(twin).eval(), (_to(inputs, "cpu"),))
            analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(
                False
            ).tracer_warnings("none")
            analysis.set_op_handle("aten::scaled_dot_product_attention", _fvcore_attention)
            analysis.set_op_handle("aten::baddbmm", _fvcore_baddbmm)
            for op in _APART:
                analysis.set_op_handle(f"aten::{op}", lambda inputs, outputs: 0)
            with _fused_path_off():
                return int(analysis.total()), ""
    except Exception as error:  # tracing has its own limits; the first counter stands
        return None, _first_line(error)


class _Flat(nn.Module):
    """Gives a tuple of tensors for whatever a model returns: tracing takes nothing else."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Run the model on (batch, …)."""
        return tuple(tensors_in(call(self.model, x)))


def _fvcore_attention(inputs: list[Any], outputs: list[Any]) -> int:
    """MACs of softmax(query · keyᵀ) · value from the graph's shapes."""
    query, key, value = (v.type().sizes() for v in inputs[:3])
    return math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


def _fvcore_baddbmm(inputs: list[Any], outputs: list[Any]) -> int:
    """MACs of a batched product (batch, n, k) × (batch, k, m) from the graph's shapes."""
    left, right = (v.type().sizes() for v in inputs[1:3])
    return math.prod(left) * right[-1]


def _inputs(model: nn.Module, example: Any) -> tuple[Any, int]:
    """Return what to call the model with and the number of images in it."""
    if isinstance(example, Example):
        return example, len(example)
    if isinstance(example, (Tensor, Mapping)):
        first = next(tensors_in(example), None)
        if first is None or first.dim() == 0 or first.shape[0] == 0:
            raise BadInput(
                "the example holds no images: pass a tensor (batch, …) or a shape (C, H, W)"
            )
        return example, int(first.shape[0])
    if (
        isinstance(example, Sequence)
        and example
        and all(isinstance(n, int) and n > 0 for n in example)
    ):
        kind = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
        return torch.zeros(1, *example, dtype=kind), 1
    raise BadInput(
        "an example is a shape (C, H, W) of positive sizes, a tensor (batch, …) or a dict of "
        f"them, not {example!r}"
    )


def _call(model: nn.Module, inputs: Any) -> Any:
    return model(**inputs) if isinstance(inputs, Mapping) else call(model, inputs)


def _to(inputs: Any, device: torch.device | str) -> Any:
    if isinstance(inputs, Example):
        return inputs.to(device)
    return _map(inputs, lambda t: t.to(device))


def _map(inputs: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(inputs, Mapping):
        return {k: change(v) if isinstance(v, Tensor) else v for k, v in inputs.items()}
    return change(inputs)


def _each(total: int, parts: int) -> int:
    """Divide by the number of images; exact where the images cost the same."""
    return total // parts if total % parts == 0 else round(total / parts)


def _shapes(inputs: Any) -> str:
    return ", ".join(str(tuple(t.shape)) for t in tensors_in(inputs))


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"[:200]
