"""Optimizer, schedule, accelerator and threads of a training, from its settings."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from torch.optim import Optimizer

from greenvis.core import distributed
from greenvis.core.wrap import Wrapped
from greenvis.experiment import loggers
from greenvis.experiment.recipe import TrainSpec

FUSED = ("cpu", "cuda", "xpu", "mps")  # devices for which PyTorch has fused optimizers


def make_optimizer(live: Wrapped, spec: TrainSpec) -> Optimizer:
    """Return the optimizer over the techniques' groups; weight decay spares biases and norms (1-D
    parameters). A step updates all parameters of a kind in one call (PyTorch's `fused`) where the
    device can."""
    groups = []
    for group in live.param_groups(spec.lr):
        for decays in (True, False):
            chosen = [p for p in group["params"] if (p.ndim > 1) == decays]
            if chosen:
                decay = group.get("weight_decay", spec.weight_decay)
                groups.append({**group, "params": chosen, "weight_decay": decay if decays else 0.0})
    every = [p for group in groups for p in group["params"]]
    fused = bool(every) and all(p.is_floating_point() and p.device.type in FUSED for p in every)
    if spec.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=spec.lr, momentum=spec.momentum, fused=fused)
    return {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam}[spec.optimizer](
        groups, lr=spec.lr, fused=fused
    )


def lr_factor(step: float, total: int, warmup: int, schedule: str) -> float:
    """Return the factor on the learning rate at optimizer step `step` (0-based): linear warm-up,
    then the schedule to 0."""
    if step < warmup:
        return (step + 1) / warmup
    done = min((step - warmup) / max(total - warmup, 1), 1.0)
    return {"constant": 1.0, "linear": 1.0 - done, "cosine": (1.0 + math.cos(math.pi * done)) / 2}[
        schedule
    ]


def new_accelerator(
    spec: TrainSpec, log_with: Sequence[str] = (), folder: Path | None = None
) -> Accelerator:
    """Return a fresh accelerator: its state is global, and arms of one process may differ in
    precision."""
    if AcceleratorState._shared_state and AcceleratorState().mixed_precision != spec.precision:
        AcceleratorState._reset_state()
    GradientState._reset_state()
    distributed.refuse_sharding()
    loggers.check(log_with)
    logging: dict[str, Any] = (
        {"log_with": list(log_with), "project_dir": folder} if log_with else {}
    )
    return Accelerator(
        mixed_precision=spec.precision, gradient_accumulation_steps=spec.accumulate, **logging
    )


@contextmanager
def threads(number: int | None) -> Iterator[None]:
    """Use `number` CPU threads within; None leaves torch's choice."""
    before = torch.get_num_threads()
    torch.set_num_threads(number or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
