"""Readers of strangers' files under atheris, which looks for inputs that reach new code; `make
fuzz` runs it.

python fuzz_atheris.py READER [libFuzzer's options, such as -max_total_time=60]. It stops at an
exception that is not ours, at an input that takes ten seconds, and at growth beyond bounds; the
input is left as crash-…, timeout-… or oom-….
"""

from __future__ import annotations

import contextlib
import json
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["greenvis"]):
    from greenvis.core import weights, yamlfile
    from greenvis.data.output_cache import Cache
    from greenvis.errors import GreenvisError
    from greenvis.experiment import lineage
    from greenvis.experiment.recipe import load_recipe
    from greenvis.meters import record
    from greenvis.meters.coefficients import load_coefficients
    from greenvis.report import results
    from greenvis.report.listing import ls

import psutil
import torch
from safetensors.torch import save_file

from tests.hostile.test_loading import card
from tests.hostile.test_recipes import GOOD
from tests.hostile.test_records import lines

FOLDER = Path(tempfile.mkdtemp())


def _recipe(data: bytes) -> None:
    (FOLDER / "recipe.yaml").write_bytes(data)
    with contextlib.suppress(GreenvisError):
        yamlfile.parse(data.decode("utf-8", "replace"), "text")
    load_recipe(FOLDER / "recipe.yaml")


def _record(data: bytes) -> None:
    path = FOLDER / "a.rank0.jsonl"
    path.write_bytes(data)
    for read in (lambda: record.read(path), lambda: results(path), lambda: ls([path])):
        with contextlib.suppress(GreenvisError):
            read()


def _card(data: bytes) -> None:
    path = FOLDER / "model.safetensors"
    save_file(
        {"a": torch.zeros(1)},
        path,
        metadata={weights.METADATA_KEY: data.decode("utf-8", "replace")},
    )
    lineage.tree(lineage.read_card(path))


def _coefficients(data: bytes) -> None:
    (FOLDER / "coefficients.json").write_bytes(data)
    load_coefficients(FOLDER / "coefficients.json")


def _results(data: bytes) -> None:
    (FOLDER / "results.json").write_bytes(data)
    results(FOLDER / "results.json")


def _cache(data: bytes) -> None:
    cache = Cache(FOLDER / "cache", {"part": "a"}, length=3, top_k=1, note=lambda text: None)
    cache.put([0, 1, 2], torch.eye(3))
    cache.close()
    name = ("key.json", "values.bin", "index.bin")[data[0] % 3 if data else 0]
    (cache.path / name).write_bytes(data[1:])
    again = Cache(FOLDER / "cache", {"part": "a"}, length=3, top_k=1, note=lambda text: None)
    again.get([0, 1, 2])
    again.close()


STORED = {"ref": "timm/resnet18", "options": {}, "card": card()}
READERS: dict[str, tuple[Callable[[bytes], None], str]] = {
    "recipe": (_recipe, GOOD),
    "record": (_record, "".join(json.dumps(line) + "\n" for line in lines())),
    "card": (_card, json.dumps(STORED)),
    "coefficients": (
        _coefficients,
        json.dumps({"cpu_w_per_busy_cpu": {"low": 1.0, "central": 2.0, "high": 3.0}}),
    ),
    "results": (
        _results,
        (Path(__file__).parents[2] / "reports" / "quickstart" / "results.json").read_text(),
    ),
    "cache": (_cache, "\0{}"),
}


def main() -> None:
    """See above."""
    read, seed = READERS[sys.argv[1]]
    (FOLDER / "seeds").mkdir()
    (FOLDER / "seeds" / "good").write_text(seed)

    def one(data: bytes) -> None:
        with contextlib.suppress(GreenvisError), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            read(data)

    most_mb = psutil.Process().memory_info().rss // 2**20 + 200
    limits = ["-timeout=10", f"-rss_limit_mb={most_mb}", f"-max_len={max(4096, 2 * len(seed))}"]
    atheris.Setup([sys.argv[0], *limits, *sys.argv[2:], str(FOLDER / "seeds")], one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
