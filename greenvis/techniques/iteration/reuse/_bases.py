"""What a frozen base of any kind says of an image, on the grid of another model: features and rows
of attention."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from greenvis import models
from greenvis.core.modes import in_mode, removing
from greenvis.errors import BadInput
from greenvis.models.structure import View, view
from greenvis.techniques._shared.attach import first
from greenvis.techniques._shared.frozen import slow_path
from greenvis.techniques._shared.masked import grid_of
from greenvis.techniques._shared.tec import attention_rows, top_patches


class Base:
    """A frozen model that is asked for its patch features and its last block's attention.

    image: (channels, height, width) the images have; grid: (rows, columns) its answers are brought
    to. layers: how many of the last blocks' outputs are averaged, of those with the last one's
    shape. source: how the images are normalised, where that is known. side: of the images it is
    shown, in pixels; as they come where absent. It is handed images of
    another size, number of channels, mean or deviation than its own converted. Raises BadInput
    where it cannot run, or shows no attention although `attention` asks.
    """

    def __init__(
        self, model: nn.Module, image: tuple[int, int, int], grid: tuple[int, int], layers: int,
        attention: bool,
        source: models.Pixels | None = None, side: int | None = None,
    ) -> None:  # fmt: skip
        self.model, self.what, self.grid = model, type(model).__name__, grid
        self.attention = attention
        # not of this size, or not of these channels: its own
        shapes: list[tuple[int, int, int] | None] = [image, None]
        if side is not None:
            shapes = [(channels, side, side) for channels in dict.fromkeys((image[0], 3, 1))]
        structure = _viewed(model, shapes)
        self.input_shape, self._prefix = structure.input_shape, structure.prefix_tokens
        self.images = models.Renormalise(
            f"the base {self.what}", source, models.pixels_of(model), structure.input_shape[0]
        )
        if not structure.blocks:
            raise BadInput(f"the base {self.what} shows no blocks whose outputs could be a target")
        last = structure.layouts.get(structure.blocks[-1])
        if last is None or len(last.output) not in (3, 4):
            raise BadInput(
                f"the last block of the base {self.what} gives neither tokens nor a map, but "
                f"{last and last.output}"
            )
        alike = [
            b
            for b in structure.blocks
            if structure.layouts.get(b) is not None and structure.layouts[b].output == last.output
        ]
        self.blocks, self._axis = alike[-layers:], last.channels
        self.width = last.width
        if attention and not structure.attention:
            raise BadInput(
                f"the base {self.what} has no attention to learn from; set targets: [feature]"
            )
        self.heads = 0
        with in_mode(model, False):
            shown = self._look(structure.example)
        if shown.logits is not None:
            self.heads = shown.logits.shape[1]
        if not shown.features.isfinite().all():
            raise BadInput(f"the base {self.what} answers with values that are not finite")

    def ask(self, x: Tensor) -> Shown:
        """Return what the base shows of images x on their device, in eval mode and in its own
        precision."""
        weight = next(iter(self.model.parameters()), x)
        if weight.device != x.device:
            self.model.to(x.device)
        if self.model.training:
            self.model.eval()
        with torch.no_grad():
            return self(x.to(weight.dtype))

    def __call__(self, x: Tensor) -> Shown:
        """Return what the base shows of images x (batch, channels, height, width), without a
        gradient."""
        return self._look(fitted(self.images(x), self.input_shape[1:]))

    def _look(self, x: Tensor) -> Shown:
        outputs: list[Tensor] = []
        scores = _Scores()

        def enter(block: nn.Module, args: Any) -> None:
            scores.inside = self.attention

        def leave(block: nn.Module, args: Any, output: Any) -> None:
            outputs.append(first(output))
            scores.inside = False

        blocks = [self.model.get_submodule(p) for p in self.blocks]
        hooks = [b.register_forward_hook(leave) for b in blocks] + [
            blocks[-1].register_forward_pre_hook(enter)
        ]
        with removing(hooks), slow_path(), torch.no_grad():
            if self.attention:
                with scores:
                    self.model(x)
            else:
                self.model(x)
        features = torch.stack([self._on_grid(o) for o in outputs]).mean(0)
        return Shown(features, self._rows(scores.logits) if self.attention else None)

    def _on_grid(self, output: Tensor) -> Tensor:
        """Return a block's output as (batch, patches, channels) on the grid asked for."""
        if output.dim() == 3:
            output = output[:, self._prefix :]
            own = grid_of(output.shape[1], self.input_shape, self.what)
            return resampled(output, own, self.grid)
        if self._axis == 1:
            output = output.permute(0, 2, 3, 1)
        return resampled(output.flatten(1, 2), (output.shape[1], output.shape[2]), self.grid)

    def _rows(self, logits: Tensor | None) -> Tensor:
        """Return logits (batch, heads, 1 + patches, patches) on the grid asked for: queries [class,
        patches] by patches."""
        if logits is None:
            raise BadInput(
                f"the attention of the base {self.what} cannot be seen in its last block (neither "
                "scaled_dot_product_attention nor a softmax of all pairs); set targets: [feature]"
            )
        p, n = self._prefix, logits.shape[-1] - self._prefix
        own = grid_of(n, self.input_shape, self.what)
        patches = logits[:, :, p:, p:]
        # the row of the patches' mean query
        head = logits[:, :, :1, p:] if p else patches.mean(2, keepdim=True)
        rows = resampled(torch.cat([head, patches], 2).flatten(0, 2).unsqueeze(-1), own, self.grid)
        rows = rows.reshape(*logits.shape[:2], 1 + n, -1)
        if own == self.grid:
            return rows
        below = resampled(rows[:, :, 1:].flatten(0, 1), own, self.grid).reshape(
            *logits.shape[:2], -1, rows.shape[-1]
        )
        return torch.cat([rows[:, :, :1], below], 2)


