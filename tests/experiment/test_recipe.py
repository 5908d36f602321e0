"""Recipes: what they say when right, and file:line with the nearest name when wrong."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from greenvis.errors import BadInput
from greenvis.experiment import sweep
from greenvis.experiment.recipe import load_recipe, parse_techniques, schema

GOOD = """\
name: small
data: {name: digits, train: 100}
model: {ref: timm/resnet10t, in_chans: 1}
train:
  epochs: 3
  optimizer: adamw
  seeds: [0, 1]
arms:
  baseline: {}
  distilled:
    train: {epochs: 5}
    model: {ref: timm/resnet18}
    techniques:
      - distill: {teacher: "run:baseline", temperature: 2.0}
report: {baseline: baseline}
"""


def _write(folder: Path, text: str, name: str = "recipe.yaml") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def test_an_arm_is_the_recipe_with_its_own_laid_over(tmp_path: Path) -> None:
    recipe = load_recipe(_write(tmp_path, GOOD))
    arm = recipe.arm("distilled")
    assert (arm.train.epochs, arm.train.optimizer, arm.train.seeds) == (5, "adamw", (0, 1))
    assert (arm.model.ref, arm.model.options) == (
        "timm/resnet18",
        {},
    )  # another ref: no option is inherited
    assert arm.needs() == ["run:baseline"]
    assert arm.techniques[0].recipe_form() == {"teacher": "run:baseline", "temperature": 2.0}
    assert recipe.arm("baseline").train.epochs == 3
    same = load_recipe(_write(tmp_path, GOOD), ["arms.distilled.model={width: 2}"]).arm("distilled")
    assert (same.model.ref, same.model.options) == ("timm/resnet10t", {"in_chans": 1, "width": 2})


@pytest.mark.parametrize(
    ("old", "new", "line", "message"),
    [
        ("epochs: 3", "epoch: 3", 5, "unknown field 'epoch'; did you mean 'epochs'?"),
        ("epochs: 3", "epochs: three", 5, 'not "three"'),
        ("optimizer: adamw", "optimizer: adamm", 6, "did you mean 'adam"),
        ("seeds: [0, 1]", "seeds: []", 7, "at least 1"),
        ("- distill:", "- distil:", 14, "unknown technique 'distil'; did you mean 'distill'?"),
        ("temperature: 2.0", "temprature: 2.0", 14, "did you mean 'temperature'?"),
        ("temperature: 2.0", "temperature: 0", 14, "greater than 0"),
        ("baseline: baseline", "baseline: basline", 15, "no arm; did you mean 'baseline'?"),
        (
            "baseline: baseline",
            "arm: distiled",
            15,
            "report.arm 'distiled' is no arm; did you mean 'distilled'?",
        ),
        ("baseline: baseline", "arm: baseline", 15, "report.arm 'baseline' is the baseline"),
        ("{epochs: 5}", "{epochs: -5}", 11, "greater than or equal to 0"),
        ("name: small", "name: ../small", 1, "pattern"),
        ("  baseline: {}", "  baseline: {}\n  baseline: {}", 10, "'baseline' is given twice"),
        ("data: {name: digits, train: 100}", "", 1, "'data' is missing"),
        ("arms:", "arms: [", 10, "not YAML"),
    ],
)
def test_an_error_names_file_line_and_the_nearest_right_name(
    tmp_path: Path, old: str, new: str, line: int, message: str
) -> None:
    assert old in GOOD
    path = _write(tmp_path, GOOD.replace(old, new))
    with pytest.raises(BadInput) as caught:
        load_recipe(path)
    assert message in str(caught.value)
    assert f"{path}:{line}" in str(caught.value)


def test_overrides_change_one_value_and_name_themselves_when_wrong(tmp_path: Path) -> None:
    path = _write(tmp_path, GOOD)
    recipe = load_recipe(path, ["train.epochs=9", "arms.baseline.train.lr=0.5", "train.seeds=[4]"])
    assert (recipe.arm("baseline").train.lr, recipe.train.epochs, recipe.train.seeds) == (
        0.5,
        9,
        (4,),
    )
    recipe = load_recipe(path, ["arms.distilled.techniques.0.distill.temperature=7"])
    assert recipe.arm("distilled").techniques[0].recipe_form()["temperature"] == 7
    for text, message in [
        ("arms.bigg.train.epochs=9", "no arm 'bigg'"),
        (
            "train.epoch=9",
            "--set train.epoch=9: train.epoch: unknown field 'epoch'; did you mean 'epochs'?",
        ),
        ("train", "takes KEY=VALUE"),
        ("name.x=1", "'name' holds no keys"),
        ("train.seeds.7=1", "no index"),
    ]:
        with pytest.raises(BadInput) as caught:
            load_recipe(path, [text])
        assert message in str(caught.value)


def test_many_overrides_give_a_name_that_a_recipe_may_have(tmp_path: Path) -> None:
    many = [
        f"arms.{arm}.train.{key}=3"
        for arm in ("baseline", "distilled")
        for key in ("epochs", "accumulate")
    ]
    [(recipe, _)] = sweep.load(_write(tmp_path, GOOD), [*many, "data.train=90"])
    assert len(recipe.name) == 100
    assert sweep.load(tmp_path / "recipe.yaml", [*many, "data.train=80"])[0][0].name != recipe.name


def test_extends_inherits_and_keeps_each_files_lines(tmp_path: Path) -> None:
    _write(tmp_path, GOOD, "base.yaml")
    child = _write(tmp_path, "extends: base.yaml\nname: child\ntrain: {lr: 0.1}\n", "child.yaml")
    recipe = load_recipe(child)
    assert (recipe.name, recipe.train.lr, recipe.train.epochs) == ("child", 0.1, 3)
    _write(tmp_path, GOOD.replace("epochs: 3", "epochs: x"), "base.yaml")
    with pytest.raises(BadInput, match=r"base\.yaml:5"):
        load_recipe(child)
    _write(tmp_path, "extends: child.yaml\n", "base.yaml")
    with pytest.raises(BadInput, match="lead back"):
        load_recipe(child)
    _write(tmp_path, "extends: nowhere.yaml\n", "base.yaml")
    with pytest.raises(BadInput, match=r"base\.yaml:1: no recipe at"):
        load_recipe(child)


def test_a_recipe_of_an_older_greenvis_means_what_it_meant(tmp_path: Path) -> None:
    _write(tmp_path, GOOD.replace("epochs: 3", "epochs: 3\n  target: 0.8"), "base.yaml")
    old = "extends: base.yaml\narms: {distilled: {train: {target_accuracy: 0.9}}}\n"
    recipe = load_recipe(_write(tmp_path, old))
    assert (recipe.train.target, recipe.arm("distilled").train.target) == (0.8, 0.9)
    again = load_recipe(tmp_path / "recipe.yaml", ["train.target_accuracy=0.7"])
    assert (again.train.target, again.arm("distilled").train.target) == (0.7, 0.9)
    both = old.replace("0.9}", "0.9, target: 0.5}")
    with pytest.raises(BadInput, match=r"recipe.yaml:2: 'target' is given twice"):
        load_recipe(_write(tmp_path, both))


def test_files_that_are_no_recipe(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="cannot read the recipe"):
        load_recipe(tmp_path / "none.yaml")
    with pytest.raises(BadInput, match="a recipe is a mapping"):
        load_recipe(_write(tmp_path, "- 1\n"))
    with pytest.raises(BadInput, match=r"recipe\.yaml:1"):
        load_recipe(_write(tmp_path, "name: !!python/object:os.system x\n"))
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(BadInput, match="cannot read"):
        load_recipe(tmp_path / "binary.yaml")


def test_the_text_of_a_recipe_is_enough_to_run_it_again(tmp_path: Path) -> None:
    recipe = load_recipe(_write(tmp_path, GOOD), ["train.epochs=9"])
    again = load_recipe(_write(tmp_path, recipe.text(), "again.yaml"))
    assert again.model_dump() == recipe.model_dump()


def test_schema_covers_the_sections_and_every_technique() -> None:
    form = schema()
    assert {"name", "data", "model", "train", "arms", "report", "meter", "extends"} <= set(
        form["properties"]
    )
    assert "temperature" in form["$defs"]["technique:distill"]["properties"]


def test_techniques_on_the_command_line() -> None:
    (technique,) = parse_techniques('[{"distill": {"teacher": "file:x", "weight": 2}}]')
    assert technique.recipe_form() == {"teacher": "file:x", "weight": 2.0}
    for text, message in [
        ("[", "not YAML"),
        ("[1]", "one name an item"),
        ("[{distill: {}}]", "give either 'teacher' or 'teachers'"),
    ]:
        with pytest.raises(BadInput, match=message):
            parse_techniques(text)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "lr: 0.1",
            "lr: 0.1, momentum: 0.5",
            "train.momentum changes nothing in any arm: it is of optimizer: sgd",
        ),
        (
            "lr: 0.1",
            "lr: 0.1, eval_every: 0, target: 0.9",
            "train.target changes nothing in any arm",
        ),
        (
            "hidden: [4]",
            "hidden: [4], classifier: keep",
            "model.classifier changes nothing in any arm",
        ),
        ("a: {}", "a: {train: {momentum: 0.5}}", "train.momentum changes nothing in arm 'a'"),
        ("a: {}", "a: {model: {classifier: keep}}", "model.classifier changes nothing in arm 'a'"),
        (
            "a: {}",
            "a: {subset: {method: random, iterations: 5}}",
            "'iterations' changes nothing with method: random",
        ),
        ("a: {}", "a: {subset: {width: 8}}", "'width' changes nothing with method: random"),
        (
            "a: {}",
            "a: {techniques: [{regularize: {damping: 1.0}}]}",
            "'damping' changes nothing with method: ewc",
        ),
        (
            "train: 60",
            "train: 60, stream: {kind: class, domain: permute}",
            "data.stream.domain changes nothing in any arm",
        ),
        (
            "train: 60",
            "train: 60, stream: {blur: 0.1}",
            "data.stream.blur changes nothing in any arm: it is of kind: free",
        ),
    ],
)
def test_a_setting_that_changes_nothing_is_refused(
    old: str, new: str, message: str, tmp_path: Path
) -> None:
    text = (
        "name: idle\ndata: {name: digits, train: 60}\nmodel: {ref: plain/mlp, hidden: [4]}\ntrain: "
        "{lr: 0.1}\n"
    )
    text += "arms: {a: {}, b: {}}\n"
    assert load_recipe(_write(tmp_path, text)).arms
    with pytest.raises(BadInput) as caught:
        load_recipe(_write(tmp_path, text.replace(old, new)))
    assert message in str(caught.value)
    assert ".yaml:" in str(caught.value)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("a: {}", "a: {train: {optimizer: sgd}}"),  # the recipe's momentum is this arm's
        ("lr: 0.1", "lr: 0.1, optimizer: sgd"),
        ("b: {}", "b: {stages: [{train: {optimizer: sgd}}]}"),
    ],
)
def test_a_setting_that_one_arm_uses_may_stand_above_all(
    old: str, new: str, tmp_path: Path
) -> None:
    text = (
        "name: used\ndata: {name: digits}\nmodel: {ref: plain/mlp}\ntrain: {lr: 0.1, momentum: "
        "0.5}\narms: {a: {}, b: {}}\n"
    )
    assert load_recipe(_write(tmp_path, text.replace(old, new))).arms


@pytest.mark.one_in(3)
@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["--set", "model.ref=timm/vit_tny_patch16_224"], "did you mean 'vit_tiny_patch16_224'"),
        (["--set", "model.ref=torchvision/resnt18"], "did you mean 'resnet18'"),
        (["--out", "site"], "holds 'index.html', which no report of greenvis wrote"),
    ],
    ids=["timm", "torchvision", "folder"],
)
def test_a_wrong_model_or_folder_is_said_before_torch_is_imported(
    words: list[str], why: str, tmp_path: Path
) -> None:
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "index.html").write_text("mine")
    (tmp_path / "r.yaml").write_text(
        "name: r\ndata: {name: digits}\nmodel: {ref: timm/resnet18}\narms: {a: {}}\n"
    )
    code = (
        "import sys; from greenvis.cli.main import main; code = main(sys.argv[1:]); "
        "sys.exit(code + 10 * ('torch' in sys.modules))"
    )
    command = [sys.executable, "-c", code, "run", "r.yaml", *words]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert why in done.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["r.yaml", "site"]
