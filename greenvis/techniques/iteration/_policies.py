"""Which examples a replay buffer keeps: by chance, age, class or gradient. Pure functions of what is there and what comes."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


def reservoir_slots(items: Array, size: int, randint: Callable[[Array], Array]) -> list[int]:
    """Return the slot of each of these items of a stream, -1 where it is passed over (Vitter, 1985, algorithm R).

    items: their numbers from 0, int64 (n,). randint(bounds) draws from 0 to bound - 1 for each; it is asked for items that
    come once the `size` slots are full. After n items each is kept with size / n.
    """
    slots = items.copy()
    late = slots >= size
    drawn = randint(slots[late] + 1)
    slots[late] = np.where(drawn < size, drawn, -1)
    return slots.tolist()


def ring_slot(labels: Sequence[int], ages: Sequence[int], label: int, size: int) -> int:
    """Return the slot of a new item of class `label`: each class keeps its latest size // classes (Chaudhry et al., 2019).

    labels, ages: of the items there; a smaller age is older. The oldest of the class goes, or of the largest class while
    its own has room.
    """
    if len(labels) < size:
        return len(labels)
    counts = _counts(labels)
    own = counts.get(label, 0)
    share = size // (len(counts) + (own == 0))
    leaves = label if own and own >= share else max(counts, key=lambda c: (counts[c], -c))
    return min((i for i, c in enumerate(labels) if c == leaves), key=lambda i: ages[i])


def balanced_slot(labels: Sequence[int], label: int, seen: int, size: int, randint: Callable[[int], int]) -> int:
    """Return the slot of a new item of class `label`, -1 to pass it over (CBRS: Chrysakis and Moens, 2020, algorithm 1).

    seen: items of its class so far, without it. While its class is not among the largest it takes a random item's place of
    the largest; else it enters its own class's reservoir. Balance holds whatever the stream's imbalance.
    """
    slot = greedy_slot(labels, label, size, randint)
    if slot >= 0:
        return slot
    own = [i for i, c in enumerate(labels) if c == label]
    place = randint(seen + 1)
    return own[place] if place < len(own) else -1


def greedy_slot(labels: Sequence[int], label: int, size: int, randint: Callable[[int], int]) -> int:
    """Return the slot of a new item of class `label`, -1 to pass it over (GDumb: Prabhu et al., 2020, algorithm 1).

    While its class is not among the largest it takes a random item's place of the largest; else it is passed over: first
    come, first kept.
    """
    if len(labels) < size:
        return len(labels)
    counts = _counts(labels)
    most = max(counts.values())
    if counts.get(label, 0) == most:
        return -1
    largest = sorted(c for c, n in counts.items() if n == most)
    chosen = largest[randint(len(largest))]
    there = [i for i, c in enumerate(labels) if c == chosen]
    return there[randint(len(there))]


def gradient_slot(scores: Sequence[float], score: float, size: int, draw: random.Random) -> int:
    """Return the slot of a new item, -1 to pass it over (GSS-greedy: Aljundi et al., 2019, algorithm 2).

    scores: of the items there, 1 + the greatest cosine of an item's gradient to those of others, when it came; score: of the
    new one. Only one that pulls another way (below 1) can enter; it meets an item drawn in proportion to its score.
    """
    if len(scores) < size:
        return len(scores)
    total = sum(scores)
    if score >= 1 or total <= 0:
        return -1
    slot = draw.choices(range(len(scores)), weights=scores)[0]
    return slot if draw.random() < scores[slot] / (scores[slot] + max(score, 0.0)) else -1


def _counts(labels: Sequence[int]) -> dict[int, int]:
    out: dict[int, int] = {}
    for label in labels:
        out[label] = out.get(label, 0) + 1
    return out
