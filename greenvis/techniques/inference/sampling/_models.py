"""What techniques of sampling ask of a model, and the steps that they share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from greenvis.errors import BadInput
from greenvis.models.diffusion import Diffusion
from greenvis.models.drawing import Drawing, counting
from greenvis.techniques._shared.frozen import other_model

TASKS = frozenset({"generation"})
INSTEAD = "it is for models that draw images (task: generation)"
LEAST_SIGNAL = 0.01  # share of the image in pure noise below which no noise tells the image


def drawing_model(name: str, model: nn.Module) -> Drawing:
    """Return a model as one that draws.

    Args:
        name: The technique's, for the message.
        model: The model.

    Raises:
        BadInput: For any other.
    """
    if isinstance(model, Drawing):
        return model
    raise BadInput(
        f"'{name}' is for models that draw images step by step, not {type(model).__name__}: build "
        "one with `head: images` (diffusers/UNet2DModel), or put a pipeline of diffusers into "
        "greenvis.models.pipeline.Pipeline"
    )


def trained_model(name: str, model: nn.Module) -> Diffusion:
    """Return a model as one whose network trains. Raises BadInput for any other."""
    if isinstance(drawing_model(name, model), Diffusion):
        return model  # type: ignore[return-value]
    raise BadInput(
        f"'{name}' trains the network, and a pipeline draws alone: give "
        "greenvis.models.diffusion.Diffusion(pipe.unet)"
    )


def teacher_of(name: str, teacher: Any, model: Diffusion, flow: bool) -> Diffusion:
    """Return a frozen teacher of the same images, times and classes, in eval mode.

    Args:
        name: Of the technique.
        teacher: A model, or a reference that `models.build` takes.
        model: What learns from it.
        flow: Whether it must be a flow, or must not.

    Raises:
        BadInput: For a teacher that does not fit.
    """
    module = other_model("the teacher", teacher, model)
    what = f"the teacher of '{name}' ({type(module).__name__})"
    if not isinstance(module, Diffusion):
        raise BadInput(f"{what} does not draw images: give a model of `head: images`")
    if module.consistent or flow != (module.prediction == "flow_prediction"):
        wanted = "a flow: train it with `flow`" if flow else "trained on noise, not a flow"
        raise BadInput(f"{what} must be {wanted}")
    for field in ("shape", "classes", "times"):
        own, other = getattr(model, field), getattr(module, field)
        if own != other:
            raise BadInput(f"{what} has {field} {other}, and the model {own}: they must agree")
    if module.range.isfinite().all():
        model.range.copy_(module.range)
    return module.eval().requires_grad_(False)


def check_signal(name: str, model: Diffusion) -> None:
    """Refuse a network whose noise does not tell the image where there is nothing but noise."""
    least = float(model.alphas()[0, -1])
    if model.prediction == "epsilon" and least < LEAST_SIGNAL:
        raise BadInput(
            f"'{name}' reads the image off what is predicted, and at the last time the noise says "
            f"nothing of it (√ᾱ = {least:.1e}): train with prediction: v_prediction"
        )


def image_in(prediction: str, out: Tensor, x: Tensor, signal: Tensor, sigma: Tensor) -> Tensor:
    """Return the image that a prediction implies.

    Args:
        prediction: "epsilon", "v_prediction" or "sample".
        out: What was predicted (batch, …).
        x: The noisy image.
        signal: √ᾱ, to multiply with.
        sigma: √(1 − ᾱ).
    """
    if prediction == "sample":
        return out
    return signal * x - sigma * out if prediction == "v_prediction" else (x - sigma * out) / signal


def ddim_step(
    x: Tensor, image: Tensor, now: tuple[Tensor, Tensor], then: tuple[Tensor, Tensor]
) -> Tensor:
    """Return a noisy image one step of DDIM earlier (Song et al., 2021, eq. 12, η = 0).

    Args:
        x: (batch, …).
        image: Its predicted image.
        now: √ᾱ and √(1 − ᾱ) of x, to multiply with.
        then: Those of the time before.
    """
    noise = (x - now[0] * image) / now[1]
    return then[0] * image + then[1] * noise


@contextmanager
def calls_counted(model: Drawing) -> Iterator[dict[str, Any]]:
    """Yield facts, which say at the end how often the network was called per image drawn."""
    facts: dict[str, Any] = {}
    before = model.drawn
    with counting(model.network) as rows:
        yield facts
    facts["network_calls"] = rows[0] / max(model.drawn - before, 1)


def columns(values: Tensor) -> Tensor:
    """Return a number per image so that it multiplies images."""
    return values.view(-1, 1, 1, 1)


def frozen_copy(module: nn.Module) -> dict[str, Tensor]:
    """Return a module's values, copied."""
    return {k: v.detach().clone() for k, v in module.state_dict().items()}


def at_time(alphas: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """Return √ᾱ and √(1 − ᾱ) at times (batch,), to multiply images with; of −1: 1 and 0."""
    ends = alphas.new_tensor([[1.0], [0.0]])
    signal, sigma = torch.cat([alphas, ends], 1)[:, t]
    return columns(signal), columns(sigma)
