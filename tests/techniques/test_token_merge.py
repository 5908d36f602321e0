"""Token merging equals the published implementation on the fixtures and a naive one on today's
models, and leaves no mark."""

from __future__ import annotations

import copy
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hosts import HOSTS, unchanged
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from greenvis.core.surgery import Snapshot
from greenvis.core.technique import logits_of
from greenvis.core.wrap import wrap
from greenvis.errors import BadInput, GreenvisError
from greenvis.techniques.inference.tokens._matching import (
    Matching,
    bipartite_soft_matching,
    parse_r,
    source_matrix,
    token_map,
)
from greenvis.techniques.inference.tokens.token_merge import InstalledTokenMerge, TokenMerge
from greenvis.techniques.iteration.peft.prompt import Prompt

DATA = Path(__file__).parents[1] / "fixtures"
WHOLE = Path(__file__).parents[3] / "shared" / "fixtures"  # the long cases, where they are at hand
MERGED = ("timm-vit", "timm-deit-distilled", "timm-deit3", "timm-eva02", "timm-dinov2-registers",
"torchvision-vit",
          "transformers-vit", "transformers-dinov2", "transformers-clip")  # fmt: skip


def _cases() -> list[dict[str, Any]]:
    folder = WHOLE if (WHOLE / "tome_matching.pt").exists() else DATA
    return torch.load(folder / "tome_matching.pt", weights_only=True)["cases"]


def _merge(model: nn.Module, **settings: Any) -> tuple[Any, InstalledTokenMerge]:
    live = wrap(model, TokenMerge(**settings))
    installed = live.installed[0]
    assert isinstance(installed, InstalledTokenMerge)
    return live, installed


# -- the mathematics ------------------------------------------------------------------------------


def test_matching_merging_and_unmerging_equal_the_fixtures() -> None:
    for case in _cases():
        protected = int(case["class_token"]) + int(case["distill_token"])
        matching = bipartite_soft_matching(case["metric"], case["r"], protected)
        if case["noop"]:
            assert matching.r == 0
            continue
        assert matching.r == case["r_effective"]
        for ours, theirs in (
            ("unmerged", "unm_idx"),
            ("source", "src_idx"),
            ("destination", "dst_idx"),
        ):
            got, want = getattr(matching, ours), case[theirs][..., 0]
            assert (
                torch.equal(got.sort().values, want.sort().values)
                if case["duplicates"]
                else torch.equal(got, want)
            )
        before = None if case["size_in"] is None else case["size_in"][..., 0]
        x, size = matching.merge(case["x"], before)
        assert torch.allclose(x, case["x_merged"], atol=1e-6)
        assert torch.equal(size, case["size_out"][..., 0])
        assert torch.equal(source_matrix(matching.map, matching.remaining), case["source"])
        if not case[
            "distill_token"
        ]:  # with one, the reference forgets that its sequence is interleaved
            assert torch.equal(matching.unmerge(case["x_merged"]), case["x_unmerged"])
        members = case["source"].transpose(1, 2)
        assert torch.allclose(
            matching.unmerge(case["x_merged"]), members @ case["x_merged"], atol=1e-6
        )


def test_schedules_equal_the_fixture() -> None:
    for row in json.loads((DATA / "tome_parse_r.json").read_text())["table"]:
        assert parse_r(row["num_layers"], row["r"]) == row["list"]
        assert (
            parse_r(row["num_layers"], tuple(row["r"]) if isinstance(row["r"], list) else row["r"])
            == row["list"]
        )


@pytest.mark.parametrize(
    ("r", "says"),
    [
        ([1] * 13, "13 numbers, but the model has 12 blocks"),
        ([-1, 2], "negative"),
        ([2.5, 3], "2.5 tokens"),
    ],
)
def test_wrong_schedules_are_refused(r: Any, says: str) -> None:
    with pytest.raises(BadInput, match=says):
        parse_r(12, r)


