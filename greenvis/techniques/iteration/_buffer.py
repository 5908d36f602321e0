"""Examples kept for replay: which ones stay (reservoir, ring, class-balanced, herding), and how they are stored."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

LEVELS = 255


def quantise(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return (levels uint8 like x, low, scale): each image's own range, by channel, in 255 steps.

    x: (n, channels, …), or (n, values). Images that hold 8-bit pixels, normalised or not, come back as they were where their
    range is the full one; else within 1/510 of their range.
    """
    flat = x.detach().float().flatten(2) if x.ndim > 2 else x.detach().float().unsqueeze(1)
    low, high = flat.amin(2, keepdim=True), flat.amax(2, keepdim=True)
    scale = (high - low) / LEVELS
    levels = ((flat - low) / scale.clamp_min(torch.finfo(torch.float32).tiny)).round_().to(torch.uint8)
    return levels.view(x.shape), low.squeeze(2), scale.squeeze(2)


def dequantise(levels: Tensor, low: Tensor, scale: Tensor) -> Tensor:
    """Return float32 like levels: what `quantise` was given, to within half a level."""
    shape = (*low.shape, *(1,) * (levels.ndim - 2)) if levels.ndim > 2 else low.shape
    return levels.float() * scale.view(shape) + low.view(shape)


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
    if len(labels) < size:
        return len(labels)
    counts = _counts(labels)
    most = max(counts.values())
    own = counts.get(label, 0)
    if own < most:
        largest = sorted(c for c, n in counts.items() if n == most)
        chosen = largest[randint(len(largest))]
        there = [i for i, c in enumerate(labels) if c == chosen]
        return there[randint(len(there))]
    place = randint(seen + 1)
    return [i for i, c in enumerate(labels) if c == label][place] if place < own else -1


def _counts(labels: Sequence[int]) -> dict[int, int]:
    out: dict[int, int] = {}
    for label in labels:
        out[label] = out.get(label, 0) + 1
    return out


def herding(features: Tensor, count: int) -> Tensor:
    """Return rows, int64 (count,), whose running mean stays nearest the mean of all (iCaRL: Rebuffi et al., 2017, alg. 4).

    features: (n, dim), L2-normalised here. The first k rows are the best k in the same sense, so a list is cut from behind.
    """
    features = F.normalize(features.double(), dim=1)
    mean, total = features.mean(0), torch.zeros(features.shape[1], dtype=torch.float64)
    free = torch.ones(len(features), dtype=torch.bool)
    rows: list[int] = []
    for k in range(min(count, len(features))):
        distance = (mean - (total + features) / (k + 1)).norm(dim=1).masked_fill(~free, torch.inf)
        rows.append(int(distance.argmin()))
        free[rows[-1]] = False
        total = total + features[rows[-1]]
    return torch.tensor(rows, dtype=torch.int64)


