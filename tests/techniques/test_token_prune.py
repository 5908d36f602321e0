"""Token pruning equals the published parts on the fixture, removes what the papers say, learns, and
leaves no mark."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hosts import HOSTS, unchanged
from torch import Tensor

from greenvis.core.surgery import Snapshot
from greenvis.core.technique import logits_of
from greenvis.core.wrap import wrap
from greenvis.errors import BadInput, GreenvisError
from greenvis.techniques.inference.distill.distill import Distill
from greenvis.techniques.inference.exits.early_exit import EarlyExit
from greenvis.techniques.inference.tokens import _pruning
from greenvis.techniques.inference.tokens.token_merge import TokenMerge
from greenvis.techniques.inference.tokens.token_prune import InstalledTokenPrune, TokenPrune

DATA = Path(__file__).parents[1] / "fixtures"
PRUNED = (
    "timm-vit",
    "timm-deit-distilled",
    "timm-deit3",
    "timm-dinov2-registers",
    "torchvision-vit",
    "transformers-vit",
)


def _vit(**more: Any) -> Any:
    from timm.models.vision_transformer import VisionTransformer

    size = {
        "img_size": 32,
        "patch_size": 8,
        "embed_dim": 24,
        "depth": 3,
        "num_heads": 3,
        "num_classes": 5,
    }
    model = VisionTransformer(**{**size, **more}).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # a tiny random model hardly sees its own attention
            parameter.mul_(8 if parameter.dim() == 2 else 1)
    return model


def _prune(model: Any, **settings: Any) -> tuple[Any, InstalledTokenPrune]:
    live = wrap(model, TokenPrune(**settings))
    installed = live.installed[0]
    assert isinstance(installed, InstalledTokenPrune)
    return live, installed


def test_masked_attention_and_predictor_equal_the_fixture() -> None:
    found = torch.load(DATA / "dynamicvit.pt", weights_only=True)
    logits, policy = found["attn_logits"], found["policy"]
    assert torch.allclose(_pruning.masked_softmax(logits, policy), found["softmax"], atol=1e-7)
    assert torch.allclose(
        (logits + _pruning.policy_mask(policy[..., 0])).softmax(-1), found["softmax"], atol=1e-5
    )
    predictor = _pruning.Predictor(16)
    predictor.load_state_dict(found["predictor_state_dict"])
    assert torch.allclose(
        predictor(found["predictor_x"], found["predictor_policy"]),
        found["predictor_logprob"],
        atol=1e-6,
    )


def test_the_mask_s_gradient_is_that_of_masked_attention_also_for_tokens_that_have_left() -> None:
    logits, weights = torch.randn(2, 3, 6, 6), torch.randn(2, 3, 6, 6)
    gradients = []
    for by_mask in (False, True):
        policy = (torch.arange(12).view(2, 6) % 3 > 0).float().requires_grad_()
        mask = _pruning.policy_mask(policy)
        attention = (
            (logits + mask).softmax(-1)
            if by_mask
            else _pruning.masked_softmax(logits, policy.unsqueeze(-1))
        )
        (attention * weights).sum().backward()
        gradients.append(policy.grad)
    assert torch.allclose(*gradients, atol=1e-3)
    assert (gradients[1][:, 0] != 0).all()


def test_decisions_are_hard_final_and_follow_the_probabilities() -> None:
    scores = torch.tensor([0.8, 0.2]).log().expand(4, 5000, 2).clone().requires_grad_()
    before = torch.ones(4, 5000)
    before[:, ::2] = 0
    drawn = _pruning.decide(scores, before)
    assert set(drawn.unique().tolist()) == {0.0, 1.0}
    assert (drawn[:, ::2] == 0).all()
    assert drawn[:, 1::2].mean().item() == pytest.approx(0.8, abs=0.02)
    drawn.sum().backward()
    assert scores.grad is not None
    assert scores.grad[:, 1::2].abs().sum() > 0


def test_the_ratio_loss_is_the_mean_squared_distance() -> None:
    policies = [
        torch.tensor([[1.0, 1, 1, 0], [1, 0, 0, 0]]),
        torch.tensor([[1.0, 0, 0, 0], [0, 0, 0, 0]]),
    ]
    want = ((0.75 - 0.7) ** 2 + (0.25 - 0.7) ** 2 + (0.25 - 0.49) ** 2 + 0.49**2) / 4
    assert _pruning.ratio_loss(policies, [0.7, 0.49]).item() == pytest.approx(want)


def _removed(model: Any, x: Tensor, keep: float, places: list[int]) -> Tensor:
    """Rao et al. at inference, on timm's parts: in front of a place the best tokens go on."""
    prefix = model.num_prefix_tokens
    tokens = model.norm_pre(model._pos_embed(model.patch_embed(x)))
    first = tokens.shape[1] - prefix
    for i, block in enumerate(model.blocks):
        if i in places:
            patches = tokens[:, prefix:]
            scores = block.token_prune(patches, torch.ones(*patches.shape[:2], 1))[..., 0]
            count = int(first * keep ** (places.index(i) + 1))
            rows = [p[s.topk(count).indices] for p, s in zip(patches, scores, strict=True)]
            tokens = torch.cat([tokens[:, :prefix], torch.stack(rows)], 1)
        tokens = type(block).forward(block, tokens)
    return model.forward_head(model.norm(tokens))


