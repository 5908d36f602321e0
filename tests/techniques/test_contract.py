"""Every technique greenvis registers, on every host: works, or refuses with a reason. Never
fails."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import pytest
import torch
from hosts import HOSTS
from torch import Tensor, nn

from greenvis.core.technique import Installed, Stage, Technique
from greenvis.techniques import registry
from greenvis.testing import Result, check_technique

# technique: on how many hosts at least one of its examples works
WORKS = {
    "adabn": 6,
    "adapter": 20,
    "adapter_probe": 9,
    "align": 20,
    "balance": 20,
    "bitfit": 20,
    "byol": 20,
    "co_teaching": 20,
    "consistency": 20,
    "consistency_model": 0,  # none of them draws, as for feature_cache, flow, progressive, sampler
    "dino": 20,
    "cross_modal": 0,  # no host of classes is a dual encoder
    "distill": 20,
    "dividemix": 20,
    "dsu": 20,
    "early_exit": 20,
    "ema": 20,
    "experts": 16,
    "feature_cache": 0,
    "feature_distill": 19,
    "fishr": 15,
    "flow": 0,
    "fusion": 20,
    "hat": 15,
    "image_tokens": 0,
    "kv_cache": 0,  # none of them answers in words
    "layer_decay": 19,
    "linear_attention": 9,
    "linear_probe": 20,
    "label_maps": 0,  # no host answers per pixel
    "lora": 20,
    "lora_stream": 20,
    "low_precision": 20,
    "lwf": 20,
    "mae": 8,
    "mixstyle": 20,
    "moco": 20,
    "ncm": 20,
    "noisy_labels": 20,
    "norm_tune": 20,
    "packnet": 20,
    "partial": 19,
    "partial_labels": 20,
    "pass_pretrain": 19,
    "pixel_attention": 19,
    "pnn": 19,
    "progressive": 0,
    "prompt": 8,
    "prompt_pool": 8,
    "prune": 18,
    "pseudo_label": 20,
    "regularize": 20,
    "reparam": 20,
    "replay": 20,
    "res2net": 3,
    "reuse": 8,
    "rfnext": 8,
    "rotation": 20,
    "sam": 20,
    "sampler": 0,
    "shot": 20,
    "side": 9,
    "simclr": 20,
    "swad": 20,
    "test_time": 20,
    "token_merge": 9,
    "token_prune": 7,
    "vicreg": 20,
    "zero_shot": 0,  # none of them reads texts
}
# each time: one technique on all hosts, and every technique on the first of two that takes it; slow:
# all examples on all
TWO = ("timm-deit-distilled", "torchvision-mobilenet")


def test_every_host_is_under_contract() -> None:
    norms = registry.find("norm_tune")
    results = check_technique(norms, HOSTS, norms.examples[:1])
    assert not [str(r) for r in results if r.outcome == "fails"]
    assert all(len(r.reason) > 20 for r in results if r.outcome == "refuses")
    assert len({r.host for r in results if r.outcome == "works"}) >= WORKS["norm_tune"]


@pytest.mark.parametrize("name", sorted(WORKS))
def test_contract_on_one_that_takes_it(name: str) -> None:
    technique = registry.find(name)
    works = False
    for host in TWO:
        (result,) = check_technique(technique, [HOSTS[host]], technique.examples[:1])
        assert result.outcome != "fails", str(result)
        if works := result.outcome == "works":
            break
    assert works or not WORKS[name]


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(WORKS))
def test_contract_on_all(name: str) -> None:
    results = check_technique(registry.find(name), HOSTS)
    assert not [str(r) for r in results if r.outcome == "fails"]
    assert len({r.host for r in results if r.outcome == "works"}) >= WORKS[name]


def test_every_own_technique_is_under_contract() -> None:
    assert set(registry.DOOR.own) <= set(WORKS)


class _Scale(Technique):
    """A technique that breaks whichever point it is told to."""

    name: ClassVar[str] = "scale"
    stage: ClassVar[Stage] = "weights"
    broken: str = ""

    def install(self, model: nn.Module) -> Installed:
        last = [m for m in model.modules() if isinstance(m, nn.Linear)][-1]
        last.register_parameter(
            "scale", nn.Parameter(torch.ones(()) * (2 if self.broken == "neutral" else 1))
        )
        if self.broken != "gradient":
            last.register_forward_hook(lambda m, i, o: o * m.scale)
        names = tuple(n for n, _ in model.named_parameters() if n.endswith("scale"))
        return _Scaled(self.broken, last, names)


class _Scaled(Installed):
    def __init__(self, broken: str, layer: nn.Linear, names: tuple[str, ...]) -> None:
        super().__init__(names, freezes=True)
        self.broken, self.layer, self.steps = broken, layer, 0
        self.scale = layer.scale

    def terms(self, x: Any, y: Any, logits: Tensor | None) -> Mapping[str, Tensor]:
        if self.broken == "finite":
            return {"scale": self.scale * float("nan")}
        return {"scale": self.scale * self.steps} if self.broken == "resume" else {}

    def step_end(self) -> None:
        self.steps += 1

    def merge(self) -> None:
        if self.broken != "merge":
            with torch.no_grad():
                self.layer.weight.mul_(self.scale)
                self.layer.bias.mul_(self.scale)


@pytest.mark.parametrize(
    ("broken", "says"),
    [
        ("", ""),
        ("neutral", "a fresh, neutral install changes the outputs"),
        ("gradient", "without a gradient"),
        ("finite", "the loss of step 0 is nan"),
        ("merge", "the merged model differs"),
        ("resume", "a resumed run differs"),
    ],
)
def test_the_contract_sees_what_is_broken(broken: str, says: str) -> None:
    results: list[Result] = check_technique(_Scale(broken=broken))
    assert len(results) == 3
    for result in results:
        assert result.outcome == ("fails" if says else "works"), str(result)
        assert says in result.reason
