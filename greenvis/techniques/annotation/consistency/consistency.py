"""Learning from unlabelled images by agreement: what the model is sure of on a weak view, it is to
say of a strong one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from greenvis.core.attached import below, prefixed
from greenvis.core.modes import in_mode
from greenvis.core.seams import of_known
from greenvis.core.technique import Installed, OnlyWith, Technique, logits_of
from greenvis.techniques._shared.views import strong_view
from greenvis.techniques.annotation.consistency._kept_answers import KeptAnswers
from greenvis.techniques.annotation.consistency._unlabelled import Unlabelled
from greenvis.techniques.annotation.consistency._weights import (
    FreeMatch,
    SoftMatch,
    annealed,
    divergences,
    sharpened,
    sure,
)

_MOVING = {"freematch": FreeMatch, "softmatch": SoftMatch}  # those that hold means of a training


class Consistency(Technique):
    """Learn from unlabelled images by agreement of their views (FixMatch: Sohn et al., 2020;
    FreeMatch: Wang et al., 2023; SoftMatch: Chen et al., 2023; UDA: Xie et al., 2020).

    Saves labels, not energy: a step takes (1 + 2 · mu) times the images, and thousands of steps are
    needed before it pays: compare with the strong augmentation alone. The methods differ in whose
    answer to a weak view teaches its strong view: those above a threshold (fixmatch), above one
    that rises with the mean confidence, class by class (freematch), all by a weight that falls
    below that mean (softmatch), sharpened answers above a threshold (uda). Labelled, weak and
    strong images stand in one batch, so that batch norms see them together; losses, thresholds and
    means are over all unlabelled images of a step.

    `refresh: n` is a green variant of each, ours. Weak views are answered without a gradient, in
    eval mode; only images that count get a strong view, which alone stands in the batch (of soft
    weights, an image counts whole with its weight as the probability: the same mean); and one that
    was twice answered alike, its strong view too and surely, is left out of n - 1 passes, not even
    loaded, for its loss is near nothing. The mean is over the images left out as well, thresholds
    are not. A step costs less the more the model knows; it does not where nothing is sure. Resting
    needs a stream that says which images it gives: a recipe's does.

    Draws from the stream "unlabeled", whose images come weakly augmented as the data says; strong
    views (crop, flip, contrast, brightness, a square cut out) are made here. Adds the term
    "consistency". Unlabelled rows have the label -1: a loop of your own takes its loss from
    `live.criterion(F.cross_entropy)`.

    Example:
        >>> live = gv.wrap(model, gv.Consistency(mu=1))
        >>> live.feed(unlabeled=[x])  # a loader of images
        >>> images, labels = live.batch(x, y)
        >>> outputs = model(images)
        >>> task_loss = live.criterion(F.cross_entropy)(outputs, labels)
        >>> len(images) == 3 * len(x), sorted(live.terms(images, labels, outputs))
        (True, ['consistency'])
    """

    name = "consistency"
    stage = "objective"
    tasks = frozenset({"classification"})
    instead = "it takes the likeliest of one class per image for its label: leave it out"
    needs = frozenset({"gradients"})
    only_with: ClassVar[OnlyWith] = {
        "threshold": ("method", ("fixmatch", "uda")),
        "momentum": ("method", ("freematch", "softmatch")),
        "fairness": ("method", ("freematch",)),
        "temperature": ("method", ("uda",)),
        "annealing": ("method", ("uda",)),
    }
    examples: ClassVar = (
        {"threshold": 0.1},
        {"method": "freematch"},
        {"method": "softmatch"},
        {"method": "uda", "threshold": 0.1, "annealing": "exp"},
        {"threshold": 0.1, "refresh": 2},
        {"method": "softmatch", "refresh": 2},
    )

    method: Literal["fixmatch", "freematch", "softmatch", "uda"] = Field(
        default="fixmatch", description="which answers to weak views teach the strong ones"
    )
    mu: int = Field(
        default=3, ge=1, description="unlabelled batches per step, each of the labelled one's size"
    )
    weight: float = Field(default=1.0, ge=0, description="factor of the term")
    warmup: float = Field(
        default=0.0, ge=0, le=1, description="share of the training in which the factor grows"
    )
    threshold: float = Field(
        default=0.95, ge=0, lt=1, description="the least probability that is taken for sure"
    )
    refresh: int | None = Field(
        default=None,
        ge=1,
        description="the green variant: passes over the unlabelled images from one look at an easy "
        "one to the next",
    )
    momentum: float = Field(
        default=0.99,
        ge=0,
        lt=1,
        description="of means over the training; published with 0.999, for a million steps",
    )
    fairness: float = Field(
        default=0.01, ge=0, description="factor of the term that keeps all classes answered"
    )
    temperature: float = Field(default=0.4, gt=0, description="sharpens the weak answers")
    annealing: Literal["linear", "log", "exp"] | None = Field(
        default=None,
        description="leave out labelled images that are answered well, later on fewer of them; exp "
        "for few labels",
    )
    area: float = Field(
        default=0.5, gt=0, le=1, description="smallest share of the image that a strong view shows"
    )
    colour: float = Field(
        default=0.6, ge=0, le=1, description="how far a strong view's contrast and brightness go"
    )

    def install(self, model: nn.Module) -> Installed:
        """Leave the model as it is."""
        kind = InstalledConsistency if self.refresh is None else InstalledGreen
        return kind(self, model)


class InstalledConsistency(Unlabelled):
    """Agreement at work."""

    def __init__(self, request: Consistency, model: nn.Module) -> None:
        super().__init__(request.name, model, request.weight, request.warmup)
        self.request = request
        self.means: FreeMatch | SoftMatch | None = None
        if request.annealing is not None:
            self.criterion = self._annealed

    def strong(self, images: Tensor) -> Tensor:
        """Return a strong view of each image."""
        return strong_view(images, self.request.area, self.request.colour)

    def batch(self, x: Any, y: Any) -> tuple[Any, Any]:
        """Put weak and strong views of the unlabelled images behind the labelled ones."""
        self.check(x, y)
        weak = self.feed("unlabeled", x.device, self.request.mu).to(x.dtype)
        return self.put_behind(x, y, [weak, self.strong(weak)])

    def terms(self, x: Any, y: Any, logits: Tensor | None) -> Mapping[str, Tensor]:
        """Return {"consistency": weight · mean of the strong views' losses}."""
        weak, strong = self.answers(logits).chunk(2)
        weak = weak.detach()
        probabilities = weak.softmax(1)
        weights = self.weights(probabilities)
        loss = (weights * self.losses(weak, strong)).mean() + self.fairness(strong, weights)
        return self.term(loss, weights)

    def losses(self, weak: Tensor, strong: Tensor) -> Tensor:
        """Return how far each strong view's logits are from what its weak view's teach, (batch,),
        of (batch, classes)."""
        if self.request.method == "uda":
            return divergences(sharpened(weak, self.request.temperature), strong)
        return F.cross_entropy(strong, weak.argmax(1), reduction="none")

    def fairness(self, strong: Tensor, weights: Tensor) -> Tensor | float:
        """Return FreeMatch's term that keeps all classes answered, with its factor; 0 of other
        methods."""
        if not isinstance(self.means, FreeMatch):
            return 0.0
        return self.request.fairness * self.means.fairness(strong, weights)

    def weights(self, probabilities: Tensor) -> Tensor:
        """Return how much each image counts, (batch,), of answers (batch, classes) to weak views;
        means over the training take them in."""
        request = self.request
        if request.method not in _MOVING:
            return sure(probabilities, request.threshold)
        if self.means is None:
            self.means = self._begin(probabilities.shape[1])
        if not self.repeated:
            self.means.observe(probabilities)
        return self.means.weights(probabilities)

    def _begin(self, classes: int) -> FreeMatch | SoftMatch:
        return _MOVING[self.request.method](classes, self.request.momentum, self.device)

    def _annealed(self, task_loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """Return the task loss of the labelled images that are not yet answered well."""
        schedule = self.request.annealing
        assert schedule is not None

        def loss(outputs: Any, y: Tensor) -> Tensor:
            logits = logits_of(outputs)
            progress = min(1.0, self.steps / self.total_steps) if self.total_steps else 1.0
            most = annealed(progress, logits.shape[1], schedule)
            own = logits.detach().float().softmax(1).gather(1, y.clamp(min=0)[:, None])[:, 0]
            return of_known(task_loss)(logits, y.masked_fill(own > most, -1))

        return loss

    def state_dict(self) -> dict[str, Tensor]:
        """Return the steps taken, what was sure in them, and the means so far."""
        means = {} if self.means is None else self.means.values
        return {**super().state_dict(), **prefixed("mean.", {n: t.cpu() for n, t in means.items()})}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Load what `state_dict` returned."""
        super().load_state_dict(state)
        stored = below(state, "mean.")
        if stored:
            self.means = self._begin(max(t.numel() for t in stored.values()))
            self.means.values = {n: t.to(self.device, copy=True) for n, t in stored.items()}


class InstalledGreen(InstalledConsistency):
    """Agreement where it is worth computing."""

    def __init__(self, request: Consistency, model: nn.Module) -> None:
        super().__init__(request, model)
        assert request.refresh is not None
        self.earlier = KeptAnswers(request.refresh)
        self.looked = self.drawn = 0
        self._step: tuple[Tensor | None, Tensor, Tensor, int] | None = None

    def batch(self, x: Any, y: Any) -> tuple[Any, Any]:
        """Put strong views behind the labelled images: of those whose weak view's answer counts."""
        self.check(x, y)
        positions, where = self.feed_positions("unlabeled", self.request.mu), None
        drawn = 0 if positions is None else len(positions)
        if positions is not None:
            where = self.earlier.due(positions).nonzero().squeeze(1)
            positions = positions[where]
            if not len(where):
                none = torch.zeros(0, 1, device=x.device)
                self._step = positions, none[:, 0].bool(), none, drawn
                return self.put_behind(x, y, [])
        weak = self.feed("unlabeled", x.device, self.request.mu, where).to(x.dtype)
        with in_mode(self.model, False), torch.no_grad():
            logits = logits_of(self.model(weak)).float()
        chosen = torch.bernoulli(self.weights(logits.softmax(1))).bool()
        self._step = positions, chosen, logits, drawn or len(weak)
        return self.put_behind(x, y, [self.strong(weak[chosen])] if chosen.any() else [])

    def terms(self, x: Any, y: Any, logits: Tensor | None) -> Mapping[str, Tensor]:
        """Return {"consistency": weight · sum of the strong views' losses / images drawn}."""
        strong = self.answers(logits)
        assert self._step is not None
        positions, chosen, weak, drawn = self._step
        taught = weak[chosen]
        loss = self.losses(taught, strong).sum() / drawn
        loss = loss + self.fairness(strong, chosen.new_ones(len(strong)))
        if not self.repeated:
            if positions is not None:
                self._rest(positions, chosen, weak.argmax(1), strong.detach().softmax(1))
            self.looked += len(chosen)
            self.drawn += drawn
        return self.term(loss, loss.new_tensor(len(strong) / drawn))

    def _rest(self, positions: Tensor, chosen: Tensor, classes: Tensor, strong: Tensor) -> None:
        """Note the answers to a step's images, by which the easy ones rest."""
        learned = torch.zeros_like(chosen)
        own = strong.gather(1, classes[chosen][:, None])[:, 0]
        learned[chosen] = own >= self.request.threshold
        classes = classes.masked_fill(~chosen, -1)
        self.earlier.put(positions, classes.cpu(), learned.cpu())

    def facts(self) -> Mapping[str, Any]:
        """Return also the share of the unlabelled images drawn that was looked at."""
        if not self.drawn:
            return super().facts()
        looked = round(self.looked / self.drawn, 4)
        return {**super().facts(), "consistency_looked_at": looked}

    def state_dict(self) -> dict[str, Tensor]:
        """Return also the kept answers, and the images counted."""
        answers = prefixed("answers.", self.earlier.state_dict())
        counts = torch.tensor([self.looked, self.drawn])
        return {**super().state_dict(), **answers, "counts": counts}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Load what `state_dict` returned."""
        super().load_state_dict(state)
        self.earlier.load_state_dict(below(state, "answers."))
        self.looked, self.drawn = state["counts"].tolist()
