"""Progressive distillation: a student that does two of its teacher's steps in one, again and
again."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from greenvis.core.attached import below, prefixed
from greenvis.core.technique import Installed, Technique
from greenvis.errors import BadInput, GreenvisError
from greenvis.models.diffusion import Diffusion
from greenvis.models.drawing import Setting
from greenvis.techniques.inference.sampling._models import (
    INSTEAD,
    TASKS,
    at_time,
    check_signal,
    ddim_step,
    frozen_copy,
    image_in,
    teacher_of,
    trained_model,
)


def target_image(
    x: Tensor, earlier: Tensor, now: tuple[Tensor, Tensor], then: tuple[Tensor, Tensor]
) -> Tensor:
    """Return the image by which one step of DDIM goes from x to where two of the teacher's went
    (Salimans and Ho, 2022, algorithm 2).

    Args:
        x: Noisy images (batch, …).
        earlier: Where the teacher came to.
        now: √ᾱ and √(1 − ᾱ) of x, to multiply with.
        then: Those of `earlier`.
    """
    ratio = then[1] / now[1]
    return (earlier - ratio * x) / (then[0] - ratio * now[0])


def progressive_loss(image: Tensor, target: Tensor, now: tuple[Tensor, Tensor]) -> Tensor:
    """Return the squared error of images, each times max(ᾱ / (1 − ᾱ), 1) (ibid., eq. 9).

    Args:
        image: Predicted, (batch, …).
        target: The same.
        now: √ᾱ and √(1 − ᾱ) of what they were predicted from.
    """
    weight = (now[0] / now[1]).square().clamp(min=1)
    return (weight * (image - target).square()).mean()


class Progressive(Technique):
    """Halve the steps of DDIM again and again: a student learns to do two steps of its teacher in
    one, and is the next teacher (progressive distillation: Salimans and Ho, 2022).

    Saves calls of the network when images are drawn: from `start` steps to `end`. Costs, in each
    step of training, two calls of the teacher's network, in the phase "teacher" (twice as many with
    guidance, which the student then needs no more), and some quality with each halving; the
    training is shared out equally. It pays back after N* images drawn, and loses to "dpm++" at ten
    steps where few are. The student must begin with the teacher's weights (`init`).

    Example:
        >>> gv.Progressive(teacher="run:base", start=40, end=5).halvings
        3
    """

    name = "progressive"
    stage = "objective"
    tasks = TASKS
    instead = INSTEAD
    examples = ({"teacher": copy.deepcopy, "start": 4, "end": 2},)
    neutral = None

    teacher: Any = Field(description='a model trained on noise: itself, "run:NAME", "file:PATH"')
    start: int = Field(default=40, ge=2, description="steps of the first teacher")
    end: int = Field(default=5, ge=1, description="steps of the last student")
    guidance: float = Field(default=1.0, ge=0, description="of the first teacher")

    @model_validator(mode="after")
    def _halves(self) -> Progressive:
        if self.halvings < 1 or self.end << self.halvings != self.start:
            raise ValueError("'end' times a power of two must be 'start', as 5 and 40")
        return self

    @property
    def halvings(self) -> int:
        """How often the steps are halved."""
        return (self.start // self.end).bit_length() - 1

    def install(self, model: nn.Module) -> Installed:
        """Make the model a student. Raises BadInput for a model or teacher that does not fit."""
        own = trained_model(self.name, model)
        teacher = teacher_of(self.name, self.teacher, own, flow=False)
        for one in (own, teacher):
            check_signal(self.name, one)
        if own.prediction != teacher.prediction:
            raise BadInput(
                f"'progressive' goes on from its teacher, which predicts {teacher.prediction}, and "
                f"this model {own.prediction}: begin with the teacher's weights (init)"
            )
        if own.times % self.start:
            raise BadInput(f"start {self.start} must divide the {own.times} times of the noise")
        teacher.check(Setting("ddim", self.start, self.guidance))
        own.become(own.prediction, False, Setting("ddim", self.end, spacing="trailing"))
        live = InstalledProgressive(self, own, teacher)
        own.objective = live.loss
        return live


class InstalledProgressive(Installed):
    """A student, and its teacher of the moment."""

    def __init__(self, request: Progressive, model: Diffusion, teacher: Diffusion) -> None:
        super().__init__()
        self.request, self.model, self.teacher = request, model, teacher
        self.step = 0
        self.halving = 0  # whose student it is

    def loss(self, x: Tensor, y: Tensor | None) -> Tensor:
        """Return the loss of images x (batch, …) of classes y, at times of the student's grid."""
        own, teacher = self.model, self.teacher.to(x.device)
        clean = own.scaled(x)
        steps = self.request.start >> (self.halving + 1)
        half = own.times // (2 * steps)
        t = torch.randint(1, steps + 1, (len(x),), device=x.device) * 2 * half - 1
        alphas, noise = own.alphas(), torch.randn_like(clean)
        now = at_time(alphas, t)
        noisy = now[0] * clean + now[1] * noise
        labels = own.hidden(y)
        guidance = self.request.guidance if self.halving == 0 else 1.0
        with self.phase("teacher"), torch.no_grad():
            earlier, at = noisy, now
            for back in (half, 2 * half):
                out = teacher.predict(earlier, t - back + half, labels, guidance)
                image = image_in(teacher.prediction, out, earlier, *at)
                then = at_time(alphas, t - back)
                earlier, at = ddim_step(earlier, image, at, then), then
            target = target_image(noisy, earlier, now, at)
        predicted = image_in(own.prediction, own.predict(noisy, t, labels), noisy, *now)
        return progressive_loss(predicted, target, now)

    def step_end(self) -> None:
        """Make the student the next teacher, where it has learned its share."""
        self.step += 1
        if self.total_steps is None:
            raise GreenvisError(
                "progressive shares the training out among its halvings: say how long it is, "
                "live.plan(steps)"
            )
        due = min(self.step * self.request.halvings // self.total_steps, self.request.halvings - 1)
        if due > self.halving:
            self.halving = due
            self.teacher.network.load_state_dict(frozen_copy(self.model.network))

    def state_dict(self) -> dict[str, Tensor]:
        """Return the step, and the teacher where it is a student of before."""
        moved = frozen_copy(self.teacher.network) if self.halving else {}
        state = {"step": torch.tensor([self.step, self.halving])}
        return state | prefixed("teacher.", moved)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Load what `state_dict` returned."""
        self.step, self.halving = state["step"].tolist()
        if own := below(state, "teacher."):
            self.teacher.network.load_state_dict(own)

    def facts(self) -> Mapping[str, Any]:
        """Return the steps of the last student."""
        return {"progressive": {"steps": self.request.start >> (self.halving + 1)}}
