"""Peak memory: resident on the CPU; the allocator's on a GPU. torch is used only where it is
loaded already."""

from __future__ import annotations

import contextlib
import sys
from typing import Any

MB = 1e6


def peak_mb() -> float:
    """Return the highest resident memory of this process so far, as the kernel kept it, in MB; on a
    GPU, the allocator's."""
    cuda = _cuda()
    if cuda is not None:
        return cuda.max_memory_allocated() / MB
    try:
        with open("/proc/self/status") as f:
            return next(int(line.split()[1]) * 1024 for line in f if line.startswith("VmHWM:")) / MB
    except (OSError, StopIteration):
        import resource

        used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return used / MB if sys.platform == "darwin" else used * 1024 / MB


def reset_peak() -> None:
    """Let `peak_mb` speak of what comes after this call. Where the kernel cannot forget (no Linux),
    it does not."""
    cuda = _cuda()
    if cuda is not None:
        cuda.reset_peak_memory_stats()
    with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w") as f:
        f.write("5")


def _cuda() -> Any:
    """Return torch.cuda if this process uses it already, else None."""
    torch = sys.modules.get("torch")
    return (
        torch.cuda
        if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized()
        else None
    )
