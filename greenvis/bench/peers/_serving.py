"""One finished network, served in several ways."""

from __future__ import annotations

import copy
import importlib.util
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from greenvis.bench._digits import built, digits
from greenvis.bench.peers._work import LITE0
from greenvis.meters.speed import in_turn
from greenvis.models.fusing import fuse

EAGER = "eager"


def ways(side: int = 64, batch: int = 64) -> dict[str, Callable[[], Tensor]]:
    """Return what answers a batch of images, by name: eager as timm builds it, folded by
    greenvis, and what peers make of it where they are installed."""
    model = built(LITE0, 0).eval()
    x = digits(side)[0][:batch]
    folded = fuse(copy.deepcopy(model), x).model
    out: dict[str, Callable[[], Tensor]] = {
        EAGER: lambda: model(x),
        "greenvis.fuse": lambda: folded(x),
        "torch.compile": _compiled(model, x),
    }
    if importlib.util.find_spec("onnxruntime") and importlib.util.find_spec("onnxscript"):
        out["ONNX Runtime"] = _onnx(model, x)
        out["greenvis.fuse, ONNX Runtime"] = _onnx(folded, x)
    return out


def measured(
    answering: dict[str, Callable[[], Tensor]], rounds: int, images: int
) -> list[dict[str, Any]]:
    """Return the CPU time of an image in each way, ways in turns, and how far answers differ from
    eager's."""
    with torch.inference_mode():
        expected = answering[EAGER]()
        apart = {
            name: float((answer() - expected).abs().max() / expected.abs().max())
            for name, answer in answering.items()
        }
        times: dict[str, list[float]] = {name: [] for name in answering}
        for i in range(rounds):
            for name in in_turn(answering, i):
                start = time.process_time()
                for _ in range(max(1, images // len(expected))):
                    answering[name]()
                count = max(1, images // len(expected)) * len(expected)
                times[name].append((time.process_time() - start) / count)
    return [
        {
            "way": name,
            "cpu_ms_per_image": round(1e3 * statistics.median(own), 3),
            "vs_eager": round(
                statistics.median(a / b for a, b in zip(own, times[EAGER], strict=True)), 3
            ),
            "answers_apart": float(f"{apart[name]:.1e}"),
        }
        for name, own in times.items()
    ]


def _compiled(model: torch.nn.Module, x: Tensor) -> Callable[[], Tensor]:
    compiled: Any = torch.compile(model)
    return lambda: compiled(x)


def _onnx(model: torch.nn.Module, x: Tensor) -> Callable[[], Tensor]:
    import onnxruntime

    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path = Path(folder, "model.onnx")
        torch.onnx.export(model, (x,), str(path), dynamo=True, verbose=False)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        session = onnxruntime.InferenceSession(
            str(path), options, providers=["CPUExecutionProvider"]
        )
    name, images = session.get_inputs()[0].name, x.numpy()
    return lambda: torch.from_numpy(session.run(None, {name: images})[0])
