"""`greenvis bench image_tokens`: a short answer with fewer tokens per image, joules and time, by
how many prompts are answered at once. A minute on one core.

What fewer tokens cost in accuracy stands in reports/image-tokens.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import nn

from greenvis import models
from greenvis.bench import _floor, _output
from greenvis.bench._options import Out, Rounds, Threads
from greenvis.bench._turns import measured
from greenvis.core.example import Example
from greenvis.core.wrap import wrap
from greenvis.experiment.optim import threads as cpu_threads
from greenvis.experiment.serving import Served
from greenvis.meters.header import cpu
from greenvis.meters.track import track
from greenvis.tasks.vqa import Vqa
from greenvis.techniques import registry

FULL, AGAIN = "all tokens", "again"
SETTINGS: Mapping[str, Mapping[str, Any] | None] = {
    FULL: None,
    "merge": {"keep": 0.25},
    "pool": {"method": "pool", "keep": 0.25},
    "prune": {"method": "prune", "keep": 0.25},
    "larger patches": None,
    f"{FULL} {AGAIN}": None,
    f"merge {AGAIN}": {"keep": 0.25},
}
SIZES: Any = {"img_size": 32, "in_chans": 1, "vision_dim": 64, "vision_depth": 1}
SIZES |= {"embed_dim": 64, "depth": 4}  # as in recipes/tokens/image-tokens.yaml
PATCHES = (4, 2)  # 64 and 256 tokens
BATCHES = (1, 8, 64)
QUESTION, ANSWER = 6, 2  # tokens
Images = Annotated[list[int] | None, typer.Option("--batch", min=1, help="images at once")]


def run(
    out: Out = None, batches: Images = None, rounds: Rounds = 9, threads: Threads = 1
) -> dict[str, Any]:
    """Return {"rows": [{"image_tokens", "batch", "setting", "ms", "energy_j", "energy_ratio"}], …}.

    All settings take turns within each round. ms (of CPU time; on a GPU of wall time) and energy_j
    are per answer, medians over rounds; energy_ratio is the median of each round's own ratio to all
    tokens. Two settings are there twice, under another name: how far these read apart is noise.
    out: a folder to write report.md and results.json to.
    """
    started = time.monotonic()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows: list[dict[str, Any]] = []
    with (
        cpu_threads(threads),
        tempfile.TemporaryDirectory() as folder,
        track("image_tokens", dir=folder, quiet=True) as run_,
    ):
        for patch in PATCHES:
            for batch in batches or BATCHES:
                x, labels = _asked(batch)
                arms = {name: _arm(name, patch, labels) for name in SETTINGS}
                spent = measured(arms, x, device, rounds, run_)
                rows += _rows((SIZES["img_size"] // patch) ** 2, batch, spent)
    result = {
        "rows": rows, "rounds": rounds, "threads": threads, "device": device.type,
        "machine": cpu(), "torch": torch.__version__,
        "seconds": round(time.monotonic() - started),
    }  # fmt: skip
    if out is not None:
        _output.write(out, result, _markdown(result, out))
    return result


def _asked(batch: int) -> tuple[Example, torch.Tensor]:
    """Return images with questions by chance, and answers of the length that is asked for."""
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(batch, 1, SIZES["img_size"], SIZES["img_size"], generator=generator)
    words = torch.randint(2, 60, (batch, QUESTION + ANSWER), generator=generator)
    return Example((images, words[:, :QUESTION])), words[:, QUESTION:]


def _arm(name: str, patch: int, labels: torch.Tensor) -> nn.Module:
    """Return a model with random weights that answers with a setting's tokens."""
    torch.manual_seed(0)
    larger = 2 * patch if name == "larger patches" else patch
    model: Any = models.build("plain/llava", patch_size=larger, **SIZES).eval()
    model.generation_config.eos_token_id = None  # chance would end some answers sooner
    if (request := SETTINGS[name]) is not None:
        technique = registry.find("image_tokens").model_validate(dict(request))
        wrap(model, technique, task="vqa")
    return Served(model, Vqa(), labels)


def _rows(
    tokens: int, batch: int, spent: Mapping[str, Sequence[tuple[float, float | None]]]
) -> list[dict[str, Any]]:
    rows = []
    for name, own in spent.items():
        joules = [j for _, j in own if j is not None]
        ratios = [j / f for (_, j), (_, f) in zip(own, spent[FULL], strict=True) if j and f]
        known = len(joules) == len(own)
        rows.append({
            "image_tokens": tokens, "batch": batch, "setting": name,
            "ms": float(f"{1e3 * statistics.median(s for s, _ in own) / batch:.3g}"),
            "energy_j": round(statistics.median(joules) / batch, 6) if known else None,
            "energy_ratio": round(statistics.median(ratios), 3) if ratios else None,
        })  # fmt: skip
    return rows


def _apart(rows: Sequence[Mapping[str, Any]]) -> float | None:
    """Return how many times apart settings of the same work read, at most."""
    ratio = {(r["image_tokens"], r["batch"], r["setting"]): r["energy_ratio"] for r in rows}
    pairs = [
        (ratio[*where, name.removesuffix(f" {AGAIN}")], value)
        for (*where, name), value in ratio.items()
        if name.endswith(AGAIN)
    ]
    return _floor.ratio(a / b if a and b else None for a, b in pairs)


def _markdown(result: Mapping[str, Any], out: Path) -> str:
    rows = result["rows"]
    similar, neighbours = _said(rows, "merge"), _said(rows, "pool")
    batches = " ".join(f"--batch {b}" for b in dict.fromkeys(row["batch"] for row in rows))
    shown = [{**r, "energy_mj": _milli(r["energy_j"])} for r in rows]
    for row in shown:
        del row["energy_j"]
    return "\n".join([
        "# A short answer with a quarter of the tokens of an image", "",
        f"Of an answer's joules similar tokens merged leave {similar}; neighbours merged leave "
        f"{neighbours}.", "",
        f"`greenvis bench image_tokens {batches} --rounds {result['rounds']} --out {out}`, "
        f"{result['seconds']} s on {os.cpu_count()} logical CPUs, {result['threads']} thread(s), "
        f"{result['device']}, torch {result['torch']}. The Llava of "
        f"recipes/tokens/image-tokens.yaml, random weights, a question of {QUESTION} tokens, an "
        f"answer of {ANSWER}. Medians of {result['rounds']} rounds in which all settings take "
        "turns, ratios of what ran in the same round. `energy_mj` and `ms` are per answer. What "
        "is the same for each call, whatever it reads (the library's own steps), is shared by "
        "the images of a batch: with few of them it is most of an answer.", "",
        *_floor.table(shown), "",
        _floor.sentence(_apart(rows), "settings there twice"), "",
    ])  # fmt: skip


def _said(rows: Sequence[Mapping[str, Any]], setting: str) -> str:
    """Return the ratios of a setting, by tokens of an image and images at once."""
    counts = dict.fromkeys(row["image_tokens"] for row in rows)
    return ", ".join(
        f"of {count} tokens "
        + ", ".join(
            f"×{r['energy_ratio']:.2f} ({r['batch']} at once)"
            for r in rows
            if (r["image_tokens"], r["setting"]) == (count, setting) and r["energy_ratio"]
        )
        for count in counts
    )


def _milli(joules: float | None) -> float | None:
    return None if joules is None else float(f"{1e3 * joules:.2g}")
