"""Which models have techniques at work, and their state beside the model's own in a host's
checkpoint."""

from __future__ import annotations

import json
import weakref
from typing import TYPE_CHECKING, Any

from torch import nn

from greenvis.core import distributed
from greenvis.core.attached import below
from greenvis.errors import BadInput

if TYPE_CHECKING:
    from greenvis.core.deltas import Deltas

BESIDE = "greenvis."  # before the names of what techniques put beside a model's own state
FORM = "techniques"
_PENDING = "_greenvis_coming"  # that, between the two hooks of `load_state_dict`

LIVE: weakref.WeakKeyDictionary[nn.Module, tuple[tuple[str, ...], weakref.ref[Deltas]]] = (
    weakref.WeakKeyDictionary()
)


def pop_technique_state(model: nn.Module, state: dict[str, Any], prefix: str, *rest: Any) -> None:
    """Before a model's `load_state_dict`: take out what `checkpoint_state` returned, which was put
    beside its state.

    Raises BadInput where it is of other techniques.
    """
    mine = {
        k.removeprefix(prefix + BESIDE): state.pop(k)
        for k in [*state]
        if k.startswith(prefix + BESIDE)
    }
    live = LIVE[model][1]() if model in LIVE else None
    if not mine or live is None:
        return
    form = json.loads(bytes(mine.pop(FORM).cpu().tolist()))
    if form != live.recipe_form():
        raise BadInput(
            f"this state was saved with {form}, but the model is wrapped with {live.recipe_form()}"
        )
    vars(model)[_PENDING] = mine


def restore_technique_state(model: nn.Module, keys: Any) -> None:
    """After it: give that to the techniques, some of which look at the model's weights."""
    live, mine = LIVE[model][1]() if model in LIVE else None, vars(model).pop(_PENDING, None)
    if live is None or not mine:  # the form alone: what they hold lies elsewhere
        return
    for technique, installed in live._pairs():
        own = below(mine, f"{technique.name}.")
        if own or not technique.rank_local:
            installed.load_state_dict(own)
        elif distributed.world_size() == 1:
            raise BadInput(
                "this state is of several processes, each of which held a part of what "
                f"'{technique.name}' keeps"
            )
