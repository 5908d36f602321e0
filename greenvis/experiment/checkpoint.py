"""The checkpoint of a training: written whole or not at all, and put back bit for bit."""

from __future__ import annotations

import random
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from accelerate import Accelerator
from torch.optim.lr_scheduler import LambdaLR

from greenvis.core import files
from greenvis.core.wrap import Wrapped
from greenvis.errors import GreenvisError

P = TypeVar("P")


def save(
    path: Path,
    live: Wrapped,
    optimizer: Any,
    scheduler: LambdaLR,
    accelerator: Accelerator,
    progress: Any,
) -> None:
    """Write what a training needs to go on to the same weights, whole or not at all. progress: a
    dataclass of plain values."""
    numpy_state: Any = np.random.get_state()
    content = {
        "progress": asdict(progress),
        "live": live.state_dict(),
        "optimizer": optimizer.state_dict(),
        "scheduler": scheduler.state_dict(),
        "scaler": accelerator.scaler.state_dict() if accelerator.scaler is not None else None,
        "rng": {
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
            "python": random.getstate(),
            "numpy": [numpy_state[0], numpy_state[1].tolist(), *numpy_state[2:]],
        },
    }
    content["scheduler"].pop("lr_lambdas", None)
    with files.replacing(path) as part:
        torch.save(content, part)


def read(path: Path) -> dict[str, Any]:
    """Return what `save` wrote. Raises GreenvisError for a damaged file."""
    try:
        if not path.is_file():
            raise OSError("not a regular file")
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise GreenvisError(
            f"the checkpoint {path} cannot be read ({error}); remove it to start this arm again"
        ) from error


def progress(content: dict[str, Any], kind: type[P]) -> P:
    """Return the progress that `save` was given. Raises GreenvisError for another version's."""
    try:
        return kind(**content["progress"])
    except (KeyError, TypeError) as error:
        raise GreenvisError(
            "a checkpoint of another version of greenvis lies there, which this one cannot go on "
            "from: run with --fresh to start the arm again"
        ) from error


def restore(
    content: dict[str, Any],
    live: Wrapped,
    optimizer: Any,
    scheduler: LambdaLR,
    accelerator: Accelerator,
) -> None:
    """Put back what `read` gave."""
    live.load_state_dict(content["live"])
    optimizer.load_state_dict(content["optimizer"])
    scheduler.load_state_dict(
        {**content["scheduler"], "lr_lambdas": [None] * len(scheduler.lr_lambdas)}
    )
    if accelerator.scaler is not None and content["scaler"]:
        accelerator.scaler.load_state_dict(content["scaler"])
    rng = content["rng"]
    torch.set_rng_state(rng["torch"])
    if rng["cuda"]:
        torch.cuda.set_rng_state_all(rng["cuda"])
    random.setstate(rng["python"])
    np.random.set_state(tuple(rng["numpy"]))
