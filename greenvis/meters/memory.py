"""Peak memory: resident on the CPU; allocator and device on a GPU. torch is used only where it is
loaded already."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from greenvis.meters.processes import open_tree

MB = 1e6
SAMPLE_S = 0.02


@dataclass
class Peak:
    """Peak memory of a block in MB (1e6 bytes), filled in when it ends.

    resident_mb: highest resident memory of this process and its children, sampled every 20 ms;
    grown_mb: that above the start; allocated_mb and reserved_mb: the CUDA allocator's peaks;
    device_mb: in use on the GPU by everybody, at the end.
    """

    resident_mb: float = 0.0
    grown_mb: float = 0.0
    allocated_mb: float | None = None
    reserved_mb: float | None = None
    device_mb: float | None = None


@contextmanager
def peak(sample_s: float = SAMPLE_S) -> Iterator[Peak]:
    """Measure peak memory over a block: `with peak() as p: …` and then `p.resident_mb`."""
    tree, usage, halt = open_tree(), Peak(), threading.Event()
    cuda = _cuda()

    def look() -> None:
        tree.cpu_s()  # lists the children
        usage.resident_mb = max(usage.resident_mb, tree.resident_gb() * 1000)

    def watch() -> None:
        while not halt.wait(sample_s):
            look()

    look()
    start = usage.resident_mb
    if cuda is not None:
        cuda.synchronize()
        cuda.reset_peak_memory_stats()
    thread = threading.Thread(target=watch, name="greenvis-memory", daemon=True)
    thread.start()
    try:
        yield usage
    finally:
        halt.set()
        thread.join()
        look()
        usage.grown_mb = usage.resident_mb - start
        if cuda is not None:
            cuda.synchronize()
            free, total = cuda.mem_get_info()
            usage.allocated_mb, usage.reserved_mb = (
                cuda.max_memory_allocated() / MB,
                cuda.max_memory_reserved() / MB,
            )
            usage.device_mb = (total - free) / MB


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
