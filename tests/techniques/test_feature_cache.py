"""Deep blocks that run at some calls only: against the same blocks by hand, reset, per branch."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from techniques.drawings import batch, diffusion, noise
from torch import Tensor, nn

from greenvis import models
from greenvis.core.wrap import wrap
from greenvis.errors import BadInput, GreenvisError
from greenvis.models.drawing import Setting
from greenvis.techniques.inference.sampling._reuse import blocks_of, relative, whole_calls
from greenvis.techniques.inference.sampling.feature_cache import FeatureCache
from greenvis.techniques.inference.sampling.sampler import Sampler
from greenvis.testing.task_matrix import TaskHost, check_tasks

DIT: dict[str, Any] = {
    "img_size": 8, "in_chans": 1, "num_classes": 3, "patch_size": 4, "num_layers": 3,
    "num_attention_heads": 2, "attention_head_dim": 8, "out_channels": 1, "norm_num_groups": 4,
}  # fmt: skip


def _by_hand(network: Any, x: Tensor, t: Tensor, y: Tensor, deep: Tensor | None) -> Any:
    """Return a U-Net's answer, with what its inner blocks gave the last way up, or give it now."""
    emb = network.time_embedding(network.time_proj(t.expand(len(x))))
    emb = emb + network.class_embedding(y)
    h = network.conv_in(x)
    skips = (h,)
    h, more = network.down_blocks[0](h, emb)
    skips += more
    if deep is None:
        h, inner = network.down_blocks[1](h, emb)
        skips += inner
        h = network.mid_block(h, emb)
        deep = network.up_blocks[0](h, skips[-2:], emb)
    # the last way up takes what came in and the first layer's, the way between them its end, too
    h = network.up_blocks[1](deep, skips[:2], emb)
    return network.conv_out(network.conv_act(network.conv_norm_out(h))), deep


def test_every_second_call_uses_what_the_inner_blocks_gave() -> None:
    model, (_, y) = diffusion(), batch()
    model.set(Setting("ddim", 5, spacing="trailing"))
    reference = copy.deepcopy(model)
    live = wrap(model, FeatureCache(every=(2, 3)), task="generation")
    exact = reference.solve(noise(), y)
    assert torch.equal(model.solve(noise(), y), exact)  # not served: no cache
    with live.served():
        cached = model.solve(noise(), y)
        assert torch.equal(model.solve(noise(), y), cached)  # a run begins anew
    scheduler = reference.scheduler()
    scheduler.set_timesteps(5)
    x, deep = noise(), None
    with torch.no_grad():
        for i, t in enumerate(scheduler.timesteps):
            out, deep = _by_hand(reference.network, x, t, y, None if i % 2 == 0 else deep)
            x = scheduler.step(out, t, x).prev_sample
    assert torch.allclose(cached, x, atol=1e-5)
    assert not torch.allclose(cached, exact, atol=1e-4)
    points = live.operating_points()
    assert [*points] == [f"ddim 5, trailing{s}" for s in ("", ", every 2", ", every 3")]
    shares = []
    for point in points.values():
        with point as facts:
            model.sample(y)
            model.sample(y[:2])  # another shape
        shares.append((facts["network_calls"], round(facts["whole_calls"], 2)))
    assert shares == [(5.0, 1.0), (5.0, 0.6), (5.0, 0.4)]
    before = {k: v.clone() for k, v in reference.state_dict().items()}
    assert live.undo() is model
    assert torch.equal(model.solve(noise(), y), exact)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert not any("forward" in vars(m) for m in model.modules())


def test_a_chain_of_blocks_adds_the_change_of_those_left_out() -> None:
    pytest.importorskip("diffusers")
    torch.manual_seed(0)
    model: Any = models.build(
        "diffusers/DiTTransformer2DModel", head="images", times=40, **DIT
    ).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    model.range.copy_(torch.tensor([0.0, 1.0]))
    network, y = model.network, torch.tensor([0, 2])
    assert len(blocks_of(network).later) == 2
    seen: list[Tensor] = []
    inputs = [
        block.register_forward_pre_hook(lambda m, a, k: seen.append(a[0]), with_kwargs=True)
        for block in network.transformer_blocks
    ]
    ends = network.transformer_blocks[2].register_forward_hook(lambda m, a, out: seen.append(out))
    x, other = noise(2), noise(2, 1)
    with torch.no_grad():
        network(x, torch.tensor([30, 30]), class_labels=y)
        first = [*seen]
        seen.clear()
        network(other, torch.tensor([20, 20]), class_labels=y)
        second = [*seen]
    for hook in (*inputs, ends):
        hook.remove()
    live = wrap(model, FeatureCache(every=(2,)), task="generation")
    with live.served(), torch.no_grad():
        model.predict(x, torch.tensor(30), y)
        ended: list[Tensor] = []
        hook = network.transformer_blocks[2].register_forward_hook(
            lambda m, a, out: ended.append(out)
        )
        model.predict(other, torch.tensor(20), y)
        hook.remove()
    # what went into the second block, and the change of the second and the third of the call before
    assert torch.allclose(ended[0], second[1] + first[3] - first[1], atol=1e-5)


