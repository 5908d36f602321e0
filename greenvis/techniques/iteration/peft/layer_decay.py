"""Layer-wise decay of the learning rate: fine-tuning keeps what pretraining put into the early
blocks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import Field
from torch import nn

from greenvis.core.technique import InputShape, Installed, Technique
from greenvis.models.structure import View, view


class LayerDecay(Technique):
    """Fine-tune each block with a smaller learning rate than the one behind it, as BEiT (Bao et
    al., 2022) and MAE do.

    Saves and costs nothing a step; a pretrained model tends to reach its accuracy in fewer epochs.
    With L blocks, layer 0 (embeddings and what else lies before the blocks) to L + 1 (all behind
    the last block, classifier included) learn at lr · decay^(L + 1 − layer); what stands between
    two blocks counts with the one before; parameters that other techniques add learn at lr. The
    idea is ELECTRA's (Clark et al., 2020), whose last block is two factors below the classifier,
    not one; timm counts a final norm with the last block. A masked autoencoder wants 0.65 to 0.75.

    Example:
        >>> live = gv.wrap(model, gv.LayerDecay(decay=0.5))
        >>> sorted({group["lr"] for group in live.param_groups(lr=0.1)})
        [0.0125, 0.025, 0.05, 0.1]
    """

    name = "layer_decay"
    stage = "base"

    decay: float = Field(
        default=0.65, gt=0, le=1, description="factor from a block to the one before it"
    )
    input_shape: InputShape = None

    def install(self, model: nn.Module) -> Installed:
        """Number the layers; nothing is changed. Raises BadInput for a model without blocks."""
        structure = view(model, self.input_shape, probe=False)
        blocks = structure.role("block")
        depths = layer_numbers(structure, [n for n, _ in model.named_parameters()])
        factors = {
            id(p): self.decay ** (len(blocks) + 1 - depths[n]) for n, p in model.named_parameters()
        }
        return InstalledLayerDecay(model, factors)


class InstalledLayerDecay(Installed):
    """Groups of the optimizer by layer."""

    def __init__(self, model: nn.Module, factors: Mapping[int, float]) -> None:
        super().__init__()
        self.model, self.factors = model, factors

    def param_groups(self, lr: float) -> list[dict[str, Any]]:
        """Return a group for each layer that learns, the first layer's first."""
        groups: dict[float, list[nn.Parameter]] = {}
        for parameter in self.model.parameters():
            if parameter.requires_grad and id(parameter) in self.factors:
                groups.setdefault(self.factors[id(parameter)], []).append(parameter)
        return [{"params": groups[factor], "lr": lr * factor} for factor in sorted(groups)]


def layer_numbers(structure: View, names: Sequence[str]) -> dict[str, int]:
    """Return each parameter's layer: 0 before the first block, i + 1 in block i, blocks + 1 behind
    the last.

    What stands between two blocks (a stage's downsampling) counts with the one before it.

    Args:
        structure: of the model.
        names: parameters.

    Returns:
        The layer by name.
    """
    number = {path: i + 1 for i, path in enumerate(structure.blocks)}
    last = len(number) + 1

    def block_of(path: str) -> int | None:
        return next((n for b, n in number.items() if path == b or path.startswith(b + ".")), None)

    outside: dict[str, int] = {}
    # each in order
    for layers in (
        structure.linears,
        structure.convs,
        structure.norms,
        tuple(a.path for a in structure.attention),
    ):
        numbers = [block_of(path) for path in layers]
        inside = [i for i, n in enumerate(numbers) if n is not None]
        for i, path in enumerate(layers):
            if numbers[i] is None and inside:
                before = [n for n in numbers[:i] if n is not None]
                outside[path] = last if i > inside[-1] else max(before, default=0)
    outside |= dict.fromkeys(structure.classifier, last)

    def of(name: str) -> int:
        owner = block_of(name)
        if owner is not None:
            return owner
        path = name.rpartition(".")[0]
        around = [n for p, n in outside.items() if path == p or path.startswith(p + ".")]
        # a part's own parameter: with the part's layers
        if not around and not any(b.startswith(path + ".") for b in number):
            around = [
                min((n for p, n in outside.items() if path and p.startswith(path + ".")), default=0)
            ]
        return max(around, default=0)

    return {name: of(name) for name in names}
