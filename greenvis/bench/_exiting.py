"""A model with exits and images on which its fresh heads are unequally sure: what benchmarks of
early exit share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from greenvis import models
from greenvis.core.wrap import wrap
from greenvis.models.structure import example_input
from greenvis.techniques import registry

AT = (0.25, 0.5, 0.75)  # exits behind so much of the MACs


def build_with_exits(model: str, **options: Any) -> tuple[nn.Module, Any]:
    """Return the plain model and what `early_exit` installed on another one with the same weights,
    both in eval mode."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        plain = models.build(model, **options).eval()
        exiting = models.build(model, **options).eval()
        exiting.load_state_dict(plain.state_dict())
        live = wrap(exiting, registry.find("early_exit").model_validate({"at": AT}))
        installed: Any = live.installed[0]
        for head in installed.exits.heads:  # fresh heads are equally unsure of everything
            nn.init.normal_(head.linear.weight)
    exiting.eval()
    return plain, installed


def images(count: int, model: nn.Module) -> Tensor:
    """Return images (count, channels, height, width) of coarse patterns and rising contrast, which
    exits tell apart."""
    shape = tuple(example_input(model).shape[1:])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        contrast = torch.linspace(0.2, 2.0, count)[:, None, None, None]
        coarse = torch.randn(count, shape[0], 8, 8) * contrast
        return nn.functional.interpolate(coarse, size=shape[1:], mode="bilinear")


def thresholds(installed: Any, x: Tensor, leaving: Sequence[float]) -> dict[str, list[float]]:
    """Return thresholds by name, at which each share of those who come to an exit leaves there."""
    sure = installed.sureness([(part, torch.zeros(len(part))) for part in x.split(16)])
    limits_of: dict[str, list[float]] = {}
    for share in leaving:
        still, limits = torch.ones(len(x), dtype=torch.bool), []
        for row in sure[:-1]:
            here = row[still].sort(descending=True).values
            gone = round(share * len(here))
            limit = (
                2.0
                if not gone
                else float(here[gone - 1 : gone + 1].mean())
                if gone < len(here)
                else 0.0
            )
            limits.append(limit)
            still &= row < limit
        limits_of[f"{share:.0%} leave"] = limits
    return limits_of
