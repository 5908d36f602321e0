"""Dense averaging of weights: from where training has converged to where it overfits."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from greenvis.core.attached import below, prefixed
from greenvis.core.technique import Installed, Technique
from greenvis.errors import GreenvisError
from greenvis.techniques._shared.norms import Statistics, batch_norms
from greenvis.techniques.data.generalise._average import Averaging, Mean

_LOOKS = 30  # at the images held out, where `every` is absent and the steps are known
_EVERY = 100  # steps, where they are not


class Valley:
    """The mean of the weights of all steps from convergence to overfitting (Cha et al., 2021,
    algorithm 1), a segment of steps after another.

    It begins with the segment at whose end the loss was the least of `converge` looks, and ends
    before `overfit` looks in a row are all above `ratio` times the mean of those first ones. At the
    end of training what lies behind the last look below that is left out, as its authors do.

    Args:
        converge: Looks, N_s.
        overfit: Looks, N_e.
        ratio: r.

    Attributes:
        average: The mean so far; of 0 steps before convergence.
        waiting: The mean of the steps since, which count once a look is below the threshold.
        over: Whether it has ended.
    """

    def __init__(self, converge: int, overfit: int, ratio: float) -> None:
        self.converge, self.overfit, self.ratio = converge, overfit, ratio
        self.recent: list[tuple[float, Mean]] = []  # before convergence
        self.threshold = math.inf
        self.average, self.waiting, self._looks = Mean(), Mean(), 0
        self.over = False

    @property
    def converged(self) -> bool:
        """Whether it has begun."""
        return self.threshold < math.inf

    def look(self, loss: float, segment: Mean) -> None:
        """Take in a segment of steps.

        Args:
            loss: At its end, on images held out.
            segment: The mean of its weights.
        """
        if self.over:
            return
        if self.converged:
            self._follow(loss, segment)
            return
        self.recent = [*self.recent, (loss, segment)][-self.converge :]
        losses = [value for value, _ in self.recent]
        if len(losses) == self.converge and losses[0] == min(losses):
            self.threshold = self.ratio * sum(losses) / len(losses)
            for value, part in self.recent:
                self._follow(value, part)
            self.recent = []

    def _follow(self, loss: float, segment: Mean) -> None:
        if self.over:
            return
        self.waiting.add(segment.values, segment.count)
        self._looks += 1
        if loss <= self.threshold:
            self.average.add(self.waiting.values, self.waiting.count)
        elif self._looks < self.overfit:
            return
        else:
            self.over = True
        self.waiting, self._looks = Mean(), 0

    def state_dict(self) -> dict[str, Tensor]:
        """Return all of it."""
        numbers = [self.threshold, self._looks, self.over, self.average.count, self.waiting.count]
        out = {"numbers": torch.tensor(numbers, dtype=torch.float64)}
        out |= prefixed("average.", self.average.values) | prefixed("waiting.", self.waiting.values)
        for i, (loss, part) in enumerate(self.recent):
            out[f"look{i}"] = torch.tensor([loss, part.count], dtype=torch.float64)
            out |= prefixed(f"recent{i}.", part.values)
        return out

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take it back."""
        threshold, looks, over, count, waiting = state["numbers"].tolist()
        self.threshold, self._looks, self.over = threshold, int(looks), bool(over)
        self.average = Mean(below(state, "average."), int(count))
        self.waiting = Mean(below(state, "waiting."), int(waiting))
        self.recent = []
        while (look := state.get(f"look{len(self.recent)}")) is not None:
            values = below(state, f"recent{len(self.recent)}.")
            self.recent.append((float(look[0]), Mean(values, int(look[1]))))


