"""Images that nobody labelled: which a person should label next, and how good a model is on
them."""

from __future__ import annotations

import csv
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from sklearn.datasets import load_digits

from greenvis.cli.main import main
from greenvis.experiment.answers import Answers
from greenvis.planning import estimate

CLASSES = ("null", "eins", "zwei")
QUICK = [
    "train.epochs=12",
    "train.seeds=[0]",
    "meter={codecarbon: false}",
    "data.img_size=8",
    "model={ref: plain/mlp, img_size: 8, hidden: [16]}",
]


def _write(folder: Path, per_class: dict[int, slice], flat: bool = False) -> None:
    digits: Any = load_digits()
    for number, which in per_class.items():
        for i, row in enumerate(np.flatnonzero(digits.target == number)[which]):
            target = folder if flat else folder / CLASSES[number]
            target.mkdir(parents=True, exist_ok=True)
            pixels = (digits.images[row] * 255 / 16).astype(np.uint8)
            Image.fromarray(pixels).convert("RGB").save(target / f"{number}-{i}.png")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder: few labelled images, many without a label, and a trained model."""
    folder = tmp_path_factory.mktemp("home")
    _write(folder / "labelled", dict.fromkeys(range(3), slice(0, 15)))
    _write(folder / "inbox", dict.fromkeys(range(3), slice(15, 35)), flat=True)
    _write(folder / "sorted", dict.fromkeys(range(3), slice(35, 60)))
    (folder / "inbox" / "broken.png").write_text("no image")
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(folder)
        words = ["init", "--images", "labelled", "--out", "my.yaml", "--goal", "train"]
        assert main([*words, "--model", "plain/mlp"]) == 0
        assert main(["run", "my.yaml", *(w for v in QUICK for w in ("--set", v)), "--json"]) == 0
    return folder


@pytest.fixture
def run(home: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(home)
    return str(sorted((home / "runs").rglob("model.safetensors"))[0].parent)


@pytest.mark.parametrize("query", ["badge", "typiclust"])
def test_a_new_user_gets_a_list_to_fill_in_and_a_contact_sheet(
    query: str, run: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "next"
    words = ["label-next", run, "--budget", "12", "--images", "inbox", "--query", query]
    assert main([*words, "--out", str(out)]) == 0
    text = capsys.readouterr().out
    assert "12 of 60 images" in text
    assert "left out: inbox/broken.png" in text
    with (out / "label-next.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["rank"] for row in rows] == [str(i) for i in range(1, 13)]
    assert len({row["image"] for row in rows}) == 12
    assert all(Path(row["image"]).is_file() and row["label"] == "" for row in rows)
    assert all(row["guess"] in CLASSES and 0 < float(row["confidence"]) <= 1 for row in rows)
    with Image.open(out / "label-next.png") as sheet:
        assert sheet.size[1] > 100
    # the person fills in the last column, and the list is a data set
    for row in rows:
        row["label"] = CLASSES[int(Path(row["image"]).name[0])]
    lines = [f"{Path(r['image']).resolve()},{r['label']}" for r in rows]
    (tmp_path / "filled.csv").write_text("\n".join(["path,label", *lines]))
    assert main(["init", "--images", str(tmp_path / "filled.csv"), "--out",
                 str(tmp_path / "more.yaml")]) == 0  # fmt: skip


@pytest.mark.slow
def test_of_a_run_on_few_labels_the_others_are_candidates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = {
        "name": "few",
        "data": {"name": "digits", "train": 90, "test": 40},
        "model": {"ref": "plain/mlp", "img_size": 8},
        "train": {"epochs": 2, "batch_size": 10},
        "arms": {
            "few": {"data": {"labels": 20}},
            "active": {"active": {"query": "margin", "start": 10, "step": 10, "rounds": 2}},
            "all": {},
        },
        "meter": {"codecarbon": False},
    }
    Path("few.yaml").write_text(yaml.safe_dump(recipe))
    assert main(["run", "few.yaml", "--json"]) == 0
    for arm in ("few", "active"):
        capsys.readouterr()
        words = ["label-next", f"runs/few/{arm}/seed0", "--budget", "70", "--query", "kcenter"]
        assert main([*words, "--json"]) == 0
        content = json.loads(capsys.readouterr().out)
        assert content["candidates"] == 70  # none that has a label
        assert main([*words, "--budget", "71"]) == 2
        assert "there are 70 without a label" in capsys.readouterr().err
    (bought,) = Path("runs/few/active/seed0").glob("*-rounds.json")
    for damaged in ("{}", '{"rounds": 3}', '{"rounds": [[900]]}'):
        bought.write_text(damaged)
        assert main(words) == 2
        assert str(bought) in capsys.readouterr().err
    assert main(["label-next", "runs/few/all/seed0"]) == 2
    assert "--images" in capsys.readouterr().err


def test_advice_for_a_folder_with_a_label_and_one_without(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(home)
    plans = tmp_path / "plans.yaml"
    learns = "{data: {unlabeled: $unlabeled}, techniques: [{consistency: {mu: 1}}]}"
    plans.write_text(f"train: {{epochs: 2}}\narms: {{labels: {{}}, agreement: {learns}}}\n")
    words = ["advise", "plain/mlp", "--data", "folder:labelled", "--unlabeled", "inbox",
             "--plans", str(plans), "--runs", str(tmp_path / "runs"), "--img-size", "8",
             "--in-chans", "3", "--serve", "10"]  # fmt: skip
    assert main([*words, "--labels", "45"]) == 2  # all there are; a fifth of them is the test
    assert "beside the test's: ask for 36 or fewer" in capsys.readouterr().err
    assert main([*words, "--labels", "36", "--json"]) == 0
    advice = json.loads(capsys.readouterr().out)
    assert (advice["images"], advice["unlabeled"], advice["refused"]) == (36, 60, {})
    head = Path(advice["recipe"]).read_text().splitlines()[0]
    assert "--labels 36 --unlabeled inbox" in head
    for recipe in (advice["recipe"], advice["plans"]):
        assert main(["run", recipe, "--runs", str(tmp_path / "runs"), "--json"]) == 0


def test_bad_input_changes_nothing(
    run: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    for words, why in (
        (["label-next", run, "--images", str(tmp_path / "empty")], "no image that can be read"),
        (["label-next", run, "--images", "inbox", "--query", "bagde"], "no query 'bagde'"),
        (["label-next", run, "--images", "inbox", "--budget", "61"], "but there are 60"),
        (["label-next", str(tmp_path)], "model.safetensors"),
        (["estimate", run, "--on", "nois:0.1"], "'noise'"),
        (["estimate", run, "--on", "nowhere"], "neither a folder"),
    ):
        out = [] if words[0] == "estimate" else ["--out", str(tmp_path / "next")]
        assert main([*words, *out]) == 2
        assert why in capsys.readouterr().err
        assert not (tmp_path / "next").exists()


def test_an_estimate_states_its_error_where_labels_are_known(
    run: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["estimate", run, "--on", "inbox", "--json"]) == 0
    blind = json.loads(capsys.readouterr().out)
    assert (blind["images"], blind["measured"]) == (60, None)
    assert {*blind["estimates"]} == {*estimate.METHODS}
    for on, images in (("sorted", 75), ("noise:0.1", 9)):
        assert main(["estimate", run, "--on", on, "--json"]) == 0
        content = json.loads(capsys.readouterr().out)
        measured = content["measured"]
        assert (content["images"], measured["images"]) == (images, images)
        for method, value in content["estimates"].items():
            assert 0 <= value <= 1
            assert measured["errors"][method] == pytest.approx(value - measured["accuracy"])
    assert main(["estimate", run, "--on", "sorted"]) == 0
    assert "error in points" in capsys.readouterr().out


def _answers(n: int, seed: int, scale: float) -> Answers:
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(4, (n,), generator=g)
    logits = scale * torch.randn(n, 4, generator=g)
    logits[torch.arange(n), labels] += 1
    return Answers(logits, None, labels)


def test_estimates_are_those_of_their_formulas() -> None:
    source, target = _answers(203, 0, 1.0), _answers(151, 1, 1.7)

    def figures(of: Answers) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        z = of.logits.double().numpy()
        p = np.exp(z) / np.exp(z).sum(1, keepdims=True)
        return p.max(1), (p * np.log(p)).sum(1), z.argmax(1) == of.labels.numpy()

    (sure, score, right), (other, other_score, _) = figures(source), figures(target)
    assert estimate.average_confidence(source, target) == pytest.approx(other.mean(), abs=1e-5)
    doc = right.mean() - (sure.mean() - other.mean())
    assert estimate.difference_of_confidences(source, target) == pytest.approx(doc, abs=1e-5)
    # the threshold by trying all: as large a share of the source above it as is right
    threshold = min(score, key=lambda t: abs((score >= t).mean() - right.mean()))
    assert (score >= threshold).mean() == pytest.approx(right.mean())
    assert estimate.atc(source, target) == pytest.approx((other_score >= threshold).mean())


def test_transport_is_the_cheapest_of_all_assignments() -> None:
    """Tried one by one; labels are as frequent as the source's."""
    source, target = _answers(6, 0, 1.0), _answers(6, 1, 1.7)
    p = target.probabilities.double().numpy()
    onehot = np.eye(4)[source.labels.numpy()]
    orders = [list(order) for order in itertools.permutations(range(6))]
    costs = [np.abs(p - onehot[order]).max(1) for order in orders]
    cheapest = min(costs, key=np.sum)
    assert estimate.cot(source, target) == pytest.approx(1 - cheapest.mean())
    # answers that are all of one class are as sure as ever, and wrong but for one class's share
    balanced = _answers(400, 0, 1.0)
    stuck = Answers(torch.tensor([[9.0, 0, 0, 0]]).expand(100, 4), None, torch.zeros(100).long())
    share = float((balanced.labels == 0).double().mean())
    assert estimate.average_confidence(balanced, stuck) > 0.99
    assert estimate.cot(balanced, stuck) == pytest.approx(share, abs=0.02)
    assert estimate.cott(balanced, balanced) == pytest.approx(
        float((balanced.logits.argmax(1) == balanced.labels).double().mean())
    )


def test_on_the_source_itself_thresholds_give_its_accuracy() -> None:
    source = _answers(203, 0, 1.0)
    right = (source.logits.argmax(1) == source.labels).double().mean()
    assert estimate.atc(source, source) == pytest.approx(float(right))
    assert estimate.difference_of_confidences(source, source) == pytest.approx(float(right))
    wrong = Answers(source.logits, None, (source.logits.argmax(1) + 1) % 4)
    assert estimate.atc(wrong, wrong) == 0


def test_no_estimate_sees_a_label_of_the_target() -> None:
    source, target = _answers(50, 0, 1.0), _answers(40, 1, 1.0)
    other = Answers(target.logits, None, (target.labels + 1) % 4)
    first, second = (estimate.compared("test", source, t) for t in (target, other))
    assert first["estimates"] == second["estimates"]
    assert first["measured"] != second["measured"]
