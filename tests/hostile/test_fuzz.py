"""Readers of strangers' files under a fuzzer: no exception but ours. `make fuzz` goes on for
longer."""

from __future__ import annotations

import contextlib
import json
import os
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
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4)
    ),
    max_leaves=12,
)


@st.composite
def mangled(draw: st.DrawFn, text: str) -> bytes:
    """Return a text with a few pieces cut, doubled or replaced by bytes of any kind."""
    data = text.encode()
    for _ in range(draw(st.integers(1, 4))):
        i, j = sorted(draw(st.tuples(st.integers(0, len(data)), st.integers(0, len(data)))))
        piece = draw(
            st.sampled_from(
                [
                    b"",
                    data[i:j] * 2,
                    b"\0",
                    b"\xff",
                    b"{",
                    b"[",
                    b"*a",
                    b"&a ",
                    b"1e999",
                    b"-",
                    b": ",
                    b"\n",
                ]
            )
        )
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
    with contextlib.suppress(GreenvisError):
        load_recipe(path)


@fuzz
@given(text=st.text(max_size=60))
def test_settings(text: str) -> None:
    try:
        yamlfile.override({"train": {"seeds": [0]}}, {}, text)
        yamlfile.parse(text, "text")
    except GreenvisError:
        pass


@fuzz
@given(data=mangled("".join(json.dumps(line) + "\n" for line in lines())))
def test_records_of_any_bytes(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "a.rank0.jsonl"
    path.write_bytes(data)
    for read in (lambda: record.read(path), lambda: results(path), lambda: ls([path])):
        with contextlib.suppress(GreenvisError):
            read()


@fuzz
@given(content=laid_over(lines()))
def test_records_of_any_shape(content: Any, tmp_path: Path) -> None:
    path = tmp_path / "a.rank0.jsonl"
    if not isinstance(content, list) or not all(isinstance(line, dict) for line in content):
        content = [content]
    write(path, content)
    with contextlib.suppress(GreenvisError):
        json.dumps(results(path), allow_nan=False)


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
    with contextlib.suppress(GreenvisError):
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
    with contextlib.suppress(GreenvisError):
        load_coefficients(path)


QUICKSTART = json.loads(
    (Path(__file__).parents[2] / "reports" / "quickstart" / "results.json").read_text()
)


@fuzz
@given(content=laid_over(QUICKSTART))
def test_results(content: Any, tmp_path: Path) -> None:
    path = tmp_path / "results.json"  # a report of it lies beside it
    path.write_text(json.dumps(content))
    with contextlib.suppress(GreenvisError):
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
