"""What techniques hold, beside a trainer's checkpoint and back: the delta, and of several processes
each one's own part."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from greenvis.core import distributed, files
from greenvis.core.attached import below
from greenvis.core.wrap import Wrapped
from greenvis.errors import BadInput

FOLDER = "greenvis"  # in a checkpoint's folder
# what trainers do not offer, by seam: those that run the step itself; those that count labels, too
CLOSED = {
    "again": "runs the backward of each step again",
    "visit": "chooses the images of each epoch",
}
REPEATED = {"again": CLOSED["again"]}
COUNTED = {**CLOSED, "wants": "puts images without labels into the batch"}


def check_live(live: Any, what: str) -> None:
    """Raise BadInput for anything but what `gv.wrap` returned."""
    if not isinstance(live, Wrapped):
        raise BadInput(
            f"{what} takes what gv.wrap returned, not {type(live).__name__}: to meter a run "
            f"without a technique give {what}(gv.wrap(model), …)"
        )


def refuse_seams(live: Wrapped, what: str, seams: Mapping[str, str]) -> None:
    """Raise BadInput for techniques that use what a trainer does not offer.

    Args:
        live: What `gv.wrap` returned.
        what: The class that is made.
        seams: What such a technique needs, in words, by the name of the seam.
    """
    for seam, needed in seams.items():
        if users := live.using(seam):
            raise BadInput(
                f"'{users[0][0].name}' {needed}, which {what} cannot offer: train it by a recipe "
                "or in a loop of your own (gv.wrap)"
            )


def reached(live: Wrapped, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the metrics of the task among what a trainer logged, by their own names: accuracy
    where no task was named.

    Args:
        live: What `gv.wrap` returned.
        values: By name; "val_miou", "val/miou" and "eval_miou" are "miou".
    """
    task = live.task
    names = [m.name for m in (task.primary, *(task.secondary or ()))] if task else ["accuracy"]
    keys = {n: [p + n for p in ("val_", "val/", "eval_", "") if p + n in values] for n in names}
    return {name: values[own[0]] for name, own in keys.items() if own}


def save(live: Wrapped, folder: Path) -> None:
    """Write what a wrapped model learned and what its techniques hold; every process calls it, none
    waits."""
    if distributed.rank() == 0:
        live.save(folder)
    save_own(live, folder, own_state(live))


def load(live: Wrapped, folder: Path) -> None:
    """Take back what `save` wrote. Raises BadInput for what does not fit, with nothing changed."""
    state, own = live._read(folder), load_own(live, folder)
    apart = tuple(f"{name.partition('.')[0]}." for name in own)
    live.load_state_dict(
        {k: v for k, v in state.items() if not k.startswith(apart)} | own if own else state
    )


def save_own(live: Wrapped, folder: Path, own: Mapping[str, Tensor]) -> None:
    """Write what this process holds."""
    if own:
        folder.mkdir(parents=True, exist_ok=True)
        with files.replacing(folder / _name(distributed.rank())) as part:
            save_file({k: v.detach().cpu().contiguous() for k, v in own.items()}, part)


def load_own(live: Wrapped, folder: Path) -> dict[str, Tensor]:
    """Return what `save_own` wrote. Raises BadInput where another number of processes wrote it."""
    written = sorted(folder.glob("process-*-of-*.safetensors"))
    here = folder / _name(distributed.rank())
    if (
        any(t.rank_local for t in live.techniques)
        and not here.exists()
        and (written or distributed.world_size() > 1)
    ):
        raise BadInput(
            f"{folder} holds the parts of {len(written) or 1} process(es), and here train "
            f"{distributed.world_size()}: start as many, or begin without a checkpoint"
        )
    return load_file(here if here.exists() else written[0]) if written else {}


def own_state(live: Wrapped, every: bool = False) -> dict[str, Tensor]:
    """Return the state of techniques that each of several processes holds for itself; every: of
    all, of one process too."""
    chosen = [(t.rank_local and distributed.world_size() > 1) or every for t in live.techniques]
    pairs = [
        (t, i) for t, i, own in zip(live.techniques, live.installed, chosen, strict=True) if own
    ]
    return {f"{t.name}.{k}": v for t, i in pairs for k, v in i.state_dict().items()}


def give_own(live: Wrapped, own: Mapping[str, Tensor]) -> None:
    """Give the techniques what `own_state` returned."""
    for technique, installed in zip(live.techniques, live.installed, strict=True):
        if mine := below(own, f"{technique.name}."):
            installed.load_state_dict(mine)


def _name(index: int) -> str:
    return f"process-{index}-of-{distributed.world_size()}.safetensors"
