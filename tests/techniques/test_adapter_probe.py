"""Probing with adapters: nothing but adapters and classifier learns, kept adapters go on, and only
the token's folds away."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from greenvis import models
from greenvis.core.surgery import Snapshot
from greenvis.core.wrap import wrap
from greenvis.errors import BadInput
from greenvis.techniques._shared import tec as tec
from greenvis.techniques.iteration.peft.adapter_probe import AdapterProbe
from greenvis.techniques.iteration.reuse.reuse import Reuse

SIZE = {
    "img_size": 16,
    "patch_size": 4,
    "embed_dim": 24,
    "depth": 4,
    "num_heads": 2,
    "num_classes": 5,
}
REF = "timm/vit_tiny_patch16_224"


def _vit(**more: Any) -> Any:
    torch.manual_seed(0)
    return models.build(REF, **{**SIZE, **more}).eval()


def _images(n: int = 3) -> Tensor:
    return torch.rand(n, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def _step(live: Any, x: Tensor) -> None:
    optimizer = torch.optim.AdamW(live.param_groups(1e-2))
    torch.nn.functional.cross_entropy(live.model(x), torch.arange(len(x))).backward()
    optimizer.step()


@pytest.mark.parametrize("pool", ["token", "avg"])
def test_reads_every_block_where_the_last_was_read(pool: str) -> None:
    model, x = _vit(global_pool=pool), _images()
    outputs: list[Tensor] = []
    hooks = [b.register_forward_hook(lambda m, a, out: outputs.append(out)) for b in model.blocks]
    with torch.no_grad():
        model(x)
        outputs[-1] = model.norm(outputs[-1])
    for hook in hooks:
        hook.remove()
    wrap(model, AdapterProbe(encoder_adapters=2))
    adapters = model.blocks[-1].adapter_probe
    with torch.no_grad():
        tokens = adapters(torch.cat(outputs, -1))
        assert torch.allclose(model(x), model.forward_head(tokens), atol=1e-6)


def test_learns_adapters_and_classifier_only() -> None:
    model = _vit()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    live = wrap(model, AdapterProbe(encoder_adapters=2, input_adapter=True))
    _step(live, _images())
    now = model.state_dict()
    assert [n for n, t in before.items() if n in now and not torch.equal(t, now[n])] == [
        "head.weight",
        "head.bias",
    ]
    assert all("adapter" in n or n.startswith("head.") for n in live.trainable)
    live.undo()
    assert all(torch.equal(t, model.state_dict()[n]) for n, t in before.items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_the_input_adapter_begins_at_nothing_and_folds_away() -> None:
    model, x = _vit(), _images()
    expected, keys = model(x), list(model.state_dict())
    live = wrap(model, AdapterProbe(encoder_adapters=0, input_adapter=True))
    assert torch.equal(model(x), expected)
    for _ in range(2):
        _step(live, x)
    learned = model(x)
    assert not torch.allclose(learned, expected, atol=1e-3)
    merged = live.merge()
    assert list(merged.state_dict()) == keys
    assert torch.allclose(merged(x), learned, atol=1e-6)


def test_pretraining_leaves_its_adapters_on_request(tmp_path: Path) -> None:
    model, x = _vit(), _images()
    keys = list(model.state_dict())
    live = wrap(model, Reuse(base=_vit(depth=2), encoder_adapters=2, keep_adapters=True))
    live.loss(x, None, None).backward()
    parts: Any = live.installed[0]
    own = {n: t.clone() for n, t in parts.parts.adapters.state_dict().items()}
    live.merge()
    assert list(model.state_dict()) == keys
    models.save(model, tmp_path / "model.safetensors", ref=REF, options=SIZE)
    again = models.build(f"file:{tmp_path / 'model.safetensors'}")
    for one in (model, again):
        assert models.attached(one, tec.ENCODER_ADAPTERS).keys() == own.keys()
        wrapped = wrap(one, AdapterProbe())
        adapters: Any = one.get_submodule("blocks.3.adapter_probe")
        assert all(torch.equal(t, own[n]) for n, t in adapters.state_dict().items())
        wrapped.undo()
    live.undo()
    assert models.attached(model, tec.ENCODER_ADAPTERS) is None


def test_adapters_are_not_kept_unasked(tmp_path: Path) -> None:
    model = wrap(_vit(), Reuse(base=_vit(depth=2), encoder_adapters=2)).merge()
    assert models.attached(model, tec.ENCODER_ADAPTERS) is None
    models.save(model, tmp_path / "model.safetensors", ref=REF, options=SIZE)
    loaded = _vit().load_state_dict(load_file(tmp_path / "model.safetensors"))
    assert not loaded.missing_keys


def test_refuses_with_nothing_changed() -> None:
    model, bare = _vit(), _vit(class_token=False, global_pool="avg")
    other = _vit(depth=2)
    models.attach(other, tec.ENCODER_ADAPTERS, tec.EncoderAdapters(24, 4, 2, 32).state_dict())
    cases = [(model, {"encoder_adapters": 0}, "is a linear probe"), (bare, {"input_adapter": True},
    "no class token"),
             (other, {}, "begins with new ones")]  # fmt: skip
    for one, request, says in cases:
        before = Snapshot(one)
        with pytest.raises(BadInput, match=says):
            wrap(one, AdapterProbe(**request))
        assert all(before.unchanged(i) for i in range(len(before._tensors)))
    with pytest.raises(BadInput, match="there are none"):
        wrap(model, Reuse(base=other, encoder_adapters=0, keep_adapters=True))
