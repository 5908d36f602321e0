"""`greenvis bench dense_fusion`: what experts are worth to a small vision–language model, as words
in its prompt and as captions to pretrain on. Some minutes per seed on one core.

The loop of DenseFusion (Li et al., 2024) in miniature: what experts answer becomes captions by
rule, a captioner learns from few of them and writes many, and the model is pretrained on those.
"""

from __future__ import annotations

import copy
import os
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn

from greenvis.bench import _duet_texts, _floor, _output
from greenvis.bench._duet_texts import Pictures, fit, say
from greenvis.bench._options import Out, Rounds, Threads
from greenvis.errors import BadInput
from greenvis.experiment.optim import threads as cpu_threads
from greenvis.meters.header import cpu
from greenvis.meters.speed import in_turn
from greenvis.meters.track import Tracker, track

# what each arm builds on, beside its own fine-tuning
STAGES: Mapping[str, Sequence[str]] = {
    "plain": (),
    "longer": (),
    "context": ("experts", "answers for few"),
    "captions": (
        "experts", "answers for few", "captioner", "answers for many", "captions for many",
        "pretraining",
    ),
    "captions, context": (
        "experts", "answers for few", "captioner", "answers for many", "captions for many",
        "pretraining",
    ),
    "rule": ("experts", "answers for few", "answers for many", "pretraining by rule"),
}  # fmt: skip
WITH_CONTEXT = ("context", "captions, context")
Steps = Annotated[int, typer.Option(min=1, help="of 64 images each")]


def run(
    out: Out = None,
    images: Annotated[int, typer.Option(min=1, help="to caption")] = 4000,
    labels: Annotated[int, typer.Option(min=1, help="images whose question is answered")] = 400,
    expert_images: Annotated[int, typer.Option(min=1, help="each expert learns from")] = 2000,
    test: Annotated[int, typer.Option(min=1, help="images")] = 500,
    expert_steps: Steps = 200,
    captioner_steps: Steps = 300,
    pretraining_steps: Steps = 600,
    steps: Steps = 200,
    seeds: Annotated[int, typer.Option(min=1, help="from 0")] = 2,
    rounds: Rounds = 3,
    threads: Threads = 1,
) -> dict[str, Any]:
    """Return {"rows": [{"seed", "arm", "exact_match", "own_j", "total_j", "answer_j"}],
    "captioners": [{"seed", "captioner", "exact_match"}], "experts": [{"seed", "topic",
    "accuracy"}], …}.

    total_j is of fine-tuning and all stages an arm builds on, answer_j per answer, what experts
    are asked for it included: the median over rounds in which all arms take turns.

    Raises:
        BadInput: For more images with labels than there are.
    """
    if max(labels, expert_images) > images:
        raise BadInput(f"there are {images} images: labels and expert_images are at most as many")
    lengths = {
        "expert": expert_steps, "captioner": captioner_steps, "pretraining": pretraining_steps,
        "fine-tuning": steps,
    }  # fmt: skip
    started = time.monotonic()
    rows, captioners, experts, stages = [], [], [], []
    with (
        cpu_threads(threads),
        tempfile.TemporaryDirectory() as folder,
        track("dense_fusion", dir=folder, quiet=True) as run_,
    ):
        for seed in range(seeds):
            pictures = _duet_texts.pictures(images, test, seed)
            loop = Loop(pictures, labels, expert_images, lengths, seed, run_)
            rows += loop.arms(rounds)
            captioners += loop.captioners
            experts += loop.experts_reached()
            stages += [
                {"seed": seed, "stage": k, "joules": round(v)} for k, v in loop.spent.items()
            ]
    result = {
        "rows": rows, "captioners": captioners, "experts": experts, "stages": stages,
        "images": images, "labels": labels, "expert_images": expert_images, "steps": lengths,
        "rounds": rounds, "threads": threads, "machine": cpu(), "torch": torch.__version__,
        "repeatability": _floor.repeatability(), "seconds": round(time.monotonic() - started),
    }  # fmt: skip
    if out is not None:
        _output.write(out, result, _markdown(result, out))
    return result


