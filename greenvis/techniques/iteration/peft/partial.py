"""Partial fine-tuning: train the last blocks and all that comes after them."""

from __future__ import annotations

from pydantic import Field
from torch import nn

from greenvis.core.surgery import freeze, names_of
from greenvis.core.technique import InputShape, Installed, PrefixCache, Technique
from greenvis.errors import BadInput
from greenvis.models.structure import reached, view
from greenvis.tasks.answers import IMAGES
from greenvis.techniques._shared.heads import head_parameters
from greenvis.techniques.iteration.peft._frozen_prefix import InstalledPrefix


class Partial(Technique):
    """Train the last `blocks` blocks and every layer behind them; freeze what lies before (Yosinski
    et al., 2014).

    Saves the backward of the frozen part, which stops at the first trained block, and its optimizer
    memory. Costs accuracy where early features do not fit. Dropout and stochastic depth of the
    frozen part stay as `model.train()` sets them; with
    `cache`, it runs in eval, and its forward, too, is saved from the second time on that a version
    of an image is seen: what enters the first trained block is kept on disk. In a loop of one's
    own, `Wrapped.set_samples` says which samples a batch holds.

    Example:
        >>> live = gv.wrap(model, gv.Partial(blocks=1))
        >>> sorted({name.rsplit(".", 2)[0] for name in live.trainable})
        ['blocks.1', 'blocks.1.attn', 'blocks.1.mlp', 'head', 'norm']
    """

    name = "partial"
    stage = "weights"
    examples = ({}, {"cache": True})

    blocks: int = Field(default=1, ge=1, description="how many of the last blocks train")
    cache: PrefixCache = False
    input_shape: InputShape = None

    @property
    def tasks(self) -> frozenset[str] | None:  # type: ignore[override]
        """What it is right for: what is cached is what batches of images give."""
        return IMAGES if self.cache else None

    def install(self, model: nn.Module) -> Installed:
        """Freeze what lies before. Raises BadInput for a model without blocks, or with fewer."""
        structure = view(model, self.input_shape, probe=False)
        blocks = structure.role("block")
        if self.blocks > len(blocks):
            raise BadInput(
                f"blocks is {self.blocks}, but {type(model).__name__} has {len(blocks)}: give 1 to "
                f"{len(blocks)}"
            )
        chosen = blocks[-self.blocks :]
        behind = {*chosen}
        # each in order
        for layers in (
            structure.linears,
            structure.convs,
            structure.norms,
            tuple(a.path for a in structure.attention),
        ):
            first = next(
                (i for i, p in enumerate(layers) if p.startswith(tuple(f"{c}." for c in chosen))),
                len(layers),
            )
            behind |= set(layers[first:])
        live = reached(model, structure.example)
        classifier = set(names_of(model, head_parameters(model, structure)))
        names = {
            n
            for n in live
            if n in classifier
            or n.startswith(tuple(f"{p}." for p in behind if not structure.in_classifier(p)))
        }
        freeze(
            model,
            but=[p for n, p in model.named_parameters() if n in names],
            follows=structure.in_classifier,
        )
        trained = tuple(n for n, _ in model.named_parameters() if n in names)
        if self.cache:
            return InstalledPrefix(model, trained, structure.example, self.cache)
        return Installed(trained, freezes=True)
