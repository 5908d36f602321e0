"""The last resort: a constant power over the time that passed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from greenvis.meters.sources.base import MeterSource


class WallTime(MeterSource):
    """Seconds that passed × a constant: nothing is known of the load."""

    name: ClassVar[str] = "wall_time"
    quantities: ClassVar[Mapping[str, str]] = {"cpu": "wall_s"}

    def connect(self, coefficients: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Offer the clock that every reading has."""
        watts = coefficients["wall_w"]
        fields = {"source": "wall time", "scope": "process", "provenance": "constant"}
        return [self.component("cpu", coefficient=watts, citation=watts["citation"], **fields)]
