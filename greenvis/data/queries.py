"""Which images a person should label next: queries of active learning, as pure functions.

Each takes what a model says of the candidates and returns positions in the order of choice. None
sees a label of an image that nobody labelled.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from greenvis.errors import BadInput, nearest

NEIGHBOURS = 20  # whose mean distance says how typical an image is (TypiClust)
LEAST_CLUSTER = 5  # images of a cluster that is queried
MOST_CLUSTERS = 500
KMEANS_STEPS = 25
ROWS = 4096  # whose distances are held at once
TINY = 1e-12


@dataclass(frozen=True)
class Candidates:
    """What a query may look at.

    Attributes:
        labelled: Which images have a label, bool (n,).
        probabilities: Of the classes, float (n, classes); None before a model is trained.
        features: What the classifier is handed, float (n, dim); None where no query needs them.
    """

    labelled: Tensor
    probabilities: Tensor | None = None
    features: Tensor | None = None

    @property
    def open(self) -> Tensor:
        """Positions without a label, int64 (m,)."""
        return (~self.labelled).nonzero().squeeze(1)


@dataclass(frozen=True)
class Query:
    """A way to choose images, and what it looks at.

    Attributes:
        choose: (candidates, count, generator) -> positions int64 (count,), in order of choice.
        answers: Whether it needs the probabilities of a trained model.
        features: Whether it needs features.
    """

    choose: Callable[[Candidates, int, torch.Generator], Tensor]
    answers: bool = False
    features: bool = False


def select(query: str, candidates: Candidates, count: int, seed: int) -> Tensor:
    """Return the images to label next.

    Args:
        query: A name of `QUERIES`.
        candidates: What it may look at.
        count: How many.
        seed: Of draws.

    Returns:
        Positions int64 (count,), each once and none with a label, in order of choice.

    Raises:
        BadInput: For a query that is none, and for more images than are without a label.
    """
    if query not in QUERIES:
        raise BadInput(f"no query '{query}'{nearest(query, QUERIES)}")
    if count > (available := len(candidates.open)):
        raise BadInput(f"{count} images to label, but {available} are without a label")
    return QUERIES[query].choose(candidates, count, torch.Generator().manual_seed(seed))


def random(candidates: Candidates, count: int, generator: torch.Generator) -> Tensor:
    """Draw uniformly. Of one seed, later rounds go on in the same order: four rounds of 20 draw the
    images of one round of 80."""
    order = torch.randperm(len(candidates.labelled), generator=generator)
    return order[~candidates.labelled[order]][:count]


def entropy(candidates: Candidates, count: int, generator: torch.Generator) -> Tensor:
    """Choose where the model's distribution over classes has the most entropy."""
    p = _answers(candidates)
    return _greatest(candidates, -(p * p.clamp_min(TINY).log()).sum(1), count)


def margin(candidates: Candidates, count: int, generator: torch.Generator) -> Tensor:
    """Choose where the two likeliest classes are nearest to each other (Scheffer et al., 2001)."""
    top = _answers(candidates).topk(2, dim=1).values
    return _greatest(candidates, top[:, 1] - top[:, 0], count)


def kcenter(candidates: Candidates, count: int, generator: torch.Generator) -> Tensor:
    """Choose, one by one, the image farthest from all that have a label or are chosen (greedy
    k-centre: Sener and Savarese, 2018, algorithm 1). Without any label, the first is drawn."""
    x, rows = _features(candidates), candidates.open
    own, centres, chosen = x[rows], x[candidates.labelled], []
    if len(centres):
        each = [torch.cdist(own, part).min(1).values for part in centres.split(ROWS)]
        apart = torch.stack(each).min(0).values
    else:
        chosen = [int(torch.randint(len(rows), (), generator=generator))]
        apart = (own - own[chosen]).norm(dim=1)
    apart[chosen] = -1.0  # a copy of a chosen image may still be chosen, itself may not
    while len(chosen) < count:
        farthest = int(apart.argmax())
        chosen.append(farthest)
        apart = torch.minimum(apart, (own - own[farthest]).norm(dim=1))
        apart[farthest] = -1.0
    return rows[chosen]


def gradient_distances(errors: Tensor, features: Tensor, index: int) -> Tensor:
    """Return how far each gradient of the last layer is from one of them, squared, without any
    gradient: of g = q ⊗ h, ‖g_i − g_j‖² = ‖q_i‖²‖h_i‖² + ‖q_j‖²‖h_j‖² − 2⟨q_i, q_j⟩⟨h_i, h_j⟩.

    Args:
        errors: q = probabilities − one-hot, (n, classes).
        features: h, (n, dim).
        index: Of the one.

    Returns:
        (n,).
    """
    squares = errors.square().sum(1) * features.square().sum(1)
    shared = (errors @ errors[index]) * (features @ features[index])
    return (squares + squares[index] - 2 * shared).clamp_min(0)


