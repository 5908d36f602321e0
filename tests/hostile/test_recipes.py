"""Recipes from strangers: each is refused with file, line and limit, before anything is written."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from greenvis.errors import BadInput
from greenvis.experiment import sweep
from greenvis.experiment.recipe import parse_techniques
from tests.hostile.bounds import bounded, everything, greenvis

GOOD = """\
name: pets
data: {name: digits, img_size: 16}
model: {ref: timm/vit_tiny_patch16_224, img_size: 16, patch_size: 4, embed_dim: 16, depth: 1, num_heads: 1}
train: {epochs: 1}
arms: {full: {}}
"""


def doubled(levels: int) -> str:
    """Return aliases that multiply: 9 ** levels values."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, levels)]
    return "\n".join(lines) + "\n"


def changed(line: str, new: str) -> str:
    """Return the good recipe with one line in another's place."""
    assert line in GOOD
    return GOOD.replace(line, new)


TEXTS = {
    "aliases that multiply": (doubled(9) + GOOD, r":\d+: more than 20,000 values once aliases are "
                                                 r"followed"),
    "mappings that multiply": (
        "a: &a {x: 1, y: 2}\nb: &b {p: *a, q: *a}\n"
        + "".join(f"{c}: &{c} {{l: *{p}, r: *{p}}}\n" for p, c in zip("bcdefghijklmn",
        "cdefghijklmno", strict=True))
        + "z: [" + ", ".join(["*o"] * 40) + "]\n" + GOOD,
        "once aliases are followed",
    ),
    "an alias of itself": ("a: &a [*a]\n" + GOOD, "nested deeper than 40 levels once aliases are "
                                                  "followed"),
    "a mapping of itself": ("a: &a {b: *a}\n" + GOOD, "nested deeper than 40 levels"),
    "brackets": ("a: " + "[" * 5000 + "\n", ":1: nested deeper than 40 levels"),
    "braces": ("a: " + "{a: " * 5000 + "\n", ":1: nested deeper than 40 levels"),
    "indentation": ("".join(" " * i + "a:\n" for i in range(500)), r":4\d: nested deeper than 40 "
                                                                   r"levels"),
    "dashes": ("- " * 3000 + "a\n", ":1: nested deeper than 40 levels"),
    "many values": ("a: [" + "1," * 30_000 + "]\n", ":1: more than 20,000 values"),
    "a zero byte": (GOOD + "note: a\0b\n", ":6: not YAML"),
    "an escape sequence": (GOOD + "note: \x1b[31m\n", ":6: not YAML"),
    "a bell in a key": (GOOD + '"a\\x07b": 1\n', ":6: a key is a word of at most 200 printable"),
    "a bidi override in a key": (GOOD + '"a\\u202eb": 1\n', ":6: a key is a word of at most 200 "
                                                            "printable"),
    "a key of 300 characters": (GOOD + "k" * 300 + ": 1\n", ":6: a key is a word of at most 200 "
                                                            "printable"),
    "an impossible date": (GOOD + "note: 2026-13-45\n", ":6: month must be in"),
    "a day that is none": (GOOD + "note: 2025-02-30\n", ":6: day"),
    "an impossible time": (GOOD + "note: 2025-02-03T25:61:61\n", ":6: hour must be in"),
    "a number of 5,000 digits": (changed("epochs: 1", "epochs: " + "9" * 5000), ":4: "),
    "a base 60 number": (changed("epochs: 1", "epochs: " + "59:" * 900 + "59"), ":4: "),
    "a list as key": (GOOD + "? [a, b]\n: 1\n", ":6: a key is a word, not a list"),
    "a mapping as key": (GOOD + "? {a: 1}\n: 1\n", ":6: a key is a word, not a list"),
    "a Python object": (GOOD + "note: !!python/object/apply:os.system [id]\n", ":6: "),
    "a Python name": (GOOD + "note: !!python/name:os.system\n", ":6: "),
    "an unknown tag": (GOOD + "note: !x y\n", ":6: "),
    "bad base64": (GOOD + "note: !!binary '===='\n", ":6: "),
    "two documents": (GOOD + "---\n" + GOOD, ":6: not YAML: but found another document|:6: not "
                                             "YAML"),
    "a list": ("- 1\n", "a recipe is a mapping"),
    "nothing": ("", "a recipe is a mapping"),
    "an open quote": ('name: "abc\n', ": not YAML"),
    "img_size 1e9": (changed("img_size: 16}\nmodel", "img_size: 1000000000}\nmodel"), ":2: "
                                                                                      ".*16384"),
    "img_size of a model": (changed("img_size: 16, patch", "img_size: 1000000000, patch"),
    "16,384"),
    "seed -1": (changed("epochs: 1", "seeds: [-1]"), ":4: "),
    "seed 1e23": (changed("epochs: 1", "seeds: [100000000000000000000000]"), ":4: "),
    "a thousand and one seeds": (changed("epochs: 1", f"seeds: {[*range(1001)]}"), ":4: "),
    "workers 1e6": (changed("epochs: 1", "workers: 1000000"), ":4: .*256"),
    "threads 1e9": (changed("epochs: 1", "threads: 1000000000"), ":4: .*4096"),
    "batch_size 1e12": (changed("epochs: 1", "batch_size: 1000000000000"), ":4: "),
    "epochs 1e12": (changed("epochs: 1", "epochs: 1000000000000"), ":4: "),
    "lr infinite": (changed("epochs: 1", "lr: .inf"), ":4: "),
    "lr no number": (changed("epochs: 1", "lr: .nan"), ":4: "),
    "clip infinite": (changed("epochs: 1", "clip_norm: .inf"), ":4: "),
    "checkpoints never": (changed("epochs: 1", "checkpoint_every_s: .inf"), ":4: "),
    "a name of 300 characters": (changed("pets", "p" * 300), ":1: .*100 characters"),
    "an arm of 300 characters": (changed("{full: {}}", "{" + "f" * 150 + ": {}}"), "100 "
                                                                                   "characters"),
    "a name that climbs": (changed("pets", "../../etc"), ":1: "),
    "an arm that climbs": (changed("{full: {}}", "{'../x': {}}"), ":5: "),
    "a technique without end": (changed("{full: {}}", "{full: {techniques: [{lora: {alpha: "
                                                      ".inf}}]}}"), ":5: "),
    "itself as parent": ("extends: recipe.yaml\n" + GOOD, "must not lead back"),
    "a folder as parent": ("extends: .\n" + GOOD, "no recipe at"),
    "5,000 unknown fields": (GOOD + "".join(f"k{i}: 1\n" for i in range(5000)), "and 4980 more"),
}  # fmt: skip


