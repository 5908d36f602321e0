"""Short measurements of what a finished model costs to serve, which most tests do not look at.

Readings are repeated until they are steady, which beside busy neighbours takes seconds for each
trained model. tests/meters/test_measure.py tests how long is measured.
"""

from __future__ import annotations

from greenvis.meters import measure


def measurements() -> None:
    """Make this process measure for a tenth of a second where it would for up to a minute."""
    measure.LOOK_S = 0.03
    measure.ROUND_S = 0.03  # a process' clock steps at every hundredth of a second
    measure.MOST_S = 0.1
    measure.PASSES_S = 1.0
