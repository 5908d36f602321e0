"""A run's model in other forms answers as the live one, carries its energy, and leaves nothing where it cannot go."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from greenvis import cli, data, experiment, models
from greenvis.errors import BadInput
from greenvis.export import FORMS, export

RECIPE = """\
name: small
data: {name: digits, train: 40, test: 20}
model: {ref: timm/vit_tiny_patch16_224, img_size: 8, patch_size: 2, embed_dim: 16, depth: 1, num_heads: 2}
train: {epochs: 1, batch_size: 20, threads: 1}
arms:
  lora: {techniques: [{lora: {rank: 2}}]}
  hf: {model: {ref: hf/vit, img_size: 8, patch_size: 2, embed_dim: 16, depth: 1, num_heads: 2}}
  net: {model: {ref: torchvision/shufflenet_v2_x0_5}}
meter: {codecarbon: false}
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export")
    (folder / "small.yaml").write_text(RECIPE)
    return experiment.run(folder / "small.yaml", runs=folder / "runs")


def test_every_form_answers_as_the_live_model(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for form in FORMS:
        out = tmp_path / form
        assert cli.main(["export", str(runs / "lora/seed0"), "--to", form, "--out", str(out), "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["max_difference"] <= (1e-5 if form in ("onnx", "torch.export") else 0.0)
        assert "co2_eq_emissions" in (out / "README.md").read_text()


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
    assert tuple(config["mean"]) == data.load("digits", train=40, test=20).train.transform.mean
    export(runs / "hf/seed0", "hub", tmp_path / "hf")
    live = models.build(f"file:{runs / 'hf/seed0/model.safetensors'}").eval()
    assert torch.equal(AutoModelForImageClassification.from_pretrained(tmp_path / "hf").eval()(x).logits, live(x).logits)


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
