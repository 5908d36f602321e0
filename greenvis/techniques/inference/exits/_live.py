"""Early exits at work: their loss, and the settings a finished model is switched between."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from greenvis.core import distributed
from greenvis.core.modes import in_mode
from greenvis.core.surgery import names_of
from greenvis.core.technique import Installed, logits_of
from greenvis.errors import BadInput, GreenvisError
from greenvis.tasks.answers import is_tensor, refuse_task, task_of
from greenvis.techniques._shared.rows import followed
from greenvis.techniques.inference.exits import _placement
from greenvis.techniques.inference.exits._calibration import Calibration, choose
from greenvis.techniques.inference.exits._confidence import NEVER, confidences, self_distillation
from greenvis.techniques.inference.exits._early_exit_runtime import Exits
from greenvis.techniques.inference.exits._rebatch import answer

if TYPE_CHECKING:
    from greenvis.techniques.inference.exits.early_exit import EarlyExit


SWEEP = {
    "max_prob": (0.99, 0.95, 0.9, 0.8, 0.6),
    "entropy": (0.95, 0.9, 0.8, 0.6, 0.4),
    "patience": (),
}


class InstalledEarlyExit(Installed):
    """The exits at work. paths: the modules they are behind. costs: MACs per image until each exit,
    and to the end.

    macs: of an image by the model without its exits.
    """

    def __init__(
        self, request: EarlyExit, exits: Exits, placement: _placement.Placement, costs: list[float]
    ) -> None:
        names = names_of(exits.model, (p for head in exits.heads for p in head.parameters()))
        super().__init__(names, freezes=request.base == "freeze")
        self.request, self.exits, self.costs = request, exits, costs
        self.paths, self.example = placement.paths, placement.view.example
        self.macs = placement.macs
        self.calibrates = request.target_drop is not None or request.budget is not None
        self.calibration: Calibration | None = None
        self.unmergeable = (
            "its exits are heads beside the model's own; export(live, exit=k) gives a plain model "
            "up to exit k"
        )

    @property
    def thresholds(self) -> list[float]:
        """From which confidence on a sample leaves at each exit; infinite: never. Set freely."""
        return self.exits.thresholds

    @thresholds.setter
    def thresholds(self, values: Iterable[float]) -> None:
        thresholds = [float(v) for v in values]
        if len(thresholds) != len(self.paths):
            raise BadInput(
                f"{len(thresholds)} thresholds for {len(self.paths)} exits: give one for each"
            )
        self.exits.thresholds[:] = thresholds

    def terms(self, x: Any, y: Any, logits: Tensor | None) -> Mapping[str, Tensor]:
        """Return {"early_exit": Σ weight · (cross-entropy + distill · self-distillation)}."""
        exit_logits, self.exits.last_logits = self.exits.last_logits, None
        if exit_logits is None or (self.request.distill and logits is None):
            raise GreenvisError(
                "early_exit adds its loss to a forward of the model in training mode: call "
                "model.train() and model(x)"
            )
        if not is_tensor(y):
            raise BadInput(
                f"early_exit learns from labels, one tensor (batch,), not {type(y).__name__}"
            )
        total = []
        for weight, early in zip(
            self.request.weights or [1.0] * len(exit_logits), exit_logits, strict=True
        ):
            loss = F.cross_entropy(early, y)
            if self.request.distill:
                loss = loss + self.request.distill * self_distillation(
                    early, logits_of(logits), self.request.temperature
                )
            total.append(weight * loss)
        return {self.request.name: torch.stack(total).sum()}

    def state_dict(self) -> dict[str, Tensor]:
        """Return the thresholds, float64 (exits,)."""
        return {"thresholds": torch.tensor(self.thresholds, dtype=torch.float64)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take the thresholds back."""
        if "thresholds" in state:
            self.thresholds = state["thresholds"].tolist()

    @contextmanager
    def at(
        self, thresholds: Iterable[float] | float, rebatch: bool = False
    ) -> Iterator[dict[str, Any]]:
        """Hold these thresholds within; then the mapping says how many samples left at each exit.

        Args:
            thresholds: one for all exits, or one per exit.
            rebatch: whether the mapping holds, under "answer", how a stream of batches is answered
                by `rebatched`.
        """
        before, facts = list(self.thresholds), dict[str, Any]()
        if rebatch:
            device = next(iter(self.exits.model.parameters())).device
            facts["answer"] = lambda batches: answer(
                self.exits, (x.to(device) for x in batches), None
            )
        self.thresholds = (
            [thresholds] * len(self.paths) if isinstance(thresholds, (int, float)) else thresholds
        )
        never = all(t == NEVER for t in self.thresholds)
        self.exits.tally = [0] * (len(self.paths) + 1)
        try:
            yield facts
        finally:
            self.thresholds, gone = before, list(self.exits.tally)
            total = max(sum(gone), 1)
            facts["exits"] = gone
            spent = sum(n * c for n, c in zip(gone, self.costs, strict=True)) / total
            facts["macs"] = self.macs if never else spent

    def operating_points(self) -> Mapping[str, AbstractContextManager[dict[str, Any]]]:
        """Return the settings a report compares: no early exit, some thresholds, and those
        calibrated or given."""
        points = {
            "never": self.at(NEVER),
            **{f"{t:g}": self.at(t) for t in SWEEP[self.request.criterion]},
        }
        if self.request.criterion == "patience":
            points |= {str(t): self.at(t) for t in range(len(self.paths) - 1, 0, -1)}
        if any(t < NEVER for t in self.thresholds):
            name = "calibrated" if self.calibration else "set"
            points[name] = self.at(list(self.thresholds))
            if not followed(self.exits.model):
                points[f"{name}, rebatched"] = self.at(list(self.thresholds), rebatch=True)
        return points

    def calibrate(self, loader: Iterable[Any]) -> Mapping[str, Any]:
        """Choose the thresholds as the request says, on samples that no training step has seen;
        return the facts."""
        request = self.request
        return self.choose_thresholds(
            loader, request.target_drop, request.budget, request.confidence
        ).as_dict()

    def choose_thresholds(
        self,
        loader: Iterable[Any],
        target_drop: float | None,
        budget: float | None,
        confidence: float,
    ) -> Calibration:
        """Choose thresholds, set them, and return what they do, as `early_exit.calibrate` says."""
        request = self.request
        logits, targets = self.logits(loader)
        refuse_task(request.name, request.tasks, request.instead, task_of(logits[-1], targets))
        how: dict[str, Any] = {
            "target_drop": target_drop, "budget": budget, "confidence": confidence
        }  # fmt: skip
        calibration = distributed.on_main(
            lambda: choose(logits, targets, self.costs, request.criterion, **how)
        )
        self.thresholds, self.calibration = calibration.thresholds, calibration
        return calibration

    def sureness(self, loader: Iterable[Any]) -> Tensor:
        """Return how sure every exit is of each sample.

        Args:
            loader: batches (x, y).

        Returns:
            float32 (exits, samples), the model's end last.
        """
        return confidences(self.logits(loader)[0], self.request.criterion)

    def logits(self, loader: Iterable[Any]) -> tuple[Tensor, Tensor]:
        """Return every exit's logits.

        Args:
            loader: batches (x, y).

        Returns:
            Logits, float32 (exits, samples, classes), the model's own last, and labels (samples,).

        Raises:
            BadInput: for a loader without samples.
        """
        model, rows, labels = self.exits.model, [], []
        device = next(iter(model.parameters())).device
        with in_mode(model, False), torch.inference_mode(), self.exits.record() as recorded:
            for x, y, *_ in loader:
                model(x.to(device))
                rows.append(torch.stack([s.float().cpu() for s in recorded]))
                labels.append(y.cpu())
        if not rows:
            raise BadInput("calibrate was given no samples: pass a loader of held-out (x, y)")
        return torch.cat(rows, 1), torch.cat(labels)
