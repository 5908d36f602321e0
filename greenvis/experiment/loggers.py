"""The trackers of accelerate that a training also logs to (`--log-with`); none of them meters
energy."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from accelerate import Accelerator

from greenvis.errors import BadInput, GreenvisError, nearest
from greenvis.experiment.recipe import TrainSpec
from greenvis.meters.track import Tracker

LOGGERS = ("tensorboard", "wandb", "mlflow")


def check(names: Iterable[str]) -> None:
    """Raise BadInput for a tracker that accelerate does not know under this name, or whose package
    is missing."""
    for name in names:
        if name not in LOGGERS:
            raise BadInput(f"no tracker '{name}' to log with{nearest(name, LOGGERS)}")
        if importlib.util.find_spec(name) is None:
            raise BadInput(
                f"logging with {name} needs the package {name}, which is not installed: pip "
                f"install {name}"
            )


@contextmanager
def at_work(accelerator: Accelerator, run: Tracker, spec: TrainSpec, seed: int) -> Iterator[None]:
    """Start the trackers that an accelerator was asked for, and end them however the training
    ends."""
    if not accelerator.log_with:
        yield
        return
    name = f"{run.header.get('arm') or run.name}/seed{seed}"
    settings = {
        k: v for k, v in spec.model_dump().items() if isinstance(v, (bool, int, float, str))
    }
    _no_links(Path(accelerator.logging_dir or run.path.parent) / run.name)
    options = {"wandb": {"name": name, "dir": str(run.path.parent)}, "mlflow": {"run_name": name}}
    accelerator.init_trackers(
        run.name, config={**settings, "arm": name, "run": run.id}, init_kwargs=options
    )
    try:
        yield
    finally:
        for tracker in accelerator.trackers:
            # not end_training, which would end the processes' group under later
            # arms
            tracker.finish()


def _no_links(folder: Path) -> None:
    """Raise GreenvisError where a tracker, which opens files as it likes, would write through a
    link."""
    for path in (folder, *folder.rglob("*")):
        if path.is_symlink():
            raise GreenvisError(
                f"{path} is a link, which is not written through; remove it, then try again"
            )
