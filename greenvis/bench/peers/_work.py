"""One way to do a work, and what all ways share: images, model, loop, recipe."""

from __future__ import annotations

import inspect
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import yaml
from torch import Tensor, nn

from greenvis.bench._digits import TEST, TRAIN, digits
from greenvis.experiment.session import run as run_recipe
from greenvis.meters import record
from greenvis.tasks.answers import logits_of

BATCH, LR = 32, 1e-3
LITE0 = {"ref": "timm/tf_efficientnet_lite0", "pretrained": "efficientnet-lite0"}
VIT = {
    "ref": "hf/vit", "img_size": 32, "patch_size": 4, "embed_dim": 96, "depth": 6, "num_heads": 3,
}  # fmt: skip
STUDENT = {"ref": "plain/convnet", "in_chans": 3, "channels": [16, 32, 64]}


@dataclass(frozen=True)
class Trained:
    """A training: CPU time of all of it, and the share of test images it is right about."""

    cpu_s: float
    accuracy: float


@dataclass(frozen=True)
class Arm:
    """One way to do a work.

    Args:
        name: Of the peer, or of what greenvis adds.
        train: Trains with a seed.
        lines: Of code, or of a recipe, that a user writes for it; None: not counted.
        ours: Whether it is greenvis.
    """

    name: str
    train: Callable[[int], Trained]
    lines: int | None = None
    ours: bool = False


@dataclass(frozen=True)
class Work:
    """The same work, done in several ways; the first arm is what others are compared with.

    Args:
        name: In the table.
        about: What is trained, and what differs between the arms.
        target: The greatest share of the first arm's CPU time that greenvis may take.
        arms: The ways.
    """

    name: str
    about: str
    target: float
    arms: Sequence[Arm]


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Return the share of images a model is right about."""
    model.eval()
    answers = torch.cat([logits_of(model(part)) for part in x.split(64)])
    return int((answers.argmax(-1) == y).sum()) / len(y)


def timed(train: Callable[[], float]) -> Trained:
    """Return what a training gives, and the CPU time of this process that it takes."""
    start = time.process_time()
    score = train()
    return Trained(time.process_time() - start, score)


def loop(
    model: nn.Module,
    side: int,
    epochs: int,
    term: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor] | None = None,
    parameters: Any = None,
    before: Callable[[Tensor], None] = lambda rows: None,
) -> float:
    """Train as by hand: AdamW, a cosine, cross entropy and a further term of images, labels, logits
    and rows."""
    x, y, *test = digits(side)
    chosen = (
        [p for p in model.parameters() if p.requires_grad] if parameters is None else parameters
    )
    optimizer = torch.optim.AdamW(chosen, LR, weight_decay=0.05)
    steps = epochs * -(-len(y) // BATCH)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(epochs):
        model.train()
        for rows in torch.randperm(len(y)).split(BATCH):
            before(rows)
            logits = logits_of(model(x[rows]))
            loss = F.cross_entropy(logits, y[rows])
            if term is not None:
                loss = loss + term(x[rows], y[rows], logits, rows)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return accuracy(model, test[0], test[1])


def recipe(model: dict[str, Any], side: int, epochs: int, techniques: Sequence[Any] = ()) -> Arm:
    """Return greenvis's own way: a recipe, run whole, records and meter included."""
    content = {
        "name": "peers",
        "data": {"name": "digits", "train": TRAIN, "test": TEST, "img_size": side, "in_chans": 3},
        "model": model,
        "train": {"epochs": epochs, "batch_size": BATCH, "lr": LR, "eval_every": 0, "threads": 1},
        "arms": {"ours": {"techniques": list(techniques)} if techniques else {}},
        "meter": {"codecarbon": False},
    }

    def train(seed: int) -> Trained:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "recipe.yaml")
            path.write_text(yaml.safe_dump(content))

            def whole() -> float:
                records = run_recipe(
                    path, overrides=[f"train.seeds=[{seed}]"], runs=Path(folder, "runs")
                )
                (done,) = [record.read(file) for file in record.find([records])]
                return float(done.facts["accuracy"])

            return timed(whole)

    return Arm("greenvis recipe", train, len(yaml.safe_dump(content).splitlines()), ours=True)


def lines(*functions: Callable[..., Any]) -> int:
    """Return the lines of code of functions."""
    return sum(len(inspect.getsource(f).strip().splitlines()) for f in functions)
