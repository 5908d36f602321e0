"""The blocks of a vision transformer from which tokens leave, and what became of the tokens of the
batch under way."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from greenvis.core.trainers import refuse_recomputed
from greenvis.models.structure import View
from greenvis.techniques._shared.attach import first, like, with_first
from greenvis.techniques._shared.blocks import Block, gather_mask, main, rotated, with_main
from greenvis.techniques._shared.doors import Doors, Passing, refuse_tracing
from greenvis.techniques._shared.rows import Follower, rows_of
from greenvis.techniques.inference.tokens._attention_inputs import Source
from greenvis.techniques.inference.tokens._pruning import (
    Predictor,
    best,
    class_attention,
    decide,
    fused,
    policy_mask,
)


class Flow(Follower):
    """What became of the tokens of the last batch, by the number of a block.

    Attributes:
        positions: where the tokens a block receives stood, (batch, tokens).
        policy: in training, which of them count, (batch, tokens).
        decided: which do from this block on.
        length: tokens at first.
        fused: which of a block's tokens are others fused, bool (batch, tokens); they have no
            position.
        beside: what a block returned, where its fused ones cannot be laid out.
        name: of the technique, and of what it puts into a block.
    """

    def __init__(self, prefix: int, keep: float, fuse: bool, doors: Doors, name: str) -> None:
        self.prefix, self.keep, self.fuse, self.doors, self.length = prefix, keep, fuse, doors, 0
        self.name = name
        self.positions: dict[int, Tensor] = Passing()
        self.policy: dict[int, Tensor] = Passing()
        self.decided: dict[int, Tensor] = Passing()
        self.fused: dict[int, Tensor] = Passing()
        self.beside: dict[int, Tensor] = Passing()
        self.shares: dict[int, float] = {}

    def keep_rows(self, rows: Tensor, batch: int) -> None:
        """Forget the samples that left the batch early."""
        for state in (self.positions, self.policy, self.decided, self.fused, self.beside):
            state.update(rows_of(state, rows, batch))

    def gathered(self, i: int, x: Tensor) -> Tensor:
        """Return the tokens block number `i` is to work on, of the whole row that another door
        shows (batch, length, dim)."""
        if not self.doors.laid_out or i not in self.positions:
            return x
        tokens = x.gather(1, self.positions[i].unsqueeze(-1).expand(-1, -1, x.shape[-1]))
        if i in self.fused:
            return torch.where(self.fused[i].unsqueeze(-1), self.beside[i], tokens)
        return tokens

    def laid_out(self, i: int, before: Tensor, tokens: Tensor) -> Tensor:
        """Return what block number `i` is given as a whole row, where another door shows it: what
        left as it was `before`."""
        if not self.doors.laid_out or i not in self.positions:
            return tokens
        index, row = self.positions[i], before
        if i in self.fused:
            self.beside[i] = tokens
            index, row = index.masked_fill(self.fused[i], self.length), F.pad(before, (0, 0, 0, 1))
        return row.scatter(1, index.unsqueeze(-1).expand_as(tokens), tokens)[:, : self.length]


class Pruning:
    """One block at work. A block runs again (gradient checkpointing) with what it found before,
    under its own number."""

    def __init__(self, block: Block, number: int, flow: Flow) -> None:
        self.block, self.number, self.flow = block, number, flow
        self.order = 0

    def take(self, model: nn.Module, order: int, structure: View) -> list[nn.Parameter]:
        """Become the order-th block in which tokens leave; return parameters that were added."""
        self.order = order
        return []

    def mask(self, attn_mask: Tensor | None) -> Tensor | None:
        """Return the library's mask, cut to the tokens that are left."""
        positions = self.flow.positions.get(self.number)
        if attn_mask is None or positions is None:
            return attn_mask
        return gather_mask(attn_mask, positions, self.flow.length)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the block, and remove tokens where this is a place for it."""
        raise NotImplementedError

    def _come(self, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """Note the first sequence; return the arguments with rotary embeddings of the tokens that
        are left."""
        flow, i = self.flow, self.number
        if self.order == 1:
            refuse_tracing(main(args, kwargs), "which tokens are pruned")
            flow.doors.begin()
            flow.positions.clear()
            flow.fused.clear()
            flow.length = main(args, kwargs).shape[1]
            return args, kwargs
        args, kwargs = with_main(args, kwargs, flow.gathered(i, main(args, kwargs)))
        if self.block.rotary and i in flow.positions:
            args, kwargs, _ = rotated(args, kwargs, flow.positions[i], flow.prefix, flow.length)
        return args, kwargs

    def _leave(self, x: Tensor, keep_index: Tensor, at: int) -> Tensor:
        """Return x with its prefix and the patches `keep_index` (batch, count) only, which block
        number `at` receives.
        """
        flow = self.flow
        prefix = torch.arange(flow.prefix, device=x.device).expand(len(x), -1)
        index = torch.cat([prefix, keep_index + flow.prefix], 1)
        old, fused = flow.positions.get(self.number), flow.fused.get(self.number)
        flow.positions[at] = index if old is None else old.gather(1, index)
        if fused is not None:
            flow.fused[at] = fused.gather(1, index)
        return x.gather(1, index.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


class Predicted(Pruning):
    """Tokens leave in front of the block; while it trains they stay, masked."""

    def take(self, model: nn.Module, order: int, structure: View) -> list[nn.Parameter]:
        """Put a predictor into the block."""
        super().take(model, order, structure)
        self.flow.shares[self.number] = self.flow.keep**order
        predictor = Predictor(structure.layouts[self.block.path].width)
        predictor.to(**like(self.block.module))
        self.block.module.add_module(self.flow.name, predictor.train(self.block.module.training))
        return list(predictor.parameters())

    def mask(self, attn_mask: Tensor | None) -> Tensor | None:
        """Add the mask of the tokens that were decided against."""
        attn_mask, policy = super().mask(attn_mask), self._policy
        if policy is None or not self.block.module.training:
            return attn_mask
        if policy.requires_grad:  # what decided lies outside of a block that is checkpointed
            refuse_recomputed(self.flow.name)
        pruned_mask = policy_mask(
            torch.cat([policy.new_ones(len(policy), self.flow.prefix), policy], 1)
        )
        return pruned_mask if attn_mask is None else pruned_mask + attn_mask

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Decide in front of the block, then run it."""
        flow, i, before = self.flow, self.number, main(args, kwargs)
        args, kwargs = self._come(args, kwargs)
        if self.order and self.block.module.training:
            self._decide(main(args, kwargs)[:, flow.prefix :])
        elif self.order:
            x = self._remove(main(args, kwargs))
            if x.shape[1] != main(args, kwargs).shape[1] and self.block.rotary:
                args, kwargs, _ = rotated(args, kwargs, flow.positions[i], flow.prefix, flow.length)
            args, kwargs = with_main(args, kwargs, x)
        output = self.block.forward(*args, **kwargs)
        for state, going in ((flow.positions, flow.positions.get(i)), (flow.policy, self._policy)):
            state.pop(i + 1, None)
            if going is not None:
                state[i + 1] = going
        return with_first(output, flow.laid_out(i + 1, before, first(output)))

    @property
    def _policy(self) -> Tensor | None:
        """Which tokens count from this block on; what it was given stays as it was, for the block
        may run again."""
        return self.flow.decided.get(self.number, self.flow.policy.get(self.number))

    def _decide(self, patches: Tensor) -> None:
        flow, i = self.flow, self.number
        before = flow.policy.get(i, patches.new_ones(patches.shape[:2], dtype=torch.float32))
        scores = self.block.module.get_submodule(flow.name)(
            patches, before.unsqueeze(-1).to(patches.dtype)
        )
        flow.decided[i] = decide(scores, before)

    def _remove(self, x: Tensor) -> Tensor:
        flow = self.flow
        patches = x[:, flow.prefix :]
        count = max(1, int((flow.length - flow.prefix) * flow.shares[self.number]))
        if count >= patches.shape[1]:
            return x
        scores = self.block.module.get_submodule(flow.name)(
            patches, patches.new_ones(*patches.shape[:2], 1)
        )[..., 0]
        return self._leave(x, best(scores, count), self.number)


