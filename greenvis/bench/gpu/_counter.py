"""The cell that checks the meter itself: NVML's energy counter against its power readings, integrated over time."""

from __future__ import annotations

import threading
import time
from typing import Any

import torch

from greenvis.bench.gpu._measure import Bench, NotMeasured

SPANS_S = (2.0, 6.0, 15.0)
SAMPLE_S = 0.02


def counter(bench: Bench) -> list[dict[str, Any]]:
    """Joules of the counter and of integrated power, over three spans of matrix products and one of rest."""
    if bench.device.type != "cuda" or torch.version.cuda is None:
        raise NotMeasured("no NVIDIA GPU here")
    import pynvml

    pynvml.nvmlInit()
    uuid = torch.cuda.get_device_properties(bench.device).uuid
    handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
    a = torch.randn(8192, 8192, device=bench.device, dtype=torch.bfloat16)
    rows = []
    for span, busy in (*((s, True) for s in SPANS_S), (SPANS_S[1], False)):
        readings: list[tuple[float, float]] = []
        halt = threading.Event()

        def watch(readings: list[tuple[float, float]] = readings, halt: threading.Event = halt) -> None:
            while not halt.wait(SAMPLE_S):
                readings.append((time.perf_counter(), pynvml.nvmlDeviceGetPowerUsage(handle) / 1000))

        before = pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
        started, thread = time.perf_counter(), threading.Thread(target=watch, daemon=True)
        thread.start()
        while time.perf_counter() - started < span:
            if busy:
                for _ in range(20):
                    torch.mm(a, a)
                bench.sync()
            else:
                time.sleep(SAMPLE_S)
        joules = (pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) - before) / 1000
        seconds = time.perf_counter() - started
        halt.set()
        thread.join()
        times, watts = [t for t, _ in readings], [w for _, w in readings]
        integrated = sum((b - a) * (v + w) / 2 for a, b, v, w in zip(times, times[1:], watts, watts[1:], strict=False))
        integrated *= seconds / (times[-1] - times[0])  # the ends of the span lie outside the samples
        rows.append({
            "setting": f"{'matrix products' if busy else 'rest'}, {span:g} s", "seconds": seconds, "gpu_j": joules,
            "integrated_j": integrated, "ratio": joules / integrated, "watts": joules / seconds,
        })  # fmt: skip
    return rows
