"""Options and cards from strangers: nothing a library would unpickle is read, no size that no
machine holds is tried."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from greenvis import models
from greenvis.core import weights
from greenvis.errors import BadInput
from greenvis.experiment import lineage
from tests.hostile.bounds import bounded, everything, greenvis

REF = "timm/vit_tiny_patch16_224"


class Bomb:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


@pytest.fixture
def bomb(tmp_path: Path) -> Path:
    """Return a pickle that makes `canary` beside it when it is read."""
    path = tmp_path / "weights.pth"
    with path.open("wb") as file:
        pickle.dump(Bomb(tmp_path / "canary"), file)
    return path


def options(path: str) -> dict[str, dict[str, Any]]:
    """Return options, for any library, that have been seen to make one read a file."""
    return {
        "timm checkpoint_path": {"checkpoint_path": path},
        "timm pretrained_cfg": {"pretrained_cfg": {"file": path}, "pretrained": True},
        "timm overlay": {"pretrained_cfg_overlay": {"file": path}, "pretrained": True},
        "timm overlay url": {
            "pretrained_cfg_overlay": {"url": f"file://{path}"},
            "pretrained": True,
        },
        "timm cache_dir": {"cache_dir": str(Path(path).parent)},
        "hidden in a list": {"extras": [{"state_dict": path}]},
        "hidden in a mapping": {"extras": {"a": {"b": {"custom_load": "npz"}}}},
        "by its ending": {"variant": Path(path).name},
        "by its slash": {"variant": path},
        "a Windows path": {"variant": "a\\b"},
        "hub": {"hf_hub_id": "a/b"},
        "weights": {"weights": "DEFAULT.pth"},
        "trust_remote_code": {"trust_remote_code": True},
    }


@pytest.mark.parametrize(
    "library", [REF, "torchvision/resnet18", "hf/vit", "timm/mobilenetv3_small_050", "plain/mlp"]
)
@pytest.mark.parametrize("name", options("x/y"))
def test_options_that_read_files_need_trust(library: str, name: str, bomb: Path) -> None:
    given = options(str(bomb))[name]
    for call in (models.check, models.build):
        with pytest.raises(BadInput, match=r"can make the library read a file.*--trust"):
            call(library, **given)
    assert not (bomb.parent / "canary").exists()


@pytest.mark.parametrize("name", ["timm checkpoint_path", "timm pretrained_cfg", "timm overlay"])
def test_a_card_cannot_name_them_either(name: str, bomb: Path) -> None:
    path = bomb.parent / "model.safetensors"
    stored = {"ref": REF, "options": options(str(bomb))[name], "card": {}}
    save_file({"a": torch.zeros(1)}, path, metadata={weights.METADATA_KEY: json.dumps(stored)})
    with pytest.raises(BadInput, match=r"can make the library read a file|has its own weights"):
        models.build(f"file:{path}")
    assert not (bomb.parent / "canary").exists()


def test_a_pickle_is_never_run(bomb: Path) -> None:
    for given in ({"pretrained": str(bomb)}, {"pretrained": bomb.name}):
        with pytest.raises(BadInput, match="cannot be read as plain weights"):
            models.build(REF, folder=bomb.parent, **given)
    with pytest.raises(BadInput, match=r"not a whole safetensors file|cannot be read"):
        weights.read_state(bomb.rename(bomb.with_suffix(".safetensors")))
    assert not (bomb.parent / "canary").exists()


RECIPE = {
    "name": "pets", "data": {"name": "digits", "img_size": 16},
    "model": {"ref": REF, "img_size": 16}, "arms": {"full": {}},
}  # fmt: skip


@pytest.mark.one_in(3)
@pytest.mark.parametrize("name", options("x/y"))
@pytest.mark.parametrize("verb", ["plan", "run"])
def test_a_recipe_cannot_name_them(verb: str, name: str, bomb: Path) -> None:
    model = {**RECIPE["model"], **options(str(bomb))[name]}
    (bomb.parent / "recipe.yaml").write_text(json.dumps({**RECIPE, "model": model}))
    before = everything(bomb.parent)
    said = greenvis(verb, "recipe.yaml", cwd=bomb.parent, seconds=5)
    assert said.code == 2, said
    assert "--trust" in said.err
    assert everything(bomb.parent) == before


@pytest.mark.one_in(3)
@pytest.mark.parametrize("verb", ["plan", "run"])
@pytest.mark.parametrize(
    "change",
    [
        {"model": {"ref": "file:weights.pth"}},
        {"model": {**RECIPE["model"], "init": "file:weights.pth"}},
        {"model": {**RECIPE["model"], "pretrained": "weights.pth"}},
        {"arms": {"full": {"techniques": [{"distill": {"teacher": "file:weights.pth"}}]}}},
        {"model": {"ref": "os:system"}},
        {"model": {**RECIPE["model"], "init": "os:system"}},
        {"arms": {"full": {"techniques": [{"distill": {"teacher": "os:system"}}]}}},
        {"data": {"name": "os:system"}},
    ],
    ids=lambda change: json.dumps(change)[-40:],
)
def test_a_recipe_runs_neither_a_pickle_nor_code(
    verb: str, change: dict[str, Any], bomb: Path
) -> None:
    (bomb.parent / "recipe.yaml").write_text(json.dumps({**RECIPE, **change}))
    said = greenvis(verb, "recipe.yaml", cwd=bomb.parent, seconds=5)
    assert said.code == 2, said
    assert not (bomb.parent / "canary").exists()


@pytest.mark.parametrize("name", [n for n in options("x/y") if n.startswith("timm")])
@pytest.mark.parametrize("verb", ["flops", "inspect"])
def test_commands_refuse_them(verb: str, name: str, bomb: Path) -> None:
    given = options(str(bomb))[name]
    words = [w for k, v in given.items() for w in ("--option", f"{k}={json.dumps(v)}")]
    said = greenvis(verb, REF, *words, cwd=bomb.parent, seconds=5)
    assert said.code == 2, said
    assert "--trust" in said.err
    assert not (bomb.parent / "canary").exists()
    path = bomb.parent / "model.safetensors"
    stored = {"ref": REF, "options": given, "card": card()}
    save_file({"a": torch.zeros(1)}, path, metadata={weights.METADATA_KEY: json.dumps(stored)})
    said = greenvis(verb, f"file:{path.name}", cwd=bomb.parent, seconds=5)
    assert said.code == 2, said
    assert not (bomb.parent / "canary").exists()


@pytest.mark.parametrize(
    "given",
    [{"img_size": 10**9}, {"depth": 10**9}, {"embed_dim": 1e300}, {"embed_dim": float("nan")},
    {"num_classes": 10**5000},
     {"img_size": [16, 10**9]}, {"depth": -(10**9)}],
)  # fmt: skip
def test_sizes_that_no_machine_holds_are_refused(given: dict[str, Any]) -> None:
    with bounded(1), pytest.raises(BadInput, match="its limit is"):
        models.build(REF, **given)


def card(**changes: Any) -> dict[str, Any]:
    """Return a good card, changed."""
    energy = {"value": 1.0, "low": 0.5, "high": 2.0, "provenance": "estimated"}
    return {"run": "r", "arm": "pets/full", "seed": 0, "energy_j": energy, "uses": [], **changes}


def use(name: str, of: list[str], **changes: Any) -> dict[str, Any]:
    """Return an ancestor."""
    return {
        "role": "base",
        "name": name,
        "seed": 0,
        "runs": ["r"],
        "energy_j": card()["energy_j"],
        "of": of,
        **changes,
    }


CARDS: dict[str, Any] = {
    "no mapping": [1, 2],
    "a word": "card",
    "energy is a word": card(energy_j="much"),
    "energy is negative": card(
        energy_j={"value": -1.0, "low": 0.0, "high": 1.0, "provenance": "estimated"}
    ),
    "energy is infinite": card(
        energy_j={"value": 1e999, "low": 0.0, "high": 1.0, "provenance": "estimated"}
    ),
    "energy of an odd kind": card(energy_j={"value": 1.0, "provenance": "guessed"}),
    "seed is a list": card(seed=[0]),
    "seed is a fraction": card(seed=0.5),
    "run is a number": card(run=7),
    "a run of 10,000 letters": card(run="r" * 10_000),
    "arm is nothing": card(arm=None),
    "uses is a mapping": card(uses={"a": 1}),
    "an ancestor is a word": card(uses=["base"]),
    "an ancestor without a name": card(uses=[{"role": "base"}]),
    "an ancestor's runs are a number": card(uses=[use("a", [], runs=3)]),
    "an ancestor of a number": card(uses=[use("a", 3)]),  # type: ignore[arg-type]
    "2,000 ancestors": card(uses=[use(f"a{i}", []) for i in range(2000)]),
    "data is a list": card(data=[1]),
    "recipe is a list": card(recipe=[1]),
    "techniques are a word": card(techniques="lora"),
}


def stored(path: Path, content: Any) -> Path:
    """Write a weight file with this card, as greenvis's own."""
    text = json.dumps({"ref": REF, "options": {}, "card": content})
    save_file({"a": torch.zeros(1)}, path, metadata={weights.METADATA_KEY: text})
    return path


