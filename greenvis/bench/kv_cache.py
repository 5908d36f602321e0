"""`greenvis bench kv_cache`: what of a prompt's keys and values stays while a vision–language model
answers. About twenty minutes on one core.

Joules are of a Llava with random weights, on which they do not depend; agreement and accuracy of a
smaller one that is trained here on dialogues about duets.
"""

from __future__ import annotations

import itertools
import os
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import typer
from torch import nn

from greenvis import models
from greenvis.bench import _dialogues, _floor, _output
from greenvis.bench._options import Out, Rounds, Threads
from greenvis.core.wrap import wrap
from greenvis.experiment.optim import threads as cpu_threads
from greenvis.meters import pricing
from greenvis.meters.answering import generate
from greenvis.meters.header import cpu
from greenvis.meters.speed import in_turn
from greenvis.meters.track import Tracker, track
from greenvis.techniques import registry

FULL, AGAIN = "dynamic", "dynamic again"  # transformers' own, all rows; twice, for the noise floor
METHODS: Mapping[str, Mapping[str, Any] | None] = {
    FULL: None,
    "static": {"method": "static"},
    "window": {"method": "window", "rows": 0.25},
    "h2o": {"method": "h2o", "rows": 0.25},
    "snapkv": {"method": "snapkv", "rows": 0.25, "recent": 16},
    "key_norm": {"method": "key_norm", "rows": 0.25, "recent": 16},
}
LOSSLESS = (FULL, "static", AGAIN)  # those measured with several prompts at once
MOST = 8192  # tokens of several prompts answered at once
LINE = 0.85  # of the dynamic cache's decode joules, which a static one is to stay below
SIZES: Any = {"img_size": 48, "patch_size": 4, "vision_dim": 96, "vision_depth": 2}
SIZES |= {"depth": 4}
WIDTH = 320  # of the language model, in which all caches are measured
Steps = Annotated[int, typer.Option(min=0, help="of training, of 64 questions each")]
Questions = Annotated[int, typer.Option(min=1, help="answered at each length")]
Widths = Annotated[
    list[int] | None,
    typer.Option(
        "--width", min=8, help="of further models, in which the caches without loss are measured"
    ),
]
Batches = Annotated[
    list[int] | None,
    typer.Option(
        "--batch", min=1, help="prompts of one length answered at once: 1 and 4; may be repeated"
    ),
]


def run(
    out: Out = None,
    prompts: Sequence[int] = (512, 2048, 4096),
    batches: Batches = None,
    widths: Widths = None,
    answer: Annotated[int, typer.Option(min=2, help="tokens of each answer")] = 32,
    rounds: Rounds = 3,
    steps: Steps = 1000,
    questions: Questions = 40,
    threads: Threads = 1,
) -> dict[str, Any]:
    """Return {"rows": [{"width", "prompt", "batch", "cache", "prefill_j", "decode_j",
    "decode_ratio", "answer_ratio", …}], "answers": [{"prompt", "cache", "agreement",
    "exact_match"}], …}.

    Joules are per answer. decode_j is of the tokens behind the first, answer_ratio of prefill and
    decode together; ratios are to the dynamic cache of the same round, the mean of its two turns
    there, medians over rounds.
    Several prompts at once are answered by the caches without loss alone, where they have at most
    8,192 tokens together; so is one prompt by the models of further `widths`. agreement is the
    share of tokens behind the first that are those of the dynamic cache. out: a folder to write
    report.md and results.json to.
    """
    started = time.monotonic()
    with (
        cpu_threads(threads),
        tempfile.TemporaryDirectory() as folder,
        track("kv_cache", dir=folder) as run_,
    ):
        rows = _costs(WIDTH, prompts, batches or [1, 4], answer, rounds, run_)
        for width in widths or ():
            rows += _costs(width, prompts, [1], answer, rounds, run_)
        answers, training = ([], None) if not steps else _trained(prompts, steps, questions, run_)
    result = {
        "rows": rows, "answers": answers, "rounds": rounds, "answer_tokens": answer,
        "questions": questions, "steps": steps, "threads": threads, "training_energy_j": training,
        "machine": cpu(), "torch": torch.__version__,
        "repeatability": _floor.repeatability(),
        "seconds": round(time.monotonic() - started),
    }  # fmt: skip
    if out is not None:
        _output.write(out, result, _markdown(result, out))
    return result


