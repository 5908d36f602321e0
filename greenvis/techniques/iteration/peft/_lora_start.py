"""Starts of LoRA's factors that look at data, through PEFT: EVA from what the layers are fed,
LoRA-GA from their gradients."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from peft import EvaConfig, LoraConfig
from peft.tuners.lora.eva import get_eva_state_dict
from peft.tuners.lora.loraga import preprocess_loraga
from torch import Tensor, nn

from greenvis.core import distributed
from greenvis.core.modes import in_mode
from greenvis.core.technique import logits_of
from greenvis.errors import BadInput, some
from greenvis.models.structure.probing import probing
from greenvis.techniques._shared.lora_layers import NAME

EVA_IMAGES = 32  # PEFT hashes every number that a layer is fed, in Python
_ROUNDS = 100  # of the same images; PEFT looks until two rounds agree


def eva(model: nn.Module, layers: Mapping[str, Any], images: Tensor) -> None:
    """Set each layer's A to the directions in which what it is fed varies most, as PEFT's EVA does
    (Paischer et al., 2024).

    They are principal components, so about the mean of what is fed, from an incremental PCA of the
    same images again and again. Every layer keeps its rank: EVA's shifting of ranks between layers
    is left out (PEFT's rho = 1). layers: PEFT's, by path, around Linears. images: (batch, channels,
    height, width). Raises BadInput where they give a layer fewer rows than it has ranks.
    """
    # PEFT takes a model with PEFT's layers for a PeftModel, by an attribute
    root = nn.Sequential(model)
    names = {f"0.{path}.base_layer": layer for path, layer in layers.items()}
    rank = next(iter(layers.values())).r[NAME]
    # each layer keeps its rank: parameters that an optimizer holds cannot change their shape
    even = EvaConfig(rho=1.0)
    config = LoraConfig(
        r=rank,
        init_lora_weights="eva",
        eva_config=even,
        target_modules="|".join(re.escape(n) for n in names),
    )

    def rows(inputs: tuple[Tensor, ...], model_input: Any, name: str) -> Tensor:
        tokens = inputs[0].reshape(-1, inputs[0].shape[-1]).contiguous()
        if min(tokens.shape) < rank:
            raise BadInput(
                f"eva takes {rank} directions from what '{name[2:].removesuffix('.base_layer')}' "
                "is fed, which is "
                f"{len(tokens)} rows of {tokens.shape[1]}: give larger batches, or a lower rank"
            )
        return tokens

    with probing(model):
        state_dict = get_eva_state_dict(
            root,
            cast(Any, _Same(images[:EVA_IMAGES])),
            config,
            forward_fn=lambda m, x: m(x),
            prepare_model_inputs_fn=None,
            prepare_layer_inputs_fn=rows,
            show_progress_bar=False,
        )
    with torch.no_grad():
        for name, layer in names.items():
            layer.lora_A[NAME].weight.copy_(state_dict[name])
    distributed.sync(layer.lora_A[NAME].weight for layer in layers.values())


class _Same:
    """A loader of one batch, again and again, but not for ever."""

    def __init__(self, images: Tensor) -> None:
        self.images = images

    def __len__(self) -> int:
        return _ROUNDS

    def __iter__(self) -> Iterator[Tensor]:
        for _ in range(_ROUNDS):
            yield self.images
        raise BadInput(
            f"eva found no stable directions in {_ROUNDS} looks at the same images: give a lower "
            "rank"
        )


def gradients(
    model: nn.Module, paths: Sequence[str], config: LoraConfig, calibration: tuple[Tensor, Tensor]
) -> None:
    """Note the loss's gradient at each target, from which PEFT starts the factors and shifts the
    base (Wang et al., 2024).

    calibration: images (batch, channels, height, width) and labels (batch,). The model runs in
    eval. Raises BadInput where a layer is too small for so many ranks.
    """
    for path in paths:
        smallest = min(model.get_submodule(path).weight.shape)  # type: ignore[union-attr]
        if 2 * config.r > smallest:
            raise BadInput(
                f"lora_ga takes {2 * config.r} directions of '{path}', whose smaller side is "
                f"{smallest}: lower rank"
            )
    first = next(model.parameters())
    x, y = (t.to(first.device) for t in calibration)

    def step() -> None:
        F.cross_entropy(logits_of(model(x.to(first.dtype))).float(), y).backward()

    with in_mode(model, False):
        preprocess_loraga(model, config, step)
    noted = {path: getattr(model.get_submodule(path), "_peft_loraga_grad", None) for path in paths}
    bad = [path for path, g in noted.items() if g is None or not g.isfinite().all()]
    if bad:
        raise BadInput(
            f"lora_ga starts from gradients, and {some(bad)} got none that is finite: give the "
            "model in float32 (half precision has no scaler here), and finite images"
        )


def checked(calibration: Any) -> tuple[Tensor, Tensor]:
    """Return images and labels. Raises BadInput for anything else."""
    pair = calibration if isinstance(calibration, (tuple, list)) else ()
    if (
        len(pair) == 2
        and all(isinstance(t, Tensor) for t in pair)
        and pair[0].dim() == 4
        and pair[1].shape == pair[0].shape[:1]
        and not pair[1].is_floating_point()
    ):
        return pair[0], pair[1]
    raise BadInput(
        "init lora_ga starts from the gradient of labelled images: give calibration=(images, "
        "labels), tensors of shape (batch, channels, height, width) and class numbers (batch,); a "
        "recipe has none to give, so use eva, which looks at the first batch"
    )
