"""What one technique does to the samples or tokens of the batch under way, as others must know that
follow it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from greenvis.core.attached import below

_FOLLOWERS = "_greenvis_followers"


class Follower:
    """Holds something for each sample or token of the forward under way."""

    def keep_rows(self, rows: Tensor, batch: int) -> None:
        """Keep what belongs to these of the batch's samples, int64 (remaining,)."""

    def unmerge(self, tokens: Tensor) -> Tensor:
        """Return tokens (batch, remaining, channels) of this forward as there were at first,
        (batch, length, channels)."""
        return tokens

    def export_state(self, path: str) -> dict[str, Tensor]:
        """Return what the block at `path` reads of this forward beside its input.

        Returns:
            By name, float32 (batch, …).
        """
        return {}

    def import_state(self, path: str, state: Mapping[str, Tensor]) -> None:
        """Take back what `export_state` returned for these samples at the block `path`, though
        nothing before it runs."""


def follow(model: nn.Module, follower: Follower) -> None:
    """Let `follower` know when samples leave the batch."""
    vars(model).setdefault(_FOLLOWERS, []).append(follower)


def followed(model: nn.Module) -> bool:
    """Whether something is held for each sample of a forward of this model."""
    return bool(_followers(model))


def _followers(model: nn.Module) -> list[Follower]:
    return vars(model).get(_FOLLOWERS, [])


def notify(model: nn.Module, rows: Tensor, batch: int) -> None:
    """Say that of a batch of so many samples only `rows` go on."""
    for follower in _followers(model):
        follower.keep_rows(rows, batch)


def unmerge(model: nn.Module, value: Tensor) -> Tensor:
    """Return what a module inside `model` just gave, with a row for each token there was at first.
    Anything else: as it is."""
    for follower in _followers(model) if value.dim() == 3 else ():
        value = follower.unmerge(value)
    return value


def export_state(model: nn.Module, path: str) -> dict[str, Tensor]:
    """Return what followers hold for the block at `path`.

    Returns:
        By the follower's number and a name of its own ("0.size"), float32 (batch, …).
    """
    followers = enumerate(_followers(model))
    return {
        f"{i}.{name}": value
        for i, follower in followers
        for name, value in follower.export_state(path).items()
    }


def import_state(model: nn.Module, path: str, state: Mapping[str, Tensor]) -> None:
    """Give followers back what `export_state` returned."""
    for i, follower in enumerate(_followers(model)):
        if mine := below(state, f"{i}."):
            follower.import_state(path, mine)


def rows_of(value: Any, rows: Tensor, batch: int) -> Any:
    """Return these rows of what is laid out by sample: a tensor, or a tuple, dictionary or
    dataclass of them."""
    if isinstance(value, Tensor):
        return value[rows] if value.dim() and len(value) == batch else value
    if isinstance(value, tuple):
        return tuple(rows_of(v, rows, batch) for v in value)
    if isinstance(value, dict):
        return {k: rows_of(v, rows, batch) for k, v in value.items()}
    if is_dataclass(value) and not isinstance(value, type):
        return replace(
            value, **{f.name: rows_of(getattr(value, f.name), rows, batch) for f in fields(value)}
        )
    return value


def joined(parts: Sequence[Any], sizes: Sequence[int]) -> Any:
    """Join what is laid out by sample in each of `parts`, the first part's samples first; the
    counterpart of `rows_of`.

    Args:
        parts: alike but for their number of samples.
        sizes: samples per part.

    Returns:
        One of their kind; what is not laid out by sample is the first part's.
    """
    one = parts[0]
    if isinstance(one, Tensor):
        if one.dim() and all(len(p) == n for p, n in zip(parts, sizes, strict=True)):
            return torch.cat([*parts])
        return one
    if isinstance(one, tuple):
        return tuple(joined(p, sizes) for p in zip(*parts, strict=True))
    if isinstance(one, dict):
        return {k: joined([p[k] for p in parts], sizes) for k in one}
    if is_dataclass(one) and not isinstance(one, type):
        return replace(
            one, **{f.name: joined([getattr(p, f.name) for p in parts], sizes) for f in fields(one)}
        )
    return one
