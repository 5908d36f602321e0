"""Bipartite soft matching (Bolya et al., 2023, section 3): which tokens merge, merging them, and
the way back.

Pure functions of tensors; they know no model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from greenvis.errors import BadInput


def parse_r(depth: int, r: int | Sequence[float]) -> list[int]:
    """Return how many tokens each of `depth` blocks merges.

    r: one number for all blocks; (r, inflection) with an inflection from -1 to 1, linear from r·(1
    + |…|) to its mirror, so that -1 falls from 2r to 0, 0 is constant and 1 rises; or one number a
    block, 0 where the list ends. Two numbers are (r, inflection) where the second lies from -1 to
    1. Raises BadInput for a negative number or more numbers than blocks.
    """
    if isinstance(r, int):
        numbers = [r] * depth
    elif len(r) == 2 and -1 <= r[1] <= 1:
        first = int(r[0] * (1 - r[1]))
        step = (2 * r[0] - 2 * first) / max(depth - 1, 1)
        numbers = [int(first + step * i) for i in range(depth)]
    else:
        if len(r) > depth:
            raise BadInput(
                f"r has {len(r)} numbers, but the model has {depth} blocks: give one per block, or "
                "one for all"
            )
        if wrong := [n for n in r if n != int(n)]:
            raise BadInput(
                f"r={list(r)} merges {wrong[0]} tokens in a block; give whole numbers, or (r, "
                "inflection)"
            )
        numbers = [*map(int, r), *[0] * (depth - len(r))]
    if any(n < 0 for n in numbers):
        raise BadInput(f"r={r} merges a negative number of tokens; 0 merges none")
    return numbers


@dataclass(frozen=True)
class Matching:
    """Which tokens of a sequence (batch, length, …) merge into which, and the sequence that
    remains.

    Set A are the tokens at even places, set B those at odd ones. unmerged, source: int64 (batch,
    n), (batch, r), into A: those that stay, and those that merge, the most similar first.
    destination: (batch, r), into B, for each source. The remaining sequence is [protected][unmerged
    of A][B]. positions: (batch, remaining), where in the old sequence each token of it stood (one
    that others merged into: its B's place). target: (batch, r), where in it the token lies that
    each source merged into.
    """

    length: int
    unmerged: Tensor
    source: Tensor
    destination: Tensor
    positions: Tensor
    target: Tensor

    @property
    def r(self) -> int:
        """How many tokens merge away."""
        return self.source.shape[1]

    @property
    def remaining(self) -> int:
        """How many tokens remain."""
        return self.length - self.r

    @property
    def map(self) -> Tensor:
        """Place in the new sequence at which each old token lies, int64 (batch, length)."""
        new = torch.arange(self.remaining, device=self.positions.device).expand_as(self.positions)
        out = torch.empty(
            self.positions.shape[0], self.length, dtype=torch.int64, device=self.positions.device
        )
        return out.scatter_(1, self.positions, new).scatter_(1, 2 * self.source, self.target)

    def sizes(self, size: Tensor | None = None) -> Tensor:
        """Return how many patches each remaining token stands for, fp32 (batch, remaining), from
        those before; None: 1 each."""
        if size is None:
            new = torch.ones(self.positions.shape, device=self.positions.device)
            return new.scatter_add(1, self.target, torch.ones(self.target.shape, device=new.device))
        return size.gather(1, self.positions).scatter_add(
            1, self.target, size.gather(1, 2 * self.source)
        )

    def merge(self, x: Tensor, size: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the size-weighted means (batch, remaining, channels) of x (batch, length,
        channels), and their sizes.

        size: patches each token stands for, (batch, length); None: 1 each.
        """
        new = self.sizes(size)
        if size is None:
            stays, joins = 1 / new, 1 / new.gather(1, self.target)
        else:
            stays = size.gather(1, self.positions) / new
            joins = size.gather(1, 2 * self.source) / new.gather(1, self.target)
        out = _rows(x, self.positions) * stays.unsqueeze(-1).to(x.dtype)
        sources = _rows(x, 2 * self.source) * joins.unsqueeze(-1).to(x.dtype)
        return _added(out, self.target, sources), new

    def unmerge(self, x: Tensor) -> Tensor:
        """Return (batch, length, channels): each old token gets the value of the one it merged
        into."""
        return _rows(x, self.map)


def bipartite_soft_matching(metric: Tensor, r: int, protected: int = 0) -> Matching:
    """Match the r tokens at even places that are most similar, by cosine, to one at an odd place.

    metric: (batch, length, features), compared in fp32. protected: how many tokens at the front
    (class, distillation, register tokens) stay where they are and what they are. r is cut to
    (length - protected) // 2. Without protected tokens the unmerged keep the order of their
    similarity; else that of their places. No gradient flows through the choice.
    """
    length = metric.shape[1]
    if not 0 <= protected <= length:
        raise BadInput(f"cannot protect {protected} of {length} tokens")
    r = max(0, min(r, (length - protected) // 2))
    # of each set, those after the protected ones
    first_a, first_b = ((protected + 1) // 2, protected // 2)
    with torch.no_grad():
        metric = F.normalize(metric.float(), dim=-1)
        batch, device = metric.shape[0], metric.device
        still = torch.arange(protected, device=device).expand(batch, -1)
        odd = torch.arange(length, device=device)[2 * first_b + 1 :: 2].expand(batch, -1)
        if r:
            a, b = metric[:, 2 * first_a :: 2], metric[:, 2 * first_b + 1 :: 2]
            best, partner = (a @ b.transpose(1, 2)).max(-1)
            order = best.argsort(dim=-1, descending=True)
            source, rest = order[:, :r], order[:, r:]
            destination = partner.gather(1, source) + first_b
            rest = rest.sort(dim=-1).values if protected else rest
        else:
            rest = torch.arange((length + 1) // 2 - first_a, device=device).expand(batch, -1)
            source = destination = rest[:, :0]
        unmerged, source = rest + first_a, source + first_a
        positions = torch.cat([still, 2 * unmerged, odd], 1)
        unmerged = torch.cat([still[:, ::2] // 2, unmerged], 1)
        return Matching(
            length,
            unmerged,
            source,
            destination,
            positions,
            destination + (length - r - length // 2),
        )


def token_map(matchings: Sequence[Matching]) -> Tensor:
    """Return in which token, after all of `matchings` in turn, each token of the first sequence
    lies: int64 (batch, length)."""
    composed = matchings[0].map
    for matching in matchings[1:]:
        composed = matching.map.gather(1, composed)
    return composed


def unmerge(x: Tensor, token_map: Tensor) -> Tensor:
    """Return x (batch, remaining, channels) as (batch, length, channels), by a map from old tokens
    to those that remain."""
    return _rows(x, token_map)


def source_matrix(token_map: Tensor, remaining: int) -> Tensor:
    """Return (batch, remaining, length): 1 where an old token lies in a remaining one, else 0."""
    return F.one_hot(token_map, remaining).transpose(1, 2).float()


def _rows(x: Tensor, index: Tensor) -> Tensor:
    """Return x[b, index[b, i]]: whole rows are copied, which a gather of single elements is several
    times slower at."""
    batch, length, channels = x.shape
    first = torch.arange(batch, device=x.device).unsqueeze(1) * length
    return (
        x.reshape(batch * length, channels)
        .index_select(0, (index + first).flatten())
        .view(batch, index.shape[1], channels)
    )


def _added(x: Tensor, index: Tensor, rows: Tensor) -> Tensor:
    """Return x with rows[b, i] added to x[b, index[b, i]]; repeated places add up.

    Raises BadInput for the ONNX exporter that traces, in whose graph only one of several tokens in
    a place would be added.
    """
    if torch.onnx.is_in_onnx_export() and torch.jit.is_tracing():  # type: ignore[attr-defined]
        raise BadInput(
            "the old ONNX exporter adds only one of the tokens that merge into one place, and "
            "would give other answers: call torch.onnx.export(…, dynamo=True)"
        )
    batch, length, channels = x.shape
    first = torch.arange(batch, device=x.device).unsqueeze(1) * length
    flat = x.view(batch * length, channels)
    return flat.index_add(0, (index + first).flatten(), rows.view(-1, channels)).view(x.shape)
