"""Feature cache: the deep blocks of a diffusion network run at some steps only."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from greenvis.core.modes import in_mode
from greenvis.core.technique import Installed, Technique
from greenvis.errors import GreenvisError
from greenvis.models.drawing import Drawing
from greenvis.techniques.inference.sampling._models import (
    INSTEAD,
    TASKS,
    calls_counted,
    drawing_model,
)
from greenvis.techniques.inference.sampling._reuse import Decide, Reuse, whole_calls

LOOKED_AT = 32  # images drawn to fit a threshold on
HALVINGS = 20  # of the interval a threshold is looked for in


class FeatureCache(Technique):
    """Run the deep blocks of a diffusion network at some calls only, and use what they gave in
    between: every k-th call (DeepCache: Ma et al., 2024), or when the first block's change of its
    input differs from that of the last whole call (first-block cache, in the spirit of TeaCache:
    Liu et al., 2024).

    Saves the deep blocks' share of most calls, without training. Costs memory for what they gave,
    quality that grows with k, and loses to fewer steps of a good solver wherever that was tried:
    it is for models whose solver and steps are given. Of a U-Net the first way down and the last
    way up always run, of a chain of blocks the first one. Forgotten with each run, and held apart
    for each branch of guidance. With a `share` the threshold is fitted on images drawn after the
    training (`calibrate`). The model answers with the first of `every`, else with the threshold;
    all of them, and no cache, are operating points of the solver and steps that the model has.

    Example:
        >>> gv.FeatureCache(every=(2, 3)).names()
        ['every 2', 'every 3']
    """

    name = "feature_cache"
    stage = "objective"
    tasks = TASKS
    instead = INSTEAD
    breaks = frozenset({"bare_layers"})
    examples = ({}, {"every": [], "threshold": 0.1})
    neutral = None

    every: tuple[int, ...] = Field(default=(2,), description="k: of k calls one is whole")
    threshold: float | None = Field(
        default=None, gt=0, description="share by which the first block's change may differ"
    )
    share: float | None = Field(
        default=None, gt=0, lt=1, description="of the calls that are whole: fits the threshold"
    )

    @model_validator(mode="after")
    def _something(self) -> FeatureCache:
        if any(k < 2 for k in self.every):
            raise ValueError("'every' 1 caches nothing: choose 2 or more")
        if self.threshold is not None and self.share is not None:
            raise ValueError("'share' fits the threshold: leave one of them out")
        if not (self.every or self.threshold or self.share):
            raise ValueError("choose 'every', a 'threshold' or a 'share'")
        return self

    def names(self) -> list[str]:
        """Return what the settings of `every` are called."""
        return [f"every {k}" for k in self.every]

    def install(self, model: nn.Module) -> Installed:
        """Stand in for the deep blocks. Raises BadInput for a model that does not draw, or has no
        such blocks."""
        drawing = drawing_model(self.name, model)
        return InstalledFeatureCache(self, drawing, Reuse(drawing.network, lambda: drawing.runs))


class InstalledFeatureCache(Installed):
    """A network whose deep blocks may be left out."""

    unmergeable = (
        "what is used again lies between the calls of a run, and no weights hold it: serve the "
        "wrapped model"
    )

    def __init__(self, request: FeatureCache, model: Drawing, reuse: Reuse) -> None:
        super().__init__()
        self.request, self.model, self.reuse = request, model, reuse
        self.threshold = request.threshold
        self.calibrates = request.share is not None

    def rules(self) -> dict[str, Decide]:
        """Return when a call is whole, by the name of the setting."""
        out: dict[str, Decide] = {
            name: lambda since, change, k=k: since >= k
            for name, k in zip(self.request.names(), self.request.every, strict=True)
        }
        if self.threshold is not None:
            least = self.threshold
            out[f"change {least:.2g}"] = lambda since, change: change() >= least
        return out

    @contextmanager
    def caching(self, name: str = "") -> Iterator[None]:
        """Leave calls out within as the rule of a name says; "": none."""
        before = self.reuse.decide, self.model.cached
        self.reuse.decide, self.model.cached = self.rules().get(name), name
        self.reuse.restart()
        try:
            yield
        finally:
            self.reuse.decide, self.model.cached = before
            self.reuse.restart()

    def served(self) -> AbstractContextManager[Any]:
        """Hold the model at its first setting; whole, while a threshold is not fitted yet."""
        return self.caching(next(iter(self.rules()), ""))

    def operating_points(self) -> Mapping[str, AbstractContextManager[dict[str, Any]]]:
        """Return the model without cache, and each setting."""
        own = str(self.model.drawn_by)
        return {f"{own}, {name}" if name else own: self.at(name) for name in ("", *self.rules())}

    @contextmanager
    def at(self, name: str) -> Iterator[dict[str, Any]]:
        """Hold the model at a setting, and count calls.

        Yields:
            Facts: "network_calls" per image, "whole_calls" as a share of them.
        """
        before = [*self.reuse.calls]
        with self.caching(name), calls_counted(self.model) as facts:
            yield facts
        calls, whole = (now - then for now, then in zip(self.reuse.calls, before, strict=True))
        facts["whole_calls"] = whole / max(calls, 1)

    def calibrate(self, loader: Any) -> Mapping[str, Any]:
        """Fit the threshold: the least with which no more than `share` of the calls of a run
        without cache would be whole.

        Args:
            loader: Yields (x, y); the first labels are drawn.
        """
        share = self.request.share
        _, y = next(iter(loader))[:2]
        model, self.reuse.changes = self.model, []
        with in_mode(model, False), torch.no_grad(), self.caching():
            model.sample(y[:LOOKED_AT].to(next(model.parameters()).device))
        changes, self.reuse.changes = self.reuse.changes, None
        if share is None or len(changes) < 2:
            raise GreenvisError("a run of one call has nothing to use again: choose more steps")
        low, high = 0.0, 4.0
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            if whole_calls(changes, middle) <= max(1.0, share * len(changes)):
                high = middle
            else:
                low = middle
        self.threshold = high
        return {"threshold": high, "whole_calls": whole_calls(changes, high) / len(changes)}

    def state_dict(self) -> dict[str, Tensor]:
        """Return the fitted threshold."""
        if not self.calibrates or self.threshold is None:
            return {}
        return {"threshold": torch.tensor(self.threshold, dtype=torch.float64)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Load what `state_dict` returned."""
        if "threshold" in state:
            self.threshold = float(state["threshold"])
