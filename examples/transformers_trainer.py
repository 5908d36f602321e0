"""A transformers Trainer with LoRA and distillation: the loss goes in by `compute_loss_func`, the meter around it."""

from __future__ import annotations

import copy
import tempfile
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments, ViTConfig, ViTForImageClassification

import greenvis as gv

torch.manual_seed(0)
digits: Any = load_digits()


class Digits(Dataset):
    """scikit-learn's digits as a Trainer wants them."""

    def __len__(self) -> int:
        return 600

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        return {
            "pixel_values": torch.tensor(digits.images[i], dtype=torch.float32).unsqueeze(0) / 16,
            "labels": torch.tensor(digits.target[i]),
        }


config = ViTConfig(
    hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=8, patch_size=2, num_channels=1
)
config.num_labels = 10
model = ViTForImageClassification(config)
teacher = copy.deepcopy(model)
live = gv.wrap(model, [gv.Lora(rank=4), gv.Distill(teacher=teacher)])  # greenvis


class Student(Trainer):
    """A Trainer whose loss has the techniques' terms."""

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        outputs = model(**inputs)
        extra = live.loss(inputs["pixel_values"], inputs["labels"], outputs.logits)  # greenvis
        return (outputs.loss + extra, outputs) if return_outputs else outputs.loss + extra


out = tempfile.mkdtemp()
arguments = TrainingArguments(
    out, num_train_epochs=1, per_device_train_batch_size=50, report_to="none", save_strategy="no", use_cpu=True,
    disable_tqdm=True, logging_strategy="no",
)  # fmt: skip
optimizer = torch.optim.AdamW(live.param_groups(lr=3e-3))  # greenvis
trainer = Student(model, arguments, train_dataset=Digits(), optimizers=(optimizer, None))
with gv.track("trainer", live, dir=out) as run, run.phase("train"):  # greenvis
    result = trainer.train()
    run.log(loss=result.training_loss)
print(live.summary())
print(f"loss {result.training_loss:.3f}; energy {run.energy().value:.1f} J; record {run.path}")
