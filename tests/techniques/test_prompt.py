"""Visual prompts equal the authors' own on the fixture, stand where the paper says, and are refused
where that is wrong."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hosts import HOSTS, unchanged
from torch import Tensor, nn

from greenvis.core.surgery import Snapshot
from greenvis.core.wrap import wrap
from greenvis.errors import BadInput, GreenvisError
from greenvis.techniques.iteration.peft.adapter import Adapter
from greenvis.techniques.iteration.peft.prompt import Prompt, prototypes

DATA = Path(__file__).parents[1] / "fixtures"
PROMPTED = {
    "timm-vit": "blocks", "timm-deit-distilled": "blocks", "timm-dinov2-registers": "blocks",
    "torchvision-vit": "encoder.layers", "transformers-vit": "vit.layers",
    "transformers-clip": "vision_model.encoder.layers",
}  # fmt: skip


def _vit(**more: Any) -> Any:
    from timm.models.vision_transformer import VisionTransformer

    size = {
        "img_size": 32,
        "patch_size": 8,
        "embed_dim": 24,
        "depth": 3,
        "num_heads": 3,
        "mlp_ratio": 2,
        "num_classes": 5,
    }
    return VisionTransformer(**{**size, **more}).eval()


def _from_vpt(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The fixture's weights under timm's names."""
    out = {
        "cls_token": state["transformer.embeddings.cls_token"],
        "pos_embed": state["transformer.embeddings.position_embeddings"],
        "head.weight": state["head.weight"],
        "head.bias": state["head.bias"],
    }
    for kind in ("weight", "bias"):
        out[f"patch_embed.proj.{kind}"] = state[f"transformer.embeddings.patch_embeddings.{kind}"]
        out[f"norm.{kind}"] = state[f"transformer.encoder.encoder_norm.{kind}"]
        for i in range(3):
            theirs, ours = f"transformer.encoder.layer.{i}", f"blocks.{i}"
            out[f"{ours}.attn.qkv.{kind}"] = torch.cat(
                [state[f"{theirs}.attn.{n}.{kind}"] for n in ("query", "key", "value")]
            )
            for one, other in {"attn.proj": "attn.out", "norm1": "attention_norm",
            "norm2": "ffn_norm", "mlp.fc1": "ffn.fc1",
                               "mlp.fc2": "ffn.fc2"}.items():  # fmt: skip
                out[f"{ours}.{one}.{kind}"] = state[f"{theirs}.{other}.{kind}"]
    return out


def test_equals_the_authors_own_on_the_fixture() -> None:
    case = torch.load(DATA / "vpt_tiny.pt", weights_only=True)["cases"][0]
    model, seen = _vit(), {}
    model.load_state_dict(_from_vpt(case["state_dict"]))
    model.blocks[2].register_forward_hook(lambda m, i, o: seen.update(encoded=model.norm(o)))
    wrap(model, Prompt(tokens=case["num_tokens"]))
    model.blocks[0].norm1.register_forward_pre_hook(lambda m, i: seen.update(embedded=i[0]))
    with torch.no_grad():
        model.blocks[0].prompt.rows.copy_(case["state_dict"]["transformer.prompt_embeddings"][0])
        logits = model(case["x"])
    assert torch.allclose(seen["embedded"], case["prompted_embedding"], atol=1e-6)
    behind = 1 + case["num_tokens"]  # who looks at a block from without is not shown the prompts
    assert torch.allclose(
        seen["encoded"],
        torch.cat([case["encoded"][:, :1], case["encoded"][:, behind:]], 1),
        atol=1e-5,
    )
    assert torch.allclose(logits, case["logits"], atol=1e-5)


def _reference(model: Any, x: Tensor, prompts: list[Tensor], prefix: int) -> Tensor:
    """Jia et al., equations 4 to 8, on timm's parts: rows 1..P are overwritten before each block
    that has prompts."""
    tokens = model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(x))))
    count = prompts[0].shape[0]
    for i, block in enumerate(model.blocks):
        if i < len(prompts):
            rest = tokens[:, prefix + (count if i else 0) :]
            tokens = torch.cat([tokens[:, :prefix], prompts[i].expand(len(x), -1, -1), rest], 1)
        tokens = type(block).forward(block, tokens)
    patches = tokens[:, prefix + count :]
    return model.forward_head(model.norm(torch.cat([tokens[:, :prefix], patches], 1)))