@pytest.mark.parametrize("name", TEXTS)
def test_is_refused_with_its_line_within_a_second(name: str, tmp_path: Path) -> None:
    text, says = TEXTS[name]
    (tmp_path / "recipe.yaml").write_text(text)
    before = everything(tmp_path)
    said = greenvis("run", "recipe.yaml", cwd=tmp_path, seconds=1)
    assert said.code == 2, said
    assert re.search(rf"recipe\.yaml.*({says})", said.err, re.DOTALL), said.err
    assert len(said.err) < 5000
    assert "\x1b" not in said.err
    assert everything(tmp_path) == before


def test_a_good_recipe_is_taken(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(GOOD)
    said = greenvis("plan", "recipe.yaml", cwd=tmp_path, seconds=60, growth=2**30)
    assert said.code == 0, said


def test_a_recipe_that_is_no_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with (tmp_path / "large").open("wb") as file:
        file.truncate(2 * 2**30)
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "latin").write_bytes(b"name: \xe9\n")
    cases = (
        ("pipe", "a pipe"),
        ("large", "at most"),
        ("loop", "cannot read"),
        (".", "a folder"),
        ("latin", "not UTF-8"),
    )
    for name, says in (
        *cases,
        ("absent", "No such file"),
        ("/dev/zero", "a device"),
        ("a\0b", "cannot read"),
    ):
        said = greenvis("run", tmp_path / name, cwd=tmp_path, seconds=1)
        assert said.code == 2, said
        assert says in said.err


@pytest.mark.parametrize(
    "text",
    ["a.b", "=1", ".=1", "train.epochs=[[", "train.epochs=" + "[" * 3000,
    "train.epochs=" + "9" * 5000, "arms.²=1",
     "train.seeds." + "9" * 5000 + "=1", "train.epochs=!!python/name:os.system", "a\x1bb=1",
     "x" * 5000 + "=1",
     "train=&a [*a]", "train.seeds.-1=3", "name.x=1"],
)  # fmt: skip
def test_set_refuses_what_is_no_setting(text: str, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(GOOD)
    before = everything(tmp_path)
    said = greenvis("run", "recipe.yaml", "--set", text, cwd=tmp_path, seconds=1)
    assert said.code == 2, said
    assert "\x1b" not in said.err
    assert len(said.err) < 5000
    assert everything(tmp_path) == before


def test_a_sweep_without_end_is_refused(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(GOOD)
    many = ",".join(map(str, range(1, 101)))
    with pytest.raises(BadInput, match="10,000 recipes"):
        sweep.load(tmp_path / "recipe.yaml", [f"train.epochs={many}", f"train.batch_size={many}"])


@pytest.mark.parametrize(
    "text",
    [
        "[" * 3000,
        "&a [*a]",
        "{lora: {rank: " + "9" * 5000 + "}}",
        "!!python/name:os.system",
        "\x1b",
    ],
)
def test_techniques_as_text_are_read_within_the_same_limits(text: str) -> None:
    with bounded(1), pytest.raises(BadInput):
        parse_techniques(text)


def test_a_long_chain_of_parents_is_refused(tmp_path: Path) -> None:
    for i in range(30):
        (tmp_path / f"r{i}.yaml").write_text(f"extends: r{i + 1}.yaml\n")
    (tmp_path / "r30.yaml").write_text(GOOD)
    said = greenvis("run", "r0.yaml", cwd=tmp_path, seconds=1)
    assert said.code == 2, said
    assert "more than 20 recipes extend" in said.err
