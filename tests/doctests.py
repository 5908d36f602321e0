"""What the examples in docstrings take for granted: a small model, a teacher, images and labels."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

import greenvis as gv
from greenvis.core.technique import Experience
from greenvis.testing import default_hosts

RECIPE = """\
name: tiny
data: {name: digits, train: 40, test: 20}
model: {ref: plain/mlp, img_size: 8, hidden: [8]}
train: {batch_size: 20, threads: 1}
arms: {plain: {}, frozen: {techniques: [linear_probe]}}
meter: {codecarbon: false}
"""


def _bottlenecks() -> Any:
    from timm.models.resnet import Bottleneck, ResNet

    block: Any = Bottleneck
    sizes: Any = {"channels": (8, 8, 16, 16), "stem_width": 8}
    return ResNet(block, (1, 1, 1, 1), num_classes=5, **sizes)


def names() -> dict[str, Any]:
    """Return the names that examples use."""
    torch.manual_seed(0)
    vit, resnet = default_hosts()[:2]
    x, y = vit.batch()
    folder = Path(tempfile.mkdtemp())
    (folder / "tiny.yaml").write_text(RECIPE)
    return {
        "gv": gv,
        "torch": torch,
        "F": F,
        "model": vit.build(),
        "teacher": vit.build(),
        "resnet": resnet.build(),
        "bottleneck_resnet": _bottlenecks(),
        "x": x,
        "y": y,
        "experience": Experience(0, (0, 1, 2, 3), (0, 1, 2, 3), 2),
        "folder": folder,
        "recipe": folder / "tiny.yaml",
    }