def _viewed(model: nn.Module, shapes: list[tuple[int, int, int] | None]) -> View:
    """Return the parts of a model, looked at with images of the first shape that it takes."""
    for shape in shapes[:-1]:
        with suppress(BadInput):
            return view(model, shape, probe=False)
    return view(model, shapes[-1], probe=False)


@dataclass(frozen=True)
class Shown:
    """features: (batch, patches, channels). logits: (batch, heads, 1 + patches, patches), before
    the softmax, or None."""

    features: Tensor
    logits: Tensor | None

    def targets(self, normalise: Callable[[Tensor], Tensor], k: int) -> dict[str, Tensor]:
        """Return what is kept of it: "feature", normalised; "attention" (batch, 1 + k, heads,
        patches) and its rows "top"."""
        out = {"feature": normalise(self.features)}
        if self.logits is not None:
            top = top_patches(self.logits, k)
            out |= {"attention": attention_rows(self.logits, top), "top": top}
        return out


def fitted(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Return images x (batch, channels, height, width) at another size, where theirs is another."""
    if x.shape[2:] == size:
        return x
    return F.interpolate(x, size, mode="bilinear", align_corners=False, antialias=True)


def resampled(patches: Tensor, own: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    """Return patches (batch, own patches, channels) on another grid, bilinear: (batch, patches,
    channels)."""
    if own == grid:
        return patches
    maps = patches.transpose(1, 2).unflatten(-1, own)
    smaller = math.prod(grid) < math.prod(own)
    return (
        F.interpolate(maps.float(), grid, mode="bilinear", align_corners=False, antialias=smaller)
        .flatten(2)
        .transpose(1, 2)
    )


class _Scores(TorchFunctionMode):
    """Notes the logits of the attention that runs while `inside`, however it is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.inside = False
        self.logits: Tensor | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.inside:
            name = getattr(func, "__name__", "")
            if name == "scaled_dot_product_attention":
                self._fused(args, kwargs)
            elif name == "multi_head_attention_forward":
                self._multihead(args, kwargs)
            elif (
                name == "softmax"
                and args
                and args[0].dim() == 4
                and args[0].shape[-1] == args[0].shape[-2]
            ):
                self.logits = args[0]
        return func(*args, **kwargs)

    def _fused(self, args: Any, kwargs: Any) -> None:
        arguments = _named(
            ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale"), args, kwargs
        )
        q, k, bias = arguments["query"], arguments["key"], arguments.get("attn_mask")
        scale = arguments.get("scale")
        if q.dim() != 4 or q.shape != k.shape:
            return
        logits = q @ k.transpose(-2, -1) * (q.shape[-1] ** -0.5 if scale is None else scale)
        self.logits = logits if bias is None or bias.dtype == torch.bool else logits + bias

    def _multihead(self, args: Any, kwargs: Any) -> None:
        names = (
            "query",
            "key",
            "value",
            "embed_dim_to_check",
            "num_heads",
            "in_proj_weight",
            "in_proj_bias",
        )
        arguments = _named(names, args, kwargs)
        query, heads = arguments["query"], arguments["num_heads"]
        weight, bias = arguments["in_proj_weight"], arguments["in_proj_bias"]
        if query.dim() != 3 or weight is None:
            return
        rows = 2 * query.shape[-1]
        both = F.linear(query.transpose(0, 1), weight[:rows], None if bias is None else bias[:rows])
        q, k = both.unflatten(-1, (2, heads, -1)).permute(2, 0, 3, 1, 4)
        self.logits = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5


def _named(names: tuple[str, ...], args: Any, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    return {**dict(zip(names, args, strict=False)), **kwargs}
