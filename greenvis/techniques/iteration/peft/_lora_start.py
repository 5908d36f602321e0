"""The start of LoRA's factors that looks at data, through PEFT: LoRA-GA from gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from peft import LoraConfig
from peft.tuners.lora.loraga import preprocess_loraga
from torch import Tensor, nn

from greenvis.core.modes import in_mode
from greenvis.core.technique import logits_of
from greenvis.errors import BadInput, some


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
        "recipe has none to give"
    )
