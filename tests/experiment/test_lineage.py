"""What a model was made from stands in its record and in its file, with what all of it cost; wrong
bases are refused early."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from transformers import ViTConfig, ViTForImageClassification

import greenvis as gv
from greenvis.cli.main import main
from greenvis.core import weights
from greenvis.errors import BadInput
from greenvis.experiment import lineage
from greenvis.meters import pricing, record
from greenvis.meters.pricing import run_energy
from greenvis.planning import probe
from greenvis.report import exports
from greenvis.report.shape import Results
from greenvis.tasks.base import Measure

RECIPE = """\
name: family
data: {name: digits, train: 100, test: 40}
model: {ref: timm/vit_tiny_patch16_224, img_size: 8, patch_size: 2, embed_dim: 16, depth: 2, num_heads: 2}
train: {epochs: 1, batch_size: 50, eval_every: 0, threads: 1}
arms:
  old: {techniques: [{mae: {decoder_depth: 1}}]}
  young: {techniques: [{reuse: {base: "run:old", keep_adapters: true}}]}
  youngest: {techniques: [{reuse: {base: ["run:young", "run:old"]}}]}
meter: {codecarbon: false}
"""


def _write(folder: Path, text: str = RECIPE, name: str = "family") -> Path:
    path = folder / f"{name}.yaml"
    path.write_text(text)
    return path


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lineage")
    gv.run(_write(folder), runs=folder / "runs")
    return folder


def _place(folder: Path, arm: str) -> Path:
    return folder / "runs" / "family" / arm / "seed0"


def _run(folder: Path, arm: str) -> record.Run:
    (path,) = record.find([_place(folder, arm)])
    return record.read(path)


def test_a_record_names_the_whole_lineage_and_who_builds_on_whom(finished: Path) -> None:
    youngest = _run(finished, "youngest")
    assert all(
        "energy_j" not in use and "components" not in use["observed"][0] for use in youngest.uses
    )  # metered alike
    lines = {use["name"]: use for use in pricing.uses(youngest)}
    assert {name: sorted(use["of"]) for name, use in lines.items()} == {
        "family/young": ["family/youngest seed 0"],
        "family/old": ["family/young seed 0", "family/youngest seed 0"],
    }
    assert all(use["role"] == "base" for use in lines.values())
    for arm in ("young", "old"):
        its = _run(finished, arm)
        assert lines[f"family/{arm}"]["runs"] == [its.id]
        assert lines[f"family/{arm}"]["energy_j"]["value"] == pytest.approx(run_energy(its).value)


def test_a_card_that_says_accuracy_is_read(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = _place(finished, "old") / "model.safetensors"
    stored = weights.metadata(path)
    del stored["card"]["metric"]
    stored["card"]["accuracy"] = 0.25
    monkeypatch.setattr(weights, "metadata", lambda path: stored)
    card = lineage.read_card(path)
    assert card["metric"] == {**Measure("accuracy")._asdict(), "value": 0.25}
    assert "accuracy" not in card


def test_a_file_carries_its_card(finished: Path, tmp_path: Path) -> None:
    shutil.copy(_place(finished, "youngest") / "model.safetensors", tmp_path / "alone.safetensors")
    card = lineage.read_card(tmp_path / "alone.safetensors")
    assert (card["arm"], card["seed"], card["ref"]) == (
        "family/youngest",
        0,
        "timm/vit_tiny_patch16_224",
    )
    assert card["data"]["name"] == "digits"
    reached = _run(finished, "youngest").facts["accuracy"]
    assert card["metric"] == {**Measure("accuracy")._asdict(), "value": reached}
    assert "run:young" in card["recipe"]
    own = [run_energy(_run(finished, arm)).value or 0.0 for arm in ("youngest", "young", "old")]
    assert card["energy_j"]["value"] == pytest.approx(own[0])
    assert card["total_j"]["value"] == pytest.approx(sum(own))  # old once, though two build on it
    drawn = [(depth, entry["name"].rpartition("/")[2]) for depth, _, entry in lineage.tree(card)]
    assert drawn == [(0, "youngest"), (1, "young"), (2, "old"), (1, "old")]


def test_the_command_prints_the_card(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["card", str(_place(finished, "young"))]) == 0
    said = capsys.readouterr().out
    assert "  base family/old, seed 0: " in said
    assert "with all it was made from: " in said
    assert main(["card", "--json", str(_place(finished, "old"))]) == 0
    assert json.loads(capsys.readouterr().out)["uses"] == []


@pytest.mark.slow
def test_a_file_as_base_brings_its_family_along(finished: Path, tmp_path: Path) -> None:
    shutil.copy(_place(finished, "young") / "model.safetensors", tmp_path / "young.safetensors")
    text = RECIPE.partition("arms:")[0] + (
        'arms:\n  tuned: {model: {init: "file:young.safetensors"}}\n'
        '  taught: {techniques: [{reuse: {base: "file:young.safetensors"}}]}\nmeter: {codecarbon: '
        "false}\n"
    )
    gv.run(_write(tmp_path, text), runs=tmp_path / "runs")
    for arm in ("tuned", "taught"):
        run = _run(tmp_path, arm)
        assert {(u["role"], u["name"]) for u in run.uses} == {
            ("base", "family/young"),
            ("base", "family/old"),
        }
        before = run.header["inputs"]
        assert before
    shutil.copy(_place(finished, "old") / "model.safetensors", tmp_path / "young.safetensors")
    gv.run(
        _write(tmp_path, text), runs=tmp_path / "runs"
    )  # another file of the same name is another base
    assert len(list(record.find([_place(tmp_path, "tuned")]))) == 2


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            ("data: {name: digits,", "data: {name: digits, normalise: false,"),
            "pixels normalised, but here they are from 0 to 1",
        ),
        (("BASE", "file:nowhere.safetensors"), "no weights at"),
        (("embed_dim: 16", "embed_dim: 24"), "do not fit"),
    ],
)
def test_refuses_a_base_that_cannot_be_before_anything_is_written(
    finished: Path, tmp_path: Path, change: tuple[str, str], says: str
) -> None:
    shutil.copy(_place(finished, "old") / "model.safetensors", tmp_path / "old.safetensors")
    text = (
        RECIPE.partition("arms:")[0]
        + 'arms:\n  tuned: {model: {init: "BASE"}}\nmeter: {codecarbon: false}\n'
    )
    text = text.replace(*change).replace("BASE", "file:old.safetensors")
    with pytest.raises(BadInput, match=says):
        gv.run(_write(tmp_path, text), runs=tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


def test_a_file_without_a_card_is_said_to_have_none(tmp_path: Path) -> None:
    from greenvis import models

    size: dict[str, Any] = {
        "img_size": 8,
        "patch_size": 2,
        "embed_dim": 16,
        "depth": 1,
        "num_heads": 2,
    }
    model = models.build("timm/vit_tiny_patch16_224", **size)
    models.save(model, tmp_path / "bare.safetensors", ref="timm/vit_tiny_patch16_224", options=size)
    with pytest.raises(BadInput, match="no card of how it was made"):
        lineage.read_card(tmp_path / "bare.safetensors")


def test_probe_evaluates_what_a_run_left(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    short = [
        "--set",
        "meter.codecarbon=false",
        "--set",
        "train.epochs=1",
        "--set",
        "arms.fine-tuned-1.train.epochs=1",
    ]
    place = _place(finished, "young")
    before = load_file(place / "model.safetensors")
    words = [
        "probe",
        str(place),
        *short,
        "--runs",
        str(tmp_path / "runs"),
        "--out",
        str(tmp_path / "out"),
    ]
    assert main(words) == 0
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert set(found["arms"]) == {
        "linear", "neighbours", "input-adapter", "encoder-adapters", "fine-tuned", "fine-tuned-10",
        "fine-tuned-1",
    }  # fmt: skip
    rows = found["arms"]
    assert all(
        row["accuracy"]["mean"] is not None and row["status"] == "done" for row in rows.values()
    )
    assert {u["name"] for u in rows["linear"]["uses"]} == {"family/young", "family/old"}
    (folder,) = (tmp_path / "runs").glob("probe-family-young.*epochs-1*")
    (few,) = record.find([folder / "fine-tuned-10"])
    assert record.read(few).facts["data"]["train"] == 10  # one of each class
    (near,) = record.find([folder / "neighbours"])
    assert any("nearest neighbours" in note for note in record.read(near).notes)
    after = load_file(place / "model.safetensors")
    assert all((after[name] == value).all() for name, value in before.items())


def test_probe_leaves_out_what_the_model_cannot_take(tmp_path: Path) -> None:
    text = RECIPE.partition("model:")[0] + (
        "model: {ref: plain/mlp, img_size: 8, hidden: [8]}\ntrain: {epochs: 1, threads: 1}\narms: "
        "{net: {}}\n"
        "meter: {codecarbon: false}\n"
    )
    gv.run(_write(tmp_path, text), runs=tmp_path / "runs")
    said: list[str] = []
    protocol = tmp_path / "few.yaml"
    protocol.write_text(
        "arms: {linear: {techniques: [linear_probe]}, adapters: {techniques: [adapter_probe]}}\n"
    )
    place = tmp_path / "runs" / "family" / "net"
    quiet = ["meter.codecarbon=false"]
    folder, recipe = probe.probe(
        place, protocol=protocol, overrides=quiet, runs=tmp_path / "runs", say=said.append
    )
    assert list(recipe.arms) == ["linear"]
    assert any(text.startswith("adapters: left out: ") for text in said)
    assert sorted(p.name for p in folder.iterdir() if p.is_dir()) == ["linear"]
    with pytest.raises(BadInput, match="give the folder of a finished run"):
        probe.probe(tmp_path)
    protocol.write_text("arms: {few: {labels: 2}}\n")
    with pytest.raises(BadInput, match="labels is 2"):
        probe.probe(place, protocol=protocol, runs=tmp_path / "runs")


def test_a_report_draws_the_family_with_the_energy_of_each_line(
    finished: Path, tmp_path: Path
) -> None:
    gv.report([finished / "runs" / "family"], out=tmp_path)
    found = json.loads((tmp_path / "results.json").read_text())["family"]
    own = {
        name: run_energy(_run(finished, name)).value or 0.0 for name in ("old", "young", "youngest")
    }
    assert {(link["of"], link["on"]) for link in found["links"]} == {
        ("family/young", "family/old"),
        ("family/youngest", "family/young"),
        ("family/youngest", "family/old"),
    }
    lines = {name.partition("/")[2]: member for name, member in found["members"].items()}
    assert lines["old"]["own_j"] == lines["old"]["line_j"] == pytest.approx(own["old"])
    above = lines["young"]["own_j"] + lines["old"]["own_j"]
    assert lines["young"]["line_j"] == pytest.approx(above)
    assert lines["youngest"]["line_j"] == pytest.approx(
        lines["youngest"]["own_j"] + above
    )  # old counts once
    assert "youngest" in (tmp_path / "figures" / "family.svg").read_text()
    assert "What was made from what" in (tmp_path / "report.md").read_text()


def test_a_report_of_nothing_that_builds_on_anything_has_no_family(
    finished: Path, tmp_path: Path
) -> None:
    gv.report([_place(finished, "old")], out=tmp_path)
    assert json.loads((tmp_path / "results.json").read_text())["family"] is None
    assert not (tmp_path / "figures" / "family.svg").exists()


@pytest.mark.one_in(3)
@pytest.mark.parametrize("way", ["pretrained", "init", "hf"])
def test_weights_made_by_others_are_named_at_a_cost_nobody_knows(tmp_path: Path, way: str) -> None:
    from greenvis import models

    size = "img_size: 8, patch_size: 2, embed_dim: 16, depth: 2, num_heads: 2"
    given: dict[str, Any] = {
        "img_size": 8,
        "patch_size": 2,
        "embed_dim": 16,
        "depth": 2,
        "num_heads": 2,
        "in_chans": 1,
    }
    save_file(
        models.build("timm/vit_tiny_patch16_224", **given).state_dict(),
        tmp_path / "theirs.safetensors",
    )
    refs = {
        "pretrained": f"timm/vit_tiny_patch16_224, {size}, pretrained: theirs.safetensors",
        "init": f'timm/vit_tiny_patch16_224, {size}, init: "file:theirs.safetensors"',
        "hf": "hf/theirs",
    }
    if way == "hf":
        config: dict[str, Any] = {
            "image_size": 8,
            "patch_size": 2,
            "num_channels": 1,
            "hidden_size": 16,
            "num_labels": 10,
        }
        config |= {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
        ViTForImageClassification(ViTConfig(**config)).save_pretrained(tmp_path / "theirs")
    text = RECIPE.partition("model:")[0] + (
        f"model: {{ref: {refs[way]}}}\ntrain: {{epochs: 1, batch_size: 50, eval_every: 0, threads: "
        f"1}}\n"
        "arms:\n  first: {}\n  probe: {techniques: [linear_probe]}\n"
        "  second: {model: {ref: plain/mlp, img_size: 8, hidden: [8]}, techniques: [{distill: "
        '{teacher: "run:first"}}]}\n'
        "meter: {codecarbon: false}\n"
    )
    gv.run(_write(tmp_path, text), runs=tmp_path / "runs")
    folder = gv.report([tmp_path / "runs"], out=tmp_path / "out", baseline="first").parent
    found = json.loads((folder / "results.json").read_text())
    (name,) = {u["name"] for u in found["arms"]["first"]["uses"]}
    assert "theirs" in name
    for arm in ("first", "probe", "second"):
        uses = {u["name"]: u for u in found["arms"][arm]["uses"]}
        assert (uses[name]["role"], uses[name]["energy_j"]["value"]) == ("base", None)
    second = found["arms"]["second"]
    (taught,) = [u["energy_j"]["value"] for u in second["uses"] if u["name"] == "family/first"]
    line = second["train_energy_j"]["value"] + taught
    assert second["train_energy_with_reuse_j"]["value"] == pytest.approx(
        line
    )  # what is known, and no zero for the rest
    assert found["family"]["members"]["family/second"]["line_j"] is None
    assert any(name in text and "not known" in text for text in found["not_counted"])
    page = (folder / "report.md").read_text()
    assert f"Not counted, for its cost is not known: {name}" in page.replace("\\_", "_")
    assert "| not known<br>base; not counted: " in page
    assert "| 0 J" not in re.findall(r"^\| probe<br>.*$", page, re.M)[0]
    card = exports.model_card(Results.from_json(found), "probe")
    assert '"training_type": "fine-tuning"' in card
    assert name in card.replace("\\_", "_")
    place = tmp_path / "runs" / "family" / "probe" / "seed0"
    assert lineage.read_card(place)["total_j"]["value"] is None
    assert main(["card", str(place)]) == 0


def test_random_weights_are_nobodys() -> None:
    from greenvis import models

    assert (
        models.published("timm/vit_tiny_patch16_224", pretrained=True)
        == "timm/vit_tiny_patch16_224 with published weights"
    )
    assert models.published("timm/vit_tiny_patch16_224", pretrained=None) is None
    assert models.published("hf/vit") is None
    assert models.published("plain/mlp", hidden=[8]) is None
