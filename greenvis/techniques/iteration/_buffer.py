"""Examples kept for replay: which ones stay (by chance, age, class, gradient or herding), and how they are stored."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

Array = np.ndarray[Any, Any]
LEVELS = 255
_AT_MOST = 32  # examples that wait to be stored, in float32


def quantise(x: Array) -> tuple[Array, Array, Array]:
    """Return (levels uint8 like x, low, scale): each image's own range, by channel, in 255 steps.

    x: float32 (n, channels, …), or (n, values). Images that hold 8-bit pixels, normalised or not, come back as they were where
    their range is the full one; else within 1/510 of their range.
    """
    flat = x.reshape(len(x), x.shape[1] if x.ndim > 2 else 1, -1)
    low = flat.min(2)
    scale = (flat.max(2) - low) / np.float32(LEVELS)
    levels = np.rint((flat - low[..., None]) / np.maximum(scale, np.finfo(np.float32).tiny)[..., None])
    return levels.astype(np.uint8).reshape(x.shape), low, scale


def dequantise(levels: Array, low: Array, scale: Array, device: torch.device | str = "cpu") -> Tensor:
    """Return float32 like levels: what `quantise` was given, to within half a level. Bytes are what goes to a GPU."""
    shape = (*low.shape, *(1,) * (levels.ndim - 2)) if levels.ndim > 2 else low.shape
    if torch.device(device).type == "cpu":
        x = levels.astype(np.float32)
        x *= scale.reshape(shape)
        x += low.reshape(shape)
        return torch.from_numpy(x)
    on = [torch.from_numpy(its).to(device) for its in (levels, low.reshape(shape), scale.reshape(shape))]
    return on[0].float().mul_(on[2]).add_(on[1])


def reservoir_slot(seen: int, size: int, randint: Callable[[int], int]) -> int:
    """Return the slot of the item that comes after `seen` others, or -1 where it is passed over (Vitter, 1985, algorithm R).

    randint(n) draws from 0 to n - 1; it is asked once the `size` slots are full. After n items each is kept with size / n.
    """
    if seen < size:
        return seen
    slot = randint(seen + 1)
    return slot if slot < size else -1


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


class Buffer:
    """Up to `size` examples: images (as uint8 levels, unless `exact`), labels, and whatever else belongs to each.

    policy: "reservoir", "ring", "balanced", "greedy", or "gradient", which wants a float `score` (n,) with each offer.
    Everything lies in main memory; what is kept of a batch waits, copied, until it is asked for or more has come with it, so
    that a step pays a part of what storing costs. Draws come from a generator of its own, which its state holds: a saved and
    loaded buffer goes on exactly.
    """

    def __init__(self, size: int, policy: str, seed: int, exact: bool = False) -> None:
        self.size, self.policy, self.exact = size, policy, exact
        self._columns: dict[str, Array] = {}  # NumPy's: on a few images its calls take a third of torch's
        self._waiting: list[tuple[list[int], dict[str, Array]]] = []  # slots, and what is to be stored in them
        self._due: set[int] = set()  # all those slots
        self.filled = self.seen = 0
        self.random = random.Random(seed)  # a draw for each image offered: torch's would take longer than the images' storage
        self._labels: list[int] = []  # of what is kept; the slots' ages and the classes' counts go with it
        self._ages: list[int] = []
        self._scores: list[float] = []
        self._seen_by_class: dict[int, int] = {}

    def __len__(self) -> int:
        return self.filled

    @property
    def nbytes(self) -> int:
        """Bytes of memory that the examples take, those to come included; a label takes 8."""
        return 8 * self.size + sum(column.nbytes for column in self.columns.values())

    def facts(self) -> dict[str, int]:
        """Return what a run record says: examples, bytes in memory, and on disk as saved."""
        disk = sum(tensor.nbytes for tensor in self.state_dict().values())
        return {"buffer_images": len(self), "buffer_bytes": self.nbytes, "buffer_disk_bytes": disk}

    @property
    def labels(self) -> Tensor:
        """The kept labels, int64 (n,)."""
        return torch.tensor(self._labels, dtype=torch.int64)

    def offer(self, x: Tensor, y: Tensor, **more: Tensor) -> None:
        """Let the policy keep what it wants of a batch: x (n, …), y int64 (n,), more: float tensors (n, …)."""
        labels = y.tolist()
        scores = more.pop("score").tolist() if "score" in more else [0.0] * len(labels)
        kept: dict[int, int] = {}  # rows by slot: one taken twice holds the later
        for row, slot in enumerate(self._slots(labels, scores)):
            if slot >= 0:
                kept[slot] = row
                self._label(slot, labels[row], scores[row])
            self.seen += 1
        if kept:
            self._wait(list(kept), list(kept.values()), {"x": x, **more})

    def replace(self, x: Tensor, y: Tensor) -> None:
        """Hold exactly these examples from now on."""
        self.filled, self._labels, self._ages, self._scores, self._columns = 0, [], [], [], {}
        self._waiting, self._due = [], set()
        labels = y.tolist()
        for slot, label in enumerate(labels):
            self._label(slot, label, 0.0)
        if labels:
            self._wait([*range(len(labels))], [*range(len(labels))], {"x": x})

    def draw(self, count: int) -> list[int]:
        """Return distinct random rows, at most count."""
        if self.filled < 2 * count:
            return self.random.sample(range(self.filled), min(count, self.filled))
        rows: dict[int, None] = {}  # as `sample` does where few of many are wanted, in a third of its time
        while len(rows) < count:
            rows[int(self.random.random() * self.filled)] = None
        return list(rows)

    def take(self, rows: Sequence[int], device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
        """Return x float32 (n, …) and y int64 (n,) of these rows."""
        self._settle(rows)
        y = torch.from_numpy(np.array([self._labels[row] for row in rows], dtype=np.int64)).to(device)
        x = self._columns["x"].take(rows, 0)
        if self.exact:
            return torch.from_numpy(x).to(device), y
        its = self._columns["range"].take(rows, 0)
        return dequantise(x, its[:, 0], its[:, 1], device), y

    def column(self, name: str, rows: Sequence[int]) -> Tensor:
        """Return what was offered under this name beside the images of these rows, float32 (n, …)."""
        self._settle(rows)
        return torch.from_numpy(self._columns[name].take(rows, 0))

    @property
    def columns(self) -> dict[str, Tensor]:
        """All that is stored, by name, (size, …) each: "x", "range" (low and scale, by channel) and more; labels apart."""
        self._store()
        return {name: torch.from_numpy(its) for name, its in self._columns.items()}

    def _slots(self, labels: list[int], scores: list[float]) -> Iterable[int]:
        """Return where each new item goes, or -1; to be taken one by one, as each is noted before the next is decided."""
        if self.policy == "reservoir":  # all at once: it looks at none of them, and is asked at every step
            return [reservoir_slot(self.seen + row, self.size, self.random.randrange) for row in range(len(labels))]
        return (self._slot(label, score) for label, score in zip(labels, scores, strict=True))

    def _slot(self, label: int, score: float) -> int:
        seen = self._seen_by_class.get(label, 0)
        self._seen_by_class[label] = seen + 1
        randint = self.random.randrange
        match self.policy:
            case "ring":
                return ring_slot(self._labels, self._ages, label, self.size)
            case "greedy":
                return greedy_slot(self._labels, label, self.size, randint)
            case "gradient":
                return gradient_slot(self._scores, score, self.size, self.random)
            case _:
                return balanced_slot(self._labels, label, seen, self.size, randint)

    def _label(self, slot: int, label: int, score: float) -> None:
        if slot == self.filled:
            self._labels.append(label)
            self._ages.append(self.seen)
            self._scores.append(score)
            self.filled += 1
        else:
            self._labels[slot], self._ages[slot], self._scores[slot] = label, self.seen, score

    def _wait(self, slots: list[int], rows: list[int], batch: Mapping[str, Tensor]) -> None:
        """Note rows of a batch for these slots. Copied: whoever made the batch may write over it."""
        self._waiting.append((slots, {name: _rows(its, rows) for name, its in batch.items()}))
        self._due.update(slots)
        if len(self._due) >= _AT_MOST:
            self._store()

    def _settle(self, rows: Sequence[int]) -> None:
        if not self._due.isdisjoint(rows):
            self._store()

    def _store(self) -> None:
        if not self._waiting:
            return
        last = {slot: place for place, slot in enumerate(slot for its, _ in self._waiting for slot in its)}  # the later of two
        at, chosen = list(last), list(last.values())
        taken = {name: np.concatenate([its[name] for _, its in self._waiting])[chosen] for name in self._waiting[0][1]}
        self._waiting, self._due = [], set()
        if not self.exact:
            taken["x"], low, scale = quantise(taken["x"])
            taken["range"] = np.stack([low, scale], 1)
        for name, values in taken.items():
            if name not in self._columns:
                self._columns[name] = np.zeros((self.size, *values.shape[1:]), values.dtype)
            self._columns[name][at] = values

    def state_dict(self) -> dict[str, Tensor]:
        """Return the examples and all that decides which come next."""
        counts = sorted(self._seen_by_class.items())
        return {
            **{f"column.{k}": v[: self.filled].clone() for k, v in self.columns.items()},
            "labels": self.labels,
            "ages": torch.tensor(self._ages, dtype=torch.int64),
            "scores": torch.tensor(self._scores, dtype=torch.float64),
            "seen": torch.tensor([self.filled, self.seen]),
            "seen_by_class": torch.tensor(counts, dtype=torch.int64).reshape(-1, 2),
            "random": torch.tensor(self.random.getstate()[1], dtype=torch.int64),
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take back what `state_dict` gave."""
        self.filled, self.seen = (int(v) for v in state["seen"])
        self._columns, self._waiting, self._due = {}, [], set()
        for name, values in state.items():
            if name.startswith("column."):
                column = np.zeros((self.size, *values.shape[1:]), values.cpu().numpy().dtype)
                column[: self.filled] = values.cpu().numpy()
                self._columns[name.removeprefix("column.")] = column
        self._labels = state["labels"].tolist()
        self._ages = state["ages"].tolist()
        self._seen_by_class = {int(c): int(n) for c, n in state["seen_by_class"]}
        self._scores = state["scores"].tolist()
        version, _, gauss = self.random.getstate()
        self.random.setstate((version, tuple(state["random"].tolist()), gauss))


def _rows(its: Tensor, rows: list[int]) -> Array:
    """Return a copy of some rows, float32."""
    if its.is_cpu and its.dtype == torch.float32:
        return its.detach().numpy().take(rows, 0)
    return its.detach()[rows].float().cpu().numpy()
