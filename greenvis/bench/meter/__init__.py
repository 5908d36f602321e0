"""`greenvis bench meter`: our meter beside codecarbon's, on the same work, in real processes.
Minutes on two cores."""

from __future__ import annotations

import time
from importlib.metadata import version
from typing import Any

from greenvis.bench import _output
from greenvis.bench._options import Out
from greenvis.bench.meter import scenes
from greenvis.meters import pricing
from greenvis.meters.header import cpu

SCENES = (
    scenes.start, scenes.idle, scenes.phase, scenes.neighbours, scenes.accounted, scenes.killed,
    scenes.endings,
    scenes.writers, scenes.child,
)  # fmt: skip


def run(out: Out = None) -> dict[str, Any]:
    """Return {"rows": [{"quantity", "codecarbon", "ours", "target", "met"}], "machine", "seconds"}.

    out: a folder to write report.md and results.json to.
    """
    started = time.monotonic()
    rows = [row() for row in SCENES]
    # imports torch: after the scenes of small processes
    from greenvis.bench.meter.reference import flops_cost, flops_error

    rows += [flops_error(), flops_cost()]
    result = {"rows": rows, "machine": _machine(), "seconds": round(time.monotonic() - started)}
    if out is not None:
        _output.write(out, result, _markdown(result))
    return result


def _machine() -> dict[str, Any]:
    return {
        "cpu": cpu(),
        **{name: version(name) for name in ("greenvis", "codecarbon", "torch", "fvcore")},
        "pricing": pricing.MODEL,
    }


def _markdown(result: dict[str, Any]) -> str:
    m = result["machine"]
    lines = [
        "# Meter: greenvis beside codecarbon", "",
        f"`greenvis bench meter --out reports/bench-meter`, {result['seconds']} s on "
        f"{m['cpu']['allowed']} logical CPUs ({'virtual' if m['cpu']['virtual'] else 'bare'} "
        f"machine), codecarbon {m['codecarbon']}, torch {m['torch']}, fvcore {m['fvcore']}. Other "
        "guests share the machine: read ratios.", "",
        "| quantity | codecarbon | greenvis | target | met |", "|---|---|---|---|---|",
    ]  # fmt: skip
    lines += [
        f"| {r['quantity']} | {r['codecarbon']} | {r['ours']} | {r['target']} | "
        f"{'yes' if r['met'] else 'NO'} |"
        for r in result["rows"]
    ]
    models = [f"- {m}" for r in result["rows"] for m in r.get("models", [])]
    return (
        "\n".join([*lines, "", "Forward of one 224 × 224 image, both counters:", "", *models])
        + "\n"
    )
