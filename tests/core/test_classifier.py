"""A classifier of several layers, of one's own making, trains whole, and nothing else takes its
layers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn

import greenvis as gv
from greenvis.models.structure import view


class Own(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1, self.bn, self.fc2 = nn.Linear(width, 12), nn.BatchNorm1d(12), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.bn(self.fc1(x)).relu())


HEADS: dict[str, Callable[[int], nn.Module]] = {
    "linear": lambda width: nn.Linear(width, 3),
    "two layers": lambda width: nn.Sequential(
        nn.Linear(width, 12), nn.ReLU(), nn.Dropout(), nn.Linear(12, 3)
    ),
    "nested": lambda width: nn.Sequential(
        nn.Sequential(nn.Linear(width, 12), nn.GELU()), nn.Linear(12, 3)
    ),
    "class": Own,
    "a norm without parameters": lambda width: nn.Sequential(
        nn.BatchNorm1d(width, affine=False), nn.Linear(width, 3)
    ),
}
TECHNIQUES = {
    "linear_probe": gv.LinearProbe(),
    "lora": gv.Lora(rank=2),
    "lora linear": gv.Lora(rank=2, targets="linear"),
    "lora mlp": gv.Lora(rank=2, targets="mlp"),
    "norm_tune": gv.NormTune(statistics="hold"),
    "partial": gv.Partial(),
    "bitfit": gv.Bitfit(),
    "adapter": gv.Adapter(width=4),
    "prompt": gv.Prompt(tokens=2),
    "prompt_pool": gv.PromptPool(pool=3, length=1, top_n=1),
    "side": gv.Side(),
    "packnet": gv.PackNet(),
    "hat": gv.Hat(),
    "lora_stream": gv.LoraStream(targets=("linear",)),
}


def vit() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(
        "vit_tiny_patch16_224",
        img_size=16,
        patch_size=4,
        embed_dim=32,
        depth=2,
        num_heads=2,
        num_classes=3,
    )


@pytest.mark.one_in(4)
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("name", TECHNIQUES)
def test_it_trains_whole(name: str, head: str) -> None:
    model = vit()
    model.head = HEADS[head](32)
    live = gv.wrap(model, [TECHNIQUES[name]])
    before = {n: t.clone() for n, t in model.head.state_dict().items() if "num_batches" not in n}
    optimizer = torch.optim.SGD(live.param_groups(0.5), lr=0.5)
    x, y = torch.rand(6, 3, 16, 16), torch.tensor([0, 1, 2, 0, 1, 2])
    model.train()
    output = model(x)
    (nn.functional.cross_entropy(output, y) + live.loss(x, y, output)).backward()
    optimizer.step()
    after = model.head.state_dict()
    still = [n for n, value in before.items() if n not in after or torch.equal(value, after[n])]
    assert not still, (
        "weights, and statistics of its norms, which see these features for the first time"
    )


@pytest.mark.parametrize("name", ["linear_probe", "norm_tune", "bitfit", "partial"])
def test_it_trains_whole_in_a_convolutional_network(name: str) -> None:
    model = torchvision.models.resnet18()
    model.fc = HEADS["two layers"](512)
    gv.wrap(model, [TECHNIQUES[name]])
    assert all(p.requires_grad for p in model.fc.parameters())
    assert not model.conv1.weight.requires_grad


@pytest.mark.parametrize(
    ("name", "classifier"),
    [
        ("vgg11", "classifier"),
        ("mobilenet_v3_small", "classifier"),
        ("vit_b_16", "heads.head"),
        ("swin_t", "head"),
    ],
)
def test_what_is_the_classifier_in_torchvision(name: str, classifier: str) -> None:
    with torch.device("meta"):
        model = torchvision.models.get_model(name)
    assert view(model, (3, 224, 224), probe=False).classifier == (classifier,)


def test_the_body_of_a_perceptron_is_no_classifier() -> None:
    flat = nn.Sequential(nn.Flatten(), nn.Linear(192, 32), nn.ReLU(), nn.Linear(32, 4))
    inside = nn.Sequential(flat, nn.Identity())
    parts = nn.Sequential(flat[:3], nn.Sequential(nn.Linear(32, 4)))
    assert view(flat, (3, 8, 8), probe=False).classifier == ("3",)
    assert view(inside, (3, 8, 8), probe=False).classifier == ("0.3",)
    assert view(parts, (3, 8, 8), probe=False).classifier == ("1.0",)


def test_layers_of_it_that_were_frozen_before_stay_frozen() -> None:
    model = torchvision.models.vgg11()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    model.classifier[6] = nn.Linear(4096, 3)
    live = gv.wrap(model, [gv.LinearProbe()])
    assert set(live.trainable) == {"classifier.6.weight", "classifier.6.bias"}
