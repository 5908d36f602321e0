"""Which labels are likely wrong, from out-of-sample answers: confident learning (Northcutt et al.,
2021), by noise rate."""

from __future__ import annotations

import numpy as np

_CLOSE = 1e-6  # probabilities this near to a threshold reach it


def thresholds(labels: np.ndarray, probabilities: np.ndarray) -> np.ndarray:
    """Return how sure an answer must be to count for a class, (classes,): the mean probability of
    the class among images labelled so (equation 2); infinite for a class without any.

    Args:
        labels: int (N,).
        probabilities: (N, classes), of models that have not seen the image.
    """
    classes = probabilities.shape[1]
    own = probabilities[np.arange(len(labels)), labels]
    counts = np.bincount(labels, minlength=classes)
    sums = np.bincount(labels, own, minlength=classes)
    return np.where(counts > 0, sums / np.maximum(counts, 1), np.inf)


def confident_joint(labels: np.ndarray, probabilities: np.ndarray) -> np.ndarray:
    """Return how many images are labelled i and are really j, int (classes, classes): counted where
    an answer is sure, then brought to the counts of the labels (equations 1 and 3).

    Args:
        labels: int (N,).
        probabilities: (N, classes).
    """
    classes = probabilities.shape[1]
    reached = probabilities >= thresholds(labels, probabilities) - _CLOSE
    likeliest = np.where(reached, probabilities, -1.0).argmax(1)
    rows = reached.any(1)
    pairs = labels[rows] * classes + likeliest[rows]
    joint = np.bincount(pairs, minlength=classes**2).reshape(classes, classes).astype(float)
    np.fill_diagonal(joint, joint.diagonal().clip(min=1))
    counts = np.bincount(labels, minlength=classes)
    scaled = joint * (counts / joint.sum(1))[:, None]
    floors = np.floor(scaled).astype(int)
    for row, missing in enumerate(counts - floors.sum(1)):  # the largest remainders round up
        order = np.argsort(-(scaled[row] - floors[row]), kind="stable")
        floors[row, order[:missing]] += 1
    return floors


def suspects(labels: np.ndarray, probabilities: np.ndarray) -> np.ndarray:
    """Return the images whose label is likely wrong, the likeliest first: int (n,).

    Of the images labelled i, for each class j as many as the joint has there, by how much likelier
    j is than i; an image whose likeliest class is its label is none.

    Args:
        labels: int (N,).
        probabilities: (N, classes).
    """
    joint = confident_joint(labels, probabilities)
    wrong = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        counts = joint[label].copy()
        counts[label] = 0
        if len(rows) < 2:
            continue
        for other in np.flatnonzero(counts):
            margin = probabilities[rows, other] - probabilities[rows, label]
            wrong[rows[np.argsort(-margin, kind="stable")[: counts[other]]]] = True
    own = probabilities[np.arange(len(labels)), labels]
    chosen = np.flatnonzero(wrong & (own < probabilities.max(1)))
    return chosen[np.argsort((own - probabilities.max(1))[chosen], kind="stable")]
