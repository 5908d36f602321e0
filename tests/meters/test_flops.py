"""FLOPs: ten models against published figures, two counters, training, techniques' cases, and steps
left untouched."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
import torchvision
from peft import LoraConfig, get_peft_model
from torch import nn

import greenvis as gv
from greenvis.bench.meter.reference import REFERENCE
from greenvis.errors import BadInput
from greenvis.meters.flop_mode import FlopMode
from greenvis.meters.flops import count, distribution
from greenvis.meters.record import read

PUBLISHED_GMACS = {  # METERS.md, section 5, to three digits
    "ResNet-50": 4.089, "ViT-B/16 (timm)": 17.564, "ViT-B/16 (torchvision)": 17.564, "ViT-B/16 "
                                                                                     "(transformers)": 17.564,
    "Swin-T": 4.491,
    "DeiT-Ti": 1.254, "ConvNeXt-T": 4.456, "MobileNetV3-L": 0.217, "EfficientNet-B0": 0.386,
}  # fmt: skip


@pytest.mark.one_in(4)
@pytest.mark.parametrize("name", REFERENCE)
def test_a_known_model_has_its_published_macs(name: str) -> None:
    build, macs = REFERENCE[name]
    with torch.device("meta"):
        model = build()
    found = count(model, (3, 224, 224))
    assert found.macs == pytest.approx(macs, rel=1e-3)
    assert found.counters["fvcore"] == pytest.approx(found.macs, rel=1e-3)
    assert found.flops == 2 * found.macs
    assert found.unhandled == {}
    assert found.by_module[""] == found.macs
    if name in PUBLISHED_GMACS:
        assert found.macs / 1e9 == pytest.approx(PUBLISHED_GMACS[name], abs=6e-4)


def tiny(**options) -> nn.Module:
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=32, depth=2, num_classes=10, **options
    )


def test_training_counts_what_the_backward_really_does() -> None:
    model = tiny()
    full = count(model, (3, 32, 32), train=True, cross_check=False)
    images_need_no_gradient = 2 * full.by_module["patch_embed"]
    assert full.train_flops == 3 * full.flops - images_need_no_gradient
    probe = tiny()
    probe.requires_grad_(False)
    probe.get_classifier().requires_grad_(True)
    assert count(
        probe, (3, 32, 32), train=True, cross_check=False
    ).train_flops / full.flops == pytest.approx(1.0, abs=0.01)
    lora = get_peft_model(tiny(), LoraConfig(r=4, target_modules=["qkv"]))
    cost = count(lora, (3, 32, 32), train=True, cross_check=False)
    assert cost.macs > full.macs  # the added matrices
    assert 1.7 < cost.train_flops / full.flops < 2.4  # not 99 % less


def test_grouped_convolutions_cost_their_groups_in_the_backward() -> None:
    found = count(nn.Conv2d(8, 8, 3, groups=8), (8, 10, 10), train=True, cross_check=False)
    assert found.macs == 8 * 8 * 8 * 9
    assert (
        found.train_flops == 2 * found.flops
    )  # forward and the weight's gradient; the input needs none


def test_fused_kernels_count_as_the_plain_products_do() -> None:
    model = torchvision.models.VisionTransformer(32, 16, 2, 2, 32, 64).eval()
    x = torch.randn(2, 3, 32, 32)
    macs = count(model, x).macs
    for context in (torch.no_grad(), torch.inference_mode(), torch.enable_grad()):
        with (
            context,
            FlopMode() as mode,
        ):  # native attention, whole composite operators, flash attention
            model(x)
        assert mode.total == 2 * 2 * macs


def test_dynamic_int8_is_no_six_fold_saving() -> None:
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10)).eval()
    macs = count(model, torch.randn(3, 64)).macs
    quantized = torch.ao.quantization.quantize_dynamic(model, {nn.Linear})
    found = count(quantized, torch.randn(3, 64))
    assert macs == found.macs == 64 * 32 + 320


def test_what_has_no_formula_is_listed() -> None:
    class Fourier(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.cdist(torch.fft.rfft2(x).abs(), x[..., :3])

    found = count(Fourier(), torch.randn(2, 1, 4, 4))
    assert any("fft" in op for op in found.unhandled)
    assert any("cdist" in op for op in found.unhandled)


class Early(nn.Module):
    """Leaves after the first layer where the mean is negative."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.norm = nn.Linear(8, 8), nn.Linear(8, 4), nn.BatchNorm1d(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.first(x.flatten(1)))
        return x if float(x.mean()) < 0 else self.second(x)