@pytest.mark.parametrize("name", CARDS)
def test_odd_cards_are_refused_with_the_field(name: str, tmp_path: Path) -> None:
    path = stored(tmp_path / "model.safetensors", CARDS[name])
    said = greenvis("card", path, cwd=tmp_path, seconds=1)
    assert said.code == 2, said
    assert "its card" in said.err or "no card" in said.err
    assert len(said.err) < 5000


def test_a_good_card_is_read(tmp_path: Path) -> None:
    read = lineage.read_card(
        stored(tmp_path / "m.safetensors", card(uses=[use("b", ["pets/full seed 0"])]))
    )
    assert read["total_j"]["value"] == 2.0


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "null",
        "3",
        "[" * 100_000,
        "{",
        '{"ref": 1}',
        '{"ref": "timm/x"}',
        '{"a": ' * 50_000,
    ],
)
def test_metadata_that_is_none_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.zeros(1)}, path, metadata={weights.METADATA_KEY: text})
    for words in (("card", path), ("inspect", f"file:{path}"), ("flops", f"file:{path}")):
        said = greenvis(*words, cwd=tmp_path, seconds=1)
        assert said.code == 2, said


def test_a_diamond_of_ancestors_is_drawn_once_each() -> None:
    levels, of = [], ["pets/full seed 0"]
    for i in range(40):  # 2 ** 40 ways lead down
        pair = [use(f"l{i}", of), use(f"r{i}", of)]
        levels += pair
        of = [f"{p['name']} seed 0" for p in pair]
    with bounded(1):
        rows = lineage.tree(card(uses=levels))
    assert {entry["name"] for _, _, entry in rows[1:]} == {u["name"] for u in levels}
    assert len(rows) < 1000


def test_a_diamond_in_a_card_is_shown_within_a_second(tmp_path: Path) -> None:
    levels = [use(f"{s}{i}", [f"{t}{i - 1} seed 0" for t in "lr"]) for i in range(40) for s in "lr"]
    path = stored(tmp_path / "model.safetensors", card(uses=levels))
    assert greenvis("card", path, cwd=tmp_path, seconds=1).code == 0


def test_a_circle_of_ancestors_ends() -> None:
    circle = [use("a", ["pets/full seed 0", "b seed 0"]), use("b", ["a seed 0"])]
    with bounded(1):
        rows = lineage.tree(card(uses=circle))
    assert [entry["name"] for _, _, entry in rows[1:]] == ["a", "b"]
