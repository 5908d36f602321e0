"""What hangs on a wrapped model is lost when somebody puts other modules there: it is noticed, and
taken over or refused.

So is an optimizer that does not hold what techniques train.
"""

from __future__ import annotations

import gc
import sys
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from greenvis.core import distributed
from greenvis.core.surgery import copy_hooks, holds_in_eval
from greenvis.errors import BadInput, GreenvisError, some

if TYPE_CHECKING:
    from greenvis.core.wrap import Wrapped

_UNWATCHED: ContextVar[bool] = ContextVar("unwatched", default=False)
_PLAIN = (int, float, str, type(None))


def refuse_compiled(model: nn.Module) -> None:
    """Raise BadInput for a model that is, or holds, compiled code: it does not run what is put on
    its modules."""
    dynamo = sys.modules.get("torch._dynamo.eval_frame")  # whoever compiles has imported it
    for path, module in model.named_modules():
        where = f"'{path}' of this {type(model).__name__}" if path else "this model"
        if isinstance(module, torch.jit.ScriptModule):
            raise BadInput(
                f"{where} is a TorchScript program, on which nothing can be put: wrap the model it "
                "was made from"
            )
        if dynamo is not None and isinstance(module, dynamo.OptimizedModule):
            raise BadInput(
                f"{where} is compiled, and compiled code ignores what is put on it: wrap before "
                "you compile. Give wrap() the "
                "module itself (compiled._orig_mod), then call torch.compile"
            )


def forget_compiled() -> None:
    """Have whatever was compiled before be compiled anew: old code would go on without (or with)
    what techniques put in."""
    if "torch._dynamo.eval_frame" in sys.modules:
        torch._dynamo.reset()  # type: ignore[attr-defined]


@contextmanager
def unwatched() -> Iterator[None]:
    """Run wrapped models within with other parameters in the place of their own
    (`torch.func.functional_call`), which are back at its end."""
    token = _UNWATCHED.set(True)
    try:
        yield
    finally:
        _UNWATCHED.reset(token)


class Watch:
    """A wrapped model as its techniques know it. Looks whether it is so still: as a pre-hook, while
    the model trains."""

    _greenvis_passing = True

    def __init__(self, live: Wrapped) -> None:
        self._live: Callable[[], Wrapped | None] = weakref.ref(live)
        self.model = live.model
        # by (path of the parent, name): what came since, and stays
        self._adopted: dict[tuple[str, str], Any] = {}
        self._attributes: dict[str, Any] = {}  # of the model, that changed with them
        modules = [*self.model.modules()]
        parts = any(i.freezes or i.trainable for i in live.installed) or any(
            "forward" in vars(m) for m in modules
        )
        self.parts = parts and bool(live.installed)  # whether a copy of the model is no plain one
        if self.parts or any(map(_is_ours, (hook for m in modules for hook in _hooks(m)))):
            self.model.register_forward_pre_hook(self, prepend=True)
        self.note()

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_live": _gone}  # a copy of the model is nobody's to train

    def __call__(self, model: nn.Module, args: Any) -> None:
        """Look, before a forward of the model in training."""
        if model.training and not _UNWATCHED.get() and not torch.compiler.is_compiling():
            self.adopt_changes()

    def note(self) -> None:
        """Take the model as it is now for what it should be."""
        model = self.model
        self._edges = [
            (f"{path}.{name}" if path else name, parent, name, child)
            for path, parent in model.named_modules()
            for name, child in (*parent._modules.items(), *parent._parameters.items())
            if child is not None
        ]
        self._kinds = [(path, module, type(module)) for path, module in model.named_modules()]
        self._plain = _plain(model)

    def adopt_changes(self) -> None:
        """Take over what came since, or raise BadInput with nothing changed."""
        changed = self.changed()
        if not changed:
            return
        live = self._live()
        converted = [(path, old, new) for path, old, new in changed if _same_tensors(old, new)]
        replaced = [one for one in changed if one not in converted]
        for path, old, new in converted:
            if any("forward" in vars(module) for module in old.modules()):
                raise BadInput(
                    f"'{path}' became a {type(new).__name__} after wrap, and a technique had put a "
                    "forward of its own there: convert the model before wrap"
                )
        if live is not None:
            for path, old, new in replaced:
                live.check_replaced(path, _parameters(old), _parameters(new), _what_hangs_on(old))
            for path, old, new in replaced:
                live.take_replaced(path, _parameters(old), _parameters(new))
        for _, old, new in converted:
            copy_hooks(old, new)
        self._adopted |= {
            (path.rpartition(".")[0], path.rpartition(".")[2]): new for path, _, new in changed
        }
        self._attributes |= {
            k: v for k, v in _plain(self.model).items() if self._plain.get(k, v) != v
        }
        self.note()

    def changed(self) -> list[tuple[str, Any, Any]]:
        """Return (path, what was there, what is) of modules and parameters that are others now, the
        outermost of each.

        Raises BadInput where a module has become one of another class.
        """
        for path, module, kind in self._kinds:
            if type(module) is not kind:
                distributed.refuse_sharding(self.model)  # which makes modules of another class
                raise BadInput(
                    f"'{path or type(module).__name__}' became a {type(module).__name__} after "
                    "wrap (parametrized?), which its techniques do not know: take that back, or "
                    "undo() first, change the model, and wrap it then"
                )
        out: list[tuple[str, Any, Any]] = []
        for path, parent, name, child in self._edges:
            children = parent._modules if isinstance(child, nn.Module) else parent._parameters
            if children.get(name) is not child and not any(
                path.startswith(f"{p}.") for p, _, _ in out
            ):
                out.append((path, child, children.get(name)))
        return out

    def refuse_lost(self, base: set[int]) -> None:
        """Raise GreenvisError where what came since stands in a part that goes with its technique.
        base: ids of the others."""
        for (path, name), new in self._adopted.items():
            if id(self.model.get_submodule(path)) not in base:
                raise GreenvisError(
                    f"'{path}.{name}' became a {type(new).__name__} inside what a technique had "
                    "put in, which cannot be folded then: merge first, then convert the model"
                )

    def restore_adopted(self) -> None:
        """Put what came since into the model that has its own structure back, without what hung
        there."""
        for (path, name), new in self._adopted.items():
            parent = self.model.get_submodule(path)
            (parent._modules if isinstance(new, nn.Module) else parent._parameters)[name] = new
            for module in new.modules() if isinstance(new, nn.Module) else ():
                for hooks in (module._forward_pre_hooks, module._forward_hooks):
                    for key in [key for key, hook in hooks.items() if _is_ours(hook)]:
                        del hooks[key]
        vars(self.model).update(self._attributes)


