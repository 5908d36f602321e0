"""Linear attention: the published numbers, the sums written out, and real modules in real models."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hosts import HOSTS
from torch import Tensor, nn

import greenvis as gv
from greenvis.core.weights import load_state
from greenvis.errors import BadInput
from greenvis.models.structure import view
from greenvis.tasks.answers import main_output
from greenvis.techniques.inference.attention._cores import (
    CORES,
    Core,
    elu,
    favor,
    hedgehog,
    polarity,
    random_fourier,
    state_space,
    token_statistics,
    weighted_sum,
)
from greenvis.techniques.inference.attention._modules import LocalConv, OwnAttention, key_weights
from greenvis.techniques.inference.attention.linear_attention import LinearAttention
from greenvis.techniques.inference.distill.distill import Distill

DATA = Path(__file__).parents[1] / "fixtures"
CLOSE: dict[str, Any] = {"atol": 1e-5, "rtol": 1e-4}
POLA = torch.load(DATA / "polaformer.pt", weights_only=True)["cases"]


def test_elu_attention_equals_the_published_one() -> None:
    case = torch.load(DATA / "linear_attention.pt", weights_only=True)
    q, k, v = (case[n].transpose(1, 2) for n in "qkv")  # there: batch, tokens, heads, dim
    got = weighted_sum(elu(q), elu(k), v).transpose(1, 2)
    torch.testing.assert_close(got, case["elu"], **CLOSE)
    core = Core("elu", 3, 8, 4, q)
    torch.testing.assert_close(core(q, k, v).transpose(1, 2), case["elu"], **CLOSE)


def test_convolution_and_gate_change_nothing_at_first_and_learn() -> None:
    plain, other = HOSTS["timm-vit"].build().eval(), HOSTS["timm-vit"].build().eval()
    x = torch.rand(2, 3, 32, 32)
    gv.wrap(plain, LinearAttention(core="polaformer"))
    live = gv.wrap(other, LinearAttention(core="polaformer", conv=5, gate=True))
    torch.testing.assert_close(main_output(other(x)), main_output(plain(x)))
    main_output(other(x)).square().sum().backward()
    own = {n: p for n, p in live.trainable.items() if "local_conv" in n or "out_gate" in n}
    assert len(own) == 3 * 4
    read = {n: p for n, p in own.items() if "blocks.2" not in n or "out_gate" in n}  # class token
    assert all(p.grad is not None and p.grad.any() for p in read.values())
    with pytest.raises(BadInput, match="must be odd"):
        gv.wrap(HOSTS["timm-vit"].build(), LinearAttention(conv=4))


@pytest.mark.parametrize("case", POLA, ids=lambda c: f"alpha{c['alpha']}-sr{c['sr_ratio']}")
def test_polarity_attention_equals_the_published_one(case: dict[str, Any]) -> None:
    state, x, heads = case["state_dict"], case["x"], case["num_heads"]
    q, g = F.linear(x, state["qg.weight"], state["qg.bias"]).chunk(2, -1)
    k, v = F.linear(x, state["kv.weight"], state["kv.bias"]).chunk(2, -1)
    scale = F.softplus(state["scale"])
    k = (k + state["positional_encoding"]) / scale
    q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q / scale, k, v))
    y = polarity(q, k, v, state["power"], case["alpha"]).transpose(1, 2).flatten(2)
    batch, dim = len(x), case["dim"]
    conv = LocalConv(case["kernel_size"], 0, case["H"] / case["W"], dim // heads, x)
    assert not conv(v).any()  # at first
    conv.depthwise.load_state_dict({n: state[f"dwc.{n}"] for n in ("weight", "bias")})
    # with a class token in front, which gets nothing
    behind = LocalConv(case["kernel_size"], 1, case["H"] / case["W"], dim // heads, x)
    behind.load_state_dict(conv.state_dict())
    padded = behind(F.pad(v, (0, 0, 1, 0), value=3.0))
    assert torch.equal(padded[:, :, 1:], conv(v))
    assert not padded[:, :, 0].any()
    y = (y + conv(v).transpose(1, 2).reshape(batch, -1, dim)) * g
    y = F.linear(y, state["proj.weight"], state["proj.bias"])
    torch.testing.assert_close(y, case["y"], **CLOSE)


def _qkv(dim: int = 6, tokens: int = 11, heads: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = torch.randn(3, 2, heads, tokens, dim, dtype=torch.float64)
    return q, k, v


def test_sums_are_softmaxs_form_with_another_kernel() -> None:
    """out_i = Σ_j φ(q_i)·φ(k_j) w_j v_j / Σ_j φ(q_i)·φ(k_j) w_j."""
    q, k, v = _qkv()
    weights = torch.rand(2, 1, 11, 1, dtype=torch.float64)
    scores = (elu(q) @ elu(k).transpose(-2, -1)) * weights.transpose(-2, -1)
    expected = scores / scores.sum(-1, keepdim=True) @ v
    got = weighted_sum(elu(q), elu(k), v, weights)
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-5)


def test_random_features_estimate_their_kernels() -> None:
    torch.manual_seed(0)
    q, k, _ = _qkv(dim=4)
    omega = torch.randn(4, 40_000, dtype=torch.float64)
    t = 4**-0.5
    got = random_fourier(q, omega) @ random_fourier(k, omega).transpose(-2, -1)
    gaussian = (-t * torch.cdist(q, k).square() / 2).exp()
    torch.testing.assert_close(got, gaussian, atol=0.03, rtol=0)
    got = favor(q / 2, omega) @ favor(k / 2, omega).transpose(-2, -1)
    softmax = (t * (q / 2) @ (k / 2).transpose(-2, -1)).exp()
    torch.testing.assert_close(got, softmax, atol=0.05, rtol=0.1)
    x = torch.randn(3, 4, dtype=torch.float64)
    u = math.sqrt(t) * x @ omega[:, :5]
    expected = torch.cat([u.cos(), u.sin()], -1) * math.sqrt(2 / 10)
    torch.testing.assert_close(random_fourier(x, omega[:, :5]), expected)


def test_what_tost_and_the_state_space_compute() -> None:
    _, k, v = _qkv()
    temperature = torch.tensor([[0.5], [1.0], [2.0]], dtype=torch.float64)
    unit = F.normalize(v, dim=-2)
    pi = (unit.square().sum(-1) * temperature).softmax(1)
    dots = (pi / (pi.sum(-1, keepdim=True) + 1e-8)).unsqueeze(-2) @ v.square()
    expected = -(v * pi.unsqueeze(-1)) / (1 + dots)
    torch.testing.assert_close(token_statistics(v, temperature), expected)
    q, k, v = _qkv(dim=5)
    steps = torch.randn(3, 5, 5, dtype=torch.float64)
    share = (k @ steps).softmax(2)
    states = torch.einsum("bhns,bhnd->bhsd", share * k, v)
    torch.testing.assert_close(state_space(q, k, v, steps), q @ states)
    phi = hedgehog(q, steps)
    torch.testing.assert_close(phi[..., :5], (q @ steps).softmax(-1))
    torch.testing.assert_close(phi[..., 5:], (-q @ steps).softmax(-1))


@pytest.mark.parametrize("kind", CORES)
def test_a_key_of_weight_zero_is_as_if_it_were_gone(kind: str) -> None:
    q, k, v = _qkv()
    core = Core(kind, 3, 6, 8, q)
    for parameter in core.parameters():
        nn.init.normal_(parameter)
    weights = torch.ones(2, 1, 11, 1, dtype=torch.float64)
    weights[:, :, 7:] = 0
    masked = core(q, k, v, weights)[:, :, :7]
    gone = core(q[:, :, :7], k[:, :, :7], v[:, :, :7])
    torch.testing.assert_close(masked, gone, atol=1e-9, rtol=1e-7)


@pytest.mark.parametrize("kind", CORES)
def test_sums_are_wide_under_autocast(kind: str) -> None:
    q, k, v = (t.bfloat16() for t in _qkv(tokens=600))
    core = Core(kind, 3, 6, 8, q.float())
    with torch.autocast("cpu", torch.bfloat16):
        got = core(q, k, v)
    assert got.dtype is torch.bfloat16
    torch.testing.assert_close(got, core(q.float(), k.float(), v.float()).bfloat16())


@pytest.mark.parametrize("kind", CORES)
def test_a_core_in_half_precision(kind: str) -> None:
    q, k, v = (t.bfloat16() for t in _qkv())
    core = Core(kind, 3, 6, 8, q.float())
    exact = core(q.float(), k.float(), v.float())
    torch.testing.assert_close(core.bfloat16()(q, k, v).float(), exact, atol=0.05, rtol=0.05)


def test_masks_of_keys_are_weights_and_others_are_refused() -> None:
    keep = torch.tensor([[True, True, False], [True, False, False]])
    weights = key_weights(keep[:, None, None], 3, padding=False)
    assert weights.shape == (2, 1, 3, 1)
    assert weights[:, 0, :, 0].tolist() == [[1, 1, 0], [1, 0, 0]]
    left_out = key_weights(~keep, 3, padding=True, inverted=True)
    assert torch.equal(left_out, weights)
    added = torch.zeros(1, 1, 1, 3).masked_fill(~keep[:1, None, None], -torch.inf)
    assert torch.equal(key_weights(added, 3, padding=False), weights[:1])
    for shape in ((3, 3), (1, 1, 3, 3), (2, 2, 3, 3)):
        with pytest.raises(BadInput, match="for each query"):
            key_weights(torch.zeros(shape), 3, padding=False)


@pytest.mark.parametrize("host", ["timm-vit", "timm-dinov2-registers", "torchvision-vit",
                                  "transformers-vit", "transformers-clip"])  # fmt: skip
def test_a_converted_model_has_real_modules_under_the_old_names(host: str) -> None:
    model = HOSTS[host].build().eval()
    keys, before = [*model.state_dict()], view(model)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    x = torch.rand(2, 3, 32, 32)
    live = gv.wrap(model, LinearAttention(core="elu"))
    own = [m for m in model.modules() if isinstance(m, OwnAttention)]
    assert len(own) == len(before.attention)
    now = model.state_dict()
    assert [k for k in now if not k.endswith("core.kind")] == keys
    with pytest.raises(BadInput, match="do not fit"):  # no plain model takes it for its own
        load_state(HOSTS[host].build(), now)
    taken: list[tuple[Tensor, ...]] = []
    own[0].core.register_forward_hook(lambda m, args, out: taken.append((*args[:3], out)))
    model(x)
    q, k, v, out = taken[0]
    torch.testing.assert_close(out, weighted_sum(elu(q), elu(k), v))
    live.undo()
    assert [*model.state_dict()] == keys
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


def test_a_mask_reaches_the_core_of_a_converted_timm_model() -> None:
    model = HOSTS["timm-vit"].build().eval()
    live = gv.wrap(model, LinearAttention(core="relu"))
    attention: Any = model.blocks[0].attn  # type: ignore[index, union-attr]
    x = torch.randn(2, 9, 32)
    keep = torch.ones(2, 1, 1, 9, dtype=torch.bool)
    keep[..., 6:] = False
    got = attention(x, attn_mask=keep)[:, :6]
    torch.testing.assert_close(got, attention(x[:, :6]), atol=1e-6, rtol=1e-5)
    with pytest.raises(BadInput, match="for each query"):
        attention(x, attn_mask=torch.zeros(9, 9))
    assert live.undo() is model


def test_the_least_harmful_attentions_are_chosen() -> None:
    model = HOSTS["timm-vit"].build().eval()
    x = torch.rand(3, 3, 32, 32)
    exact = model(x).detach().log_softmax(-1)
    harms = {}
    for i in range(3):
        live = gv.wrap(model, LinearAttention(core="relu", targets=[f"blocks.{i}.attn"]))
        harms[f"blocks.{i}.attn"] = float(
            F.kl_div(
                model(x).detach().log_softmax(-1), exact, reduction="batchmean", log_target=True
            )
        )
        live.undo()
    request = LinearAttention(core="relu").choose(model, x, 2)
    assert request.targets is not None
    assert request.targets[0] == min(harms, key=lambda path: harms[path])
    assert len({*request.targets}) == 2
    assert torch.equal(model(x).log_softmax(-1), exact)
    with pytest.raises(BadInput, match="of 3 attentions"):
        LinearAttention().choose(model, x, 4)


def test_alignment_teaches_attentions_alone() -> None:
    torch.manual_seed(0)
    model: Any = HOSTS["timm-vit"].build()
    with torch.no_grad():
        for block in model.blocks:  # fresh weights attend to all tokens alike
            block.attn.qkv.weight.mul_(8)
    x, y = torch.rand(4, 3, 32, 32), torch.tensor([0, 1, 2, 3])
    model.train()
    softmax = model(x).detach()
    live = gv.wrap(model, LinearAttention(core="hedgehog", align=1))
    optimizer = torch.optim.AdamW(live.param_groups(lr=3e-4), weight_decay=0.1)
    others = {n: p.clone() for n, p in model.named_parameters() if ".attn." not in n}
    losses = []
    for _ in range(15):
        logits = model(x)
        torch.testing.assert_close(logits, softmax)  # the original's inputs, and its answers
        loss = F.cross_entropy(logits, y) + live.loss(x, y, logits)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    task = float(F.cross_entropy(softmax, y))
    assert losses[-1] - task < 0.7 * (losses[0] - task)
    now = dict(model.named_parameters())
    assert all(torch.equal(now[n], p) for n, p in others.items())
    linear = main_output(model.eval()(x))
    assert not torch.allclose(linear, softmax)
    live.epoch_end()
    model.train()
    after = model(x)
    torch.testing.assert_close(after, linear)
    assert after.requires_grad
    assert live.undo() is model
    assert not model._forward_hooks


def test_no_teacher_is_asked_while_attentions_are_aligned() -> None:
    model: Any = HOSTS["timm-vit"].build().train()
    teacher = HOSTS["timm-vit"].build()
    x, y = torch.rand(4, 3, 32, 32), torch.tensor([0, 1, 2, 3])
    live = gv.wrap(model, [LinearAttention(align=1), Distill(teacher=teacher)])
    asked: list[Any] = []
    teacher.register_forward_hook(lambda *args: asked.append(args))
    assert set(live.terms(x, y, model(x))) == {"align"}
    assert not asked
    live.step_end()
    live.epoch_end()
    assert set(live.terms(x, y, model(x))) == {"distill_kd"}
    assert len(asked) == 1


def test_it_says_whether_it_pays(recwarn: pytest.WarningsRecorder) -> None:
    model = HOSTS["timm-vit"].build()
    live = gv.wrap(model, LinearAttention(core="polaformer"))
    live.batch(torch.rand(2, 3, 32, 32), torch.tensor([0, 1]))
    facts = live.facts()["linear_attention"]
    assert facts["tokens"] == 17
    assert facts["core_time_ratio"] > 0
    said = [str(w.message) for w in recwarn if "tokens on this machine" in str(w.message)]
    assert bool(said) == (facts["core_time_ratio"] > 1)


@pytest.mark.parametrize(
    ("host", "options", "says"),
    [
        ("timm-swin", {}, "is not converted"),
        ("timm-eva02", {}, "is not converted"),
        ("timm-resnet", {}, "no attention"),
        ("timm-vit", {"targets": ["mlp"]}, "is an attention"),
    ],
)
def test_refusals(host: str, options: dict[str, Any], says: str) -> None:
    with pytest.raises(BadInput, match=says):
        gv.wrap(HOSTS[host].build(), LinearAttention(**options))
