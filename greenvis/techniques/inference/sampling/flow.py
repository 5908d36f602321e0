"""Flow: straight ways from noise to images, drawn with few steps of Euler's."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from greenvis.core.technique import Installed, Technique
from greenvis.models.diffusion import Diffusion, along
from greenvis.models.drawing import Setting
from greenvis.techniques.inference.sampling._models import INSTEAD, TASKS, teacher_of, trained_model

ROWS = 250  # pairs drawn at once


def flow_loss(predicted: Tensor, image: Tensor, noise: Tensor) -> Tensor:
    """Return the squared error of a velocity (Liu et al., 2023, eq. 1; Lipman et al., 2023).

    Args:
        predicted: (batch, channels, height, width).
        image: Where the way ends.
        noise: Where it begins.
    """
    return F.mse_loss(predicted, noise - image)


def _flowing(model: Any) -> Any:
    other = copy.deepcopy(model)
    if isinstance(other, Diffusion):
        other.become("flow_prediction", False, Setting("euler-flow", 2))
    return other


class Flow(Technique):
    """Train a network to predict the velocity from images to noise (rectified flow: Liu et al.,
    2023), or, with a teacher, along the ways that a flow takes (reflow), which are straighter.

    Saves calls of the network when images are drawn: Euler's steps are exact on straight ways, so
    that a reflowed model needs about two where the flow itself needs ten. A flow alone costs what
    training on noise costs, and is no better at ten steps than "dpm++". Reflow costs `pairs` images
    drawn by the teacher with `teacher_steps` each, in the phase "teacher", and a training on them;
    it pays back after N* images drawn, and is a little worse than its teacher at any number of
    steps that the teacher needs. It loses where few images are drawn.

    Example:
        >>> gv.Flow(teacher="run:flow").runs()
        {'teacher': 'run:flow'}
    """

    name = "flow"
    stage = "objective"
    tasks = TASKS
    instead = INSTEAD
    examples = ({}, {"teacher": _flowing, "pairs": 8, "teacher_steps": 2})
    neutral = None

    teacher: Any = Field(
        default=None, description='a flow whose ways are learned: a model, "run:NAME", "file:PATH"'
    )
    pairs: int = Field(default=2000, ge=1, description="noise and images of the teacher")
    teacher_steps: int = Field(default=20, ge=1, description="of Euler's, for each of them")
    steps: int = Field(default=2, ge=1, description="the model draws with afterwards")

    @model_validator(mode="after")
    def _taught(self) -> Flow:
        usual = [type(self).model_fields[name].default for name in ("pairs", "teacher_steps")]
        if self.teacher is None and [self.pairs, self.teacher_steps] != usual:
            raise ValueError("'pairs' and 'teacher_steps' change nothing without a teacher")
        return self

    def install(self, model: nn.Module) -> Installed:
        """Make the model one that predicts velocities. Raises BadInput for a model that does not
        draw, or a teacher that is no flow."""
        own = trained_model(self.name, model)
        setting = Setting("euler-flow", self.steps)
        teacher = None
        if self.teacher is not None:
            teacher = teacher_of(self.name, self.teacher, own, flow=True)
            teacher.set(Setting("euler-flow", self.teacher_steps))
        own.become("flow_prediction", False, setting)
        live = InstalledFlow(self, own, teacher)
        if teacher is not None:
            own.objective = live.loss
        return live


class InstalledFlow(Installed):
    """A flow that learns, from images or from its teacher's pairs."""

    def __init__(self, request: Flow, model: Diffusion, teacher: Diffusion | None) -> None:
        super().__init__()
        self.request, self.model, self.teacher = request, model, teacher
        self._pairs: tuple[Tensor, Tensor, Tensor] | None = None

    def loss(self, x: Tensor, y: Tensor | None) -> Tensor:
        """Return the loss of as many of the teacher's pairs as there are images x (batch, …)."""
        noise, image, labels = self.pairs(x.device)
        rows = torch.randint(len(noise), (len(x),)).to(x.device)
        share = torch.rand(len(x), device=x.device)
        points = along(image[rows], noise[rows], share)
        own = self.model
        predicted = own.predict(points, share * own.times, own.hidden(labels[rows]))
        return flow_loss(predicted, image[rows], noise[rows])

    def pairs(self, device: Any = None) -> tuple[Tensor, Tensor, Tensor]:
        """Return noise (pairs, channels, height, width), the teacher's images and their classes;
        drawn when first asked for, and the same again by a resumed training."""
        assert self.teacher is not None
        if self._pairs is None:
            teacher = self.teacher.to(device)
            generator = torch.Generator().manual_seed(self.seed)
            labels = torch.arange(self.request.pairs) % max(teacher.classes, 1)
            noise = torch.randn(self.request.pairs, *teacher.shape, generator=generator).to(device)
            with self.phase("teacher"):
                parts = zip(noise.split(ROWS), labels.to(device).split(ROWS), strict=True)
                images = torch.cat([teacher.solve(z, y) for z, y in parts])
            self._pairs = noise, images, labels.to(device)
        return self._pairs

    def facts(self) -> Mapping[str, Any]:
        """Return how many pairs the teacher drew."""
        return {} if self._pairs is None else {"reflow": {"pairs": len(self._pairs[0])}}