@pytest.mark.parametrize("more", [{}, {"reg_tokens": 4, "qk_norm": True, "init_values": 0.3}])
def test_predicted_tokens_really_leave_at_inference(more: dict[str, Any]) -> None:
    model, x = _vit(**more), torch.rand(3, 3, 32, 32)
    plain = model(x)
    _, live = _prune(model, keep=0.5, blocks=[1, 2])
    with torch.no_grad():
        want = _removed(model, x, 0.5, [1, 2])
        assert torch.allclose(model(x), want, atol=1e-4 * want.abs().max().item())
    assert not torch.allclose(model(x), plain, atol=1e-2)
    assert live.kept_positions is not None
    assert live.kept_positions.shape == (3, model.num_prefix_tokens + 4)


def _masked(model: Any, x: Tensor, policy: dict[int, Tensor]) -> Tensor:
    """Rao et al. in training, on timm's parts: all tokens stay, attention is masked by the
    decisions."""
    tokens, prefix = model._pos_embed(model.patch_embed(x)), model.num_prefix_tokens
    now = torch.ones(tokens.shape[:2])
    for i, block in enumerate(model.blocks):
        now = torch.cat([torch.ones(len(x), prefix), policy[i]], 1) if i in policy else now
        attn = block.attn
        q, k, v = (
            attn.qkv(block.norm1(tokens))
            .unflatten(-1, (3, attn.num_heads, -1))
            .permute(2, 0, 3, 1, 4)
        )
        weights = _pruning.masked_softmax(q @ k.transpose(-2, -1) * attn.scale, now.unsqueeze(-1))
        tokens = tokens + attn.proj((weights @ v).transpose(1, 2).flatten(2))
        tokens = tokens + block.mlp(block.norm2(tokens))
    return model.forward_head(model.norm(tokens))


def test_in_training_attention_is_masked_by_the_decisions() -> None:
    model, x = _vit(), torch.rand(3, 3, 32, 32)
    live, pruned = _prune(model, keep=0.5, blocks=[1, 2], weight=3.0)
    model.train()
    logits = model(x)
    policies = [pruned.flow.decided[i] for i in (1, 2)]
    assert (policies[1] <= policies[0]).all()
    assert 0 < policies[1].mean() < policies[0].mean() < 1
    want = _masked(model, x, {1: policies[0], 2: policies[1]})
    assert torch.allclose(logits, want, atol=1e-3 * want.abs().max().item())
    terms = live.terms(x, None, logits)
    assert list(terms) == ["token_prune"]
    assert terms["token_prune"].item() == pytest.approx(
        3 * _pruning.ratio_loss(policies, [0.5, 0.25]).item()
    )
    F.cross_entropy(logits, torch.arange(3)).backward()  # also the task says which tokens matter
    assert all(
        p.grad is not None and p.grad.abs().max() > 0
        for n, p in model.named_parameters()
        if "out_conv" in n
    )


def test_predictors_learn_the_share_to_keep() -> None:
    model, x = _vit(), torch.rand(8, 3, 32, 32)
    live, pruned = _prune(model, keep=0.25, blocks=[1])
    optimizer = torch.optim.Adam(
        [p for n, p in model.named_parameters() if "token_prune" in n], 1e-2
    )
    model.train()
    for _ in range(60):
        logits = model(x)
        optimizer.zero_grad()
        live.loss(x, None, logits).backward()
        optimizer.step()
    assert pruned.flow.decided[1].mean().item() == pytest.approx(0.25, abs=0.15)


