"""Networks that mix tokens by state spaces are hosts as others: what attends is refused there, all
else works."""

from __future__ import annotations

from typing import Any

import pytest
from timm.models.efficientvim import EfficientViM
from torch import Tensor, nn
from transformers import Mamba2Config, Mamba2Model

from greenvis.techniques import registry
from greenvis.testing import Host, check_technique


class Mamba(nn.Module):
    """Patches through transformers' Mamba-2, which has no vision model of its own, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 16, 8, 8)
        sizes: dict[str, Any] = {"hidden_size": 16, "num_heads": 4, "head_dim": 8, "state_size": 4}
        more: dict[str, Any] = {"n_groups": 1, "num_hidden_layers": 2, "chunk_size": 8}
        self.body = Mamba2Model(Mamba2Config(**sizes, **more, vocab_size=4, use_cache=False))
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (batch, 5) of images (batch, 3, height, width)."""
        tokens = self.patches(x).flatten(2).transpose(1, 2)
        return self.head(self.body(inputs_embeds=tokens, use_cache=False).last_hidden_state.mean(1))


def _efficientvim() -> nn.Module:
    sizes: dict[str, Any] = {"embed_dim": (8, 16, 24), "depths": (1, 2, 1), "state_dim": (9, 6, 4)}
    return EfficientViM(num_classes=5, **sizes)


HOSTS = {
    "efficientvim": Host("efficientvim", _efficientvim, (3, 64, 64), 5),
    "mamba2": Host("mamba2", Mamba, (3, 32, 32), 5),
}
WORK = (
    ("lora", {"rank": 2, "targets": ["conv"]}, "efficientvim"),
    ("lora", {"rank": 2, "targets": ["linear"]}, "mamba2"),
    ("distill", registry.find("distill").examples[1], "efficientvim"),
    ("distill", registry.find("distill").examples[1], "mamba2"),
    ("early_exit", {}, "mamba2"),
    ("adapter", {"width": 4, "variant": "conv"}, "efficientvim"),
    ("reparam", {}, "efficientvim"),
    ("prune", {"parts": ["neurons"]}, "efficientvim"),
)
REFUSED = (
    ("linear_attention", {}, "efficientvim", "no attention"),
    ("token_merge", {}, "mamba2", "attention"),
    ("early_exit", {}, "efficientvim", "samples cannot leave"),
    pytest.param(  # more channels than others have
        *("prune", {"parts": ["channels"]}, "efficientvim", "depend on each other in more than"),
        marks=pytest.mark.slow,
    ),
)


@pytest.mark.one_in(8)
@pytest.mark.parametrize(("name", "example", "host"), WORK)
def test_they_are_hosts_as_others(name: str, example: dict[str, Any], host: str) -> None:
    (result,) = check_technique(registry.find(name), [HOSTS[host]], [example])
    assert result.outcome == "works", str(result)


@pytest.mark.parametrize(("name", "example", "host", "says"), REFUSED)
def test_what_does_not_fit_is_refused_with_the_reason(
    name: str, example: dict[str, Any], host: str, says: str
) -> None:
    (result,) = check_technique(registry.find(name), [HOSTS[host]], [example])
    assert result.outcome == "refuses", str(result)
    assert says in result.reason


@pytest.mark.slow
@pytest.mark.parametrize("name", registry.names())
def test_every_technique_works_or_says_why_not(name: str) -> None:
    results = check_technique(registry.find(name), HOSTS)
    assert not [str(r) for r in results if r.outcome == "fails"]
