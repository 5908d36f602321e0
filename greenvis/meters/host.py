"""What the system says of this machine: how much it has, its clocks, and what other machines take
from it."""

from __future__ import annotations

import os
import time

from greenvis.meters.processes import GB


def cpus() -> int:
    """Return the machine's logical CPUs, whatever Python was told to say."""
    return max(
        os.cpu_count() or 1, os.sysconf("SC_NPROCESSORS_ONLN") if hasattr(os, "sysconf") else 1
    )


def memory_gb() -> float:
    """Return the machine's memory in GB, or far more where the system does not say."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / GB
    except (AttributeError, ValueError, OSError):
        return 65536.0


def clocks() -> tuple[float, float]:
    """Return the monotonic clock, which stands while the machine sleeps, and how long it has slept
    since boot, in seconds."""
    now = time.monotonic()
    return now, time.clock_gettime(time.CLOCK_BOOTTIME) - now if hasattr(
        time, "CLOCK_BOOTTIME"
    ) else 0.0


def steal_ticks() -> int | None:
    """Return the ticks other machines took from this one since boot, or None where the system does
    not say."""
    try:
        with open("/proc/stat", "rb") as f:
            return int(f.readline().split()[8])
    except (OSError, IndexError, ValueError):
        return None


def cpu_name() -> str:
    """Return the processor's name as the system gives it; "" where it is unknown."""
    try:
        with open("/proc/cpuinfo", "rb") as f:
            text = f.read(2048).decode("utf-8", "replace")
    except OSError:
        import platform

        return platform.processor()
    return next(
        (
            line.split(":", 1)[1].strip()
            for line in text.splitlines()
            if line.startswith("model name")
        ),
        "",
    )
