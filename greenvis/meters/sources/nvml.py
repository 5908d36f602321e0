"""Energy of NVIDIA GPUs by NVML: the driver's own counter, or, on GPUs older than Volta, power
integrated over time."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from greenvis.meters import devices, host
from greenvis.meters.cards import Card, visible
from greenvis.meters.sources.base import Integral, MeterSource, Reader, Unavailable

DRIVER = ("/proc/driver/nvidia/version", "/dev/nvidiactl", "/dev/nvidia0")
MOST_W = 2000.0  # no GPU draws more
PATIENCE_S = 2.0  # even an idle GPU adds tens of joules in this time
NOT_SUPPORTED = 3  # NVML_ERROR_NOT_SUPPORTED


class Nvml(MeterSource):
    """The GPUs this process may use; everything that runs on them counts."""

    name: ClassVar[str] = "nvml"
    quantities: ClassVar[Mapping[str, str]] = {"gpu": "gpu_j"}
    accelerators: ClassVar[frozenset[str]] = frozenset({"cuda"})

    def __init__(self) -> None:
        super().__init__()
        self._uuids: list[str] | None = None  # torch's devices, once it has opened them
        # since when cards were read that turned out to be others, and what they gave
        self._since: float | None = None
        self._before_j = 0.0

    def connect(self, coefficients: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Watch the visible cards."""
        self._opened = host.clocks()[0]
        nvml, cards = _visible(self._uuids)
        counts = [_counts(nvml, handle) for handle, _ in cards]
        counters = [
            self.watch(
                "gpu", _reader(nvml, handle, counted), MOST_W, f"NVML {card.uuid}",
                patience_s=PATIENCE_S, since=self._since,
            )
            for (handle, card), counted in zip(cards, counts, strict=True)
        ]  # fmt: skip
        counters[0].total += self._before_j
        how = (
            "the driver's energy counter"
            if all(counts)
            else "power readings integrated over time (no counter)"
        )
        return [
            self.component(
                "gpu", f"{how}, of all that runs on these cards",
                provenance="measured" if all(counts) else "estimated",
                devices=[card.uuid for _, card in cards], hardware=[card.name for _, card in cards],
            )
        ]  # fmt: skip

    def revise(self) -> None:
        """Read the cards torch uses from now on, where they are others than those read so far."""
        uuids = devices.uuids() if self._uuids is None else None
        if uuids is None:
            return
        self._uuids = uuids
        if self.components:
            try:
                cards = {card.uuid for _, card in _visible(uuids)[1]}
            except Unavailable:
                cards = set()
            if cards == set(self.components[0]["devices"]):
                return
            self._since, self._before_j = self._opened, self.read(fresh=False)["gpu_j"]
        self.open({})


def _visible(uuids: Sequence[str] | None) -> tuple[Any, list[tuple[Any, Card]]]:
    """Return the library, and handle and card of each visible GPU.

    Args:
        uuids: torch's devices, where it has opened them.

    Raises:
        Unavailable: with the reason; nothing is missing where there is no driver.
    """
    if sys.platform == "linux" and not any(map(os.path.exists, DRIVER)):
        raise Unavailable("no NVIDIA driver is loaded here")
    try:
        nvml = importlib.import_module("pynvml")  # comes with codecarbon
        nvml.nvmlInit()
        handles = [nvml.nvmlDeviceGetHandleByIndex(i) for i in range(nvml.nvmlDeviceGetCount())]
        cards = [_card(nvml, handle) for handle in handles]
    except Exception as error:  # the library's own errors, a missing library, a driver out of step
        raise Unavailable(f"NVML cannot be used: {error}", missing=True) from error
    chosen, why = visible(cards, os.environ, uuids)
    if not chosen:
        raise Unavailable(why, missing=True)
    return nvml, [(handles[i], cards[i]) for i in chosen]


def _counts(nvml: Any, handle: Any) -> bool:
    """Say whether a card has a counter of energy."""
    try:
        nvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except nvml.NVMLError as error:
        # else it failed just now: not for good
        return getattr(error, "value", NOT_SUPPORTED) != NOT_SUPPORTED
    return True


def _reader(nvml: Any, handle: Any, counted: bool) -> Reader:
    if counted:
        return lambda now: nvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1000
    return Integral(lambda: nvml.nvmlDeviceGetPowerUsage(handle) / 1000)


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