class Buffer:
    """Up to `size` examples: images (as uint8 levels, unless `exact`), labels, and whatever else belongs to each.

    Everything lies in main memory. Draws come from a generator of its own, which its state holds: a saved and loaded buffer
    goes on exactly.
    """

    def __init__(self, size: int, policy: str, seed: int, exact: bool = False) -> None:
        self.size, self.policy, self.exact = size, policy, exact
        self.columns: dict[str, Tensor] = {}
        self.filled = self.seen = 0
        self.generator = torch.Generator().manual_seed(seed)
        self._labels: list[int] = []  # of what is kept; the slots' ages and the classes' counts go with it
        self._ages: list[int] = []
        self._seen_by_class: dict[int, int] = {}

    def __len__(self) -> int:
        return self.filled

    @property
    def nbytes(self) -> int:
        """Bytes of memory that the examples take, those to come included."""
        return sum(column.nbytes for column in self.columns.values())

    @property
    def labels(self) -> Tensor:
        """The kept labels, int64 (n,)."""
        return torch.tensor(self._labels, dtype=torch.int64)

    def offer(self, x: Tensor, y: Tensor, **more: Tensor) -> None:
        """Let the policy keep what it wants of a batch: x (n, …), y int64 (n,), more: float tensors (n, …)."""
        kept: dict[int, int] = {}  # a slot taken twice holds the later one
        for row, label in enumerate(y.tolist()):
            slot = self._slot(label)
            if slot >= 0:
                kept[slot] = row
                self._label(slot, label)
            self.seen += 1
            self._seen_by_class[label] = self._seen_by_class.get(label, 0) + 1
        if kept:
            self._put(list(kept), x, y, list(kept.values()), more)

    def replace(self, x: Tensor, y: Tensor, **more: Tensor) -> None:
        """Hold exactly these examples from now on."""
        self.filled, self._labels, self._ages, self.columns = 0, [], [], {}
        for slot, label in enumerate(y.tolist()):
            self._label(slot, label)
        if len(y):
            self._put(list(range(len(y))), x, y, list(range(len(y))), more)

    def draw(self, count: int) -> Tensor:
        """Return distinct random rows, int64 (≤ count,)."""
        return torch.randperm(self.filled, generator=self.generator)[:count]

    def take(self, rows: Tensor, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
        """Return x float32 (n, …) and y int64 (n,) of these rows."""
        stored = self.columns["x"][rows]
        x = stored if self.exact else dequantise(stored, self.columns["low"][rows], self.columns["scale"][rows])
        return x.to(device), self.columns["y"][rows].to(device)

    def _slot(self, label: int) -> int:
        if self.policy == "reservoir":
            return reservoir_slot(self.seen, self.size, self._randint)
        if self.policy == "ring":
            return ring_slot(self._labels, self._ages, label, self.size)
        return balanced_slot(self._labels, label, self._seen_by_class.get(label, 0), self.size, self._randint)

    def _randint(self, below: int) -> int:
        return int(torch.randint(below, (1,), generator=self.generator))

    def _label(self, slot: int, label: int) -> None:
        if slot == self.filled:
            self._labels.append(label)
            self._ages.append(self.seen)
            self.filled += 1
        else:
            self._labels[slot], self._ages[slot] = label, self.seen

    def _put(self, slots: list[int], x: Tensor, y: Tensor, rows: list[int], more: Mapping[str, Tensor]) -> None:
        x = x.detach()[rows].cpu()
        given = {"x": x} if self.exact else dict(zip(("x", "low", "scale"), quantise(x), strict=True))
        given |= {"y": y.detach()[rows].cpu()} | {k: v.detach()[rows].float().cpu() for k, v in more.items()}
        at = torch.tensor(slots)
        for name, values in given.items():
            if name not in self.columns:
                self.columns[name] = torch.zeros(self.size, *values.shape[1:], dtype=values.dtype)
            self.columns[name][at] = values

    def state_dict(self) -> dict[str, Tensor]:
        """Return the examples and all that decides which come next."""
        counts = sorted(self._seen_by_class.items())
        return {
            **{f"column.{k}": v[: self.filled].clone() for k, v in self.columns.items()},
            "ages": torch.tensor(self._ages, dtype=torch.int64),
            "seen": torch.tensor([self.filled, self.seen]),
            "seen_by_class": torch.tensor(counts, dtype=torch.int64).reshape(-1, 2),
            "generator": self.generator.get_state(),
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take back what `state_dict` gave."""
        self.filled, self.seen = (int(v) for v in state["seen"])
        self.columns = {}
        for name, values in state.items():
            if name.startswith("column."):
                column = torch.zeros(self.size, *values.shape[1:], dtype=values.dtype)
                column[: self.filled] = values.cpu()
                self.columns[name.removeprefix("column.")] = column
        self._labels = self.columns["y"][: self.filled].tolist() if self.filled else []
        self._ages = state["ages"].tolist()
        self._seen_by_class = {int(c): int(n) for c, n in state["seen_by_class"]}
        self.generator.set_state(state["generator"].cpu())
