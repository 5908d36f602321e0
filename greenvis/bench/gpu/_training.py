"""Cells of training: ways to adapt ViT-B/16, a live and a kept teacher, and whether images arrive
fast enough."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from greenvis import models
from greenvis.bench.gpu import _serving
from greenvis.bench.gpu._measure import Bench, measure
from greenvis.core.technique import Samples
from greenvis.core.wrap import Wrapped, wrap
from greenvis.techniques import registry

CLASSES = 10


def tuning(bench: Bench) -> list[dict[str, Any]]:
    """Full fine-tuning of ViT-B/16, LoRA, the last two blocks, and those two behind a prefix that
    is kept."""
    partial = {"blocks": 2}
    ways: dict[str, list[tuple[str, dict[str, Any]]]] = {
        "full": [],
        "lora, rank 8": [("lora", {"rank": 8})],
        "last 2 blocks": [("partial", partial)],
        "last 2 blocks, prefix kept": [("partial", {**partial, "cache": True})],
    }
    with tempfile.TemporaryDirectory() as folder:
        return _steps(bench, "timm/vit_base_patch16_224", ways, Path(folder))


def teacher(bench: Bench) -> list[dict[str, Any]]:
    """ViT-S/16 as a student: without a teacher, with ViT-L/16 asked at each step, and with its
    answers kept."""
    model = _network(bench, "timm/vit_large_patch16_224").eval()
    ways = {
        "no teacher": [],
        "teacher live": [("distill", {"teacher": model})],
        "teacher's answers kept": [("distill", {"teacher": model, "cache": True})],
    }
    with tempfile.TemporaryDirectory() as folder:
        return _steps(bench, "timm/vit_small_patch16_224", ways, Path(folder))


def _network(bench: Bench, ref: str) -> nn.Module:
    return models.build(ref, num_classes=CLASSES, **(_serving.TINY if bench.small else {})).to(
        bench.device
    )


def _steps(
    bench: Bench, ref: str, ways: dict[str, list[tuple[str, dict[str, Any]]]], folder: Path
) -> list[dict[str, Any]]:
    """Return a row per way to train: joules per image of a step, and the allocator's peak above
    what was there before."""
    batch = bench.pick(64, 4)
    arms, peaks, learning = {}, {}, {}
    x = _serving.images(bench, _network(bench, ref), batch)
    y = torch.arange(batch, device=bench.device) % CLASSES
    for name, techniques in ways.items():
        before = _allocated(bench)
        live = wrap(
            _network(bench, ref), [registry.find(t).model_validate(f) for t, f in techniques]
        )
        call = _step(live, x, y, folder)
        call()  # fills what is kept
        _reset(bench)
        call()
        peaks[name] = (
            None if before is None else (_allocated(bench, peak=True) or 0) / 1e6 - before / 1e6
        )
        learning[name] = sum(p.numel() for p in live.trainable.values())
        arms[name] = (call, batch)
    return [
        {
            "model": _serving.label(bench, ref),
            "batch": batch,
            **row,
            "peak_mb": peaks[row["setting"]],
            "trained": learning[row["setting"]],
        }
        for row in measure(bench, arms)
    ]


def _step(live: Wrapped, x: Tensor, y: Tensor, folder: Path) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(live.param_groups(1e-5), fused=True)
    samples = Samples(folder, {"images": "random"}, len(x), 1, torch.arange(len(x)))
    live.model.train()

    def call() -> None:
        with torch.autocast(x.device.type, torch.bfloat16):
            live.set_samples(samples)
            inputs, labels = live.batch(x, y)
            logits = live.model(inputs)
            loss = F.cross_entropy(logits, labels) + live.loss(inputs, labels, logits)
        loss.backward()
        optimizer.step()
        live.step_end()
        optimizer.zero_grad()

    return call


def _allocated(bench: Bench, peak: bool = False) -> int | None:
    if bench.device.type != "cuda":
        return None
    bench.sync()
    return torch.cuda.max_memory_allocated() if peak else torch.cuda.memory_allocated()


def _reset(bench: Bench) -> None:
    if bench.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()


def pipeline(bench: Bench) -> list[dict[str, Any]]:
    """JPEG files (500 x 375) to batches of 224 pixels on the device, by number of workers; first,
    what ViT-B/16 serves."""
    from PIL import Image
    from torch.utils.data import DataLoader
    from torchvision import datasets
    from torchvision.transforms import v2

    count, batch = bench.pick(512, 16), bench.pick(128, 8)
    model = _serving.build(bench, "timm/vit_base_patch16_224")
    ready = _serving.images(bench, model, batch)
    size = ready.shape[-1]
    change = v2.Compose(
        [v2.ToImage(), v2.RandomResizedCrop(size), v2.ToDtype(torch.float32, scale=True)]
    )
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "all").mkdir()
        generator = np.random.default_rng(0)
        for i in range(count):
            coarse = generator.integers(0, 255, (12, 16, 3), dtype=np.uint8)
            Image.fromarray(coarse).resize((500, 375)).save(
                Path(folder) / "all" / f"{i}.jpg", quality=90
            )
        files = datasets.ImageFolder(folder, change)

        def served() -> None:
            with torch.inference_mode():
                for _ in range(count // batch):
                    model(ready)

        def loaded(workers: int) -> Callable[[], None]:
            more: dict[str, Any] = {"persistent_workers": True} if workers else {}
            loader = DataLoader(
                files, batch, num_workers=workers, pin_memory=bench.device.type == "cuda", **more
            )

            def call() -> None:
                for x, _ in loader:
                    x.to(bench.device, non_blocking=True)
                bench.sync()

            return call

        arms = {"ViT-B/16 serves": (served, count)}
        arms |= {
            f"loading, {n} workers": (loaded(n), count) for n in bench.pick((0, 4, 8, 16), (0, 1))
        }
        return [{"batch": batch, **row} for row in measure(bench, arms)]
