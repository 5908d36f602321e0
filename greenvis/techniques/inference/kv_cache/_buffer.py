"""Rows of a cache in memory: added behind the others in place, taken, and swapped."""

from __future__ import annotations

from torch import Tensor

SPARE, SHARE = 64, 8  # rows that a buffer has room for beyond what is there, and one in SHARE of it


class Buffer:
    """Memory in which rows stand one behind the other, so that one more is written, not all."""

    def __init__(self) -> None:
        self.memory: Tensor | None = None
        self._rows: Tensor | None = None  # as they were returned last

    def append(self, rows: Tensor | None, new: Tensor) -> Tensor:
        """Return rows with new ones behind them, a view.

        Args:
            rows: (batch, heads, rows, …), written to where the buffer has room and these are its
                own first rows, copied else; None: none.
            new: The same, but for the number.
        """
        before = 0 if rows is None else rows.shape[2]
        length, memory = before + new.shape[2], self.memory
        own = rows is not None and (rows is self._rows or self._begins(rows))
        if memory is None or not own or length > memory.shape[2]:
            size = [*new.shape]
            size[2] = length + SPARE + length // SHARE
            self.memory = memory = new.new_empty(size)
            if rows is not None:
                memory[:, :, :before] = rows
        memory.narrow(2, before, new.shape[2]).copy_(new)
        self._rows = memory.narrow(2, 0, length)
        return self._rows

    def _begins(self, rows: Tensor) -> bool:
        """Return whether rows are the first ones of this memory, of all its samples."""
        memory = self.memory
        return memory is not None and (
            rows.data_ptr() == memory.data_ptr()
            and rows.stride() == memory.stride()
            and rows.shape[:2] == memory.shape[:2]
        )


def taken(state: Tensor, rows: Tensor) -> Tensor:
    """Return some rows of a state.

    Args:
        state: (batch, heads, rows) or (batch, heads, rows, features).
        rows: int64 (batch, heads, taken).
    """
    return state.gather(2, _index(state, rows))


def swapped(state: Tensor, slot: Tensor) -> Tensor:
    """Let a row and the last change places, and return a view without the last.

    Args:
        state: As in `taken`; written to.
        slot: int64 (batch, heads, 1).
    """
    index, last = _index(state, slot), state[:, :, -1:]
    gone = state.gather(2, index)
    state.scatter_(2, index, last.clone())
    last.copy_(gone)
    return state[:, :, :-1]


def _index(state: Tensor, rows: Tensor) -> Tensor:
    return rows if state.dim() == 3 else rows[..., None].expand(-1, -1, -1, state.shape[3])
