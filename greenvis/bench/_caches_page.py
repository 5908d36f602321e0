"""The report of `greenvis bench kv_cache`."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from greenvis.bench import _floor

FULL, AGAIN = "dynamic", "dynamic again"  # transformers' own, all rows; twice, for the noise floor
WIDTH = 320  # of the language model, in which all caches are measured
LINE = 0.85  # of the dynamic cache's decode joules, which a static one is to stay below


class _Setting(NamedTuple):
    width: int
    batch: int
    prompt: int

    def __str__(self) -> str:
        count = "one prompt" if self.batch == 1 else f"{self.batch} prompts at once"
        return f"{count} of {self.prompt:,} tokens, {self.width} wide"


def _decode_ratios(rows: Sequence[Mapping[str, Any]]) -> dict[_Setting, dict[str, float | None]]:
    """Return the ratio of each cache's decode joules in each setting."""
    ratios: dict[_Setting, dict[str, float | None]] = {}
    for row in rows:
        setting = _Setting(row["width"], row["batch"], row["prompt"])
        ratios.setdefault(setting, {})[row["cache"]] = row["decode_ratio"]
    return ratios


def _apart(ratio: Mapping[str, float | None]) -> float | None:
    """Return how many times apart two dynamic caches' decode read; None where it was not."""
    once, again = (ratio.get(name) for name in (FULL, AGAIN))
    return _floor.ratio([again / once]) if once and again else None


def line(rows: Sequence[Mapping[str, Any]]) -> str:
    """Say where a static cache stays below the line, where it does not, and where two dynamic ones
    read too far apart to tell."""
    where: dict[str, list[str]] = {"below": [], "above": [], "unclear": []}
    for setting, ratio in _decode_ratios(rows).items():
        value = ratio.get("static")
        if value is None:
            continue
        apart = _apart(ratio) or 1.0
        which = "below" if value * apart <= LINE else "above" if value / apart > LINE else "unclear"
        where[which].append(f"{setting} (×{value:.2f})")
    below, above, unclear = ("; ".join(w) or "nothing" for w in where.values())
    alike = all(r["same_answers"] == 1 for r in rows if r["cache"] == "static")
    same = "the same in every token" if alike else "NOT the same"
    return (
        f"The static cache takes at most {LINE} of the decode joules of transformers' dynamic one "
        f"for {below}. More for {above}. Too near to tell, for two dynamic caches read as far "
        f"apart: {unclear}. Its answers are {same}."
    )


def markdown(result: Mapping[str, Any], out: Path) -> str:
    ratios = _decode_ratios(result["rows"])
    batches = dict.fromkeys(setting.batch for setting in ratios)
    widths = {row["width"]: row["parameters"] for row in result["rows"]}
    chosen = " ".join(
        [*(f"--batch {batch}" for batch in batches),
         *(f"--width {width}" for width in widths if width != WIDTH)]
    )  # fmt: skip
    sizes = ", ".join(f"{count:,} parameters ({width} wide)" for width, count in widths.items())
    apart = max(filter(None, map(_apart, ratios.values())), default=None)
    lines = [
        "# Keys and values of a prompt: which stay, what that saves, and what is answered", "",
        line(result["rows"]), "",
        f"`greenvis bench kv_cache {chosen} --rounds {result['rounds']} "
        f"--answer {result['answer_tokens']} "
        f"--steps {result['steps']} --questions {result['questions']} --out {out}`, "
        f"{result['seconds']} s on {os.cpu_count()} "
        f"logical CPUs, {result['threads']} thread(s), torch {result['torch']}. A Llava of "
        f"{sizes} with random weights answers "
        f"{result['answer_tokens']} tokens to each prompt, `batch` prompts of one length at once; "
        f"medians of {result['rounds']} rounds in which all caches take turns. Joules are per "
        "answer: `decode_j` of the tokens behind the first, `answer_ratio` of the answer as a "
        "whole, prompt included, both beside transformers' dynamic cache in the same round, "
        "whose two turns there are averaged. "
        "Caches that let rows go keep a quarter of the prompt's. With more prompts at once the "
        "weights are read once for all, and what each token costs is its prompt's rows: read, "
        "and by the dynamic cache copied. The narrower a model, the more of a token's cost is "
        "neither, but Python's.",
        "", *_floor.table([{k: v for k, v in row.items() if k != "parameters"}
                           for row in result["rows"]]), "",
        _floor.sentence(apart, "two dynamic caches' decode where they are furthest from each other "
                        "(`dynamic again` has that of each setting)", result["repeatability"]), "",
    ]  # fmt: skip
    if not result["answers"]:
        return "\n".join([*lines, "No model was trained for it: what is answered with fewer rows "
                          "is not measured here.", ""])  # fmt: skip
    return "\n".join([
        *lines, "## What is answered", "",
        f"A smaller Llava, trained for {result['steps']} steps on dialogues about duets "
        f"({result['training_energy_j']} J), says which clothes the last image of a dialogue "
        f"shows, and on which pattern; {result['questions']} dialogues of each length. "
        "`agreement`: tokens behind the first that are those of the dynamic cache (the first is "
        "said before any row goes); `exact_match`: answers that are right.", "",
        *_floor.table(result["answers"]), "",
    ])  # fmt: skip
