"""Visual prompt tuning: freeze a vision transformer, learn tokens that stand between its own."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from greenvis.technique import Installed, Stage, Technique
from greenvis.techniques.iteration._prompts import Joined, prompt_blocks
from greenvis.techniques.iteration._seams import check_runs, train_only
from greenvis.views import view

_CHILD = "prompt"


class Prompt(Technique):
    """Learn prompt tokens in the input of a frozen vision transformer (VPT: Jia et al., 2022): before the first block
    (shallow) or, new ones, before each (deep).

    Saves optimizer memory and storage per task (the delta). Costs compute, in training and for good: every block carries
    more tokens, and nothing merges. Order: [class and other prefix tokens][prompts][patches]. Prompts get no position
    embedding and start from U(±√(6 / (c·p² + dim))) for patches of c channels and side p. Behind the last block they are taken
    out, so a head that pools the patches does not see them. The classifier trains in full. Dropout and stochastic depth of
    the frozen part stay as `model.train()` sets them (the authors hold them off: give a model without).
    """

    name: ClassVar[str] = "prompt"
    stage: ClassVar[Stage] = "tokens"
    breaks: ClassVar[frozenset[str]] = frozenset({"token_grid"})
    examples: ClassVar[tuple[Mapping[str, Any], ...]] = ({"tokens": 3}, {"tokens": 2, "depth": "deep", "head": "freeze"})
    neutral: ClassVar[Mapping[str, Any] | None] = None

    tokens: Annotated[int, Field(ge=1, description="prompts in each prompted block")] = 10
    depth: Annotated[Literal["shallow", "deep"], Field(description="prompt the first block, or each with its own")] = "shallow"
    dropout: Annotated[float, Field(ge=0, lt=1, description="dropout on the prompts")] = 0.0
    head: Annotated[Literal["train", "freeze"], Field(description="train the classifier in full, or leave it")] = "train"
    input_shape: Annotated[
        tuple[int, int, int] | None, Field(description="(channels, height, width) of an image, if it cannot be inferred")
    ] = None

    def install(self, model: nn.Module) -> Installed:
        """Put the prompts in. Raises BadInput for anything but a plain sequence of patches through all blocks."""
        found = view(model, self.input_shape, probe=False)
        blocks = prompt_blocks(model, found)
        length, dim = found.layouts[blocks[0]].output[1:]
        patch = math.prod(found.example.shape[1:]) / (length - found.prefix_tokens)  # c·p², also behind a convolutional stem
        bound = math.sqrt(6 / (patch + dim))
        weight = next(p for p in model.get_submodule(blocks[0]).parameters() if p.is_floating_point())
        added: list[nn.Parameter] = []
        for i, path in enumerate(blocks):
            if self.depth == "shallow" and i:
                break
            rows = torch.empty(self.tokens, dim, device=weight.device, dtype=weight.dtype).uniform_(-bound, bound)
            prompts = Prompts(rows, found.prefix_tokens, self.dropout)
            prompts.put(model, path, path if self.depth == "deep" else blocks[-1], _CHILD)
            added.append(prompts.rows)
        check_runs(model, found.example, added, f"{self.tokens} {self.depth} prompts")
        live = Installed(train_only(model, added, found, self.head), freezes=True)
        live.unmergeable = "prompts are tokens of the sequence, not a change of weights; keep the model wrapped"
        return live


class Prompts(Joined):
    """Rows (tokens, dim), the same for each sample, that join a sequence behind its prefix, and leave it again."""

    def __init__(self, rows: Tensor, prefix: int, dropout: float) -> None:
        super().__init__(prefix, len(rows))
        self.rows = nn.Parameter(rows)
        self.dropout = nn.Dropout(dropout)

    def rows_for(self, x: Tensor) -> Tensor:
        """Return the rows as (batch, tokens, dim)."""
        return self.dropout(self.rows).expand(x.shape[0], -1, -1)
