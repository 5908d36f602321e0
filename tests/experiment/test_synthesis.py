"""Images made for scarce classes: how many, of what, at whose cost, and how near to real ones."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor

from greenvis import data
from greenvis.data.splits import Split
from greenvis.data.transforms import Transform
from greenvis.errors import BadInput
from greenvis.experiment import jobs, session, synthesis
from greenvis.experiment.prepare import Prepared
from greenvis.experiment.recipe import SynthesisSpec, load_recipe
from greenvis.meters import record
from greenvis.meters.labels import counts
from greenvis.planning.plan import plan
from greenvis.report import frontier, report, results

NEARNESS = ("nearest_real", "real_apart", "copies")
ARMS = {
    "plain": {},
    "oversample": {"synthesis": {"by": "oversample"}},
    "cvae": {"synthesis": {"by": "cvae", "epochs": 3, "per_class": 20}},
}


def _recipe(folder: Path, arms: dict[str, Any], **of_data: Any) -> Path:
    recipe = {
        "name": "tiny",
        "data": {"name": "digits", "train": 300, "test": 60, "imbalance": 6, **of_data},
        "model": {"ref": "plain/mlp", "hidden": [16], "img_size": 8},
        "train": {"epochs": 2, "batch_size": 20},
        "arms": arms,
        "meter": {"codecarbon": False},
    }
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    return path


def _record(folder: Path, arm: str) -> record.Run:
    (run,) = [record.read(file) for file in record.find([folder / "runs/tiny" / arm])]
    return run


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("synthesis")
    session.run(_recipe(folder, ARMS), runs=folder / "runs")
    return folder


def _weights(folder: Path, arm: str) -> dict[str, Tensor]:
    return load_file(folder / "runs/tiny" / arm / "seed0/model.safetensors")


def test_made_images_are_charged_and_cost_no_label(finished: Path) -> None:
    plain, cvae = _record(finished, "plain"), _record(finished, "cvae")
    real, made = plain.facts["data"]["train"], cvae.facts["synthesis"]["made"]
    assert set(made) < {str(c) for c in range(10)}
    assert cvae.facts["data"]["train"] == real + sum(made.values())
    spent = [counts(run.labels, run.images) for run in (plain, cvae)]
    assert spent[0] is not None
    assert spent[1] is not None
    assert spent[0].labels == spent[1].labels
    assert spent[1].images == {**spent[0].images, "synthetic": sum(made.values())}
    assert cvae.sum("samples", "synthesis") == 3 * real
    assert (cvae.sum("flops", "synthesis") or 0) > 0
    assert cvae.sum("samples", "train") == 2 * (real + sum(made.values()))
    assert cvae.facts["synthesis"]["nearest_real"] > 0
    (file,) = (finished / "runs/tiny/cvae/seed0").glob("*" + jobs.SYNTHESIS_FILE)
    state = load_file(file)
    drawn = torch.bincount(state["labels"], minlength=10)
    assert {str(c): n for c, n in enumerate(drawn.tolist()) if n} == made


def test_a_report_says_how_near_they_come_and_counts_none_as_plain_training(
    finished: Path, tmp_path: Path
) -> None:
    told = results([finished / "runs"])
    assert {*frontier.plain_arms(told)} == {"plain", "oversample"}
    assert told.arms["cvae"].nearness == pytest.approx(
        {n: _record(finished, "cvae").facts["synthesis"][n] for n in NEARNESS}
    )
    report(finished / "runs", out=tmp_path / "out")
    assert "cvae: a made image lies " in (tmp_path / "out/report.md").read_text()


def test_oversampling_evens_the_classes_with_real_images_alone(finished: Path) -> None:
    run, plain = _record(finished, "oversample"), _record(finished, "plain")
    spent, alone = (counts(r.labels, r.images) for r in (run, plain))
    assert spent == alone
    most = run.facts["data"]["train"] // 10
    assert run.facts["data"]["train"] == 10 * most
    assert "nearest_real" not in run.facts["synthesis"]


def test_the_same_recipe_makes_the_same_images(finished: Path, tmp_path: Path) -> None:
    path = _recipe(tmp_path, {"cvae": ARMS["cvae"]})
    session.run(path, runs=tmp_path / "runs")
    first, second = _weights(finished, "cvae"), _weights(tmp_path, "cvae")
    assert all(torch.equal(first[n], second[n]) for n in first)
    # what was made once is read, as a run that goes on does
    (tmp_path / "runs/tiny/cvae/seed0/done.json").unlink()
    session.run(path, runs=tmp_path / "runs")
    runs = [record.read(file) for file in record.find([tmp_path / "runs"])]
    assert sorted(run.sum("samples", "synthesis") or 0 for run in runs)[0] == 0
    again = _weights(tmp_path, "cvae")
    assert all(torch.equal(first[n], again[n]) for n in first)


def _images(pixels: Tensor, labels: Tensor) -> data.ImageSet:
    form = Transform(4, 1, mean=(0.3,), std=(0.2,), augment="crop")
    return data.ImageSet(Split(pixels, labels), torch.arange(len(labels)), form)


def test_nearness_is_the_distance_to_the_nearest_real_image_of_the_class() -> None:
    g = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (17, 1, 4, 4), generator=g, dtype=torch.uint8)
    labels = torch.arange(17) % 3
    real, made = _images(pixels[:12], labels[:12]), _images(pixels[12:], labels[12:])
    x = pixels.flatten(1).numpy() / 255.0

    def nearest(at: int, others: list[int]) -> float:
        return min(float(np.sqrt(((x[at] - x[o]) ** 2).mean())) for o in others)

    same = {i: [j for j in range(12) if labels[j] == labels[i] and j != i] for i in range(17)}
    own = [nearest(i, same[i]) for i in range(12, 17)]
    apart = sorted(nearest(i, same[i]) for i in range(12))
    result = synthesis.nearness(real, made)
    assert result["nearest_real"] == pytest.approx(float(np.median(own)), abs=1e-5)
    assert result["real_apart"] == pytest.approx(apart[5], abs=1e-5)  # the lower median of twelve
    assert result["copies"] == 0
    copies = synthesis.nearness(real, _images(pixels[:7], labels[:7]))
    assert copies["copies"] == 7
    assert copies["nearest_real"] == pytest.approx(0, abs=1e-3)


def test_bad_input_says_what_to_do(tmp_path: Path) -> None:
    beside = {**ARMS["cvae"], "subset": {"per_class": 2}}
    with pytest.raises(BadInput, match=r"tiny.yaml:\d+: an arm has synthesis or subset"):
        load_recipe(_recipe(tmp_path, {"a": beside})).arm("a")
    with pytest.raises(BadInput, match="epochs"):
        load_recipe(_recipe(tmp_path, {"a": {"synthesis": {"by": "oversample", "epochs": 3}}}))
    few = {"a": {"synthesis": {"per_class": 2}}}
    with pytest.raises(BadInput, match="none has fewer"):
        session.run(_recipe(tmp_path, few), runs=tmp_path / "runs")
    labels = torch.tensor([0, 0, 1])
    big = _images(torch.zeros(3, 1, 4, 4, dtype=torch.uint8), labels)
    big = big.shown(Transform(256, 1))
    stand_in: Any = SimpleNamespace(images=SimpleNamespace(train=big))
    with pytest.raises(BadInput, match=r"set data\.img_size"):
        synthesis.planned(stand_in, SynthesisSpec(by="cvae"))
    with pytest.raises(BadInput, match="choose oversample, cvae, gan or diffusion"):
        synthesis.planned(stand_in, SynthesisSpec(by="layout"))
    assert not (tmp_path / "runs/tiny/a").exists()


@pytest.mark.parametrize("by", ["rule", "file"])
def test_objects_are_pasted_with_their_masks(by: str, tmp_path: Path) -> None:
    (tmp_path / "layout.json").write_text(
        '[[{"class": "star", "box": [0, 0, 0.4, 0.4]}, {"class": "ring", "box": [0.5, 0.5, 1, 1]}]]'
    )
    spec = {"by": "layout", **({"layout": "layout.json"} if by == "file" else {"per_class": 12})}
    path = tmp_path / "tiny.yaml"
    recipe = {
        "name": "tiny",
        "task": "segmentation",
        "data": {"name": "shapes:masks", "train": 16, "test": 8, "img_size": 32},
        "model": {"ref": "timm/resnet10t", "head": "dense"},
        "arms": {"a": {"synthesis": spec}},
    }
    path.write_text(yaml.safe_dump(recipe))
    every = jobs.Jobs(tmp_path / "runs")
    loaded = load_recipe(path)
    (job,) = every.of(loaded)
    images = every.images(loaded, job.arm, 0)
    prepared = Prepared(job, images, tmp_path / "runs", True, (), lambda job: prepared)
    with prepared.tracker(tmp_path / "runs") as tracker:
        train = prepared.training(tracker)
    (run,) = [record.read(file) for file in record.find([tmp_path / "runs"])]
    made = run.facts["synthesis"]["made"]
    assert len(train) == 16 + sum(made.values()) > 16
    x, y = train.batch(range(16, len(train)))
    assert x.shape[1:] == (3, 32, 32)
    assert y.shape == (len(train) - 16, 32, 32)
    star, ring = (images.classes.index(name) for name in ("star", "ring"))
    if by == "file":
        assert made == {str(star): 1}
        assert (y[0, :13, :13] == star).any()
        assert (y[0, 16:, 16:] == ring).any()
    else:
        showing = torch.stack([(train.batch(range(len(train)))[1] == c).any(2).any(1)
                               for c in range(1, len(images.classes))]).sum(1)  # fmt: skip
        pasted = [c for c in range(1, len(images.classes)) if str(c) in made]
        assert all(int(showing[c - 1]) >= 10 for c in pasted)  # some lie under others
    assert run.facts["synthesis"]["nearest_real"] > 0


def test_a_plan_counts_what_is_made(finished: Path, tmp_path: Path) -> None:
    planned = plan(_recipe(tmp_path, {"cvae": ARMS["cvae"]}), runs=tmp_path / "runs")
    run = _record(finished, "cvae")
    spent = sum(run.sum("flops", phase) or 0.0 for phase in ("train", "synthesis", "eval"))
    assert planned["arms"]["tiny/cvae"]["flops"]["value"] == pytest.approx(spent, rel=0.25)
