"""How well a frozen base's features suit new labels, without training: LogME, H-score, SFDA, and
PED before any of them.

Features are what a model gives for images of the new task, (images, dim); labels are theirs,
(images,). Everything is computed in float64. Scores compare bases on one data set; they mean
nothing across data sets, and those of one kind nothing beside those of another.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from sklearn.covariance import ledoit_wolf
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

from greenvis.errors import BadInput

Array = np.ndarray[Any, np.dtype[Any]]
# of PED; its authors choose them by hand, data set by data set: these are among theirs
N_SIGMA, STEP = (0.6, 0.5)
MAX_STEPS, EXIT_RATIO = 6, 0.5
_ITERATIONS, _TOLERANCE = 11, 1e-3  # of LogME's fixed point
_LEAST_DEVIATION = 1e-3  # of a dimension, by which PED divides
# of SFDA: without the floor fewer images than dimensions have no discriminant
_SOFTENING, _LEAST_SHRINKAGE = (5.0, 1e-10)
_MULTIPLICATIONS = 5  # of SFDA's power iteration


def logme(features: Any, labels: Any) -> float:
    """Return the log of maximum evidence of the labels given the features, per image (LogME: You et
    al., 2021).

    A linear model with Gaussian prior and noise predicts each class's one-hot labels; both
    variances are those that make the labels likeliest, found by a fixed point. The mean over
    classes; higher is better. Costs one SVD of the features.
    """
    x, y = checked(features, labels)
    count, dim = x.shape
    u, values, _ = np.linalg.svd(x, full_matrices=False)
    power = values**2
    evidences = []
    for number in range(int(y.max()) + 1):
        target = (y == number).astype(np.float64)
        along = (u.T @ target) ** 2
        # what no direction of the features reaches
        beyond = max(float(target @ target - along.sum()), 0.0)
        prior = noise = 1.0
        weight = residual = 0.0
        for _ in range(_ITERATIONS):
            ratio = prior / noise
            effective = (power / (power + ratio)).sum()
            weight = float((power * along / (power + ratio) ** 2).sum())
            residual = float((along / (1 + power / ratio) ** 2).sum()) + beyond
            prior, noise = effective / (weight + 1e-5), (count - effective) / (residual + 1e-5)
            if abs(prior / noise - ratio) <= _TOLERANCE * ratio:
                break
        determinant = np.log(prior + noise * power).sum() + (dim - len(power)) * math.log(prior)
        fit = (
            dim * math.log(prior)
            + count * math.log(noise / (2 * math.pi))
            - noise * residual
            - prior * weight
        )
        evidences.append((fit - determinant) / (2 * count))
    return float(np.mean(evidences))


def h_score(features: Any, labels: Any) -> float:
    """Return the H-score: the trace of the features' inverse covariance times that of their class
    means.

    (Bao et al., 2019; with Ledoit and Wolf's shrinkage of both covariances, as Ibrahim et al.,
    2022, found it must have where images are not many more than dimensions.) 0 to classes - 1;
    higher is better. Costs one inverse of (dim, dim).
    """
    x, y = checked(features, labels)
    x = x - x.mean(0)
    covariance, shrinkage = ledoit_wolf(x, assume_centered=True)
    means, _ = _means(x, y)
    between = (means[y].T @ means[y]) / len(x)
    return float((1 - shrinkage) * np.trace(np.linalg.pinv(covariance, hermitian=True) @ between))


def sfda(features: Any, labels: Any) -> float:
    """Return the self-challenging Fisher score (SFDA: Shao et al., 2022), the mean chance of the
    right class, 0 to 1.

    A linear discriminant, its within-class covariance shrunk by max(exp(-5 · its largest
    eigenvalue), 1e-10), says how sure each image's class is; every image is then drawn towards the
    mean of the other classes' means, each class counting once, by as much as it is unsure, and a
    second discriminant with the same shrinkage judges these harder images. Both are judged on
    the images they were made from: with as many dimensions as images any labels score about 1, so
    compare bases that have far fewer. Costs two discriminants.
    """
    x, y = checked(features, labels)
    means, _ = _means(x, y)
    others = (means.sum(0) - means) / (len(means) - 1)
    spread = x - means[y]
    largest = _largest_eigenvalue(spread.T @ spread / len(x))
    shrinkage = max(math.exp(-_SOFTENING * largest), _LEAST_SHRINKAGE)
    rows = np.arange(len(x))
    chances = np.exp(_chances(x, y, shrinkage))
    sure = (chances[rows, y] / chances.sum(1))[:, None]
    return float(_chances(sure * x + (1 - sure) * others[y], y, shrinkage)[rows, y].mean())


@dataclass(frozen=True)
class Fall:
    """One step of PED. features: (images, dim) after it, in their own units; moved: how far class
    centres moved, summed over classes and dimensions of the rescaled space; ratio: that over the
    first step's, 1 at the first.
    """

    features: Array
    moved: float
    ratio: float


def ped(
    features: Any, labels: Any, general: Any = None, *, n_sigma: float = N_SIGMA, step: float = STEP
) -> Array:
    """Return the features (images, dim) once the potential energy of overlapping classes has fallen
    (PED: Li et al., 2023).

    Score what comes back with `logme`, `h_score` or `sfda`. Fine-tuning parts classes that overlap:
    each class is a ball about its mean whose radius is `n_sigma` deviations, balls that overlap
    push each other apart along the line of their centres, and classes move as whole bodies for a
    time `step`, again and again, up to six times, until they move by no more than half of what they
    did first; that last step is not taken. Classes that do not overlap stay where they are.
    general: features (images, dim) of general images whose deviations, 1e-3 at least, are the unit
    of each dimension (ImageNet's, in the paper); the features themselves where absent. Costs a mean
    and a variance a class.
    """
    steps = ped_steps(features, labels, general, n_sigma=n_sigma, step=step)
    steep = [fall for fall in steps if fall.ratio > EXIT_RATIO]
    return steep[-1].features if steep else checked(features, labels)[0]


def ped_steps(
    features: Any, labels: Any, general: Any = None, *, n_sigma: float = N_SIGMA, step: float = STEP
) -> list[Fall]:
    """Return PED's steps in turn, the one at which it stops included; none where no two classes
    overlap. See `ped`."""
    x, y = checked(features, labels)
    scale = x.std(0) if general is None else np.asarray(general, dtype=np.float64).std(0)
    if scale.shape != x.shape[1:]:
        raise BadInput(
            f"ped: general features of {scale.shape} dimensions beside features of {x.shape[1:]}"
        )
    scale = np.maximum(scale, _LEAST_DEVIATION)
    means, counts = _means(x / scale, y)
    radii = n_sigma * np.sqrt(_within(x / scale, means, y, counts))
    moved = np.zeros_like(means)
    steps: list[Fall] = []
    for _ in range(MAX_STEPS):
        change = _pushed(means + moved, radii, step)
        size = float(np.abs(change).sum())
        if size == 0:
            break
        moved = moved + change
        ratio = size / steps[0].moved if steps else 1.0
        steps.append(Fall(x + (moved * scale)[y], size, ratio))
        if ratio <= EXIT_RATIO:
            break
    return steps


def _pushed(centres: Array, radii: Array, step: float) -> Array:
    """Return how far each ball moves (classes, dim): half the squared time times the force, at most
    the overlap itself."""
    apart = centres[:, None] - centres[None]
    distance = np.linalg.norm(apart, axis=-1)
    overlap = np.maximum(radii[:, None] + radii[None] - distance, 0.0)
    travel = np.minimum(overlap * step**2 / 2, overlap)
    away = np.divide(
        apart, distance[..., None], out=np.zeros_like(apart), where=distance[..., None] > 0
    )
    return (travel[..., None] * away).sum(1)


def checked(features: Any, labels: Any) -> tuple[Array, Array]:
    """Return features (N, dim) in float64 and labels numbered 0, 1, … (N,). Raises BadInput for
    what cannot be scored."""
    x, y = np.asarray(features, dtype=np.float64), np.asarray(labels)
    if x.ndim != 2 or y.shape != x.shape[:1]:
        raise BadInput(
            f"transfer scores take features (images, dim) and labels (images,), not {x.shape} and "
            f"{y.shape}"
        )
    if not np.isfinite(x).all():
        raise BadInput(
            "transfer scores: some features are not finite; look at the base and at the data's "
            "normalisation"
        )
    classes, y = np.unique(y, return_inverse=True)
    if len(classes) < 2 or len(x) <= len(classes):
        raise BadInput(
            f"transfer scores need two classes and more images than classes, not {len(x)} images "
            f"of {len(classes)}"
        )
    return x, y


def _means(x: Array, y: Array) -> tuple[Array, Array]:
    """Return the classes' means (classes, dim) and counts (classes,)."""
    counts = np.bincount(y)
    sums = np.zeros((len(counts), x.shape[1]))
    np.add.at(sums, y, x)
    return sums / counts[:, None], counts


def _within(x: Array, means: Array, y: Array, counts: Array) -> Array:
    """Return each class's variance summed over dimensions, (classes,)."""
    return np.bincount(y, weights=((x - means[y]) ** 2).sum(1)) / counts


def _largest_eigenvalue(matrix: Array) -> float:
    """Return the greatest eigenvalue of a covariance, from a few power iterations: as near as the
    published score has it."""
    vector = matrix.sum(1)
    for _ in range(_MULTIPLICATIONS):
        vector = matrix @ vector
        size = np.linalg.norm(vector)
        if size == 0:
            return 0.0
        vector = vector / size
    return float(np.linalg.norm(matrix @ vector))


def _chances(x: Array, y: Array, shrinkage: float) -> Array:
    """Return each image's chances of each class (images, classes) under a linear discriminant."""
    return LinearDiscriminantAnalysis(solver="lsqr", shrinkage=shrinkage).fit(x, y).predict_proba(x)


SCORES = {"logme": logme, "h_score": h_score, "sfda": sfda}
