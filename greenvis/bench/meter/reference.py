"""Reference MACs of known models, and the benchmark's two rows on FLOPs."""

from __future__ import annotations

import importlib
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from greenvis.meters.flop_mode import FlopMode
from greenvis.meters.flops import count
from greenvis.meters.step_flops import AGAIN, LONGEST, StepFlops
from greenvis.meters.track import track


def _make(library: str, name: str, **options: Any) -> Callable[[], nn.Module]:
    return lambda: getattr(importlib.import_module(library), name)(**options)


def _timm(name: str) -> Callable[[], nn.Module]:
    return _make("timm", "create_model", model_name=name)


def _hugging_face(model: str, config: str, **options: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        library = importlib.import_module("transformers")
        return getattr(library, model)(getattr(library, config)(**options))

    return build


# MACs of one 224 × 224 image, by the papers' own convention (products of convolutions, linear
# layers and attention).
REFERENCE: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "ResNet-50": (_timm("resnet50"), 4_089_184_256),
    "ViT-B/16 (timm)": (_timm("vit_base_patch16_224"), 17_563_828_224),
    "ViT-B/16 (torchvision)": (_make("torchvision.models", "vit_b_16"), 17_563_828_224),
    "ViT-B/16 (transformers)": (_hugging_face("ViTForImageClassification", "ViTConfig",
    num_labels=1000), 17_563_828_224),
    "Swin-T": (_timm("swin_tiny_patch4_window7_224"), 4_490_566_656),
    "DeiT-Ti": (_timm("deit_tiny_patch16_224"), 1_253_683_200),
    "ConvNeXt-T": (_timm("convnext_tiny"), 4_455_531_264),
    "MobileNetV3-L": (_timm("mobilenetv3_large_100"), 216_589_760),
    "EfficientNet-B0": (_timm("efficientnet_b0"), 385_814_752),
    "Swin-T (torchvision)": (_make("torchvision.models", "swin_t"), 4_490_566_656),
    "CLIP B/16 image tower": (
        _hugging_face("CLIPVisionModelWithProjection", "CLIPVisionConfig", patch_size=16,
        projection_dim=512), 17_563_453_440,
    ),
}  # fmt: skip


# peers run in full: only their worst cases
AS_THEY_ARE = ("ViT-B/16 (torchvision)", "MobileNetV3-L", "EfficientNet-B0")


def flops_error() -> dict[str, Any]:
    """Return the row of the largest departures from the reference: fvcore and FlopCounterMode as
    they are, and ours."""
    ours, peers, models = [0.0], [0.0], []
    for name, (build, macs) in REFERENCE.items():
        with torch.device("meta"):
            model = build().eval()
        counted = count(model, (3, 224, 224))
        ours += [counted.macs / macs - 1, (counted.counters["fvcore"] or 0) / macs - 1]
        if name in AS_THEY_ARE:
            peers += [x / macs - 1 for x in _as_they_are(model)]
        models.append(f"{name}: {counted.macs / 1e9:.3f} GMACs")
    worst = max(abs(e) for e in ours)
    span = f"{min(peers):+.0%} … {max(peers):+.0%}"
    return {
        "quantity": f"FLOPs error on {len(REFERENCE)} models, two counters", "target": "≤ 0.1 %",
        "met": worst <= 1e-3,
        "codecarbon": f"none; fvcore and FlopCounterMode as they are {span}",
        "ours": f"{worst:.3%}", "models": models,
    }  # fmt: skip


def _as_they_are(model: nn.Module) -> list[float]:
    """Return the MACs fvcore and torch's FlopCounterMode give on the CPU, out of the box."""
    import io
    from contextlib import redirect_stderr

    from fvcore.nn import FlopCountAnalysis

    model = model.to_empty(device="cpu")
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data.zero_()
    x = torch.zeros(1, 3, 224, 224)
    with torch.no_grad(), FlopCounterMode(display=False) as mode:
        model(x)
    out = [mode.get_total_flops() / 2]
    try:
        with redirect_stderr(io.StringIO()), torch.no_grad():
            analysis = (
                FlopCountAnalysis(model, x)
                .unsupported_ops_warnings(False)
                .uncalled_modules_warnings(False)
            )
            out.append(float(analysis.tracer_warnings("none").total()))
    except RuntimeError:  # it cannot trace a model that returns a dict of optional parts
        pass
    return out


def flops_cost() -> dict[str, Any]:
    """Return the row of what counting costs a minute of training ViT-Ti at 64 px, against
    FlopCounterMode on every step.

    Reckoned: counted steps × (their time − a plain step's) + the other steps × a look-up. A small
    model is the worst case: counting costs by operator, whatever their size.
    """
    timm, threads = importlib.import_module("timm"), torch.get_num_threads()
    torch.set_num_threads(1)
    model = timm.create_model("vit_tiny_patch16_224", img_size=64, num_classes=10).train()
    x = torch.randn(8, 3, 64, 64)

    def step() -> None:
        model(x).sum().backward()

    def under(mode: Callable[[], Any]) -> Callable[[], None]:
        def counted() -> None:
            with mode():
                step()

        return counted

    try:
        plain, ours, theirs = _best(
            step, under(FlopMode), under(lambda: FlopCounterMode(display=False))
        )
        lookup = _lookup_s(model, x)
    finally:
        torch.set_num_threads(threads)
    per_minute = 60 / plain
    looks, at = 0, 1
    while at <= per_minute:
        looks, at = looks + 1, min(at * AGAIN, at + LONGEST)
    share = (looks * (ours - plain) + per_minute * lookup) / 60
    again = (ours - plain) / 60  # the first step of each further epoch is counted, too
    return {
        "quantity": "cost of FLOPs counting, of a minute's training in one epoch, reckoned from "
                    "single steps",
        "target": "< 0.1 %", "met": share < 1e-3,
        "codecarbon": f"none; FlopCounterMode on every step {(theirs - plain) / plain:.0%}",
        "ours": f"{share:.3%} ({looks} counted steps of {per_minute:.0f}, {lookup * 1e6:.1f} µs "
                "each other step); "
        f"{again:.3%} more for each further epoch",
    }  # fmt: skip


def _lookup_s(model: nn.Module, x: torch.Tensor, n: int = 2000) -> float:
    """Return the seconds a step costs whose FLOPs are known."""
    with (
        tempfile.TemporaryDirectory() as folder,
        track("lookup", model, dir=folder, quiet=True) as run,
    ):
        counted = StepFlops(model)
        with run.phase("train"):
            for _ in range(3):
                with counted.step(run, x):
                    pass
            start = time.process_time()
            for _ in range(n):
                with counted.step(run, x):
                    pass
            return (time.process_time() - start) / n


def _best(*steps: Callable[[], None], n: int = 9) -> list[float]:
    """Return each step's least CPU-seconds, taken in turn so that the machine's moods meet all of
    them."""
    times: list[list[float]] = [[] for _ in steps]
    for _ in range(n):
        for step, seconds in zip(steps, times, strict=True):
            start = time.process_time()
            step()
            seconds.append(time.process_time() - start)
    return [min(seconds) for seconds in times]
