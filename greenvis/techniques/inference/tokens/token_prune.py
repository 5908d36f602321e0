"""Token pruning: tokens that matter little leave a vision transformer on the way, for good."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from greenvis.core.surgery import names_of
from greenvis.core.technique import InputShape, Installed, Technique
from greenvis.core.trainers import refuse_recomputed
from greenvis.errors import BadInput
from greenvis.models.structure import View, view
from greenvis.techniques._shared.attach import check_runs, first, like, patches_matter, with_first
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
from greenvis.techniques.inference.tokens._attention_inputs import Source, sources
from greenvis.techniques.inference.tokens._pruning import (
    Predictor,
    best,
    class_attention,
    decide,
    fused,
    policy_mask,
    ratio_loss,
)

_CHILD = "token_prune"


class TokenPrune(Technique):
    """Remove tokens on the way: those a trained predictor finds needless (DynamicViT: Rao et al.,
    2021), or, without training, those the class token attends to least (EViT: Liang et al., 2022).

    Saves inference compute: at three places the share `keep` of the tokens goes on. "predictor":
    small networks learn with the model; in training all tokens stay and attention is masked by
    Gumbel-softmax decisions, so training costs more, not less, and gets the term "token_prune" (the
    squared distance from the share to keep). The paper also distils from the unpruned
    model: add `distill` (weight 0.5, temperature 1). "class_attention" removes tokens between
    attention and MLP and saves in training, too; `fuse` hands the rest on as one token. The head
    must read the class token, not the patches. Whoever asks for features between the blocks by
    another door (hidden states, timm's forward_intermediates) gets a row for each patch at its
    place, of those that left with the value they had.
    """

    name = "token_prune"
    only_with = {"weight": ("method", ("predictor",))}
    stage = "tokens"
    needs = frozenset({"token_grid"})
    breaks = frozenset({"token_grid", "token_places", "attention_maps"})
    examples = (
        {"keep": 0.6},
        {"method": "class_attention", "keep": 0.5, "fuse": True, "blocks": [0, 1]},
    )
    neutral = {"keep": 1.0}
    nothing = {"blocks": [1000]}

    method: Literal["predictor", "class_attention"] = Field(
        default="predictor", description="what chooses: trained predictors, or the class token"
    )
    keep: float = Field(
        default=0.7, gt=0, le=1, description="share of the tokens that go on, at each place again"
    )
    blocks: list[int] | None = Field(
        default=None,
        description="numbers of the blocks in which tokens leave, from 0; default: at 1/4, "
        "1/2, 3/4",
    )
    fuse: bool = Field(
        default=False, description="class_attention: hand the others on as one token"
    )
    weight: float = Field(default=2.0, ge=0, description="predictor: factor of the ratio loss")
    input_shape: InputShape = None

    def install(self, model: nn.Module) -> Installed:
        """Put pruning in. Raises BadInput for windows, blocks that are not pre-norm, and heads that
        read the patches."""
        if self.fuse and self.method == "predictor":
            raise BadInput(
                "fuse needs the class token's attention as weights: set method: class_attention"
            )
        structure = view(model, self.input_shape, probe=False)
        blocks = split_blocks(model, structure, "token pruning")
        pruning_blocks = self._pruning_blocks(len(blocks))
        self._check(model, structure, blocks)
        added: list[nn.Parameter] = []
        start = pruning_blocks[0]
        flow = Flow(
            structure.prefix_tokens,
            self.keep,
            self.fuse,
            Doors(model, (b.module for b in blocks[start:])),
        )
        if self.method == "predictor":
            pruning: list[Pruning] = [Predicted(b, i, flow) for i, b in enumerate(blocks)]
        else:
            pairs = zip(
                sources(model, structure, blocks, "query"),
                sources(model, structure, blocks, "key"),
                strict=True,
            )
            pruning = [
                Attended(b, i, flow, q, k)
                for i, (b, (q, k)) in enumerate(zip(blocks, pairs, strict=True))
            ]
        where = [
            (p, masked_attention(model, p.block.attention, p.block.path)) for p in pruning[start:]
        ]
        for k, i in enumerate(pruning_blocks, 1):
            added += pruning[i].take(model, k, structure)
        for p, attention in where:
            set_mask(attention, p.mask)
            p.block.module.forward = p.forward
        follow(model, flow)
        flow.doors.put()
        flow.doors.settle(structure.example)
        if structure.example.device.type != "meta":
            check_runs(
                model,
                structure.example,
                [],
                f"{self.keep:.0%} of the tokens kept in blocks {pruning_blocks}",
            )
        live = InstalledTokenPrune(flow, self.weight, names_of(model, added))
        live.unmergeable = (
            "pruning tokens is a change of the run, not of weights; keep the model wrapped"
        )
        return live

    def _pruning_blocks(self, depth: int) -> list[int]:
        chosen = (
            self.blocks if self.blocks is not None else [max(1, depth * i // 4) for i in (1, 2, 3)]
        )
        chosen = sorted({i for i in chosen if self.blocks is not None or i < depth})
        if wrong := [i for i in chosen if not 0 <= i < depth]:
            raise BadInput(f"there is no block {wrong[0]}: the model has {depth}, numbered from 0")
        if not chosen:
            raise BadInput(
                f"no block is named in which tokens leave; the model has {depth}, numbered from 0"
            )
        return chosen

    def _check(self, model: nn.Module, structure: View, blocks: list[Block]) -> None:
        name = type(model).__name__
        if not structure.prefix_tokens or patches_matter(model, structure, blocks[-1].path):
            raise BadInput(
                f"the head of {name} reads its patches, of which pruned ones would be missing; use "
                "token_merge"
            )
        if "rope" in structure.flags and not all(b.rotary for b in blocks):
            raise BadInput(
                f"{name} rotates queries and keys (RoPE), but its blocks are not handed the "
                "embedding"
            )
        if "rope" in structure.flags and self.method == "class_attention":
            raise BadInput(
                f"{name} rotates keys by their place (RoPE), so its class attention is not read; "
                "use the predictor"
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
    """

    def __init__(self, prefix: int, keep: float, fuse: bool, doors: Doors) -> None:
        self.prefix, self.keep, self.fuse, self.doors, self.length = prefix, keep, fuse, doors, 0
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
        self.block.module.add_module(_CHILD, predictor.train(self.block.module.training))
        return list(predictor.parameters())

    def mask(self, attn_mask: Tensor | None) -> Tensor | None:
        """Add the mask of the tokens that were decided against."""
        attn_mask, policy = super().mask(attn_mask), self._policy
        if policy is None or not self.block.module.training:
            return attn_mask
        if policy.requires_grad:  # what decided lies outside of a block that is checkpointed
            refuse_recomputed(TokenPrune.name)
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
        scores = self.block.module.get_submodule(_CHILD)(
            patches, before.unsqueeze(-1).to(patches.dtype)
        )
        flow.decided[i] = decide(scores, before)

    def _remove(self, x: Tensor) -> Tensor:
        flow = self.flow
        patches = x[:, flow.prefix :]
        count = max(1, int((flow.length - flow.prefix) * flow.shares[self.number]))
        if count >= patches.shape[1]:
            return x
        scores = self.block.module.get_submodule(_CHILD)(
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


class InstalledTokenPrune(Installed):
    """Pruning at work. Adds the term "token_prune" where predictors learn."""

    def __init__(self, flow: Flow, weight: float, trainable: tuple[str, ...]) -> None:
        super().__init__(trainable)
        self.flow, self.weight = flow, weight

    def replacement_blocker(self, path: str) -> str:
        """Return "": nothing of a module that is not its own."""
        return ""

    @property
    def kept_positions(self) -> Tensor | None:
        """Where the tokens of the last batch that reached the head stood, int64 (batch, tokens);
        None where all did.
        """
        return self.flow.positions[max(self.flow.positions)] if self.flow.positions else None

    def terms(self, x: Any, y: Any, logits: Tensor | None) -> Mapping[str, Tensor]:
        """Return {"token_prune": weight · ratio_loss} of the decisions of this step's forward."""
        decided = [
            (self.flow.decided[i], share)
            for i, share in self.flow.shares.items()
            if i in self.flow.decided
        ]
        if not decided:
            return {}
        policies, shares = zip(*decided, strict=True)
        return {"token_prune": self.weight * ratio_loss(policies, shares)}
