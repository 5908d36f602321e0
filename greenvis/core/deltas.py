"""Deltas: what a wrapped model learned, as tensors: in files, and several under names of which the
model shows one."""

from __future__ import annotations

import json
import os
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from greenvis.core import distributed, files, weights
from greenvis.core.beside import BESIDE, FORM, LIVE, pop_technique_state, restore_technique_state
from greenvis.core.surgery import Snapshot
from greenvis.errors import BadInput, GreenvisError, nearest, some

if TYPE_CHECKING:
    from greenvis.core.technique import Installed, Technique

DELTA_FILE, CARD_FILE = "delta.safetensors", "delta.json"


class Deltas:
    """The part of a wrapped model that saves, loads and switches what was learned."""

    model: nn.Module
    techniques: tuple[Technique, ...]
    _snapshot: Snapshot
    _learned: set[int]

    def __init__(self) -> None:
        self._named: dict[str, dict[str, Tensor]] = {}
        self._unnamed: dict[str, Tensor] = {}  # what the model held before the first switch
        self.in_use: str | None = None

    def _register(self) -> None:
        """Note that the techniques are at work on the model."""
        self.model.register_load_state_dict_pre_hook(pop_technique_state)
        self.model.register_load_state_dict_post_hook(restore_technique_state)
        LIVE[self.model] = tuple(t.name for t in self.techniques), weakref.ref(self)

    @property
    def active(self) -> bool:
        """Whether the techniques are at work: until `merge` or `undo`."""
        return self.model in LIVE and LIVE[self.model][1]() is self

    if TYPE_CHECKING:

        @property
        def trainable(self) -> dict[str, nn.Parameter]: ...
        def recipe_form(self) -> list[Any]: ...
        def fold(self) -> None: ...
        def _pairs(self) -> Iterator[tuple[Technique, Installed]]: ...

    def state_dict(self) -> dict[str, Tensor]:
        """Return the delta only.

        Returns:
            Tensors by name: parameters that train, trained or were added; buffers that changed; the
            techniques' own state.
        """
        distributed.refuse_sharding(self.model)
        changed = self._snapshot.changed_buffers() | self._learned
        before = {id(t) for t in self._snapshot._tensors}
        saved = self.model.state_dict(keep_vars=True)
        state = {
            f"model.{n}": t.detach()
            for n, t in saved.items()
            if t.requires_grad or id(t) in changed or id(t) not in before
        }
        for technique, live in self._pairs():
            state.update({f"{technique.name}.{k}": v for k, v in live.state_dict().items()})
        return state

    def plain_state_dict(self) -> dict[str, Tensor]:
        """Return what the state of the model would be after `merge`; the model itself stays as it
        is.

        Returns:
            Tensors in CPU memory by name, which a plain model of the same kind takes without
            greenvis.

        Raises:
            GreenvisError: Where a technique cannot be folded.
        """
        if not self.active:
            return _copies(self.model.state_dict())
        self.check_foldable()
        now = Snapshot(self.model, also=self._snapshot.modules)
        try:
            self.fold()
            return _copies(self.model.state_dict())
        finally:
            now.restore()

    def check_foldable(self) -> None:
        """Raise GreenvisError where a technique cannot be folded into the model's own weights."""
        for technique, live in self._pairs():
            if live.unmergeable:
                raise GreenvisError(f"{technique.name} cannot be merged: {live.unmergeable}")

    def checkpoint_state(self) -> dict[str, Tensor]:
        """Return what the techniques are and hold, under names to put beside those of the model's
        own `state_dict`.

        A model with the same techniques takes both back by its `load_state_dict`; any other
        refuses. Of several processes each has to save for itself what it holds alone (a share of a
        replay buffer), which is not included.

        Returns:
            Tensors by name.
        """
        shared = [
            (t, live)
            for t, live in self._pairs()
            if not t.rank_local or distributed.world_size() == 1
        ]
        own = {
            f"{BESIDE}{t.name}.{k}": v.detach()
            for t, live in shared
            for k, v in live.state_dict().items()
        }
        return self.checkpoint_config() | own

    def checkpoint_config(self) -> dict[str, Tensor]:
        """Return what the techniques are, as `checkpoint_state`, without what they hold."""
        form = json.dumps(self.recipe_form(), sort_keys=True).encode()
        return {BESIDE + FORM: torch.frombuffer(bytearray(form), dtype=torch.uint8)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Load a delta.

        Args:
            state: What `state_dict` returned.

        Raises:
            BadInput: Where it does not fit this model and techniques; nothing is changed then.
        """
        tensors, own = self._check_fit(state)
        current = self.model.state_dict(keep_vars=True)
        with torch.no_grad():
            for name, value in tensors.items():
                current[name].copy_(value)
        for technique, live in self._pairs():
            live.load_state_dict(own[technique.name])

    def _check_fit(
        self, state: Mapping[str, Tensor]
    ) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]:
        """Return the model's tensors and each technique's state. Raises BadInput where they do not
        fit what is here."""
        own: dict[str, dict[str, Tensor]] = {t.name: {} for t in self.techniques}
        tensors: dict[str, Tensor] = {}
        for key, value in state.items():
            owner, _, name = key.partition(".")
            (tensors if owner == "model" else own.setdefault(owner, {}))[name] = value
        strangers = sorted(set(own) - {t.name for t in self.techniques})
        expected = self.model.state_dict(keep_vars=True)
        unknown = [n for n in tensors if n not in expected]
        missing = [n for n, p in self.trainable.items() if n in expected and n not in tensors]
        wrong = [
            f"{n} {tuple(t.shape)} for {tuple(expected[n].shape)}"
            for n, t in tensors.items()
            if n in expected and t.shape != expected[n].shape
        ]
        problems = [
            ("techniques not installed here", strangers),
            ("unknown", unknown),
            ("missing", missing),
            ("wrong shape", wrong),
        ]
        if any(names for _, names in problems):
            raise BadInput(
                "this delta does not fit: "
                + "; ".join(f"{what} {some(names)}" for what, names in problems if names)
            )
        return tensors, own

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write the delta (safetensors) and its card (JSON: techniques, base fingerprint, size).

        Args:
            folder: Where to; made where it does not exist.

        Returns:
            The folder.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        state = self._detached_copy()
        card = {
            "greenvis_delta": 1,
            "techniques": self.recipe_form(),
            "base_fingerprint": self._base_fingerprint(state),
            "bytes": _bytes(state),
        }
        for name, write in (
            (DELTA_FILE, lambda p: save_file(state, p)),
            (CARD_FILE, lambda p: p.write_text(json.dumps(card, indent=2))),
        ):
            with files.replacing(folder / name) as part:
                write(part)
        return folder

    def load(self, folder: str | os.PathLike[str]) -> None:
        """Load what `save` wrote.

        Args:
            folder: The folder that was saved to.

        Raises:
            BadInput: For other techniques, another base, or a damaged file.
        """
        self.load_state_dict(self._read(Path(folder)))

    def _read(self, folder: Path) -> dict[str, Tensor]:
        """Return a saved delta. Raises BadInput for other techniques, another base, or a damaged
        file."""
        try:
            card = files.read_json(folder / CARD_FILE, "card of a delta")
            state = load_file(folder / DELTA_FILE)
        except (OSError, ValueError, SafetensorError, BadInput) as error:
            raise BadInput(f"cannot load a delta from {folder}: {error}") from error
        if card.get("techniques") != self.recipe_form():
            raise BadInput(
                f"{folder} was saved with {card.get('techniques')}, but this model is wrapped with "
                f"{self.recipe_form()}"
            )
        fingerprint = self._base_fingerprint(state)
        if card.get("base_fingerprint") != fingerprint:
            raise BadInput(
                f"{folder} belongs to another base (fingerprint "
                f"{str(card.get('base_fingerprint'))[:12]}, this model's is "
                f"{fingerprint[:12]}): build the model with the weights the delta was trained on"
            )
        return state

    # -- several on one base ----------------------------------------------------------------------

    def add(self, name: str, folder: str | os.PathLike[str] | None = None) -> None:
        """Hold a delta under a name, in CPU memory; the model stays as it is.

        Args:
            name: A new name.
            folder: What `save` wrote; None for a copy of what the model holds now.

        Raises:
            BadInput: For a name that is taken, other techniques, another base, a damaged file.
        """
        if name in self._named:
            raise BadInput(
                f"there is a delta '{name}' already; remove('{name}') first, or choose another name"
            )
        state = self._detached_copy() if folder is None else self._read(Path(folder))
        self._check_fit(state)
        self._named[name] = state

    def use(self, name: str | None) -> None:
        """Switch to a named delta, bit for bit: parameters keep their identity, values are copied
        in.

        What the delta in use learned in the meantime stays with it. To train after a switch, build
        a new optimizer: an old one has the other's momentum.

        Args:
            name: A delta that was added; None for the model as it was before the first switch.

        Raises:
            BadInput: For a name that was not added.
        """
        if name is not None and name not in self._named:
            raise BadInput(
                f"no delta '{name}'{nearest(name, self._named)} add('{name}', folder) brings one "
                "here"
            )
        if name == self.in_use:
            return
        target = self._unnamed if name is None else self._named[name]
        self._check_fit(target)
        now = self._detached_copy()
        if self.in_use is None:
            self._unnamed = now
        else:
            self._named[self.in_use] = now
        with torch.no_grad():
            for key, tensor in self.model.state_dict(keep_vars=True).items():
                # a buffer that did not change there
                if f"model.{key}" in now and f"model.{key}" not in target:
                    tensor.copy_(self._snapshot.original(tensor))
        self.load_state_dict(target)
        self.in_use = name

    def deltas(self) -> dict[str, int]:
        """Return the named deltas.

        Returns:
            Bytes by name.
        """
        return {name: _bytes(state) for name, state in self._named.items()}

    def remove(self, name: str) -> None:
        """Forget a named delta.

        Args:
            name: A delta that was added.

        Raises:
            BadInput: For one that is in use, or was never added.
        """
        if name not in self._named:
            raise BadInput(f"no delta '{name}' to remove{nearest(name, self._named)}")
        if name == self.in_use:
            raise BadInput(f"delta '{name}' is in use; use(None) or another one, then remove it")
        del self._named[name]

    def _detached_copy(self) -> dict[str, Tensor]:
        """Return the delta as copies in CPU memory, which share nothing with the model."""
        return _copies(self.state_dict())

    def _base_fingerprint(self, state: Mapping[str, Tensor]) -> str:
        """Return the fingerprint of what lies under a delta, with the values it had before
        `wrap`."""
        current = self.model.state_dict(keep_vars=True)
        return weights.fingerprint(
            {n: self._snapshot.original(t) for n, t in current.items() if f"model.{n}" not in state}
        )


def _copies(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {k: v.detach().cpu().contiguous().clone() for k, v in state.items()}


def _bytes(state: Mapping[str, Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in state.values())
