"""A wall meter: the user's own function that reads a smart plug or a server's management board."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from greenvis.meters.sources.base import MeterSource, Unavailable

MOST_W = 20_000.0  # no machine of eight GPUs draws more
PATIENCE_S = 1800.0  # a plug that counts whole watt-hours moves rarely


class Wall(MeterSource):
    """The whole machine, as the user's own function tells it.

    Args:
        function: returns joules of the whole machine so far.
    """

    name: ClassVar[str] = "wall"
    quantities: ClassVar[Mapping[str, str]] = {"machine": "meter_j"}

    def __init__(self, function: Callable[[], float] | None = None) -> None:
        super().__init__()
        self._function = function

    def connect(self, coefficients: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Watch the function, in whatever state it is."""
        function = self._function
        if function is None:
            raise Unavailable("no function that reads one was given: gv.track(…, wall_meter=…)")
        self.watch("machine", lambda now: function(), MOST_W, "wall meter", patience_s=PATIENCE_S)
        why = "read by the user's own function"
        return [self.component("machine", why, source="wall meter")]