@pytest.mark.parametrize("fuse", [False, True])
@pytest.mark.parametrize("more", [{}, {"reg_tokens": 2, "qk_norm": True, "init_values": 0.3}])
def test_class_attention_keeps_what_it_looks_at(more: dict[str, Any], fuse: bool) -> None:
    model, x = _vit(**more), torch.rand(2, 3, 32, 32)
    prefix = model.num_prefix_tokens
    with torch.no_grad():
        tokens = model.norm_pre(model._pos_embed(model.patch_embed(x)))
        for i, block in enumerate(model.blocks):
            attn, normed = block.attn, block.norm1(tokens)
            q, k, _ = attn.qkv(normed).unflatten(-1, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
            weights = (
                (attn.q_norm(q) @ attn.k_norm(k).transpose(-2, -1) * attn.scale)
                .softmax(-1)[:, :, 0]
                .mean(1)[:, prefix:]
            )
            tokens = tokens + block.ls1(attn(normed))
            if i:
                rows = []
                for image, weight in zip(tokens[:, prefix:], weights, strict=True):
                    order = weight.argsort(descending=True)
                    count = math.ceil(0.6 * len(order))
                    rest = (
                        [(weight[order[count:], None] * image[order[count:]]).sum(0, keepdim=True)]
                        if fuse
                        else []
                    )
                    rows.append(torch.cat([image[order[:count].sort().values], *rest]))
                tokens = torch.cat([tokens[:, :prefix], torch.stack(rows)], 1)
            tokens = tokens + block.ls2(block.mlp(block.norm2(tokens)))
        want = model.forward_head(model.norm(tokens))
        _prune(model, method="class_attention", keep=0.6, blocks=[1, 2], fuse=fuse)
        assert torch.allclose(model(x), want, atol=1e-4 * want.abs().max().item())


@pytest.mark.parametrize("method", ["predictor", "class_attention"])
@pytest.mark.parametrize("name", PRUNED)
def test_libraries_alike(name: str, method: Any) -> None:
    model = HOSTS[name].build()
    before, keys, (images, _) = Snapshot(model), list(model.state_dict()), HOSTS[name].batch()
    plain = logits_of(model.eval()(images))
    live, pruned = _prune(
        model, method=method, keep=0.5, blocks=[1 if method == "predictor" else 0]
    )
    with torch.no_grad():
        logits = logits_of(model(images))
        assert not torch.equal(logits, plain)
        assert torch.equal(logits_of(copy.deepcopy(model)(images)), logits)
        assert torch.allclose(logits_of(model(images[1:2])), logits[1:2], atol=1e-5)
    assert pruned.kept_positions is not None
    assert pruned.kept_positions.shape[1] - pruned.flow.prefix == 8
    with pytest.raises(GreenvisError, match="change of the run"):
        live.merge()
    live.undo()
    assert list(model.state_dict()) == keys
    assert all(before.unchanged(i) for i in range(len(before._tensors)))
    assert torch.equal(logits_of(model.eval()(images)), plain)
    assert not any(
        m._forward_hooks or m._forward_pre_hooks or "forward" in vars(m) for m in model.modules()
    )


def test_learns_beside_a_teacher() -> None:
    model, x, y = _vit(), torch.rand(4, 3, 32, 32), torch.arange(4)
    live = wrap(
        model, [TokenPrune(blocks=[1]), Distill(teacher=_vit(), temperature=1.0, weight=0.5)]
    )
    logits = model.train()(x)
    terms = live.terms(x, y, logits)
    assert "token_prune" in terms
    assert len(terms) == 2
    sum(terms.values(), F.cross_entropy(logits, y)).backward()


@pytest.mark.parametrize("method", ["predictor", "class_attention"])
def test_samples_that_leave_early_take_their_tokens_with_them(method: Any) -> None:
    model, x = HOSTS["timm-vit"].build().eval(), torch.rand(6, 3, 32, 32)
    live = wrap(model, [TokenPrune(method=method, keep=0.6, blocks=[0, 2]), EarlyExit(at=[1])])
    installed: Any = live.installed[1]
    with torch.no_grad():
        whole = model(x)
        with installed.exits.record() as exits:
            model(x)
            certainty = exits[0].softmax(-1).amax(-1)
            early = exits[0].clone()
        installed.exits.thresholds[0] = certainty.median().item()
        leave = certainty >= installed.exits.thresholds[0]
        answers = model(x)
    assert 0 < leave.sum() < 6
    assert torch.allclose(answers, torch.where(leave[:, None], early, whole), atol=1e-5)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("timm-swin", "attends in windows"),
        ("timm-eva02", "reads its patches"),
        ("transformers-dinov2", "reads its patches"),
        ("timm-resnet", "has none"),
    ],
)
def test_refusals_change_nothing(name: str, says: str) -> None:
    model = HOSTS[name].build()
    with unchanged(model), pytest.raises(BadInput, match=says):
        wrap(model, TokenPrune(blocks=[1], input_shape=HOSTS[name].input_shape))


def test_refuses_nonsense() -> None:
    for wrong in ({"keep": 0}, {"keep": 1.5}, {"method": "luck"}, {"ratio": 0.5}):
        with pytest.raises(BadInput, match=next(iter(wrong))):
            TokenPrune(**wrong)  # type: ignore[arg-type]
    model = HOSTS["timm-vit"].build()
    with pytest.raises(BadInput, match="there is no block 3: the model has 3"):
        wrap(model, TokenPrune(blocks=[0, 3]))
    with pytest.raises(BadInput, match="no block is named"):
        wrap(model, TokenPrune(blocks=[]))
    with pytest.raises(BadInput, match="set method: class_attention"):
        wrap(model, TokenPrune(fuse=True))
    with pytest.raises(BadInput, match="do not go together"):
        wrap(model, [TokenPrune(), TokenMerge()])
