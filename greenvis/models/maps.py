"""The maps of a backbone's stages, which heads for pixels and boxes stand on."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from greenvis.errors import BadInput
from greenvis.models.structure import View
from greenvis.models.structure.layout import as_map
from greenvis.tasks.answers import is_tensor


class StageMaps(nn.Module):
    """A backbone whose stages' last features are read, and which ends behind the last of them.

    Args:
        backbone: A classifier; what stands behind its last stage leaves it.
        structure: `structure.view` of it.
        head: Who reads them, for messages.

    Attributes:
        probed: The maps of two examples (2, channels, height, width), without values.

    Raises:
        BadInput: For a backbone without stages, and one whose stages work on parts of images.
    """

    def __init__(self, backbone: nn.Module, structure: View, head: str) -> None:
        super().__init__()
        paths = [stage[-1] for stage in structure.stages] or [*structure.convs[-1:]]
        layouts = structure.layouts
        lost = not structure.stages and structure.attention  # behind the last convolution
        if not paths or lost or (structure.stages and any(p not in layouts for p in paths)):
            raise BadInput(
                f"`head: {head}` found no stages in {type(backbone).__name__}: take a backbone of "
                "blocks or convolutions"
            )
        self.backbone, self.paths = backbone, tuple(paths)
        self.prefix = (structure.prefix_tokens, structure.prefix_position)
        self.channels = tuple(layouts[p].channels if p in layouts else 1 for p in paths)
        self._maps: list[Tensor] = []
        for path in self.paths:
            backbone.get_submodule(path).register_forward_hook(self._keep)
        mode = backbone.training
        backbone.eval()
        with torch.enable_grad():
            maps = self.maps(torch.cat([structure.example] * 2))
            _drop_unused(backbone, maps)
        backbone.train(mode)
        if any(len(m) != 2 * len(structure.example) for m in maps):
            raise BadInput(
                f"`head: {head}` wants blocks of images, and those of {type(backbone).__name__} "
                "work on parts of them: take another backbone"
            )
        self.probed = [m.new_empty(1).expand(m.shape) for m in maps]

    def _keep(self, module: nn.Module, args: Any, output: Any) -> None:
        self._maps.append(output if is_tensor(output) else output[0])

    def maps(self, x: Tensor) -> list[Tensor]:
        """Return the maps of each stage, (batch, channels, height, width)."""
        self._maps = []
        self.backbone(x)
        maps, self._maps = self._maps, []
        count, position = self.prefix
        aspect = x.shape[2] / x.shape[3]
        out = []
        for features, axis in zip(maps, self.channels, strict=True):
            if features.dim() == 3 and count:
                features = features[:, :-count] if position == "behind" else features[:, count:]
            out.append(as_map(features, axis, 0, aspect))
        return out


def _drop_unused(backbone: nn.Module, maps: list[Tensor]) -> None:
    """Take out of a backbone what these maps do not come from (norms and classifier behind them),
    so that nothing is trained or saved that changes no answer."""
    named = {n: p for n, p in backbone.named_parameters() if p.requires_grad}
    total = torch.stack([m.float().sum() for m in maps]).sum()
    grads = torch.autograd.grad(total, list(named.values()), allow_unused=True)
    used = [n for n, g in zip(named, grads, strict=True) if g is not None]
    for path, module in list(backbone.named_modules()):
        own = any(True for _ in module.parameters())
        below = path + "."
        if path and own and not any(name.startswith(below) for name in used):
            backbone.set_submodule(path, nn.Identity())
