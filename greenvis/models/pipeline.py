"""A pipeline of diffusers as a model that draws images, for meters and samplers."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from greenvis.errors import BadInput
from greenvis.models.drawing import CLASSES, Drawing, Setting, Solver

SOLVER_OF: dict[str, Solver] = {cls: name for name, cls in CLASSES.items()}  # type: ignore[misc]


class Pipeline(Drawing):
    """Any pipeline of diffusers that makes images from noise, with its own loop: what it draws is
    what the pipeline draws.

    Args:
        pipe: The pipeline.
        inputs: Labels (batch,) to the arguments of a call, such as
            `lambda y: {"prompt": [names[i] for i in y]}`; by default the number of images, or the
            labels themselves where the pipeline takes class labels.

    Raises:
        BadInput: For a pipeline without a denoising network or scheduler, and one whose arguments
            must be said.
    """

    def __init__(
        self, pipe: Any, inputs: Callable[[Tensor], Mapping[str, Any]] | None = None
    ) -> None:
        network = getattr(pipe, "unet", None) or getattr(pipe, "transformer", None)
        scheduler = getattr(pipe, "scheduler", None)
        if not isinstance(network, nn.Module) or scheduler is None:
            raise BadInput(
                f"{type(pipe).__name__} has no `unet` or `transformer` with a `scheduler`: give a "
                "diffusion pipeline of diffusers"
            )
        takes = inspect.signature(pipe.__call__).parameters
        self._takes = frozenset(takes)
        if inputs is None and not self._takes & {"batch_size", "class_labels"}:
            raise BadInput(
                f"{type(pipe).__name__} must be told what to draw: give inputs, such as "
                'lambda y: {"prompt": [names[i] for i in y]}'
            )
        solver = SOLVER_OF.get(type(scheduler).__name__, "ddim")
        guidance = float(takes["guidance_scale"].default) if "guidance_scale" in takes else 1.0
        super().__init__(network, Setting(solver, 50 if solver != "lcm" else 4, guidance))
        self.pipe, self.inputs, self._base = pipe, inputs or self._plain, scheduler
        pipe.set_progress_bar_config(disable=True)

    def _plain(self, y: Tensor) -> Mapping[str, Any]:
        if "class_labels" in self._takes:
            return {"class_labels": y.tolist()}
        return {"batch_size": len(y)}

    @property
    def consistent(self) -> bool:
        return type(self._base).__name__ == CLASSES["lcm"]

    def base(self) -> Any:
        return self._base

    def check(self, setting: Setting) -> None:
        super().check(setting)
        if setting.guidance != 1 and "guidance_scale" not in self._takes:
            raise BadInput(f"{type(self.pipe).__name__} takes no guidance: leave it out")

    def forward(self, x: Tensor, y: Tensor | None = None) -> Any:
        """Refused: a pipeline draws.

        Raises:
            BadInput: Always.
        """
        raise BadInput(
            "a pipeline draws images and is not trained here: train its network, as "
            "greenvis.models.diffusion.Diffusion(pipe.unet)"
        )

    def draw(self, y: Tensor, generator: torch.Generator | None) -> Tensor:
        setting, own = self.drawn_by, self.pipe.scheduler
        more = {"guidance_scale": setting.guidance} if "guidance_scale" in self._takes else {}
        self.pipe.scheduler = self.scheduler()
        try:
            out = self.pipe(
                **{**self.inputs(y), **more}, num_inference_steps=setting.steps,
                generator=generator, output_type="np",
            )  # fmt: skip
        finally:
            self.pipe.scheduler = own
        return torch.from_numpy(out.images).permute(0, 3, 1, 2).to(y.device)
