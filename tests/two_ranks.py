"""Train every case once, as one of the processes that torchrun or accelerate launched: what
`test_two_ranks.py` compares.

    torchrun --nproc-per-node 2 tests/two_ranks.py OUT_FOLDER [CASE …]

Each global batch is cut into as many shares as there are processes; a share's loss counts by its
part of the batch, so that an uneven last batch weighs as it does in one process. All is in float64,
where the order of sums does not show.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

import greenvis as gv
from greenvis.core.technique import Experience, Samples, logits_of
from greenvis.techniques.inference.exits.early_exit import calibrate

IMAGES, BATCH, EPOCHS = 43, 8, 2  # the last batch holds 3 images: 2 and 1 on two ranks


def vit(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return VisionTransformer(
        img_size=16, patch_size=4, in_chans=1, embed_dim=24, depth=2, num_heads=2, num_classes=4
    )


class Case:
    """One model under training, on this process's share of each batch."""

    def __init__(self, techniques: list[gv.Technique], folder: Path, accumulate: int = 1) -> None:
        generator = torch.Generator().manual_seed(1)
        self.x = torch.randn(IMAGES, 1, 16, 16, generator=generator)
        self.y = torch.randint(4, (IMAGES,), generator=generator)
        self.folder, self.accumulate = folder, accumulate
        self.accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulate)
        self.ranks, self.rank = self.accelerator.num_processes, self.accelerator.process_index
        model = vit(0)
        torch.manual_seed(2)
        self.live = gv.wrap(model, techniques)
        self.live.plan(-(-IMAGES // BATCH) * EPOCHS)
        self.model = self.accelerator.prepare(model)
        self.start()

    def start(self) -> None:
        """Begin with a new optimizer."""
        self.optimizer = torch.optim.SGD(self.live.param_groups(0.05), momentum=0.9)

    def shares(self, rows: Tensor, epoch: int) -> Iterator[Tensor]:
        """Yield this process's rows of each batch of an epoch."""
        order = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(epoch))]
        for batch in order.split(BATCH):
            yield batch.tensor_split(self.ranks)[self.rank]

    def train(self, rows: Tensor, epochs: range = range(EPOCHS), pretext: bool = False) -> None:
        """Train on these images."""
        for epoch in epochs:
            self.model.train()
            for number, share in enumerate(self.shares(rows, epoch)):
                self.live.set_samples(
                    Samples(
                        self.folder / f"cache{self.ranks}", {"images": "random"}, IMAGES, 1, share
                    )
                )
                x, y = self.live.batch(self.x[share], self.y[share])
                whole = int(cast(Tensor, self.accelerator.reduce(torch.tensor(len(y)))))
                last = number == -(-len(rows) // BATCH) - 1  # as accelerate's own loaders make it
                self.accelerator.sync_gradients = last or (number + 1) % self.accumulate == 0
                torch.manual_seed(1000 * epoch + number)
                with (
                    self.accelerator.no_sync(self.model)
                    if not self.accelerator.sync_gradients
                    else nullcontext()
                ):
                    loss = self._loss(x, y, pretext) * (len(y) * self.ranks / whole)
                    self.accelerator.backward(loss)
                if self.accelerator.sync_gradients:
                    self.optimizer.step()
                    self.live.step_end()
                    self.optimizer.zero_grad()
            self.live.set_samples(None)
            self.live.epoch_end()

    def _loss(self, x: Tensor, y: Tensor, pretext: bool) -> Tensor:
        if pretext:
            return self.live.loss(x, None, None)
        logits = logits_of(self.model(x))
        return self.live.criterion(F.cross_entropy)(logits, y) + self.live.loss(x, y, logits)

    def left(self) -> dict[str, Any]:
        """Return what is compared: the model's own weights and what the techniques hold."""
        held = {k: v.detach().clone() for k, v in self.live.state_dict().items()}
        return {**{k: v.detach().clone() for k, v in self.live.model.state_dict().items()}, **held}


def plain(folder: Path, techniques: list[gv.Technique], **more: Any) -> dict[str, Any]:
    case = Case(techniques, folder, **more)
    case.train(torch.arange(IMAGES))
    return case.left()


def calibrated(folder: Path) -> dict[str, Any]:
    """Train exits, then let each process calibrate on what it has: all must take the same
    thresholds."""
    case = Case([gv.EarlyExit(at=(0.5,))], folder)
    case.train(torch.arange(IMAGES))
    rows = torch.arange(
        case.rank, IMAGES, 1 + case.rank
    )  # the first has all images, the second some
    calibrate(case.live, [(case.x[rows], case.y[rows])], budget=0.8)
    thresholds = case.live.state_dict()["early_exit.thresholds"]
    assert len(cast(Tensor, case.accelerator.gather(thresholds)).unique()) == 1
    return case.left()


def taught(folder: Path) -> dict[str, Any]:
    case = Case([gv.Distill(teacher=vit(5).eval(), cache=True)], folder)
    case.train(torch.arange(IMAGES))
    facts = case.live.facts()["distill_cache"][0]
    counted = torch.tensor([facts["hits"], facts["misses"]])
    return {**case.left(), "hits and misses": case.accelerator.reduce(counted)}


def tasks(folder: Path, technique: gv.Technique, epochs: int = EPOCHS) -> dict[str, Any]:
    """Learn two classes, then two others."""
    case = Case([technique], folder)
    for index, classes in enumerate(((0, 1), (2, 3))):
        rows = torch.isin(case.y, torch.tensor(classes)).nonzero().squeeze(1)
        case.live.begin_experience(Experience(index, classes, tuple(range(2 * index + 2)), 2))
        case.start()
        case.train(rows, range(epochs))
        case.live.end_experience([(case.x[share], case.y[share]) for share in case.shares(rows, 0)])
    return case.left()


def replayed(folder: Path) -> dict[str, Any]:
    """Replay all that is kept at every step: which images each process keeps then makes no
    difference."""
    left = tasks(folder, gv.Replay(size=2 * IMAGES, batch_size=2 * IMAGES), epochs=1)
    return {k: v for k, v in left.items() if not k.startswith("replay.")}


def pretext(folder: Path, technique: gv.Technique) -> dict[str, Any]:
    case = Case([technique], folder)
    case.train(torch.arange(IMAGES), pretext=True)
    return case.left()


def resumed(folder: Path) -> dict[str, Any]:
    """Train one epoch, or go on after the epoch that another number of processes left in
    `folder`."""
    case, file = Case([gv.Lora(rank=2), gv.Regularize(method="si")], folder), folder / "half.pt"
    if file.exists():
        left = torch.load(file, weights_only=True)
        case.live.load_state_dict(left["live"])
        case.optimizer.load_state_dict(left["optimizer"])
        case.train(torch.arange(IMAGES), range(1, 2))
        return case.left()
    case.train(torch.arange(IMAGES), range(1))
    if case.accelerator.is_main_process:
        torch.save({"live": case.live.state_dict(), "optimizer": case.optimizer.state_dict()}, file)
    case.accelerator.wait_for_everyone()
    case.train(torch.arange(IMAGES), range(1, 2))
    return case.left()


CASES: dict[str, Any] = {
    "full fine-tuning": lambda folder: plain(folder, []),
    "accumulation": lambda folder: plain(folder, [], accumulate=2),
    "lora": lambda folder: plain(folder, [gv.Lora(rank=2)]),
    "adalora": lambda folder: plain(folder, [gv.Lora(rank=2, variant="adalora")]),
    "early exit": calibrated,
    "distillation with cache": taught,
    "ewc": lambda folder: tasks(folder, gv.Regularize(weight=5.0)),
    "mas": lambda folder: tasks(folder, gv.Regularize(method="mas", weight=5.0)),
    "si": lambda folder: tasks(folder, gv.Regularize(method="si", weight=1.0)),
    "replay": replayed,
    "feature distillation": lambda folder: pretext(
        folder, gv.FeatureDistill(base=vit(5).eval(), cache="off")
    ),
    "resumed": resumed,
}


def main(out: Path, names: list[str]) -> None:
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    for name in names or CASES:
        folder = out / name
        folder.mkdir(parents=True, exist_ok=True)
        left = CASES[name](folder)
        accelerator = Accelerator(cpu=True)
        torch.save(left, folder / f"{accelerator.num_processes}-{accelerator.process_index}.pt")
        accelerator.wait_for_everyone()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
