"""Token merging: from block to block the most similar tokens of a vision transformer become one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from greenvis.core.technique import InputShape, Installed, Technique
from greenvis.errors import BadInput, GreenvisError
from greenvis.models.structure import view
from greenvis.techniques._shared.attach import check_runs, first, patches_matter, with_first
from greenvis.techniques._shared.blocks import (
    Block,
    gather_mask,
    main,
    masked_attention,
    rotated,
    set_mask,
    split_blocks,
    with_main,
)
from greenvis.techniques._shared.doors import Doors, Passing, refuse_tracing
from greenvis.techniques._shared.rows import Follower, follow, rows_of
from greenvis.techniques.inference.tokens import _matching
from greenvis.techniques.inference.tokens._attention_inputs import Source, sources
from greenvis.techniques.inference.tokens._matching import (
    Matching,
    bipartite_soft_matching,
    parse_r,
    source_matrix,
)


class TokenMerge(Technique):
    """Merge the most similar tokens between attention and MLP of each block (ToMe: Bolya et al.,
    2023).

    Saves compute in inference and training, without training for it: each block hands r fewer
    tokens on, r·depth in all. Costs a comparison of the keys in each merging block, and accuracy,
    the more the larger r; at small batches or small r of small models it costs more time than it
    saves. Class, distillation and register tokens are never merged. A merged token is the mean of
    its patches, and counts in attention as many times as it has patches (`proportional`), still in
    the fused kernel. A head that reads the patches (pooling, dense outputs) is given all of them
    back, each with the value it merged into, so that a mean is weighted by size; so is whoever
    learns from features between the blocks, or asks for them by another door (hidden states, timm's
    forward_intermediates): maps lie where their patches do. Rotary embeddings go with the tokens.
    Blocks must be pre-norm with global attention.
    """

    name = "token_merge"
    stage = "tokens"
    needs = frozenset({"token_grid"})
    breaks = frozenset({"token_grid", "attention_maps"})
    examples = ({"r": 2}, {"r": [3, -1], "proportional": False, "restore": "always"})
    neutral = {"r": 0}
    nothing = {"r": [1] * 1000}

    r: int | list[float] = Field(
        default=8,
        description="tokens merged in each block: one number, [r, inflection] (-1 falls from "
        "2r to 0), or one per block",
    )
    proportional: bool = Field(
        default=True, description="add log(size) to attention, so that merged tokens count as many"
    )
    restore: Literal["auto", "always", "never"] = Field(
        default="auto",
        description="give all tokens back behind the last block: where the head reads patches, "
        "always, or never",
    )
    input_shape: InputShape = None

    def install(self, model: nn.Module) -> Installed:
        """Put merging in; r = 0 puts nothing in. Raises BadInput for windows and blocks that are
        not pre-norm, saying which."""
        structure = view(model, self.input_shape, probe=False)
        blocks = split_blocks(model, structure, "token merging")
        numbers = parse_r(len(blocks), self.r)
        start = next((i for i, n in enumerate(numbers) if n), None)
        if start is None:
            return InstalledTokenMerge(Flow(structure.prefix_tokens, Doors(model, [])))
        if "rope" in structure.flags and not all(b.rotary for b in blocks):
            raise BadInput(
                f"{type(model).__name__} rotates queries and keys by their place (RoPE), but its "
                "blocks are not handed the embedding, so it cannot go with merged tokens"
            )
        keys = sources(model, structure, blocks, "key")
        flow = Flow(structure.prefix_tokens, Doors(model, (b.module for b in blocks[start:])))
        parts = zip(blocks, keys, numbers, strict=True)
        merging = [
            Merging(b, k, n, flow, i, self.proportional) for i, (b, k, n) in enumerate(parts)
        ][start:]
        where = [masked_attention(model, m.block.attention, m.block.path) for m in merging[1:]]
        # before the first merge all sizes are 1
        for module, m in zip(where, merging[1:], strict=True):
            set_mask(module, m.mask)
        merging[0].starts = True
        reads = (
            self.restore == "auto"
            and bool(structure.heads)
            and patches_matter(model, structure, blocks[-1].path)
        )
        restore = self.restore == "always" or reads
        merging[-1].restore = flow.restores = restore
        flow.numbers = {m.block.path: m.number for m in merging}
        for m in merging:
            m.put(model)
        follow(model, flow)
        never = self.restore == "never"
        # what it gives is what the head reads
        flow.doors.put(*["forward_features"] if never else [])
        if (
            not flow.doors.settle(structure.example, maps_only=never)
            and self.restore == "auto"
            and not restore
        ):
            merging[-1].restore = flow.restores = True  # the model's own output holds the tokens
            flow.doors.settle(structure.example)
        if structure.example.device.type != "meta":
            check_runs(model, structure.example, [], f"r = {self.r}")
        live = InstalledTokenMerge(flow)
        live.unmergeable = (
            "merging tokens is a change of the run, not of weights; keep the model wrapped"
        )
        return live


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


class InstalledTokenMerge(Installed):
    """Merging at work. What it says about tokens is of the last batch the model was given."""

    def __init__(self, flow: Flow) -> None:
        super().__init__()
        self.flow = flow

    def replacement_blocker(self, path: str) -> str:
        """Return "": nothing of a module that is not its own."""
        return ""

    def token_map(self, block: int | None = None) -> Tensor | None:
        """Return in which token each of the first ones lies.

        Args:
            block: behind the blocks before this number; None: behind the last.

        Returns:
            int64 (batch, length); None where nothing has merged yet.
        """
        steps = self.flow.upto(block)
        return _matching.token_map(steps) if steps else None

    def sizes(self, block: int | None = None) -> Tensor | None:
        """Return how many of the first tokens each remaining one stands for.

        Args:
            block: behind the blocks before this number; None: behind the last.

        Returns:
            fp32 (batch, remaining); None: all 1.
        """
        steps = self.flow.upto(block)
        if steps:
            return self.flow.size[max(i for i in self.flow.steps if block is None or i < block) + 1]
        return None

    def source(self, block: int | None = None) -> Tensor | None:
        """Return which of the first tokens lie in each remaining one.

        Args:
            block: behind the blocks before this number; None: behind the last.

        Returns:
            (batch, remaining, length), 1 where a first token lies in a remaining one, else 0; None
            where nothing has merged yet.
        """
        steps = self.flow.upto(block)
        return source_matrix(_matching.token_map(steps), steps[-1].remaining) if steps else None

    def unmerge(self, x: Tensor, block: int | None = None) -> Tensor:
        """Return features for all first tokens.

        Args:
            x: (batch, remaining, channels), of the block before number `block`.
            block: None: of the last block.

        Returns:
            (batch, length, channels).
        """
        mapping = self.token_map(block)
        return x if mapping is None else _matching.unmerge(x, mapping)
