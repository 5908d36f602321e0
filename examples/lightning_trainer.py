"""A Lightning Trainer with LoRA: a callback meters it; the module's own step adds the techniques'
terms."""

from __future__ import annotations

import logging
import tempfile
from typing import Any

import lightning.pytorch as pl
import timm
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

import greenvis as gv
from greenvis.integrations.lightning import GreenCallback

logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
torch.manual_seed(0)
digits: Any = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
labels = torch.tensor(digits.target)

net = timm.create_model(
    "vit_tiny_patch16_224",
    img_size=8,
    patch_size=2,
    in_chans=1,
    embed_dim=32,
    depth=2,
    num_heads=2,
    num_classes=10,
)
live = gv.wrap(net, gv.Lora(rank=4))  # greenvis


class Module(pl.LightningModule):
    """Your own module."""

    def __init__(self) -> None:
        super().__init__()
        self.net = net

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = live.batch(*batch)  # greenvis
        logits = self.net(x)
        return F.cross_entropy(logits, y) + live.loss(x, y, logits)  # greenvis

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        x, y = batch
        self.log("val_accuracy", (self.net(x).argmax(-1) == y).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(live.param_groups(lr=3e-3))  # greenvis


out = tempfile.mkdtemp()
green = GreenCallback(live, "lightning", dir=out)  # greenvis
trainer = pl.Trainer(
    max_epochs=2, callbacks=[green], accelerator="cpu", default_root_dir=out, logger=False,
    enable_checkpointing=False,
    enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
)  # fmt: skip
trainer.fit(
    Module(),
    DataLoader(TensorDataset(images[:600], labels[:600]), batch_size=50, shuffle=True),
    DataLoader(TensorDataset(images[600:800], labels[600:800]), batch_size=100),
)
print(live.summary())
print(
    "report:",
    gv.report([green.run.path], out=f"{out}/report"),
    "with the energy of training and evaluation apart",
)
