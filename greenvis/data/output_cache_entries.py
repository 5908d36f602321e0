"""How one output lies in a cache's file: bytes of a fixed size, whole or the greatest logits, and
their checksum."""

from __future__ import annotations

import zlib
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from greenvis.errors import BadInput

PRESENT = np.uint64(1 << 32)
SAME = 1e-3  # of the largest output: what another batch, kernel or device may change
KINDS = {"fp32": np.dtype(np.float32), "fp16": np.dtype(np.float16)}


class Entries:
    """Outputs of one shape as entries of a file.

    Args:
        dtype: "fp32" gives back what was packed, bit for bit; "fp16" halves it.
        top_k: Hold only the k greatest of (classes,) logits and the log-sum-exp of the rest.
        shape: Of an output, without its batch.

    Attributes:
        layout: The numpy type of an entry.

    Raises:
        BadInput: For `top_k` of what is no logits of more classes.
    """

    def __init__(
        self, dtype: Literal["fp32", "fp16"], top_k: int | None, shape: tuple[int, ...]
    ) -> None:
        self.kind, self.top_k, self.shape = KINDS[dtype], top_k, shape
        self.layout: np.dtype[Any] = self._layout()

    def _layout(self) -> np.dtype[Any]:
        if self.top_k is None:
            return np.dtype([("values", self.kind, self.shape)])
        if len(self.shape) != 1 or self.shape[0] <= self.top_k:
            raise BadInput(
                f"cache: top_k={self.top_k} keeps logits (B, classes) of more classes; these are "
                f"(B, {self.shape})"
            )
        k = (self.top_k,)
        return np.dtype([("values", self.kind, k), ("at", np.uint32, k), ("rest", np.float32)])

    def pack(self, outputs: Tensor) -> np.ndarray:
        """Return outputs, float32 (B, …), as entries (B,). Raises BadInput where fp16 cannot hold
        them."""
        entries = np.zeros(len(outputs), self.layout)
        if self.top_k is not None:
            top, at = outputs.topk(self.top_k)
            others = outputs.scatter(1, at, float("-inf")).logsumexp(1)
            entries["at"], entries["rest"], outputs = at.numpy(), others.numpy(), top
        if self.kind == np.float16 and bool((outputs.abs() > np.finfo(np.float16).max).any()):
            raise BadInput(
                f"cache: outputs up to {outputs.abs().max():g} do not fit in fp16; use fp32"
            )
        entries["values"] = outputs.numpy()
        return entries

    def invalid(self, entries: np.ndarray) -> np.ndarray:
        """Return which entries name classes that there are none of, bool (B,)."""
        if self.top_k is None:
            return np.zeros(len(entries), bool)
        return np.asarray((entries["at"] >= self.shape[0]).any(axis=1))

    def unpack(self, entries: np.ndarray) -> Tensor:
        """Return entries (B,) as outputs, float32 (B, …)."""
        values = torch.from_numpy(np.ascontiguousarray(entries["values"], dtype=np.float32))
        if self.top_k is None:
            return values
        others = self.shape[0] - self.top_k  # they share what probability is left
        rest = torch.from_numpy(entries["rest"].copy())[:, None] - float(np.log(others))
        at = torch.from_numpy(entries["at"].astype(np.int64))
        return rest.expand(-1, self.shape[0]).scatter(1, at, values)

    def agree(self, entries: np.ndarray, live: Tensor, eps: float) -> bool:
        """Compare entries (B,) with what `pack` would leave of `live`, float32 (B, …), but for
        rounding of `eps`."""
        if self.invalid(entries).any():
            return False
        stored = torch.from_numpy(np.ascontiguousarray(entries["values"], dtype=np.float32))
        # two as good as equal may change places: compare those that are there
        if self.top_k is not None:
            at = torch.from_numpy(entries["at"].astype(np.int64))
            rest = live.scatter(1, at, float("-inf")).logsumexp(1, keepdim=True)
            stored = torch.cat([stored, torch.from_numpy(entries["rest"].copy())[:, None]], 1)
            live = torch.cat([live.gather(1, at), rest], 1)
        eps = max(eps, float(np.finfo(self.kind).eps))
        largest = live[live.isfinite()].abs().max() if live.isfinite().any() else torch.ones(())
        return torch.allclose(
            stored, live, rtol=0.0, atol=float(largest) * max(SAME, 8 * eps), equal_nan=True
        )


def checksums_of(entries: np.ndarray) -> np.ndarray:
    """Return what the index holds for each entry: the flag and the CRC-32 of its bytes."""
    size = entries.dtype.itemsize
    raw = np.ascontiguousarray(entries).view(np.uint8).reshape(-1).data
    sums = [zlib.crc32(raw[i * size : (i + 1) * size]) for i in range(len(entries))]
    return np.array(sums, np.uint64) | PRESENT
