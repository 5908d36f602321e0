"""A meter source from outside: all a third party has to write."""

import os
from collections.abc import Mapping
from typing import Any, ClassVar

from greenvis.meters.sources import MeterSource, Unavailable


class ConstantPlug(MeterSource):
    """A plug that the whole machine hangs on, and that says the same power at all times."""

    name: ClassVar[str] = "constant_plug"
    quantities: ClassVar[Mapping[str, str]] = {"machine": "constant_plug_j"}

    def connect(self, coefficients: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Count the watts that $CONSTANT_PLUG_W names."""
        watts = os.environ.get("CONSTANT_PLUG_W")
        if watts is None:
            raise Unavailable("$CONSTANT_PLUG_W names no watts")
        self.watch("machine", lambda now: float(watts) * now, most=3680.0)
        return [self.component("machine", "a plug's own counter")]
