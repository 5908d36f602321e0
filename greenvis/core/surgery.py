"""Find, replace and freeze parts of a model, and a snapshot that makes any change undoable. Check
first, change last."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from greenvis.errors import BadInput, some

_HELD = "_greenvis_held_in_eval"
HOOKS = (
    "_forward_pre_hooks",
    "_forward_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
)
_PASSING = "_greenvis_passing"  # also an attribute of classes whose objects are such hooks


class Snapshot:
    """A model as it is now: structure, hooks, flags, attributes by reference; tensor values by copy
    where they change.

    `restore()` gives all of it back bit for bit, whatever a technique did in between, so techniques
    write no undo. Copies lie in CPU memory; `forget_unchanged` drops those of frozen tensors that
    still equal the model's.
    """

    def __init__(self, model: nn.Module, also: Iterable[nn.Module] = ()) -> None:
        self.model = model
        modules = dict.fromkeys([*model.modules(), *also])
        self._modules = [
            (m, type(m), {k: (v, _copied(v)) for k, v in vars(m).items()}) for m in modules
        ]
        self._flags = [(p, p.requires_grad, p.grad) for p in model.parameters()]
        self._tensors = [*model.parameters(), *model.buffers()]
        devices = {t.device for t in self._tensors}
        self._device = devices.pop() if len(devices) == 1 else None
        owners: dict[int, list[tuple[nn.Module, str]]] = {}
        for module in model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                owners.setdefault(id(buffer), []).append((module, name))
        self._owners = {i: owners[id(t)] for i, t in enumerate(self._tensors) if id(t) in owners}
        self._values: dict[int, Tensor] = {}
        self._positions: dict[int, int] | None = None  # by id of a tensor
        self.keep_values()

    @property
    def modules(self) -> list[nn.Module]:
        """The modules it gives back."""
        return [m for m, _, _ in self._modules]

    def follow(self) -> None:
        """Take note of buffers that were moved to another device: `Module.to` makes new ones,
        where it moves parameters in place."""
        for i, owners in self._owners.items():
            for module, name in owners:
                now = module._buffers.get(name)
                if now is not None and now.device != self._tensors[i].device:
                    self._tensors[i], self._positions = now, None
                    break

    def _gather(self) -> None:
        """Bring what was no part of the model when it was moved to the device of the rest."""
        moved = {t.device for t in self._tensors} - {self._device}
        if self._device is None or len(moved) != 1:
            return
        device = moved.pop()
        present = {id(t) for t in (*self.model.parameters(), *self.model.buffers())}
        for i, tensor in enumerate(self._tensors):
            if id(tensor) in present or tensor.device == device:
                continue
            if i in self._owners:
                self._tensors[i] = tensor.to(device)
            else:
                tensor.data = tensor.data.to(device)

    def keep_values(self) -> None:
        """Copy every tensor of which no copy is held yet."""
        for i, tensor in enumerate(self._tensors):
            if i not in self._values:
                self._values[i] = tensor.detach().to("cpu", copy=True)

    def forget_unchanged(self) -> None:
        """Drop the copies of parameters that are frozen and unchanged; buffers stay, they may
        drift."""
        for i, tensor in enumerate(self._tensors):
            if isinstance(tensor, nn.Parameter) and not tensor.requires_grad and self.unchanged(i):
                del self._values[i]

    def unchanged(self, i: int) -> bool:
        """Whether tensor `i` still holds, bit for bit, the value it had."""
        original = self._values.get(i)
        if original is None:
            return True
        now = self._tensors[i].detach().cpu()
        return (
            now.dtype == original.dtype
            and now.shape == original.shape
            and _same_bits(now, original)
        )

    def original(self, tensor: Tensor) -> Tensor:
        """Return the value a tensor of the model had, or the tensor itself where it was not there
        or has not changed."""
        self.follow()
        if self._positions is None:
            self._positions = {id(t): i for i, t in enumerate(self._tensors)}
        return self._values.get(self._positions.get(id(tensor), -1), tensor)

    def changed_buffers(self) -> set[int]:
        """Return the ids of buffers that were there and whose values have changed since."""
        self.follow()
        return {
            id(t)
            for i, t in enumerate(self._tensors)
            if not isinstance(t, nn.Parameter) and not self.unchanged(i)
        }

    def restore(self, values: bool = True) -> None:
        """Give the model its structure, hooks, flags and attributes back, and its values unless
        `values` is False; what was moved to another device stays there."""
        self.follow()
        self._gather()
        for module, kind, attributes in self._modules:
            module.__class__ = kind
            state = vars(module)
            state.clear()
            for name, (value, content) in attributes.items():  # containers keep their identity
                state[name] = value
                if not is_container(value):
                    continue
                if isinstance(value, (dict, set)):
                    value.clear()
                    value.update(content)
                elif isinstance(value, list):
                    value[:] = content
        for i, owners in self._owners.items():
            for module, name in owners:
                module._buffers[name] = self._tensors[i]
        for parameter, flag, grad in self._flags:
            parameter.requires_grad_(flag)
            parameter.grad = grad
        if values:
            with torch.no_grad():
                for i, value in self._values.items():
                    self._tensors[i].copy_(value)


def is_container(value: Any) -> bool:
    """Whether a value's content can be exchanged: not that of a dictionary that guards it, as
    diffusers' configurations do."""
    if isinstance(value, dict):
        return type(value).__setitem__ in (dict.__setitem__, OrderedDict.__setitem__)
    return isinstance(value, (list, set))