@pytest.mark.parametrize("depth", ["shallow", "deep"])
@pytest.mark.parametrize(
    "more",
    [{}, {"reg_tokens": 4}, {"global_pool": "avg"}, {"class_token": False, "global_pool": "map"}],
)
def test_follows_the_paper(depth: Any, more: dict[str, Any]) -> None:
    model, x = _vit(**more), torch.rand(2, 3, 32, 32)
    live = wrap(model, Prompt(tokens=4, depth=depth))
    prompts = [p for n, p in live.trainable.items() if "prompt" in n]
    assert len(prompts) == (3 if depth == "deep" else 1)
    with torch.no_grad():
        for rows in prompts:
            rows.copy_(torch.randn(rows.shape))
        assert torch.allclose(
            model(x), _reference(model, x, prompts, model.num_prefix_tokens), atol=1e-5
        )


@pytest.mark.parametrize("name", PROMPTED)
def test_starts_as_the_paper_says_in_all_libraries(name: str) -> None:
    model = HOSTS[name].build()
    live = wrap(model, Prompt(tokens=200, depth="deep"))
    rows = {n: p for n, p in live.trainable.items() if n.endswith("prompt.rows")}
    bound = math.sqrt(6 / (3 * 8 * 8 + 32))
    assert {n.rpartition(".")[0].rpartition(".")[0].rpartition(".")[0] for n in rows} == {
        PROMPTED[name]
    }
    for values in rows.values():
        assert values.shape == (200, 32)
        assert 0.98 * bound < values.abs().max() <= bound
        assert abs(values.mean()) < 0.05 * bound


@pytest.mark.parametrize("name", PROMPTED)
@pytest.mark.parametrize("depth", ["shallow", "deep"])
def test_learns_and_leaves_no_mark(name: str, depth: Any) -> None:
    model = HOSTS[name].build()
    before, keys = Snapshot(model), list(model.state_dict())
    images, labels = HOSTS[name].batch()
    live = wrap(model, Prompt(tokens=3, depth=depth, head="freeze"))
    with torch.no_grad():
        first = getattr(model.eval()(images), "logits", None)
    optimizer = torch.optim.SGD(live.param_groups(0.1))
    output = model.train()(images)
    output = (
        output
        if isinstance(output, tuple)
        else (getattr(output, "logits", getattr(output, "image_embeds", output)),)
    )
    sum(F.cross_entropy(o, labels) for o in output).backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in live.trainable.values())
    assert {n.rpartition(".")[2] for n in live.trainable} == {"rows"}
    optimizer.step()
    assert first is None or not torch.allclose(model.eval()(images).logits, first, atol=1e-6)
    with pytest.raises(GreenvisError, match="prompts are tokens"):
        live.merge()
    live.undo()
    assert list(model.state_dict()) == keys
    assert all(before.unchanged(i) for i in range(len(before._tensors)))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_dropout_acts_on_prompts_in_training_only() -> None:
    model, seen = _vit(), {}
    wrap(model, Prompt(tokens=50, dropout=0.5))
    model.blocks[0].norm1.register_forward_pre_hook(lambda m, i: seen.update(rows=i[0][:, 1:51]))
    rows = model.blocks[0].prompt.rows
    model(torch.rand(2, 3, 32, 32))
    assert torch.equal(seen["rows"], rows.expand(2, -1, -1))
    model.train()(torch.rand(2, 3, 32, 32))
    assert 0.3 < (seen["rows"] == 0).float().mean() < 0.7


def test_half_precision_and_another_size() -> None:
    model = _vit(dynamic_img_size=True)
    wrap(model, Prompt(tokens=3, depth="deep"))
    assert model(torch.rand(2, 3, 48, 32)).shape == (2, 5)
    with torch.autocast("cpu", torch.bfloat16):
        assert model(torch.rand(2, 3, 32, 32)).isfinite().all()


