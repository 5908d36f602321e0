"""Early exit: heads behind some blocks answer for the samples they are sure of, and only the others
go on."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from typing import Any, Literal

from pydantic import Field
from torch import Tensor, nn

from greenvis.core.surgery import freeze
from greenvis.core.technique import InputShape, Installed, Technique
from greenvis.errors import BadInput
from greenvis.tasks.answers import CLASSES
from greenvis.techniques.inference.exits import _placement
from greenvis.techniques.inference.exits._calibration import Calibration
from greenvis.techniques.inference.exits._early_exit_runtime import Exits, Outer
from greenvis.techniques.inference.exits._live import InstalledEarlyExit
from greenvis.techniques.inference.exits._rebatch import answer
from greenvis.techniques.inference.exits._truncated import TruncatedModel, drop_unused


class EarlyExit(Technique):
    """Answer early where an exit is sure: heads behind some blocks, and a batch that shrinks as
    samples leave (Shallow-Deep Networks: Kaya et al., 2019; MSDNet: Huang et al., 2018).

    Saves inference energy as samples leave: the rest of the model runs on a smaller batch, or not
    at all. Costs the heads (a norm and a linear layer each), in training and for good, and small
    batches gain less. A convolutional network's first stages, on large maps, take more time than
    their share of the MACs, so less than the MACs say is saved there. In training the model gives
    its own logits, and the term "early_exit" adds each exit's cross-entropy. In eval samples leave
    once thresholds are set, by `threshold` or `calibrate`; until then nothing changes. `rebatched`
    answers a stream of batches by whole batches behind each exit, where small ones use the machine
    less well. Other outputs (hidden states) of samples that left are None.

    at: a number (after so many blocks), a share of the forward's MACs (0 to 1), or a module's path.
    criterion: "max_prob",
    "entropy" (1 − entropy / log classes) or "patience" (for how many exits in a row the answer
    stayed: Zhou et al., 2020).

    Example:
        >>> live = gv.wrap(model, gv.EarlyExit(at=(1,)))
        >>> sorted(live.terms(x, y, model(x)))
        ['early_exit']
        >>> sorted(live.operating_points())[:2]
        ['0.6', '0.8']
    """

    name = "early_exit"
    stage = "exits"
    needs = frozenset({"batch_independence"})
    breaks = frozenset({"every_block"})
    tasks = CLASSES
    instead = (
        "an exit is sure of one class; a smaller model, or fewer tokens, answers any task for less"
    )
    examples = (
        {},
        {"at": (0.4,), "base": "freeze", "distill": 0.5},
        {"at": (0.3, 0.6), "threshold": 0.25},
    )
    neutral = {"threshold": "never"}
    nothing = {"at": ("no.such.block",)}

    at: tuple[int | float | str, ...] = Field(
        default=(0.25, 0.5, 0.75), min_length=1, description="where the exits are"
    )
    base: Literal["train", "freeze"] = Field(
        default="train", description="train the model with its exits, or the exits alone"
    )
    pool: Literal["auto", "token", "mean", "both"] = Field(
        default="auto", description="what of a token sequence a head reads; auto: as the model's"
    )
    weights: tuple[float, ...] | None = Field(
        default=None, description="of each exit's loss; 1 each where absent (MSDNet)"
    )
    distill: float = Field(
        default=0.0, ge=0, description="factor of what the last exit teaches each"
    )
    temperature: float = Field(default=3.0, gt=0, description="softens both answers in that lesson")
    criterion: Literal["max_prob", "entropy", "patience"] = Field(
        default="max_prob", description="when an exit is sure"
    )
    threshold: Literal["never"] | float | tuple[float, ...] = Field(
        default="never", description="leave from here on; one, or one per exit"
    )
    target_drop: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        description="after training, choose thresholds that lose no more accuracy than this",
    )
    budget: float | None = Field(
        default=None,
        gt=0,
        le=1,
        description="after training, choose thresholds for this share of the MACs",
    )
    confidence: float = Field(
        default=0.95, ge=0.5, lt=1, description="with which the bound on the drop holds"
    )
    input_shape: InputShape = None

    def install(self, model: nn.Module) -> Installed:
        """Put the exits in. Raises BadInput where samples cannot leave without changing the others'
        answers."""
        if self.target_drop is not None and self.budget is not None:
            raise BadInput("early_exit takes target_drop or budget, not both")
        placement = _placement.find_placement(model, self.at, self.input_shape)
        for field, value in (("weights", self.weights), ("threshold", self.threshold)):
            if isinstance(value, tuple) and len(value) != len(placement.paths):
                raise BadInput(
                    f"early_exit: {field} has {len(value)} values, but there are "
                    f"{len(placement.paths)} exits"
                )
        exits = Exits(model, self.criterion, detach=self.base == "freeze")
        pool = _placement.pooling(model, placement.view) if self.pool == "auto" else self.pool
        _placement.attach_exits(exits, placement, pool)
        # the way in, and where answers meet
        outer = model.forward = Outer(exits, model.forward)  # type: ignore[method-assign]
        costs = _placement.try_out(exits, outer, placement)
        if self.threshold != "never":
            thresholds = (
                self.threshold
                if isinstance(self.threshold, tuple)
                else (self.threshold,) * len(placement.paths)
            )
            exits.thresholds[:] = [float(t) for t in thresholds]
        if self.base == "freeze":
            freeze(model, but=[p for head in exits.heads for p in head.parameters()])
        return InstalledEarlyExit(self, exits, placement, costs)


def calibrate(
    live: Any,
    loader: Iterable[Any],
    *,
    target_drop: float | None = None,
    budget: float | None = None,
    confidence: float = 0.95,
) -> Calibration:
    """Choose the thresholds of `live` on held-out samples, set them, and return what they do
    (`choose` says how).

    `live.save` keeps the thresholds. Of several processes all take what the first one's samples
    say.

    Args:
        live: what `wrap` returned.
        loader: batches (x, y) that no training step has seen, and that are not the test set.
        target_drop: accuracy that may be lost, 0 to 1, kept by an upper bound that holds with
            `confidence`; where no threshold keeps it, no sample leaves and `drop_upper` is 0.
        budget: mean MACs per image, as a share of the full model's.
        confidence: of the bound, 0 to 1.

    Returns:
        The thresholds, and the accuracy and MACs they give.

    Raises:
        BadInput: for a model without exits, for both goals or none, and for too few samples.
    """
    return _of(live).choose_thresholds(loader, target_drop, budget, confidence)


def rebatched(live: Any, batches: Iterable[Tensor], size: int | None = None) -> Iterator[Tensor]:
    """Answer a stream of batches so that behind each exit samples of several batches go on
    together, as one full batch.

    Saves energy where small batches use the machine less well, for answers that come later (dynamic
    rebatching, DREX: Liu et al., 2025). The answers are those that the model gives batch by batch,
    up to rounding; up to `size` − 1 samples wait behind each exit meanwhile. What still waits at
    the end goes on behind a forward of one image per exit.

    Args:
        live: what `wrap` returned.
        batches: images (batch, channels, height, width) on the model's device.
        size: samples from which a batch goes on behind an exit; None: as many as the first batch
            has.

    Returns:
        An iterator over the logits (batch, classes) of each batch in order, in inference mode, each
        once all its samples are answered: those of the last ones when `batches` ends.

    Raises:
        BadInput: where tokens merge or are pruned, too.
        GreenvisError: in training mode.
    """
    installed = _of(live)
    if size is not None and size < 1:
        raise BadInput(
            f"size is {size}: give the number of samples that go on together, such as 64"
        )
    return answer(installed.exits, batches, size)


def export(live: Any, exit: int) -> nn.Module:
    """Return a copy of the model that ends at this exit, static, without what lies behind.

    It holds no decision on data: torch.export, torch.compile and ONNX take it whole.

    Args:
        live: what `wrap` returned.
        exit: number of the exit, from 1.

    Returns:
        A module in eval mode: images (batch, channels, height, width) to logits (batch, classes).

    Raises:
        BadInput: for an exit that does not exist.
    """
    installed = _of(live)
    if not 1 <= exit <= len(installed.paths):
        raise BadInput(
            f"exit is {exit}; there are {len(installed.paths)}, numbered from 1 "
            f"({', '.join(installed.paths)})"
        )
    model = copy.deepcopy(installed.exits.model).eval().requires_grad_(False)
    outer: Any = model.forward
    outer.exits.only = exit - 1
    drop_unused(model, outer.exits, installed.example)
    return TruncatedModel(model).eval()


def _of(live: Any) -> InstalledEarlyExit:
    installed = [i for i in getattr(live, "installed", [live]) if isinstance(i, InstalledEarlyExit)]
    if not installed:
        raise BadInput(
            "this model has no early exits: wrap it with EarlyExit(…) and give what wrap() returned"
        )
    return installed[0]
