"""Which examples a replay buffer keeps: by chance, age, class or gradient. Pure functions of what
is there and what comes."""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Sequence
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


def reservoir_slots(items: Array, size: int, randint: Callable[[Array], Array]) -> list[int]:
    """Return the slot of each of these items of a stream, -1 where it is passed over (Vitter, 1985,
    algorithm R).

    items: their numbers from 0, int64 (n,). randint(bounds) draws from 0 to bound - 1 for each; it
    is asked for items that come once the `size` slots are full. After n items each is kept with
    size / n.
    """
    slots = items.copy()
    late = slots >= size
    drawn = randint(slots[late] + 1)
    slots[late] = np.where(drawn < size, drawn, -1)
    return slots.tolist()


def ring_slot(labels: Sequence[int], ages: Sequence[int], label: int, size: int) -> int:
    """Return the slot of a new item of class `label`: each class keeps its latest size // classes
    (Chaudhry et al., 2019).

    labels, ages: of the items there; a smaller age is older. The oldest of the class goes, or of
    the largest class while its own has room.
    """
    if len(labels) < size:
        return len(labels)
    counts = _counts(labels)
    own = counts.get(label, 0)
    share = size // (len(counts) + (own == 0))
    leaves = label if own and own >= share else max(counts, key=lambda c: (counts[c], -c))
    return min((i for i, c in enumerate(labels) if c == leaves), key=lambda i: ages[i])


def largest(labels: Sequence[int]) -> set[int]:
    """Return the classes with the most items here."""
    counts = _counts(labels)
    most = max(counts.values(), default=0)
    return {label for label, count in counts.items() if count == most}


def balanced_slot(
    labels: Sequence[int],
    label: int,
    num_seen: int,
    full: Collection[int],
    size: int,
    randint: Callable[[int], int],
) -> int:
    """Return the slot of a new item of class `label` (CBRS: Chrysakis and Moens, 2020,
    algorithm 1).

    An item of another class than the largest takes a random item's slot of the largest; one of a
    full class enters its own class's reservoir. So classes are balanced whatever the stream's
    imbalance, and what is here of each is drawn evenly from all that came of it.

    Args:
        labels: of the items here.
        label: of the new one.
        num_seen: items of its class so far, without it.
        full: classes that are the largest, or were at any time since all slots were taken; a full
            class stays full.
        size: slots.
        randint: of n, a random number from 0 to n − 1.

    Returns:
        The slot, −1 to pass the item over.
    """
    if len(labels) < size:
        return len(labels)
    if label not in full:
        return _one_of_the_largest(labels, randint)
    own = [i for i, c in enumerate(labels) if c == label]
    draw = randint(num_seen + 1)
    return own[draw] if draw < len(own) else -1


def greedy_slot(
    labels: Sequence[int],
    label: int,
    classes: Collection[int],
    size: int,
    randint: Callable[[int], int],
) -> int:
    """Return the slot of a new item of class `label`, -1 to pass it over (GDumb: Prabhu et al.,
    2020, algorithm 1).

    classes: those that came before. A new class always enters, one that came before while it holds
    fewer than size // len(classes) items: first come, first kept. Once all slots are taken it is a
    random item of the largest class that goes. Slots stay empty where classes have their share.
    """
    if label in classes and _counts(labels).get(label, 0) >= size // len(classes):
        return -1
    return len(labels) if len(labels) < size else _one_of_the_largest(labels, randint)


def _one_of_the_largest(labels: Sequence[int], randint: Callable[[int], int]) -> int:
    most = sorted(largest(labels))
    chosen = most[randint(len(most))]
    slots = [i for i, c in enumerate(labels) if c == chosen]
    return slots[randint(len(slots))]


def gradient_slot(scores: Sequence[float], score: float, size: int, draw: random.Random) -> int:
    """Return the slot of a new item, -1 to pass it over (GSS-greedy: Aljundi et al., 2019,
    algorithm 2).

    scores: of the items there, 1 + the greatest cosine of an item's gradient to those of others,
    when it came; score: of the new one. Only one that pulls another way (below 1) can enter; it
    meets an item drawn in proportion to its score.
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
