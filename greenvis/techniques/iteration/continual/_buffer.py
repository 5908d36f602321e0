"""Examples kept for replay: how they are stored, and which come back."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from greenvis.techniques.iteration.continual._policies import (
    Array,
    balanced_slot,
    gradient_slot,
    greedy_slot,
    largest,
    reservoir_slots,
    ring_slot,
)

LEVELS = 255
_WAITING = 32  # examples that wait to be stored, at most
_AHEAD = (
    4  # steps whose draws are taken out at once: on a few images calls cost more than their work
)
_FATES = 256  # items of a reservoir whose fate is drawn at once, for the same reason
_VALUES = 1 << 20  # at most, of what waits and of what is drawn ahead: 4 MB of float32 each


def quantise(x: Array) -> tuple[Array, Array, Array]:
    """Return (levels uint8 like x, low, scale): each image's own range, by channel, in 255 steps.

    x: float32 (n, channels, …), or (n, values). Images that hold 8-bit pixels, normalised or not,
    come back as they were where their range is the full one; else within 1/510 of their range.
    """
    flat = x.reshape(len(x), x.shape[1] if x.ndim > 2 else 1, -1)
    low = flat.min(2)
    scale = (flat.max(2) - low) / np.float32(LEVELS)
    levels = np.rint(
        (flat - low[..., None]) / np.maximum(scale, np.finfo(np.float32).tiny)[..., None]
    )
    return levels.astype(np.uint8).reshape(x.shape), low, scale


def dequantise(
    levels: Array, low: Array, scale: Array, device: torch.device | str = "cpu"
) -> Tensor:
    """Return float32 like levels: what `quantise` was given, to within half a level. Bytes are what
    goes to a GPU."""
    shape = (*low.shape, *(1,) * (levels.ndim - 2)) if levels.ndim > 2 else low.shape
    on = [
        torch.from_numpy(array).to(device)
        for array in (levels, low.reshape(shape), scale.reshape(shape))
    ]
    return on[0].float().mul_(on[2]).add_(on[1])


class Buffer:
    """Up to `size` examples: images (as uint8 levels, unless `exact`), labels, and whatever else
    belongs to each.

    policy: "reservoir", "ring", "balanced", "greedy", or "gradient", which wants a float `score`
    (n,) with each offer. Everything lies in main memory; what is kept of a batch waits, copied,
    until it is asked for or more has come with it, and
    what is drawn is drawn for some steps at once, so that a step pays a part of what either costs:
    up to 4 MB of float32 each, beside `nbytes`. Draws come from a generator of its own, which its
    state holds: a saved and loaded buffer goes on exactly.
    """

    def __init__(self, size: int, policy: str, seed: int, exact: bool = False) -> None:
        self.size, self.policy, self.exact = size, policy, exact
        # NumPy's: on a few images its calls take a third of torch's
        self._columns: dict[str, Array] = {}
        self._waiting: dict[str, Array] = {}  # float32, the first rows of which are to be stored
        self._due: list[int] = []  # in these slots
        self._fates: list[int] = []  # of a reservoir's next items: their slots, or -1
        self._drawn: list[list[int]] = []  # the next steps' rows, the last first
        # what these rows held when they were taken out
        self._ready: list[tuple[Tensor, Tensor]] = []
        self._changed: set[int] = set()  # slots that got another example since then
        self.filled = self.num_seen = 0
        # a draw for each image offered: torch's would take longer than the images' storage
        self.random = random.Random(seed)
        # of what is kept; the slots' ages and the classes' counts go with it
        self._labels: list[int] = []
        self._ages: list[int] = []
        self._scores: list[float] = []
        self._seen_per_class: dict[int, int] = {}
        # classes that are the largest, or once were, of a buffer with no slot left
        self._full: set[int] = set()

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
        """Let the policy keep what it wants of a batch: x (n, …), y int64 (n,), more: float tensors
        (n, …)."""
        labels = y.tolist()
        scores = more.pop("score").tolist() if "score" in more else [0.0] * len(labels)
        row_of_slot: dict[int, int] = {}  # rows by slot: one taken twice holds the later
        for row, slot in enumerate(self._slots(labels, scores)):
            if slot >= 0:
                row_of_slot[slot] = row
                self._label(slot, labels[row], scores[row], self.num_seen + row)
        self.num_seen += len(labels)
        if row_of_slot:
            self._wait(list(row_of_slot), list(row_of_slot.values()), {"x": x, **more})

    def replace(self, x: Tensor, y: Tensor) -> None:
        """Hold exactly these examples from now on."""
        self.filled, self._labels, self._ages, self._scores, self._columns = 0, [], [], [], {}
        self._due, self._drawn, self._ready = [], [], []
        labels = y.tolist()
        for slot, label in enumerate(labels):
            self._label(slot, label, 0.0, self.num_seen)
        if labels:
            self._wait([*range(len(labels))], [*range(len(labels))], {"x": x})

    def draw(self, count: int) -> list[int]:
        """Return distinct random rows, at most count."""
        if self.filled < 2 * count:
            return self.random.sample(range(self.filled), min(count, self.filled))
        # as `sample` does where few of many are wanted, in a fifth of its time
        rows: dict[int, None] = {}
        uniform, filled = self.random.random, self.filled
        while len(rows) < count:
            rows[int(uniform() * filled)] = None
        return list(rows)

    def sample(
        self, count: int, device: torch.device | str = "cpu"
    ) -> tuple[list[int], Tensor, Tensor]:
        """Return (rows, x, y) of distinct random examples, at most count: a `draw`, and what its
        rows hold now.

        A full buffer draws for several steps and takes all theirs out of bytes at once; what
        changes meanwhile is taken again.
        """
        if self.filled < self.size or count > self.size:
            rows = self.draw(count)
            return rows, *self.take(rows, device)
        if not self._drawn or len(self._drawn[-1]) < count:
            self._drawn = [self.draw(count) for _ in range(self._steps_ahead(count))]
            self._ready = []
        if not self._ready or self._ready[-1][0].device != torch.device(device):
            each = len(self._drawn[-1])
            x, y = self.take([row for rows in self._drawn for row in rows], device)
            self._ready, self._changed = [*zip(x.split(each), y.split(each), strict=True)], set()
        rows, (x, y) = self._drawn.pop()[:count], self._ready.pop()
        if len(rows) < len(y) or not self._changed.isdisjoint(rows):
            x, y = self.take(rows, device)
        return rows, x, y

    def _steps_ahead(self, count: int) -> int:
        self._store()
        values = self._columns["x"][0].size
        return max(1, min(_AHEAD, _VALUES // (count * values)))

    def take(
        self, rows: Sequence[int], device: torch.device | str = "cpu"
    ) -> tuple[Tensor, Tensor]:
        """Return x float32 (n, …) and y int64 (n,) of these rows."""
        self._settle(rows)
        y = torch.from_numpy(np.array([self._labels[row] for row in rows], dtype=np.int64)).to(
            device
        )
        x = self._columns["x"].take(rows, 0)
        if self.exact:
            return torch.from_numpy(x).to(device), y
        ranges = self._columns["range"].take(rows, 0)
        return dequantise(x, ranges[:, 0], ranges[:, 1], device), y

    def column(self, name: str, rows: Sequence[int]) -> Tensor:
        """Return what was offered under this name beside the images of these rows, float32 (n,
        …)."""
        self._settle(rows)
        return torch.from_numpy(self._columns[name].take(rows, 0))

    @property
    def columns(self) -> dict[str, Tensor]:
        """All that is stored, by name, (size, …) each: "x", "range" (low and scale, by channel) and
        more; labels apart."""
        self._store()
        return {name: torch.from_numpy(array) for name, array in self._columns.items()}

    def _slots(self, labels: list[int], scores: list[float]) -> Iterable[int]:
        """Return where each new item goes, or -1; to be taken one by one, as each is noted before
        the next is decided."""
        # ahead: it looks at none of them, and is asked at every step
        if self.policy == "reservoir":
            if len(self._fates) < len(labels):
                first = self.num_seen + len(self._fates)
                self._fates += reservoir_slots(
                    np.arange(first, first + len(labels) + _FATES), self.size, self._below
                )
            now, self._fates = self._fates[: len(labels)], self._fates[len(labels) :]
            return now
        return (self._slot(label, score) for label, score in zip(labels, scores, strict=True))

    def _slot(self, label: int, score: float) -> int:
        slot = self._chosen(label, score)
        self._seen_per_class[label] = self._seen_per_class.get(label, 0) + 1
        return slot

    def _chosen(self, label: int, score: float) -> int:
        randint, before = self.random.randrange, self._seen_per_class
        match self.policy:
            case "ring":
                return ring_slot(self._labels, self._ages, label, self.size)
            case "greedy":
                return greedy_slot(self._labels, label, before, self.size, randint)
            case "gradient":
                return gradient_slot(self._scores, score, self.size, self.random)
            case _:
                if self.filled == self.size:
                    self._full |= largest(self._labels)
                return balanced_slot(
                    self._labels, label, before.get(label, 0), self._full, self.size, randint
                )

    def _below(self, bounds: Array) -> Array:
        """Return a random integer from 0 to bound - 1 for each, int64."""
        bits = np.frombuffer(self.random.randbytes(8 * len(bounds)), "<u8") >> np.uint64(11)
        return (bits * (bounds * 2.0**-53)).astype(np.int64)

    def _label(self, slot: int, label: int, score: float, age: int) -> None:
        if slot == self.filled:
            self._labels.append(label)
            self._ages.append(age)
            self._scores.append(score)
            self.filled += 1
        else:
            self._labels[slot], self._ages[slot], self._scores[slot] = label, age, score

    def _wait(self, slots: list[int], rows: list[int], batch: Mapping[str, Tensor]) -> None:
        """Note rows of a batch for these slots. Copied: whoever made the batch may write over
        it."""
        if not self._waiting:
            room = max(1, min(_WAITING, _VALUES // max(1, batch["x"][0].numel())))
            self._waiting = {
                name: np.empty((room, *tensor.shape[1:]), np.float32)
                for name, tensor in batch.items()
            }
        self._changed.update(slots)
        while rows:
            start, room = len(self._due), len(self._waiting["x"]) - len(self._due)
            for name, tensor in batch.items():
                _copy(tensor, rows[:room], self._waiting[name][start : start + len(rows)])
            self._due += slots[:room]
            slots, rows = slots[room:], rows[room:]
            if rows:
                self._store()

    def _settle(self, rows: Sequence[int]) -> None:
        if self._due and not set(self._due).isdisjoint(rows):
            self._store()

    def _store(self) -> None:
        if not self._due:
            return
        taken = {name: array[: len(self._due)] for name, array in self._waiting.items()}
        if not self.exact:
            taken["x"], low, scale = quantise(taken["x"])
            taken["range"] = np.stack([low, scale], 1)
        for name, values in taken.items():
            if name not in self._columns:
                self._columns[name] = np.zeros((self.size, *values.shape[1:]), values.dtype)
            self._columns[name][self._due] = values  # of two for one slot the later stays
        self._due = []

    def state_dict(self) -> dict[str, Tensor]:
        """Return the examples and all that decides which come next."""
        counts = sorted(self._seen_per_class.items())
        return {
            **{f"column.{k}": v[: self.filled].clone() for k, v in self.columns.items()},
            "labels": self.labels,
            "ages": torch.tensor(self._ages, dtype=torch.int64),
            "scores": torch.tensor(self._scores, dtype=torch.float64),
            "seen": torch.tensor([self.filled, self.num_seen]),
            "seen_by_class": torch.tensor(counts, dtype=torch.int64).reshape(-1, 2),
            "full": torch.tensor(sorted(self._full), dtype=torch.int64),
            "fates": torch.tensor(self._fates, dtype=torch.int64),
            "drawn": torch.tensor(self._drawn, dtype=torch.int64),
            "random": torch.tensor(self.random.getstate()[1], dtype=torch.int64),
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take back what `state_dict` gave."""
        self.filled, self.num_seen = (int(v) for v in state["seen"])
        self._columns, self._waiting, self._due, self._ready = {}, {}, [], []
        self._fates, self._drawn = state["fates"].tolist(), state["drawn"].tolist()
        for name, values in state.items():
            if name.startswith("column."):
                column = np.zeros((self.size, *values.shape[1:]), values.cpu().numpy().dtype)
                column[: self.filled] = values.cpu().numpy()
                self._columns[name.removeprefix("column.")] = column
        self._labels = state["labels"].tolist()
        self._ages = state["ages"].tolist()
        self._seen_per_class = {int(c): int(n) for c, n in state["seen_by_class"]}
        self._full = set(state["full"].tolist())
        self._scores = state["scores"].tolist()
        version, _, gauss = self.random.getstate()
        self.random.setstate((version, tuple(state["random"].tolist()), gauss))


def _copy(tensor: Tensor, rows: list[int], to: Array) -> None:
    """Copy some rows of a tensor into a float32 array."""
    if tensor.is_cpu and tensor.dtype == torch.float32 and not tensor.requires_grad:
        tensor.numpy().take(rows, 0, to, "clip")  # "raise", the default, would copy twice
    else:
        to[:] = tensor.detach()[rows].float().cpu().numpy()