@st.composite
def _sequences(draw: st.DrawFn) -> tuple[Tensor, int, int]:
    length, batch = draw(st.integers(1, 21)), draw(st.integers(1, 3))
    protected, r = draw(st.integers(0, min(5, length))), draw(st.integers(0, 30))
    metric = torch.randn(
        batch, length, 4, generator=torch.Generator().manual_seed(draw(st.integers(0, 99)))
    )
    return (metric * 0 if draw(st.booleans()) else metric), protected, r


@given(_sequences())
@settings(max_examples=150)
def test_any_sequence_keeps_its_tokens_sizes_and_protected_ones(
    drawn: tuple[Tensor, int, int],
) -> None:
    metric, protected, r = drawn
    batch, length, _ = metric.shape
    matching = bipartite_soft_matching(metric, r, protected)
    assert matching.r == min(r, (length - protected) // 2)
    x = torch.arange(length).double()[None, :, None].expand(batch, -1, 1) + 1
    merged, size = matching.merge(x)
    assert merged.shape == (batch, length - matching.r, 1)
    assert torch.equal(size.sum(1), torch.full((batch,), float(length)))
    assert torch.allclose(
        (merged[..., 0] * size).sum(1), x.sum((1, 2))
    )  # nothing is lost, nothing counted twice
    assert torch.equal(merged[:, :protected], x[:, :protected])
    assert torch.equal(size[:, :protected], torch.ones(batch, protected))
    assert torch.equal(matching.map[:, :protected], torch.arange(protected).expand(batch, -1))
    assert torch.equal(
        torch.nn.functional.one_hot(matching.map, matching.remaining).sum(1).float(), size
    )
    assert torch.equal(matching.unmerge(merged)[:, :protected], x[:, :protected])
    assert torch.allclose(matching.merge(matching.unmerge(merged))[0], merged)


@given(st.integers(0, 99), st.integers(0, 5), st.integers(1, 30))
@settings(max_examples=50)
def test_samples_do_not_depend_on_their_place_in_the_batch(
    seed: int, protected: int, r: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    metric, order = (
        torch.randn(4, 13, 4, generator=generator),
        torch.randperm(4, generator=generator),
    )
    whole, moved = (bipartite_soft_matching(m, r, protected) for m in (metric, metric[order]))
    assert torch.equal(whole.map[order], moved.map)
    alone = bipartite_soft_matching(metric[:1], r, protected)
    assert torch.equal(whole.map[:1], alone.map)


@given(st.integers(0, 99), st.lists(st.integers(0, 9), min_size=1, max_size=5))
@settings(max_examples=50)
def test_merging_in_turn_is_the_mean_of_all_members(seed: int, steps: list[int]) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = first = torch.randn(2, 17, 3, generator=generator, dtype=torch.float64)
    size: Tensor | None = None
    matchings: list[Matching] = []
    for r in steps:
        matchings.append(bipartite_soft_matching(x, r, 1))
        x, size = matchings[-1].merge(x, size)
    members = source_matrix(token_map(matchings), x.shape[1]).double()
    assert size is not None
    assert torch.equal(members.sum(2).float(), size)
    assert torch.allclose(members @ first / members.sum(2, keepdim=True), x, atol=1e-6)


def test_half_precision_compares_in_fp32_and_gradients_flow_through_values() -> None:
    metric = torch.randn(2, 9, 4)
    near = bipartite_soft_matching(metric.bfloat16(), 3, 1)
    assert torch.equal(near.map, bipartite_soft_matching(metric.bfloat16().float(), 3, 1).map)
    x = torch.randn(2, 9, 5, requires_grad=True)
    merged, _ = near.merge(x)
    merged.sum().backward()
    assert x.grad is not None
    assert torch.allclose(x.grad.sum((1, 2)), torch.full((2,), 5.0 * 6))
    assert near.merge(torch.ones(2, 9, 5, dtype=torch.bfloat16))[0].dtype == torch.bfloat16


def test_protecting_more_than_there_is_is_refused() -> None:
    with pytest.raises(BadInput, match="protect 5 of 4"):
        bipartite_soft_matching(torch.rand(1, 4, 2), 1, 5)


# -- whole models ---------------------------------------------------------------------------------


def test_a_model_equals_the_published_implementation() -> None:
    from timm.models.vision_transformer import VisionTransformer

    found = torch.load(DATA / "tome_vit_tiny.pt", weights_only=True)
    state = (
        found["state_dict"]
        | torch.load(DATA / "tome_vit_tiny_blocks.pt", weights_only=True)["state_dict"]
    )
    config = {k: v for k, v in found["config"].items() if k != "cls"}
    for run in found["runs"]:
        model = VisionTransformer(**config).eval()
        model.load_state_dict(state)
        r = run["r"] or 0
        _, live = _merge(model, r=r if isinstance(r, int) else list(r))
        with torch.no_grad():
            assert torch.allclose(model(found["images"]), run["logits"], atol=2e-6)
        if r:
            assert torch.equal(live.sizes(), run["final_size"][..., 0])
            assert torch.equal(live.source(), run["source"])


def _naive(model: Any, x: Tensor, r: int, proportional: bool, rope: bool = False) -> Tensor:
    """Bolya et al. on timm's parts, one image and one token at a time; averages are taken over
    patches, not tokens."""
    patches = model.patch_embed(x)
    tokens, rotation = model._pos_embed(patches) if rope else (model._pos_embed(patches), None)
    tokens, prefix = model.norm_pre(tokens), model.num_prefix_tokens
    out = []
    for image in tokens:
        rows = [(row, [i]) for i, row in enumerate(image)]
        for block in model.blocks:
            now = torch.stack([row for row, _ in rows])[None]
            size = torch.tensor([float(len(members)) for _, members in rows])
            seen: dict[str, Tensor] = {}
            module = block.attn.k_norm
            hook = module.register_forward_hook(lambda m, i, o, seen=seen: seen.update(k=o))
            more: dict[str, Any] = {
                "attn_mask": size.log()[None, None, None] if proportional else None
            }
            if (
                rotation is not None
            ):  # a merged token stands where the token stood that others came to: its last one
                more["rope"] = rotation[[members[-1] - prefix for _, members in rows[prefix:]]]
            attended = block.attn(block.norm1(now), **more)
            hook.remove()
            scale = getattr(block, "ls1", nn.Identity())
            now = now + scale(attended)
            rows = _pairs_merged(
                [(row, m) for row, (_, m) in zip(now[0], rows, strict=True)],
                seen["k"][0].mean(0),
                r,
                prefix,
            )
            now = torch.stack([row for row, _ in rows])[None]
            now = now + getattr(block, "ls2", nn.Identity())(block.mlp(block.norm2(now)))
            rows = [(row, m) for row, (_, m) in zip(now[0], rows, strict=True)]
        full = torch.zeros_like(image)
        for row, members in rows:
            full[members] = row
        out.append(full)
    return model.forward_head(model.norm(torch.stack(out)))


def _pairs_merged(
    rows: list[tuple[Tensor, list[int]]], keys: Tensor, r: int, prefix: int
) -> list[tuple[Tensor, list[int]]]:
    like = F.cosine_similarity(keys[:, None], keys[None], dim=-1)
    a, b = (
        [i for i in range(len(rows)) if i >= prefix and i % 2 == 0],
        [i for i in range(prefix, len(rows)) if i % 2],
    )
    ranked = sorted(((max(like[i, j].item() for j in b), i) for i in a), reverse=True)
    best = ranked[: min(r, (len(rows) - prefix) // 2)]
    partner = {i: max(b, key=lambda j, i=i: like[i, j].item()) for _, i in best}
    merged = {}
    for j, (row, members) in enumerate(rows):
        joined = [rows[i] for i, to in partner.items() if to == j]
        total = len(members) + sum(len(m) for _, m in joined)
        value = (
            row * len(members) + sum((v * len(m) for v, m in joined), torch.zeros_like(row))
        ) / total
        merged[j] = (value, [*(i for _, m in joined for i in m), *members])
    stay = [i for _, i in ranked[len(best) :]]
    order = [*range(prefix), *(sorted(stay) if prefix else stay), *b]
    return [merged[i] for i in order]


@pytest.mark.parametrize("proportional", [True, False])
@pytest.mark.parametrize(
    "more",
    [
        {},
        {"init_values": 0.3, "qk_norm": True, "reg_tokens": 4},
        {"global_pool": "avg"},
        {"class_token": False, "global_pool": "avg"},
        {"class_token": False, "global_pool": "map"},
    ],
)
def test_follows_the_paper_with_today_s_parts(more: dict[str, Any], proportional: bool) -> None:
    from timm.models.vision_transformer import VisionTransformer

    size: dict[str, Any] = {
        "img_size": 24,
        "patch_size": 6,
        "embed_dim": 24,
        "depth": 3,
        "num_heads": 3,
        "num_classes": 5,
    }
    model, x = VisionTransformer(**{**size, **more}).eval(), torch.rand(2, 3, 24, 24)
    with torch.no_grad():
        for parameter in model.parameters():  # a tiny random model hardly sees its own attention
            parameter.mul_(8 if parameter.dim() == 2 else 1)
        want, plain = _naive(model, x, 4, proportional), model(x)
        _merge(model, r=4, proportional=proportional)
        scale = want.abs().max().item()
        assert not torch.allclose(model(x), plain, atol=1e-2 * scale)
        assert torch.allclose(model(x), want, atol=1e-4 * scale)


def test_rotary_embeddings_go_with_their_tokens() -> None:
    model = HOSTS["timm-eva02"].build().eval()
    x = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        for block in model.blocks:  # a tiny random model hardly sees its own attention
            for part in (
                block.attn.q_proj,
                block.attn.k_proj,
                block.attn.v_proj,
                block.attn.proj,
                model.head,
            ):
                part.weight.mul_(20)
        want = _naive(model, x, 3, True, rope=True)
        _merge(model, r=3)
        assert torch.allclose(model(x), want, atol=1e-4 * want.abs().max().item())


@pytest.mark.parametrize("name", MERGED)
def test_libraries_alike(name: str) -> None:
    """The keys are the attention's own, sizes add up, features come back to their places, and
    nothing of it stays."""
    model = HOSTS[name].build()
    before, keys, (images, _) = Snapshot(model), list(model.state_dict()), HOSTS[name].batch()
    plain = logits_of(model.eval()(images))
    live, merged = _merge(model, r=3)
    with torch.no_grad():
        logits = logits_of(model(images))
        assert not torch.equal(logits, plain)
        assert torch.equal(logits_of(copy.deepcopy(model)(images)), logits)
        assert torch.allclose(logits_of(model(images[2:3])), logits[2:3], atol=1e-5)
    sizes, source = merged.sizes(), merged.source()
    assert sizes is not None
    assert source is not None
    assert torch.equal(source.sum(2), sizes)
    assert torch.equal(sizes.sum(1), torch.full((1,), float(source.shape[2])))
    features = torch.rand(1, sizes.shape[1], 6)
    assert torch.allclose(merged.unmerge(features), source.transpose(1, 2) @ features)
    assert merged.unmerge(torch.rand(1, source.shape[2] - 3, 2), block=1).shape == (
        1,
        source.shape[2],
        2,
    )
    with pytest.raises(GreenvisError, match="change of the run"):
        live.merge()
    live.undo()
    assert list(model.state_dict()) == keys
    assert all(before.unchanged(i) for i in range(len(before._tensors)))
    assert torch.equal(logits_of(model.eval()(images)), plain)
    assert not any(
        m._forward_hooks or m._forward_pre_hooks or "forward" in vars(m) for m in model.modules()
    )


@pytest.mark.parametrize("name", MERGED)
def test_r_of_zero_puts_nothing_on_the_path(name: str) -> None:
    model = HOSTS[name].build().eval()
    images, _ = HOSTS[name].batch()
    plain = logits_of(model(images))
    live, merged = _merge(model, r=0)
    assert not any(
        m._forward_hooks or m._forward_pre_hooks or "forward" in vars(m) for m in model.modules()
    )
    assert torch.equal(logits_of(model(images)), plain)
    assert merged.sizes() is None
    assert merged.token_map() is None
    assert live.merge() is model


def test_attention_stays_on_the_fused_kernel_and_sees_no_mask_before_the_first_merge() -> None:
    from torch.overrides import TorchFunctionMode

    masks: list[Any] = []

    class See(TorchFunctionMode):
        def __torch_function__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            if getattr(func, "__name__", "") == "scaled_dot_product_attention":
                masks.append((kwargs or {}).get("attn_mask"))
            return func(*args, **(kwargs or {}))

    model = HOSTS["timm-vit"].build().eval()
    _merge(model, r=[0, 4, 0])
    with See(), torch.no_grad():
        model(torch.rand(2, 3, 32, 32))
    assert [None if m is None else tuple(m.shape) for m in masks] == [None, None, (2, 1, 1, 13)]


def test_trains_also_with_checkpointing_and_stochastic_depth() -> None:
    from timm.models.vision_transformer import VisionTransformer

    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(3)
        model = VisionTransformer(
            img_size=24,
            patch_size=6,
            embed_dim=24,
            depth=3,
            num_heads=3,
            num_classes=5,
            drop_path_rate=0.2,
            qk_norm=True,
        ).train()
        model.set_grad_checkpointing(checkpointing)
        _merge(model, r=3)
        torch.manual_seed(4)
        F.cross_entropy(model(torch.rand(4, 3, 24, 24)), torch.arange(4)).backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(
        torch.allclose(a, b, atol=1e-6) for a, b in zip(*gradients, strict=True) if a is not None
    )
    assert sum(g is None for g in gradients[0]) == 0


def test_restore_gives_dense_features_in_place() -> None:
    model, x = HOSTS["timm-vit"].build().eval(), torch.rand(2, 3, 32, 32)
    _, merged = _merge(model, r=4, restore="never")
    with torch.no_grad():
        few = model.forward_features(x)
        assert few.shape[1] == 17 - 12
        unmerged = merged.unmerge(few)
    live_model = HOSTS["timm-vit"].build().eval()
    _merge(live_model, r=4, restore="always")
    with torch.no_grad():
        assert torch.allclose(live_model.forward_features(x), unmerged, atol=1e-6)


def test_merges_keys_that_low_rank_changes_have_moved() -> None:
    from greenvis.techniques.iteration.peft.lora import Lora

    model, x = HOSTS["timm-vit"].build(), torch.rand(2, 3, 32, 32)
    live = wrap(model, [Lora(rank=2, targets=["attention"]), TokenMerge(r=4)])
    with torch.no_grad():
        for name, parameter in live.trainable.items():
            if "lora_B" in name:
                parameter.normal_()
        changed = model.eval()(x)
    first = live.installed[1].token_map(1)
    plain = HOSTS["timm-vit"].build().eval()
    _, merged = _merge(plain, r=4)
    with torch.no_grad():
        assert not torch.allclose(plain(x), changed, atol=1e-4)
    assert not torch.equal(first, merged.token_map(1))


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("timm-swin", "attends in windows"),
        ("torchvision-resnet", "goes by attention, and ResNet has none"),
        ("plain", "does not show its attention as a row of blocks"),
    ],
)
def test_refusals_change_nothing(name: str, says: str) -> None:
    model = HOSTS[name].build()
    with unchanged(model), pytest.raises(BadInput, match=says):
        wrap(model, TokenMerge(input_shape=HOSTS[name].input_shape))


def test_refuses_blocks_that_are_not_pre_norm_or_use_places() -> None:
    from timm.models.beit import Beit
    from timm.models.vision_transformer import ParallelScalingBlock, ResPostBlock, VisionTransformer

    size: dict[str, Any] = {
        "img_size": 24,
        "patch_size": 6,
        "embed_dim": 24,
        "depth": 2,
        "num_heads": 3,
        "num_classes": 5,
    }
    for block, says in (
        (ResPostBlock, "not x \\+ attention"),
        (ParallelScalingBlock, "no norm between|has 0 attentions"),
    ):
        with pytest.raises(BadInput, match=says):
            wrap(VisionTransformer(**size, block_fn=block), TokenMerge())
    model = Beit(**size, use_shared_rel_pos_bias=False, use_rel_pos_bias=True)
    for b in model.blocks:
        nn.init.normal_(b.attn.relative_position_bias_table)
        nn.init.normal_(b.attn.proj.weight)
    with pytest.raises(BadInput, match="uses the places of its tokens"):
        wrap(model, TokenMerge())


def test_refuses_what_it_cannot_go_with() -> None:
    with pytest.raises(BadInput, match="'prompt' and 'token_merge' do not go together"):
        wrap(HOSTS["timm-vit"].build(), [Prompt(), TokenMerge()])
    for wrong in ({"r": "many"}, {"restore": "sometimes"}, {"R": 3}):
        with pytest.raises(BadInput, match=next(iter(wrong))):
            TokenMerge(**wrong)  # type: ignore[arg-type]
    with pytest.raises(BadInput, match="negative"):
        wrap(HOSTS["timm-vit"].build(), TokenMerge(r=-1))


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_to_one_graph(backend: str) -> None:
    if backend == "inductor" and not any(
        shutil.which(os.environ.get("CXX") or name) for name in ("g++", "clang++")
    ):
        pytest.skip("inductor writes C++ for a CPU, and there is no C++ compiler here")
    model, x = HOSTS["timm-vit"].build().eval(), torch.rand(2, 3, 32, 32)
    _merge(model, r=3)
    compiled: Any = torch.compile(model, fullgraph=True, backend=backend)
    with torch.no_grad():
        for images in (x, 1 - x):
            assert torch.allclose(compiled(images), model(images), atol=1e-5)


@pytest.mark.parametrize("name", ["timm-vit", "torchvision-vit", "transformers-vit"])
def test_the_onnx_exporter_that_would_lose_tokens_is_refused(name: str, tmp_path: Path) -> None:
    import io

    model, (images, _) = HOSTS[name].build().eval(), HOSTS[name].batch()
    _merge(model, r=3)
    with pytest.raises(BadInput, match="dynamo=True"):
        torch.onnx.export(model, (images,), io.BytesIO(), dynamo=False, verbose=False)
    assert logits_of(model(images)).isfinite().all()
    traced = (
        torch.jit.trace(model, images, strict=False, check_trace=False)
        if name != "transformers-vit"
        else model
    )  # a trace adds all
    assert torch.allclose(logits_of(traced(images)), logits_of(model(images)), atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["timm-vit", "timm-eva02", "torchvision-vit", "transformers-vit"])
def test_exported_to_onnx_gives_equal_outputs(name: str, tmp_path: Path) -> None:
    import onnxruntime

    model, (images, _) = HOSTS[name].build().eval(), HOSTS[name].batch()
    _merge(model, r=3)
    with torch.no_grad():
        want = logits_of(model(images))
        torch.onnx.export(model, (images,), dynamo=True, verbose=False).save(
            tmp_path / "merged.onnx"
        )
    session = onnxruntime.InferenceSession(tmp_path / "merged.onnx")
    got = torch.from_numpy(session.run(None, {session.get_inputs()[0].name: images.numpy()})[0])
    assert torch.allclose(got, want, atol=1e-5)
