"""Cells of serving: token merging, early exit and low precision against the unmodified model with
its fused attention."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from greenvis import models
from greenvis.bench import _exiting
from greenvis.bench.gpu._measure import Bench, NotMeasured, measure
from greenvis.core.wrap import wrap
from greenvis.meters import flops
from greenvis.models.structure import example_input
from greenvis.techniques import registry

TINY: dict[str, Any] = {
    "img_size": 32,
    "patch_size": 8,
    "embed_dim": 32,
    "depth": 4,
    "num_heads": 2,
}
PLAIN, NEVER = "unmodified", "never"


def build(bench: Bench, ref: str, technique: str | None = None, **fields: Any) -> nn.Module:
    """Return a model of this library reference in eval mode, bf16, on the device; tiny ones in a
    rehearsal."""
    options = TINY if bench.small else {}
    model = models.build(ref, **options).eval()
    if technique is not None:
        wrap(model, registry.find(technique).model_validate(fields))
    return model.to(bench.device, torch.bfloat16)


def label(bench: Bench, ref: str) -> str:
    """Return what a table calls the model."""
    return "a tiny ViT in its place" if bench.small else ref.removeprefix("timm/")


def images(bench: Bench, model: nn.Module, count: int) -> Tensor:
    """Return random images (count, channels, height, width) in the model's precision, on its
    device."""
    shape = example_input(model).shape[1:]
    generator = torch.Generator().manual_seed(0)
    weight = next(model.parameters())
    return torch.rand(count, *shape, generator=generator).to(weight.device, weight.dtype)


def forward(model: Callable[[Tensor], Any], x: Tensor) -> Callable[[], Any]:
    """Return a call that serves these images."""

    def call() -> Any:
        with torch.inference_mode():
            return model(x)

    return call


PAPER = (("timm/vit_base_patch16_224", 13), ("timm/vit_large_patch16_224", 7))


def tokens(bench: Bench) -> list[dict[str, Any]]:
    """ViT-B/16 and ViT-L/16 with token merging at the r its authors give figures for (13 and 7;
    Bolya et al., 2023)."""
    return _tokens(bench, bench.pick(PAPER, ((PAPER[0][0], 2),)))


def tokens_compiled(bench: Bench) -> list[dict[str, Any]]:
    """ViT-B/16 with token merging at r = 13, each block of both models compiled."""
    return _tokens(bench, bench.pick(PAPER[:1], ((PAPER[0][0], 2),)), compiled=True)


def _tokens(
    bench: Bench, pairs: Sequence[tuple[str, int]], compiled: bool = False
) -> list[dict[str, Any]]:
    rows, batch = [], bench.pick(256, 4)
    for ref, r in pairs:
        plain, merged = build(bench, ref), build(bench, ref, "token_merge", r=r)
        x = images(bench, plain, batch)
        macs = [flops.count(m, x[:1], cross_check=False).macs for m in (plain, merged)]
        if compiled:
            _compile_blocks(plain)
            _compile_blocks(merged)
        arms = {PLAIN: (forward(plain, x), batch), f"merged, r {r}": (forward(merged, x), batch)}
        for row, count in zip(measure(bench, arms), macs, strict=True):
            rows.append(
                {
                    "model": label(bench, ref),
                    "batch": batch,
                    **row,
                    "gmacs": count / 1e9,
                    "macs_ratio": count / macs[0],
                }
            )
    return rows


def _compile_blocks(model: nn.Module) -> None:
    for block in model.get_submodule("blocks").children():
        block.compile()  # blocks that are alike share their code: a whole network takes minutes


def exits(bench: Bench) -> list[dict[str, Any]]:
    """ViT-B/16 with three exits, where samples that are sure leave the batch, at several batch
    sizes."""
    ref, rows = "timm/vit_base_patch16_224", []
    plain, installed = _exiting.build_with_exits(ref, **(TINY if bench.small else {}))
    exiting: nn.Module = installed.exits.model
    for model in (plain, exiting):
        model.to(bench.device, torch.bfloat16)
    x = _exiting.images(bench.pick(512, 16), plain).to(bench.device, torch.bfloat16)
    limits = {
        NEVER: [float("inf")] * len(_exiting.AT),
        **_exiting.thresholds(installed, x, (0.2, 0.4, 0.7)),
    }
    full_macs = flops.count(plain, x[:1], cross_check=False).macs
    for batch in bench.pick((1, 8, 64, 512), (1, 8)):
        # one call serves the same images at each batch size, at batch 1 fewer of them
        parts = x[: bench.pick(64 if batch == 1 else 512, 16)].split(batch)
        arms = {PLAIN: (_serve(plain, parts, None, None), sum(map(len, parts)))}
        shares = {PLAIN: 1.0}
        for name, at in limits.items():
            arms[name] = (_serve(exiting, parts, installed, at), sum(map(len, parts)))
            with installed.at(at) as facts, torch.inference_mode():
                for part in parts:
                    exiting(part)
            shares[name] = facts["macs"] / full_macs
        for row in measure(bench, arms):
            share, energy = shares[row["setting"]], row["energy_ratio"]
            realised = (1 - energy) / (1 - share) if energy is not None and share < 0.95 else None
            rows.append(
                {
                    "model": label(bench, ref),
                    "batch": batch,
                    **row,
                    "macs_ratio": share,
                    "realised": realised,
                }
            )
    return rows


def _serve(
    model: nn.Module, parts: tuple[Tensor, ...], installed: Any, at: Any
) -> Callable[[], None]:
    def call() -> None:
        with torch.inference_mode(), nullcontext() if at is None else installed.at(at):
            for part in parts:
                model(part)

    return call


CORES = ("relu", "elu", "polaformer", "hedgehog", "ssd")


def attention(bench: Bench) -> list[dict[str, Any]]:
    """Two blocks of ViT-S/16 with softmax attention, fused, and with linear attention, on images of
    three sizes."""
    rows: list[dict[str, Any]] = []
    for side, batch in bench.pick(((224, 128), (512, 32), (1024, 8)), ((32, 2), (64, 2))):
        options: dict[str, Any] = {"img_size": side, "depth": 2}
        if bench.small:
            options = TINY | options
        arms, tokens = {}, 0
        for name in (PLAIN, *CORES):
            model = models.build("timm/vit_small_patch16_224", **options).eval()
            if name != PLAIN:
                live = wrap(model, registry.find("linear_attention").model_validate({"core": name}))
                tokens = live.facts()["linear_attention"]["tokens"]
            model.to(bench.device, torch.bfloat16)
            arms[name] = (forward(model, images(bench, model, batch)), batch)
        what = f"{label(bench, 'timm/vit_small_patch16_224')}, 2 blocks, {tokens} tokens"
        rows += [{"model": what, "batch": batch, **row} for row in measure(bench, arms)]
    return rows


def precision(bench: Bench) -> list[dict[str, Any]]:
    """ViT-B/16 in fp32, TF32 and bf16."""
    ref, batch = "timm/vit_base_patch16_224", bench.pick(256, 4)
    bf16, x = _bf16(bench, ref, batch)
    fp32 = models.build(ref, **(TINY if bench.small else {})).eval().to(bench.device)
    arms = {"fp32": (_matmul("highest", forward(fp32, x.float())), batch)}
    if bench.device.type == "cuda":
        arms["tf32"] = (_matmul("high", forward(fp32, x.float())), batch)
    arms["bf16"] = (forward(bf16, x), batch)
    rows = measure(bench, arms)
    if bench.device.type != "cuda":
        rows.append({"setting": "tf32", "not_measured": "no tensor cores here"})
    return [{"model": label(bench, ref), "batch": batch, **row} for row in rows]


def int8(bench: Bench) -> list[dict[str, Any]]:
    """ViT-B/16 with bf16 weights, each block compiled, and the same with torchao's dynamic int8."""
    try:
        torchao: Any = importlib.import_module("torchao.quantization")
    except ImportError as error:
        raise NotMeasured("torchao is not installed: pip install torchao") from error
    ref, batch = "timm/vit_base_patch16_224", bench.pick(256, 4)
    arms = {}
    for name in ("bf16, compiled", "int8, compiled"):
        model, x = _bf16(bench, ref, batch)
        if name.startswith("int8"):
            torchao.quantize_(model, torchao.Int8DynamicActivationInt8WeightConfig())
        _compile_blocks(model)
        arms[name] = (forward(model, x), batch)
    return [{"model": label(bench, ref), "batch": batch, **row} for row in measure(bench, arms)]


def _bf16(bench: Bench, ref: str, batch: int) -> tuple[nn.Module, Tensor]:
    model = build(bench, ref)
    return model, images(bench, model, batch)


def _matmul(how: str, call: Callable[[], Any]) -> Callable[[], Any]:
    def wrapped() -> Any:
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision(how)
        try:
            return call()
        finally:
            torch.set_float32_matmul_precision(before)

    return wrapped
