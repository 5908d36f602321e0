"""A convolutional network of your own that answers early: exits trained and calibrated, folded, and
served in full batches."""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import greenvis as gv
from greenvis.techniques.inference.exits.early_exit import rebatched

torch.manual_seed(0)
digits: Any = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
labels = torch.tensor(digits.target)
loader = DataLoader(TensorDataset(images[:1000], labels[:1000]), batch_size=50, shuffle=True)
held_out = DataLoader(TensorDataset(images[1000:1400], labels[1000:1400]), batch_size=100)
stream, answers = images[1400:].split(64), labels[1400:]


def block(width: int, out: int) -> nn.Sequential:
    """A convolution, a batch norm and an activation."""
    return nn.Sequential(
        nn.Conv2d(width, out, 3, padding=1, bias=False), nn.BatchNorm2d(out), nn.ReLU()
    )


def accuracy(logits: list[Tensor]) -> float:
    """Accuracy on the stream of images that were neither trained nor calibrated on."""
    return (torch.cat(logits).argmax(-1) == answers).float().mean().item()


blocks = [block(1, 32), *(block(32, 32) for _ in range(5))]
model = nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))
live = gv.wrap(
    model, gv.EarlyExit(at=("1", "3"), target_drop=0.03, confidence=0.9, input_shape=(1, 8, 8))
)
optimizer = torch.optim.AdamW(live.param_groups(lr=3e-3))
with gv.track("early-exit", live, dir=tempfile.mkdtemp()) as run:
    for _ in range(8):
        model.train()
        for x, y in run.steps(loader):
            logits = model(x)
            loss = nn.functional.cross_entropy(logits, y) + live.loss(x, y, logits)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    # thresholds that lose no more than the target, on images never trained on
    chosen = live.calibrate(held_out)["early_exit"]
    print(
        f"thresholds {chosen['thresholds']}, kept: {chosen['met']}; "
        f"{chosen['cost']:.0%} of the MACs"
    )
    folding = gv.fold_norms(live.for_inference(), images[:2])
    print(f"{len(folding.convolutions)} batch norms folded")
    with torch.inference_mode(), run.phase("serve"):
        print(f"accuracy {accuracy([model(x) for x in stream]):.3f} batch by batch")
        print(
            f"accuracy {accuracy([*rebatched(live, stream)]):.3f} with those who go on in full "
            "batches"
        )

print(f"energy {run.energy().value:.1f} J")