class Loop:
    """One seed of all stages, each charged.

    Args:
        pictures: To train and to test on.
        labels: Of the first pictures, whose questions are answered.
        expert_images: Of the first pictures, which the experts learn from.
        lengths: Steps of each training.
        seed: Of weights and of the order of images.
        run: That energy is read from.
    """

    def __init__(
        self,
        pictures: tuple[Pictures, Pictures],
        labels: int,
        expert_images: int,
        lengths: Mapping[str, int],
        seed: int,
        run: Tracker,
    ) -> None:
        self.many, self.test = pictures
        self.few, self.lengths, self.seed, self.run = self.many.first(labels), lengths, seed, run
        self.spent: dict[str, float] = {}
        self.captioners: list[dict[str, Any]] = []
        with self.charged("experts"):
            part = self.many.first(expert_images)
            self.experts = {
                topic: _duet_texts.expert(part, topic, lengths["expert"], seed)
                for topic in _duet_texts.TOPICS
            }
        with self.charged("answers for few"):
            self.few_hints = self.hints(self.few)
        with self.charged("answers for many"):
            self.many_hints = self.hints(self.many)

    @contextmanager
    def charged(self, stage: str) -> Iterator[None]:
        """Charge what happens within to a stage."""
        before = self.run.energy().value
        with self.run.phase(stage):
            yield
        after = self.run.energy().value
        self.spent[stage] = (after or 0.0) - (before or 0.0)

    def hints(self, pictures: Pictures) -> Tensor:
        """Return what the experts answer, as words: int64 (images, topics)."""
        return pictures.texts.hints(_duet_texts.asked(self.experts, pictures.x))

    def experts_reached(self) -> list[dict[str, Any]]:
        """Return each expert's accuracy on test images."""
        rows = []
        for topic, answer in _duet_texts.asked(self.experts, self.test.x).items():
            right = (answer == self.test.labels[topic]).float().mean()
            rows.append({"seed": self.seed, "topic": topic, "accuracy": round(float(right), 3)})
        return rows

    def stages(self) -> list[dict[str, Any]]:
        """Return what each stage took."""
        return [
            {"seed": self.seed, "stage": stage, "joules": round(joules)}
            for stage, joules in self.spent.items()
        ]

    def model(self) -> nn.Module:
        """Return a model that has learned nothing."""
        torch.manual_seed(self.seed)
        return _duet_texts.model(self.many.texts)

    def captions(self) -> Tensor:
        """Return captions for many by a captioner with the experts' words in its prompt; the same
        captioner without them is trained beside it, for comparison."""
        texts, true = self.many.texts, self.many.captions(self.many.labels)
        out = true
        captions, steps = texts.captions(self.few_hints), self.lengths["captioner"]
        for name, stages, few, many in (
            ("image alone", ("captioner without experts", "captions without experts"), None, None),
            ("image and experts' words", ("captioner", "captions for many"), self.few_hints,
             self.many_hints),
        ):  # fmt: skip
            captioner = self.model()
            with self.charged(stages[0]):
                prompts = texts.prompt("describe", len(self.few), few)
                fit(captioner, self.few.x, prompts, captions, steps, self.seed)
            with self.charged(stages[1]):
                prompts = texts.prompt("describe", len(self.many), many)
                out = say(captioner, self.many.x, prompts, true.shape[1])
            right = (out == true).all(1).float().mean()
            self.captioners.append(
                {"seed": self.seed, "captioner": name, "exact_match": round(float(right), 3)}
            )
        return out

    def pretrained(self, stage: str, captions: Tensor) -> nn.Module:
        """Return a model that has learned to write captions of many."""
        model, texts = self.model(), self.many.texts
        with self.charged(stage):
            prompts = texts.prompt("describe", len(self.many), None)
            fit(model, self.many.x, prompts, captions, self.lengths["pretraining"], self.seed)
        return model

    def arms(self, rounds: int) -> list[dict[str, Any]]:
        """Return a row for each arm."""
        written = self.pretrained("pretraining", self.captions())
        ruled = self.pretrained("pretraining by rule", self.many.texts.captions(self.many_hints))
        begin = {"captions": written, "captions, context": written, "rule": ruled}
        models = {}
        for arm in STAGES:
            models[arm] = copy.deepcopy(begin[arm]) if arm in begin else self.model()
            hints = self.few_hints if arm in WITH_CONTEXT else None
            prompts = self.many.texts.prompt("which", len(self.few), hints)
            longer = self.lengths["pretraining"] if arm == "longer" else 0
            with self.charged(arm):
                fit(models[arm], self.few.x, prompts, self.few.answers(),
                    self.lengths["fine-tuning"] + longer, self.seed)  # fmt: skip
        shares: dict[str, float] = {}
        joules: dict[str, list[float]] = {arm: [] for arm in STAGES}
        for number in range(rounds):
            for arm in in_turn(STAGES, number):
                with self.charged("answering"):
                    shares[arm] = self.reached(models[arm], arm in WITH_CONTEXT)
                joules[arm].append(self.spent.pop("answering") / len(self.test.x))
        return [
            {
                "seed": self.seed, "arm": arm, "exact_match": round(shares[arm], 3),
                "own_j": round(self.spent[arm]),
                "total_j": round(sum(self.spent[s] for s in (*stages, arm))),
                "answer_j": float(f"{statistics.median(joules[arm]):.2g}"),
            }
            for arm, stages in STAGES.items()
        ]  # fmt: skip

    def reached(self, model: nn.Module, context: bool) -> float:
        """Return the share of the test's questions that a model answers right."""
        texts, true = self.test.texts, self.test.answers()
        hints = self.hints(self.test) if context else None
        said = say(model, self.test.x, texts.prompt("which", len(true), hints), true.shape[1])
        return float((said == true).all(1).float().mean())