def find(
    model: nn.Module,
    patterns: Sequence[str],
    kind: type[nn.Module] | tuple[type[nn.Module], ...] = nn.Linear,
) -> list[str]:
    """Return the paths of modules that match a pattern.

    Args:
        model: The model.
        patterns: Shell patterns on the whole path, or on its last parts.
        kind: Classes of the modules.

    Returns:
        Paths, in the model's order per pattern.

    Raises:
        BadInput: For a pattern that matches nothing, with what the model has.
    """
    candidates = [path for path, m in model.named_modules() if path and isinstance(m, kind)]
    kinds = " or ".join(k.__name__ for k in (kind if isinstance(kind, tuple) else (kind,)))
    matches: dict[str, None] = {}
    for pattern in patterns:
        hits = [p for p in candidates if fnmatchcase(p, pattern) or fnmatchcase(p, "*." + pattern)]
        if not hits:
            what = (
                f"this model has {some(candidates)}"
                if candidates
                else f"this model has no {kinds} at all"
            )
            raise BadInput(f"no {kinds} matches '{pattern}'; {what}")
        matches.update(dict.fromkeys(hits))
    return list(matches)


def parents_of(model: nn.Module, module: nn.Module) -> list[tuple[nn.Module, str]]:
    """Return every (parent, name) under which `module` hangs in `model`: more than one where it is
    shared."""
    return [
        (parent, name)
        for parent in model.modules()
        for name, child in parent._modules.items()
        if child is module
    ]


def replace(model: nn.Module, old: nn.Module, new: nn.Module) -> int:
    """Put `new` wherever `old` stands, under every parent that shares it.

    Args:
        model: The model.
        old: A sub-module.
        new: What replaces it.

    Returns:
        How many parents had it.

    Raises:
        BadInput: Where `old` is not a sub-module (the root cannot be replaced in place).
    """
    parents = parents_of(model, old)
    if not parents:
        raise BadInput(
            f"cannot replace {type(old).__name__}: it is not a sub-module of {type(model).__name__}"
        )
    for parent, name in parents:
        parent._modules[name] = new
    return len(parents)


def names_of(model: nn.Module, parameters: Iterable[nn.Parameter]) -> tuple[str, ...]:
    """Return the names that these parameters have in `model`, in its order; a shared one has its
    first."""
    ids = {id(p) for p in parameters}
    return tuple(n for n, p in model.named_parameters() if id(p) in ids)


def freeze(
    model: nn.Module,
    but: Iterable[nn.Parameter] = (),
    follows: Callable[[str], bool] = lambda path: False,
) -> tuple[str, ...]:
    """Stop every parameter from training except some; hold frozen batch norms' statistics.

    A frozen BatchNorm still drifts in train mode, so it is held in eval whenever it runs, also
    after `model.train()`.

    Args:
        model: The model.
        but: Parameters that go on training.
        follows: Whether the batch norm at a path keeps following its inputs though it may have no
            parameter that trains.

    Returns:
        The names of the parameters in `but`.
    """
    names = names_of(model, but)
    spared = set(names)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in spared)
    hold_norms(
        model,
        but=lambda path, norm: follows(path) or any(p.requires_grad for p in norm.parameters()),
    )
    return names


def hold_norms(
    model: nn.Module, but: Callable[[str, nn.Module], bool] = lambda path, norm: False
) -> None:
    """Keep the statistics that batch norms have now, also in training, except those for which `but`
    is true."""
    for path, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and not but(path, module):
            hold_in_eval(module)


def hold_in_eval(module: nn.Module) -> None:
    """Put `module` into eval mode each time it runs, whatever `train()` set."""
    if _HELD not in vars(module):
        module.register_forward_pre_hook(mark_skippable(_to_eval))
        vars(module)[_HELD] = True


def copy_hooks(old: nn.Module, new: nn.Module) -> None:
    """Hang on the modules of `new`, which `old` was converted into, the hooks that hung on those of
    `old`."""
    others = dict(new.named_modules())
    for path, module in old.named_modules():
        if path in others and others[path] is not module:
            for name in HOOKS:
                getattr(others[path], name).update(getattr(module, name))
            if _HELD in vars(module):
                vars(others[path])[_HELD] = True


def holds_in_eval(hook: Any) -> bool:
    """Whether this hook is that of `hold_in_eval`."""
    return hook is _to_eval


def mark_skippable(hook: Any) -> Any:
    """Mark a hook that nobody misses where its module is skipped: what it does serves that one
    forward of that module."""
    hook.__dict__[_PASSING] = True
    return hook


def is_skippable(hook: Any) -> bool:
    """Whether a hook is marked so (an object's class may be, too)."""
    return getattr(hook, _PASSING, False)


def _to_eval(module: nn.Module, inputs: object) -> None:
    module.training = False


def _copied(value: Any) -> Any:
    return copy.copy(value) if isinstance(value, (dict, list, set)) else None


def _same_bits(a: Tensor, b: Tensor) -> bool:
    if a.is_floating_point():
        return torch.equal(torch.nan_to_num(a), torch.nan_to_num(b)) and torch.equal(
            a.isnan(), b.isnan()
        )
    return torch.equal(a, b)
