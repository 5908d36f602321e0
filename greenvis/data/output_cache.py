"""Outputs of frozen parts (a teacher, a base) kept on disk, sample by sample, so that they are
computed once.

Under the cache's folder each key has a sub-folder named after its sha256, holding `key.json`
(readable), `values.bin` (one fixed-size entry for each view and sample, memory-mapped) and
`index.bin` (a uint64 for each entry: 0 = not there, else a flag and the entry's CRC-32). An entry
counts only once its index is written, and is checked when a process first
reads it: a run killed in the middle, a file cut short or a flipped bit costs what it touched, never
a wrong number. What a
GPU has read stays in its memory where there is room: on an H200, checking and sending what enters
the last two blocks of ViT-B/16 took 1.7 times as long as the training step it spared the prefix of.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from greenvis.core import files
from greenvis.data.output_cache_entries import KINDS, Entries, checksums_of
from greenvis.data.output_cache_files import difference, locked, make_room, remove, reserve, size_of
from greenvis.errors import BadInput, GreenvisError

SCHEMA = 1
MAX_BYTES = 8 * 2**30
FILES = ("in-use", "key.json", "values.bin", "index.bin")
DEVICE_SHARE = 0.25  # of a GPU's free memory may hold entries of one cache


class Cache:
    """What a frozen part gives for each sample of a data set, on disk. Safe under several
    processes.

    Args:
        folder: Where all caches lie.
        key: What the outputs depend on, in words (checksum of the data, transform, fingerprint of
            the weights): any change is another cache.
        length: Samples.
        views: Augmented versions of each.
        dtype: "fp32" gives back what was put, bit for bit; "fp16" halves it.
        top_k: Store only the k greatest of (B, classes) logits; the others come back equal, so that
            the softmax of those stored is unchanged.
        max_bytes: For all caches in `folder` (default 8 GiB); the least recently used make room,
            those in use stay.
        note: Called with what changed in the key, or was damaged.
        about: Words of the key that say what this is; a cache that differs in one of them is not
            what `note` compares with.

    Raises:
        BadInput: For settings out of range.
    """

    def __init__(
        self,
        folder: str | Path,
        key: Mapping[str, Any],
        *,
        length: int,
        views: int = 1,
        dtype: Literal["fp32", "fp16"] = "fp32",
        top_k: int | None = None,
        max_bytes: int | None = None,
        note: Callable[[str], None] | None = None,
        about: Sequence[str] = (),
    ) -> None:
        if dtype not in KINDS:
            raise BadInput(f"cache: dtype is '{dtype}'; it is one of {', '.join(KINDS)}")
        if length < 1 or views < 1 or (top_k is not None and top_k < 1):
            raise BadInput(
                f"cache: length {length}, views {views} and top_k {top_k} must be at least 1"
            )
        self.folder = Path(folder)
        self.length, self.views = length, views
        self.dtype: Literal["fp32", "fp16"] = dtype
        self.top_k = top_k
        self.max_bytes = MAX_BYTES if max_bytes is None else max_bytes
        form = {"length": length, "views": views, "dtype": dtype, "top_k": top_k, "schema": SCHEMA}
        self._header: dict[str, Any] = {"key": {k: str(v) for k, v in key.items()}, **form}
        name = hashlib.sha256(json.dumps(self._header, sort_keys=True).encode()).hexdigest()[:32]
        self.path = self.folder / name
        self._note = note or (lambda text: warnings.warn(text, stacklevel=3))
        self._use = -1
        self._values: np.ndarray = np.empty(0)
        self._index: np.ndarray = np.empty(0, np.uint64)
        self._checked = np.zeros(length * views, bool)
        self._device_copy: Tensor | None = None
        if self.path.is_dir():
            self._open()
        elif changed := difference(self.folder, self._header, about):
            self._note(f"cache: {changed}. Outputs are computed anew")

    @property
    def complete(self) -> bool:
        """Whether every sample of every view is there."""
        return self._is_open() and bool((self._index != 0).all())

    @property
    def nbytes(self) -> int:
        """Bytes the files take; 0 before the first `put`."""
        return self._values.nbytes + self._index.nbytes if self._is_open() else 0

    def has(self, indices: Sequence[int] | Tensor, view: int = 0) -> Tensor:
        """Return which samples are stored.

        Args:
            indices: int64 (B,).
            view: Which augmented version, from 0.

        Returns:
            bool (B,).
        """
        rows = self._rows(indices, view)
        if not self._is_open() and not self._open():
            return torch.zeros(len(rows), dtype=torch.bool)
        return torch.from_numpy(self._index[rows] != 0)

    def get(
        self,
        indices: Sequence[int] | Tensor,
        view: int = 0,
        device: torch.device | str | None = None,
    ) -> Tensor | None:
        """Return the outputs of samples.

        Args:
            indices: int64 (B,).
            view: Which augmented version, from 0.
            device: Where to.

        Returns:
            float32 (B, …), or None where one is missing or damaged: compute, then `put`.
        """
        rows = self._rows(indices, view)
        if not self._is_open() and not self._open():
            return None
        checksums = self._index[rows]
        if not checksums.all():
            return None
        checked = bool(self._checked[rows].all())
        if (
            checked
            and self._device_copy is not None
            and self._device_copy.device == torch.device(device or "cpu")
        ):
            return self._device_copy[torch.from_numpy(rows).to(self._device_copy.device)]
        entries = self._values[rows]
        astray = self._entries.invalid(entries)
        damaged = rows[astray if checked else astray | (checksums_of(entries) != checksums)]
        if len(damaged):
            self._index[damaged] = 0
            self._note(
                f"cache {self.path}: {len(damaged)} kept outputs are damaged; they are computed "
                "anew"
            )
            return None
        self._checked[rows] = True
        return self._keep_on_device(rows, self._entries.unpack(entries).to(device))

    def _keep_on_device(self, rows: np.ndarray, values: Tensor) -> Tensor:
        """Return the values; a GPU that has room for all there may be holds them from now on."""
        if values.is_cuda:
            need = values.element_size() * values.shape[1:].numel() * len(self._index)
            if (
                self._device_copy is None
                and need <= DEVICE_SHARE * torch.cuda.mem_get_info(values.device)[0]
            ):
                self._device_copy = values.new_empty(len(self._index), *values.shape[1:])
                self._checked[:] = False
            if self._device_copy is not None:
                self._device_copy[torch.from_numpy(rows).to(values.device)] = values
                self._checked[rows] = True
        return values

    def put(self, indices: Sequence[int] | Tensor, outputs: Tensor, view: int = 0) -> None:
        """Store the outputs of samples.

        Args:
            indices: int64 (B,).
            outputs: (B, …).
            view: Which augmented version, from 0.

        Raises:
            BadInput: Where they cannot be stored as asked, or there is no room.
        """
        rows = self._rows(indices, view)
        if len(outputs) != len(rows):
            raise BadInput(f"cache: {len(outputs)} outputs for {len(rows)} samples")
        shape = tuple(outputs.shape[1:])
        if not self._is_open() and not self._open():
            self._create(shape)
        if shape != self._entries.shape:
            raise BadInput(
                f"cache {self.path}: outputs of shape {shape}, but it holds {self._entries.shape}; "
                "name the layer in the key"
            )
        entries = self._entries.pack(outputs.detach().float().cpu())
        self._checked[rows] = False
        self._index[rows] = 0  # a reader between the two writes finds nothing, not a half
        self._values[rows] = entries
        self._index[rows] = checksums_of(entries)

    def agrees(
        self, indices: Sequence[int] | Tensor, outputs: Tensor, view: int = 0, eps: float = 0.0
    ) -> bool:
        """Compare stored outputs of samples with what `put` would leave of `outputs`, but for
        rounding.

        Checksums tell accidents; this tells values that others put there.

        Args:
            indices: int64 (B,).
            outputs: (B, …).
            view: Which augmented version, from 0.
            eps: Of the coarsest format computed in.

        Returns:
            Whether they agree.
        """
        live = outputs.detach().float().cpu()
        if tuple(live.shape[1:]) != self._entries.shape:
            return False
        own = torch.finfo(outputs.dtype).eps if outputs.is_floating_point() else 0.0
        return self._entries.agree(self._values[self._rows(indices, view)], live, max(eps, own))

    def forget(self) -> None:
        """Let nothing count that is there, for any process."""
        if self._is_open():
            self._index[:] = 0
            self.close()
        with locked(self.folder):
            remove(self.path)

    def close(self) -> None:
        """Write to disk and let go of the files."""
        if self._use >= 0:
            for part in (self._values, self._index):
                if isinstance(part, np.memmap):
                    part.flush()
            self._values, self._index, self._device_copy = np.empty(0), np.empty(0, np.uint64), None
            os.close(self._use)
            self._use = -1

    def __del__(self) -> None:
        if getattr(self, "_use", -1) >= 0:
            os.close(self._use)

    def _rows(self, indices: Sequence[int] | Tensor, view: int) -> np.ndarray:
        samples = torch.as_tensor(indices, dtype=torch.int64).cpu().numpy()
        if not 0 <= view < self.views or (
            len(samples) and not 0 <= samples.min() <= samples.max() < self.length
        ):
            raise IndexError(
                f"sample or view outside a cache of {self.length} samples and {self.views} views"
            )
        return view * self.length + samples

    def _is_open(self) -> bool:
        """Whether the files are open and still whole: touching a mapped file that was cut short
        would kill the process."""
        if self._use < 0:
            return False
        intact = all(
            isinstance(p, np.memmap)
            and p.filename is not None
            and size_of(Path(p.filename)) == p.nbytes
            for p in (self._values, self._index)
        )
        if not intact:
            self._use, old = -1, self._use
            os.close(old)
        return intact

    def _open(self) -> bool:
        """Open what is there; what is not whole is removed, with a note."""
        if not self.path.is_dir():
            return False
        use = -1
        try:
            for path in (self.path, *(self.path / name for name in FILES)):
                if path.is_symlink():
                    raise ValueError(f"{path.name} is a link")
            use = os.open(self.path / "in-use", os.O_RDWR)
            fcntl.flock(use, fcntl.LOCK_SH)
            head = files.read_json(self.path / "key.json", "key")
            shape = tuple(head.pop("shape"))
            entries = Entries(self.dtype, self.top_k, shape)
            count, entry = self.length * self.views, entries.layout
            sizes = (size_of(self.path / "values.bin"), size_of(self.path / "index.bin"))
            if head != self._header or sizes != (count * entry.itemsize, count * 8):
                raise ValueError(
                    f"files of {sizes} bytes instead of {(count * entry.itemsize, count * 8)}"
                )
            self._values = np.memmap(self.path / "values.bin", entry, "r+", shape=(count,))
            self._index = np.memmap(self.path / "index.bin", np.uint64, "r+", shape=(count,))
            os.utime(self.path / "key.json")  # the time of the last use
        except (OSError, ValueError, KeyError, TypeError, AttributeError, BadInput) as error:
            if use >= 0:
                os.close(use)
            self._note(f"cache {self.path} is not whole ({error}); it is made anew")
            with locked(self.folder):
                remove(self.path)
            return False
        self._use, self._entries = use, entries
        self._checked[:], self._device_copy = False, None
        return True

    def _create(self, shape: tuple[int, ...]) -> None:
        """Make the files in full size under another name, then give them theirs: a reader never
        sees half of it."""
        count = self.length * self.views
        entry = Entries(self.dtype, self.top_k, shape).layout
        need = count * (entry.itemsize + 8)
        with locked(self.folder):
            if not self.path.is_dir():  # else another process was faster
                make_room(self.folder, need, self.max_bytes, self._note)
                new = Path(tempfile.mkdtemp(dir=self.folder, prefix=".new-"))
                try:
                    for name, size in (
                        ("values.bin", count * entry.itemsize),
                        ("index.bin", count * 8),
                        ("in-use", 0),
                    ):
                        with open(new / name, "wb") as file:
                            reserve(file.fileno(), size)
                    (new / "key.json").write_text(
                        json.dumps({**self._header, "shape": shape}, indent=1)
                    )
                    os.rename(new, self.path)
                except OSError as error:
                    shutil.rmtree(new, ignore_errors=True)
                    raise GreenvisError(
                        f"cache: no room for {need / 1e6:.1f} MB in {self.folder}: {error.strerror}"
                    ) from error
        if not self._open():
            raise GreenvisError(
                f"cache {self.path} vanished while it was opened; is something emptying "
                f"{self.folder}?"
            )
