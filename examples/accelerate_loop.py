"""The loop of `plain_loop.py` under accelerate: wrap first, then prepare. Run it with `accelerate
launch` for more ranks."""

from __future__ import annotations

import copy
import tempfile
from typing import Any

import torch
import torchvision
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import greenvis as gv
from greenvis.integrations.accelerate import GreenAccelerator

torch.manual_seed(0)
digits: Any = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1).repeat(1, 3, 4, 4) / 16
labels = torch.tensor(digits.target)
loader = DataLoader(TensorDataset(images[:400], labels[:400]), batch_size=50, shuffle=True)

model = torchvision.models.resnet18(num_classes=10)
criterion = nn.CrossEntropyLoss()
# greenvis: before prepare
live = gv.wrap(model, gv.Distill(teacher=copy.deepcopy(model), weight=0.1))

# greenvis: weighs by samples, saves what techniques hold
accelerator = GreenAccelerator(live, cpu=True)
optimizer = torch.optim.SGD(live.param_groups(lr=0.02), momentum=0.9)  # greenvis
prepared, optimizer, loader = accelerator.prepare(model, optimizer, loader)
with gv.track("accelerate-loop", live, dir=tempfile.mkdtemp()) as run:  # greenvis
    prepared.train()
    for x, y in run.steps(loader):
        logits = prepared(x)
        loss = criterion(logits, y) + live.loss(x, y, logits)  # greenvis
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        run.log(loss=loss.item())

if accelerator.is_main_process:
    print(f"energy {run.energy().value:.1f} J; record {run.path}")
