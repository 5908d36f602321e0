"""Consistency distillation: a network that jumps from any time to the image."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from greenvis.core.technique import Installed, Technique
from greenvis.models.diffusion import Diffusion
from greenvis.models.drawing import GRID, Setting
from greenvis.techniques.inference.sampling._models import (
    INSTEAD,
    TASKS,
    at_time,
    check_signal,
    columns,
    ddim_step,
    frozen_copy,
    image_in,
    teacher_of,
    trained_model,
)

DEVIATION, SCALING = 0.5, 10.0  # those of diffusers' LCMScheduler


def boundary(t: Tensor) -> tuple[Tensor, Tensor]:
    """Return how much of the noisy image itself, and of the predicted one, is the answer at times
    t: all and nothing at time 0 (Song et al., 2023, section 3; Luo et al., 2023).

    Args:
        t: (batch,).

    Returns:
        Two numbers per image, to multiply images with.
    """
    scaled = columns(t.float()) * SCALING
    scale = scaled.square() + DEVIATION**2
    return DEVIATION**2 / scale, scaled / scale.sqrt()


class ConsistencyModel(Technique):
    """Distil a diffusion model into one that jumps from noise to an image, in one step or a few
    (consistency distillation: Song et al., 2023, algorithm 2; with the times and the boundary of
    latent consistency models: Luo et al., 2023).

    Saves calls of the network when images are drawn: 1 to 4 steps of "lcm" where "dpm++" needs 10.
    Costs, in each step of training, a call of the teacher's network, in the phase "teacher" (two
    with guidance), and a call of the mean of the student's weights, which it is compared with; and
    quality: more steps help little. It pays back after N* images drawn. The student best begins
    with the teacher's weights (`init`), which predict the same.

    Example:
        >>> gv.ConsistencyModel(teacher="run:base").steps
        4
    """

    name = "consistency_model"
    stage = "objective"
    tasks = TASKS
    instead = INSTEAD
    examples = ({"teacher": copy.deepcopy},)
    neutral = None

    teacher: Any = Field(description='a model trained on noise: itself, "run:NAME", "file:PATH"')
    guidance: float = Field(default=1.0, ge=0, description="of the teacher")
    momentum: float = Field(
        default=0.95, ge=0, lt=1, description="of the mean of weights it is compared with"
    )
    steps: int = Field(default=4, ge=1, le=GRID, description="the model draws with afterwards")

    def install(self, model: nn.Module) -> Installed:
        """Make the model a student. Raises BadInput for a model or teacher that does not fit."""
        own = trained_model(self.name, model)
        teacher = teacher_of(self.name, self.teacher, own, flow=False)
        for one in (own, teacher):
            check_signal(self.name, one)
        teacher.check(Setting("ddim", min(GRID, own.times), self.guidance))
        own.become(own.prediction, True, Setting("lcm", self.steps))
        live = InstalledConsistencyModel(self, own, teacher)
        own.objective = live.loss
        return live


class InstalledConsistencyModel(Installed):
    """A student, the mean of its weights, and its teacher."""

    def __init__(self, request: ConsistencyModel, model: Diffusion, teacher: Diffusion) -> None:
        super().__init__()
        self.request, self.model, self.teacher = request, model, teacher
        self.mean = copy.deepcopy(model).eval().requires_grad_(False)

    def loss(self, x: Tensor, y: Tensor | None) -> Tensor:
        """Return the squared distance of the student's image from that of its mean one step of the
        teacher's earlier, for images x (batch, …) of classes y."""
        own, teacher, mean = self.model, self.teacher.to(x.device), self.mean.to(x.device)
        clean = own.scaled(x)
        apart = own.times // min(GRID, own.times)
        t = torch.randint(1, own.times // apart + 1, (len(x),), device=x.device) * apart - 1
        before = (t - apart).clamp(min=0)
        alphas, noise = own.alphas(), torch.randn_like(clean)
        now, then = at_time(alphas, t), at_time(alphas, before)
        noisy, labels = now[0] * clean + now[1] * noise, own.hidden(y)
        with self.phase("teacher"), torch.no_grad():
            out = teacher.predict(noisy, t, labels, self.request.guidance)
            image = image_in(teacher.prediction, out, noisy, *now)
            earlier = ddim_step(noisy, image, now, then)
        with torch.no_grad():
            target = jump(mean, earlier, before, labels, then)
        return F.mse_loss(jump(own, noisy, t, labels, now), target)

    def step_end(self) -> None:
        """Take the step's weights into the mean."""
        ahead = self.model.network.state_dict()
        with torch.no_grad():
            for name, own in self.mean.network.state_dict().items():
                new = ahead[name].to(own)
                own.lerp_(new, 1 - self.request.momentum) if own.is_floating_point() else (
                    own.copy_(new)
                )

    def state_dict(self) -> dict[str, Tensor]:
        """Return the mean of the weights."""
        return frozen_copy(self.mean.network)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Load what `state_dict` returned."""
        self.mean.network.load_state_dict(dict(state))


def jump(
    model: Diffusion, x: Tensor, t: Tensor, y: Tensor | None, now: tuple[Tensor, Tensor]
) -> Tensor:
    """Return the image that a model jumps to.

    Args:
        model: The student, or its mean.
        x: Noisy images (batch, channels, height, width).
        t: Their times (batch,).
        y: Classes (batch,).
        now: √ᾱ and √(1 − ᾱ) at these times, to multiply with.
    """
    stays, comes = boundary(t)
    return stays * x + comes * image_in(model.prediction, model.predict(x, t, y), x, *now)
