"""Duets: the same images for each topic, and labels that follow from one another."""

from __future__ import annotations

import pytest
import torch

from greenvis.data import DataSpec, dataset
from greenvis.data.sets.duets import TOPICS, WEAR
from greenvis.data.sets.fashion_mnist import DEBIAN
from greenvis.errors import BadInput

HERE = pytest.mark.skipif(not DEBIAN.is_dir(), reason="Fashion-MNIST is not here")


@HERE
def test_topics_are_of_the_same_images() -> None:
    few = {"train": 30, "test": 20}
    read = {t: dataset.find(DataSpec(name=f"duets:{t}", **few)).read() for t in TOPICS}
    first = read["clothes"]
    assert all(torch.equal(r.train.images, first.train.images) for r in read.values())
    assert not torch.equal(first.train.images[:20], first.test.images)
    wear, digit = (read[t].test.labels for t in ("clothes", "digit"))
    assert torch.equal(read["both"].test.labels, 2 * torch.tensor(WEAR)[wear] + digit % 2)
    assert len(read["both"].classes) == 8
    shoes = wear == first.classes.index("Sneaker")
    assert set(read["both"].test.labels[shoes].tolist()) <= {4, 5}


def test_an_unknown_topic_is_refused_with_the_nearest() -> None:
    with pytest.raises(BadInput, match="digit"):
        dataset.find(DataSpec(name="duets:digits")).check()
