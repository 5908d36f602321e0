"""Advice: which plans fit, what short trials foretell, which plan is taken, and what is refused
before anything is spent."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from greenvis.bench import advise as bench
from greenvis.cli import main as cli
from greenvis.cli import planning
from greenvis.errors import BadInput, GreenvisError
from greenvis.experiment import session
from greenvis.experiment.recipe import load_recipe
from greenvis.meters import record
from greenvis.planning import trials
from greenvis.planning.advise import ACCURACY, advise, choose, joules
from greenvis.planning.candidates import FEW_LABELS as FEW_PLANS
from greenvis.planning.candidates import PLANS, source
from greenvis.planning.extrapolate import check, energy, metric
from greenvis.tasks import registry
from greenvis.tasks.base import Measure

SMALL = {"img_size": 8, "patch_size": 2, "embed_dim": 12, "depth": 2, "num_heads": 2}
REF = "timm/vit_tiny_patch16_224"
OVER = ["data.train=160", "data.test=40", "train.threads=1", "train.epochs=2"]
OPTIONS = [word for key, value in SMALL.items() for word in ("--option", f"{key}={value}")]
FEW = """\
train: {batch_size: 10, eval_every: 0}
arms:
  all: {}
  merged: {techniques: [{token_merge: {r: $merge}}]}
  head: {train: {lr: 1.0e-2}, techniques: [{linear_probe: {cache: true}}]}
  narrow: {techniques: [{lora: {targets: [conv]}}]}
  pruned: {techniques: [{prune: {ratio: 0.5}}]}
  taught: {techniques: [{distill: {teacher: $teacher}}]}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of plans."""
    place = tmp_path_factory.mktemp("advised")
    (place / "few.yaml").write_text(FEW)
    return place


@pytest.fixture(scope="module")
def advice(folder: Path) -> dict[str, Any]:
    """Advice on three classes of digits."""
    over = [*OVER, "data.classes=[0,1,2]"]
    return advise(
        REF,
        "digits",
        serve=1000,
        plans=folder / "few.yaml",
        overrides=over,
        runs=folder / "runs",
        out=folder / "advised.yaml",
        **SMALL,
    )


def test_every_plan_that_fits_is_tried_and_the_others_say_why_not(advice: dict[str, Any]) -> None:
    assert {row["plan"] for row in advice["rows"]} == {"all", "merged", "head", "pruned"}
    assert "no 'conv'" in advice["refused"]["narrow"]
    assert "--teacher" in advice["refused"]["taught"]
    sizes = {row["plan"]: [t["images"] for t in row["trials"]] for row in advice["rows"]}
    assert all(its[:2] == [10, 20] for its in sizes.values())
    assert sum(its[2:] == [40] for its in sizes.values()) >= 2
    assert advice["held"] == 120
    for row in advice["rows"]:
        for key in ("metric", "train_energy_j", "serve_energy_j", "total_energy_j"):
            assert 0 <= row[key]["low"] <= row[key]["value"] <= row[key]["high"]
        for bound in ("value", "low", "high"):
            total = row["train_energy_j"][bound] + row["serve_energy_j"][bound]
            assert row["total_energy_j"][bound] == pytest.approx(total)  # 1,000 images are served
    served = {row["plan"]: row["serve_energy_j"]["value"] for row in advice["rows"]}
    assert served["all"] == served["head"], "what serves the same model costs the same"
    (smaller,) = (row["trials"] for row in advice["rows"] if row["plan"] == "pruned")
    assert any(trial["served_j"] for trial in smaller), "a smaller one is read by itself"


def test_the_front_is_what_nothing_beats(advice: dict[str, Any]) -> None:
    for row in advice["rows"]:
        beaten = any(
            other["total_energy_j"]["value"] < row["total_energy_j"]["value"]
            and other["metric"]["value"] >= row["metric"]["value"]
            for other in advice["rows"]
        )
        assert row["front"] != beaten


def test_trials_are_metered_runs_and_no_test_image_is_looked_at(
    advice: dict[str, Any], folder: Path
) -> None:
    runs = [record.read(path) for path in record.find([folder / "runs"])]
    tried = [run for run in runs if "trial" in run.facts]
    assert len(tried) == sum(len(row["trials"]) for row in advice["rows"])
    assert all(run.status == "done" for run in tried)
    assert {run.sum("samples", "train/epoch1") for run in tried} == {10, 20, 40}
    assert not list((folder / "runs").rglob("done.json")), "a trial is no finished run"


def test_the_recipe_written_runs(advice: dict[str, Any], folder: Path) -> None:
    assert advice["recipe"] == str(folder / "advised.yaml")
    recipe = load_recipe(folder / "advised.yaml")
    assert list(recipe.arms) == [advice["pick"]]
    left = session.run(recipe, overrides=(), runs=folder / "runs")
    done = json.loads((left / advice["pick"] / "seed0/done.json").read_text())
    runs = [record.read(path) for path in record.find([left / advice["pick"]])]
    assert [0 <= r.facts["accuracy"] <= 1 for r in runs if r.id == done["run"]] == [True]
    assert set(load_recipe(advice["plans"]).arms) == {"all", "merged", "head", "pruned"}


def test_what_was_tried_before_is_kept(advice: dict[str, Any], folder: Path) -> None:
    before = len([p for p in record.find([folder / "runs"]) if "trial" in record.read(p).facts])
    again = advise(
        REF, "digits", serve=1000, plans=folder / "few.yaml", overrides=[*OVER,
        "data.classes=[0,1,2]"], runs=folder / "runs",
        target=1.0, budget=1e-3, **SMALL,
    )  # fmt: skip
    assert (
        len([p for p in record.find([folder / "runs"]) if "trial" in record.read(p).facts])
        == before
    )
    assert [row["trials"] for row in again["rows"]] == [row["trials"] for row in advice["rows"]]
    assert again["pick"] is None
    assert again["recipe"] is None
    assert "raise the budget" in again["why"]


def test_the_command_says_the_same_as_json(
    advice: dict[str, Any], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sets = [word for text in [*OVER, "data.classes=[0,1,2]"] for word in ("--set", text)]
    words = [
        "advise",
        REF,
        "--data",
        "digits",
        "--plans",
        str(folder / "few.yaml"),
        "--runs",
        str(folder / "runs"),
        "--serve",
    ]
    words += ["1000", *sets, *OPTIONS]
    assert cli.main(words) == 0
    shown = capsys.readouterr().out
    assert "taken" in shown
    assert "left out: narrow" in shown
    assert cli.main([*words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["pick"] == advice["pick"]


def test_plans_that_come_with_greenvis_are_filled_in_for_the_model() -> None:
    content, lacking = source(REF, "digits", teacher=REF, options=SMALL)
    known = yaml.safe_load(PLANS.read_text())["arms"]
    assert set(content["arms"]) == set(known)
    assert not lacking
    assert content["arms"]["full-merged"]["techniques"] == [
        {"token_merge": {"r": 4}}
    ]  # half of 16 patches, in two blocks
    assert content["arms"]["distilled"]["techniques"][0]["distill"]["teacher"] == REF
    assert content["data"] == {"img_size": 8, "in_chans": 3, "name": "digits"}
    _, lacking = source("timm/resnet10t", "digits")
    assert set(lacking) == {"full-merged", "lora-merged", "distilled"}


def test_a_file_s_weights_are_a_start_with_a_new_classifier(
    advice: dict[str, Any], folder: Path
) -> None:
    session.run(folder / "advised.yaml", runs=folder / "runs")
    arm = f"run:{load_recipe(folder / 'advised.yaml').name}/{advice['pick']}"
    content, _ = source(arm, "digits", runs=folder / "runs")
    assert content["model"]["ref"] == REF
    assert content["model"]["init"].endswith("seed0/model.safetensors")
    assert "num_classes" not in content["model"]
    assert content["data"] == {"img_size": 8, "in_chans": 3, "name": "digits"}
    assert content["name"].startswith("advise-digits-")


def test_a_teacher_makes_another_plan(advice: dict[str, Any], folder: Path) -> None:
    session.run(folder / "advised.yaml", runs=folder / "runs")
    teacher = folder / "runs" / load_recipe(folder / "advised.yaml").name / advice["pick"] / "seed0"
    plans = (
        "train: {batch_size: 10}\narms: {taught: {techniques: [{distill: {teacher: $teacher, "
        "cache: true}}]}}\n"
    )
    (folder / "taught.yaml").write_text(plans)
    over = [*OVER, "data.classes=[0,1,2]"]
    options: dict[str, Any] = {
        "plans": folder / "taught.yaml",
        "overrides": over,
        "runs": folder / "taught",
        **SMALL,
    }
    found = advise(REF, "digits", teacher=str(teacher), **options)
    assert found["pick"] == "taught"
    assert str(teacher / "model.safetensors") in Path(found["recipe"]).read_text()
    assert found["rows"][0]["serve_energy_j"]["value"] > 0


@pytest.mark.slow
def test_the_benchmark_runs_every_plan_and_says_what_advice_cost(
    folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "few.yaml").write_text(
        "train: {batch_size: 10}\narms: {all: {}, merged: {techniques: [token_merge]}}\n"
    )
    data = {"digits": ("data.classes=[0,1,2]",)}
    options: dict[str, Any] = {
        "plans": tmp_path / "few.yaml",
        "runs": tmp_path / "runs",
        "overrides": OVER,
    }
    found = bench.run(tmp_path, hosts={"tiny": (REF, SMALL, None, 160)}, data=data, **options)
    (cell,) = found["cells"]
    assert {its["plan"] for its in cell["plans"]} == {"all", "merged"}
    for its in cell["plans"]:
        run = record.read(
            next(
                record.find(
                    [tmp_path / "runs/advise-digits-vit_tiny_patch16_224-plans" / its["plan"]]
                )
            )
        )
        assert its["measured"]["accuracy"] == run.facts["accuracy"]
        total = (
            its["measured"]["train_energy_j"]
            + bench.SERVED / 1000 * its["measured"]["serve_energy_j"]
        )
        assert its["measured"]["total_energy_j"] == pytest.approx(total)
    assert json.loads((tmp_path / "results.json").read_text()) == found
    text = (tmp_path / "report.md").read_text()
    assert "greenvis bench advise --out reports/advice" in text
    assert str(tmp_path) not in text + (tmp_path / "results.json").read_text()
    with pytest.raises(BadInput, match="run this benchmark in a copy of the repository"):
        bench.run(
            hosts={"base": ("run:nowhere/arm", {}, tmp_path / "nowhere.yaml", 160)},
            data=data,
            **options,
        )


def test_regret_is_the_energy_of_the_pick_over_that_of_the_best() -> None:
    rows = [_row("a", 0.90, 10), _row("b", 0.85, 5)]
    spent = {
        "a": {"accuracy": 0.92, "total_energy_j": 12.0},
        "b": {"accuracy": 0.91, "total_energy_j": 8.0},
    }
    its = bench.regret(rows, spent, 0.88)
    assert (its["pick"], its["best"], its["missed"]) == ("a", "b", None)
    assert its["regret"] == pytest.approx(0.5)
    assert bench.regret(rows, spent, 0.80) == {
        "target": 0.80,
        "pick": "b",
        "best": "b",
        "regret": 0.0,
        "missed": None,
    }
    spent["b"]["accuracy"] = 0.70
    missed = bench.regret(rows, spent, 0.80)
    assert missed["regret"] is None
    assert missed["missed"] == pytest.approx(0.10)


def test_a_recipe_gives_its_data_with_absolute_paths(tmp_path: Path) -> None:
    for label in ("a", "b"):
        (tmp_path / "images" / label).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "images" / label / "0.png")
    its = tmp_path / "its.yaml"
    its.write_text(
        "name: its\ndata: {name: 'folder:images', train: 100, seed: 3}\nmodel: {ref: "
        "plain/mlp}\narms: {a: {}}\n"
    )
    content, _ = source(REF, str(its), options=SMALL)
    images = f"folder:{tmp_path / 'images'}"
    assert content["data"] == {
        "img_size": 8,
        "in_chans": 3,
        "name": images,
        "train": 100,
        "seed": 3,
    }


def test_a_share_goes_on_as_a_power_of_the_images() -> None:
    points = [(n, 1 - 2.0 * n**-0.5) for n in (25, 50, 100)]
    goes_on = metric(points, 400, 10**9, ACCURACY)
    assert goes_on["value"] == pytest.approx(1 - 2.0 * 400**-0.5)
    assert goes_on["low"] == pytest.approx(1 - 0.2 * 4**-0.25, abs=1e-4)
    assert goes_on["high"] == pytest.approx(1 - 0.2 * 4**-0.75, abs=1e-4)
    few = metric(points, 400, 50, ACCURACY)
    assert few["low"] < goes_on["low"] < goes_on["high"] < few["high"]
    no_further = metric(points, 100, 10**9, ACCURACY)
    assert no_further["value"] == pytest.approx(points[-1][1])
    worse = metric([(25, 0.5), (50, 0.4)], 400, 10**9, ACCURACY)
    assert worse["value"] == pytest.approx(0.4)  # a curve that rose promises nothing
    assert metric([(25, 1.0), (50, 1.0)], 400, 100, ACCURACY)["value"] > 0.99


def test_an_error_falls_as_a_power_of_the_images_and_low_is_the_smaller_number() -> None:
    rmse = Measure("rmse", "px", higher_is_better=False)
    points = [(n, 30.0 * n**-0.5) for n in (25, 50, 100)]  # above 1: no share
    goes_on = metric(points, 400, 10**9, rmse)
    assert goes_on["value"] == pytest.approx(1.5)
    assert goes_on["low"] == pytest.approx(3 * 4**-0.75, abs=1e-3)
    assert goes_on["high"] == pytest.approx(3 * 4**-0.25, abs=1e-3)
    assert metric(points, 100, 200, rmse)["high"] == pytest.approx(3 * (1 + 1.96 / 20))
    with pytest.raises(BadInput, match="class entropy goes on with more images is not known"):
        check(Measure("class_entropy", "bit"))


def test_where_less_is_better_the_cheapest_below_the_target_is_taken() -> None:
    rmse = Measure("rmse", "px", higher_is_better=False)
    rows = [_row("a", 3.0, 10), _row("b", 2.0, 50), _row("c", 1.0, 200), _row("d", 1.009, 150)]
    rows[1]["metric"]["high"] = 2.5
    assert choose(rows, 2.2, measure=rmse) == (
        "b",
        "the cheapest that is predicted to reach RMSE 2.20 px; its range does not lie there, so it "
        "may miss it",
    )
    assert choose(rows, 0.5, measure=rmse)[0] == "c"  # the closest
    assert choose(rows, measure=rmse)[0] == "d"  # a hundredth of the value is close enough
    assert choose(rows, 3.5, measure=rmse)[0] == "a"


TASKS = {
    "segmentation": """\