class _Shifted(nn.Module):
    """A block that mixes neighbours in the sequence: it works on any length, but a prompt has no
    neighbours."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x + 0.5 * x.roll(1, 1))


def test_refuses_blocks_that_use_places() -> None:
    model = _vit()
    model.blocks = nn.Sequential(*(_Shifted(b) for b in model.blocks))
    with pytest.raises(
        BadInput, match=r"block 'blocks\.\d.*' of VisionTransformer uses the places"
    ):
        wrap(model, Prompt())


def test_refuses_convit_whose_positions_lie_in_the_block() -> None:
    from timm.models.convit import ConVit

    model = ConVit(
        img_size=32,
        patch_size=8,
        embed_dim=24,
        depth=2,
        num_heads=2,
        num_classes=5,
        local_up_to_layer=1,
    )
    with pytest.raises(BadInput, match=r"blocks of ConVit|uses the places"):
        wrap(model, Prompt(tokens=9))  # 16 patches and 9 prompts would pass for a grid of 5 × 5


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("timm-swin", "attends in windows"),
        ("timm-eva02", "RoPE"),
        ("timm-resnet", "ResNet has none"),
        ("plain", "does not show its attention as a row of blocks"),
    ],
)
def test_refusals_change_nothing(name: str, says: str) -> None:
    model = HOSTS[name].build()
    with unchanged(model), pytest.raises(BadInput, match=says):
        wrap(model, Prompt(input_shape=HOSTS[name].input_shape))
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("variant", ["houlsby", "conv", "mona"])
def test_goes_with_bottlenecks_and_with_filters_of_the_grid_which_see_no_prompts(
    variant: Any,
) -> None:
    model = HOSTS["timm-vit"].build().eval()
    live = wrap(model, [Prompt(tokens=3), Adapter(width=4, variant=variant)])
    assert any("prompt" in n for n in live.trainable)
    assert any("adapter" in n for n in live.trainable)
    images, _ = HOSTS["timm-vit"].batch()
    model(images).sum().backward()
    assert all(p.grad is not None for p in live.trainable.values())
    live.undo()


def test_refuses_nonsense() -> None:
    for wrong in ({"tokens": 0}, {"depth": "deeper"}, {"dropout": 1}, {"prompts": 4}):
        with pytest.raises(BadInput, match=next(iter(wrong))):
            Prompt(**wrong)  # type: ignore[arg-type]


def test_prototypes_are_centres() -> None:
    corners = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0]])
    around = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 2.0], [0.0, -2.0]])
    tokens = (corners[:, None] + around).flatten(0, 1)
    assert torch.allclose(prototypes(tokens, 3), corners, atol=1e-6)
    assert torch.allclose(prototypes(tokens[:3], 3), tokens[:3], atol=1e-6)
    assert torch.allclose(prototypes(tokens, 1), tokens.mean(0, keepdim=True))
    with pytest.raises(BadInput, match="5 prototypes need as many tokens, and there are 4"):
        prototypes(around, 5)


@pytest.mark.parametrize("depth", ["shallow", "deep"])
def test_prompts_start_from_prototypes_of_their_block(depth: Any) -> None:
    model = _vit().eval()
    x = torch.rand(6, 3, 32, 32)
    with torch.no_grad():  # what each block is fed without prompts
        fed = [model._pos_embed(model.patch_embed(x))]
        for block in model.blocks[:-1]:
            fed.append(block(fed[-1]))
    live = wrap(model, Prompt(tokens=4, depth=depth, init="prototypes"))
    with pytest.raises(BadInput, match=r"call batch\(x, y\)"):
        live.loss(x, None, model(x))
    live.batch(x, None)
    count = 1 if depth == "shallow" else len(fed)
    for block, tokens in zip(model.blocks[:count], fed, strict=False):
        assert torch.allclose(
            block.prompt.rows, prototypes(tokens[:, 1:].flatten(0, 1), 4), atol=1e-5
        )
    assert model(x).shape == (6, 5)
    start = model.blocks[0].prompt.rows.clone()
    live.batch(x.flip(0) * 2, None)  # the first batch only
    assert torch.equal(model.blocks[0].prompt.rows, start)
    assert live.loss(x, None, model(x)) == 0
