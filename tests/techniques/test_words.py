"""Soft visual words equal mc-BEiT's formula, teach no gradient through the likeness of patches, and
are the same read back from disk."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from greenvis.core.technique import Samples
from greenvis.core.wrap import Wrapped, wrap
from greenvis.errors import BadInput, GreenvisError
from greenvis.techniques._shared import words as words_
from greenvis.techniques.annotation.masked.mae import Mae, PatchWords
from greenvis.techniques.iteration.reuse.reuse import Reuse

IMAGE = (3, 16, 16)


def _vit(**more: Any) -> Any:
    from timm.models.vision_transformer import VisionTransformer

    size = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 2}
    return VisionTransformer(**{**size, "num_classes": 3, **more}).eval()


def _batches(count: int = 3) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [(torch.rand(6, *IMAGE, generator=generator), torch.zeros(6)) for _ in range(count)]


def _live(request: Any, **more: Any) -> Wrapped:
    torch.manual_seed(1)
    live = wrap(_vit(**more), request)
    live.feed(**{name: _batches() for name in live.wanted})
    return live


def test_soft_words_are_the_paper_s() -> None:
    """P = softmax(−d² / (scale τ)); W = softmax(cos / τ); P̂ = ωWP + (1 − ω)P: number by number."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(2, 5, 3, generator=generator, dtype=torch.float64)
    words = torch.randn(4, 3, generator=generator, dtype=torch.float64)
    scale, tau, omega = torch.tensor(2.5, dtype=torch.float64), 0.3, 0.2
    alike = torch.randn(2, 5, 7, generator=generator)
    found = words_.word_probabilities(features, words, scale, tau)
    near = words_.similarity(alike, 0.1)
    mixed = words_.smoothed(found, near.double(), omega)
    for image in range(2):
        own = []
        for patch in features[image].tolist():
            z = [math.exp(-(math.dist(patch, w) ** 2) / (2.5 * tau)) for w in words.tolist()]
            own.append([v / sum(z) for v in z])
        for i in range(5):
            a = alike[image, i].double()
            cosines = [float(a @ b.double() / (a.norm() * b.double().norm())) for b in alike[image]]
            row = [math.exp(c / 0.1) for c in cosines]
            for k in range(4):
                assert found[image, i, k].item() == pytest.approx(own[i][k], abs=1e-6)
                shared = sum(row[j] / sum(row) * own[j][k] for j in range(5))
                want = omega * shared + (1 - omega) * own[i][k]
                assert mixed[image, i, k].item() == pytest.approx(want, abs=1e-6)
    logits, mask = torch.randn(2, 5, 4), torch.tensor([[1.0, 0, 1, 0, 0], [0, 1, 0, 0, 0]])
    rows = [(0, 0), (0, 2), (1, 1)]
    want = -sum(mixed[r] @ logits[r].double().log_softmax(-1) for r in rows) / 3
    assert torch.allclose(words_.words_loss(logits, mixed, mask), want, atol=1e-6)


def test_words_are_centres_and_hard_ones_are_the_nearest() -> None:
    points = torch.cat([torch.randn(40, 2) * 0.05 + torch.tensor(c) for c in ((0.0, 0), (4, 4))])
    book = words_.Codebook(words_.VisualWords(count=2, kind="hard"), "points")
    book.learn(iter([points[None]]), 0)
    assert book.words is not None
    order = book.words[:, 0].argsort()
    assert torch.allclose(book.words[order], torch.tensor([[0.0, 0.0], [4.0, 4.0]]), atol=0.1)
    one_hot = book.probabilities(points[None], points[None])[0]
    assert torch.equal(one_hot.argmax(1), torch.cdist(points, book.words).argmin(1))
    assert torch.equal(one_hot.sum(1), torch.ones(80))
    few = words_.Codebook(words_.VisualWords(count=9), "points")
    with pytest.raises(BadInput, match="9 words of points are to be learned from 4 patches"):
        few.learn(iter([points[None, :4]]), 0)