class Swad(Technique):
    """Answer with the mean of the weights of all steps from convergence to overfitting (SWAD: Cha
    et al., 2021, algorithm 1).

    For flat minima, which hold on images unlike those of training; no forward of its own but for
    looks at images held out (`data.held_out`), a sum a step, and, where a model has batch norms,
    one pass over the training images before each evaluation, whose statistics the mean then goes
    by. Holds up to `converge` + 3 copies of what trains. Little is won where the learning rate goes
    to zero, and nothing before the held-out loss has had a minimum: until then the model answers
    with the weights in training. `merge` leaves the mean in the model. In a loop of your own call
    `live.assess_with(loss)`, `live.feed(train=loader)` and `live.served()`.

    Example:
        >>> live = gv.wrap(model, gv.Swad(every=10))
        >>> def held_out_loss():
        ...     return float(F.cross_entropy(model.eval()(x), y))
        >>> live.assess_with(held_out_loss)
        >>> live.step_end()  # after each optimizer step
        >>> with live.served() as averaged:
        ...     answers = averaged.eval()(x)
    """

    name = "swad"
    stage = "objective"
    examples: ClassVar = ({"every": 1, "converge": 1}, {"every": 2, "overfit": 1})

    converge: int = Field(
        default=3, ge=1, le=1000, description="looks, of which the first was the best: converged"
    )
    overfit: int = Field(
        default=6, ge=1, le=1000, description="looks in a row above the threshold: overfit"
    )
    ratio: float = Field(
        default=1.3, ge=1, description="the threshold over the mean loss at convergence"
    )
    every: int | None = Field(
        default=None,
        ge=1,
        description="steps between looks at the images held out; a thirtieth of all where absent",
    )

    def install(self, model: nn.Module) -> Installed:
        """Leave the model as it is."""
        return InstalledSwad(self, model)


class InstalledSwad(Averaging):
    """The mean of a valley, and of the segment that is not over yet."""

    assesses = True

    def __init__(self, request: Swad, model: nn.Module) -> None:
        super().__init__(model)
        self.request = request
        self.valley = Valley(request.converge, request.overfit, request.ratio)
        self.segment, self.steps = Mean(), 0
        self._statistics = Statistics(model)
        self.wants = ("train",) if batch_norms(model) else ()

    def step_end(self) -> None:
        """Take the step's weights in; look at the images held out where a segment ends."""
        self.steps += 1
        self._statistics.forget()
        if self.valley.over:
            return
        self.tensors = self.learning()
        self.segment.add(self.tensors)
        share = _EVERY if self.total_steps is None else max(1, self.total_steps // _LOOKS)
        every = self.request.every or share
        if self.steps % every:
            return
        if self.held_out_loss is None:
            raise GreenvisError(
                "swad goes by the loss on images held out: call live.assess_with(loss) before the "
                "first step; in a recipe set data.held_out"
            )
        with self.phase("held-out"):
            self.valley.look(self.held_out_loss(), self.segment)
        self.segment = Mean()

    def average(self) -> Mapping[str, Tensor]:
        """Return the mean, none before convergence."""
        return self.valley.average.values

    def merge(self) -> None:
        """Leave the mean in the model, and statistics of batch norms that go with it."""
        super().merge()
        if self.average() and self.wants:
            device = next(p.device for p in self.model.parameters())
            if not self._statistics.known:
                with self.phase("adapt"):
                    self._statistics.estimate(self.feeds.sweep("train", device))
            self._statistics.put()

    def facts(self) -> Mapping[str, Any]:
        """Return of how many steps the mean is."""
        return {"swad_steps": self.valley.average.count, "swad_overfit": self.valley.over}

    def state_dict(self) -> dict[str, Tensor]:
        """Return the valley, the segment, and the steps so far."""
        counts = torch.tensor([self.steps, self.segment.count])
        valley = prefixed("valley.", self.valley.state_dict())
        return {"counts": counts, **valley, **prefixed("segment.", self.segment.values)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take them back."""
        self.steps, count = state["counts"].tolist()
        self.segment = Mean(self.take(below(state, "segment.")), count)
        self.valley.load_state_dict(below(state, "valley."))
        means = [self.valley.average, self.valley.waiting, *(m for _, m in self.valley.recent)]
        for mean in means:
            mean.values = self.take(mean.values)
