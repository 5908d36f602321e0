"""A run's model in other forms answers as the live one, carries its energy, and leaves nothing
where it cannot go."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from greenvis import data, models
from greenvis.cli import main as cli
from greenvis.errors import BadInput
from greenvis.experiment import session
from greenvis.integrations.export import FORMS, export

RECIPE = """\
name: small
data: {name: digits, train: 40, test: 20}
model: {ref: timm/vit_tiny_patch16_224, img_size: 8, patch_size: 2, embed_dim: 16, depth: 1, num_heads: 2}
train: {epochs: 1, batch_size: 20, threads: 1}
arms:
  lora: {techniques: [{lora: {rank: 2}}]}
  hf: {model: {ref: hf/vit, img_size: 8, patch_size: 2, embed_dim: 16, depth: 1, num_heads: 2}}
  net: {model: {ref: torchvision/shufflenet_v2_x0_5}}
  tuned: {model: {init: run:lora}}
meter: {codecarbon: false}
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export")
    (folder / "small.yaml").write_text(RECIPE)
    return session.run(folder / "small.yaml", runs=folder / "runs")


@pytest.fixture(scope="module")
def exported(runs: Path) -> tuple[Path, dict[str, Any]]:
    """The model of one run in every form, each in a folder of its name, and what was said of it."""
    folder, said = runs / "exported", {}
    for form in FORMS:
        words = ["export", str(runs / "lora/seed0"), "--to", form, "--out", str(folder / form)]
        with contextlib.redirect_stdout(io.StringIO()) as out:
            assert cli.main([*words, "--json"]) == 0
        said[form] = json.loads(out.getvalue())
    return folder, said


def test_every_form_answers_as_the_live_model(exported: tuple[Path, dict[str, Any]]) -> None:
    folder, said = exported
    for form in FORMS:
        assert said[form]["max_difference"] <= (1e-5 if form in ("onnx", "torch.export") else 0.0)
        assert "co2_eq_emissions" in (folder / form / "README.md").read_text()


def test_a_hub_folder_is_loaded_by_the_library_alone(runs: Path, tmp_path: Path) -> None:
    import timm
    from timm.data.config import resolve_data_config
    from transformers import AutoModelForImageClassification

    x = torch.rand(3, 1, 8, 8)
    export(runs / "lora/seed0", "hub", tmp_path / "timm")
    again = timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True).eval()
    live = models.build(f"file:{runs / 'lora/seed0/model.safetensors'}").eval()
    assert torch.equal(again(x), live(x))
    config = resolve_data_config(model=again)
    assert (
        tuple(config["mean"])
        == data.load(data.DataSpec(name="digits", train=40, test=20)).train.transform.mean
    )
    export(runs / "hf/seed0", "hub", tmp_path / "hf")
    live = models.build(f"file:{runs / 'hf/seed0/model.safetensors'}").eval()
    assert torch.equal(
        AutoModelForImageClassification.from_pretrained(tmp_path / "hf").eval()(x).logits,
        live(x).logits,
    )


CLASSES = [str(i) for i in range(10)]


def _statistics() -> tuple[tuple[float, ...], tuple[float, ...]]:
    form = data.load(data.DataSpec(name="digits", train=40, test=20)).train.transform
    return form.mean, form.std


def test_a_timm_folder_claims_nothing_of_timms_own_weights(runs: Path, tmp_path: Path) -> None:
    import timm

    export(runs / "lora/seed0", "hub", tmp_path / "out")
    written = (tmp_path / "out" / "config.json").read_text()
    assert not [
        word
        for word in ("augreg", "in21k", "license", "apache", "bicubic", "storage.googleapis")
        if word in written
    ]
    config = json.loads(written)
    assert config["label_names"] == CLASSES
    own = config["pretrained_cfg"]
    assert (own["crop_pct"], own["crop_mode"], own["interpolation"]) == (1.0, "center", "bilinear")
    assert (tuple(own["mean"]), tuple(own["std"]), own["input_size"], own["num_classes"]) == (
        *_statistics(),
        [1, 8, 8],
        10,
    )
    again = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True)
    assert models.classes_of(again) == tuple(CLASSES)
    assert models.pixels_of(again) == _statistics()


