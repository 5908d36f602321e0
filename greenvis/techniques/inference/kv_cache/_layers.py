"""Cache layers of transformers that let rows go. A row is what one token leaves for those behind
it: its key and value, for each head.

Positions count on: a layer says it is as long as all it was given, so that a new token is rotated
(RoPE) as if nothing had gone, and masks begin behind what has.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from greenvis.errors import BadInput
from greenvis.techniques.inference.kv_cache._buffer import Buffer, swapped, taken

CHUNK = 256  # queries whose attention is summed at once


class BufferedLayer(DynamicLayer):
    """Keeps all rows, as transformers' own dynamic cache; writes a new one behind them where that
    copies all."""

    keys: Any
    values: Any

    def __init__(self) -> None:
        super().__init__()
        self._keys, self._values = Buffer(), Buffer()

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Add rows, and return all.

        Args:
            key_states: (batch, heads, new, features).
            value_states: The same.
            args: Not read.
            kwargs: Not read.
        """
        first = not self.is_initialized
        if first:
            self.lazy_initialization(key_states, value_states)
        self.keys = self._keys.append(None if first else self.keys, key_states)
        self.values = self._values.append(None if first else self.values, value_states)
        return self.keys, self.values


class EvictingLayer(BufferedLayer):
    """Keeps some of its rows from one call to the next; within a call queries attend to all it had
    and to the new ones.

    Where one row more than the capacity is there, the last takes the slot of the one that goes;
    rows are in no order then, which attention does not ask for.

    Args:
        rows: How many stay: a number, or a share of those that the first call brings.
        recent: The newest, which stay in any case, at most `rows`.

    Attributes:
        evicted: How many rows have gone; the same for each sample and head.
        positions: Where those that are there stood, int64 (batch, heads, rows).
    """

    reads_queries = False  # whether `observe` is to be called with the queries of each call
    is_croppable = False

    def __init__(self, rows: int | float, recent: int = 0) -> None:
        super().__init__()
        self.rows, self.recent = rows, recent
        self.evicted, self.capacity = 0, 0
        self._single = False  # whether the call brought one row
        self.positions = torch.zeros(0)
        self._positions = Buffer()

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Add rows, and return all that the queries of this call attend to.

        Args:
            key_states: (batch, heads, new, features).
            value_states: The same.
            args: Not read.
            kwargs: Not read.
        """
        first, seen = not self.is_initialized, self.get_seq_length()
        batch, heads, new = key_states.shape[:3]
        keys, values = super().update(key_states, value_states, *args, **kwargs)
        self._single = new == 1
        own = torch.arange(seen, seen + new, device=keys.device).expand(batch, heads, new)
        self.positions = self._positions.append(None if first else self.positions, own)
        if first:
            share = isinstance(self.rows, float)
            self.capacity = max(1, math.ceil(self.rows * new) if share else int(self.rows))
        if not self.reads_queries:
            self.evict()
        return keys, values

    def observe(self, queries: Tensor, scaling: float) -> None:
        """Take note of the queries that attend to the rows, before any of these goes.

        Args:
            queries: (batch, query heads, new, features), as they attend.
            scaling: Of their products with keys.
        """

    def scores(self) -> Tensor | None:
        """Return what each row is worth, (batch, heads, rows); None: nothing is to go now."""
        raise NotImplementedError

    def evict(self) -> None:
        """Let the rows go that are worth least, down to the capacity."""
        over = self.keys.shape[2] - self.capacity
        if over <= 0 or (scores := self.scores()) is None:
            return
        recent = min(self.recent, self.capacity)
        if recent:
            newest = self.positions >= self.get_seq_length() - recent
            scores = scores.masked_fill(newest, math.inf)
        if over == 1 and self._single:
            self._swap(scores.argmin(-1, keepdim=True))
        else:
            self.keep(scores.topk(self.capacity).indices.sort(dim=-1).values)

    def keep(self, rows: Tensor) -> None:
        """Let all but these rows go, int64 (batch, heads, kept)."""
        self.evicted += self.keys.shape[2] - rows.shape[2]
        self.keys, self.values = taken(self.keys, rows), taken(self.values, rows)
        self._each(lambda state: taken(state, rows))

    def _swap(self, slot: Tensor) -> None:
        """Let the row of a slot go, int64 (batch, heads, 1); those of this call attend to it yet,
        behind the last."""
        self.evicted += 1
        self.keys, self.values = swapped(self.keys, slot), swapped(self.values, slot)
        self._each(lambda state: swapped(state, slot))

    def get_seq_length(self) -> int:
        """Return how many rows it was given."""
        return super().get_seq_length() + self.evicted

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return how many rows queries attend to, and behind how many these begin."""
        return super().get_seq_length() + query_length, self.evicted

    def reset(self) -> None:
        """Forget all rows."""
        self.evicted = 0
        super().reset()

    def crop(self, tokens_to_remove: int) -> None:
        """Refused: what has gone for a token does not come back with it."""
        raise BadInput(
            "kv_cache: rows that went do not come back when tokens are taken back: generate "
            "without an assistant model and without prompt look-up, or set method: static"
        )

    def reorder_cache(self, beam_idx: Any) -> None:
        """Follow the samples that go on."""
        super().reorder_cache(beam_idx)
        self._each(lambda state: state.index_select(0, beam_idx.to(state.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each sample."""
        super().batch_repeat_interleave(repeats)
        self._each(lambda state: state.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some samples."""
        super().batch_select_indices(indices)
        self._each(lambda state: state[indices])

    def _each(self, change: Any) -> None:
        """Change what is known of each row, (batch, heads, rows)."""
        self.positions = change(self.positions)


class Window(EvictingLayer):
    """Keeps the first rows and the newest (StreamingLLM: Xiao et al., 2024)."""

    def __init__(self, rows: int | float, sinks: int) -> None:
        super().__init__(rows)
        self.sinks = sinks

    def scores(self) -> Tensor:
        """Return the position of each row; the first ones come before all."""
        sinks = min(self.sinks, self.capacity - 1)  # the newest stays in any case
        return self.positions.float().masked_fill(self.positions < sinks, math.inf)


class KeyNorm(EvictingLayer):
    """Keeps the rows with the shortest keys, which attract most attention (Devoto et al., 2024)."""

    def scores(self) -> Tensor:
        """Return the negative length of each key."""
        return -self.keys.float().norm(dim=-1)


class HeavyHitters(EvictingLayer):
    """Keeps the newest rows, half of all, and of the others those that got most attention so far
    (H2O: Zhang et al., 2023)."""

    reads_queries = True

    def __init__(self, rows: int | float) -> None:
        super().__init__(rows)
        self.received = torch.zeros(0)

    def observe(self, queries: Tensor, scaling: float) -> None:
        """Add the attention that each row gets."""
        self.recent = self.capacity // 2
        got = attention_received(queries, self.keys, scaling)
        before = self.received
        self.received = got
        if before.numel():
            self.received[..., : before.shape[-1]] += before

    def scores(self) -> Tensor:
        """Return the attention that each row got."""
        return self.received

    def reset(self) -> None:
        """Forget all rows."""
        self.received = torch.zeros(0)
        super().reset()

    def _each(self, change: Any) -> None:
        super()._each(change)
        self.received = change(self.received)


class Observed(EvictingLayer):
    """Keeps of the prompt its end, and what that attends to (SnapKV: Li et al., 2024, equations 3
    to 5); all rows of the answer stay.

    Args:
        rows: As in `EvictingLayer`.
        recent: How many queries at the prompt's end are observed; their rows stay.
        kernel: Rows over which attention is averaged, so that neighbours stay together; odd.
    """

    reads_queries = True

    def __init__(self, rows: int | float, recent: int, kernel: int) -> None:
        super().__init__(rows, recent)
        self.kernel = kernel
        self.received: Tensor | None = None

    def observe(self, queries: Tensor, scaling: float) -> None:
        """Note the attention of the prompt's last queries."""
        self.received = None
        if self.get_seq_length() > queries.shape[2] or queries.shape[2] <= self.capacity:
            return  # the answer, or a prompt that stays as it is
        window = min(self.recent, self.capacity)
        received = attention_received(queries[:, :, -window:], self.keys, scaling)
        received[..., -window:] = 0  # they stay anyhow, and lift no neighbour
        self.received = F.avg_pool1d(received, self.kernel, 1, self.kernel // 2)

    def scores(self) -> Tensor | None:
        """Return the attention noted."""
        return self.received


def attention_received(queries: Tensor, keys: Tensor, scaling: float) -> Tensor:
    """Return how much attention each key gets from the queries at the end, summed over queries and
    over those heads that share the key.

    Args:
        queries: (batch, query heads, new, features); the last is of the last key's token.
        keys: (batch, heads, rows, features).
        scaling: Of their products.

    Returns:
        fp32 (batch, heads, rows).
    """
    batch, heads, rows, width = keys.shape
    new = queries.shape[2]
    grouped = queries.reshape(batch, heads, -1, new, width) * scaling
    total = keys.new_zeros(batch, heads, rows, dtype=torch.float32)
    for start in range(0, new, CHUNK):
        part = grouped[:, :, :, start : start + CHUNK]
        first, end = rows - new + start, rows - new + start + part.shape[3]
        products = (part.flatten(2, 3) @ keys[:, :, :end].mT).float()
        if part.shape[3] > 1:
            ahead = torch.ones(part.shape[3], end - first, device=keys.device).triu(1).bool()
            own = products.unflatten(2, part.shape[2:4])[..., first:]
            own.masked_fill_(ahead, -math.inf)  # of the keys behind the first query's
        total[..., :end] += products.softmax(-1).sum(2)
    return total
