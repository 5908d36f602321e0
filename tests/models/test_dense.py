"""Dense models are hosts too: what changes weights works on segmenters and detectors, what needs
one sequence refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from greenvis.core.technique import Technique, logits_of
from greenvis.core.wrap import wrap
from greenvis.errors import BadInput
from greenvis.meters import flops
from greenvis.techniques.iteration.peft.adapter import Adapter
from greenvis.techniques.iteration.peft.bitfit import Bitfit
from greenvis.techniques.iteration.peft.linear_probe import LinearProbe
from greenvis.techniques.iteration.peft.lora import Lora
from greenvis.techniques.iteration.peft.norm_tune import NormTune
from greenvis.techniques.iteration.peft.partial import Partial
from greenvis.techniques.iteration.peft.prompt import Prompt
from greenvis.techniques.iteration.peft.side import Side

SHAPE = (3, 64, 64)


def _segformer() -> nn.Module:
    from transformers import SegformerConfig, SegformerForSemanticSegmentation

    sizes: dict[str, Any] = {
        "hidden_sizes": [16, 32], "patch_sizes": [3, 3], "strides": [4, 2], "sr_ratios": [2, 1],
        "decoder_hidden_size": 16
    }  # fmt: skip
    config = SegformerConfig(
        num_encoder_blocks=2,
        depths=[1, 1],
        num_attention_heads=[1, 2],
        mlp_ratios=[2, 2],
        num_labels=5,
        **sizes,
    )
    return SegformerForSemanticSegmentation(config)


def _deeplab() -> nn.Module:
    from torchvision.models.segmentation import deeplabv3_mobilenet_v3_large

    return deeplabv3_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=5)


def _ssd() -> nn.Module:
    from torchvision.models.detection import ssdlite320_mobilenet_v3_large

    return ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=5)


def _faster_rcnn() -> nn.Module:
    from torchvision.models.detection import fasterrcnn_mobilenet_v3_large_320_fpn

    return fasterrcnn_mobilenet_v3_large_320_fpn(
        weights=None, weights_backbone=None, num_classes=5, min_size=64, max_size=64
    )


def _segmenting(model: nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    out = logits_of(model(torch.rand(2, *SHAPE, generator=generator)))
    return F.cross_entropy(out, torch.randint(0, 5, (2, *out.shape[2:]), generator=generator))


def _detecting(model: nn.Module) -> Tensor:
    box = {"boxes": torch.tensor([[8.0, 8.0, 40.0, 48.0]]), "labels": torch.tensor([1])}
    images = list(torch.rand(2, *SHAPE, generator=torch.Generator().manual_seed(0)))
    return torch.stack(list(model(images, [box, box]).values())).sum()


def _faults(build: Any, request: Technique, loss: Any) -> list[str]:
    """Learn one step and undo it; return what is wrong: learns what is not declared, not finite,
    not given back bit for bit."""
    torch.manual_seed(0)
    model = build()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    torch.manual_seed(1)
    live = wrap(model, request)
    model.train()
    optimizer = torch.optim.SGD(live.param_groups(1e-3))
    (loss(model) + live.loss(None, None, None)).backward()
    learned = {n for n, p in model.named_parameters() if p.grad is not None}
    out = [
        f"a gradient, or none, against the declaration: {n}"
        for n in sorted(learned ^ set(live.trainable))
    ]
    optimizer.step()
    if not loss(model).isfinite():
        out.append("the loss after a step is not finite")
    live.undo()
    now = model.state_dict()
    out += [f"other keys after undo: {n}" for n in sorted(now.keys() ^ before.keys())]
    return out + [
        f"other values after undo: {n}"
        for n in now.keys() & before.keys()
        if not torch.equal(now[n], before[n])
    ]


@pytest.mark.parametrize(
    "request_",
    [Lora(rank=2), Lora(rank=2, targets=("conv",)), Adapter(width=4), Adapter(width=4,
    variant="conv"), Bitfit(), NormTune(),
     LinearProbe(), Partial()],
    ids=lambda r: f"{r.name} {r.recipe_form()}",
)  # fmt: skip
def test_a_segmenter_learns(request_: Technique) -> None:
    assert not _faults(_segformer, request_.model_copy(update={"input_shape": SHAPE}), _segmenting)


@pytest.mark.parametrize("kind", [Prompt, Side])
def test_what_needs_one_sequence_refuses(kind: Any) -> None:
    model = _segformer()
    with pytest.raises(BadInput, match=r"do not all take and give one sequence"):
        wrap(model, kind(input_shape=SHAPE))
    assert all(p.requires_grad for p in model.parameters())


def test_a_merged_segmenter_is_plain() -> None:
    model = _segformer()
    keys = list(model.state_dict())
    live = wrap(model, Lora(rank=2, input_shape=SHAPE))
    with torch.no_grad():
        for parameter in live.trainable.values():
            parameter.add_(0.1 * torch.rand_like(parameter))
    model.eval()
    want = _segmenting(model)
    live.merge().eval()
    assert list(model.state_dict()) == keys
    assert torch.allclose(_segmenting(model), want, atol=1e-5)


def test_meters_count_a_segmenter() -> None:
    model = _segformer().eval()
    plain = flops.count(model, torch.rand(1, *SHAPE)).as_dict()
    assert plain["counters"]["torch"] == plain["counters"]["fvcore"] == plain["macs"]
    wrap(model, Adapter(width=4, input_shape=SHAPE))
    assert flops.count(model, torch.rand(1, *SHAPE)).as_dict()["macs"] > plain["macs"]


@pytest.mark.slow
@pytest.mark.parametrize("request_", [Lora(rank=2, targets=("conv",)), Adapter(width=4,
variant="conv"), Bitfit(), NormTune()],
                         ids=lambda r: r.name)  # fmt: skip
@pytest.mark.parametrize(
    ("build", "loss"), [(_deeplab, _segmenting), (_ssd, _detecting), (_faster_rcnn, _detecting)]
)
def test_torchvision_segmenters_and_detectors_learn(
    build: Any, loss: Any, request_: Technique
) -> None:
    assert not _faults(build, request_.model_copy(update={"input_shape": SHAPE}), loss)


@pytest.mark.slow
@pytest.mark.parametrize("build", [_deeplab, _ssd, _faster_rcnn])
def test_meters_count_them(build: Any) -> None:
    count = flops.count(build().eval(), torch.rand(1, *SHAPE)).as_dict()
    assert count["macs"] > 1e7
    assert all(n == count["macs"] for n in count["counters"].values())
