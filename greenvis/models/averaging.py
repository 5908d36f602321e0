"""The mean of the weights of several models of one structure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from greenvis.core import weights
from greenvis.core.attached import ATTACHED, SETTINGS
from greenvis.errors import BadInput, some


def mean(states: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Return the mean of several models' weights, summed in float64, each in the type it has.

    Numbers with fractions are averaged, statistics of batch norms among them; of whole numbers (a
    count of batches) the largest stays.

    Args:
        states: Tensors by name, by what they are of, for messages.

    Returns:
        Tensors by name.

    Raises:
        BadInput: Where names or shapes are not those of the first, or settings that are no weights
            (dilations) differ.
    """
    (first, reference), *others = states.items()
    for source, state in others:
        apart = sorted(reference.keys() ^ state.keys())
        apart = apart or [n for n, t in reference.items() if t.shape != state[n].shape]
        settings = f"{ATTACHED}{SETTINGS}."
        apart = apart or [
            n for n, t in reference.items() if n.startswith(settings) and not t.equal(state[n])
        ]
        if apart:
            raise BadInput(
                f"{source} and {first} are of other structures: {some(apart)}; average models of "
                "one structure"
            )
    out = {}
    for name, tensor in reference.items():
        every = torch.stack([state[name] for state in states.values()])
        out[name] = (
            every.double().mean(0).to(tensor.dtype) if tensor.is_floating_point() else every.amax(0)
        )
    return out


def read(paths: Sequence[str | Path]) -> dict[str, Tensor]:
    """Return the mean of weight files; see `mean`.

    Args:
        paths: Two or more.
    """
    return mean({f"the weights in {path}": weights.read_state(path) for path in paths})
