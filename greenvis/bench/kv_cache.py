"""`greenvis bench kv_cache`: what of a prompt's keys and values stays while a vision–language model
answers. About twenty minutes on one core.

Joules are of a Llava with random weights, on which they do not depend; agreement and accuracy of a
smaller one that is trained here on dialogues about duets.
"""

from __future__ import annotations

import itertools
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Annotated, Any, NamedTuple

import torch
import typer
from torch import nn

from greenvis import models
from greenvis.bench import _dialogues, _floor, _output
from greenvis.bench._caches_page import AGAIN, FULL, WIDTH
from greenvis.bench._caches_page import markdown as _markdown
from greenvis.bench._options import Out, Rounds, Threads
from greenvis.core.wrap import wrap
from greenvis.experiment.optim import threads as cpu_threads
from greenvis.meters import pricing
from greenvis.meters.answering import generate
from greenvis.meters.header import cpu
from greenvis.meters.speed import in_turn
from greenvis.meters.track import Tracker, track
from greenvis.techniques import registry

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
SIZES: Any = {"img_size": 48, "patch_size": 4, "vision_dim": 96, "vision_depth": 2}
SIZES |= {"depth": 4}
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
