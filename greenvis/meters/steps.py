"""`run.steps(loader)`: batches with a progress bar, counted: steps, samples and FLOPs. Imports
torch only if it is there."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, TypeVar

from greenvis.meters.header import ranks

if TYPE_CHECKING:
    from greenvis.meters.track import Tracker

B = TypeVar("B")


def steps(
    tracker: Tracker, loader: Iterable[B], phase: str | None, total: int | None, progress: bool
) -> Iterator[B]:
    """Yield the loader's batches inside `phase`; see `Tracker.steps`."""
    # "train" inside of train/epoch3 is that very phase
    inside = (tracker.current_phase + "/").startswith(f"{phase}/")
    with tracker.phase(phase) if phase and not inside else nullcontext():
        shown = progress and sys.stderr.isatty() and ranks()[0] == 0
        for batch in bar(loader, phase or tracker.name, total) if shown else loader:
            with tracker.flops(batch):
                yield batch
            tracker.add(steps=1, samples=samples_in(batch))


def samples_in(batch: Any) -> int:
    """Return the length of the first array in a batch: a tensor, or a tuple, list or dict of them;
    1 if there is none."""
    if isinstance(batch, Mapping):
        batch = tuple(batch.values())
    while (
        isinstance(batch, (tuple, list)) and batch and not isinstance(batch[0], (int, float, str))
    ):
        batch = batch[0]
    try:
        return len(batch) if not isinstance(batch, str) else 1
    except TypeError:
        return 1


def bar(items: Iterable[B], description: str, total: int | None) -> Iterable[B]:
    """Show a progress bar on stderr while `items` are taken."""
    from rich.console import Console
    from rich.progress import track

    if total is None:
        try:
            total = len(items)  # type: ignore[arg-type]
        except TypeError:
            total = None
    return track(items, description, total=total, console=Console(stderr=True), transient=True)