name: masks
task: segmentation
data: {name: scenes, train: 64, test: 8, img_size: 32}
model: {ref: timm/resnet10t, head: dense}
arms: {a: {}}
""",
    "generation": """\
name: drawn
task: generation
data: {name: digits, train: 64, test: 16, img_size: 8}
model: {ref: plain/vae, img_size: 8}
arms: {a: {}}
""",
}


@pytest.mark.parametrize(
    ("task", "ref", "options", "name", "better"),
    [
        pytest.param(
            *("segmentation", "timm/resnet10t", {"head": "dense"}, "mIoU", True),
            marks=pytest.mark.slow,
        ),
        ("generation", "plain/vae", {"img_size": 8}, "Fréchet distance", False),
    ],
)
def test_advice_speaks_the_metric_of_the_task(
    tmp_path: Path, task: str, ref: str, options: dict[str, Any], name: str, better: bool,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    (tmp_path / "task.yaml").write_text(TASKS[task])
    (tmp_path / "plans.yaml").write_text(
        "train: {epochs: 1, batch_size: 16}\narms: {short: {}, long: {train: {epochs: 2}}}\n"
    )
    given: dict[str, Any] = {
        "plans": tmp_path / "plans.yaml", "runs": tmp_path / "runs", "share": 0.5,
        "overrides": ["train.threads=1"], "serve": 100, **options,
    }  # fmt: skip
    advice = advise(ref, str(tmp_path / "task.yaml"), **given)
    primary = registry.resolve(task).primary
    assert advice["measure"] == primary._asdict()
    assert primary.higher_is_better is better
    assert {row["plan"] for row in advice["rows"]} == {"short", "long"}
    runs = [record.read(path) for path in record.find([tmp_path / "runs"])]
    tried = {r.facts["trial"]["metric"] for r in runs if "trial" in r.facts}
    assert {trial["metric"] for row in advice["rows"] for trial in row["trials"]} == tried
    for row in advice["rows"]:
        assert row["metric"]["low"] <= row["metric"]["value"] <= row["metric"]["high"]
    recipe = load_recipe(advice["recipe"])
    assert recipe.arm(advice["pick"]).task.name == task
    assert f"Predicted: {name} " in Path(advice["recipe"]).read_text()
    # the target nobody reaches takes the best, in the metric's own direction
    ends = [row["metric"]["value"] for row in advice["rows"]]
    best = next(r for r in advice["rows"] if r["metric"]["value"] == (max if better else min)(ends))
    unreachable = advise(ref, str(tmp_path / "task.yaml"), target=1.0 if better else 1e-9, **given)
    assert unreachable["pick"] == best["plan"]
    assert f"no plan is predicted to reach {name} " in unreachable["why"]
    planning._show_advice(advice)
    shown = " ".join(capsys.readouterr().out.split())
    assert ("more is better" if better else "less is better") in shown
    assert "accura" not in shown


def test_a_trial_recorded_with_its_first_key_is_read(
    advice: dict[str, Any], folder: Path, tmp_path: Path
) -> None:
    path = next(p for p in record.find([folder / "runs"]) if "trial" in record.read(p).facts)
    old = tmp_path / path.name
    old.write_text(path.read_text().replace('"metric":', '"accuracy":'))
    assert record.read(old).facts["trial"].keys() >= {"accuracy"}
    assert trials._read(record.read(old)) == trials._read(record.read(path))


def test_energy_has_a_fixed_part_and_one_an_image() -> None:
    points = [(n, 3.0 + 0.1 * n, 0.02 * n) for n in (25, 50, 100)]
    assert energy(points, 400)["value"] == pytest.approx(3 + 40 + 8)
    falling = [(25, 10.0, 1.0), (50, 8.0, 2.0)]
    assert energy(falling, 400)["value"] >= 8.0 + 16  # an image never costs less than nothing
    its = energy(points, 400)
    assert its["low"] < its["value"] < its["high"]


def _row(plan: str, value: float, joules: float, low: float | None = None) -> dict[str, Any]:
    return {
        "plan": plan,
        "metric": {"value": value, "low": value if low is None else low, "high": value},
        "total_energy_j": {"value": joules},
    }


def test_the_cheapest_that_reaches_the_target_is_taken() -> None:
    rows = [
        _row("a", 0.70, 10),
        _row("b", 0.90, 50, low=0.80),
        _row("c", 0.95, 200),
        _row("d", 0.945, 150),
    ]
    assert choose(rows, 0.85)[0] == "b"
    assert "may miss it" in choose(rows, 0.85)[1]
    assert choose(rows, 0.5) == (
        "a",
        "the cheapest that is predicted to reach accuracy 50.0\u00a0%",
    )
    assert choose(rows, 0.99)[0] == "c"
    assert "no plan is predicted to reach accuracy 99.0\u00a0%; c comes" in choose(rows, 0.99)[1]
    assert choose(rows, 0.92, 100) == (
        "b",
        "no plan is predicted to reach accuracy 92.0\u00a0% within the budget; b comes closest",
    )
    assert choose(rows)[0] == "d"  # a point below the best is close enough
    assert choose(rows, None, 20)[0] == "a"
    assert choose(rows, 0.5, 5)[0] is None


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("5Wh", 18000.0),
        ("0.2 kWh", 720_000.0),
        ("18kJ", 18000.0),
        (3, 3.0),
        ("1e3", 1000.0),
        ("2e-3MJ", 2000.0),
    ],
)
def test_energy_is_read_with_its_unit(text: str | float, value: float) -> None:
    assert joules(text) == pytest.approx(value)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"data_name": "digit"}, "did you mean 'digits'"),
        ({"model": "timm/vit_tiny_patch16_22"}, "did you mean"),
        ({"model": "run:nowhere/arm"}, "left no model"),
        ({"target": 85.0}, "85 % is 0.85"),
        ({"target": 0.0}, "above 0 and up to 1"),
        ({"budget": "-5Wh"}, "must be above 0"),
        ({"budget": "5Whr"}, "did you mean 'Wh'"),
        ({"budget": "lots"}, "no unit of energy"),
        ({"budget": "Wh"}, "give a number and a unit"),
        ({"serve": -1}, "0 or more"),
        ({"share": 0.9}, "up to 0.5"),
        ({"out": "no/such/folder/recipe.yaml"}, "is not a folder"),
        ({"plans": "nowhere.yaml"}, "cannot read the plans"),
        ({"teacher": "timm/resnet1"}, "did you mean"),
        ({"overrides": ["data.train=30"]}, "too few to try plans"),
        ({"labels": 2000}, "labels asks for 2000, but there are 1347 training images"),
        ({"labels": 12}, "1 a class are needed"),
        ({"labels": 0, "unlabeled": "nowhere"}, "--labels is 0; .*; --unlabeled: no folder at"),
        ({"labels": 40, "unlabeled": "tests/outside"}, "holds no image that can be read"),
        ({"unlabeled": "rest"}, "goes with --labels"),
        ({"overrides": ["train.epoch=3"]}, "did you mean 'epochs'"),
        ({"overrides": ["data.img_size=12"]}, "cannot take images"),
    ],
)
def test_refuses_before_anything_is_spent(
    tmp_path: Path, options: dict[str, Any], says: str
) -> None:
    asked = {
        "model": REF,
        "data_name": "digits",
        "runs": tmp_path / "runs",
        **(SMALL if "model" not in options else {}),
        **options,
    }
    with pytest.raises(BadInput, match=says):
        advise(**asked)
    assert not list(record.find([tmp_path / "runs"])) if (tmp_path / "runs").exists() else True


FEW_LABELS = """\
train: {batch_size: 10, eval_every: 0}
arms:
  labels: {data: {augment: trivialaugment}}
  head: {needs: $pretrained, techniques: [{linear_probe: {cache: true}}]}
  agreement: {data: &more {unlabeled: $unlabeled}, techniques: [{consistency: {mu: 1, threshold: 0.1}}]}
  pretext:
    data: *more
    stages:
      - {name: pretext, on: unlabeled, train: {epochs: 1}, techniques: [simclr]}
      - {name: head, techniques: [{linear_probe: {cache: true}}]}
