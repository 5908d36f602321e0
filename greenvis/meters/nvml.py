"""Energy of NVIDIA GPUs by NVML: the driver's own counter, or, on GPUs older than Volta, power integrated over time."""

from __future__ import annotations

import importlib
import os
import sys
import time
from typing import Any

DRIVER = ("/proc/driver/nvidia/version", "/dev/nvidiactl", "/dev/nvidia0")
PATIENCE_S = 2.0  # even an idle GPU adds tens of joules in this time


class Nvml:
    """Joules of the GPUs this process may use, since opening; everything that runs on them counts."""

    def __init__(self, nvml: Any, handles: list[Any]) -> None:
        self._nvml, self._handles = nvml, handles
        self.names = [_text(nvml.nvmlDeviceGetName(h)) for h in handles]
        self.devices = [_text(nvml.nvmlDeviceGetUUID(h)) for h in handles]
        try:
            self._first = [nvml.nvmlDeviceGetTotalEnergyConsumption(h) for h in handles]
            self.counter = True
        except nvml.NVMLError:
            self._first, self.counter = [], False
        self._joules = 0.0
        self._at = self._opened = time.monotonic()

    def read(self) -> dict[str, float]:
        """Return {"gpu_j"}: joules since opening."""
        now, nvml = time.monotonic(), self._nvml
        try:
            if self.counter:
                last = [nvml.nvmlDeviceGetTotalEnergyConsumption(h) for h in self._handles]
                self._joules = sum(b - a for a, b in zip(self._first, last, strict=True)) / 1000
            else:
                watts = sum(nvml.nvmlDeviceGetPowerUsage(h) for h in self._handles) / 1000
                self._joules += watts * (now - self._at)
        except nvml.NVMLError:
            pass  # a GPU that fell off the bus: keep what was read
        self._at = now
        return {"gpu_j": self._joules}

    def stalled(self) -> bool:
        """Say whether the counter has stood still for so long that it is not live."""
        return self._joules <= 0 and self._at - self._opened > PATIENCE_S


def open_nvml() -> tuple[Nvml | None, str]:
    """Return a reader of the visible GPUs, or None with the reason."""
    if sys.platform == "linux" and not any(map(os.path.exists, DRIVER)):
        return None, "no NVIDIA driver is loaded here"
    try:
        nvml = importlib.import_module("pynvml")  # comes with codecarbon
        nvml.nvmlInit()
        handles = _visible(nvml)
        reader = Nvml(nvml, handles)
    except Exception as error:  # the library's own errors, a missing library, a driver out of step
        return None, f"NVML cannot be used: {error}"
    if not handles:
        return None, "CUDA_VISIBLE_DEVICES hides every GPU from this process"
    return reader, "the driver's energy counter" if reader.counter else "power readings integrated over time (no counter)"


def _visible(nvml: Any) -> list[Any]:
    """Return the handles CUDA_VISIBLE_DEVICES leaves (by index or UUID), or all."""
    handles = [nvml.nvmlDeviceGetHandleByIndex(i) for i in range(nvml.nvmlDeviceGetCount())]
    wanted = os.environ.get("CUDA_VISIBLE_DEVICES")
    if wanted is None:
        return handles
    chosen = []
    for word in filter(None, (w.strip() for w in wanted.split(","))):
        if word.lstrip("-").isdigit():
            if not 0 <= int(word) < len(handles):
                break  # CUDA itself ignores everything from the first unknown entry on
            chosen.append(handles[int(word)])
        elif word.startswith("MIG-"):
            raise RuntimeError("MIG slices have no energy counter of their own")
        else:
            chosen += [h for h in handles if _text(nvml.nvmlDeviceGetUUID(h)).startswith(word)]
    return chosen


def _text(value: bytes | str) -> str:
    return value.decode() if isinstance(value, bytes) else value
