"""A transformers Trainer with LoRA and distillation: the meter is a callback, the terms come in by
`compute_loss_func`."""

from __future__ import annotations

import copy
import tempfile
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch.utils.data import Dataset
from transformers import TrainingArguments, ViTConfig, ViTForImageClassification

import greenvis as gv
from greenvis.integrations.transformers import GreenCallback, GreenTrainer

torch.manual_seed(0)
digits: Any = load_digits()


class Digits(Dataset):
    """scikit-learn's digits as a Trainer wants them."""

    def __init__(self, first: int, last: int) -> None:
        self.rows = range(first, last)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        return {
            "pixel_values": torch.tensor(
                digits.images[self.rows[i]], dtype=torch.float32
            ).unsqueeze(0)
            / 16,
            "labels": torch.tensor(digits.target[self.rows[i]]),
        }


def accuracy(p: Any) -> dict[str, float]:
    """What the Trainer reports after each evaluation."""
    return {"accuracy": float((p.predictions.argmax(-1) == p.label_ids).mean())}


config = ViTConfig(
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=64,
    image_size=8,
    patch_size=2,
    num_channels=1,
)
config.num_labels = 10
model = ViTForImageClassification(config)
teacher = copy.deepcopy(model)
live = gv.wrap(model, [gv.Lora(rank=4), gv.Distill(teacher=teacher)])  # greenvis

out = tempfile.mkdtemp()
arguments = TrainingArguments(
    out, num_train_epochs=2, per_device_train_batch_size=50, report_to="none", save_strategy="no",
    use_cpu=True,
    disable_tqdm=True, logging_strategy="epoch", eval_strategy="epoch",
)  # fmt: skip
green = GreenCallback(live, "trainer", dir=out)  # greenvis
trainer = GreenTrainer(
    model, arguments, train_dataset=Digits(0, 600), eval_dataset=Digits(600, 800),
    callbacks=[green],
    compute_loss_func=green.loss, optimizers=(torch.optim.AdamW(live.param_groups(lr=3e-3)), None),
    compute_metrics=accuracy,
)  # fmt: skip
trainer.train()
print(live.summary())
print(f"record {green.run.path}")
print(
    "report:",
    gv.report([green.run.path], out=f"{out}/report"),
    "with the energy of training and evaluation apart",
)
