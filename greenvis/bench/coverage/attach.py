"""Attach without weights: has a model of timm a place for a technique? On the meta device, so
memory does not matter."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import torch

from greenvis.core.technique import Technique
from greenvis.errors import GreenvisError
from greenvis.models.structure import View, known, view
from greenvis.techniques import registry

# each technique's requests, tried in this order until one attaches
REQUESTS: dict[str, tuple[dict[str, Any], ...]] = {
    "lora": ({}, {"targets": ("conv",)}, {"targets": ("linear",)}),
    "adapter": ({}, {"variant": "conv"}),
    "prompt": ({},),
}


def sample(per_family: int | None, seed: int = 0) -> list[tuple[str, str]]:
    """Return (family, model name) of timm's architectures: so many drawn from each family, or all
    for None."""
    import timm
    from timm.models import list_modules

    out = []
    for family in list_modules():
        names = sorted(timm.list_models(module=family))
        drawn = (
            names
            if per_family is None
            else random.Random(f"{seed} {family}").sample(names, min(per_family, len(names)))
        )
        out += [(family, name) for name in sorted(drawn)]
    return out


def attach(models: Sequence[tuple[str, str]]) -> list[dict[str, Any]]:
    """Try every technique of REQUESTS on each classification model; models without a classifier are
    left out.

    A row: family, model, kind ("attention" or "convolution or MLP"), and by technique "attaches",
    or why not.
    """
    rows = []
    for family, name in models:
        row = _row(name)
        if row:
            rows.append({"family": family, "model": name, **row})
    return rows


def counts(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return, by kind of model and for all: how many were tried, to how many each technique
    attaches, and at least one."""
    out = []
    for kind in [*sorted({r["kind"] for r in rows}), "all"]:
        chosen = [r for r in rows if kind in (r["kind"], "all")]
        ok = {t: sum(r[t] == "attaches" for r in chosen) for t in REQUESTS}
        least = sum(any(r[t] == "attaches" for t in REQUESTS) for r in chosen)
        fails = sum(any(r[t].startswith("fails") for t in REQUESTS) for r in chosen)
        out.append(
            {"kind": kind, "models": len(chosen), **ok, "at least one": least, "fails": fails}
        )
    return out


def _row(name: str) -> dict[str, str] | None:
    model = _build(name)
    if getattr(model, "num_classes", 0) < 1:
        return None
    structure = view(model, probe=False)
    tried = {
        t: [registry.find(t)(**request) for request in requests] for t, requests in REQUESTS.items()
    }
    kind = "attention" if structure.attention else "convolution or MLP"
    return {"kind": kind, **{t: _first(name, structure, requests) for t, requests in tried.items()}}


def _first(name: str, structure: View, requests: Sequence[Technique]) -> str:
    reasons = []
    for request in requests:
        model = _build(name)
        try:
            with known(model, structure):  # looking at it again would take half of the time
                request.install(model)
        except GreenvisError as error:
            reasons.append(str(error))
        except Exception as error:  # anything else a technique raises is a failure
            return f"fails: {type(error).__name__}: {error}"
        else:
            return "attaches"
    return reasons[-1]


def _build(name: str) -> Any:
    import timm

    with torch.device("meta"):
        return timm.create_model(name)