def test_a_transformers_folder_prepares_images_as_the_run_did(runs: Path, tmp_path: Path) -> None:
    from transformers import AutoImageProcessor, AutoModelForImageClassification

    export(runs / "hf/seed0", "hub", tmp_path / "out")
    again = AutoModelForImageClassification.from_pretrained(tmp_path / "out")
    assert again.config.id2label == dict(enumerate(CLASSES))
    assert models.pixels_of(again) == _statistics()
    processor = AutoImageProcessor.from_pretrained(tmp_path / "out")
    image = torch.randint(0, 256, (1, 8, 8), dtype=torch.uint8)
    want = data.load(data.DataSpec(name="digits", train=40, test=20)).train.transform.normalise(
        image[None]
    )
    got = processor(image, return_tensors="pt", input_data_format="channels_first")["pixel_values"]
    assert torch.allclose(got, want, atol=1e-5)


@pytest.mark.one_in(2)
@pytest.mark.parametrize("arm", ["lora", "net", pytest.param("hf", marks=pytest.mark.slow)])
def test_onnx_names_classes_statistics_and_the_batch_axis(
    arm: str, runs: Path, exported: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    import onnx

    folder = exported[0] / "onnx"
    if arm != "lora":
        folder = tmp_path / arm
        export(runs / arm / "seed0", "onnx", folder)
    model = onnx.load(folder / "model.onnx")
    said = {
        p.key: json.loads(p.value)
        for p in model.metadata_props
        if p.key in ("labels", "mean", "std", "input_size")
    }
    mean, std = _statistics()
    assert said == {
        "labels": CLASSES,
        "mean": list(mean),
        "std": list(std),
        "input_size": [1, 8, 8],
    }
    for tensor in (model.graph.input[0], model.graph.output[0]):
        assert tensor.type.tensor_type.shape.dim[0].dim_param == "batch"


def test_every_form_and_its_card_say_what_was_done(
    runs: Path, exported: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    mean, _ = _statistics()
    folder, _ = exported
    for form in FORMS:
        card = (folder / form / "README.md").read_text()
        for words in (f"Form: {form}", "trained from scratch by this run", "Trained with: lora",
        str(mean[0]), "0, 1, 2, 3",
                      "(batch, 1, 8, 8)", "shorter side, bilinear"):  # fmt: skip
            assert words in card, (form, words)
    assert (
        json.loads((folder / "safetensors" / "model.json").read_text())["inputs"]["labels"]
        == CLASSES
    )
    extra = {"inputs.json": ""}
    torch.export.load(folder / "torch.export" / "model.pt2", extra_files=extra)
    assert json.loads(extra["inputs.json"])["mean"] == list(mean)
    export(runs / "tuned/seed0", "safetensors", tmp_path / "tuned")
    assert "began as those of run:lora" in (tmp_path / "tuned" / "README.md").read_text()


def test_weights_that_began_as_published_ones_say_whose(runs: Path) -> None:
    import timm

    from greenvis.integrations.export import _Job

    model = timm.create_model("vit_tiny_patch16_224", depth=1)
    facts = {"data": {}, "model": {"options": {"pretrained": True}}}
    job = _Job(model, torch.empty(0), runs, "timm/vit_tiny_patch16_224", {}, facts)
    assert job.began == (
        "began as the published weights of timm/vit_tiny_patch16_224 "
        "(timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k, "
        "apache-2.0), whose licence applies"
    )
    facts["model"] = {"options": {"pretrained": "somewhere/else/own.safetensors"}}
    assert job.began == "began as own.safetensors, whose licence applies"


def test_what_cannot_be_exported_says_so_and_leaves_nothing(runs: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="neither's"):
        export(runs / "net/seed0", "hub", tmp_path / "out")
    with pytest.raises(BadInput, match="did you mean 'onnx'"):
        export(runs / "lora/seed0", "onnxx", tmp_path / "out")
    with pytest.raises(BadInput, match="finished run"):
        export(runs, "onnx", tmp_path / "out")
    assert not list(tmp_path.iterdir())
    (tmp_path / "there").mkdir()
    with pytest.raises(BadInput, match="there already"):
        export(runs / "lora/seed0", "safetensors", tmp_path / "there")
    assert [p.name for p in tmp_path.iterdir()] == ["there"]
