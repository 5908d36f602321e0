"""A frozen prefix that runs once: the same weights as without the cache, less work, on every host
or with a reason."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hosts import HOSTS
from safetensors.torch import load_file
from torch import Tensor, nn

import greenvis as gv
from greenvis.core.technique import Samples, Technique, logits_of
from greenvis.core.wrap import Wrapped, wrap
from greenvis.errors import BadInput
from greenvis.meters import record
from greenvis.techniques.iteration.peft.linear_probe import LinearProbe
from greenvis.techniques.iteration.peft.partial import Partial

RECIPE = """\
name: tiny
data: {name: digits, train: 120, test: 50}
model: {ref: timm/vit_tiny_patch16_224, img_size: 8, patch_size: 2, embed_dim: 16, depth: 3, num_heads: 2}
train: {epochs: 3, batch_size: 20, lr: 1.0e-2, threads: 1}
arms:
  live: {techniques: [linear_probe]}
  kept: {techniques: [{linear_probe: {cache: true}}]}
  live-last: {techniques: [{partial: {blocks: 1}}]}
  kept-last: {techniques: [{partial: {blocks: 1, cache: true}}]}
meter: {codecarbon: false}
"""
FEW = ("timm-vit", "timm-deit-distilled", "timm-swin", "torchvision-resnet", "transformers-clip")
SKIPS_PAST = {("timm-mobilevit", "partial"), ("plain", "partial")}


def _batches(shape: tuple[int, int, int], epochs: int = 3) -> list[tuple[Tensor, Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    x, y = torch.rand(8, *shape, generator=generator), torch.arange(8) % 5
    order = torch.cat([torch.randperm(8, generator=generator) for _ in range(epochs)])
    return [(x[at], y[at], at) for at in order.split(4)]


def _train(
    model: nn.Module, technique: Technique, folder: Path | None, shape: tuple[int, int, int]
) -> Wrapped:
    live = wrap(model, technique)
    optimizer = torch.optim.SGD(live.param_groups(0.1))
    model.train()
    for step, (x, y, at) in enumerate(_batches(shape)):
        live.set_samples(
            None if folder is None else Samples(folder, {"images": "of the test"}, 8, 1, at)
        )
        torch.manual_seed(step)  # the trained part may drop paths
        F.cross_entropy(logits_of(model(x)), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    live.set_samples(None)
    return live


@pytest.mark.one_in(3)
@pytest.mark.parametrize("kind", [LinearProbe, Partial])
@pytest.mark.parametrize(
    "name", [n if n in FEW else pytest.param(n, marks=pytest.mark.slow) for n in HOSTS]
)
def test_the_same_weights_on_every_host(name: str, kind: type[Technique], tmp_path: Path) -> None:
    host = HOSTS[name]
    options: dict[str, Any] = {"cache": True, "input_shape": host.input_shape}
    if (name, kind.name) in SKIPS_PAST:
        with pytest.raises(BadInput, match=r"by another way than into|no 'block'"):
            wrap(host.build(), kind(**options))
        return
    live = _train(host.build(), kind(**options), None, host.input_shape)
    kept = _train(host.build(), kind(**options), tmp_path, host.input_shape)
    facts = kept.facts()["prefix_cache"]
    assert (facts["misses"], facts["hits"]) == (8, 16)
    assert facts["bytes"] == sum(f.stat().st_size for f in tmp_path.glob("*/*.bin"))
    for (n, a), b in zip(live.trainable.items(), kept.trainable.values(), strict=True):
        assert torch.allclose(a, b, atol=1e-5), n
    assert any(
        not torch.equal(a, dict(host.build().named_parameters())[n])
        for n, a in kept.trainable.items()
    )
    x = _batches(host.input_shape)[0][0]
    kept.model.eval()
    live.model.eval()
    assert torch.allclose(logits_of(kept.model(x)), logits_of(live.model(x)), atol=1e-5)


def test_the_frozen_part_runs_in_eval_and_gets_its_mode_back() -> None:
    model = HOSTS["timm-vit"].build()
    modes: dict[str, bool] = {}
    for path in ("blocks.0", "blocks.2", "pos_drop", "head"):
        model.get_submodule(path).register_forward_pre_hook(
            lambda m, a, p=path: modes.update({p: m.training})
        )
    with pytest.raises(BadInput, match=r"a hook .* reads or changes 'pos_drop', 'blocks.0'"):
        wrap(model, Partial(cache=True))
    modes.clear()
    model = HOSTS["timm-vit"].build()
    wrap(model, Partial(cache=True))
    for path in ("blocks.2", "head"):
        model.get_submodule(path).register_forward_pre_hook(
            lambda m, a, p=path: modes.update({p: m.training})
        )
    model.train()
    model(torch.rand(2, 3, 32, 32))
    assert modes == {"blocks.2": True, "head": True}
    assert all(m.training for m in model.modules())


def test_a_model_with_dropout_gives_one_answer_for_the_frozen_part(tmp_path: Path) -> None:
    from timm.models.vision_transformer import VisionTransformer

    model = VisionTransformer(
        img_size=32,
        patch_size=8,
        embed_dim=32,
        depth=2,
        num_heads=2,
        num_classes=5,
        drop_rate=0.5,
        proj_drop_rate=0.5,
    ).train()
    live = wrap(model, LinearProbe(cache=True))
    x, _, at = _batches((3, 32, 32))[0]
    first = model(x)
    live.set_samples(Samples(tmp_path, {"images": "abc"}, 8, 1, at))
    assert torch.equal(model(x), first)
    assert torch.equal(model(x), first)


def test_other_images_than_those_shown_are_computed(tmp_path: Path) -> None:
    model = HOSTS["timm-vit"].build()
    live = wrap(model, LinearProbe(cache=True))
    x, _, at = _batches((3, 32, 32))[0]
    shown = Samples(tmp_path, {"images": "abc"}, 8, 1, at)
    live.set_samples(shown)
    model(x)
    assert not torch.equal(model(x.flip(-1)), model(x))
    live.set_samples(None)
    right = model(x.flip(-1))
    live.set_samples(shown)
    assert torch.equal(model(x.flip(-1)), right)


def test_a_copy_is_on_its_own(tmp_path: Path) -> None:
    model = HOSTS["timm-vit"].build()
    live = _train(model, LinearProbe(cache=True), tmp_path, (3, 32, 32))
    x = _batches((3, 32, 32))[0][0]
    other = copy.deepcopy(model)
    nn.init.zeros_(other.head.weight)
    nn.init.zeros_(other.head.bias)
    assert other(x).abs().max() == 0
    assert model(x).abs().max() > 0
    live.undo()
    assert not model._forward_hooks
    assert not model._forward_pre_hooks


def test_nothing_frozen_is_refused() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 5))
    with pytest.raises(BadInput, match="no part of Sequential is frozen below what trains"):
        wrap(model, LinearProbe(cache=True, input_shape=(3, 2, 2)))
    assert all(p.requires_grad for p in model.parameters())


def test_endless_augmentation_is_refused_before_the_first_step(tmp_path: Path) -> None:
    live = wrap(HOSTS["timm-vit"].build(), LinearProbe(cache=True))
    x, _, at = _batches((3, 32, 32))[0]
    live.set_samples(Samples(tmp_path, {"images": "abc"}, 8, None, at))
    with pytest.raises(BadInput, match=r"set data\.views"):
        live.model(x)
    assert all(m.training for m in live.model.modules())


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prefix")
    (folder / "tiny.yaml").write_text(RECIPE)
    gv.run(folder / "tiny.yaml", runs=folder / "runs")
    return folder


def _weights(folder: Path, arm: str) -> dict[str, Tensor]:
    return load_file(folder / "runs" / "tiny" / arm / "seed0" / "model.safetensors")


def _run(folder: Path, arm: str) -> record.Run:
    return record.read(
        max(record.find([folder / "runs" / "tiny" / arm]), key=lambda p: p.stat().st_mtime_ns)
    )


@pytest.mark.parametrize("end", ["", "-last"])
def test_a_recipe_gives_the_same_weights_for_less(finished: Path, end: str) -> None:
    live, kept = _weights(finished, "live" + end), _weights(finished, "kept" + end)
    assert all(torch.allclose(live[n], kept[n], atol=1e-5) for n in live)
    runs = {arm: _run(finished, arm + end) for arm in ("live", "kept")}
    flops = {
        arm: [run.sum("flops", f"train/epoch{e}") or 0 for e in (1, 2, 3)]
        for arm, run in runs.items()
    }
    assert flops["live"][0] == flops["live"][1] == flops["kept"][0]
    assert flops["kept"][1] == flops["kept"][2] < flops["kept"][0] * (0.01 if not end else 0.65)
    assert runs["kept"].sum("flops", "train/epoch1/prefix") == flops["kept"][0] - flops["kept"][1]
    facts = runs["kept"].facts["prefix_cache"]
    assert (facts["misses"], facts["hits"], facts["earlier"]) == (120, 240, 0)
    assert facts["bytes"] > 120 * 16 * 4


@pytest.mark.slow
def test_a_run_with_caches_of_its_own_computes_all_it_uses(finished: Path, tmp_path: Path) -> None:
    overrides = ["meter.own_caches=true", "train.epochs=2"]
    gv.run(finished / "tiny.yaml", runs=tmp_path / "runs", overrides=overrides)
    for arm in ("kept", "kept-last"):
        facts = _run(tmp_path, arm).facts["prefix_cache"]
        assert (facts["misses"], facts["hits"], facts["earlier"]) == (120, 120, 0)
        assert list((tmp_path / "runs" / "tiny" / arm / "seed0" / ".cache").glob("*/values.bin"))
    assert not (tmp_path / "runs" / ".cache").exists()


def test_the_report_says_what_was_kept(finished: Path) -> None:
    found = gv.report([finished / "runs"], out=finished / "report")
    text = (finished / "report" / "report.md").read_text()
    assert found
    row = next(
        line
        for line in text.splitlines()
        if line.startswith("| kept ") and "what enters 'head'" in line
    )
    assert [cell.strip() for cell in row.split("|")[3:6]] == ["120", "240", "0"]


def test_a_damaged_cache_costs_work_not_numbers(finished: Path, tmp_path: Path) -> None:
    before = _weights(finished, "kept")
    cut, flipped = sorted(
        (finished / "runs" / ".cache").glob("*/values.bin"), key=lambda p: p.stat().st_size
    )[-2:]
    with cut.open("r+b") as file:
        file.truncate(100)
    raw = bytearray(flipped.read_bytes())
    raw[0] ^= 1
    flipped.write_bytes(raw)
    gv.run(finished / "tiny.yaml", runs=finished / "runs", fresh=True)
    assert all(torch.equal(before[n], t) for n, t in _weights(finished, "kept").items())
    notes = [n for arm in ("kept", "kept-last") for n in _run(finished, arm).notes]
    assert any("not whole" in n for n in notes)
    assert any("damaged" in n for n in notes)
    assert any("computed by an earlier run" in n for n in notes)
