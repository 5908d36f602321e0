"""The checkpoint of a training: written whole or not at all, and put back bit for bit."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from accelerate import Accelerator
from pydantic import TypeAdapter, ValidationError
from torch.optim.lr_scheduler import LambdaLR

from greenvis.core import files
from greenvis.core.weights import first_line
from greenvis.core.wrap import Wrapped
from greenvis.errors import GreenvisError, printable

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
    with files.replacing(path) as part, open(part, "wb") as file:  # torch hides why it opens none
        try:
            torch.save(content, file)
        except RuntimeError as error:  # of the file that an interrupt left half written
            if isinstance(error.__context__, (KeyboardInterrupt, SystemExit)):
                raise error.__context__ from None
            raise


PARTS = ("progress", "live", "optimizer", "scheduler", "rng")


@contextmanager
def believed(path: Path) -> Iterator[None]:
    """Turn what goes wrong within into GreenvisError: a file may be damaged, or another's."""
    try:
        yield
    except Exception as error:
        problem = printable(first_line(error))
        raise GreenvisError(
            f"the checkpoint {path} cannot be read ({problem}); remove it to start this arm again"
        ) from error


def read(path: Path) -> dict[str, Any]:
    """Return what `save` wrote. Raises GreenvisError for a damaged file."""
    with believed(path):
        if not path.is_file():
            raise OSError("not a regular file")
        content = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(content, dict) or not all(
            isinstance(content.get(part), dict) for part in PARTS
        ):
            raise ValueError("it holds something else")
        return content


def progress(content: dict[str, Any], kind: type[P]) -> P:
    """Return the progress that `save` was given. Raises GreenvisError for another version's."""
    try:
        TypeAdapter(kind).validate_python(content["progress"])
        return kind(**content["progress"])
    except (KeyError, TypeError, ValidationError) as error:
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
