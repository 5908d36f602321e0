"""From short runs on a few images to a whole training: accuracy by the learning curve, energy by
the cost of an image."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from scipy.optimize import nnls

from greenvis.planning.plan import BUSY_BAND

Figure = dict[str, float]  # {"value", "low", "high"}
SURE = 1.96  # standard errors each way: 95 %
UNSURE = 0.5  # of the slope of a learning curve, each way


def accuracy(points: Sequence[tuple[int, float]], images: int, tested: int) -> Figure:
    """Return the accuracy of a training on `images`, 0 to 1, from shorter ones by the same
    schedule.

    points: (images, accuracy) of those, in order. tested: how many images each accuracy is of. The
    error falls as a power of the training images (Cortes et al., 1993; Hestness et al., 2017): the
    value goes on from the last point with the slope that least squares give on logarithms, 0 where
    the error rose. The range is that of slopes half as steep and half as steep again, each with the
    last point's sampling error (95 %). It is a rule of thumb, not an interval with a level:
    `greenvis bench advise` says how often it holds. Curves that bend (a floor of wrong labels, a
    late start) leave it.
    """
    errors = [min(max(1 - a, 0.5 / tested), 1.0) for _, a in points]
    logs = np.log([n for n, _ in points])
    slope = max(0.0, -float(np.polyfit(logs, np.log(errors), 1)[0])) if len(points) > 1 else 0.0
    last, ahead = errors[-1], math.log(images / points[-1][0])
    sampling = SURE * math.sqrt(last * (1 - last) / tested)

    def after(steepness: float, error: float) -> float:
        return 1 - min(max(error, 0.0), 1.0) * math.exp(-steepness * slope * ahead)

    low, high = after(1 - UNSURE, last + sampling), after(1 + UNSURE, last - sampling)
    return {"value": after(1.0, last), "low": low, "high": high}


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
