"""Ladder side-tuning: freeze a transformer, learn a small one beside it that reads its blocks."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from greenvis.core.technique import Classifier, InputShape, Installed, Stage, Technique
from greenvis.errors import BadInput
from greenvis.models.structure import view
from greenvis.tasks.answers import ALL_BUT_VQA
from greenvis.techniques._shared.attach import (
    check_runs,
    first,
    like,
    row_of_blocks,
    train_only,
    with_first,
)

_CHILD = "side"
_GATE_TEMPERATURE = 0.1


class Side(Technique):
    """Learn a small transformer beside a frozen one (ladder side-tuning: Sung et al., 2022); the
    backward never enters the frozen blocks.

    Saves training compute (the whole backward of the base) and activation memory, besides optimizer
    memory and storage. Costs the side network's compute, in training and for good; nothing merges.
    Side layer i reads μ·down(output of block i) + (1 − μ)·(side layer i − 1), with a learned gate μ
    = sigmoid(α / 0.1); what the last one gives is projected up and added to the last block's
    output. That projection starts at zero, so a fresh side changes nothing (the authors read the
    side alone). The classifier trains in full. Dropout and stochastic depth of the frozen part stay
    as `model.train()` sets them.

    Example:
        >>> live = gv.wrap(model, gv.Side(reduction=4))
        >>> print(live.summary())
        VisionTransformer with side
          side: {'reduction': 4}
          trains 3,007 of 35,231 parameters (8.54%); delta 0.01 MB
    """

    name = "side"
    tasks = ALL_BUT_VQA
    instead = "lora tunes such a model"
    stage: ClassVar[Stage] = (
        # behind all that changes the base's own layers, so that none takes the ladder's for
        # those
        "exits"
    )
    examples = ({"reduction": 4}, {"reduction": 2, "every": 2, "head": "freeze"})
    nothing = {"every": 100_000}

    reduction: int = Field(
        default=8, ge=1, description="how many times narrower than the base the side network is"
    )
    every: int = Field(
        default=1, ge=1, description="a side layer for every so many blocks, counted from the last"
    )
    head: Classifier = "train"
    input_shape: InputShape = None

    def install(self, model: nn.Module) -> Installed:
        """Put the side network in. Raises BadInput where no one sequence runs through all
        blocks."""
        structure = view(model, self.input_shape, probe=False)
        if not structure.attention:
            raise BadInput(
                f"a side network reads the tokens of attention blocks, and {type(model).__name__} "
                "has none"
            )
        blocks = row_of_blocks(model, structure)
        if self.every > len(blocks):
            raise BadInput(
                f"every is {self.every}, but {type(model).__name__} has {len(blocks)} blocks: give "
                "no more"
            )
        dim = structure.layouts[blocks[0]].width
        if dim // self.reduction < 1:
            raise BadInput(
                f"reduction is {self.reduction}, but the tokens of {type(model).__name__} have "
                f"width {dim}: give less"
            )
        read = list(reversed(blocks[:: -self.every]))
        ladder = Ladder(
            dim, dim // self.reduction, len(read), **like(model.get_submodule(blocks[0]))
        )
        ladder.put(model, blocks[0], read)
        added = list(ladder.parameters())
        check_runs(model, structure.example, added, "a side network")
        live = Installed(train_only(model, added, structure, self.head), freezes=True)
        live.unmergeable = (
            "a side network is a network of its own beside the model's; keep the model wrapped"
        )
        return live


class Ladder(nn.Module):
    """The side network. Reads (batch, tokens, dim) before the first block and behind `layers`
    others."""

    def __init__(self, dim: int, width: int, layers: int, **kind: Any) -> None:
        super().__init__()
        self.enter = nn.Linear(dim, width, **kind)
        self.downs = nn.ModuleList(nn.Linear(dim, width, **kind) for _ in range(layers))
        self.gates = nn.ParameterList(nn.Parameter(torch.zeros((), **kind)) for _ in range(layers))
        heads = max(h for h in (1, 2, 4, 8) if width % h == 0 and (h == 1 or width // h >= 8))
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(
                width, heads, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True, **kind
            )
            for _ in range(layers)
        )
        self.norm = nn.LayerNorm(width, **kind)
        self.up = nn.Linear(width, dim, **kind)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)
        self.inputs: dict[int, Tensor] = {}

    def put(self, model: nn.Module, start: str, read: list[str]) -> None:
        """Live in the last block read, and look at the others and at the input of `start`."""
        last = model.get_submodule(read[-1])
        last.add_module(_CHILD, self.train(last.training))
        model.get_submodule(start).register_forward_pre_hook(
            _Rung(self, 0).before, with_kwargs=True
        )
        for i, path in enumerate(read[:-1], 1):
            model.get_submodule(path).register_forward_hook(_Rung(self, i).behind)
        last.register_forward_hook(self.join)

    def forward(self, start: Tensor, outputs: list[Tensor]) -> Tensor:
        """Return what to add to the last output: (batch, tokens, dim)."""
        h = self.enter(start)
        for down, gate, layer, output in zip(
            self.downs, self.gates, self.layers, outputs, strict=True
        ):
            mu = torch.sigmoid(gate / _GATE_TEMPERATURE)
            h = layer(mu * down(output) + (1 - mu) * h)
        return self.up(self.norm(h))

    def join(self, block: nn.Module, args: Any, output: Any) -> Any:
        """Return the last block's output with the side network's added."""
        x = first(output)
        outputs = [self.inputs[i] for i in range(1, len(self.layers))]
        change = self(self.inputs[0], [*outputs, x.detach()])
        # else kept until the next forward: checkpointing may run this block once more
        if not torch.is_grad_enabled():
            self.inputs.clear()
        return with_first(output, x + change)


class _Rung:
    """Notes one of the tensors the ladder reads, cut off from the base's backward."""

    def __init__(self, ladder: Ladder, index: int) -> None:
        self.ladder, self.index = ladder, index

    def before(self, block: nn.Module, args: Any, kwargs: Any) -> None:
        """Note a block's input."""
        self.ladder.inputs[self.index] = next(
            t for t in (*args, *kwargs.values()) if isinstance(t, Tensor)
        ).detach()

    def behind(self, block: nn.Module, args: Any, output: Any) -> None:
        """Note a block's output."""
        self.ladder.inputs[self.index] = first(output).detach()
