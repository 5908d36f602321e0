"""Token pruning: tokens that matter little leave a vision transformer on the way, for good."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field
from torch import Tensor, nn

from greenvis.core.surgery import names_of
from greenvis.core.technique import InputShape, Installed, Technique
from greenvis.errors import BadInput
from greenvis.models.structure import View, view
from greenvis.tasks.answers import ALL_BUT_VQA
from greenvis.techniques._shared.attach import check_runs, patches_matter
from greenvis.techniques._shared.blocks import Block, masked_attention, set_mask, split_blocks
from greenvis.techniques._shared.doors import Doors
from greenvis.techniques._shared.rows import follow
from greenvis.techniques.inference.tokens._attention_inputs import sources
from greenvis.techniques.inference.tokens._pruned_blocks import Attended, Flow, Predicted, Pruning
from greenvis.techniques.inference.tokens._pruning import ratio_loss


class TokenPrune(Technique):
    """Remove tokens on the way: those a trained predictor finds needless (DynamicViT: Rao et al.,
    2021), or, without training, those the class token attends to least (EViT: Liang et al., 2022).

    Saves inference compute: at three places the share `keep` of the tokens goes on. "predictor":
    small networks learn with the model; in training all tokens stay and attention is masked by
    Gumbel-softmax decisions, so training costs more, not less, and gets the term "token_prune" (the
    squared distance from the share to keep). The paper also distils from the unpruned
    model: add `distill` (weight 0.5, temperature 1). "class_attention" removes tokens between
    attention and MLP and saves in training, too; `fuse` hands the rest on as one token. The head
    must read the class token, not the patches. Features asked for between the
    blocks by another door (hidden states, timm's forward_intermediates) have a row for each patch
    at its position; a token that left keeps the value it had.

    Example:
        >>> live = gv.wrap(model, gv.TokenPrune(keep=0.5))
        >>> model(x).shape
        torch.Size([4, 5])
    """

    name = "token_prune"
    tasks = ALL_BUT_VQA
    instead = "image_tokens makes fewer of what a language model reads"
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
            self.name,
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
