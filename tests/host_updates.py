"""Train a small net inside a host trainer and note all it was shown: what `test_host_updates.py`
compares with one big batch.

torchrun --nproc-per-node 2 tests/host_updates.py OUT_FOLDER HOST …
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from transformers import TrainingArguments

import greenvis as gv
from greenvis.core import distributed
from greenvis.core.technique import Installed, Stage, Technique
from greenvis.integrations.accelerate import GreenAccelerator
from greenvis.integrations.lightning import GreenCallback as InLightning
from greenvis.integrations.transformers import GreenCallback, GreenTrainer

IMAGES, BATCH, CLASSES, LR = 23, 4, 3, 0.5  # of one process the last of six batches holds 3
HOSTS = ("transformers", "lightning", "accelerate")
KINDS = ("plain", "smoothing", "replay", "replay of 3", "replay, smoothing", "doubled")
ACCUMULATE = (1, 2, 4)
X = torch.randn(IMAGES, 5, generator=torch.Generator().manual_seed(1))
Y = torch.randint(CLASSES, (IMAGES,), generator=torch.Generator().manual_seed(2))


class Net(nn.Module):
    config = None  # transformers asks for one where labels are smoothed

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, CLASSES))

    def forward(self, pixel_values: Tensor) -> dict[str, Tensor]:
        return {"logits": self.layers(pixel_values)}


class Rows(Dataset):
    def __init__(self, of_trainer: bool, first: int = 0, step: int = 1) -> None:
        self.rows, self.of_trainer = range(first, IMAGES, step), of_trainer

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> Any:
        x, y = X[self.rows[i]], Y[self.rows[i]]
        return {"pixel_values": x, "labels": y} if self.of_trainer else (x, y)


class Twice(Technique):
    """Show every second batch twice, so that batches grow by different shares."""

    name: ClassVar[str] = "twice"
    stage: ClassVar[Stage] = "objective"

    def install(self, model: nn.Module) -> Installed:
        return _Twice()


class _Twice(Installed):
    calls = 0

    def batch(self, x: Any, y: Any) -> tuple[Any, Any]:
        self.calls += 1
        return (x, y) if self.calls % 2 else (torch.cat([x, x]), torch.cat([y, y]))


class Zeugma(Technique):
    """Note what was trained on, by optimizer step. Its name puts it after all others."""

    name: ClassVar[str] = "zeugma"
    stage: ClassVar[Stage] = "objective"

    def install(self, model: nn.Module) -> Installed:
        return Noted()


class Noted(Installed):
    def __init__(self) -> None:
        super().__init__()
        self.steps = 0
        self.shown: list[tuple[int, Tensor, Tensor]] = []

    def terms(self, x: Any, y: Any, logits: Any) -> Mapping[str, Tensor]:
        self.shown.append((self.steps, x.clone(), y.clone()))
        return {}

    def step_end(self) -> None:
        self.steps += 1


class Module(pl.LightningModule):
    def __init__(self, live: gv.Wrapped, loss: Any) -> None:
        super().__init__()
        self.live, self.net, self.loss = live, live.model, loss

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x, y = self.live.batch(*batch)
        logits = self.net(x)["logits"]
        return self.loss(logits, y) + self.live.loss(x, y, logits)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.live.param_groups(LR), lr=LR)


def wrapped(kind: str) -> gv.Wrapped:
    techniques: list[Technique] = [Zeugma()]
    if kind.startswith("replay"):
        techniques.append(gv.Replay(size=12, batch_size=3 if "3" in kind else None))
    if kind == "doubled":
        techniques.append(Twice())
    live = gv.wrap(Net(), techniques)
    for installed in live.installed:
        if hasattr(installed, "buffer"):
            generator = torch.Generator().manual_seed(3)
            installed.buffer.offer(
                torch.randn(4, 5, generator=generator), torch.arange(4) % CLASSES
            )
    return live


def train(host: str, kind: str, accumulate: int, folder: Path) -> dict[str, Any]:
    """Train one epoch and return the weights it left and what this process was shown."""
    live = wrapped(kind)
    smoothing = 0.1 if "smoothing" in kind else 0.0
    loss = functools.partial(F.cross_entropy, label_smoothing=smoothing)
    optimizer = torch.optim.SGD(live.param_groups(LR), lr=LR)
    loader = DataLoader(Rows(False, distributed.rank(), distributed.world_size()), batch_size=BATCH)
    if host == "transformers":
        arguments = TrainingArguments(
            str(folder), num_train_epochs=1, per_device_train_batch_size=BATCH,
            gradient_accumulation_steps=accumulate,
            report_to="none", save_strategy="no", use_cpu=True, disable_tqdm=True,
            max_grad_norm=0.0, logging_strategy="no",
            remove_unused_columns=False, label_smoothing_factor=smoothing,
            lr_scheduler_type="constant",
        )  # fmt: skip
        green = GreenCallback(live, "h", dir=folder)
        GreenTrainer(
            live.model, arguments, train_dataset=Rows(True), callbacks=[green],
            compute_loss_func=green.loss,
            optimizers=(optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)),
        ).train()  # fmt: skip
    elif host == "lightning":
        trainer = pl.Trainer(
            max_epochs=1, callbacks=[InLightning(live, "h", dir=folder)], accelerator="cpu",
            devices=distributed.launched_world_size(),
            accumulate_grad_batches=accumulate, logger=False, enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False, use_distributed_sampler=False, default_root_dir=folder,
            strategy="ddp" if distributed.launched_world_size() > 1 else "auto",
        )  # fmt: skip
        trainer.fit(Module(live, loss), loader)
    else:
        accelerator = GreenAccelerator(live, cpu=True, gradient_accumulation_steps=accumulate)
        model = accelerator.prepare(live.model)
        model.train()
        for number, (x, y) in enumerate(loader):
            accelerator.gradient_state._set_sync_gradients(
                (number + 1) % accumulate == 0 or number + 1 == len(loader)
            )
            x, y = live.batch(x, y)
            logits = model(x)["logits"]
            accelerator.backward(loss(logits, y) + live.loss(x, y, logits))
            if accelerator.sync_gradients:
                optimizer.step()
                live.step_end()
                optimizer.zero_grad()
    (noted,) = (i for i in live.installed if isinstance(i, Noted))
    return {
        "state": {k: v.detach().clone() for k, v in live.model.state_dict().items()},
        "shown": noted.shown,
    }


def main(out: Path, hosts: list[str]) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group()
    for host in hosts:
        for kind in KINDS:
            for accumulate in ACCUMULATE:
                left = train(host, kind, accumulate, out)
                torch.save(left, out / f"{host}-{kind}-{accumulate}-{distributed.rank()}.pt")
                distributed.barrier()
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
