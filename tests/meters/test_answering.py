"""An answer in words is metered in two parts: what its first token took, and the rest."""

from __future__ import annotations

from pathlib import Path

import torch

import greenvis as gv
from greenvis import models
from greenvis.meters import pricing, record
from greenvis.meters.answering import generate


def test_prefill_ends_with_the_first_token(tmp_path: Path) -> None:
    model = models.build("plain/llava", img_size=16, vision_depth=1, depth=1, tokens=16).eval()
    inputs = {
        "input_ids": torch.tensor([[16] * 4 + [5, 6]]), "pixel_values": torch.rand(1, 3, 16, 16),
        "min_new_tokens": 4, "max_new_tokens": 4, "do_sample": False,
    }  # fmt: skip
    wanted = model.generate(**inputs)
    calls: list[str] = []
    with gv.track("answers", dir=tmp_path, codecarbon=False) as run:
        model.register_forward_pre_hook(lambda *a: calls.append(run.current_phase))
        answered = generate(run, model, **inputs)
        assert run.current_phase == ""
    assert torch.equal(answered.output, wanted)
    assert calls == ["prefill", "decode", "decode", "decode"]
    assert answered.prefill["at_s"] > 0
    assert answered.decode["at_s"] > 0
    (file,) = record.find([tmp_path])
    assert {"prefill", "decode"} <= {*pricing.phases(record.read(file))}