def test_a_dynamic_model_is_counted_on_real_images_and_left_as_it_was() -> None:
    model = Early().train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    images = [torch.randn(1, 2, 4) for _ in range(24)]
    with torch.no_grad():
        model.eval()
        taken = [
            64 if float(model.norm(model.first(i.flatten(1))).mean()) < 0 else 96 for i in images
        ]
        model.train()
    found = distribution(model, images)
    assert found["mean"] == sum(taken) / len(taken)
    assert (found["min"], found["max"], found["images"]) == (64, 96, 24)
    whole = count(model, torch.randn(2, 1, 2, 4), train=True)
    assert "not on the meta device" in whole.notes[0]
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert model.training
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(
    "example", [(3, 0, 32), "x", [], torch.zeros(0, 3, 32, 32), torch.randn(1, 7, 32, 32)]
)
def test_an_example_that_does_not_fit_is_refused(example: object) -> None:
    with pytest.raises(BadInput):
        count(tiny(), example)


def run_steps(
    folder: Path | None, n: int = 6
) -> tuple[dict[str, torch.Tensor], gv.meters.track.Tracker | None]:
    torch.manual_seed(1)
    model = tiny(drop_rate=0.1, attn_drop_rate=0.1).train()
    data = [(torch.randn(4, 3, 32, 32), torch.randint(10, (4,))) for _ in range(n)] + [
        (torch.randn(2, 3, 32, 32), torch.zeros(2).long())
    ]
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    run = gv.track("s", model, dir=folder).start() if folder else None
    for x, y in run.steps(data, progress=False) if run else data:
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    if run:
        run.stop()
    return model.state_dict(), run


def test_counting_steps_changes_no_bit_and_misses_no_step(tmp_path: Path) -> None:
    plain, _ = run_steps(None)
    metered, run = run_steps(tmp_path)
    assert all(torch.equal(plain[k], metered[k]) for k in plain)
    assert run is not None
    totals = read(run.path).totals["train"]
    assert (totals["steps"], totals["samples"]) == (7, 26)
    per_image = count(tiny(), (3, 32, 32), train=True, cross_check=False).train_flops
    assert totals["flops"] / 26 == pytest.approx(
        per_image, rel=0.02
    )  # the fused backward computes the scores again


def test_a_teachers_part_of_the_step_is_its_phases_and_is_looked_at_again(tmp_path: Path) -> None:
    student, teacher, cache = nn.Linear(8, 4), nn.Linear(8, 40), {}
    data = [torch.randn(2, 8)] * 3
    with gv.track("kd", student, dir=tmp_path) as run:
        for epoch in range(2):
            for i, x in enumerate(run.steps(data, phase=f"train/epoch{epoch}", progress=False)):
                with run.phase("teacher"), torch.no_grad():
                    if i not in cache:
                        cache[i] = teacher(x)
                student(x)
    totals = read(run.path).totals
    step = 2 * 2 * 8 * 4
    assert totals["train/epoch0"]["flops"] == totals["train/epoch1"]["flops"] == 3 * step
    assert totals["train/epoch0/teacher"]["flops"] == 3 * 10 * step
    assert totals["train/epoch1/teacher"].get("flops", 0) == 0


def test_a_compiled_model_runs_compiled_and_says_it_was_not_counted(tmp_path: Path) -> None:
    model = torch.compile(nn.Linear(4, 2), backend="eager")
    with gv.track("c", model, dir=tmp_path) as run:
        for x in run.steps([torch.zeros(2, 4)] * 3, progress=False):
            model(x)
    found = read(run.path)
    assert found.sum("flops") is None
    assert len(found.notes) == 1
    assert "compiled" in found.notes[0]


def test_leaving_the_loop_ends_the_counting(tmp_path: Path) -> None:
    with gv.track("s", dir=tmp_path) as run:
        for _ in run.steps([torch.zeros(2, 3)], progress=False):
            break
        torch.ones(4, 4) @ torch.ones(4, 4)
    assert torch.utils._python_dispatch._get_current_dispatch_mode() is None
    assert read(run.path).sum("flops") in (None, 0)
