"""Energy of NVIDIA GPUs by NVML: the driver's own counter, or, on GPUs older than Volta, power
integrated over time."""

from __future__ import annotations

import importlib
import os
import sys
import time
from collections.abc import Sequence
from typing import Any

from greenvis.meters.cards import Card, visible
from greenvis.meters.counter import Counter, new_notes, readings

DRIVER = ("/proc/driver/nvidia/version", "/dev/nvidiactl", "/dev/nvidia0")
MOST_W = 2000.0  # no GPU draws more
PATIENCE_S = 2.0  # even an idle GPU adds tens of joules in this time
NOT_SUPPORTED = 3  # NVML_ERROR_NOT_SUPPORTED


class Nvml:
    """Joules of the GPUs this process may use, since opening; everything that runs on them counts.

    since: where another reader was in use before, the moment from which its readings are doubted;
    joules: what it had read.
    """

    def __init__(
        self, nvml: Any, handles: list[Any], since: float | None = None, joules: float = 0.0
    ) -> None:
        now = time.monotonic()
        self._nvml, self._before_j = nvml, joules
        self.names = [_text(nvml.nvmlDeviceGetName(h)) for h in handles]
        self.devices = [_text(nvml.nvmlDeviceGetUUID(h)) for h in handles]
        self._gpus = [
            _Gpu(nvml, h, uuid, now if since is None else since)
            for h, uuid in zip(handles, self.devices, strict=True)
        ]
        self.counter = all(gpu.counts for gpu in self._gpus)
        self.read(now)

    def read(self, now: float | None = None) -> dict[str, float]:
        """Return {"gpu_j"}: joules since opening, and how long they could not be told. now:
        monotonic seconds."""
        now = time.monotonic() if now is None else now
        for gpu in self._gpus:
            gpu.read(self._nvml, now)
        return self.so_far(now)

    def so_far(self, now: float) -> dict[str, float]:
        """Return the same without asking the driver."""
        out = readings("gpu_j", [gpu.counter for gpu in self._gpus], now)
        return out | {"gpu_j": out["gpu_j"] + self._before_j}

    def lose(self, now: float, why: str) -> None:
        """Give up the counters' baselines."""
        for gpu in self._gpus:
            gpu.counter.lose(now, why)

    def new_notes(self) -> list[str]:
        """Return what was amiss since the last call."""
        return new_notes(gpu.counter for gpu in self._gpus)


class _Gpu:
    """One card: its counter, or the integral of its power."""

    def __init__(self, nvml: Any, handle: Any, uuid: str, opened: float) -> None:
        self.counter = Counter(f"NVML {uuid}", MOST_W, opened, patience_s=PATIENCE_S)
        self._handle = handle
        self._integral, self._at = 0.0, opened
        try:
            nvml.nvmlDeviceGetTotalEnergyConsumption(handle)
            self.counts = True
        except nvml.NVMLError as error:
            # else it failed just now: not for good
            self.counts = getattr(error, "value", NOT_SUPPORTED) != NOT_SUPPORTED

    def read(self, nvml: Any, now: float) -> None:
        try:
            if self.counts:
                joules = nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle) / 1000
            else:
                self._integral += (
                    nvml.nvmlDeviceGetPowerUsage(self._handle) / 1000 * (now - self._at)
                )
                joules, self._at = self._integral, now
        except (
            Exception
        ) as error:  # a GPU that fell off the bus, a driver unloaded: training goes on
            self.counter.take(now, None, str(error))
        else:
            self.counter.take(now, joules)


def open_nvml(
    uuids: Sequence[str] | None = None, since: float | None = None, joules: float = 0.0
) -> tuple[Nvml | None, str]:
    """Return a reader of the visible GPUs, or None with the reason. uuids: torch's devices, where
    it has opened them."""
    if sys.platform == "linux" and not any(map(os.path.exists, DRIVER)):
        return None, "no NVIDIA driver is loaded here"
    try:
        nvml = importlib.import_module("pynvml")  # comes with codecarbon
        nvml.nvmlInit()
        handles = [nvml.nvmlDeviceGetHandleByIndex(i) for i in range(nvml.nvmlDeviceGetCount())]
        chosen, why = visible([_card(nvml, h) for h in handles], os.environ, uuids)
        if not chosen:
            return None, why
        reader = Nvml(nvml, [handles[i] for i in chosen], since, joules)
    except Exception as error:  # the library's own errors, a missing library, a driver out of step
        return None, f"NVML cannot be used: {error}"
    how = (
        "the driver's energy counter"
        if reader.counter
        else "power readings integrated over time (no counter)"
    )
    return reader, f"{how}, of all that runs on these cards"


def _card(nvml: Any, handle: Any) -> Card:
    uuid, name = _text(nvml.nvmlDeviceGetUUID(handle)), _text(nvml.nvmlDeviceGetName(handle))
    try:
        split = bool(nvml.nvmlDeviceGetMigMode(handle)[0])
    except (nvml.NVMLError, AttributeError):  # cards and libraries that know no MIG
        return Card(uuid, name)
    slices = []
    for i in range(nvml.nvmlDeviceGetMaxMigDeviceCount(handle) if split else 0):
        try:
            slices.append(
                _text(nvml.nvmlDeviceGetUUID(nvml.nvmlDeviceGetMigDeviceHandleByIndex(handle, i)))
            )
        except nvml.NVMLError:  # a place without a slice
            continue
    return Card(uuid, name, tuple(slices), split)


def _text(value: bytes | str) -> str:
    return value.decode() if isinstance(value, bytes) else value
