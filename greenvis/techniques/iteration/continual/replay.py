"""Experience replay: a small buffer of earlier examples (images, features or a generator's), some
of which join each batch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from greenvis.core import distributed as ranks
from greenvis.core.attached import below, prefixed
from greenvis.core.modes import in_mode
from greenvis.core.technique import (
    Experience,
    InputShape,
    Installed,
    OnlyWith,
    Technique,
    logits_of,
)
from greenvis.errors import BadInput, GreenvisError
from greenvis.models.structure.probing import probing
from greenvis.tasks.answers import CLASSES, require_class_numbers
from greenvis.techniques.iteration.continual._buffer import Buffer
from greenvis.techniques.iteration.continual._gdumb import InstalledGdumb
from greenvis.techniques.iteration.continual._generator import Generator
from greenvis.techniques.iteration.continual._gradients import closeness
from greenvis.techniques.iteration.continual._herding import replace_by_herding
from greenvis.techniques.iteration.continual._latent import Entrance
from greenvis.techniques.iteration.continual._parts import Parts

Method = Literal["er", "er_ace", "der", "derpp", "gdumb"]
Policy = Literal["reservoir", "ring", "balanced", "greedy", "herding", "gradient"]
# kept images whose gradients a new one's is compared with (n of Aljundi et al., 2019)
_COMPARED = 10


class Replay(Technique):
    """Mix kept examples of earlier tasks into each batch, so that they are not forgotten.

    method: "er", one mean loss over new and replayed (Riemer et al., 2019; Chaudhry et al., 2019);
    "er_ace", new ones compete among their own classes (Caccia et al., 2022); "der", match the
    logits an example had when it was kept, alpha · mean squared error; "derpp", that and, from a
    second draw, beta · task loss (Buzzega et al., 2020); "gdumb", nothing learns but at each task's
    end, from the first weights, on the buffer alone (Prabhu et al., 2020; with policy greedy), in
    the phase
    "gdumb".
    latent: keep what enters a layer instead of images (latent replay: Pellegrini et al., 2020). All
    below is frozen, and runs
    for new images only: its forward is what this saves. source generator: a conditional variational
    autoencoder draws what is replayed (Shin et al., 2017); it learns at each task's end but the
    last, in the phase "generator". Saves training again on everything, whose cost grows with the
    square of the number of tasks. Costs the buffer (images as uint8 with their own range) and, each
    step, forward and backward of what is replayed: 128 for a batch of 10 are 13.8 times the images,
    so with few tasks it may save nothing. New and replayed run as one batch. Kept after the
    optimizer step, as they were shown, augmentation included. Policy gradient costs, each step, a
    backward for each new image and 10 kept ones. Of several processes each keeps its share of
    `size`, of the images it is shown: give `end_experience` its own part of the data, too.

    Example:
        >>> live = gv.wrap(model, gv.Replay(size=20))
        >>> images, labels = live.batch(x, y)
        >>> live.step_end()  # after the optimizer's step: they are offered to the buffer
        >>> len(live.batch(x, y)[1])  # the next batch has some of them behind it
        8
    """

    name = "replay"
    only_with: ClassVar[OnlyWith] = {
        "alpha": ("method", ("der", "derpp")), "beta": ("method", ("derpp",)), "lr": ("method",
        ("gdumb",)),
    }  # fmt: skip
    stage = "objective"
    rank_local = True
    tasks = CLASSES
    instead = (
        "its buffer keeps a class number for each image; hold the weights by importances (MAS, SI)"
    )
    examples = (
        {"size": 6},
        {"size": 5, "method": "derpp", "policy": "balanced"},
        {"size": 6, "latent": -1},
        {"size": 6, "method": "gdumb", "policy": "greedy", "epochs": 1},
    )

    size: int = Field(default=500, ge=1, description="examples kept")
    method: Method = "er"
    policy: Policy = Field(
        default="reservoir",
        description="who stays: all alike; a class's latest; classes alike, by chance or who "
        "comes first; at a task's end, "
        "those nearest the mean; those whose gradients differ most",
    )
    latent: int | str | None = Field(
        default=None, description="keep what enters this block (from 0; negative: from the end)"
    )
    source: Literal["buffer", "generator"] = "buffer"
    batch_size: int | None = Field(
        default=None, ge=1, description="replayed a step; `share` of the batch where absent"
    )
    share: float = Field(default=1.0, gt=0, description="replayed for each new image")
    every: int = Field(default=1, ge=1, description="replay at every so many steps")
    alpha: float = Field(
        default=0.5, ge=0, description="of der and derpp: weight of the kept logits"
    )
    beta: float = Field(default=0.5, ge=0, description="of derpp: weight of the kept labels")
    exact: bool = Field(
        default=False, description="keep float32 instead of uint8: four times the memory"
    )
    epochs: int = Field(
        default=30, ge=1, description="of gdumb and of the generator: passes at a task's end"
    )
    lr: float = Field(default=0.05, gt=0, description="of gdumb")
    input_shape: InputShape = None

    @model_validator(mode="after")
    def _fits(self) -> Replay:
        if self.latent is not None and (
            self.method == "gdumb" or self.policy in ("herding", "gradient")
        ):
            raise ValueError(
                "features of a layer are kept as they come: 'latent' goes with neither gdumb, "
                "herding nor gradient"
            )
        if self.source == "generator" and (
            self.latent is not None or self.method not in ("er", "er_ace")
        ):
            raise ValueError(
                "a generator draws images and labels: 'source' generator goes with er and er_ace, "
                "without 'latent'"
            )
        if self.method == "gdumb" and self.policy in ("gradient", "herding"):
            raise ValueError(
                f"gdumb trains nothing while tasks go by, so there is nothing for '{self.policy}' "
                "to choose by"
            )
        return self

    def install(self, model: nn.Module) -> Installed:
        """Make the buffer; with `latent`, freeze what lies below the layer. Raises BadInput where
        that cannot be."""
        count = ranks.world_size()
        rank = dist.get_rank() if count > 1 else 0
        if count > 1 and (self.method == "gdumb" or self.source == "generator"):
            what = "gdumb" if self.method == "gdumb" else "a generator"
            raise BadInput(
                f"replay with {what} trains within one process, and this is one of {count}: use a "
                "buffer with er or der"
            )
        size = self.size // count + (rank < self.size % count)
        if not size:
            raise BadInput(
                f"replay: size {self.size} leaves nothing for each of {count} processes: keep at "
                f"least {count}"
            )
        buffer = Buffer(size, self.policy, (torch.initial_seed() + rank) % 2**63, self.exact)
        if self.method == "gdumb":
            return InstalledGdumb(
                model, buffer, self.epochs, self.lr, self.batch_size, self.instead
            )
        return InstalledReplay(self, model, buffer)


class InstalledReplay(Installed):
    """The buffer at work. Adds the terms "der" and "derpp"."""

    def __init__(self, request: Replay, model: nn.Module, buffer: Buffer) -> None:
        super().__init__()
        self.request, self.model, self.buffer = request, model, buffer
        self.entrance = (
            None if request.latent is None else Entrance(model, request.latent, request.input_shape)
        )
        self.generator = (
            Generator(torch.initial_seed() % 2**63) if request.source == "generator" else None
        )
        self.steps = 0
        self.parts = Parts(request.method, request.beta)
        self._stored_logits: Tensor | None = None  # the kept logits of the first draw
        self._new: list[dict[str, Tensor]] = []  # to be kept after the optimizer step
        self._outputs = 0
        self._last = False  # whether no task comes after this one
        self._keeps_logits = request.method in ("der", "derpp")
        if request.method != "er":
            self.criterion = self.parts.criterion

    def replacement_blocker(self, path: str) -> str:
        """Say that kept logits are of so many classes."""
        if self.request.method in ("der", "derpp"):
            return "its buffer keeps logits of the earlier classes"
        return ""

    def batch(self, x: Any, y: Any) -> tuple[Any, Any]:
        """Return the batch with examples from the buffer behind it; with `latent` they join y here,
        and x at the layer."""
        if not isinstance(x, Tensor):
            raise BadInput(
                f"replay needs a batch of one tensor of images, (batch, …), not {type(x).__name__}"
            )
        require_class_numbers(y, "replay", Replay.instead)
        r = self.request
        if self.generator is None:
            self._new.append({"y": y} if self.entrance is not None else {"x": x, "y": y})
        self._stored_logits, sizes = None, [len(x)]
        self.steps += 1
        count = r.batch_size or max(1, round(r.share * len(x)))
        xs, ys = [], [y]
        if self.steps % r.every == 0:
            for draw in range(2 if r.method == "derpp" else 1):
                old = self._earlier(count, x.device, draw == 0)
                if old is not None:
                    xs.append(old[0].to(x.dtype))
                    ys.append(old[1])
                    sizes.append(len(old[1]))
        try:
            self.parts.begin(sizes)
        except BadInput:
            self._new.clear()
            raise
        if self.entrance is not None:
            self.entrance.open(self._taken, torch.cat(xs) if xs else None)
            return x, torch.cat(ys) if xs else y
        return (torch.cat([x, *xs]), torch.cat(ys)) if xs else (x, y)

    def _earlier(
        self, count: int, device: torch.device, first: bool
    ) -> tuple[Tensor, Tensor] | None:
        """Return (x, y) of earlier examples, None while there are none."""
        if self.generator is not None:
            return self.generator.draw(count, device) if self.generator.classes else None
        if not len(self.buffer):
            return None
        rows, x, y = self.buffer.sample(count, device)
        if first and self._keeps_logits:
            self._stored_logits = self.buffer.column("logits", rows).to(device)
        return x, y

    def _taken(self, entered: Tensor) -> None:
        if not self.repeated:
            self._new[-1]["x"] = entered

    def terms(self, x: Any, y: Any, logits: Tensor | None) -> Mapping[str, Tensor]:
        """Return {"der": alpha · MSE to the kept logits}, where the method has it."""
        if not self._keeps_logits:
            return {}
        if logits is None:
            raise GreenvisError(
                "replay of logits needs logits; a pretext technique gives none: use method er"
            )
        now = logits_of(logits)
        if not self.repeated:
            self._new[-1]["logits"] = now[: self.parts.sizes[0]].detach()
        weights = self.parts.weights(now)
        if self._stored_logits is None:
            return {}
        new, old = self.parts.sizes[:2]
        distance = F.mse_loss(now[new : new + old], self._stored_logits.to(now.dtype))
        return {"der": self.request.alpha * weights[1] * distance}

    def step_end(self) -> None:
        """Offer the new examples to the buffer."""
        for new in self._new:
            if "x" not in new:
                raise GreenvisError(
                    f"the layer of latent replay did not run in this step: {self.request.latent!r}"
                )
            if self._keeps_logits and "logits" not in new:
                raise GreenvisError(
                    "replay keeps what the model said, and was not told it: add `live.loss(x, y, "
                    "logits)` in each step"
                )
            if self.request.policy == "gradient":
                device = new["x"].device
                compared = (
                    self.buffer.take(self.buffer.draw(_COMPARED), device)
                    if len(self.buffer)
                    else (new["x"][:0], new["y"][:0])
                )
                with in_mode(self.model, False):
                    new["score"] = closeness(self.model, new["x"], new["y"], *compared)
            if self.request.policy != "herding":
                self.buffer.offer(**new)
        self._new.clear()
        self.parts.step_end()

    def begin_experience(self, experience: Experience) -> None:
        """Note whether another task comes."""
        self._last = experience.count is not None and experience.index + 1 == experience.count

    def end_experience(self, loader: Any) -> None:
        """Choose each class's examples anew, or let the generator learn the task, where that is
        done at a task's end."""
        if self.generator is not None and not self._last:
            with self.phase("generator"):
                self._teach(self.generator, loader)
        if self.generator is not None or self.request.policy != "herding":
            return
        replace_by_herding(self.buffer, self.model, loader)

    def _teach(self, generator: Generator, loader: Any) -> None:
        device = next(self.model.parameters()).device
        if not generator.shape:
            with probing(self.model):
                self._outputs = logits_of(self.model(next(iter(loader))[0][:1].to(device))).shape[1]
        generator.learn(loader, self._outputs, self.request.epochs, self.request.share, device)

    def facts(self) -> Mapping[str, Any]:
        """Return what the buffer holds and takes."""
        if self.generator is not None:
            return {
                "generator_bytes": self.generator.nbytes,
                "generator_classes": len(self.generator.classes),
            }
        return self.buffer.facts()

    def state_dict(self) -> dict[str, Tensor]:
        """Return the buffer or the generator, and how many steps there were."""
        name, memory = self._memory
        return {"steps": torch.tensor(self.steps), **prefixed(name, memory.state_dict())}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take the buffer back; what it goes on to keep and draw is what it would have."""
        self.steps = int(state["steps"])
        name, memory = self._memory
        memory.load_state_dict(below(state, name))

    @property
    def _memory(self) -> tuple[str, Buffer | Generator]:
        if self.generator is not None:
            return "generator.", self.generator
        return "buffer.", self.buffer
