"""Other answers than one class per image, from any backbone: one per pixel, one per bag of
images."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from greenvis.core.weights import first_line
from greenvis.errors import BadInput
from greenvis.models.bag_head import Bags
from greenvis.models.structure import View, view
from greenvis.models.structure.layout import as_map
from greenvis.tasks.answers import is_tensor


def with_head(model: nn.Module, head: str, classes: int, size: Any = None) -> nn.Module:
    """Give a classifier of images another answer.

    Args:
        model: A backbone with its classifier.
        head: "dense": a class per pixel. "mean", "max", "attention", "gated", "transmil": a class
            per bag of images, by what is pooled over the bag (`models.bag_head`).
        classes: How many.
        size: The images' side, or (height, width), in pixels, where the model does not say.

    Returns:
        The model; the backbone is in it, without its classifier.

    Raises:
        BadInput: For a backbone whose features or classifier are not found.
    """
    example: Any = None
    if size is not None:
        sides = (size, size) if isinstance(size, int) else tuple(size)
        conv = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
        example = (3 if conv is None else conv.in_channels * conv.groups, *sides)
    mode = model.training
    try:
        structure = view(model.eval(), example, probe=False)
    except RuntimeError as error:
        raise BadInput(f"`head: {head}` looks at the model's parts: {first_line(error)}") from error
    finally:
        model.train(mode)
    return (
        Dense(model, structure, classes)
        if head == "dense"
        else Bags(model, structure, head, classes)
    )


class Dense(nn.Module):
    """A class for each pixel: the last features of each stage of a backbone, each brought to
    classes by a 1×1 convolution and to the images' size bilinearly, added up (Long et al., 2015).

    Args:
        backbone: A classifier; what stands behind its last stage leaves it.
        structure: `structure.view` of it.
        classes: How many.
    """

    def __init__(self, backbone: nn.Module, structure: View, classes: int) -> None:
        super().__init__()
        paths = [stage[-1] for stage in structure.stages] or [*structure.convs[-1:]]
        layouts = structure.layouts
        lost = not structure.stages and structure.attention  # behind the last convolution
        if not paths or lost or (structure.stages and any(p not in layouts for p in paths)):
            raise BadInput(
                f"`head: dense` found no stages in {type(backbone).__name__}: take a backbone of "
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
            maps = self._features(torch.cat([structure.example] * 2))
            _drop_unused(backbone, maps)
        backbone.train(mode)
        if any(len(m) != 2 * len(structure.example) for m in maps):
            raise BadInput(
                f"`head: dense` wants blocks of images, and those of {type(backbone).__name__} "
                "work on parts of them: take another backbone"
            )
        self.projections = nn.ModuleList(
            nn.Sequential(nn.GroupNorm(1, m.shape[1]), nn.Conv2d(m.shape[1], classes, 1)).to(m)
            for m in maps
        )

    def _keep(self, module: nn.Module, args: Any, output: Any) -> None:
        self._maps.append(output if is_tensor(output) else output[0])

    def _features(self, x: Tensor) -> list[Tensor]:
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

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (batch, classes, height, width) of images (batch, channels, height,
        width)."""
        parts = [
            F.interpolate(project(m), x.shape[2:], mode="bilinear", align_corners=False)
            for project, m in zip(self.projections, self._features(x), strict=True)
        ]
        return torch.stack(parts).sum(0)


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
