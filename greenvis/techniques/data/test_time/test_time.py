"""Adaptation while the model answers: batch by batch towards surer answers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from greenvis.core.modes import forwarding, in_mode
from greenvis.core.technique import Installed, OnlyWith, Technique
from greenvis.errors import BadInput
from greenvis.tasks.answers import logits_of
from greenvis.techniques._shared.ascent import ascent, finite
from greenvis.techniques._shared.entropy import entropy
from greenvis.techniques._shared.norms import batch_norms, batch_statistics
from greenvis.techniques.data.test_time._guard import MARGIN, Guard
from greenvis.techniques.data.test_time._losses import (
    anchor,
    eata_weights,
    limit,
    running,
    weighted_entropy,
)

_NORMS = (nn.modules.batchnorm._BatchNorm, nn.LayerNorm, nn.GroupNorm)
_RETRY = 4  # batches: how often a model that was given up is looked at again
_FISHER_BATCH, _FISHER_IMAGES = 64, 2000  # as in EATA
Gradients = tuple[Tensor | None, ...]
_CHOOSING = ("method", ("eata", "sar"))


class TestTime(Technique):
    """Adapt scale and shift of the norms to each batch that is answered, by the entropy of the
    answers (TENT: Wang et al., 2021; EATA: Niu et al., 2022; SAR: Niu et al., 2023).

    No labels, no training data; but serving costs a backward per batch, about three times the
    energy (sar five times), where statistics of the target alone (`adabn`) bring most of the gain.
    Batch norms go by the statistics of their batch: small batches lose by it, and batches of one
    class at a time ruin it. A batch of one image, which has none, is answered as the model was
    trained, and adapts nothing. tent: every image teaches. eata: those that are sure and unlike the
    ones before, while what matters for the source stays near it (`anchor`; its importances are
    computed on the images held out). sar: those that are sure, by sharpness-aware steps; it begins
    again when it gets too sure.

    The guard asks the source model as well, a forward more per batch. Where the adapted answers
    are not surer than the source's by a tenth, or name half as many classes, over the last 256
    images or so, the source's weights come back and answer, and every fourth batch is looked at
    again; the record says how often. It also gives up what a source that is sure of wrong answers
    would have gained.

    A batch's answers are those from before its step. Each `live.served()` begins with the trained
    weights and gives them back at its end. It cannot be merged or exported.

    Example:
        >>> live = gv.wrap(resnet, gv.TestTime(method="tent"))
        >>> with live.served() as adapting:
        ...     answers = adapting.eval()(x)
    """

    name = "test_time"
    stage = "objective"
    tasks = frozenset({"classification"})
    instead = "entropy over classes is what it lowers: leave it out"
    neutral = None
    only_with: ClassVar[OnlyWith] = {
        "reliable": _CHOOSING,
        "redundant": ("method", ("eata",)),
        "anchor": ("method", ("eata",)),
        "rho": ("method", ("sar",)),
        "restart_below": ("method", ("sar",)),
    }
    examples: ClassVar = ({}, {"method": "eata", "guard": False}, {"method": "sar", "lr": 0.01})
    __test__: ClassVar[bool] = False  # no test, whatever pytest makes of the name

    method: Literal["tent", "eata", "sar"] = Field(
        default="tent", description="which images teach, and by which steps"
    )
    lr: float = Field(default=1e-3, gt=0, description="of the step after each batch")
    momentum: float = Field(default=0.9, ge=0, lt=1, description="of these steps")
    guard: bool = Field(
        default=True, description="fall back to the source model where adaptation makes it worse"
    )
    reset_every: int | None = Field(
        default=None, ge=1, description="batches after which the trained weights come back"
    )
    reliable: float = Field(
        default=0.4, gt=0, le=1, description="entropy below which an answer teaches, of ln(classes)"
    )
    redundant: float = Field(
        default=0.4,
        gt=0,
        le=1,
        description="cosine to the mean answer from which on one is nothing new; 0.05 for 1,000 "
        "classes",
    )
    anchor: float = Field(
        default=2000.0, ge=0, description="weight of the distance to the source's weights"
    )
    rho: float = Field(default=0.05, gt=0, description="how far the worst weights are looked for")
    restart_below: float = Field(
        default=0.2, ge=0, description="running entropy in nats at which it begins again"
    )

    def install(self, model: nn.Module) -> Installed:
        """Leave the model as it is. Raises BadInput where it has no norm with scale and shift."""
        norms = [m for m in model.modules() if isinstance(m, _NORMS) and m.weight is not None]
        if not norms:
            raise BadInput(
                f"test_time adapts scale and shift of norms, and this {type(model).__name__} has "
                "none"
            )
        return InstalledTestTime(self, model, norms)


class InstalledTestTime(Installed):
    """Adaptation at work, within `served`."""

    adapts = True
    unmergeable = "learns while it answers, so that no weights hold it"

    def __init__(self, request: TestTime, model: nn.Module, norms: list[Any]) -> None:
        super().__init__()
        self.request, self.model = request, model
        parameters = [p for m in norms for p in (m.weight, m.bias) if p is not None]
        self.parameters: list[nn.Parameter] = list(dict.fromkeys(parameters))
        self.by_batch = bool(batch_norms(model))
        self.calibrates = request.method == "eata" and request.anchor > 0
        self.fisher: list[Tensor] = []  # by parameter; none before `calibrate`
        self._counts: list[dict[str, int]] = []  # by stream

    @contextmanager
    def served(self) -> Iterator[None]:
        """Have each forward be followed by a step."""
        stream = _Stream(self)
        self._counts.append(stream.counts)
        with self._only_norms():
            try:
                with forwarding(self.model, partial(stream.answer, self.model.forward)):
                    yield
            finally:
                stream.reset()

    @contextmanager
    def _only_norms(self) -> Iterator[None]:
        """Let the norms' scales and shifts alone get gradients."""
        flags = {p: p.requires_grad for p in self.model.parameters()}
        for parameter in flags:
            parameter.requires_grad_(False)
        for parameter in self.parameters:
            parameter.requires_grad_(True)
        try:
            yield
        finally:
            for parameter, flag in flags.items():
                parameter.requires_grad_(flag)

    def calibrate(self, loader: Iterable[Any]) -> Mapping[str, Any]:
        """Compute how much each scale and shift matters to the trained model: the mean squared
        gradient of batches, by the labels it gives itself (EATA, equation 9)."""
        device, images = self.parameters[0].device, 0
        sums = [torch.zeros_like(p) for p in self.parameters]
        batches = 0
        with in_mode(self.model, False), self._only_norms(), torch.enable_grad():
            for part in (part for x, *_ in loader for part in x.split(_FISHER_BATCH)):
                if images >= _FISHER_IMAGES:
                    break
                logits = logits_of(self.model(part.to(device)))
                loss = F.cross_entropy(logits.float(), logits.argmax(1))
                for total, gradient in zip(sums, self.gradients(loss), strict=True):
                    if gradient is not None:
                        total += gradient.square()
                images, batches = images + len(part), batches + 1
        self.fisher = [total / max(batches, 1) for total in sums]
        return {"images": images}

    def gradients(self, loss: Tensor) -> Gradients:
        """Return those of the scales and shifts; None where one has no part in the loss."""
        return torch.autograd.grad(loss, self.parameters, allow_unused=True)

    def facts(self) -> Mapping[str, Any]:
        """Return, for each stream that was answered, how many batches and how many the guard gave
        to the source model, by its reason."""
        return {"test_time": [dict(c) for c in self._counts if c["batches"]]}

    def state_dict(self) -> dict[str, Tensor]:
        """Return the importances, where there are any."""
        return {f"fisher.{i}": f for i, f in enumerate(self.fisher)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Load what `state_dict` returned."""
        self.fisher = [
            state[f"fisher.{i}"].to(p, copy=True)
            for i, p in enumerate(self.parameters[: len(state)])
        ]


class _Stream:
    """One stream of batches, answered from its first on."""

    def __init__(self, live: InstalledTestTime) -> None:
        self.live, self.request = live, live.request
        self.source = [p.detach().clone() for p in live.parameters]
        self.guard = Guard(MARGIN if live.by_batch else 0.0)
        self.counts = {"batches": 0, "unsure": 0, "narrow": 0}
        self._fallen = ""  # why the source model answers
        self.reset()

    def reset(self) -> None:
        """Put the trained weights back, and forget what was learned."""
        self._put(self.source)
        self._velocity = [torch.zeros_like(p) for p in self.source]
        self._mean: Tensor | None = None  # eata: of the answers that taught
        self._sureness: float | None = None  # sar: running entropy
        self._moved = False

    def answer(self, forward: Callable[..., Any], x: Any, *args: Any, **kwargs: Any) -> Any:
        """Return the model's output of a batch, and learn from it."""
        ask, number = partial(forward, x, *args, **kwargs), self.counts["batches"]
        self.counts["batches"] += 1
        if self.live.by_batch and len(x) < 2:
            return self._source_answer(ask)
        if self.request.reset_every and number % self.request.reset_every == 0:
            self.reset()
        source = self._source_answer(ask) if self.request.guard else None
        if self._fallen and number % _RETRY:
            self.counts[self._fallen] += 1
            return source
        out = self._adapted(ask)
        if source is not None and not self.guard.trusts(logits_of(source), logits_of(out)):
            self._fallen = self.guard.reason
            self.counts[self._fallen] += 1
            self.reset()
            if self._fallen == "narrow":
                self.guard.clear()
            return source
        self._fallen = ""
        self._learn(logits_of(out), ask)
        return out

    def _adapted(self, ask: Callable[[], Any]) -> Any:
        with batch_statistics(self.live.model) if self.live.by_batch else nullcontext():
            return ask()

    def _source_answer(self, ask: Callable[[], Any]) -> Any:
        """Return what the trained model says."""
        now = [p.detach().clone() for p in self.live.parameters] if self._moved else None
        if now is not None:
            self._put(self.source)
        with torch.no_grad():
            out = ask()
        if now is not None:
            self._put(now)
        return out

    def _learn(self, logits: Tensor, ask: Callable[[], Any]) -> None:
        """Go the step that a batch teaches."""
        gradients = (
            self._sharp(logits, ask) if self.request.method == "sar" else self._plain(logits)
        )
        if gradients is not None:
            self._step(gradients)
        if self._sureness is not None and self._sureness < self.request.restart_below:
            self.reset()

    def _plain(self, logits: Tensor) -> Gradients | None:
        """Return the gradients of the entropy; of eata's choice of images, and with its anchor."""
        request, live = self.request, self.live
        if request.method == "tent":
            return live.gradients(entropy(logits).mean())
        weights, self._mean = eata_weights(logits, self._mean, request.reliable, request.redundant)
        loss = weighted_entropy(logits, weights)
        if loss is not None and live.fisher:
            loss = loss + request.anchor * anchor(live.parameters, self.source, live.fisher)
        return None if loss is None else live.gradients(loss)

    def _sharp(self, logits: Tensor, ask: Callable[[], Any]) -> Gradients | None:
        """Return the gradients at the worst weights nearby, of the images that are sure there,
        too."""
        request, parameters = self.request, self.live.parameters
        sure = entropy(logits) < limit(logits, request.reliable)
        if not sure.any():
            return None
        gradients = self.live.gradients(entropy(logits)[sure].mean())
        named = {str(i): g for i, g in enumerate(gradients) if g is not None}
        if not named or not finite(named.values()):
            return None
        before = [p.detach().clone() for p in parameters]
        step = ascent(named, {str(i): p for i, p in enumerate(before)}, request.rho)
        self._put([p + step.get(str(i), 0.0) for i, p in enumerate(before)])
        try:
            worst = logits_of(self._adapted(ask))
            sure = sure & (entropy(worst) < limit(worst, request.reliable))
            if not sure.any():
                return None
            loss = entropy(worst)[sure].mean()
            self._sureness = running(self._sureness, loss.item())
            return self.live.gradients(loss)
        finally:
            self._put(before)

    def _step(self, gradients: Gradients) -> None:
        """Go a step of SGD with momentum; one that is not finite is left out."""
        used = [g for g in gradients if g is not None]
        if not used or not finite(used):
            return
        self._moved = True
        with torch.no_grad():
            for p, v, gradient in zip(self.live.parameters, self._velocity, gradients, strict=True):
                if gradient is not None:
                    v.mul_(self.request.momentum).add_(gradient)
                    p.sub_(v, alpha=self.request.lr)

    def _put(self, values: list[Tensor]) -> None:
        with torch.no_grad():
            for parameter, value in zip(self.live.parameters, values, strict=True):
                parameter.copy_(value)