class Attended(Pruning):
    """Tokens leave between the block's attention and its MLP, those that the class token attends to
    least."""

    def __init__(self, block: Block, number: int, flow: Flow, query: Source, key: Source) -> None:
        super().__init__(block, number, flow)
        self.query, self.key = query, key
        self._values: dict[str, Tensor] = {}

    def take(self, model: nn.Module, order: int, structure: View) -> list[nn.Parameter]:
        """Watch queries and keys."""
        self.query.watch(model, self._keep_query)
        self.key.watch(model, self._keep_key)
        return super().take(model, order, structure)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the halves, and remove tokens in between."""
        flow, i, before = self.flow, self.number, main(args, kwargs)
        args, kwargs = self._come(args, kwargs)
        for state in (flow.positions, flow.fused):
            state.pop(i + 1, None)
            if i in state:
                state[i + 1] = state[i]
        if self.order:
            x = self._removed(first(self.block.attend(*args, **kwargs)))
            args, kwargs = with_main(args, kwargs, x)
            output = self.block.feed(*args, **kwargs)
        else:
            output = self.block.forward(*args, **kwargs)
        return with_first(output, flow.laid_out(i + 1, before, first(output)))

    def _removed(self, x: Tensor) -> Tensor:
        flow, values, self._values = self.flow, self._values, {}
        patches = x[:, flow.prefix :]
        count = math.ceil(flow.keep * patches.shape[1])
        if count == patches.shape[1]:
            return x
        with torch.no_grad():
            query, key = (
                s.read(
                    self.block.module.get_submodule(s.path[len(self.block.path) + 1 :]),
                    values[s.which],
                )
                for s in (self.query, self.key)
            )
            attention = class_attention(query, key)[:, flow.prefix :]
            keep_index = best(attention, count)
        out = self._leave(x, keep_index, self.number + 1)
        if not flow.fuse:
            return out
        positions, at = flow.positions[self.number + 1], self.number + 1
        # the rest has no place; masks need one
        flow.positions[at] = torch.cat([positions, positions[:, -1:]], 1)
        before = flow.fused.get(at, torch.zeros_like(positions, dtype=torch.bool))
        flow.fused[at] = F.pad(before, (0, 1), value=True)
        return torch.cat([out, fused(patches, attention, keep_index)], 1)

    def _keep_query(self, value: Tensor) -> None:
        self._values["query"] = value.detach()

    def _keep_key(self, value: Tensor) -> None:
        self._values["key"] = value.detach()
