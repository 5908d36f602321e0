"""A vision transformer that sees some of its patches only, its own forward untouched: masked
pretraining's encoder."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.weak import WeakIdKeyDictionary

from greenvis.core.modes import removing
from greenvis.errors import BadInput
from greenvis.models.structure import View
from greenvis.models.structure.probing import probing
from greenvis.techniques._shared.attach import first, like, row_of_blocks
from greenvis.techniques._shared.blocks import main, with_main
from greenvis.techniques._shared.tec import sincos_2d, visible


class Encoder:
    """The model's blocks on visible patches. Its hooks act only while `__call__` runs; elsewhere
    the model is itself.

    blocks: paths. dim, prefix, grid: width, tokens before the patches, (height, width) in patches.
    Raises BadInput where patches cannot be left out.
    """

    def __init__(self, model: nn.Module, structure: View) -> None:
        what = type(model).__name__
        if not structure.attention:
            raise BadInput(
                f"masked pretraining leaves patches out of a vision transformer, and {what} has no "
                "attention"
            )
        for flag, why in (
            ("windowed", "attends in windows of its grid"),
            ("rope", "rotates queries and keys by place (RoPE)"),
        ):
            if flag in structure.flags:
                raise BadInput(
                    f"{what} {why}, so that its blocks need every patch: none can be left out"
                )
        self.model = model
        self.blocks = row_of_blocks(model, structure)
        length, self.dim = structure.layouts[self.blocks[0]].output[1:]
        self.prefix = structure.prefix_tokens
        self.grid = grid_of(length - self.prefix, structure.input_shape, what)
        self._ids_keep: Tensor | None = None
        # what the first block was given: visible patches; for it may run again
        self._entered = WeakIdKeyDictionary()
        self._outputs: list[Tensor] = []
        self._normed: Tensor | None = None
        model.get_submodule(self.blocks[0]).register_forward_pre_hook(self._enter, with_kwargs=True)
        for path in self.blocks:
            model.get_submodule(path).register_forward_hook(self._note)
        norm = last_norm(model, structure, self.blocks[-1])
        if norm is not None:
            norm.register_forward_hook(self._note_norm)
        self._check(structure)

    def __getstate__(self) -> dict[str, Any]:  # a copy starts between two forwards
        return {**vars(self), "_entered": None, "_outputs": [], "_normed": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _entered=WeakIdKeyDictionary())

    @property
    def patches(self) -> int:
        """Patches of an image."""
        return math.prod(self.grid)

    @property
    def kind(self) -> dict[str, Any]:
        """Device and precision of the blocks, for new parts."""
        return like(self.model.get_submodule(self.blocks[0]))

    def __call__(self, x: Tensor, ids_keep: Tensor) -> list[Tensor]:
        """Return every block's output on the visible patches.

        Args:
            x: images (batch, channels, height, width).
            ids_keep: positions of the visible patches, int64 (batch, visible).

        Returns:
            Per block (batch, prefix + visible, dim); the last is normed, where the model norms it.
        """
        with self._masking(ids_keep):
            self.model(x)
            outputs = list(self._outputs)
            return outputs if self._normed is None else [*outputs[:-1], self._normed]

    @contextmanager
    def _masking(self, ids_keep: Tensor) -> Iterator[None]:
        self._ids_keep, self._normed = ids_keep, None
        self._outputs.clear()
        try:
            yield
        finally:
            self._ids_keep, self._normed = None, None
            self._outputs.clear()

    def _enter(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        x = main(args, kwargs)
        # gradient checkpointing runs it in the backward
        ids_keep = self._entered.get(x) if self._ids_keep is None else self._ids_keep
        if ids_keep is None:
            return None
        self._entered[x] = ids_keep
        x = torch.cat([x[:, : self.prefix], visible(x[:, self.prefix :], ids_keep)], 1)
        return with_main(args, kwargs, x)

    def _note(self, block: nn.Module, args: Any, output: Any) -> None:
        if self._ids_keep is not None:
            self._outputs.append(first(output))

    def _note_norm(self, norm: nn.Module, args: Any, output: Tensor) -> None:
        if self._ids_keep is not None:
            self._normed = output

    def _check(self, structure: View) -> None:
        """Raise BadInput where blocks fail on fewer patches, or give patches in another order
        something else."""
        if structure.example.device.type == "meta":
            return
        what = type(self.model).__name__
        ids = torch.arange(self.patches, device=structure.example.device)[None]
        try:
            with probing(self.model):
                few = self(structure.example, ids[:, :: max(2, self.patches // 3)])
                ordered, turned = (self(structure.example, p)[-1] for p in (ids, ids.roll(1, 1)))
        except BadInput:
            raise
        except Exception as error:  # whatever a library raises here means: not with fewer patches
            reason = str(error).strip().partition("\n")[0][:200]
            raise BadInput(
                f"the blocks of {what} do not run on some of the patches only: "
                f"{type(error).__name__}: {reason}"
            ) from error
        error = (
            (ordered[:, self.prefix :].roll(1, 1) - turned[:, self.prefix :]).float().abs().max()
        )
        if (
            len(few) != len(self.blocks)
            or not error <= (1e-3 if ordered.dtype.itemsize >= 4 else 5e-2) * ordered.abs().max()
        ):
            raise BadInput(
                f"the blocks of {what} use the places of their tokens, so that no patch can be "
                "left out"
            )


def grid_of(patches: int, image: tuple[int, int, int], what: str) -> tuple[int, int]:
    """Return the (height, width) of the grid that patches make of an image.

    Args:
        patches: how many.
        image: (channels, height, width) in pixels.
        what: the model, for messages.

    Raises:
        BadInput: where they make no grid of the image's aspect ratio.
    """
    height = round(math.sqrt(patches * image[1] / image[2]))
    if (
        height < 1
        or patches % height
        or abs(patches // height * image[1] - height * image[2]) > max(image[1:])
    ):
        raise BadInput(
            f"{patches} tokens of {what} make no grid over an image of {image[1]} × {image[2]} "
            "pixels"
        )
    return height, patches // height


def begin_anew(model: nn.Module, encoder: Encoder, structure: View, *parts: nn.Module) -> None:
    """Give a model the weights that masked pretraining begins with (He et al., 2022): Xavier's
    uniform ones in its layers, and position embeddings of sines and cosines that do not learn.

    The class token is drawn anew, norms become neutral; the classifier stays.

    Args:
        model: The model.
        encoder: Of it.
        structure: Of it.
        parts: Modules beside the model's that begin likewise, a decoder.

    Raises:
        BadInput: Where the model shows no position embeddings of its patches.
    """
    lengths = {encoder.patches: 0, encoder.prefix + encoder.patches: encoder.prefix}
    own = [
        (module, p)
        for path, module in model.named_modules()
        for p in module._parameters.values()
        if p is not None and not any(f"{path}.".startswith(f"{h}.") for h in structure.heads)
    ]
    positions = [
        p
        for _, p in own
        if p.dim() >= 2
        and p.shape[-1] == encoder.dim
        and p.numel() // encoder.dim == p.shape[-2] in lengths
    ]
    if len(positions) != 1:
        raise BadInput(
            f"{type(model).__name__} shows {len(positions)} position embeddings of its "
            f"{encoder.patches} patches, and `init: mae` gives them fixed values: leave `init` out"
        )
    prefix = lengths[positions[0].shape[-2]]
    token = class_token(model, structure, encoder.blocks[0])
    with torch.no_grad():
        for module, p in [*own, *((m, p) for part in parts for m, p in _own(part))]:
            norm = isinstance(module, nn.LayerNorm)
            if p.dim() >= 2 and isinstance(module, (nn.Linear, nn.Conv2d, nn.MultiheadAttention)):
                nn.init.xavier_uniform_(p.flatten(1))
            elif norm and p is module.weight:
                p.fill_(1)
            elif norm or isinstance(module, (nn.Linear, nn.Conv2d, nn.MultiheadAttention)):
                p.zero_()
        positions[0].copy_(sincos_2d(encoder.dim, *encoder.grid, prefix).view_as(positions[0]))
        if token is not None:
            token[0].get_parameter(token[1]).normal_(std=0.02)
    positions[0].requires_grad_(False)


def _own(part: nn.Module) -> Iterator[tuple[nn.Module, nn.Parameter]]:
    for module in part.modules():
        yield from ((module, p) for p in module._parameters.values() if p is not None)


def class_token(model: nn.Module, structure: View, block: str) -> tuple[nn.Module, str] | None:
    """Return (module, name) of the parameter that the first token starts from and no other; None
    where there is none."""
    if not structure.prefix_tokens or structure.example.device.type == "meta":
        return None
    dim = structure.layouts[block].width
    layers = (nn.Linear, nn.Conv2d, nn.LayerNorm)
    named = [
        (module, name, p)
        for module in model.modules()
        if not isinstance(module, layers)
        for name, p in module._parameters.items()
        if p is not None and p.numel() == dim and p.is_floating_point() and p.shape[-1] == dim
    ]
    inputs: list[Tensor] = []

    def note(module: nn.Module, args: Any, kwargs: Any) -> None:
        inputs.append(main(args, kwargs))

    flags = [p.requires_grad for _, _, p in named]
    hook = model.get_submodule(block).register_forward_pre_hook(
        note, with_kwargs=True, prepend=True
    )
    try:
        with probing(model), torch.enable_grad():
            for _, _, p in named:
                p.requires_grad_(True)
            model(structure.example)
            parameters = [p for _, _, p in named]
            # a norm's output sums to nothing
            probe = torch.linspace(-1, 1, dim, dtype=inputs[0].dtype, device=inputs[0].device)
            own, others = ((part * probe).sum() for part in (inputs[0][:, 0], inputs[0][:, 1:]))
            grads = [
                torch.autograd.grad(s, parameters, retain_graph=True, allow_unused=True)
                for s in (own, others)
            ]
    finally:
        hook.remove()
        for flag, (_, _, p) in zip(flags, named, strict=True):
            p.requires_grad_(flag)
    for (module, name, _), one, rest in zip(named, *grads, strict=True):
        if one is not None and one.abs().max() > 0 and (rest is None or not rest.abs().max() > 0):
            return module, name
    return None


def adapt_token(target: tuple[nn.Module, str], adapter: nn.Module) -> None:
    """Send a parameter through `adapter` wherever the model reads it."""
    parametrize.register_parametrization(*target, _Adapted(adapter), unsafe=True)


def fold_token(target: tuple[nn.Module, str], adapter: nn.Module) -> None:
    """Give the parameter the value that `adapter` makes of it: exact, for it depends on no
    image."""
    token = target[0].get_parameter(target[1])
    with torch.no_grad():
        token.copy_(adapter(token))


class _Adapted(nn.Module):
    def __init__(self, adapter: nn.Module) -> None:
        super().__init__()
        self.adapter = adapter

    def forward(self, token: Tensor) -> Tensor:
        return self.adapter(token)


def last_norm(model: nn.Module, structure: View, block: str) -> nn.Module | None:
    """Return the norm that is handed the very output of the last block, if one is."""
    outputs: list[Tensor] = []
    hit: list[nn.Module] = []

    def note(module: nn.Module, args: Any, output: Any) -> None:
        outputs.append(first(output))

    def ask(module: nn.Module, args: Any) -> None:
        if outputs and args and args[0] is outputs[-1]:
            hit.append(module)

    norms = [model.get_submodule(p) for p in structure.norms if p and not p.startswith(block + ".")]
    hooks = [model.get_submodule(block).register_forward_hook(note)]
    hooks += [n.register_forward_pre_hook(ask) for n in norms]
    with removing(hooks), probing(model):
        model(structure.example)
    return hit[0] if hit else None
