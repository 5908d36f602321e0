"""What models that take more than images are called with while their parts are looked at."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from greenvis.models.structure.probing import is_probing

TEXT_SIZE = 16  # of the states that stand for a text


class Completed:
    """Calls a model with more than the image while its parts are looked at, and only then."""

    def __init__(self, complete: Callable[[nn.Module, Tensor], dict[str, Any]]) -> None:
        self.complete = complete

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        if is_probing(module) and len(args) == 1 and not kwargs:
            return (), self.complete(module, args[0])
        return None


def image_and_time(model: nn.Module, x: Tensor) -> dict[str, Any]:
    """Return what a denoising network takes beside images: time 0, class 0, an empty text."""
    takes = inspect.signature(model.forward).parameters
    config: Any = model.config
    first = next(iter(takes))
    out = {first: x, "timestep": torch.zeros(len(x), dtype=torch.int64, device=x.device)}
    classes = [config.get("num_class_embeds"), config.get("num_embeds_ada_norm")]
    if "class_labels" in takes and any(classes):
        out["class_labels"] = torch.zeros(len(x), dtype=torch.int64, device=x.device)
    width = next(
        (config[k] for k in ("cross_attention_dim", "joint_attention_dim") if config.get(k)), None
    )
    if "encoder_hidden_states" in takes and isinstance(width, int):
        out["encoder_hidden_states"] = x.new_zeros(len(x), TEXT_SIZE, width)
    return out


def image_and_text(model: nn.Module, x: Tensor) -> dict[str, Any]:
    """Return what a model of transformers takes beside images: a text that holds one image."""
    takes, config = inspect.signature(model.forward).parameters, cast(Any, model.config)
    out: dict[str, Any] = {"pixel_values": x}
    if "input_ids" in takes:
        names = ("image_token_id", "image_token_index")
        number = next((getattr(config, n) for n in names if hasattr(config, n)), 1)
        ids = [1]
        vision = getattr(config, "vision_config", None)
        if vision is not None and number != 1:
            ids = [number] * ((vision.image_size // vision.patch_size) ** 2) + ids
        out["input_ids"] = torch.tensor([ids] * len(x), device=x.device)
    if "decoder_input_ids" in takes:
        out["decoder_input_ids"] = torch.ones(len(x), 1, dtype=torch.int64, device=x.device)
    return out
