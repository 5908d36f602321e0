"""Queries of active learning against naive code."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from greenvis.data import queries
from greenvis.data.queries import QUERIES, Candidates, select
from greenvis.errors import BadInput

N, CLASSES, DIM = 37, 5, 7


def _candidates(labelled: int = 6, seed: int = 0) -> Candidates:
    g = torch.Generator().manual_seed(seed)
    known = torch.zeros(N, dtype=torch.bool)
    known[torch.randperm(N, generator=g)[:labelled]] = True
    logits = 2 * torch.randn(N, CLASSES, generator=g, dtype=torch.float64)
    return Candidates(
        known, logits.softmax(1), torch.randn(N, DIM, generator=g, dtype=torch.float64)
    )


@pytest.mark.parametrize("query", list(QUERIES))
@pytest.mark.parametrize("labelled", [0, 6])
def test_every_query_chooses_open_images_once_and_again_the_same(query: str, labelled: int) -> None:
    candidates = _candidates(labelled)
    for count in (1, 9, N - labelled):
        chosen = select(query, candidates, count, seed=3)
        assert chosen.dtype == torch.int64
        assert len(set(chosen.tolist())) == count
        assert not candidates.labelled[chosen].any()
        assert torch.equal(chosen, select(query, candidates, count, seed=3))
    with pytest.raises(BadInput, match="are without a label"):
        select(query, candidates, N - labelled + 1, seed=3)


def test_later_rounds_of_random_go_on_in_the_same_order() -> None:
    known = torch.zeros(N, dtype=torch.bool)
    every = select("random", Candidates(known), 12, seed=5)
    known[every[:5]] = True
    assert torch.equal(select("random", Candidates(known), 7, seed=5), every[5:])


def test_uncertainty_is_entropy_and_the_gap_of_the_two_likeliest() -> None:
    c = _candidates()
    assert c.probabilities is not None
    p = c.probabilities
    h = torch.distributions.Categorical(probs=p).entropy()
    ordered = p.sort(dim=1, descending=True).values
    for query, score in (("entropy", h), ("margin", ordered[:, 1] - ordered[:, 0])):
        score = score.masked_fill(c.labelled, -torch.inf)
        assert select(query, c, 5, 0).tolist() == score.topk(5).indices.tolist()


def test_kcenter_is_the_naive_loop() -> None:
    c = _candidates()
    assert c.features is not None
    centres, chosen = c.labelled.nonzero().squeeze(1).tolist(), []
    for _ in range(8):
        apart = [
            min(float((c.features[i] - c.features[j]).norm()) for j in centres) for i in range(N)
        ]
        chosen.append(max(range(N), key=apart.__getitem__))
        centres.append(chosen[-1])
    assert select("kcenter", c, 8, 0).tolist() == chosen


def _gradients(p: Tensor, h: Tensor) -> Tensor:
    """Of the last layer's weights, by autograd, were the likeliest class right: (n, classes·dim)."""
    out = []
    for probabilities, features in zip(p, h, strict=True):
        weight = torch.zeros(p.shape[1], h.shape[1], dtype=h.dtype, requires_grad=True)
        logits = weight @ features + probabilities.log()
        F.cross_entropy(logits[None], logits.argmax()[None]).backward()
        assert weight.grad is not None
        out.append(weight.grad.flatten())
    return torch.stack(out)


def test_badges_distances_are_those_of_the_explicit_gradients() -> None:
    c = _candidates()
    assert c.probabilities is not None
    assert c.features is not None
    p, h = c.probabilities, c.features
    q = p - F.one_hot(p.argmax(1), CLASSES)
    explicit = torch.cdist(_gradients(p, h), _gradients(p, h)).square()
    ours = torch.stack([queries.gradient_distances(q, h, i) for i in range(N)])
    torch.testing.assert_close(ours, explicit, atol=1e-5, rtol=1e-5)


def test_badge_is_kmeans_plus_plus_on_the_explicit_gradients() -> None:
    c = _candidates()
    assert c.probabilities is not None
    assert c.features is not None
    rows = c.open
    g = _gradients(c.probabilities[rows], c.features[rows])
    generator = torch.Generator().manual_seed(4)
    chosen = [int(g.norm(dim=1).argmax())]
    for _ in range(7):
        apart = torch.cdist(g, g[chosen]).square().min(1).values
        apart[chosen] = 0
        share = (apart / apart.sum()).cumsum(0)
        point = torch.rand((), generator=generator, dtype=torch.float64)
        chosen.append(int((share <= point).sum()))
    assert select("badge", c, 8, 4).tolist() == rows[chosen].tolist()


def test_badge_draws_evenly_where_no_gradient_is_left() -> None:
    sure = F.one_hot(torch.arange(N) % CLASSES, CLASSES).double()
    candidates = Candidates(torch.zeros(N, dtype=torch.bool), sure, torch.ones(N, DIM))
    assert len(set(select("badge", candidates, 10, 0).tolist())) == 10


def test_typicality_is_one_over_the_mean_distance_to_the_nearest() -> None:
    c = _candidates()
    assert c.features is not None
    x = c.features
    naive = []
    for i in range(N):
        apart = sorted(float((x[i] - x[j]).norm()) for j in range(N) if j != i)
        naive.append(1 / (sum(apart[:4]) / 4))
    torch.testing.assert_close(
        queries.typicality(x, 4), torch.tensor(naive, dtype=x.dtype), atol=1e-5, rtol=1e-5
    )


def _blobs() -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    member = torch.arange(60) % 4
    member[:9] = 0  # unequal
    return member, 5 * torch.eye(4)[member] + 0.1 * torch.randn(60, 4, generator=g)


def test_kmeans_parts_what_lies_apart() -> None:
    member, x = _blobs()
    ours = queries.kmeans(x, 4, torch.Generator().manual_seed(1))
    pairs = set(zip(member.tolist(), ours.tolist(), strict=True))
    assert len(pairs) == 4


def test_typiclust_takes_the_most_typical_of_clusters_without_a_label() -> None:
    member, x = _blobs()
    known = torch.zeros(60, dtype=torch.bool)
    known[int((member == 2).nonzero()[0])] = True
    chosen = select("typiclust", Candidates(known, features=x), 3, 0)
    assert sorted(member[chosen].tolist()) == [0, 1, 3]
    unit = F.normalize(x, dim=1)
    for row in chosen.tolist():
        rows = (member == member[row]).nonzero().squeeze(1)
        density = queries.typicality(unit[rows], min(20, len(rows) // 2))
        assert int(rows[density.argmax()]) == row
    sizes = torch.bincount(member)[member[chosen]].tolist()
    assert sizes == sorted(sizes, reverse=True)


def test_bad_input_names_the_query() -> None:
    with pytest.raises(BadInput, match=r"no query 'bagde'.*badge"):
        select("bagde", _candidates(), 1, 0)
    with pytest.raises(BadInput, match="features"):
        select("kcenter", Candidates(torch.zeros(4, dtype=torch.bool)), 1, 0)
    with pytest.raises(BadInput, match="a trained model"):
        select("margin", Candidates(torch.zeros(4, dtype=torch.bool)), 1, 0)
