"""Images in bags are ranked within their bag, and a run of bags says how well."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

import greenvis as gv
from greenvis.experiment.instances import ranking_auc
from greenvis.meters.record import find, read


def test_ranking_is_a_mean_over_bags_with_both_and_ties_count_half() -> None:
    bag = torch.tensor([0, 0, 0, 1, 1, 1, 1, 2, 2])
    scores = torch.tensor([0.1, 0.9, 0.1, 7.0, 9.0, 8.0, 6.0, 3.0, 4.0])
    positive = torch.tensor([1, 0, 0, 1, 1, 0, 0, 0, 0]).bool()
    # bag 0: one of two pairs tied, the other lost; bag 1: three of four pairs won; bag 2 has none
    assert ranking_auc(scores, positive, bag) == pytest.approx((0.25 + 0.75) / 2)
    assert ranking_auc(scores, torch.zeros(9).bool(), bag) is None


RECIPE = """
name: bags
task: bags
data: {name: digits, train: 200, test: 100, bags: {size: 5, positive: ["9"]}}
model: {ref: timm/resnet10t, in_chans: 1, head: gated}
train: {epochs: 1, batch_size: 8, threads: 1}
arms: {gated: {}}
"""


def test_a_run_of_bags_records_its_ranking_and_draws_it(tmp_path: Path) -> None:
    file = tmp_path / "bags.yaml"
    file.write_text(RECIPE)
    folder = gv.run(file, runs=tmp_path / "runs")
    path = next(iter(find([folder])))
    run = read(path)
    assert run.status == "done"
    assert 0 <= run.facts["instance_auc"] <= 1
    assert Image.open(path.parent / "instances.png").size[0] > 100
