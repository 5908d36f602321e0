"""Accuracy on images whose labels nobody knows, from how sure a model is of its answers."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from greenvis import data
from greenvis.data.changes import SEVERITIES, Changed, parse
from greenvis.errors import BadInput, nearest
from greenvis.experiment.answers import Answers
from greenvis.planning.saved import Saved

TINY = 1e-12
AT_ONCE = 2000  # answers that are assigned to labels together


def average_confidence(source: Answers, target: Answers) -> float:
    """Return the mean probability of the likeliest class on the target (Hendrycks and Gimpel,
    2017). Costs no label; too high where a model is overconfident, as most are on what is new."""
    return float(_confidence(target).mean())


def difference_of_confidences(source: Answers, target: Answers) -> float:
    """Return the accuracy on the source, less what confidence falls by from there to the target
    (Guillory et al., 2021)."""
    fall = _confidence(source).mean() - _confidence(target).mean()
    return min(1.0, max(0.0, float(_right(source).mean() - fall)))


def atc(source: Answers, target: Answers) -> float:
    """Return the share of the target whose negative entropy lies above a threshold, which the
    source's accuracy says: as large a share of the source lies below it as is wrong there (average
    thresholded confidence: Garg et al., 2022, equations 2 and 3)."""
    return thresholded(_sureness(source), _right(source), _sureness(target))


def thresholded(source: Tensor, right: Tensor, target: Tensor) -> float:
    """Return the share of target scores that reach the threshold.

    Args:
        source: Scores (n,); the surer, the higher.
        right: Whether each answer of the source is right, 0 or 1 (n,).
        target: Scores (m,).
    """
    ordered, wrong = source.sort().values, int(len(right) - right.sum().round())
    if wrong == len(ordered):
        return float((target > ordered[-1]).double().mean())
    return float((target >= ordered[wrong]).double().mean())


def cot(source: Answers, target: Answers) -> float:
    """Return one less the mean cost of moving the target's probabilities onto labels that are as
    frequent as the source's (confidence optimal transport: Lu et al., 2023): a model that answers
    one class too often is found out. Wrong where classes are of other frequencies on the target."""
    return float(1 - _transport(target, source.labels).mean())


def cott(source: Answers, target: Answers) -> float:
    """Return the share of the target whose cost of `cot` lies below a threshold, which is chosen as
    that of `atc` (thresholded: Lu et al., 2023)."""
    labels = source.labels
    return thresholded(-_transport(source, labels), _right(source), -_transport(target, labels))


def _transport(of: Answers, labels: Tensor) -> Tensor:
    """Return what each answer costs, (n,), in the cheapest assignment to one-hot labels.

    Args:
        of: Probabilities p; label y costs the largest difference to one-hot y, which is 1 - p_y.
        labels: Of the source; each class is assigned as often as here.
    """
    p = of.probabilities.double().cpu()
    out = torch.empty(len(p), dtype=torch.float64)
    shuffled = torch.randperm(len(p), generator=torch.Generator().manual_seed(0))
    share = torch.bincount(labels, minlength=p.shape[1]).double() / len(labels)
    # the time of an assignment grows with the cube of its size
    for rows in shuffled.tensor_split(math.ceil(len(p) / AT_ONCE)):
        wanted = share * len(rows)
        counts = wanted.floor()
        rest = (wanted - counts).argsort(descending=True)[: len(rows) - int(counts.sum())]
        counts[rest] += 1
        classes = torch.arange(p.shape[1]).repeat_interleave(counts.long())
        cost = 1 - p[rows][:, classes]
        row, column = linear_sum_assignment(cost.numpy())
        out[rows[torch.from_numpy(row)]] = cost[row, column]
    return out


METHODS: dict[str, Callable[[Answers, Answers], float]] = {
    "average_confidence": average_confidence,
    "difference_of_confidences": difference_of_confidences,
    "atc": atc,
    "cot": cot,
    "cott": cott,
}


def estimate(run: str | Path, on: str, *, trust: bool = False) -> dict[str, Any]:
    """Estimate a finished run's accuracy on images of which no label is needed.

    Args:
        run: Its folder.
        on: A folder of images; of those in class folders the accuracy is measured too. Or a change
            of the run's own test ("noise:0.1"), whose labels are known.
        trust: Whether references may import code.

    Returns:
        {"on", "images", "estimates": by method of `METHODS`, "source": {"set", "images",
        "accuracy"}: the labelled images that it rests on, "measured": {"accuracy", "images",
        "errors": estimate less accuracy, by method} or None where no label is known, "skipped"}.

    Raises:
        BadInput: For a run that left no classifier, a folder without images, or data that cannot be
            read.
    """
    saved = Saved(run, trust)
    skipped: list[str] = []
    if (change := None if Path(on).exists() else parse(on)) is not None:
        shown: data.ImageSet = Changed(saved.data.test, change)
    elif Path(on).exists():
        own = saved.own_images(on)
        shown, skipped = own.images, own.skipped
    else:
        raise BadInput(
            f"'{on}' is neither a folder nor a change of the test, as noise:0.1"
            f"{nearest(on.partition(':')[0], SEVERITIES)}"
        )
    name = "test" if saved.data.held_out is None else "held_out"
    source = saved.answers(getattr(saved.data, name))
    return {"on": on, **compared(name, source, saved.answers(shown)), "skipped": skipped}


def compared(name: str, source: Answers, target: Answers) -> dict[str, Any]:
    """Return what `estimate` says of answers to labelled images, and to others.

    Args:
        name: Of the labelled ones.
        source: Answers to them.
        target: Answers to the others, whose labels are -1 where not known.
    """
    # no estimate sees a label of the target
    blind = Answers(target.logits, None, torch.full_like(target.labels, -1))
    estimates = {method: call(source, blind) for method, call in METHODS.items()}
    known = target.labels >= 0
    measured = None
    if known.any():
        every = bool(known.all())
        right = (target.logits.argmax(1) == target.labels)[known].double().mean()
        accuracy = float(right)
        measured = {
            "accuracy": accuracy,
            "images": int(known.sum()),
            # of some images alone it says nothing of an estimate for all
            "errors": {m: v - accuracy for m, v in estimates.items()} if every else None,
        }
    return {
        "images": len(target.labels),
        "estimates": estimates,
        "source": {
            "set": name,
            "images": len(source.labels),
            "accuracy": float(_right(source).mean()),
        },
        "measured": measured,
    }


def _confidence(of: Answers) -> Tensor:
    return of.probabilities.double().max(1).values


def _sureness(of: Answers) -> Tensor:
    """Return negative entropy, (n,)."""
    p = of.probabilities.double()
    return (p * p.clamp_min(TINY).log()).sum(1)


def _right(of: Answers) -> Tensor:
    return (of.logits.argmax(1) == of.labels).double()
