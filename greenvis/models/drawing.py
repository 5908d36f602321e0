"""What draws images step by step with a network of diffusers: settings, solvers, calls counted."""

from __future__ import annotations

import importlib
import inspect
from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from greenvis.core.modes import removing
from greenvis.errors import BadInput

Solver = Literal["ddpm", "ddim", "heun", "dpm++", "unipc", "euler-flow", "lcm"]
Spacing = Literal["as trained", "leading", "trailing", "linspace"]
SOLVERS, SPACINGS = get_args(Solver), get_args(Spacing)
CLASSES = {
    "ddpm": "DDPMScheduler",
    "ddim": "DDIMScheduler",
    "heun": "HeunDiscreteScheduler",
    "dpm++": "DPMSolverMultistepScheduler",
    "unipc": "UniPCMultistepScheduler",
    "euler-flow": "FlowMatchEulerDiscreteScheduler",
    "lcm": "LCMScheduler",
}
GRID = 50  # times a consistency model is trained at, of which its solver picks


class Setting(NamedTuple):
    """How images are drawn.

    Args:
        solver: One of `SOLVERS`.
        steps: Of the solver; what they cost is counted in calls of the network.
        guidance: Weight of what the class adds (Ho and Salimans, 2022); 1: no guidance.
        spacing: Of the times; "as trained": what the scheduler's configuration says.
    """

    solver: Solver
    steps: int
    guidance: float = 1.0
    spacing: Spacing = "as trained"

    def __str__(self) -> str:
        """Return a short name, such as "dpm++ 20"."""
        guided = "" if self.guidance == 1 else f", guidance {self.guidance:g}"
        return f"{self.solver} {self.steps}{guided}" + (
            "" if self.spacing == "as trained" else f", {self.spacing}"
        )


def schedulers() -> Any:
    """Return diffusers. Raises BadInput where it is not installed."""
    try:
        return importlib.import_module("diffusers")
    except ImportError as error:
        raise BadInput(
            "samplers are those of diffusers: get it with `pip install 'greenvis[generation]'`"
        ) from error


class Drawing(nn.Module):
    """A model that draws an image for each label with a network called once or twice per step.

    The setting is a buffer, so that a saved model draws as it drew.

    Args:
        network: Of diffusers; called with noisy images and a time.
        setting: To begin with.

    Attributes:
        runs: Batches drawn so far.
        drawn: Images drawn so far.
        cached: How calls of the network are made cheaper, by name; "" where they are not.
    """

    setting: Tensor

    def __init__(self, network: nn.Module, setting: Setting) -> None:
        super().__init__()
        self.network = network
        self.runs = self.drawn = 0
        self.cached = ""
        self.register_buffer("setting", _row(setting))

    @property
    def drawn_by(self) -> Setting:
        """The setting it draws with."""
        solver, steps, guidance, spacing = self.setting.tolist()
        return Setting(SOLVERS[round(solver)], round(steps), guidance, SPACINGS[round(spacing)])

    def name_of(self, setting: Setting) -> str:
        """Return what a setting is called, as the model is now."""
        return f"{setting}, {self.cached}" if self.cached else str(setting)

    def set(self, setting: Setting) -> None:
        """Draw with another setting from now on.

        Raises:
            BadInput: For one that is not this model's.
        """
        self.check(setting)
        self.setting.copy_(_row(setting))

    @contextmanager
    def drawing(self, setting: Setting) -> Iterator[None]:
        """Draw with another setting within. Raises BadInput as `set` does."""
        before = self.setting.clone()
        self.set(setting)
        try:
            yield
        finally:
            self.setting.copy_(before)

    @property
    @abstractmethod
    def consistent(self) -> bool:
        """Whether it jumps from any time to the image, which "lcm" alone makes use of."""

    @abstractmethod
    def base(self) -> Any:
        """Return the scheduler whose noise the network was trained on."""

    @abstractmethod
    def draw(self, y: Tensor, generator: torch.Generator | None) -> Tensor:
        """Return what `sample` does."""

    def sample(self, y: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Return an image for each label.

        Args:
            y: Classes (batch,).
            generator: Of all that is drawn at random.

        Returns:
            (batch, channels, height, width).
        """
        self.runs, self.drawn = self.runs + 1, self.drawn + len(y)
        return self.draw(y, generator)

    def check(self, setting: Setting) -> None:
        """Refuse a setting that is not right for this model.

        Raises:
            BadInput: For a solver of another kind of model, more steps than there are times.
        """
        flow, solver = "FlowMatch" in type(self.base()).__name__, setting.solver
        if self.consistent != (solver == "lcm"):
            raise BadInput(
                f"solver '{solver}' is not for this model: "
                + (
                    "a consistency model is drawn by 'lcm'"
                    if self.consistent
                    else "'lcm' is for consistency models: train one with `consistency_model`, or "
                    "take 'dpm++'"
                )
            )
        if flow != (solver == "euler-flow") and not self.consistent:
            raise BadInput(
                f"solver '{solver}' is not for this model: "
                + (
                    "a flow is drawn by 'euler-flow'"
                    if flow
                    else "'euler-flow' is for flows: train one with `flow`, or take 'dpm++'"
                )
            )
        most = int(self.base().config.num_train_timesteps)
        most = min(most, GRID) if solver == "lcm" else most
        if not 1 <= setting.steps <= most:
            raise BadInput(f"{setting.steps} steps of '{solver}': choose 1 to {most}")

    def scheduler(self) -> Any:
        """Return a new solver for one run: it holds the run's state."""
        setting, config = self.drawn_by, self.base().config
        cls = getattr(schedulers(), CLASSES[setting.solver])
        takes = inspect.signature(cls.__init__).parameters
        more: dict[str, Any] = {}
        if setting.spacing != "as trained" and "timestep_spacing" in takes:
            more["timestep_spacing"] = setting.spacing
        if setting.solver == "lcm" and "original_inference_steps" not in config:
            more["original_inference_steps"] = min(GRID, int(config.num_train_timesteps))
        known = {k: v for k, v in config.items() if k in takes or k.startswith("_")}
        return cls.from_config(known, **more)


def _row(setting: Setting) -> Tensor:
    numbers = (SOLVERS.index(setting.solver), setting.steps, setting.guidance)
    return torch.tensor([*numbers, SPACINGS.index(setting.spacing)], dtype=torch.float64)


@contextmanager
def counting(network: nn.Module) -> Iterator[list[int]]:
    """Count, within, the images that a network is called with: [images so far]."""
    count = [0]

    def count_rows(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = args[0] if args else next(iter(kwargs.values()))
        count[0] += len(x)

    with removing([network.register_forward_pre_hook(count_rows, with_kwargs=True)]):
        yield count
