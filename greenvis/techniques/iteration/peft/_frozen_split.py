"""Where a model is cut between what is frozen and what trains, and a forward that runs the one or
the other alone.

Nothing of a forward is copied. Two traced forwards say which modules a gradient never reaches and
what the trained parts are handed; more, before anything is skipped, show that skipping changes
nothing. Heads that a technique has put behind a frozen
module train on what that gives: what they are handed is kept, too. So is what a technique carries
from block to block beside the tokens (`rows.Follower.export_state`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only, tree_unflatten

from greenvis.core import surgery
from greenvis.core.attached import below, prefixed
from greenvis.core.modes import removing
from greenvis.errors import BadInput, some
from greenvis.models.structure.probing import learning, probing
from greenvis.tasks.answers import main_output
from greenvis.techniques._shared.rows import export_state, import_state

_CARRIED = "carried"
_PLAIN = (int, float, str, bool, type(None))


@dataclass(frozen=True)
class Shape:
    """A tensor in a forward of images: each axis is times · batch + more long. grad: whether it
    depends on what trains."""

    times: tuple[int, ...]
    more: tuple[int, ...]
    dtype: torch.dtype
    grad: bool

    @property
    def batched(self) -> bool:
        """Whether any axis grows with the batch."""
        return any(self.times)

    def zeros(self, batch: int, device: torch.device, real: bool) -> Tensor:
        """Return zeros of this shape: real memory, or one zero shown everywhere, which cannot be
        written to."""
        shape = [t * batch + m for t, m in zip(self.times, self.more, strict=True)]
        return torch.zeros(shape if real else (), dtype=self.dtype, device=device).expand(shape)


@dataclass(frozen=True)
class _Use:
    """One call of a module. inputs, output: as handed over, a `Shape` in the place of each tensor.

    left: how many calls of any module were over before this one; ended: before its own forward was,
    without its hooks.
    """

    inputs: tuple[Any, ...]
    output: Any
    left: int
    ended: int


@dataclass
class Split:
    """Where a model is split into a frozen part and what trains.

    Attributes:
        skipped: frozen modules and what they return, call by call.
        trained: the parts that learn.
        inputs: what is cached: name -> (trained part, number of its call, position among its
            arguments, shape).
        state_names: names of what followers hold beside.
        real: whether skipped modules must return real memory, which may be written to.
    """

    skipped: dict[str, list[Any]] = field(default_factory=dict)
    trained: tuple[str, ...] = ()
    inputs: dict[str, tuple[str, int, int, Shape]] = field(default_factory=dict)
    state_names: tuple[str, ...] = ()
    real: bool = False

    def holds(self, path: str) -> bool:
        """Whether a module or parameter lies in a trained part."""
        return any(path == t or path.startswith(t + ".") for t in self.trained)


def find_split(model: nn.Module, x: Tensor) -> Split:
    """Find what of `model` no trained parameter reaches, for images like x (1, channels, height,
    width).

    Raises BadInput where nothing is frozen below what trains, where a hook reads what would be
    skipped, and where a frozen part is used by another way than as the input of a trained module.
    """
    uses = _uses(model, x)
    split = Split()
    _divide(model, uses, split)
    paths = {n: m for n, m in model.named_modules() if n in split.skipped}
    if not any(True for m in paths.values() for _ in m.parameters()):
        raise BadInput(
            f"cache: no part of {type(model).__name__} is frozen below what trains, so nothing can "
            "be kept"
        )
    for path in split.trained:
        for call, use in enumerate(uses[path]):
            for at, leaf in enumerate(use.inputs):
                if isinstance(leaf, Shape) and leaf.batched and not leaf.grad:
                    if leaf.more[0] or any(leaf.times[1:]):
                        raise BadInput(
                            f"cache: what enters '{path}' has its batch on another axis than the "
                            "first"
                        )
                    split.inputs[f"{path}/{call}/{at}"] = (path, call, at, leaf)
    inside = {
        n: [part for at, part in m.named_modules(prefix=n) if not split.holds(at)]
        for n, m in paths.items()
    }
    watched = [n for n, parts in inside.items() if any(_hooked(part) for part in parts)]
    if watched:
        raise BadInput(
            f"cache: a hook (of another technique?) reads or changes {some(watched)}, so it must "
            "run: leave `cache` off"
        )
    _verify(model, x, split)
    return split


def _uses(model: nn.Module, x: Tensor) -> dict[str, list[_Use]]:
    """Return every call of every module by path, shapes as functions of the batch, from forwards of
    2 and of 3 images."""
    runs: list[list[tuple[str, tuple[Any, ...], Any]]] = [[], []]
    ends: dict[str, list[int]] = {}
    names = {id(m): n for n, m in model.named_modules()}

    def leave(calls: list[Any], module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        calls.append((names[id(module)], tuple(tree_leaves((args, kwargs))), output))

    def end(calls: list[Any], module: nn.Module, args: Any, output: Any) -> None:
        ends.setdefault(names[id(module)], []).append(len(calls))

    for calls, batch in zip(runs, (2, 3), strict=True):
        ends.clear()
        hooks = [
            m.register_forward_hook(partial(leave, calls), with_kwargs=True)
            for m in model.modules()
        ]
        hooks += [
            m.register_forward_hook(partial(end, calls), prepend=True) for m in model.modules()
        ]
        with removing(hooks), probing(model), learning(model), torch.enable_grad():
            model.forward(x.expand(batch, *x.shape[1:]).clone())
    if [path for path, _, _ in runs[0]] != [path for path, _, _ in runs[1]]:
        raise BadInput(
            f"cache: {type(model).__name__} runs other layers for another number of images"
        )
    uses: dict[str, list[_Use]] = {}
    for left, ((path, taken, outputs), (_, taken3, outputs3)) in enumerate(zip(*runs, strict=True)):
        inputs = tuple(_shape(a, b) for a, b in zip(taken, taken3, strict=True))
        leaves, spec = tree_flatten(outputs)
        output = [_shape(a, b) for a, b in zip(leaves, tree_leaves(outputs3), strict=True)]
        ended = ends[path][len(uses.get(path, ()))]
        uses.setdefault(path, []).append(_Use(inputs, tree_unflatten(output, spec), left, ended))
    return uses


def _shape(two: Any, three: Any) -> Any:
    if not isinstance(two, Tensor):
        return two
    times = tuple(b - a for a, b in zip(two.shape, three.shape, strict=True))
    more = tuple(a - 2 * t for a, t in zip(two.shape, times, strict=True))
    return Shape(times, more, two.dtype, two.requires_grad)


def _divide(model: nn.Module, uses: Mapping[str, list[_Use]], split: Split) -> None:
    """Fill in which modules are skipped and which are trained, the outermost of each."""
    learned = {id(p) for p in model.parameters() if p.requires_grad}
    names = {id(m): n for n, m in model.named_modules()}

    def frozen(path: str) -> bool:
        leaves = [leaf for use in uses[path] for leaf in tree_leaves(use.output)]
        shapes = [leaf for leaf in leaves if isinstance(leaf, Shape)]
        plain = all(isinstance(leaf, (Shape, *_PLAIN)) for leaf in leaves)
        return plain and bool(shapes) and all(s.batched and not s.grad for s in shapes)

    def behind(head: str, path: str) -> bool:
        """Whether a hook of the module at `path` runs this one, not its forward."""
        return min(use.left for use in uses[head]) >= max(use.ended for use in uses[path])

    def visit(module: nn.Module) -> None:
        path = names[id(module)]
        learns = any(id(p) in learned for p in module.parameters())
        if path in uses and path:
            below = [n for n, m in model.named_modules() if n.startswith(path + ".") and n in uses]
            heads = _outermost(
                [
                    n
                    for n in below
                    if any(id(p) in learned for p in model.get_submodule(n).parameters())
                ]
            )
            if frozen(path) and (not learns or (heads and all(behind(n, path) for n in heads))):
                split.skipped[path] = [use.output for use in uses[path]]
                split.trained += tuple(heads)
                return
            if learns and not any(_weighs(model, n, learned) and frozen(n) for n in below):
                split.trained += (path,)
                return
        for child in module.children():
            visit(child)

    visit(model)


def _outermost(paths: list[str]) -> list[str]:
    return [p for p in paths if not any(p.startswith(other + ".") for other in paths)]


def _weighs(model: nn.Module, path: str, learned: set[int]) -> bool:
    """Whether a module has parameters, none of which trains."""
    parameters = [id(p) for p in model.get_submodule(path).parameters()]
    return bool(parameters) and learned.isdisjoint(parameters)


def _hooked(module: nn.Module) -> bool:
    hooks = [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]
    return not all(surgery.is_skippable(hook) for hook in hooks)


class _Enough(Exception):
    """All that is kept has been seen; the rest of the forward is not needed."""


def frozen_part(
    model: nn.Module, split: Split, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> dict[str, Tensor]:
    """Run the model up to the last thing that is kept, and return what is, by name of its place,
    (batch, …)."""
    cached: dict[str, Tensor] = {}
    beside: dict[str, Tensor] = {}
    batch = len(next(leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)))

    def take(path: str, call: int, values: list[Any]) -> None:
        carried = {name: value.detach() for name, value in export_state(model, path).items()}
        beside.update(prefixed(f"{path}/{_CARRIED}/", carried))
        for name, (owner, number, at, shape) in split.inputs.items():
            if (owner, number) == (path, call):
                cached[name] = values[at].detach().unflatten(0, (batch, shape.times[0]))
        if len(cached) == len(split.inputs):
            raise _Enough

    with torch.no_grad(), learning(model), _at_entrances(model, split, take), suppress(_Enough):
        model.forward(*args, **kwargs)
    return cached | beside


@contextmanager
def skipping(
    model: nn.Module, split: Split, cached: Mapping[str, Tensor], batch: int
) -> Iterator[None]:
    """Within, a forward of `batch` images runs the trained parts only, on what was kept."""
    device = next(iter(cached.values())).device

    def put(path: str, call: int, values: list[Any]) -> None:
        import_state(model, path, below(cached, f"{path}/{_CARRIED}/"))
        for name, (owner, number, at, shape) in split.inputs.items():
            if (owner, number) == (path, call):
                values[at] = cached[name].flatten(0, 1).to(shape.dtype)

    def answer(shapes: Iterator[Any], *args: Any, **kwargs: Any) -> Any:
        return tree_map_only(
            Shape, lambda shape: shape.zeros(batch, device, split.real), next(shapes)
        )

    before = {path: vars(model.get_submodule(path)).get("forward") for path in split.skipped}
    try:
        for path, shapes in split.skipped.items():
            vars(model.get_submodule(path))["forward"] = partial(answer, iter(shapes))
        with _at_entrances(model, split, put):
            yield
    finally:
        for path, forward in before.items():
            if forward is None:
                vars(model.get_submodule(path)).pop("forward", None)
            else:
                vars(model.get_submodule(path))["forward"] = forward


@contextmanager
def _at_entrances(model: nn.Module, split: Split, do: Any) -> Iterator[None]:
    """Call do(path, number of the call, arguments as a list) before each trained part; what it
    changes is what runs."""
    calls = dict.fromkeys(split.trained, 0)

    def enter(path: str, module: nn.Module, args: Any, kwargs: Any) -> Any:
        values, spec = tree_flatten((args, kwargs))
        do(path, calls[path], values)
        calls[path] += 1
        return tree_unflatten(values, spec)

    hooks = [
        model.get_submodule(p).register_forward_pre_hook(
            partial(enter, p), with_kwargs=True, prepend=True
        )
        for p in split.trained
    ]
    with removing(hooks):
        yield


def _verify(model: nn.Module, x: Tensor, split: Split) -> None:
    """Raise BadInput where skipping changes the outputs: something of the frozen part goes another
    way."""
    x = torch.cat([x, x.flip(-1) + 0.5])

    with probing(model), learning(model):
        live = skipped = main_output(model.forward(x))
        cached = frozen_part(model, split, (x,), {})
        split.state_names = tuple(name for name in cached if name not in split.inputs)
        model.forward(x.flip(0))  # what it leaves behind must not be what the trained parts read
        for split.real in (False, True):
            try:
                with skipping(model, split, cached, len(x)):
                    skipped = main_output(model.forward(x))
                break
            except RuntimeError:  # what is written to in place must be real memory
                if split.real:
                    raise
    if not split.inputs.keys() <= cached.keys() or not torch.allclose(
        live.float(), skipped.float(), rtol=1e-3, atol=1e-4
    ):
        raise BadInput(
            f"cache: in {type(model).__name__}, something of the frozen part reaches what trains "
            "by another way than into "
            f"{some(split.trained, 2)} (a skip connection past it?): leave `cache` off"
        )
