"""Readers of strangers' files under a fuzzer: no exception but ours, no hang, no growth; and good
input is taken. `make fuzz` goes on for longer."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from greenvis.core import weights, yamlfile
from greenvis.data.output_cache import Cache
from greenvis.errors import GreenvisError
from greenvis.experiment import lineage
from greenvis.experiment.recipe import load_recipe
from greenvis.meters import record
from greenvis.meters.coefficients import load_coefficients
from greenvis.report import report, results
from greenvis.report.listing import ls
from tests.hostile.bounds import bounded
from tests.hostile.test_loading import card
from tests.hostile.test_recipes import GOOD
from tests.hostile.test_records import lines, write

EXAMPLES = int(os.environ.get("GREENVIS_FUZZ", "40"))
fuzz = settings(
    max_examples=EXAMPLES,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
ODD = (b"\0", b"\xff", b"{", b"[", b"*a", b"&a ", b"1e999", b"-", b": ", b"\n")
WORDS = st.text(st.characters(categories=["L", "N", "P", "S"]), min_size=1, max_size=20)
COUNTS = st.floats(0, 1e9) | st.integers(0, 10**9)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4)
    ),
    max_leaves=12,
)


@contextlib.contextmanager
def refused_or_taken() -> Iterator[None]:
    """Hold what reads within to CPU seconds, to growth, and to exceptions of ours."""
    with bounded(5), contextlib.suppress(GreenvisError):
        yield


@st.composite
def mangled(draw: st.DrawFn, text: str) -> bytes:
    """Return a text with a few pieces cut, doubled or replaced by bytes of any kind."""
    data = text.encode()
    for _ in range(draw(st.integers(1, 4))):
        i, j = sorted(draw(st.tuples(st.integers(0, len(data)), st.integers(0, len(data)))))
        piece = draw(st.sampled_from([b"", data[i:j] * 2, *ODD]))
        data = data[:i] + piece + data[draw(st.sampled_from([i, j])) :]
    return data


@st.composite
def laid_over(draw: st.DrawFn, value: Any) -> Any:
    """Return a JSON value with one place in it replaced by any other."""
    if isinstance(value, dict) and value and draw(st.integers(0, 3)):
        key = draw(st.sampled_from([*value]))
        return {**value, key: draw(laid_over(value[key]))}
    if isinstance(value, list) and value and draw(st.integers(0, 3)):
        i = draw(st.integers(0, len(value) - 1))
        return [*value[:i], draw(laid_over(value[i])), *value[i + 1 :]]
    return draw(JSON)


@fuzz
@given(data=mangled(GOOD))
def test_recipes(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(data)
    with refused_or_taken():
        load_recipe(path)


@fuzz
@given(text=st.text(max_size=60))
def test_settings(text: str) -> None:
    with refused_or_taken():
        yamlfile.override({"train": {"seeds": [0]}}, {}, text)
        yamlfile.parse(text, "text")


@fuzz
@given(data=mangled("".join(json.dumps(line) + "\n" for line in lines())))
def test_records_of_any_bytes(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "a.rank0.jsonl"
    path.write_bytes(data)
    for read in (lambda: record.read(path), lambda: results(path), lambda: ls([path])):
        with refused_or_taken():
            read()


@fuzz
@given(content=laid_over(lines()))
def test_records_of_any_shape(content: Any, tmp_path: Path) -> None:
    path = tmp_path / "a.rank0.jsonl"
    if not isinstance(content, list) or not all(isinstance(line, dict) for line in content):
        content = [content]
    write(path, content)
    with refused_or_taken():
        json.dumps(results(path).as_json(), allow_nan=False)


@fuzz
@given(
    content=laid_over(
        card(
            uses=[
                {
                    "role": "base",
                    "name": "b",
                    "seed": 0,
                    "runs": ["r"],
                    "energy_j": {"value": 1.0},
                    "of": [],
                }
            ]
        )
    )
)
def test_cards(content: Any, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    stored = {"ref": "timm/resnet18", "options": {}, "card": content}
    save_file({"a": torch.zeros(1)}, path, metadata={weights.METADATA_KEY: json.dumps(stored)})
    with refused_or_taken():
        lineage.tree(lineage.read_card(path))


@fuzz
@given(
    content=laid_over(
        {
            "cpu_w_per_busy_cpu": {"low": 1.0, "central": 2.0, "high": 3.0},
            "wall_meter": {"idle_w": 1.0},
        }
    )
)
def test_coefficients(content: Any, tmp_path: Path) -> None:
    path = tmp_path / "coefficients.json"
    path.write_text(json.dumps(content))
    with refused_or_taken():
        load_coefficients(path)


QUICKSTART = json.loads(
    (Path(__file__).parents[2] / "reports" / "quickstart" / "results.json").read_text()
)


@fuzz
@given(content=laid_over(QUICKSTART))
def test_results(content: Any, tmp_path: Path) -> None:
    path = tmp_path / "results.json"  # a report of it lies beside it
    path.write_text(json.dumps(content))
    with refused_or_taken():
        (report if EXAMPLES > 40 else results)(path)


@fuzz
@given(
    name=st.sampled_from(["key.json", "values.bin", "index.bin", "in-use"]),
    data=st.binary(max_size=200),
)
def test_caches(name: str, data: bytes, tmp_path: Path) -> None:
    cache = Cache(tmp_path, {"part": "a"}, length=3)
    cache.put([0, 1, 2], torch.arange(3.0)[:, None])
    cache.close()
    (cache.path / name).write_bytes(data)
    again = Cache(tmp_path, {"part": "a"}, length=3, note=lambda text: None)
    seen = again.get([0, 1, 2])
    assert seen is None or torch.equal(seen, torch.arange(3.0)[:, None])
    again.close()


@fuzz
@given(
    name=st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,20}", fullmatch=True),
    epochs=st.integers(0, 10**6),
    lr=st.floats(1e-6, 1e3),
    seeds=st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=5, unique=True),
    title=WORDS,
)
def test_good_recipes_are_taken(
    name: str, epochs: int, lr: float, seeds: list[int], title: str, tmp_path: Path
) -> None:
    content = yamlfile.parse(GOOD, "good")
    content |= {"name": name, "train": {"epochs": epochs, "lr": lr, "seeds": seeds}}
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps({**content, "report": {"title": title}}, ensure_ascii=False))
    recipe = load_recipe(path)
    assert (recipe.name, recipe.train.epochs, recipe.train.lr) == (name, epochs, lr)
    assert [*recipe.train.seeds] == seeds


@fuzz
@given(
    words=st.lists(WORDS, min_size=2, max_size=2), cpu_s=COUNTS, steps=st.integers(0, 10**9),
    accuracy=st.floats(0, 1), seed=st.integers(0, 2**32 - 1),
)  # fmt: skip
def test_good_records_are_taken(
    words: list[str], cpu_s: float, steps: int, accuracy: float, seed: int, tmp_path: Path
) -> None:
    name, arm = words
    header = {"name": name, "arm": arm, "seed": seed}
    content = lines(header, sample={"cpu_s": cpu_s, "steps": steps}, fact={"accuracy": accuracy})
    made = results(write(tmp_path / "a.rank0.jsonl", content)).as_json()
    assert made["arms"][arm]["accuracy"]["mean"] == accuracy
    assert not any("left out" in note for note in made["notes"])
    (row,) = ls([tmp_path / "a.rank0.jsonl"])
    assert (row["name"], row["seed"]) == (name, seed)
    assert (row["metric"], row["score"]) == ("accuracy", accuracy)
    stored = tmp_path / "results.json"
    stored.write_text(json.dumps(made, allow_nan=False))
    assert results(stored).order == [arm]


@fuzz
@given(run=WORDS, arm=WORDS, seed=st.integers(0, 2**32), joules=COUNTS)
def test_good_cards_are_taken(run: str, arm: str, seed: int, joules: float, tmp_path: Path) -> None:
    energy = {"value": joules, "low": joules / 2, "high": 2 * joules, "provenance": "measured"}
    made = card(run=run, arm=arm, seed=seed, energy_j=energy)
    stored = {"ref": "timm/resnet18", "options": {}, "card": made}
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.zeros(1)}, path, metadata={weights.METADATA_KEY: json.dumps(stored)})
    read = lineage.read_card(path)
    assert (read["run"], read["arm"], read["total_j"]["value"]) == (run, arm, float(joules))


@fuzz
@given(watts=st.lists(st.floats(0, 1000), min_size=3, max_size=3).map(sorted))
def test_good_coefficients_are_taken(watts: list[float], tmp_path: Path) -> None:
    band = dict(zip(("low", "central", "high"), watts, strict=True))
    path = tmp_path / "coefficients.json"
    path.write_text(json.dumps({"ram_w_per_gb": band}))
    read = load_coefficients(path)["ram_w_per_gb"]
    assert {key: read[key] for key in band} == band


@fuzz
@given(values=st.lists(st.floats(width=32, allow_nan=False), min_size=3, max_size=3))
def test_good_caches_are_taken(values: list[float], tmp_path: Path) -> None:
    cache = Cache(tmp_path, {"part": "a"}, length=3)
    cache.put([0, 1, 2], torch.tensor(values)[:, None])
    cache.close()
    again = Cache(tmp_path, {"part": "a"}, length=3)
    kept = again.get([0, 1, 2])
    assert kept is not None
    assert torch.equal(kept, torch.tensor(values)[:, None])
    again.close()
