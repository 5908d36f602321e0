"""Your own PyTorch loop with greenvis around it: the lines marked `# greenvis` are all that is
added."""

from __future__ import annotations

import tempfile
from typing import Any

import timm
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import greenvis as gv

torch.manual_seed(0)
digits: Any = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
labels = torch.tensor(digits.target)
loader = DataLoader(TensorDataset(images[:1000], labels[:1000]), batch_size=50, shuffle=True)


def vit(width: int) -> nn.Module:
    """A tiny vision transformer for 8 × 8 images."""
    return timm.create_model(
        "vit_tiny_patch16_224",
        img_size=8,
        patch_size=2,
        in_chans=1,
        embed_dim=width,
        depth=2,
        num_heads=2,
        num_classes=10,
    )


@torch.no_grad()
def evaluate() -> float:
    """Accuracy on the images that were not trained on."""
    return (model.eval()(images[1000:]).argmax(-1) == labels[1000:]).float().mean().item()


teacher, model = vit(48), vit(32)
criterion = nn.CrossEntropyLoss()

live = gv.wrap(model, [gv.Lora(rank=4), gv.Distill(teacher=teacher)])  # greenvis
optimizer = torch.optim.AdamW(live.param_groups(lr=3e-3))  # greenvis: instead of model.parameters()
out = tempfile.mkdtemp()
with gv.track("plain-loop", live, dir=out) as run:  # greenvis
    for epoch in range(2):
        model.train()
        for x, y in run.steps(loader):
            logits = model(x)
            loss = criterion(logits, y) + live.loss(x, y, logits)  # greenvis
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        with run.phase("eval"):
            run.log(epoch=epoch + 1, accuracy=evaluate())

print(live.summary())
print(f"accuracy {evaluate():.3f}; energy {run.energy().value:.1f} J")
live.save(f"{out}/delta")  # only what was learned
plain = live.merge()  # an ordinary timm model again
print("report:", gv.report([run.path], out=f"{out}/report"))