@pytest.mark.parametrize("kind", ["hard", "soft", "similar"])
def test_no_gradient_flows_through_the_likeness(kind: Any, monkeypatch: Any) -> None:
    """The gradient of the loss is that with P̂ held as a constant."""
    live = _live(Mae(decoder_depth=1, target="words", words=PatchWords(count=6, kind=kind)))
    held: list[Tensor] = []
    own = words_.Codebook.probabilities

    def keep(self: Any, features: Tensor, alike: Tensor) -> Tensor:
        assert alike.requires_grad  # what it is computed from has one
        held.append(own(self, features, alike))
        return held[-1]

    monkeypatch.setattr(words_.Codebook, "probabilities", keep)
    x = _batches()[0][0]

    def gradients() -> list[Tensor]:
        torch.manual_seed(3)
        live.model.zero_grad()
        live.loss(x, None, None).backward()
        return [p.grad.clone() for p in live.trainable.values() if p.grad is not None]

    first = gradients()
    assert not held[0].requires_grad
    constant = held[0].clone()
    monkeypatch.setattr(words_.Codebook, "probabilities", lambda *_: constant)
    assert all(torch.equal(a, b) for a, b in zip(first, gradients(), strict=True))
    if kind == "similar":  # and the likeness counts
        soft = live.installed[0].codebook.spec.model_copy(update={"kind": "soft"})  # type: ignore[attr-defined]
        live.installed[0].codebook.spec = soft  # type: ignore[attr-defined]
        monkeypatch.setattr(words_.Codebook, "probabilities", keep)
        gradients()
        assert not torch.allclose(held[-1], constant)


@pytest.mark.parametrize("of", ["pixels", "hog"])
def test_masked_autoencoding_learns_words(of: Any) -> None:
    live = _live(Mae(decoder_depth=1, target="words", words=PatchWords(count=8, of=of)))
    keys = list(_vit().state_dict())
    x, losses = _batches()[0][0], []
    optimizer = torch.optim.AdamW(live.param_groups(3e-3))
    for _ in range(15):
        torch.manual_seed(0)
        loss = live.loss(x, None, None)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[0] < 1.5 * math.log(8)
    assert losses[-1] < 0.97 * losses[0]
    assert list(live.merge().state_dict()) == keys


def test_kept_words_teach_the_same(tmp_path: Path) -> None:
    """Eight words a patch, read back in half precision; a sixth of what the features take."""
    base, x = _vit(embed_dim=96, depth=3), _batches()[0][0]
    losses, sizes = {}, {}
    for targets in (("words",), ("feature",)):
        for cache in ("fp16", "off"):
            more = {"words": {"count": 20}} if targets == ("words",) else {}
            live = _live(Reuse(base=base, targets=targets, cache=cache, decoder_depth=1, **more))
            steps = []
            for _ in range(2):
                live.set_samples(Samples(tmp_path, {"images": "a"}, 6, 1, torch.arange(6)))
                torch.manual_seed(0)
                steps.append(live.loss(x, None, None).item())
            losses[targets, cache] = steps
            if cache == "fp16":
                (facts,) = live.facts()["reuse_targets"]
                assert (facts["hits"], facts["misses"]) == (6, 6)
                sizes[targets] = facts["bytes"]
            live.undo()
    words = losses[("words",), "fp16"]
    assert words[0] == words[1]
    assert words[0] == pytest.approx(losses[("words",), "off"][0], abs=1e-3)
    assert 5 < sizes[("feature",)] / sizes[("words",)] < 6.5


def test_words_go_with_the_checkpoint() -> None:
    request = Mae(decoder_depth=1, target="words", words=PatchWords(count=8))
    live, x = _live(request), _batches()[0][0]
    live.loss(x, None, None)
    again = _live(request)
    again.load_state_dict(live.state_dict())
    torch.manual_seed(0)
    want = live.loss(x, None, None)
    again.feed(train=_batches(1))  # other images would give other words
    torch.manual_seed(0)
    assert torch.equal(again.loss(x, None, None), want)


def test_refuses_words_that_change_nothing_and_images_that_are_not_there() -> None:
    with pytest.raises(BadInput, match="'words' changes nothing with target: pixels"):
        Mae(words=PatchWords(count=8))
    with pytest.raises(BadInput, match="without the target words"):
        Reuse(base=_vit(), words={"count": 8})  # type: ignore[arg-type]
    live = wrap(_vit(), Mae(target="words", decoder_depth=1))
    with pytest.raises(GreenvisError, match="there is no stream 'train'"):
        live.loss(_batches()[0][0], None, None)