def badge(candidates: Candidates, count: int, generator: torch.Generator) -> Tensor:
    """Choose by k-means++ among the gradients that each image would give the last layer if the
    likeliest class were right (BADGE: Ash et al., 2020, algorithm 1).

    The first has the greatest gradient. Gradients are never made: distances come from their two
    factors, so that memory is n · (classes + dim), not n · classes · dim.
    """
    rows = candidates.open
    p, h = _answers(candidates)[rows], _features(candidates)[rows]
    q = p - F.one_hot(p.argmax(1), p.shape[1]).to(p.dtype)
    chosen = [int((q.square().sum(1) * h.square().sum(1)).argmax())]
    apart = gradient_distances(q, h, chosen[0])
    while len(chosen) < count:
        apart[chosen] = 0.0
        chosen.append(_drawn(apart, chosen, generator))
        apart = torch.minimum(apart, gradient_distances(q, h, chosen[-1]))
    return rows[chosen]


def typicality(features: Tensor, neighbours: int) -> Tensor:
    """Return how dense the features lie about each, 1 ÷ the mean distance to its nearest others
    (TypiClust: Hacohen et al., 2022, equation 4).

    Args:
        features: (n, dim).
        neighbours: How many others.

    Returns:
        (n,); 0 for one alone.
    """
    count = min(neighbours, len(features) - 1)
    if count < 1:
        return torch.zeros(len(features), dtype=features.dtype, device=features.device)
    means = [
        torch.cdist(part, features).topk(count + 1, dim=1, largest=False).values[:, 1:].mean(1)
        for part in features.split(ROWS)
    ]
    return 1 / torch.cat(means).clamp_min(TINY)


def typiclust(candidates: Candidates, count: int, generator: torch.Generator) -> Tensor:
    """Choose the most typical image of each of the largest clusters without a label (TypiClust:
    Hacohen et al., 2022). There are as many clusters as there will be labels; features are brought
    to length 1."""
    x = F.normalize(_features(candidates), dim=1)
    labelled = candidates.labelled.clone()
    clusters = min(int(labelled.sum()) + count, MOST_CLUSTERS, len(x))
    member = kmeans(x, clusters, generator)
    sizes = torch.bincount(member, minlength=clusters)
    covered = torch.bincount(member[labelled], minlength=clusters)
    queried = (sizes >= min(LEAST_CLUSTER, int(sizes.max()))).nonzero().squeeze(1).tolist()
    queried.sort(key=lambda c: (int(covered[c]), -int(sizes[c])))
    chosen: list[int] = []
    while len(chosen) < count:
        before = len(chosen)
        for cluster in queried[: count - len(chosen)]:
            rows = ((member == cluster) & ~labelled).nonzero().squeeze(1)
            if len(rows):
                best = rows[typicality(x[rows], min(NEIGHBOURS, max(1, len(rows) // 2))).argmax()]
                chosen.append(int(best))
                labelled[best] = True
        if len(chosen) == before:  # the clusters that are queried have no image left
            rest = (~labelled).nonzero().squeeze(1)[: count - before]
            chosen += rest.tolist()
    return torch.tensor(chosen, dtype=torch.int64)


def kmeans(x: Tensor, clusters: int, generator: torch.Generator) -> Tensor:
    """Return which cluster each row is of, by Lloyd's steps from a k-means++ start.

    Args:
        x: (n, dim).
        clusters: At most n.
        generator: Of the start.

    Returns:
        int64 (n,).
    """
    chosen = [int(torch.randint(len(x), (), generator=generator))]
    apart = (x - x[chosen[0]]).square().sum(1)
    while len(chosen) < clusters:
        chosen.append(_drawn(apart, chosen, generator))
        apart = torch.minimum(apart, (x - x[chosen[-1]]).square().sum(1))
    centres, member = x[chosen], torch.full((len(x),), -1, device=x.device)
    for _ in range(KMEANS_STEPS):
        nearest_one = torch.cat([torch.cdist(part, centres).argmin(1) for part in x.split(ROWS)])
        if torch.equal(nearest_one, member):
            break
        member = nearest_one
        counts = torch.bincount(member, minlength=clusters).to(x.dtype)
        sums = torch.zeros_like(centres).index_add_(0, member, x)
        centres = torch.where(counts[:, None] > 0, sums / counts.clamp_min(1)[:, None], centres)
    return member


def _drawn(weights: Tensor, taken: list[int], generator: torch.Generator) -> int:
    """Draw an index by weight; uniformly of those not taken where all weights are 0."""
    p = weights.double().cpu()
    if not bool((p > 0).any()):
        p = torch.ones_like(p)
        p[taken] = 0.0
    reach = p.cumsum(0)
    point = torch.rand((), generator=generator, dtype=torch.float64) * reach[-1]
    return int(torch.searchsorted(reach, point, right=True).clamp_max(int(p.nonzero()[-1])))


def _greatest(candidates: Candidates, scores: Tensor, count: int) -> Tensor:
    """Return the positions without a label that have the greatest scores; the first of equals."""
    rows = candidates.open
    return rows[scores[rows].argsort(descending=True, stable=True)[:count]]


def _answers(candidates: Candidates) -> Tensor:
    if candidates.probabilities is None:
        raise BadInput("this query needs the answers of a trained model")
    return candidates.probabilities


def _features(candidates: Candidates) -> Tensor:
    if candidates.features is None:
        raise BadInput("this query needs features of the images")
    return candidates.features


QUERIES: dict[str, Query] = {
    "random": Query(random),
    "entropy": Query(entropy, answers=True),
    "margin": Query(margin, answers=True),
    "kcenter": Query(kcenter, features=True),
    "badge": Query(badge, answers=True, features=True),
    "typiclust": Query(typiclust, features=True),
}
