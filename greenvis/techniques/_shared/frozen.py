"""What a frozen part (a teacher, the first blocks of a base) gives, computed once for each sample
and then read back.

A technique holds one `FrozenOutputs` for each frozen part and asks it for the current batch:

    cached = FrozenOutputs("teacher ResNet: logits", fingerprint(teacher), note=self.note)
    logits = cached.outputs(self.samples, lambda: logits_of(teacher(x)), device=x.device)
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from greenvis import models
from greenvis.core.technique import Samples
from greenvis.data.output_cache import Cache
from greenvis.errors import BadInput

_ONE = "output"
# of so many batches that an earlier run left, one is computed again and compared; and the
# first
CHECK_EVERY = 64


def fingerprint(module: nn.Module) -> str:
    """Return a digest of a frozen part: of its structure and every weight and buffer."""
    return models.fingerprint({**module.state_dict(), repr(module): torch.empty(0)})


def other_model(what: str, model: Any, student: nn.Module) -> nn.Module:
    """Return a frozen model beside the one that trains, by object or reference.

    Args:
        what: "the base", "the teacher 'NAME'".
        model: A model, or a reference that `models.build` takes.
        student: The one that trains.

    Raises:
        BadInput: For what is no model, and for one that shares weights with the student.
    """
    if isinstance(model, str):
        if model.startswith("run:"):
            raise BadInput(
                f"{what} names a run, '{model}': only a recipe can resolve it; give a model or "
                "'file:PATH' here"
            )
        model = models.build(model, folder=Path())
    if not isinstance(model, nn.Module):
        raise BadInput(f"{what} must be a model or a reference to one, not {type(model).__name__}")
    own = {id(t) for t in (*student.parameters(), *student.buffers())}
    shared = [n for n, t in (*model.named_parameters(), *model.named_buffers()) if id(t) in own]
    if shared or model is student:
        raise BadInput(
            f"{what} shares '{(shared or ['all'])[0]}' with the model, so it would change as that "
            "learns; give copy.deepcopy(model) or another model"
        )
    return model


class FrozenOutputs:
    """Outputs of one frozen part, kept on disk sample by sample and view by view
    (`greenvis.data.output_cache.Cache`).

    What it returns is float32 and the same from the first epoch on: also what was just computed is
    rounded as the cache rounds it.

    What an earlier run left is not believed for its checksums alone: the first batch of it, and one
    in 64 of the others, is computed again and compared (FLOPs of that are not counted); where they
    differ all is computed anew, and said.

    Args:
        part: What it is, in words ("teacher ResNet: logits").
        weights: Its `fingerprint`. The part must not change afterwards, and must give each sample's
            output whatever else is in the batch (eval mode).
        dtype, top_k, max_bytes: Of the cache.
        note: Called with a sentence where part of the key changed since an earlier run, or a file
            is damaged.
    """

    def __init__(
        self,
        part: str,
        weights: str,
        *,
        dtype: Literal["fp32", "fp16"] = "fp32",
        top_k: int | None = None,
        max_bytes: int | None = None,
        note: Callable[[str], None] | None = None,
    ) -> None:
        self.part, self.weights, self.note = part, weights, note
        self._options: dict[str, Any] = {"dtype": dtype, "top_k": top_k, "max_bytes": max_bytes}
        self._caches: dict[tuple[Any, ...], tuple[Cache, np.ndarray]] = {}
        self.hits = self.misses = self.earlier = self.checked = 0
        self._dice, self._compared = random.Random(weights), set[Path]()

    def outputs(
        self,
        samples: Samples | None,
        compute: Callable[[], Tensor],
        device: torch.device | str | None = None,
    ) -> Tensor:
        """Return the part's outputs for this batch: read back, or computed and stored.

        Args:
            samples: which samples the batch holds; None, where the loop does not say or a technique
                changed them, means: compute.
            compute: returns the outputs, (batch, …).
            device: of what is returned.

        Returns:
            float32 (batch, …).

        Raises:
            BadInput: where no view of a sample ever comes twice, and where the cache has no room.
        """
        return self.layers(samples, lambda: {_ONE: compute()}, (_ONE,), device)[_ONE]

    def layers(
        self,
        samples: Samples | None,
        compute: Callable[[], Mapping[str, Tensor]],
        names: Sequence[str],
        device: torch.device | str | None = None,
    ) -> dict[str, Tensor]:
        """Return the outputs of several layers, as `outputs` does; each has a cache of its own,
        named after the layer.

        A batch of which anything is missing is computed in full.

        Args:
            samples, device: as for `outputs`.
            compute: returns the outputs by name.
            names: of the layers.

        Returns:
            By name, float32 (batch, …).
        """
        if samples is None:
            return {name: value.float() for name, value in _computed(compute, names).items()}
        caches = {name: self._cache(samples, name, device) for name in names}
        rows = samples.view * samples.length + samples.positions.cpu().numpy()
        stored = self._read(samples, caches, device)
        complete = len(stored) == len(caches)
        earlier = int(next(iter(caches.values()))[1][rows].sum()) if complete else 0
        computed: dict[str, Tensor] = {}
        if earlier and self._is_due(caches):
            # who counts this step's FLOPs would take it for part of each step
            with _disable_current_modes():
                computed = _computed(compute, names)
            self.checked += len(rows)
            complete = self._matches(samples, caches, computed, _precision(device)[1])
        if complete:
            self.hits += len(rows)
            if earlier and not self.earlier and self.note is not None:
                self.note(
                    f"cache: outputs of '{self.part}' were computed by an earlier run; its record "
                    "has their energy"
                )
            self.earlier += earlier
        else:
            computed = computed or _computed(compute, names)
            self.misses += len(rows)
            for name, (cache, before) in caches.items():
                cache.put(samples.positions, computed[name], samples.view)
                before[rows] = False
            rounds = self._options["dtype"] != "fp32" or self._options["top_k"] is not None
            stored = {**computed, **(self._read(samples, caches, device) if rounds else {})}
        return {name: value.float().to(device) for name, value in stored.items()}

    def _is_due(self, caches: Mapping[str, tuple[Cache, np.ndarray]]) -> bool:
        """Return whether this batch is one to compare: the first of a cache, then one in
        CHECK_EVERY."""
        new = {cache.path for cache, _ in caches.values()} - self._compared
        self._compared |= new
        return bool(new) or self._dice.random() < 1 / CHECK_EVERY

    def _matches(
        self,
        samples: Samples,
        caches: Mapping[str, tuple[Cache, np.ndarray]],
        live: Mapping[str, Tensor],
        eps: float,
    ) -> bool:
        """Return whether what is kept is what the part gives now; what is not is forgotten, and
        said."""
        wrong = [
            n
            for n, (cache, _) in caches.items()
            if not cache.agrees(samples.positions, live[n], samples.view, eps)
        ]
        for cache, before in (caches[name] for name in wrong):
            cache.forget()
            before[:] = False
        if wrong and self.note is not None:
            read = ""
            if self.earlier:
                read = f"; {self.earlier} were read before that showed: --fresh trains without them"
            self.note(
                f"cache: kept outputs of '{self.part}' are not what it gives now; all are computed "
                f"anew{read}"
            )
        return not wrong

    def _read(
        self,
        samples: Samples,
        caches: Mapping[str, tuple[Cache, np.ndarray]],
        device: torch.device | str | None,
    ) -> dict[str, Tensor]:
        """Return what is there, by layer."""
        stored = {
            name: cache.get(samples.positions, samples.view, device)
            for name, (cache, _) in caches.items()
        }
        return {name: value for name, value in stored.items() if value is not None}

    def facts(self) -> dict[str, Any]:
        """Return what a report says: samples read back and computed, bytes on disk, and reads of
        what another run computed.

        checked: of those read back, how many were computed as well, to compare them.
        """
        size = sum(cache.nbytes for cache, _ in self._caches.values())
        return {
            "part": self.part,
            "hits": self.hits,
            "misses": self.misses,
            "earlier": self.earlier,
            "checked": self.checked,
            "bytes": size,
        }

    def close(self) -> None:
        """Write to disk and let go of the files."""
        for cache, _ in self._caches.values():
            cache.close()
        self._caches.clear()

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_caches": {}}  # a copy opens files of its own

    def _cache(
        self, samples: Samples, name: str, device: torch.device | str | None
    ) -> tuple[Cache, np.ndarray]:
        precision = _precision(device)[0]
        key = (
            samples.folder,
            *sorted(samples.key.items()),
            samples.length,
            samples.views,
            name,
            precision,
        )
        if key not in self._caches:
            self._caches[key] = self._open(samples, {"layer": name, "precision": precision})
        return self._caches[key]

    def _open(self, samples: Samples, more: Mapping[str, str]) -> tuple[Cache, np.ndarray]:
        if samples.views is None:
            raise BadInput(
                f"cache: nothing of '{self.part}' can be used again, for the augmentation never "
                "shows an image twice: "
                "set data.views (versions of each image that repeat), or data.augment: none"
            )
        key = {**samples.key, "part": self.part, "weights": self.weights, **more}
        cache = Cache(
            Path(samples.folder),
            key,
            length=samples.length,
            views=samples.views,
            note=self.note,
            about=("part", "layer"),
            **self._options,
        )
        # what is there now an earlier run left; what comes may be another process's of this one
        every = range(samples.length)
        return cache, torch.cat([cache.has(every, view) for view in range(samples.views)]).numpy()


def _precision(device: torch.device | str | None) -> tuple[str, float]:
    """Return in what precision is computed now, in words, and its eps; 0 where the weights say."""
    kind = torch.device(device or "cpu").type
    if not torch.is_autocast_enabled(kind):
        return "as the weights", 0.0
    dtype = torch.get_autocast_dtype(kind)
    return str(dtype), torch.finfo(dtype).eps


def _computed(
    compute: Callable[[], Mapping[str, Tensor]], names: Sequence[str]
) -> dict[str, Tensor]:
    with torch.no_grad():
        outputs = compute()
    return {name: outputs[name].detach() for name in names}


@contextmanager
def slow_path() -> Iterator[None]:
    """Keep torch from fusing a whole encoder layer in eval, which runs no hook."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
