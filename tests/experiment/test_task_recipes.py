"""Each task from a recipe to a record: its metric, one unit of service, and its weights again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from greenvis import data, models
from greenvis.data.spec import DataSpec
from greenvis.experiment.session import run
from greenvis.meters import record
from greenvis.tasks import registry

TINY = {"ref": "timm/resnet10t"}
RECIPES: dict[str, dict[str, Any]] = {
    "generation": {"data": {"name": "digits"}, "model": {"ref": "plain/vae", "img_size": 8}},
    "image_text": {
        "data": {"name": "digits", "captions": "a {name}"},
        "model": {"ref": "plain/clip", "img_size": 8, "patch_size": 4, "embed_dim": 16},
    },
    "bags": {
        "data": {"name": "digits", "bags": {"size": 10, "positive": ["9"]}},
        "model": {**TINY, "head": "mean"},
    },
    "segmentation": {
        "data": {"name": "shapes:masks", "train": 16, "test": 16, "img_size": 32},
        "model": {**TINY, "head": "dense"},
        "techniques": [{"distill": {"teacher": "run:plain"}}],
    },
    "multilabel": {
        "data": {"name": "shapes:labels", "train": 32, "test": 32, "img_size": 32}, "model": TINY
    },
    "detection": {
        "data": {"name": "shapes:boxes", "train": 4, "test": 2, "img_size": 32},
        "model": {
            "ref": "torchvision/fasterrcnn_mobilenet_v3_large_320_fpn", "min_size": 64,
            "max_size": 64, "box_detections_per_img": 10,
        },
    },
}  # fmt: skip
SLOW = {"detection", "segmentation", "bags", "image_text"}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow if n in SLOW else ()) for n in RECIPES]
)
def test_a_recipe_trains_and_serves(name: str, tmp_path: Path) -> None:
    spec = dict(RECIPES[name])
    techniques = spec.pop("techniques", None)
    arms: dict[str, Any] = {"plain": {}}
    if techniques:
        arms["more"] = {"techniques": techniques}
    recipe = {"name": name, "task": name, "train": {"epochs": 1, "batch_size": 8}, "arms": arms}
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe | spec))
    run(path, runs=tmp_path / "runs")
    task = registry.find(name)()
    for arm in arms:
        (file,) = (tmp_path / "runs" / name / arm / "seed0").glob("*.jsonl")
        facts = record.read(file).facts
        for metric in task.metrics(3):
            assert facts[metric] >= 0
        assert facts["task"]["metrics"][0]["name"] == task.primary.name
        assert facts["images_per_s"] > 0
        assert facts["macs"] > 0
        weights = tmp_path / "runs" / name / arm / "seed0" / "model.safetensors"
        model = models.build(f"file:{weights}").eval()
        images = data.load(DataSpec(**spec["data"]))
        x, y = next(iter(data.batches(images.test, 2)))
        with torch.no_grad():
            task.check(task.answer(model, x, y), y)
