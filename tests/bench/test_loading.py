"""The loading benchmark: both sides load every image, and the report says what was measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from greenvis.bench import loading
from greenvis.data import DataSpec, load


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "BATCH", 8)
    monkeypatch.setattr(loading, "SIDE", 32)


def test_both_load_every_image(tmp_path: Path) -> None:
    result = loading.run(images=20, rounds=2, workers=0, out=tmp_path / "out")
    (row,) = result["rows"]
    assert (row["images"], row["workers"]) == (20, 0)
    assert row["ours_per_s"] > 0
    assert row["imagefolder_per_s"] > 0
    assert row["met"] == (row["ratio"] >= row["target"])
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == result
    assert "20 JPEG files of 32 pixels" in (tmp_path / "out" / "report.md").read_text()


def test_both_show_the_same_pixels(tmp_path: Path) -> None:
    from torchvision.datasets import ImageFolder

    loading._write(tmp_path, 20)
    ours = load(DataSpec(name=f"folder:{tmp_path}", img_size=32)).train
    theirs = ImageFolder(str(tmp_path / "train"), loading.plain(ours.transform))
    assert ours.targets.tolist() == theirs.targets
    x, _ = ours.batch(range(20))
    shown = torch.stack([image for image, _ in theirs])
    torch.testing.assert_close(shown, x, atol=1e-6, rtol=0)