def test_branches_of_guidance_are_held_apart() -> None:
    model, (x, y) = diffusion(), batch()
    live = wrap(model, FeatureCache(every=(2,)), task="generation")
    null = torch.full((5,), 3)
    with torch.no_grad():
        alone = {}
        for name, labels in (("own", y), ("none", null)):
            with live.served():
                model.predict(x, torch.tensor(30), labels)
                alone[name] = model.predict(x, torch.tensor(20), labels)
        with live.served():
            for t in (30, 20):
                both = [model.predict(x, torch.tensor(t), labels) for labels in (y, null)]
        exact = model.predict(x, torch.tensor(20), y)
    assert torch.equal(both[0], alone["own"])
    assert torch.equal(both[1], alone["none"])
    assert not torch.equal(both[0], exact)


def test_a_threshold_is_fitted_to_the_share_of_whole_calls_and_saved() -> None:
    model, (x, y) = diffusion(), batch()
    model.set(Setting("ddim", 8, spacing="trailing"))
    live = wrap(model, FeatureCache(every=(), share=0.5), task="generation")
    assert [*live.operating_points()] == ["ddim 8, trailing"]
    facts = live.calibrate([(x, y)])["feature_cache"]
    assert 0 < facts["whole_calls"] <= 0.5
    name = [*live.operating_points()][1]
    assert name == f"ddim 8, trailing, change {facts['threshold']:.2g}"
    with live.operating_points()[name] as counted:
        model.sample(y)
    assert 1 / 8 <= counted["whole_calls"] <= 0.75  # its own way, which caching bends
    again = wrap(diffusion(), FeatureCache(every=(), share=0.5), task="generation")
    again.load_state_dict(live.state_dict())
    assert again.installed[0].threshold == facts["threshold"]  # type: ignore[attr-defined]


def test_whole_calls_are_those_that_differ_from_the_last_whole_one() -> None:
    changes = [torch.tensor([c]) for c in (1.0, 1.2, 1.5, 1.6, 3.0)]
    assert relative(changes[2], changes[0]) == pytest.approx(0.5)
    assert [whole_calls(changes, t) for t in (1e-3, 0.4, 1.9, 9.0)] == [5, 3, 2, 1]


def test_what_has_nothing_to_use_again_is_refused() -> None:
    flat = diffusion(
        block_out_channels=[8], down_block_types=["DownBlock2D"], up_block_types=["UpBlock2D"]
    )
    with pytest.raises(BadInput, match="one resolution"):
        wrap(flat, FeatureCache(), task="generation")
    with pytest.raises(BadInput, match="neither a U-Net nor a chain"):
        blocks_of(nn.Linear(2, 2))
    for options, match in (
        ({"every": (1,)}, "caches nothing"),
        ({"every": ()}, "choose 'every'"),
        ({"threshold": 0.1, "share": 0.5}, "leave one of them out"),
    ):
        with pytest.raises(BadInput, match=match):
            FeatureCache(**options)  # type: ignore[arg-type]
    with pytest.raises(GreenvisError, match="no weights hold it"):
        wrap(diffusion(), FeatureCache(), task="generation").merge()


def test_it_serves_the_samplers_setting_and_the_task() -> None:
    model, (_, y) = diffusion(), batch()
    live = wrap(model, [FeatureCache(every=(2,)), Sampler(steps=(4, 3))], task="generation")
    with live.served():
        names = ["dpm++ 4", "dpm++ 4, every 2", "dpm++ 3, every 2"]
        assert [*live.operating_points()] == names
        with live.operating_points()["dpm++ 4, every 2"] as facts:
            model.sample(y)
    assert (facts["network_calls"], facts["whole_calls"]) == (4.0, 0.5)
    host = TaskHost("generation", lambda: diffusion().train(), batch)
    assert all(r.outcome == "works" for r in check_tasks(FeatureCache, [host]))