"""


def test_a_budget_of_labels_has_plans_of_its_own_and_images_without_labels_make_more(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "plans.yaml").write_text(FEW_LABELS)
    asked: dict[str, Any] = {
        "labels": 24, "plans": tmp_path / "plans.yaml", "serve": 100, "runs": tmp_path / "runs",
        "overrides": [*OVER, "data.classes=[0,1,2,3]"], **SMALL,
    }  # fmt: skip
    advice = advise(REF, "digits", unlabeled="rest", **asked)
    assert {row["plan"] for row in advice["rows"]} == {"labels", "agreement", "pretext"}
    assert "learned nothing yet" in advice["refused"]["head"]
    assert (advice["images"], advice["held"], advice["unlabeled"]) == (24, 12, 136)
    assert {t["images"] for row in advice["rows"] for t in row["trials"]} == {6, 12}
    runs = [record.read(path) for path in record.find([tmp_path / "runs"])]
    (first,) = (
        run for run in runs
        if run.header["arm"] == "pretext" and run.facts["trial"]["images"] == 6
    )  # fmt: skip
    assert first.sum("samples", "train/pretext") == 136 / 4, "others are shared out alike"
    assert advice["trials_energy_j"] == pytest.approx(
        sum(t["total_j"] for row in advice["rows"] for t in row["trials"])
    )
    recipe = load_recipe(advice["plans"])
    assert (recipe.data.labels, recipe.arm("labels").data.unlabeled) == (24, "none")
    assert recipe.arm("agreement").data.unlabeled == "rest"
    assert "--labels 24" in Path(advice["recipe"]).read_text()
    planning._show_advice(advice)
    assert "24 labelled images and 136 without a label" in " ".join(capsys.readouterr().out.split())
    (tmp_path / "plans.yaml").write_text("arms: {labels: {}}\n")
    with pytest.raises(BadInput, match="change nothing"):
        advise(REF, "digits", unlabeled="rest", **asked)


def test_plans_for_few_labels_need_what_is_there(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    known = yaml.safe_load(FEW_PLANS.read_text())["arms"]
    alone, lacking = source(REF, "digits", plans=FEW_PLANS, labels=40, options=SMALL)
    assert set(alone["arms"]) == {"labels", "labels-longer", "labels-averaged"}
    assert {"agreement", "pretext-tuned", "probe"} < set(lacking)
    every, lacking = source(
        REF, "digits", plans=FEW_PLANS, labels=40, unlabeled=str(tmp_path), options=SMALL
    )
    assert set(every["arms"]) | set(lacking) == set(known)
    assert every["arms"]["agreement"]["data"]["unlabeled"] == f"folder:{tmp_path}"
    recipe = tmp_path / "every.yaml"
    recipe.write_text(yaml.safe_dump(every))
    assert [s.on for s in load_recipe(recipe).arm("pretext-tuned").stages] == ["unlabeled", ""]
    based = {"base-tuned", "base-taught", "base-features"}
    assert based < set(lacking)
    beside, _ = source(
        REF, "digits", plans=FEW_PLANS, labels=40, unlabeled="rest", teacher=REF, options=SMALL
    )
    assert based < set(beside["arms"])
    pretext = beside["arms"]["base-taught"]["stages"][0]
    assert pretext["techniques"][0]["reuse"]["base"] == REF


def test_a_file_that_is_no_advice_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("name: mine\n")
    with pytest.raises(BadInput, match="no advice wrote it"):
        advise(REF, "digits", out=tmp_path / "mine.yaml", runs=tmp_path / "runs", **SMALL)
    assert (tmp_path / "mine.yaml").read_text() == "name: mine\n"


@pytest.mark.slow
def test_a_plan_that_fails_is_left_out_and_said(tmp_path: Path) -> None:
    (tmp_path / "plans.yaml").write_text(
        "train: {batch_size: 10}\narms: {all: {}, wild: {train: {lr: 1.0e+30, optimizer: sgd}}}\n"
    )
    options: dict[str, Any] = {
        "overrides": [*OVER, "data.classes=[0,1]"],
        "runs": tmp_path / "runs",
        **SMALL,
    }
    found = advise(REF, "digits", plans=tmp_path / "plans.yaml", **options)
    assert [row["plan"] for row in found["rows"]] == ["all"]
    assert "the loss is" in found["refused"]["wild"]
    (tmp_path / "wild.yaml").write_text(
        "train: {batch_size: 10}\narms: {wild: {train: {lr: 1.0e+30, optimizer: sgd}}}\n"
    )
    with pytest.raises(GreenvisError, match="no plan could be trained"):
        advise(REF, "digits", plans=tmp_path / "wild.yaml", **options)
