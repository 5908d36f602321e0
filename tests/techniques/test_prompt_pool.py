"""A prompt pool equals the authors' port on the fixture, asks the frozen model, and heeds no
batching of tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hosts import HOSTS
from torch import Tensor

from greenvis.core.surgery import Snapshot
from greenvis.core.technique import Experience, Samples
from greenvis.core.wrap import Wrapped, wrap
from greenvis.errors import BadInput, GreenvisError
from greenvis.techniques.iteration.continual.prompt_pool import (
    PromptPool,
    majority,
    nearest_prompts,
    reduce_sim,
    similarities,
)
from greenvis.techniques.iteration.peft.adapter import Adapter

DATA = Path(__file__).parents[1] / "fixtures"


def _vit(**more: Any) -> Any:
    from timm.models.vision_transformer import VisionTransformer

    torch.manual_seed(3)
    size = {
        "img_size": 32,
        "patch_size": 8,
        "embed_dim": 16,
        "depth": 2,
        "num_heads": 2,
        "mlp_ratio": 2,
        "num_classes": 6,
    }
    return VisionTransformer(**{**size, **more}).eval()


def _images(count: int = 6) -> Tensor:
    return torch.rand(count, 3, 32, 32, generator=torch.Generator().manual_seed(count))


def _case() -> dict[str, Any]:
    (case,) = torch.load(DATA / "l2p_prompt.pt", weights_only=True)["cases"]
    return case


def test_equals_the_authors_port_on_the_fixture() -> None:
    case = _case()
    keys = case["state_dict"]["prompt_key"].clone().requires_grad_()
    similarity = similarities(case["cls_features"], keys)
    index = majority(nearest_prompts(similarity, 3), len(keys)).expand(5, -1)
    assert torch.allclose(similarity, case["similarity"], atol=1e-6)
    assert torch.equal(index, case["prompt_idx"])
    pulled = reduce_sim(similarity, index)
    assert torch.allclose(pulled, case["reduce_sim"], atol=1e-6)
    (-0.1 * pulled).backward()
    assert keys.grad is not None
    assert torch.allclose(keys.grad, case["grad_prompt_key_of_minus0p1_reduce_sim"], atol=1e-7)


def test_the_sequence_equals_the_authors_port() -> None:
    case = _case()
    model = _vit(
        class_token=False, global_pool="avg", img_size=24
    )  # 9 tokens and no class token, as in the fixture
    live = wrap(model, PromptPool(pool=6, length=2, top_n=3, select="batch"))
    pool = model.blocks[0].prompt_pool
    with torch.no_grad():
        pool.rows.copy_(case["state_dict"]["prompt"])
        pool.keys.copy_(case["state_dict"]["prompt_key"])
    pool.ask(case["cls_features"])
    x = case["x_embed"]
    assert torch.allclose(
        pool.with_rows(x, pool.rows_for(x)), case["prompted_embedding"], atol=1e-6
    )
    term = live.terms(None, None, None)["prompt_pool"]
    assert torch.allclose(term, -0.1 * case["reduce_sim"], atol=1e-6)


def _reference(model: Any, x: Tensor, pool: Any, top_n: int, readout: str) -> Tensor:
    """Wang et al., eq. 3, on timm's parts, one image at a time, the query from a model that never
    saw a prompt."""
    plain = _vit()
    plain.load_state_dict({n: t for n, t in model.state_dict().items() if "prompt_pool" not in n})
    out = []
    for image in x[:, None]:
        query = plain.forward_head(plain.forward_features(image), pre_logits=True)
        chosen = F.cosine_similarity(query, pool.keys).argsort(descending=True)[:top_n]
        tokens = model._pos_embed(model.patch_embed(image))
        prompts = pool.rows[chosen].flatten(0, 1)[None]
        tokens = torch.cat([tokens[:, :1], prompts, tokens[:, 1:]], 1)
        for block in model.blocks:
            tokens = type(block).forward(block, tokens)
        read = tokens[:, 1 : 1 + prompts.shape[1]].mean(1) if readout == "prompts" else tokens[:, 0]
        out.append(model.head(model.norm(read)))
    return torch.cat(out)


@pytest.mark.parametrize("readout", ["prompts", "class"])
@pytest.mark.parametrize("batch", [1, 2, 6])
def test_follows_the_paper_however_tests_are_batched(readout: Any, batch: int) -> None:
    model, x = _vit(), _images()
    live = wrap(model, PromptPool(pool=5, length=2, top_n=2, readout=readout))
    with torch.no_grad():
        got = torch.cat([model(part) for part in x.split(batch)])
        want = _reference(model, x, model.blocks[0].prompt_pool, 2, readout)
    assert torch.allclose(got, want, atol=1e-5)
    live.undo()


def test_a_majority_depends_on_the_batch_and_says_so() -> None:
    model, x = _vit(), _images()
    request = PromptPool(pool=5, length=2, top_n=1, select="batch")
    assert "batch_independence" in request.breaks
    assert "batch_independence" not in PromptPool().breaks
    wrap(model, request)
    with (
        torch.no_grad()
    ):  # keys that split the batch: two thirds of the images pick one, a third another
        model.blocks[0].prompt_pool.rows.mul_(30)
        model(x)
        picks = nearest_prompts(
            similarities(model.blocks[0].prompt_pool.query, model.blocks[0].prompt_pool.keys), 1
        )
        model.blocks[0].prompt_pool.keys[:2] = model.blocks[0].prompt_pool.query[:2]
        alone, together = torch.cat([model(one) for one in x[:, None]]), model(x)
    assert picks.shape == (6, 1)
    assert not torch.allclose(alone, together, atol=1e-4)


def test_only_the_pull_reaches_the_keys_and_only_picked_prompts_learn() -> None:
    model, x = _vit().train(), _images(3)
    live = wrap(model, PromptPool(pool=8, length=2, top_n=2))
    pool = model.blocks[0].prompt_pool
    logits = model(x)
    F.cross_entropy(logits, torch.arange(3)).backward()
    assert pool.keys.grad is None
    learned = pool.rows.grad.flatten(1).abs().sum(1) > 0
    assert torch.equal(learned, pool.picked > 0)
    assert int(pool.picked.sum()) == 6
    live.loss(x, None, logits).backward()
    assert torch.equal(pool.keys.grad.abs().sum(1) > 0, learned)
    assert live.terms(x, None, logits) == {}  # no forward, no term


def test_diversity_turns_to_unused_prompts_in_training_only() -> None:
    similarity = torch.tensor([[0.9, 0.5, 0.1], [0.8, 0.7, 0.0]])
    assert nearest_prompts(similarity, 1, torch.tensor([1.0, 0.1, 0.1])).tolist() == [[1], [1]]
    model, x = _vit().train(), _images()
    live = wrap(model, PromptPool(pool=6, length=1, top_n=2, diversity=1.0))
    pool = model.blocks[0].prompt_pool
    model(x)
    first = pool.picked.clone()
    live.end_experience([])
    assert torch.equal(pool.before, first)
    model(x)
    assert pool.picked[first == first.max()].sum() < first.max() * (first == first.max()).sum()
    model.eval()
    with torch.no_grad():
        chosen = nearest_prompts(similarities(pool.query, pool.keys), 2)
        pool.ask(pool.query)
        pool.rows_for(model.patch_embed(x))
    assert torch.equal(torch.bincount(chosen.flatten(), minlength=6).double(), first)
    assert live.installed[0].facts()["prompt_pool_shares"] == [
        round(s, 4) for s in live.installed[0].shares.tolist()
    ]  # type: ignore[attr-defined]


def _train(live: Wrapped, tasks: range, steps: int = 2) -> None:
    for index in tasks:
        live.begin_experience(
            Experience(index, (2 * index, 2 * index + 1), tuple(range(2 * index + 2)))
        )
        optimizer = torch.optim.AdamW(live.param_groups(1e-2))
        for step in range(steps):
            x, y = _images(4 + step), torch.arange(4 + step) % 2 + 2 * index
            live.model.train()
            logits = live.model(x)
            loss = F.cross_entropy(logits, y) + live.loss(x, y, logits)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            live.step_end()
        live.end_experience([])


def test_resumes_in_the_middle_of_a_stream(tmp_path: Path) -> None:
    request = PromptPool(pool=4, length=2, top_n=2, diversity=0.5)
    torch.manual_seed(0)
    uninterrupted = wrap(_vit(), request)
    torch.manual_seed(0)
    first, second = wrap(_vit(), request), wrap(_vit(), request)
    _train(uninterrupted, range(3))
    _train(first, range(2))
    first.save(tmp_path)
    second.load(tmp_path)
    _train(second, range(2, 3))
    x = _images()
    assert torch.equal(second.model.eval()(x), uninterrupted.model.eval()(x))
    assert torch.equal(second.installed[0].shares, uninterrupted.installed[0].shares)  # type: ignore[attr-defined]


def test_queries_are_kept_and_change_nothing(tmp_path: Path) -> None:
    def run(cache: bool, repeat: int) -> tuple[Tensor, Any]:
        model = _vit(drop_path_rate=0.5).train()
        torch.manual_seed(1)
        live = wrap(model, PromptPool(pool=4, length=2, top_n=2, cache=cache))
        x = _images()
        for _ in range(repeat):
            live.set_samples(
                Samples(tmp_path, {"images": "these"}, len(x), 1, torch.arange(len(x)))
            )
            torch.manual_seed(2)
            logits = model(x)
        live.set_samples(None)
        facts = live.facts()
        live.undo()
        return logits, facts.get("prompt_pool_queries")

    plain, nothing = run(False, 1)
    kept, facts = run(True, 2)
    assert nothing is None
    assert (facts["hits"], facts["misses"]) == (6, 6)
    assert torch.allclose(kept, plain, atol=1e-6)
    live = wrap(_vit().train(), [PromptPool(pool=4, top_n=2, cache=True), Adapter(width=2)])
    live.set_samples(Samples(tmp_path, {"images": "these"}, 6, 1, torch.arange(6)))
    with pytest.raises(GreenvisError, match=r"cannot be kept, for .*adapter.* trains"):
        live.model(_images())


@pytest.mark.parametrize("name", ["timm-vit", "torchvision-vit", "transformers-clip"])
def test_leaves_no_mark(name: str) -> None:
    model = HOSTS[name].build()
    before, keys = Snapshot(model), list(model.state_dict())
    live = wrap(model, PromptPool(pool=3, length=2, top_n=2))
    model(HOSTS[name].batch()[0])
    assert all(m.training for m in model.modules())
    with pytest.raises(GreenvisError, match="prompts are tokens"):
        live.merge()
    live.undo()
    assert list(model.state_dict()) == keys
    assert all(before.unchanged(i) for i in range(len(before._tensors)))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_refuses_nonsense() -> None:
    with pytest.raises(BadInput, match="top_n is 5, but the pool has 3 prompts"):
        PromptPool(pool=3)
    for wrong in ({"pull": 0}, {"length": 0}, {"query": "clas"}, {"diversity": 2}, {"keys": 3}):
        with pytest.raises(BadInput, match=next(iter(wrong))):
            PromptPool(**wrong)  # type: ignore[arg-type]
    with pytest.raises(BadInput, match="attends in windows"):
        wrap(HOSTS["timm-swin"].build(), PromptPool())
