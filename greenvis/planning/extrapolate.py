"""From short runs on a few images to a whole training: the metric by the learning curve, energy by
the cost of an image."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from scipy.optimize import nnls

from greenvis.errors import BadInput
from greenvis.planning.plan import BUSY_BAND
from greenvis.report.measures import is_share, written
from greenvis.tasks.base import Measure

Figure = dict[str, float]  # {"value", "low", "high"}
SURE = 1.96  # standard errors each way: 95 %
UNSURE = 0.5  # of the slope of a learning curve, each way


def check(measure: Measure) -> None:
    """Refuse a metric whose curve is not known.

    Raises:
        BadInput: For one that is better the greater it is, without being a share of 1: what is
            missing to the best is not known.
    """
    if measure.higher_is_better and not is_share(measure):
        raise BadInput(
            f"how {written(measure)} goes on with more images is not known: it has no best value "
            "that errors could be counted from; run the plans (greenvis run) and compare them"
        )


def metric(
    points: Sequence[tuple[int, float]], images: int, tested: int, measure: Measure
) -> Figure:
    """Return the metric of a training on `images`, from shorter ones by the same schedule.

    The error falls as a power of the training images (Cortes et al., 1993; Hestness et al., 2017):
    the value goes on from the last point with the slope that least squares give on logarithms, 0
    where the error rose. The error is what a share lacks to 1, and the metric itself where less is
    better. The range is that of slopes half as steep and half as steep again, each with the last
    point's sampling error (95 %; of a share no more than that of a mean of as many zeros and ones,
    of others that of a root mean square of normal errors). It is a rule of thumb, not an interval
    with a level: `greenvis bench advise` says how often it holds. Curves that bend (a floor of
    wrong labels, a late start) leave it.

    Args:
        points: (images, metric) of the shorter ones, in order.
        images: Of the whole training.
        tested: How many samples each metric is of.
        measure: What the metric is; see `check`.

    Returns:
        In the metric's own unit; "low" is the smaller number, whichever end is good.
    """
    share = is_share(measure)
    if share:
        errors = [1 - value if measure.higher_is_better else value for _, value in points]
        errors = [min(max(error, 0.5 / tested), 1.0) for error in errors]
    else:
        errors = [max(value, math.ulp(1.0)) for _, value in points]
    logs = np.log([n for n, _ in points])
    slope = max(0.0, -float(np.polyfit(logs, np.log(errors), 1)[0])) if len(points) > 1 else 0.0
    last, ahead = errors[-1], math.log(images / points[-1][0])
    variance = last * (1 - last) / tested if share else last**2 / (2 * tested)
    sampling = SURE * math.sqrt(variance)

    def after(steepness: float, error: float) -> float:
        error = max(error, 0.0) * math.exp(-steepness * slope * ahead)
        error = min(error, 1.0) if share else error
        return 1 - error if measure.higher_is_better else error

    ends = after(1 - UNSURE, last + sampling), after(1 + UNSURE, last - sampling)
    return {"value": after(1.0, last), "low": min(ends), "high": max(ends)}


def energy(points: Sequence[tuple[int, float, float]], images: int) -> Figure:
    """Return the joules of a training on `images`, from shorter ones by the same schedule.

    points: (images, joules of the first epoch, joules of the later ones). The later ones cost so
    much an image. The first has a
    part that is always spent, too, and an image costs what it costs to see for the first time: a
    frozen part's outputs are kept from then on, which the few steps of `greenvis.plan` do not see.
    Least squares of relative errors, neither part below zero.
    """
    first = np.array([joules for _, joules, _ in points])
    rows = np.array([[1.0, n] for n, _, _ in points]) / first[:, None]
    (fixed, each), _ = nnls(rows, np.ones(len(points)))
    later = np.mean([joules / n for n, _, joules in points])
    return banded(float(fixed + (each + later) * images))


def banded(joules: float) -> Figure:
    """Return an energy with the band that a busy machine puts around it."""
    return {"value": joules, "low": joules * (1 - BUSY_BAND), "high": joules * (1 + BUSY_BAND)}
