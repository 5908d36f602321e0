"""The blocks of a vision transformer in which tokens merge, and what became of the tokens of the
batch under way."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from greenvis.errors import BadInput, GreenvisError
from greenvis.techniques._shared.attach import first, with_first
from greenvis.techniques._shared.blocks import Block, gather_mask, main, rotated, with_main
from greenvis.techniques._shared.doors import Doors, Passing, refuse_tracing
from greenvis.techniques._shared.rows import Follower, rows_of
from greenvis.techniques.inference.tokens import _matching
from greenvis.techniques.inference.tokens._attention_inputs import Source
from greenvis.techniques.inference.tokens._matching import Matching, bipartite_soft_matching


class Flow(Follower):
    """What became of the tokens of the last batch, by the number of a block.

    Attributes:
        steps: the matching of each block that merged.
        size, positions: of the tokens each block receives, how many of the first ones each stands
            for, and where it stood among them.
        maps: in which of them each first one lies, where they are laid out.
        length: tokens at first.
        numbers: of the blocks, by path.
        restores: whether all tokens are given back behind the last block.
    """

    def __init__(self, prefix: int, doors: Doors) -> None:
        self.prefix, self.doors = prefix, doors
        self.steps: dict[int, Matching] = Passing()
        self.size: dict[int, Tensor] = Passing()
        self.positions: dict[int, Tensor] = Passing()
        self.maps: dict[int, Tensor] = Passing()
        self.length = 0
        self.numbers: dict[str, int] = {}
        self.restores = False

    def keep_rows(self, rows: Tensor, batch: int) -> None:
        """Forget the samples that left the batch early."""
        for state in (self.steps, self.size, self.positions, self.maps):
            state.update(rows_of(state, rows, batch))

    def unmerge(self, tokens: Tensor) -> Tensor:
        """Return tokens with the value each merged into. How many are left tells how often they
        were merged."""
        steps: list[Matching] = []
        for matching in self.upto(None):
            if not steps and tokens.shape[1] >= matching.length:
                return tokens
            steps.append(matching)
            if matching.remaining == tokens.shape[1]:
                return _matching.unmerge(tokens, _matching.token_map(steps))
        return tokens

    def export_state(self, path: str) -> dict[str, Tensor]:
        """Return sizes and positions of the tokens that the block at `path` receives.

        Raises:
            BadInput: where they are given back behind it.
        """
        number = self.numbers.get(path)
        if number is None or number not in self.size:
            return {}
        if self.restores or self.doors.laid_out:
            raise BadInput(
                f"cache: tokens that merged before '{path}' are given back behind it, and how they "
                "merged is not kept: leave `cache` off, or set `restore: never` of the merging"
            )
        return {"size": self.size[number].float(), "places": self.positions[number].float()}

    def import_state(self, path: str, state: Mapping[str, Tensor]) -> None:
        """Take sizes and positions; how tokens merged before is then unknown."""
        number = self.numbers[path]
        self.doors.begin()
        self.size[number], self.positions[number] = state["size"], state["places"].long()
        self.steps = {i: m for i, m in self.steps.items() if i >= number}

    def upto(self, block: int | None) -> list[Matching]:
        """Return the matchings of the blocks before number `block`, in order."""
        return [m for i, m in sorted(self.steps.items()) if block is None or i < block]


class Merging:
    """One block at work. It finds the sizes and places of the tokens it is given under its own
    number, and leaves the next block's under the next, so that a block run again (gradient
    checkpointing) finds what it found before."""

    def __init__(
        self, block: Block, key: Source, r: int, flow: Flow, number: int, proportional: bool
    ) -> None:
        self.block, self.key, self.r, self.flow, self.number = block, key, r, flow, number
        self.proportional, self.restore, self.starts = proportional, False, False
        self._value: Tensor | None = None

    def put(self, model: nn.Module) -> None:
        """Take the place of the block's forward."""
        if self.r:
            self.key.watch(model, self._keep)
        self.block.module.forward = self.forward

    def mask(self, attn_mask: Tensor | None) -> Tensor | None:
        """Return log(size) of the tokens the block receives, on top of the library's mask.

        Args:
            attn_mask: the library's, mostly None.

        Returns:
            fp32 (batch, 1, 1, length), or None where nothing is to be masked.
        """
        flow, i = self.flow, self.number
        if i not in flow.size:
            return attn_mask
        # made for all tokens: transformers does so while a model is exported
        if attn_mask is not None:
            attn_mask = gather_mask(attn_mask, flow.positions[i], flow.length)
        if not self.proportional:
            return attn_mask
        log_size = flow.size[i].log()[:, None, None, :]
        return log_size if attn_mask is None else log_size + attn_mask

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the block, and merge between its attention and its MLP."""
        flow, i = self.flow, self.number
        if self.starts:
            refuse_tracing(main(args, kwargs), "which tokens merge")
            flow.doors.begin()
        if i not in flow.size:
            flow.length = main(args, kwargs).shape[1]
        else:
            if flow.doors.laid_out:
                args, kwargs = with_main(
                    args, kwargs, _matching.unmerge(main(args, kwargs), flow.positions[i])
                )
            if self.block.rotary:
                args, kwargs, _ = rotated(args, kwargs, flow.positions[i], flow.prefix, flow.length)
        if not self.r:
            output = self.block.forward(*args, **kwargs)
            self._pass_on(None)
        else:
            between = self.block.attend(*args, **kwargs)
            x = self._merged(first(between))
            args, kwargs = with_main(args, kwargs, x)
            output = self.block.feed(*args, **kwargs)
        if flow.doors.laid_out:
            if i + 1 in flow.maps:
                return with_first(output, _matching.unmerge(first(output), flow.maps[i + 1]))
            return output
        if self.restore and (steps := flow.upto(None)):
            output = with_first(
                output, _matching.unmerge(first(output), _matching.token_map(steps))
            )
        return output

    def _merged(self, x: Tensor) -> Tensor:
        value, self._value = self._value, None
        if value is None:
            raise GreenvisError(
                f"block '{self.block.path}' ran without its attention's keys at '{self.key.path}'"
            )
        with torch.no_grad():
            metric = self.key.read(
                self.block.module.get_submodule(self.key.path[len(self.block.path) + 1 :]), value
            )
            matching = bipartite_soft_matching(
                metric.mean(2, dtype=torch.float32), self.r, self.flow.prefix
            )
        if not matching.r:
            self._pass_on(None)
            return x
        x, size = matching.merge(x, self.flow.size.get(self.number))
        self._pass_on(matching, size)
        return x

    def _pass_on(self, matching: Matching | None, size: Tensor | None = None) -> None:
        flow, i = self.flow, self.number
        for state, now in (
            (flow.steps, i),
            (flow.size, i + 1),
            (flow.positions, i + 1),
            (flow.maps, i + 1),
        ):
            state.pop(now, None)
        if matching is not None and size is not None:
            flow.steps[i], flow.size[i + 1] = matching, size
            flow.positions[i + 1] = (
                flow.positions[i].gather(1, matching.positions)
                if i in flow.positions
                else matching.positions
            )
            if flow.doors.laid_out:
                flow.maps[i + 1] = (
                    matching.map.gather(1, flow.maps[i]) if i in flow.maps else matching.map
                )
        else:
            for state in (flow.size, flow.positions, flow.maps):
                if i in state:
                    state[i + 1] = state[i]

    def _keep(self, value: Tensor) -> None:
        self._value = value.detach()