def _means(rows: Sequence[Mapping[str, Any]], key: str) -> list[dict[str, Any]]:
    """Return the means over seeds of what is counted, by `key`."""
    out = []
    for name in dict.fromkeys(row[key] for row in rows):
        own = [row for row in rows if row[key] == name]
        counted = [k for k in own[0] if k not in ("seed", key)]
        means = {k: float(f"{statistics.mean(row[k] for row in own):.3g}") for k in counted}
        if "exact_match" in means and len(own) > 1:
            low, high = (f(row["exact_match"] for row in own) for f in (min, max))
            means = {"exact_match": means.pop("exact_match"), "seeds": f"{low}–{high}", **means}
        out.append({key: name, **means})
    return out


def _markdown(result: Mapping[str, Any], out: Path) -> str:
    means = {row["arm"]: row for row in _means(result["rows"], "arm")}
    seeds = len({row["seed"] for row in result["rows"]})
    best = max(means, key=lambda arm: means[arm]["exact_match"])
    steps = ", ".join(f"{k} {v}" for k, v in result["steps"].items())
    lines = [
        "# Experts for a small vision–language model: as words in its prompt, as captions", "",
        f"`greenvis bench dense_fusion --seeds {seeds} --out {out}`, {result['seconds']} s on "
        f"{os.cpu_count()} logical CPUs, {result['threads']} thread(s), torch {result['torch']}. "
        "Duets: a piece of clothing, a digit, a pattern. Three experts learn one of them each from "
        f"{result['expert_images']} images; a small Llava is asked which kind of clothing there "
        f"is, and whether the digit is odd, and {result['labels']} images have that label. "
        "`context`: the experts' answers as words of the prompt. `captions`: experts' answers "
        "become captions by rule, a captioner learns from those of the images with labels and "
        f"writes {result['images']}, on which the model is pretrained. `rule`: all captions are "
        "written by rule, without a captioner. `longer`: `plain`, with the steps of pretraining "
        f"added. Steps: {steps}. Means over {seeds} seed(s). `total_j`: with all stages an arm "
        "builds on; `answer_j`: per answer, the experts that `context` asks included.", "",
        *_floor.table([*means.values()]), "",
        f"Most right: `{best}`, {means[best]['exact_match']}; `plain` "
        f"{means['plain']['exact_match']}, `longer` {means['longer']['exact_match']}.", "",
        _floor.sentence(None, "", result["repeatability"]), "",
        "## Captions", "",
        "Those of all images, right in every word.", "",
        *_floor.table(_means(result["captioners"], "captioner")), "",
        "## Experts", "", *_floor.table(_means(result["experts"], "topic")), "",
        "## Stages", "", *_floor.table(_means(result["stages"], "stage")), "",
    ]  # fmt: skip
    return "\n".join(lines)
