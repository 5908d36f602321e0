"""Accelerators of this process as torch knows them: which are in use, by what UUID, and how to wait
for them.

torch is looked at where the program has imported it, never imported here, and no device is opened.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from typing import Any

HOSTS = ("cpu", "meta")
NAMES = {"cuda": "CUDA", "rocm": "ROCm", "mps": "MPS (Apple)", "xpu": "XPU (Intel)"}


def in_use(torch: Any = None) -> set[str]:
    """Return the kinds of accelerator this process has opened: "cuda", "rocm", "mps", "xpu" or
    torch's name of another."""
    torch = torch or sys.modules.get("torch")
    kinds = {
        kind for kind in ("cuda", "xpu", "mps", _other(torch)) if kind and _opened(torch, kind)
    }
    return {kind_of(kind, torch) for kind in kinds}


def kind_of(device_type: str, torch: Any = None) -> str:
    """Return a device's kind: torch's own name for it, but "rocm" where its "cuda" is AMD's."""
    torch = torch or sys.modules.get("torch")
    hip = getattr(getattr(torch, "version", None), "hip", None)
    return "rocm" if device_type == "cuda" and hip else device_type


def uuids(torch: Any = None) -> list[str] | None:
    """Return the UUIDs of torch's CUDA devices, in its order; None where it has not opened them or
    does not know."""
    torch = torch or sys.modules.get("torch")
    try:
        if torch is None or not torch.cuda.is_initialized() or torch.version.hip:
            return None
        return [
            str(torch.cuda.get_device_properties(i).uuid) for i in range(torch.cuda.device_count())
        ]
    except Exception:  # as above
        return None


def uncounted(kinds: Iterable[str], closed: Mapping[str, str]) -> str:
    """Return in words whose joules are missing, of devices in use that no counter covers; "" for
    none.

    Args:
        kinds: of the devices.
        closed: by kind, why the counter there is for it cannot be read.
    """
    missing = sorted(set(kinds) - set(HOSTS))
    reasons = [
        closed.get(k) or f"greenvis reads no energy counter of {NAMES.get(k, k)} devices"
        for k in missing
    ]
    why = f"none, because {'; '.join(reasons)}: what the device used is not in the total"
    return why if missing else ""


def asynchronous(*holders: Any) -> list[Any]:
    """Return the devices of these tensors and modules that are asked and answer later: all but the
    processor."""
    devices: dict[Any, None] = {}
    for holder in holders:
        tensors = (
            [*holder.parameters(), *holder.buffers()] if hasattr(holder, "parameters") else [holder]
        )
        devices.update(dict.fromkeys(t.device for t in tensors if t.device.type not in HOSTS))
    return [*devices]


def wait(devices: Iterable[Any]) -> None:
    """Wait until these devices have done what they were asked to."""
    for device in (d for d in devices if d.type not in HOSTS):
        import torch

        module = torch.get_device_module(device)
        module.synchronize() if device.type == "mps" else module.synchronize(device)


def _other(torch: Any) -> str:
    """Return torch's name of an accelerator that is not one of the three, "" for none."""
    try:
        device = torch.accelerator.current_accelerator(check_available=True)
    except Exception:  # torch absent, half imported by another thread, or older
        return ""
    return device.type if device is not None and device.type not in NAMES else ""


def _opened(torch: Any, kind: str) -> bool:
    try:
        module = getattr(torch, kind, None) or torch.get_device_module(kind)
        if kind == "mps":  # it has no such question: a first allocation opens it
            return torch.backends.mps.is_available() and module.current_allocated_memory() > 0
        return bool(module.is_initialized())
    except Exception:  # as above, or torch built without that device
        return False