def _prompts(model: Any, length: int, batch: int) -> dict[str, torch.Tensor]:
    """Return images and words by chance, `length` tokens in each of `batch` prompts."""
    patches = (SIZES["img_size"] // SIZES["patch_size"]) ** 2
    generator = torch.Generator().manual_seed(0)
    images = max(1, (length - 8) // (patches + 8))
    image = torch.full((batch, patches), model.config.image_token_id)
    parts = [_words(batch, length - images * (patches + 8), generator)]
    for _ in range(images):
        parts += [image, _words(batch, 8, generator)]
    size = (batch * images, 3, SIZES["img_size"], SIZES["img_size"])
    pixels = torch.rand(size, generator=generator)
    return {"input_ids": torch.cat(parts, 1), "pixel_values": pixels}


def _words(batch: int, length: int, generator: torch.Generator) -> torch.Tensor:
    return torch.randint(2, 60, (batch, length), generator=generator)


class _Spent(NamedTuple):
    """What answering some prompts took: joules of both parts, seconds of the second, tokens."""

    prefill: float
    decode: float
    decode_s: float
    tokens: torch.Tensor


def _costs(
    width: int,
    prompts: Sequence[int],
    batches: Sequence[int],
    answer: int,
    rounds: int,
    run_: Tracker,
) -> list[dict[str, Any]]:
    """Return a row for each prompt, batch and cache of a model of this width."""
    torch.manual_seed(0)
    model: Any = models.build("plain/llava", **SIZES, embed_dim=width).eval()
    size = {"width": width, "parameters": sum(p.numel() for p in model.parameters())}
    rows = []
    for batch, length in itertools.product(batches, prompts):
        if batch > 1 and batch * length > MOST:
            continue
        inputs = {**_prompts(model, length, batch), "max_new_tokens": answer,
                  "min_new_tokens": answer, "do_sample": False}  # fmt: skip
        names = LOSSLESS if batch > 1 or width != WIDTH else (*METHODS, AGAIN)
        spent: dict[str, list[_Spent]] = {name: [] for name in names}
        for number in range(rounds + 1):
            for name in in_turn(names, number):
                spent[name].append(_spent(model, name, inputs, run_))
        full = _between(spent)
        rows += [{**size, **_row(length, name, own, full)} for name, own in spent.items()]
    return rows


def _between(spent: Mapping[str, Sequence[_Spent]]) -> list[_Spent]:
    """Return what the dynamic cache took in each round: the mean of both times."""
    return [
        _Spent((a.prefill + b.prefill) / 2, (a.decode + b.decode) / 2, a.decode_s, a.tokens)
        for a, b in zip(spent[FULL], spent[AGAIN], strict=True)
    ]


def _row(length: int, name: str, own: Sequence[_Spent], full: Sequence[_Spent]) -> dict[str, Any]:
    """Return the medians of a cache's rounds, per answer, and of its ratios to the dynamic one."""
    pairs = [*zip(own, full, strict=True)][1:]  # the first warms up; neighbours met a round alike
    batch, words = full[0].tokens.shape
    prefill, decode, seconds = (
        statistics.median(column) / batch
        for column in zip(*((p.prefill, p.decode, p.decode_s) for p, _ in pairs), strict=True)
    )
    same = [bool((a == b).all()) for p, f in pairs for a, b in zip(p.tokens, f.tokens, strict=True)]
    return {
        "prompt": length, "batch": batch, "cache": name, "prefill_j": _figure(prefill),
        "decode_j": _figure(decode), "decode_ms_per_token": _figure(1e3 * seconds / (words - 1)),
        "decode_ratio": _ratio(pairs, 1, 2), "answer_ratio": _ratio(pairs, 0, 2),
        "same_answers": round(sum(same) / len(same), 3) if name in LOSSLESS else None,
    }  # fmt: skip


def _spent(model: Any, name: str, inputs: Mapping[str, Any], run_: Tracker) -> _Spent:
    """Return what answering took with one of the caches."""
    with _cached(model, name):
        answered = generate(run_, model, **inputs)
    components = run_.header["components"]
    prefill, decode = (
        pricing.joules({k: v for k, v in part.items() if k != "at_s"}, components).value or 0.0
        for part in (answered.prefill, answered.decode)
    )
    tokens = answered.output[:, inputs["input_ids"].shape[1] :]
    return _Spent(prefill, decode, answered.decode["at_s"], tokens)


@contextmanager
def _cached(model: nn.Module, name: str) -> Iterator[None]:
    """Let a model answer with one of the caches within."""
    request = METHODS.get(name)
    if request is None:
        yield
        return
    live = wrap(model, registry.find("kv_cache").model_validate(dict(request)))
    try:
        yield
    finally:
        live.undo()


def _trained(
    prompts: Sequence[int], steps: int, questions: int, run_: Tracker
) -> tuple[list[dict[str, Any]], int | None]:
    """Return a row for each prompt and cache, and the joules of the training."""
    model, train, test = _dialogues.prepared(3000, 400)
    before = run_.energy().value
    _dialogues.train(model, train, steps, run_)
    after = run_.energy().value
    joules = None if before is None or after is None else round(after - before)
    return _answers(model, test, prompts, questions), joules


def _answers(
    model: nn.Module, turns: _dialogues.Turns, prompts: Sequence[int], questions: int
) -> list[dict[str, Any]]:
    """Return how answers with each cache agree with those of all rows, and with the truth."""
    model.eval()
    last = range(min(questions, len(turns.shown)))
    rows = []
    for length in prompts:
        generator = torch.Generator().manual_seed(length)
        dialogues = [turns.dialogue(length, row, generator) for row in last]
        own = {name: [_said(model, name, d) for d in dialogues] for name in METHODS}
        for name, said in own.items():
            same = right = tokens = alike = 0
            for mine, full, dialogue in zip(said, own[FULL], dialogues, strict=True):
                tokens += len(full) - 1
                same += sum(a == b for a, b in zip(mine[1:], full[1:], strict=False))
                alike += mine == full
                right += mine == dialogue.answer
            rows.append({
                "prompt": length, "cache": name,
                "agreement": round(same / tokens, 3) if tokens else None,
                "same_answers": round(alike / len(said), 3),
                "exact_match": round(right / len(said), 3),
            })  # fmt: skip
    return rows


def _said(model: Any, name: str, dialogue: _dialogues.Dialogue) -> list[int]:
    """Return the tokens of an answer, to its end."""
    with _cached(model, name):
        out = model.generate(**dialogue.inputs, max_new_tokens=5, do_sample=False)
    tokens = out[0, dialogue.inputs["input_ids"].shape[1] :].tolist()
    end = model.generation_config.eos_token_id
    return tokens[: tokens.index(end) + 1] if end in tokens else tokens


def _ratio(
    pairs: Sequence[tuple[Sequence[Any], Sequence[Any]]], begin: int, end: int
) -> float | None:
    each = [sum(a[begin:end]) / sum(b[begin:end]) for a, b in pairs if sum(b[begin:end])]
    return round(statistics.median(each), 3) if each else None


def _figure(value: float) -> float:
    return float(f"{value:.3g}")


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


def _line(rows: Sequence[Mapping[str, Any]]) -> str:
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


def _markdown(result: Mapping[str, Any], out: Path) -> str:
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
        _line(result["rows"]), "",
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
