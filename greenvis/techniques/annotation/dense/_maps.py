"""A model's features as maps, where they are made: behind its blocks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from greenvis.core.modes import removing
from greenvis.errors import BadInput
from greenvis.models.structure import view
from greenvis.models.structure.layout import as_map
from greenvis.models.structure.probing import probing
from greenvis.techniques._shared.attach import first, like, seat


class Maps:
    """The features of the last block, and of the last stage's one before (in a row of blocks: of
    the middle one).

    Args:
        model: The model.
        image: (channels, height, width); inferred where None.

    Attributes:
        widths: Channels of the earlier and the last map; of the last alone where there is no
            earlier.
        seat: Where new parts may live.

    Raises:
        BadInput: For a model whose blocks give no maps.
    """

    def __init__(self, model: nn.Module, image: tuple[int, int, int] | None = None) -> None:
        self.model, what = model, type(model).__name__
        structure = view(model, image, probe=False)
        ends = [stage[-1] for stage in structure.stages]
        blocks = [*structure.blocks]
        last = blocks[-1] if blocks else ""
        earlier = ends[-2:-1] if len(ends) > 1 else blocks[(len(blocks) - 1) // 2 : -1][:1]
        paths = [*earlier, last]
        layouts = [structure.layouts.get(path) for path in paths]
        where = seat(model, last) if last else None
        if where is None or any(one is None or len(one.output) not in (3, 4) for one in layouts):
            raise BadInput(
                f"{what} shows no blocks whose features lie on a map; `greenvis inspect` says what "
                "it has"
            )
        if structure.example.device.type == "meta":
            raise BadInput(f"{what} has no weights yet (device meta): load them first")
        self.seat, self.input_shape = where, structure.input_shape
        self._paths = paths
        self._axes = [one.channels for one in layouts if one is not None]
        self._prefix = structure.prefix_tokens
        with probing(model), torch.no_grad():
            maps = self(structure.example)
        if any(len(m) != len(structure.example) or m.dim() != 4 for m in maps):
            raise BadInput(f"the blocks of {what} work on parts of images: take another model")
        self.widths = [m.shape[1] for m in maps]

    def __call__(self, x: Tensor) -> list[Tensor]:
        """Return the maps of images (batch, channels, height, width), the last block's last: each
        (batch, channels, height, width)."""
        outputs: list[Tensor] = []

        def note(module: nn.Module, args: Any, output: Any) -> None:
            outputs.append(first(output))

        hooks = [self.model.get_submodule(p).register_forward_hook(note) for p in self._paths]
        with removing(hooks):
            self.model(x)
        aspect = x.shape[2] / x.shape[3]
        return [
            as_map(output, axis, self._prefix, aspect)
            for output, axis in zip(outputs, self._axes, strict=True)
        ]

    def add(self, name: str, parts: nn.Module) -> None:
        """Put parts that learn beside the last block's own."""
        self.seat.add_module(name, parts.to(**like(self.seat)))
