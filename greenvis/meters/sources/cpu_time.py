"""The estimate: CPU-seconds and resident memory of this process and its children, priced by
coefficients."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from greenvis.meters import host
from greenvis.meters.coefficients import cpu_watts
from greenvis.meters.processes import open_tree
from greenvis.meters.sources.base import Integral, MeterSource, Unavailable

# CPU time is counted in ticks and found late: a little more than all CPUs may show up at
# once
HEADROOM = 1.25


class CpuTime(MeterSource):
    """Watts per busy CPU × CPU-seconds, and watts per GB × GB-seconds, of this process and all it
    started."""

    name: ClassVar[str] = "cpu_time"
    quantities: ClassVar[Mapping[str, str]] = {"cpu": "cpu_s", "ram": "ram_gb_s"}
    external: ClassVar[bool] = False

    def connect(self, coefficients: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Watch the process and its children."""
        try:
            tree = open_tree()
            tree.cpu_s()
        except (ImportError, OSError, RuntimeError, ValueError) as error:
            raise Unavailable("CPU time cannot be read on this system") from error

        def resident_gb() -> float:
            gb = tree.resident_gb()
            if gb <= 0:
                raise Unavailable("no memory is resident")
            return gb

        # in this order, for reading CPU time lists the children whose memory counts
        self.watch("cpu", lambda now: tree.cpu_s(), HEADROOM * host.cpus(), "CPU time")
        most_gb = HEADROOM * host.memory_gb()
        self.watch("ram", Integral(resident_gb), most_gb, "resident memory")
        estimated = {
            "scope": "process", "provenance": "estimated",
            "repeatability": coefficients["repeatability"],
        }  # fmt: skip
        cpu, ram = cpu_watts(coefficients, host.cpu_name()), coefficients["ram_w_per_gb"]
        return [
            self.component("cpu", source="cpu-time model", **_priced(cpu), **estimated),
            self.component(
                "ram", "no live memory counter", source="resident memory model", **_priced(ram),
                **estimated,
            ),
        ]  # fmt: skip


def _priced(coefficient: Mapping[str, Any]) -> dict[str, Any]:
    return {"coefficient": coefficient, "citation": coefficient["citation"]}
