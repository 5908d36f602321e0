"""Probing with adapters: the classifier of a frozen encoder, and what makes one representation of
all its blocks."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from greenvis import models
from greenvis.core.technique import InputShape, Installed, Technique
from greenvis.errors import BadInput
from greenvis.models.structure import view
from greenvis.tasks.answers import ALL_BUT_VQA
from greenvis.techniques._shared import tec as tec
from greenvis.techniques._shared.attach import (
    check_runs,
    first,
    like,
    row_of_blocks,
    train_only,
    with_first,
)
from greenvis.techniques._shared.masked import adapt_token, class_token, fold_token, last_norm

_CHILD = "adapter_probe"
_GROUP = 3


class AdapterProbe(Technique):
    """Train the classifier of a frozen vision transformer together with encoder adapters, an input
    adapter, or both (the light tuning of TEC: Gao et al., 2022).

    Saves the backward through the encoder (not with the input adapter, which stands before it) and
    optimizer memory, as a linear probe does. Costs the adapters' compute, in training and for good.
    Encoder adapters make one representation of the outputs of all blocks, in place of the last
    one's: a linear layer and a residual MLP for each group of blocks, summed. Where pretraining
    left its adapters beside the model, they go on from there. The input adapter, a residual MLP on
    the class token, begins at zero and folds into the token; encoder adapters do not merge. Dropout
    and stochastic depth of the frozen part stay as `model.train()` sets them.

    Example:
        >>> live = gv.wrap(model, gv.AdapterProbe())
        >>> print(live.summary())
        VisionTransformer with adapter_probe
          adapter_probe: defaults
          trains 8,709 of 40,933 parameters (21.28%); delta 0.03 MB
    """

    name = "adapter_probe"
    stage = "weights"
    tasks = ALL_BUT_VQA
    instead = "lora tunes such a model"
    needs = frozenset({"token_grid"})
    examples = ({"encoder_adapters": 2}, {"encoder_adapters": 0, "input_adapter": True})
    neutral = {"encoder_adapters": 0, "input_adapter": True}

    encoder_adapters: int | None = Field(
        default=None,
        ge=0,
        description="blocks to a new encoder adapter, 0: none; absent: those kept, else 3",
    )
    input_adapter: bool = Field(
        default=False, description="also send the class token through an MLP"
    )
    input_shape: InputShape = None

    def install(self, model: nn.Module) -> Installed:
        """Freeze the model and put the adapters in. Raises BadInput where no one sequence runs
        through all blocks."""
        if self.encoder_adapters == 0 and not self.input_adapter:
            raise BadInput(
                "adapter_probe without an adapter is a linear probe: set input_adapter, or "
                "encoder_adapters: 3"
            )
        structure = view(model, self.input_shape, probe=False)
        if not structure.attention:
            raise BadInput(
                f"adapters of a vision transformer read its blocks, and {type(model).__name__} has "
                "no attention"
            )
        blocks = row_of_blocks(model, structure)
        kind = like(model.get_submodule(blocks[0]))
        token = class_token(model, structure, blocks[0]) if self.input_adapter else None
        if self.input_adapter and token is None:
            raise BadInput(
                f"{type(model).__name__} shows no class token for an input adapter; leave "
                "`input_adapter` out"
            )
        added: list[nn.Parameter] = []
        if self.encoder_adapters != 0:
            norm = last_norm(model, structure, blocks[-1])
            adapters = self._adapters(model, structure.layouts[blocks[0]].width, len(blocks)).to(
                **kind
            )
            model.get_submodule(blocks[-1]).add_module(_CHILD, adapters)
            _Readout(adapters).put([model.get_submodule(b) for b in blocks], norm)
            added += adapters.parameters()
        fold = None
        if token is not None:
            adapter = ResidualTokenMlp(structure.layouts[blocks[0]].width).to(**kind)
            adapt_token(token, adapter)
            fold = partial(fold_token, token, adapter)
            added += adapter.parameters()
        check_runs(model, structure.example, added, "adapters of a probe")
        live = InstalledAdapterProbe(train_only(model, added, structure, "train"), fold)
        if self.encoder_adapters != 0:
            live.unmergeable = (
                "encoder adapters are networks of their own behind the blocks; keep the model "
                "wrapped"
            )
        return live

    def _adapters(self, model: nn.Module, dim: int, depth: int) -> tec.EncoderAdapters:
        """Return new adapters, or those that pretraining left beside the model. Raises BadInput
        where they do not fit."""
        attached = models.attached(model, tec.ENCODER_ADAPTERS)
        if self.encoder_adapters is not None or attached is None:
            width, _ = tec.decoder_size(dim)
            return tec.EncoderAdapters(dim, depth, self.encoder_adapters or _GROUP, 4 * width)
        group = attached["fuse.0.weight"].shape[1] // dim
        hidden = attached["mlps.0.fc1.weight"].shape[0]
        adapters = tec.EncoderAdapters(dim, depth, max(1, group), hidden)
        try:
            adapters.load_state_dict(attached)
        except RuntimeError as error:
            raise BadInput(
                f"the encoder adapters kept beside this {type(model).__name__} are not of {depth} "
                f"blocks of width {dim}; encoder_adapters: {_GROUP} begins with new ones"
            ) from error
        return adapters


class InstalledAdapterProbe(Installed):
    """Adapters at work."""

    def __init__(self, names: tuple[str, ...], fold: Any) -> None:
        super().__init__(names, freezes=True)
        self._fold = fold

    def merge(self) -> None:
        """Fold the input adapter into the class token."""
        if self._fold is not None:
            self._fold()


class ResidualTokenMlp(tec.TokenMlp):
    """A token with what an MLP adds to it: nothing at first."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim, 4 * dim)
        nn.init.zeros_(self.fc2.weight)
        nn.init.zeros_(self.fc2.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return (…, dim)."""
        return x + super().forward(x)


class _Readout:
    """Puts the adapters' answer in the place of the last output: the final norm's where there is
    one, else the last block's."""

    def __init__(self, adapters: nn.Module) -> None:
        self.adapters = adapters
        self.outputs: list[Tensor] = []

    def put(self, blocks: list[nn.Module], norm: nn.Module | None) -> None:
        """Look at every block; answer at the last."""
        blocks[0].register_forward_pre_hook(self._begin, with_kwargs=True)
        for block in blocks if norm is not None else blocks[:-1]:
            block.register_forward_hook(self._note)
        (blocks[-1] if norm is None else norm).register_forward_hook(
            partial(self._answer, len(blocks))
        )

    def _begin(self, block: nn.Module, args: Any, kwargs: Any) -> None:
        self.outputs.clear()

    def _note(self, block: nn.Module, args: Any, output: Any) -> None:
        self.outputs.append(first(output))

    def _answer(self, depth: int, module: nn.Module, args: Any, output: Any) -> Any:
        outputs = [*self.outputs[: depth - 1], first(output)]
        self.outputs.clear()
        return with_first(output, self.adapters(torch.cat(outputs, -1)))
