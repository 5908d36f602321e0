"""Confident learning: counts by hand, and the rows that cleanlab finds."""

from __future__ import annotations

import numpy as np
import pytest

from greenvis.data import label_errors


def _noisy(
    seed: int, images: int = 900, classes: int = 6
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return labels of which a third are wrong, what is right, and answers that know half of it."""
    generator = np.random.default_rng(seed)
    truth = generator.integers(classes - 1, size=images)  # one class has no image
    labels = np.where(generator.random(images) < 0.33, (truth + 2) % (classes - 1), truth)
    logits = generator.normal(size=(images, classes))
    logits[np.arange(images), truth] += 2.0 * generator.random(images) + 0.5
    logits[np.arange(images), labels] += 0.6
    e = np.exp(logits)
    return labels, truth, e / e.sum(1, keepdims=True)


def test_thresholds_and_joint_by_hand() -> None:
    labels = np.array([0, 0, 0, 1, 1])
    p = np.array([[0.9, 0.1], [0.6, 0.4], [0.2, 0.8], [0.3, 0.7], [0.7, 0.3]])
    bounds = label_errors.thresholds(labels, p)
    assert bounds == pytest.approx([1.7 / 3, 0.5])
    # sure answers: 0, 0 and 1 of those labelled 0; 1 and 0 of those labelled 1
    assert label_errors.confident_joint(labels, p).tolist() == [[2, 1], [1, 1]]
    assert label_errors.suspects(labels, p).tolist() == [2, 4]  # by how much likelier another is
    assert label_errors.suspects(np.array([0, 1]), np.eye(2)).tolist() == []


def test_rows_of_the_joint_are_the_counts_of_the_labels() -> None:
    labels, _, p = _noisy(0)
    joint = label_errors.confident_joint(labels, p)
    assert joint.sum(1).tolist() == np.bincount(labels, minlength=6).tolist()
    assert joint.min() >= 0


@pytest.mark.parametrize("seed", range(4))
def test_the_rows_are_those_of_cleanlab(seed: int) -> None:
    cleanlab = pytest.importorskip("cleanlab.filter", reason="the bench extra installs cleanlab")
    labels, truth, p = _noisy(seed)
    keep = np.arange(5)  # cleanlab takes classes that occur
    p = p[:, keep] / p[:, keep].sum(1, keepdims=True)
    own = np.zeros(len(labels), dtype=bool)
    own[label_errors.suspects(labels, p)] = True
    other = cleanlab.find_label_issues(labels, p, filter_by="prune_by_noise_rate", n_jobs=1)
    assert (own & other).sum() / (own | other).sum() >= 0.97
    wrong = labels != truth
    for base in (own, other):
        assert base.sum() > 100
    precision = [(wrong & base).sum() / base.sum() for base in (own, other)]
    recall = [(wrong & base).sum() / wrong.sum() for base in (own, other)]
    assert abs(precision[0] - precision[1]) <= 0.02
    assert abs(recall[0] - recall[1]) <= 0.02
