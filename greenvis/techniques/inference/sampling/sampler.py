"""Sampler: another solver with fewer steps for a finished diffusion model, beside its own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from pydantic import Field
from torch import nn

from greenvis.core.technique import Installed, Technique
from greenvis.models.drawing import Drawing, Setting, Solver, Spacing
from greenvis.techniques.inference.sampling._models import (
    INSTEAD,
    TASKS,
    calls_counted,
    drawing_model,
)


class Sampler(Technique):
    """Draw images with a solver that needs fewer steps: DDIM (Song et al., 2021), DPM-Solver++ 2M
    (Lu et al., 2022), UniPC (Zhao et al., 2023), Heun (Karras et al., 2022), Euler's of a flow, or
    the jumps of a consistency model, all of them diffusers'.

    Saves energy in proportion to the calls of the network, without training: ten steps of "dpm++"
    cost a tenth of a hundred of "ddpm". Costs some quality where steps are few, and none where
    they are not: the distance of each setting is measured beside its joules. "heun" calls the
    network twice a step, guidance twice a call; what counts is calls, which are recorded. What
    stands around the network (an autoencoder, a text encoder) does not shrink. The model answers
    with the first of `steps`; the others, and those of `beside`, are operating points. `merge`
    leaves the setting in the model.

    Example:
        >>> gv.Sampler(solver="unipc", steps=(10,)).settings()[0].steps
        10
    """

    name = "sampler"
    stage = "objective"
    tasks = TASKS
    instead = INSTEAD
    examples = ({}, {"solver": "ddim", "steps": [2], "beside": {"ddpm": [3]}})
    neutral = None

    solver: Solver = Field(default="dpm++", description="how the steps are taken")
    steps: tuple[int, ...] = Field(
        default=(20,), min_length=1, description="of the solver; the first is answered with"
    )
    guidance: float | None = Field(
        default=None,
        ge=0,
        description="weight of what the class or text adds; 1: one call a step, not two; the "
        "model's own where absent",
    )
    spacing: Spacing = Field(
        default="as trained", description="of the times; as the scheduler's configuration says"
    )
    beside: dict[Solver, tuple[int, ...]] = Field(
        default={}, description="steps of other solvers to compare with; the very first is the base"
    )

    def settings(self, own: float = 1.0) -> list[Setting]:
        """Return what is compared, the setting to answer with first.

        Args:
            own: The model's guidance.
        """
        pairs = [(self.solver, self.steps), *self.beside.items()]
        guidance = own if self.guidance is None else self.guidance
        known = [Setting(s, n, guidance, self.spacing) for s, steps in pairs for n in steps]
        return [*dict.fromkeys(known)]

    def install(self, model: nn.Module) -> Installed:
        """Check the settings, and set the first. Raises BadInput for a model that does not draw,
        and a solver that is not for it."""
        drawing = drawing_model(self.name, model)
        settings = self.settings(drawing.drawn_by.guidance)
        for setting in settings:
            drawing.check(setting)
        drawing.set(settings[0])
        return InstalledSampler(self, drawing, settings)


class InstalledSampler(Installed):
    """A model that is switched between solvers."""

    def __init__(self, request: Sampler, model: Drawing, settings: list[Setting]) -> None:
        super().__init__()
        self.request, self.model, self.settings = request, model, settings

    def operating_points(self) -> Mapping[str, AbstractContextManager[dict[str, Any]]]:
        """Return all settings, those to compare with first."""
        settings, now = self.settings, self.model.drawn_by
        own = len(dict.fromkeys(self.request.steps))
        return {
            self.model.name_of(s): self.at(s)
            for s in settings[own:] + settings[:own]
            if not (self.model.cached and s == now)  # that is a point of the cache
        }

    @contextmanager
    def at(self, setting: Setting) -> Iterator[dict[str, Any]]:
        """Hold the model at a setting, and count its network's calls.

        Yields:
            Facts: "network_calls" per image.
        """
        with self.model.drawing(setting), calls_counted(self.model) as facts:
            yield facts
