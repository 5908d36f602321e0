"""Caches of keys and values: as transformers' own where nothing goes, as a masked reference where
something does, and what is refused."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import greenvis as gv
from greenvis import models
from greenvis.core.technique import PROPERTIES
from greenvis.errors import BadInput
from greenvis.techniques.inference.exits.early_exit import EarlyExit
from greenvis.techniques.inference.experts.experts import Experts
from greenvis.techniques.inference.kv_cache import _buffer
from greenvis.techniques.inference.kv_cache._layers import (
    EvictingLayer,
    HeavyHitters,
    KeyNorm,
    Observed,
    Window,
    attention_received,
)
from greenvis.techniques.inference.kv_cache.kv_cache import KvCache

PROMPT, NEW = 24, 6
ROWS: dict[str, dict[str, Any]] = {
    "window": {"rows": 9, "sinks": 2},
    "h2o": {"rows": 9},
    "snapkv": {"rows": 9, "recent": 3, "kernel": 3},
    "key_norm": {"rows": 9, "recent": 3},
}


@pytest.fixture(scope="module")
def plain() -> Any:
    torch.manual_seed(0)
    sizes = {"img_size": 32, "vision_dim": 16, "vision_depth": 1, "embed_dim": 32, "depth": 2}
    model = models.build("plain/llava", tokens=32, **sizes).eval()
    with torch.no_grad():  # attention that tells rows apart
        for name, weight in model.named_parameters():
            if "q_proj" in name or "k_proj" in name or "embed_tokens" in name:
                weight.mul_(12)
    return model


def _inputs(batch: int = 2) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    words = torch.randint(2, 31, (batch, PROMPT - 16), generator=generator)
    ids = torch.cat([torch.full((batch, 16), 32), words], 1)
    return {"input_ids": ids, "pixel_values": torch.rand(batch, 3, 32, 32, generator=generator)}


def _answer(model: Any, **more: Any) -> tuple[Tensor, Tensor]:
    """Return the tokens of an answer, and the logits of each step (steps, batch, words)."""
    out = model.generate(
        **{**_inputs(), "max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, **more},
        output_logits=True, return_dict_in_generate=True,
    )  # fmt: skip
    return out.sequences, torch.stack(list(out.logits))


@pytest.mark.parametrize("method", ROWS)
def test_bit_equal_to_transformers_where_nothing_goes(plain: Any, method: str) -> None:
    tokens, logits = _answer(plain)
    live = gv.wrap(plain, KvCache(method=method, rows=1000))
    own = _answer(plain)
    assert torch.equal(own[0], tokens)
    assert torch.equal(own[1], logits)
    assert live.installed[0].cache.layers[0].evicted == 0
    assert live.undo() is plain
    assert "generate" not in vars(plain)
    assert plain.config.text_config._attn_implementation == "sdpa"


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"num_beams": 3},
        {"prompt_lookup_num_tokens": 2, "min_new_tokens": None},  # takes rows back
        {"attention_mask": torch.tensor([[0] * 3 + [1] * (PROMPT - 3), [1] * PROMPT])},
    ],
)
def test_static_is_bit_equal_to_transformers(
    plain: Any, more: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_buffer, "SPARE", 0)  # it is full within the answer, and makes more room
    if "prompt_lookup_num_tokens" in more:
        more = {**more, **{name: rows[:1] for name, rows in _inputs().items()}}
    tokens, logits = _answer(plain, **more)
    live = gv.wrap(plain, KvCache())
    own = _answer(plain, **more)
    assert torch.equal(own[0], tokens)
    assert torch.equal(own[1], logits)
    layer = live.installed[0].cache.layers[0]
    assert layer.keys.shape[2] == tokens.shape[1] - 1
    if not more:  # rows were written, not copied
        assert layer.keys.data_ptr() == layer._keys.memory.data_ptr()
    live.undo()


def test_rows_find_their_places_when_calls_bring_one_or_many() -> None:
    generator = torch.Generator().manual_seed(2)
    layer, keys = Window(5, 2), torch.randn(1, 2, 19, 4, generator=generator)
    seen = 0
    for new in (4, 1, 1, 1, 1, 4, 1, 1, 5):
        attended, _ = layer.update(*[keys[:, :, seen : seen + new]] * 2)
        seen += new
        assert attended.shape[2] <= 5 + new
        newest = [*range(seen)] if seen <= 5 else [0, 1, *range(seen - 3, seen)]
        assert layer.positions.sort(dim=-1).values[0, 1].tolist() == newest
        own = keys.gather(2, layer.positions[..., None].expand(-1, -1, -1, 4))
        assert torch.equal(layer.keys, own)
        assert torch.equal(layer.values, own)
        assert layer.get_seq_length() == seen


class _Masked:
    """Attention over all rows, of which a mask hides those that an evicting cache let go."""

    def __init__(self, shown: list[list[Tensor]]) -> None:
        self.shown, self.calls = shown, {}

    def __call__(self, module: Any, query: Any, key: Any, value: Any, mask: Any, **kw: Any) -> Any:
        step = self.calls[module.layer_idx] = self.calls.get(module.layer_idx, -1) + 1
        products = query @ key.mT * kw["scaling"]
        rows, new = products.shape[-1], products.shape[-2]
        ahead = torch.arange(rows) > rows - new + torch.arange(new)[:, None]
        hidden = ahead.expand_as(products).clone()
        if step:  # the prompt is read in full
            visible = torch.zeros(products.shape, dtype=torch.bool)
            visible[..., -1] = True
            positions = self.shown[step - 1][module.layer_idx]
            visible.scatter_(3, positions.unsqueeze(2), True)
            hidden |= ~visible
        weights = products.masked_fill(hidden, -torch.inf).softmax(-1)
        return (weights @ value).transpose(1, 2).contiguous(), weights


@pytest.mark.parametrize("method", ROWS)
def test_equal_to_a_masked_reference_where_rows_go(
    plain: Any, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    full, _ = _answer(plain)
    live = gv.wrap(plain, KvCache(method=method, **ROWS[method]))
    shown: list[list[Tensor]] = []  # positions that stay, by step and layer
    lengths = []
    step = type(plain).forward

    @functools.wraps(step)
    def noted(self: Any, *args: Any, **kwargs: Any) -> Any:
        out = step(self, *args, **kwargs)
        cache = live.installed[0].cache
        shown.append([layer.positions.clone() for layer in cache.layers])
        lengths.append(cache.get_seq_length())
        return out

    with monkeypatch.context() as patch:
        patch.setattr(type(plain), "forward", noted)
        tokens, logits = _answer(plain)
    live.undo()
    assert lengths == list(range(PROMPT, PROMPT + NEW))  # it counts on
    assert shown[0][0].shape[2] == 9
    if method != "snapkv":  # of which the answer stays
        assert all(positions.shape[2] == 9 for positions in shown[-1])
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "masked", _Masked(shown))
    config = plain.config.text_config
    monkeypatch.setattr(config, "_attn_implementation_internal", "masked")
    reference = _answer(plain)
    assert torch.equal(tokens, reference[0])
    torch.testing.assert_close(logits, reference[1], atol=1e-5, rtol=1e-5)
    assert not torch.equal(logits[-1], _unmasked(plain, monkeypatch))
    assert full.shape == tokens.shape


def _unmasked(plain: Any, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    monkeypatch.setattr(plain.config.text_config, "_attn_implementation_internal", "sdpa")
    return _answer(plain)[1][-1]


def test_eager_attention_is_observed_too(plain: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = {}
    for kind in ("sdpa", "eager"):
        monkeypatch.setattr(plain.config.text_config, "_attn_implementation_internal", kind)
        live = gv.wrap(plain, KvCache(method="h2o", rows=9))
        answers[kind] = _answer(plain)[1]
        live.undo()
        assert plain.config.text_config._attn_implementation == kind
    torch.testing.assert_close(answers["sdpa"], answers["eager"], atol=1e-4, rtol=1e-4)


def _given(layer: EvictingLayer, keys: Tensor, queries: Tensor) -> EvictingLayer:
    layer.update(keys, keys)
    if layer.reads_queries:
        layer.observe(queries, 0.5)
        layer.evict()
    return layer


def test_policies_keep_what_their_papers_say() -> None:
    generator = torch.Generator().manual_seed(3)
    keys = torch.randn(1, 2, 11, 4, generator=generator)
    queries = torch.randn(1, 4, 11, 4, generator=generator)  # two to a key's head
    repeated = keys.repeat_interleave(2, 1)
    hidden = torch.ones(11, 11).triu(1).bool()
    weights = (queries @ repeated.mT * 0.5).masked_fill(hidden, -torch.inf).softmax(-1)
    by_head = weights.view(1, 2, 2, 11, 11).sum(2)
    received = attention_received(queries, keys, 0.5)
    torch.testing.assert_close(received, by_head.sum(2), atol=1e-6, rtol=1e-6)

    window = _given(Window(5, 2), keys, queries)
    assert window.positions[0, 0].tolist() == [0, 1, 8, 9, 10]
    norm = _given(KeyNorm(5, 2), keys, queries)
    short = keys[0, 1, :9].norm(dim=-1).argsort()[:3].sort().values
    assert norm.positions[0, 1].tolist() == [*short.tolist(), 9, 10]
    hitters = _given(HeavyHitters(5), keys, queries)
    best = by_head.sum(2)[0, 0, :9].argsort(descending=True)[:3].sort().values
    assert hitters.positions[0, 0].tolist() == [*best.tolist(), 9, 10]
    observed = _given(Observed(5, 2, 3), keys, queries)
    last = by_head[0, 1, -2:, :].sum(0)
    last[-2:] = 0
    padded = torch.cat([torch.zeros(1), last, torch.zeros(1)])
    pooled = torch.stack([padded[i : i + 3].mean() for i in range(11)])[:9]
    best = pooled.argsort(descending=True)[:3].sort().values
    assert observed.positions[0, 1].tolist() == [*best.tolist(), 9, 10]
    torch.testing.assert_close(observed.keys[0, 1], keys[0, 1, observed.positions[0, 1]])
    assert (observed.get_seq_length(), observed.get_mask_sizes(1)) == (11, (6, 6))


def test_heavy_hitters_add_up_over_the_answer() -> None:
    generator = torch.Generator().manual_seed(4)
    layer = HeavyHitters(4)
    first, then = torch.randn(2, 1, 1, 6, 4, generator=generator)
    _given(layer, first, first)
    before, kept = layer.received.clone(), layer.positions.clone()
    layer.update(then[:, :, :1], then[:, :, :1])
    layer.observe(then[:, :, :1], 0.5)
    now = (then[:, :, :1] @ layer.keys.mT * 0.5).softmax(-1)[0, 0, 0]
    torch.testing.assert_close(layer.received[0, 0, :4], before[0, 0] + now[:4])
    assert kept.shape == (1, 1, 4)


def test_beams_take_their_rows_along(plain: Any) -> None:
    live = gv.wrap(plain, KvCache(method="h2o", rows=1000))
    own = plain.generate(**_inputs(), max_new_tokens=NEW, num_beams=3, do_sample=False)
    live.undo()
    assert torch.equal(
        own, plain.generate(**_inputs(), max_new_tokens=NEW, num_beams=3, do_sample=False)
    )


def test_undo_within_copies_and_refusals_leave_the_model_alone(plain: Any) -> None:
    import copy

    tokens, _ = _answer(plain)
    live = gv.wrap(plain, KvCache(method="window", rows=0.5))
    twin = copy.deepcopy(plain)
    assert torch.equal(_answer(twin)[0], _answer(plain)[0])
    live.undo()
    assert torch.equal(_answer(plain)[0], tokens)


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"attention_mask": torch.tensor([[0] * 3 + [1] * (PROMPT - 3), [1] * PROMPT])},
         "padded.*one by one, or set method: static"),
        ({"past_key_values": DynamicCache()}, "past_key_values, and kv_cache makes the cache"),
        ({"use_cache": False}, "leave it out, or undo"),
        ({"prompt_lookup_num_tokens": 2}, "leave it out, or set method: static"),
        ({"assistant_early_exit": 1}, "leave it out, or set method: static"),
        ({"assistant_model": torch.nn.Linear(2, 2)}, "leave it out, or set method: static"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("method", ROWS)
def test_what_rows_that_go_would_break_is_refused(
    plain: Any, method: str, more: dict[str, Any], says: str
) -> None:
    live = gv.wrap(plain, KvCache(method=method, rows=4))
    try:
        with pytest.raises(BadInput, match=says):
            plain.generate(**_inputs(), **more)
        padded = _inputs()
        padded["input_ids"][0, :2] = 0
        with pytest.raises(BadInput, match="padded"):
            plain.generate(**padded)
    finally:
        live.undo()


def test_models_and_techniques_it_does_not_go_with_are_refused(plain: Any) -> None:
    with pytest.raises(BadInput, match="does not generate"):
        gv.wrap(torch.nn.Linear(2, 2), KvCache())
    with pytest.raises(BadInput, match="one answer per forward"):
        gv.wrap(torch.nn.Linear(2, 2), KvCache(), task="classification")
    for other, what in (
        (EarlyExit(at=(1,)), PROPERTIES["every_block"]),
        (Experts(routing="expert_choice"), PROPERTIES["batch_independence"]),
    ):
        for cache in (KvCache(), KvCache(method="snapkv")):
            with pytest.raises(BadInput, match=f"{what}.*remove one"):
                gv.wrap(plain, [other, cache])
    assert "generate" not in vars(plain)
    with pytest.raises(BadInput, match="odd number"):
        gv.wrap(torch.nn.Linear(2, 2), KvCache(method="snapkv", kernel=4))
    with pytest.raises(BadInput, match="rows"):
        KvCache(method="window", rows=0)
    with pytest.raises(BadInput, match="sinks"):
        KvCache(method="h2o", sinks=3)
