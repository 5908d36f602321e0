"""Duets with texts: what experts say of them as words, captions by rule, and a question."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from greenvis import data, models
from greenvis.core.example import Example
from greenvis.core.modes import in_mode
from greenvis.data.captions import Vocabulary
from greenvis.data.spec import DataSpec
from greenvis.tasks.vqa import Vqa

TOPICS = ("clothes", "digit", "place")
BATCH, SHOWN = 64, 250  # images of a step, and of a pass without gradients
EXPERT: Any = {"channels": [16, 32, 48, 64], "in_chans": 1}
SIZES: Any = {"img_size": 32, "in_chans": 1, "patch_size": 8, "vision_dim": 64, "vision_depth": 2,
              "embed_dim": 64, "depth": 2}  # fmt: skip


class Texts:
    """Words for what duets show.

    Args:
        classes: Of each topic, by name.
        both: Classes of the question, such as "top, even".
    """

    def __init__(self, classes: Mapping[str, tuple[str, ...]], both: tuple[str, ...]) -> None:
        self.classes = {
            topic: [re.sub(r"\W+", "_", name).strip("_").lower() for name in names]
            for topic, names in classes.items()
        }
        self.both = [name.replace(",", "") for name in both]
        known = {word for names in self.classes.values() for word in names}
        known |= {word for name in self.both for word in name.split()}
        known |= {"describe", "which", "left_of", "on"}
        self.words = Vocabulary(tuple(sorted(known)), 6)  # of a caption, its end included

    def encode(self, texts: list[str]) -> Tensor:
        """Return the tokens of texts of as many words each, their end included."""
        tokens = self.words.encode(texts)
        return tokens[:, : int((tokens != 0).sum(1).max())]

    def hints(self, answers: Mapping[str, Tensor]) -> Tensor:
        """Return the words of classes, int64 (images, topics)."""
        columns = []
        for topic in TOPICS:
            tokens = self.encode(self.classes[topic])[:, 0]
            columns.append(tokens[answers[topic]])
        return torch.stack(columns, 1)

    def captions(self, hints: Tensor) -> Tensor:
        """Return a caption of the words of each topic: "boot left_of 7 on rings", int64 (images,
        words and the end)."""
        left, on, end = self.encode(["left_of on"])[0].tolist()
        wear, digit, place = hints.unbind(1)
        fixed = [torch.full_like(wear, n) for n in (left, on, end)]
        return torch.stack([wear, fixed[0], digit, fixed[1], place, fixed[2]], 1)

    def prompt(self, word: str, count: int, hints: Tensor | None) -> Tensor:
        """Return what stands behind an image: hints where there are some, and a word that says what
        is asked for; int64 (images, words)."""
        asked = self.encode([word])[:, :1].expand(count, -1)
        return asked if hints is None else torch.cat([hints, asked], 1)


@dataclass(frozen=True)
class Pictures:
    """Duets, and what is known of them.

    Args:
        x: (images, 1, side, side), normalised.
        labels: By topic, int64 (images,); "both" is that of the question.
        texts: Their words.
    """

    x: Tensor
    labels: dict[str, Tensor]
    texts: Texts

    def __len__(self) -> int:
        return len(self.x)

    def first(self, count: int) -> Pictures:
        """Return the first of them."""
        labels = {topic: own[:count] for topic, own in self.labels.items()}
        return Pictures(self.x[:count], labels, self.texts)

    def captions(self, labels: Mapping[str, Tensor]) -> Tensor:
        """Return the captions that labels make."""
        return self.texts.captions(self.texts.hints(labels))

    def answers(self) -> Tensor:
        """Return the answers to the question, int64 (images, 3)."""
        return self.texts.encode(self.texts.both)[self.labels["both"]]


def pictures(train: int, test: int, seed: int) -> tuple[Pictures, Pictures]:
    """Return duets to train and to test on, drawn anew for each seed."""
    sets = {
        topic: data.load(DataSpec(name=f"duets:{topic}", train=train, test=test, seed=seed), seed=0)
        for topic in (*TOPICS, "both")
    }
    texts = Texts({t: tuple(sets[t].classes) for t in TOPICS}, tuple(sets["both"].classes))
    parts = []
    for role in ("train", "test"):
        each = {topic: getattr(own, role) for topic, own in sets.items()}
        rows = torch.arange(len(each["both"]))
        x, _ = each["both"].batch(rows)
        parts.append(Pictures(x, {t: own.classes("duets") for t, own in each.items()}, texts))
    return parts[0], parts[1]


def expert(shown: Pictures, topic: str, steps: int, seed: int) -> nn.Module:
    """Return a classifier of one topic."""
    torch.manual_seed(seed)
    classes = len(shown.texts.classes[topic])
    model = models.build("timm/resnet10t", num_classes=classes, **EXPERT)

    def loss(rows: Tensor) -> Tensor:
        return F.cross_entropy(model(shown.x[rows]), shown.labels[topic][rows])

    _train(model, loss, len(shown.x), steps, seed)
    return model.eval()


def asked(experts: Mapping[str, nn.Module], x: Tensor) -> dict[str, Tensor]:
    """Return the class that each expert answers, int64 (images,)."""
    with torch.inference_mode():
        return {
            topic: torch.cat([model(part).argmax(1) for part in x.split(SHOWN)])
            for topic, model in experts.items()
        }


def model(texts: Texts) -> nn.Module:
    """Return a small Llava with random weights that reads and writes such texts."""
    return models.build("plain/llava", tokens=texts.words.size, length=16, **SIZES)


def fit(
    model: nn.Module, x: Tensor, prompts: Tensor, answers: Tensor, steps: int, seed: int
) -> None:
    """Train a model to answer prompts about images.

    Args:
        model: A Llava.
        x: (images, 1, side, side).
        prompts: int64 (images, words).
        answers: int64 (images, tokens), -1 behind their end.
        steps: Of `BATCH` images.
        seed: Of their order.
    """
    task = Vqa()

    def loss(rows: Tensor) -> Tensor:
        batch = Example((x[rows], prompts[rows]))
        return task.loss(task.answer(model, batch, answers[rows]), answers[rows])

    _train(model, loss, len(x), steps, seed)


def say(model: nn.Module, x: Tensor, prompts: Tensor, most: int) -> Tensor:
    """Return what a model answers, int64 (images, most), -1 behind the end.

    Args:
        model: A Llava.
        x: (images, 1, side, side).
        prompts: int64 (images, words).
        most: Tokens of an answer.
    """
    task, out = Vqa(tokens=most), []
    config: Any = model.generation_config
    with in_mode(model, False), torch.inference_mode():
        for part, own in zip(x.split(SHOWN), prompts.split(SHOWN), strict=True):
            tokens = task.answer(model, Example((part, own))).argmax(-1)
            tokens = F.pad(tokens, (0, most - tokens.shape[1]), value=-1)
            ends = tokens.eq(config.eos_token_id).long()
            over = ends.cumsum(1) - ends > 0
            out.append(tokens.masked_fill(over, -1))
    return torch.cat(out)


def _train(model: nn.Module, loss: Any, count: int, steps: int, seed: int) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, steps + 1, pct_start=0.1)
    generator = torch.Generator().manual_seed(seed)
    with in_mode(model, True):
        for _ in range(steps):
            loss(torch.randint(count, (BATCH,), generator=generator)).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
