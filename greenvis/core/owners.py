"""Which technique trains which parameters of a wrapped model, also when somebody puts others in
their place."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

from greenvis.core.module_changes import Optimizers, Watch, moved, sums
from greenvis.errors import BadInput, GreenvisError, some

if TYPE_CHECKING:
    from greenvis.core.technique import Installed, Technique


class Owners:
    """The part of a wrapped model that knows what its techniques declare."""

    model: nn.Module
    _optimizers: Optimizers
    _watch: Watch | None = None

    def __init__(self) -> None:
        # by technique: the parameters it declares
        self._owned: dict[str, dict[int, nn.Parameter]] = {}
        self._start: dict[str, Any] | None = (
            None  # sums of the declared parameters when training began
        )

    if TYPE_CHECKING:

        def _pairs(self) -> Iterator[tuple[Technique, Installed]]: ...

    def _own(self, technique: Technique, live: Installed) -> None:
        """Note the parameters a technique declares now: a later one may move them to other
        names."""
        named = dict(self.model.named_parameters(remove_duplicate=False))
        missing = [n for n in live.trainable if n not in named]
        if missing:
            raise GreenvisError(
                f"{technique.name} declares {some(missing)} trainable, but the model has no such "
                "parameter"
            )
        self._owned[technique.name] = {id(named[n]): named[n] for n in live.trainable}

    def check_replaced(
        self, path: str, old: list[nn.Parameter], new: list[nn.Parameter], hanging: str
    ) -> None:
        """Raise BadInput where a module that somebody put at `path` cannot be taken for the one
        that was there."""
        start = f"'{path}' of this {type(self.model).__name__} was replaced after wrap, and "
        end = ": replace it before wrap (undo() first)"
        if hanging:
            raise BadInput(f"{start}a technique had put {hanging} on it{end}")
        owned = {name: [p for p in old if id(p) in of_one] for name, of_one in self._owned.items()}
        part = [name for name, parameters in owned.items() if 0 < len(parameters) < len(old)]
        if part:
            raise BadInput(f"{start}{some(part)} trains a part of it{end}")
        if any(owned.values()) and not new:
            raise BadInput(f"{start}what is there now has nothing to train{end}")
        if (
            new
            and not any(owned.values())
            and (freezing := [t.name for t, live in self._pairs() if live.freezes])
        ):
            raise BadInput(
                f"{start}{some(freezing)} trains nothing there, so that it would stay at the "
                f"weights it has now{end}, or let the technique train it (head: train)"
            )
        for technique, live in self._pairs():
            if new and (why := live.replacement_blocker(path)):
                raise BadInput(
                    f"{start}{technique.name} cannot go on with another: {why}{end}, with all "
                    "classes it will need"
                )

    def take_replaced(self, path: str, old: list[nn.Parameter], new: list[nn.Parameter]) -> None:
        """Have those train the new parameters that trained the old ones."""
        gone = {id(p) for p in old}
        named = dict(self.model.named_parameters(remove_duplicate=False))
        for technique, live in self._pairs():
            mine = self._owned[technique.name]
            if gone & mine.keys():
                mine = {k: p for k, p in mine.items() if k not in gone} | {id(p): p for p in new}
                self._owned[technique.name] = mine
                live.trainable = tuple(n for n, p in named.items() if id(p) in mine)
        self._freeze()
        self._optimizers.reset()

    def who_trains(self, names: Sequence[str]) -> list[str]:
        """Return the techniques that declare any of these parameters."""
        named = dict(self.model.named_parameters())
        return [t for t, mine in self._owned.items() if any(id(named[n]) in mine for n in names)]

    def begin_training(self) -> None:
        """Note what the declared parameters are before the first step."""
        if self._start is None:
            self._start = sums(self.declared)

    def unmoved(self) -> list[str]:
        """Return the techniques none of whose parameters has moved since the first step; none where
        there was none."""
        if self._start is None:
            return []
        named = {n: p for n, p in self.declared.items() if p.requires_grad and n in self._start}
        own = {
            t.name: {n: p for n, p in named.items() if id(p) in self._owned[t.name]}
            for t, _ in self._pairs()
        }
        return [name for name, mine in own.items() if mine and not moved(self._start, mine)]

    def _adopt_changes(self) -> None:
        if self._watch is not None:
            self._watch.adopt_changes()

    @property
    def declared(self) -> dict[str, nn.Parameter]:
        """The parameters that techniques train and save, by the names they have now."""
        owned = {key for of_one in self._owned.values() for key in of_one}
        return {n: p for n, p in self.model.named_parameters() if id(p) in owned}

    def _freeze(self) -> None:
        # what one technique freezes, another's own parameters must survive
        if any(live.freezes for _, live in self._pairs()):
            declared = self.declared
            for name, parameter in self.model.named_parameters():
                parameter.requires_grad_(name in declared)
