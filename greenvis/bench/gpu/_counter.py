"""The cell that checks the meter itself: NVML's energy counter against its power readings,
integrated over time.

From Ampere on, what nvmlDeviceGetPowerUsage gives is an average over the last second: over a span
of two it misses a third of the energy on an H200. The field of instant power does not.
"""

from __future__ import annotations

import threading
import time
from itertools import pairwise
from typing import Any

import torch

from greenvis.bench.gpu._measure import Bench, NotMeasured

SPANS_S = (2.0, 6.0, 15.0)
SAMPLE_S = 0.02


def _watts(handle: Any) -> float:
    """Return the power drawn now; the average over the last second where a card says no more."""
    import pynvml

    try:
        now = pynvml.nvmlDeviceGetFieldValues(handle, [pynvml.NVML_FI_DEV_POWER_INSTANT])[0]
    except pynvml.NVMLError:
        now = None
    if now is not None and now.nvmlReturn == pynvml.NVML_SUCCESS:
        return now.value.uiVal / 1000
    return pynvml.nvmlDeviceGetPowerUsage(handle) / 1000


def _integrate(readings: list[tuple[float, float]], seconds: float) -> float:
    """Return the joules of (time, watts): trapezia, stretched to the span, whose ends lie outside
    the samples."""
    area = sum((t1 - t0) * (w0 + w1) / 2 for (t0, w0), (t1, w1) in pairwise(readings))
    return area * seconds / (readings[-1][0] - readings[0][0])


def counter(bench: Bench) -> list[dict[str, Any]]:
    """Joules of the counter and of integrated power, over three spans of matrix products and one of
    rest."""
    if bench.device.type != "cuda" or torch.version.cuda is None:
        raise NotMeasured("no NVIDIA GPU here")
    import pynvml

    pynvml.nvmlInit()
    uuid = torch.cuda.get_device_properties(bench.device).uuid
    handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
    a = torch.randn(8192, 8192, device=bench.device, dtype=torch.bfloat16)
    rows = []
    for span, busy in (*((s, True) for s in SPANS_S), (SPANS_S[1], False)):
        instant: list[tuple[float, float]] = []
        averaged: list[tuple[float, float]] = []
        halt = threading.Event()

        def watch(
            instant: Any = instant, averaged: Any = averaged, halt: threading.Event = halt
        ) -> None:
            while not halt.wait(SAMPLE_S):
                instant.append((time.perf_counter(), _watts(handle)))
                averaged.append(
                    (time.perf_counter(), pynvml.nvmlDeviceGetPowerUsage(handle) / 1000)
                )

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
        integrated = _integrate(instant, seconds)
        rows.append({
            "setting": f"{'matrix products' if busy else 'rest'}, {span:g} s", "seconds": seconds,
            "gpu_j": joules,
            "integrated_j": integrated, "ratio": joules / integrated,
            "averaged_ratio": joules / _integrate(averaged, seconds),
            "watts": joules / seconds,
        })  # fmt: skip
    return rows
