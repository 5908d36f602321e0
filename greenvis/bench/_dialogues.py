"""Long prompts that a small model can be trained on: duets one after another, each followed by a
question about it and the answer."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from greenvis import models
from greenvis.bench import _duet_texts
from greenvis.bench._duet_texts import Pictures
from greenvis.core.modes import in_mode
from greenvis.meters.track import Tracker

# turns in a sequence, sequences in a batch, and how often: as many turns in each
SHAPES = ((1, 64, 0.35), (8, 8, 0.45), (30, 2, 0.15), (60, 1, 0.05))
SIZES: Any = {"img_size": 32, "in_chans": 1, "patch_size": 4, "vision_dim": 64, "vision_depth": 2,
              "embed_dim": 64, "depth": 2}  # fmt: skip
SKIPPED = -100  # of labels, as transformers has it


class Dialogue(NamedTuple):
    """Turns one behind another, the last without its answer.

    Args:
        inputs: What the model takes.
        answer: Tokens that the last question is to be answered with, its end included.
    """

    inputs: dict[str, Tensor]
    answer: list[int]


class Turns:
    """Duets with questions as tokens: what clothes they show, and on which pattern.

    Args:
        shown: The duets.
        patches: Tokens of an image.
        image: The token that stands for a patch.
    """

    def __init__(self, shown: Pictures, patches: int, image: int) -> None:
        self.shown, self.patches, self.image = shown, patches, image
        self.asked = shown.texts.prompt("which", 1, None)[0].tolist()
        clothes, _, place = shown.texts.hints(shown.labels).T.tolist()
        end = shown.texts.words.size - 1
        self.answers = [[*pair, end] for pair in zip(clothes, place, strict=True)]

    def question(self) -> list[int]:
        """Return the tokens of an image and its question."""
        return [self.image] * self.patches + self.asked

    def batch(self, rows: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Return sequences of turns, padded behind, and the labels: of answers alone.

        Args:
            rows: Which images, int64 (sequences, turns).
        """
        sequences, labels = [], []
        for own in rows.tolist():
            ids: list[int] = []
            known: list[int] = []
            for row in own:
                question, answer = self.question(), self.answers[row]
                ids += question + answer
                known += [SKIPPED] * len(question) + answer
            sequences.append(ids)
            labels.append(known)
        longest = max(map(len, sequences))
        padded = torch.tensor([ids + [0] * (longest - len(ids)) for ids in sequences])
        targets = torch.tensor([own + [SKIPPED] * (longest - len(own)) for own in labels])
        return {"input_ids": padded, "pixel_values": self.shown.x[rows.flatten()]}, targets

    def dialogue(self, length: int, last: int, generator: torch.Generator) -> Dialogue:
        """Return turns by chance of at most `length` tokens in all, the last about the image
        `last`."""
        ids, rows = self.question(), [last]
        while True:
            row = int(torch.randint(len(self.shown), (), generator=generator))
            turn = self.question() + self.answers[row]
            if len(turn) + len(ids) > length:
                break
            ids, rows = turn + ids, [row, *rows]
        inputs = {"input_ids": torch.tensor([ids]), "pixel_values": self.shown.x[rows]}
        return Dialogue(inputs, self.answers[last])


def prepared(train: int, test: int) -> tuple[nn.Module, Turns, Turns]:
    """Return a small model with random weights, and turns to train and to test on."""
    sets = _duet_texts.pictures(train, test, seed=0)
    model = models.build("plain/llava", tokens=sets[0].texts.words.size, **SIZES)
    config: Any = model.config
    patches = (SIZES["img_size"] // SIZES["patch_size"]) ** 2
    own, others = (Turns(shown, patches, config.image_token_id) for shown in sets)
    return model, own, others


def train(model: nn.Module, turns: Turns, steps: int, run: Tracker) -> None:
    """Train on dialogues of the `SHAPES`, in the phase "train"."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    generator = torch.Generator().manual_seed(0)
    shares = torch.tensor([share for *_, share in SHAPES])
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, steps + 1, pct_start=0.1)
    with run.phase("train"), in_mode(model, True):
        for _ in range(steps):
            count, sequences, _ = SHAPES[int(shares.multinomial(1, generator=generator))]
            rows = torch.randint(len(turns.shown), (sequences, count), generator=generator)
            inputs, labels = turns.batch(rows)
            loss = model(**inputs, labels=labels).loss
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            run.log(loss=float(loss.detach()))
            run.add(samples=sequences * count)