class Optimizers:
    """Holds optimizers against what the techniques on a model train, before they step."""

    def __init__(self, live: Wrapped) -> None:
        self._live: Callable[[], Wrapped | None] = weakref.ref(live)
        self._fit: weakref.WeakSet[Optimizer] = weakref.WeakSet()
        _watching.add(self)

    def reset(self) -> None:
        """Look at each again: techniques train other parameters now."""
        self._fit.clear()

    def release(self) -> None:
        """Look no more."""
        _watching.discard(self)

    def check(self, optimizer: Optimizer) -> None:
        """Raise GreenvisError where this optimizer is about to step and something that should train
        is in none."""
        live = self._live()
        if live is None or optimizer in self._fit:
            return
        steps = _parameter_ids(optimizer)
        if steps.isdisjoint(id(p) for p in live.model.parameters()):
            return  # of another model
        live.begin_training()
        trained = {n: p for n, p in live.declared.items() if p.requires_grad}
        if any(id(p) not in steps for p in trained.values()):  # one of several optimizers?
            steps = steps.union(
                *(_parameter_ids(o) for o in gc.get_objects() if issubclass(type(o), Optimizer))
            )
        if missing := [n for n, p in trained.items() if id(p) not in steps]:
            raise GreenvisError(
                f"this {type(optimizer).__name__} steps, but no optimizer holds {some(missing)} of "
                f"this model, which {some(live.who_trains(missing))} would train: build the "
                "optimizer after wrap (and after begin_experience), from live.param_groups(lr); "
                "set requires_grad to False where they are not to learn"
            )
        self._fit.add(optimizer)


_watching: weakref.WeakSet[Optimizers] = weakref.WeakSet()


def _before_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    for optimizers in list(_watching):
        optimizers.check(optimizer)


# one for good: torch goes through its hooks while models are collected
register_optimizer_step_pre_hook(_before_step)


def _gone() -> None:
    """Stand for a weak reference to what is gone."""


def _parameter_ids(optimizer: Optimizer) -> set[int]:
    return {id(p) for group in getattr(optimizer, "param_groups", ()) for p in group["params"]}


def _what_hangs_on(old: Any) -> str:
    """Say what techniques had hung on a part that is gone; nothing if only batch norms were held
    there."""
    for module in old.modules() if isinstance(old, nn.Module) else ():
        if "forward" in vars(module):
            return "a forward of its own"
        if any(_is_ours(hook) and not holds_in_eval(hook) for hook in _hooks(module)):
            return "hooks"
    return ""


def _hooks(module: nn.Module) -> list[Any]:
    hooks = [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]
    # they only look
    return [hook for hook in hooks if getattr(hook, "__module__", "") != "greenvis.core.trainers"]


def _is_ours(hook: Any) -> bool:
    maker = getattr(getattr(hook, "func", hook), "__module__", None) or type(hook).__module__
    return maker.startswith("greenvis.")


def _plain(model: nn.Module) -> dict[str, Any]:
    return {k: v for k, v in vars(model).items() if isinstance(v, _PLAIN) and k != "training"}


def _parameters(part: Any) -> list[nn.Parameter]:
    if isinstance(part, nn.Module):
        return [*part.parameters()]
    return [part] if isinstance(part, nn.Parameter) else []


def _same_tensors(old: Any, new: Any) -> bool:
    """Whether `new` is `old` in other clothes: it has the very parameters and buffers (a
    synchronised batch norm)."""
    if not isinstance(old, nn.Module) or not isinstance(new, nn.Module):
        return False
    one, other = ({id(t) for t in (*m.parameters(), *m.buffers())} for m in (old, new))
    return bool(one) and one == other


def moved(before: Mapping[str, Any], now: Mapping[str, nn.Parameter]) -> bool:
    """Whether any parameter is another than `sums` said."""
    return any(before.get(name) != value for name, value in sums(now).items())


def sums(parameters: Mapping[str, nn.Parameter]) -> dict[str, tuple[float, float]]:
    """Return two sums of each parameter, which tell whether it has moved."""
    with torch.no_grad():
        return {
            n: (float(p.double().sum()), float(p.double().square().sum()))
            for n, p in parameters.items()
            if not p.is_meta
        }
