"""Token merging: from block to block the most similar tokens of a vision transformer become one."""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from torch import Tensor, nn

from greenvis.core.technique import InputShape, Installed, Technique
from greenvis.errors import BadInput
from greenvis.models.structure import view
from greenvis.tasks.answers import ALL_BUT_VQA
from greenvis.techniques._shared.attach import check_runs, patches_matter
from greenvis.techniques._shared.blocks import masked_attention, set_mask, split_blocks
from greenvis.techniques._shared.doors import Doors
from greenvis.techniques._shared.rows import follow
from greenvis.techniques.inference.tokens import _matching
from greenvis.techniques.inference.tokens._attention_inputs import sources
from greenvis.techniques.inference.tokens._matching import parse_r, source_matrix
from greenvis.techniques.inference.tokens._merging_blocks import Flow, Merging


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

    Example:
        >>> live = gv.wrap(model, gv.TokenMerge(r=2))
        >>> model(x).shape
        torch.Size([4, 5])
        >>> live.undo() is model
        True
    """

    name = "token_merge"
    stage = "tokens"
    tasks = ALL_BUT_VQA
    instead = "image_tokens makes fewer of what a language model reads"
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
