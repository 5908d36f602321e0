"""`greenvis bench active`: BADGE's choice of images beside that of scikit-activeml. Some minutes on
one core, and some GB of memory for scikit-activeml.

scikit-activeml is no part of greenvis: `pip install 'greenvis[bench]'`.
"""

from __future__ import annotations

import importlib
import os
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Annotated, Any

import numpy as np
import torch
import torch.nn.functional as F
import typer

from greenvis.bench import _output
from greenvis.bench._options import Out, Rounds, Threads
from greenvis.data.queries import Candidates, gradient_distances, select
from greenvis.errors import BadInput
from greenvis.experiment.optim import threads as cpu_threads
from greenvis.meters import memory
from greenvis.meters.header import cpu

PEER, OURS = "scikit-activeml", "greenvis"
SPEED_TARGET, MEMORY_TARGET_MB = 20.0, 1000.0
CHECKED = 300  # candidates whose distances are held against those of explicit gradients
Size = Annotated[int, typer.Option(min=2)]


def run(
    candidates: Size = 10_000,
    features: Size = 512,
    classes: Size = 100,
    budget: Size = 20,
    rounds: Rounds = 3,
    threads: Threads = 1,
    out: Out = None,
) -> dict[str, Any]:
    """Return {"rows": [{"tool", "cpu_s", "peak_mb", "grown_mb", "faster", "met"}], …}.

    Args:
        candidates: Images to choose among.
        features: Width of what the classifier is handed.
        classes: Of the classifier.
        budget: Images to choose.
        rounds: Of greenvis; figures are medians. The other runs once.
        threads: Of torch.
        out: A folder to write report.md and results.json to.

    Raises:
        BadInput: Without the peer.
    """
    try:
        peer = importlib.import_module("skactiveml.pool")
    except ImportError as error:
        raise BadInput(
            f"{PEER} stands beside greenvis in this benchmark and is not installed: pip install "
            "'greenvis[bench]'"
        ) from error
    g = torch.Generator().manual_seed(0)
    h = torch.randn(candidates, features, generator=g).relu()
    p = (3 * torch.randn(candidates, classes, generator=g)).softmax(1)
    pool = Candidates(torch.zeros(candidates, dtype=torch.bool), p, h)
    with cpu_threads(threads):
        ours = [_measured(lambda: select("badge", pool, budget, 0)) for _ in range(rounds)]
        theirs = _measured(lambda: _peer(peer, p.numpy(), h.numpy(), budget))
    own = {key: statistics.median(one[key] for one in ours) for key in ours[0]}
    faster = theirs["cpu_s"] / own["cpu_s"]
    met = faster >= SPEED_TARGET and own["peak_mb"] < MEMORY_TARGET_MB
    rows = [
        {"tool": OURS, **own, "faster": round(faster, 1), "met": met},
        {"tool": PEER, **theirs, "faster": 1.0, "met": None},
    ]
    size = {"candidates": candidates, "features": features, "classes": classes, "budget": budget}
    result = {"rows": rows, **size, "difference": _difference(p, h), "cpu": cpu()}
    if out is not None:
        _output.write(out, result, _page(result))
    return result


def _measured(choose: Callable[[], Any]) -> dict[str, float]:
    """Return CPU seconds, and the process's resident memory at its peak, whole and above the
    start."""
    memory.reset_peak()
    before, started = memory.peak_mb(), time.process_time()
    choose()
    spent, peak = time.process_time() - started, memory.peak_mb()
    return {
        "cpu_s": round(spent, 4), "peak_mb": round(peak, 1), "grown_mb": round(peak - before, 1),
    }  # fmt: skip


def _peer(pool: Any, p: np.ndarray, h: np.ndarray, budget: int) -> Any:
    """Let the peer choose, by answers and features that are handed to it."""
    base = importlib.import_module("skactiveml.base")

    class Known(base.SkactivemlClassifier):
        """A classifier whose answers are known."""

        def __init__(self, classes: Any = None, missing_label: Any = np.nan) -> None:
            super().__init__(classes=classes, missing_label=missing_label)

        def fit(self, X: Any, y: Any, sample_weight: Any = None) -> Any:  # noqa: N803
            return self

        def predict_proba(self, X: Any) -> Any:  # noqa: N803
            return p, h

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        query = pool.Badge(random_state=0)
        known = Known(classes=np.arange(p.shape[1]))
        return query.query(
            X=h, y=np.full(len(h), np.nan), clf=known, fit_clf=False, batch_size=budget
        )


def _difference(p: torch.Tensor, h: torch.Tensor) -> float:
    """Return how far distances are from those of explicit gradients, at most, as a share."""
    p, h = p[:CHECKED].double(), h[:CHECKED].double()
    q = p - F.one_hot(p.argmax(1), p.shape[1])
    explicit = (q[:, :, None] * h[:, None, :]).flatten(1)
    apart = (explicit - explicit[0]).square().sum(1)
    return float(((gradient_distances(q, h, 0) - apart).abs() / apart.max()).max())


def _page(result: dict[str, Any]) -> str:
    ours, theirs = result["rows"]
    head = ("tool", "cpu_s", "peak_mb", "grown_mb", "faster")
    command = "greenvis bench active " + " ".join(
        f"--{key} {result[key]}" for key in ("candidates", "features", "classes", "budget")
    )
    verdict = (
        f"{OURS} takes {ours['faster']:,.0f} times less CPU time than {PEER}, at a peak of "
        f"{ours['peak_mb']:,.0f} MB resident, imports included; the targets "
        f"({SPEED_TARGET:g} times, {MEMORY_TARGET_MB:,.0f} MB) are "
        f"{'met' if ours['met'] else 'not met'}."
    )
    return "\n".join([
        "# BADGE beside scikit-activeml",
        "",
        verdict,
        "",
        f"`{command}`, {os.cpu_count()} logical CPUs ({result['cpu']['name']}). Both choose "
        f"{result['budget']} of {result['candidates']:,} images by k-means++ on the gradients of "
        f"the last layer ({result['classes']} classes × {result['features']} features), of the "
        "same answers and features in float32. scikit-activeml makes the gradients; greenvis takes "
        "distances from their two factors. Of scikit-activeml's time, its checks of the inputs are "
        "a part. The two draw differently, so they choose different images; distances are held "
        f"against those of explicit gradients: off by at most {result['difference']:.1e}, as a "
        "share of the greatest. peak: the process's resident memory; grown: that above the start.",
        "",
        "| " + " | ".join(head) + " |",
        "|" + "---|" * len(head),
        *("| " + " | ".join(str(row[key]) for key in head) + " |" for row in (ours, theirs)),
        "",
    ])  # fmt: skip
