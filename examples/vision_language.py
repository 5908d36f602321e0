"""A vision–language model that answers from a quarter of its prompt's keys and values, metered in
two parts."""

from __future__ import annotations

import tempfile
from typing import Any

import torch

import greenvis as gv
from greenvis import models
from greenvis.meters.answering import generate

torch.manual_seed(0)
llava = models.build("plain/llava", img_size=48, patch_size=4).eval()  # or your own Llava
prompt = torch.tensor([[64] * 144 + [5, 6, 7, 8]])  # 64 stands for a patch; then the question
inputs = {"input_ids": prompt, "pixel_values": torch.rand(1, 3, 48, 48), "max_new_tokens": 16}

live = gv.wrap(llava, gv.KvCache(method="snapkv", rows=0.25))
with gv.track("answers", live, dir=tempfile.mkdtemp()) as run:
    answered = generate(run, llava, **inputs)
installed: Any = live.installed[0]
rows = installed.cache.layers[0].keys.shape[2]
print(f"{answered.output.shape[1] - prompt.shape[1]} tokens from {rows} of their rows")

print(f"energy {run.energy().value:.2f} J")
