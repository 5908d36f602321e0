"""results.json as text: the same results are the same bytes."""

from __future__ import annotations

import json

from greenvis.report.shape import Results


def to_json(results: Results) -> str:
    """Return results as the text of results.json: sorted, so the same results are the same
    bytes."""
    # for people to read; of thousands of arms it would take long
    indent = 1 if len(results.arms) <= 100 else None
    return (
        json.dumps(
            results.as_json(), indent=indent, sort_keys=True, ensure_ascii=False, allow_nan=False
        )
        + "\n"
    )
