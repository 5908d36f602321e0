"""A frozen prefix that runs once: what enters the first trained part is kept for each sample, and what lies before is skipped.

Nothing of a forward is copied. Two traced forwards say which modules a gradient never reaches and what the trained parts are
handed; a third, before anything is skipped, shows that skipping changes nothing. In a step on samples that were shown
(`Wrapped.show`), the frozen modules answer with zeros of the right shape, and the trained parts get what was kept. So, in such
a step, only the logits are right: what else the model's output may hold of its frozen part (hidden states) is zeros.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only, tree_unflatten

from greenvis import models, surgery
from greenvis.errors import BadInput, some
from greenvis.technique import Installed, logits_of
from greenvis.techniques._frozen import Kept
from greenvis.views.quiet import image, quiet

_IMAGE = "images"
_PLAIN = (int, float, str, bool, type(None))


@dataclass(frozen=True)
class Shape:
    """A tensor in a forward of images: each axis is times · batch + more long. grad: whether it depends on what trains."""

    times: tuple[int, ...]
    more: tuple[int, ...]
    dtype: torch.dtype
    grad: bool

    @property
    def batched(self) -> bool:
        """Whether any axis grows with the batch."""
        return any(self.times)

    def zeros(self, batch: int, device: torch.device, real: bool) -> Tensor:
        """Return zeros of this shape: real memory, or one zero shown everywhere, which cannot be written to."""
        shape = [t * batch + m for t, m in zip(self.times, self.more, strict=True)]
        return torch.zeros(shape if real else (), dtype=self.dtype, device=device).expand(shape)


@dataclass(frozen=True)
class _Use:
    """One call of a module. inputs, output: as handed over, a `Shape` in the place of each tensor."""

    inputs: tuple[Any, ...]
    output: Any


@dataclass
class Cut:
    """Where a model is cut. skipped: frozen modules and what they give, call by call. trained: the parts that learn.

    places: what is kept: name -> (trained part, number of its call, place among its arguments, shape).
    """

    skipped: dict[str, list[Any]] = field(default_factory=dict)
    trained: tuple[str, ...] = ()
    places: dict[str, tuple[str, int, int, Shape]] = field(default_factory=dict)
    real: bool = False

    def holds(self, path: str) -> bool:
        """Whether a module or parameter lies in a trained part."""
        return any(path == t or path.startswith(t + ".") for t in self.trained)


def find_cut(model: nn.Module, x: Tensor) -> Cut:
    """Find what of `model` no trained parameter reaches, for images like x (1, channels, height, width).

    Raises BadInput where nothing is frozen below what trains, where a hook reads what would be skipped, and where a frozen
    part is used by another way than as the input of a trained module.
    """
    uses = _uses(model, x)
    cut = Cut()
    _divide(model, uses, cut)
    paths = {n: m for n, m in model.named_modules() if n in cut.skipped}
    if not any(True for m in paths.values() for _ in m.parameters()):
        raise BadInput(f"cache: no part of {type(model).__name__} is frozen below what trains, so nothing can be kept")
    for path in cut.trained:
        for call, use in enumerate(uses[path]):
            for at, given in enumerate(use.inputs):
                if isinstance(given, Shape) and given.batched and not given.grad:
                    if given.more[0] or any(given.times[1:]):
                        raise BadInput(f"cache: what enters '{path}' has its batch on another axis than the first")
                    cut.places[f"{path}/{call}/{at}"] = (path, call, at, given)
    watched = [n for n, m in paths.items() if any(_hooked(part) for part in m.modules())]
    if watched:
        raise BadInput(
            f"cache: a hook (of another technique?) reads or changes {some(watched)}, so it must run: leave `cache` off"
        )
    _verify(model, x, cut)
    return cut


def _uses(model: nn.Module, x: Tensor) -> dict[str, list[_Use]]:
    """Return every call of every module by path, shapes as functions of the batch, from forwards of 2 and of 3 images."""
    seen: list[list[tuple[str, tuple[Any, ...], Any]]] = [[], []]
    names = {id(m): n for n, m in model.named_modules()}

    def leave(calls: list[Any], module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        calls.append((names[id(module)], tuple(tree_leaves((args, kwargs))), output))

    for calls, batch in zip(seen, (2, 3), strict=True):
        hooks = [m.register_forward_hook(partial(leave, calls), with_kwargs=True) for m in model.modules()]
        try:
            with quiet(model), torch.enable_grad():
                model.forward(x.expand(batch, *x.shape[1:]).clone())
        finally:
            for hook in hooks:
                hook.remove()
    if [path for path, _, _ in seen[0]] != [path for path, _, _ in seen[1]]:
        raise BadInput(f"cache: {type(model).__name__} runs other layers for another number of images")
    found: dict[str, list[_Use]] = {}
    for (path, taken, given), (_, taken3, given3) in zip(*seen, strict=True):
        inputs = tuple(_shape(a, b) for a, b in zip(taken, taken3, strict=True))
        leaves, spec = tree_flatten(given)
        output = [_shape(a, b) for a, b in zip(leaves, tree_leaves(given3), strict=True)]
        found.setdefault(path, []).append(_Use(inputs, tree_unflatten(output, spec)))
    return found


def _shape(two: Any, three: Any) -> Any:
    if not isinstance(two, Tensor):
        return two
    times = tuple(b - a for a, b in zip(two.shape, three.shape, strict=True))
    more = tuple(a - 2 * t for a, t in zip(two.shape, times, strict=True))
    return Shape(times, more, two.dtype, two.requires_grad)


def _divide(model: nn.Module, uses: Mapping[str, list[_Use]], cut: Cut) -> None:
    """Fill in which modules are skipped and which are trained, the outermost of each."""
    learned = {id(p) for p in model.parameters() if p.requires_grad}
    names = {id(m): n for n, m in model.named_modules()}

    def frozen(path: str) -> bool:
        leaves = [leaf for use in uses[path] for leaf in tree_leaves(use.output)]
        shapes = [leaf for leaf in leaves if isinstance(leaf, Shape)]
        plain = all(isinstance(leaf, (Shape, *_PLAIN)) for leaf in leaves)
        return plain and bool(shapes) and all(s.batched and not s.grad for s in shapes)

    def visit(module: nn.Module) -> None:
        path = names[id(module)]
        learns = any(id(p) in learned for p in module.parameters())
        if path in uses and path:
            below = [n for n, m in model.named_modules() if n.startswith(path + ".") and n in uses]
            if not learns and frozen(path):
                cut.skipped[path] = [use.output for use in uses[path]]
                return
            if learns and not any(_weighs(model, n, learned) and frozen(n) for n in below):
                cut.trained += (path,)
                return
        for child in module.children():
            visit(child)

    visit(model)


def _weighs(model: nn.Module, path: str, learned: set[int]) -> bool:
    """Whether a module has parameters, none of which trains."""
    parameters = [id(p) for p in model.get_submodule(path).parameters()]
    return bool(parameters) and learned.isdisjoint(parameters)


def _hooked(module: nn.Module) -> bool:
    hooks = [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]
    return any(hook is not surgery._to_eval for hook in hooks)


class _Enough(Exception):
    """All that is kept has been seen; the rest of the forward is not needed."""


def frozen_part(model: nn.Module, cut: Cut, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Tensor]:
    """Run the model up to the last thing that is kept, and return what is, by name of its place, (batch, …)."""
    found: dict[str, Tensor] = {}
    batch = len(next(leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)))

    def take(path: str, call: int, values: list[Any]) -> None:
        for name, (there, number, at, shape) in cut.places.items():
            if (there, number) == (path, call):
                found[name] = values[at].detach().unflatten(0, (batch, shape.times[0]))
        if len(found) == len(cut.places):
            raise _Enough

    with torch.no_grad(), _at_entrances(model, cut, take), suppress(_Enough):
        model.forward(*args, **kwargs)
    return found


@contextmanager
def skipping(model: nn.Module, cut: Cut, kept: Mapping[str, Tensor], batch: int) -> Iterator[None]:
    """Within, a forward of `batch` images runs the trained parts only, on what was kept."""
    device = next(iter(kept.values())).device

    def put(path: str, call: int, values: list[Any]) -> None:
        for name, (there, number, at, shape) in cut.places.items():
            if (there, number) == (path, call):
                values[at] = kept[name].flatten(0, 1).to(shape.dtype)

    def answer(given: Iterator[Any], *args: Any, **kwargs: Any) -> Any:
        return tree_map_only(Shape, lambda shape: shape.zeros(batch, device, cut.real), next(given))

    before = {path: vars(model.get_submodule(path)).get("forward") for path in cut.skipped}
    try:
        for path, given in cut.skipped.items():
            vars(model.get_submodule(path))["forward"] = partial(answer, iter(given))
        with _at_entrances(model, cut, put):
            yield
    finally:
        for path, forward in before.items():
            if forward is None:
                vars(model.get_submodule(path)).pop("forward", None)
            else:
                vars(model.get_submodule(path))["forward"] = forward


@contextmanager
def _at_entrances(model: nn.Module, cut: Cut, do: Any) -> Iterator[None]:
    """Call do(path, number of the call, arguments as a list) before each trained part; what it changes is what runs."""
    calls = dict.fromkeys(cut.trained, 0)

    def enter(path: str, module: nn.Module, args: Any, kwargs: Any) -> Any:
        values, spec = tree_flatten((args, kwargs))
        do(path, calls[path], values)
        calls[path] += 1
        return tree_unflatten(values, spec)

    hooks = [
        model.get_submodule(p).register_forward_pre_hook(partial(enter, p), with_kwargs=True, prepend=True) for p in cut.trained
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _verify(model: nn.Module, x: Tensor, cut: Cut) -> None:
    """Raise BadInput where skipping changes the outputs: something of the frozen part goes another way."""
    x = torch.cat([x, x.flip(-1) + 0.5])

    with quiet(model):
        live = skipped = logits_of(model.forward(x))
        kept = frozen_part(model, cut, (x,), {})
        for cut.real in (False, True):
            try:
                with skipping(model, cut, kept, len(x)):
                    skipped = logits_of(model.forward(x))
                break
            except RuntimeError:  # what is written to in place must be real memory
                if cut.real:
                    raise
    if len(kept) < len(cut.places) or not torch.allclose(live.float(), skipped.float(), rtol=1e-3, atol=1e-4):
        raise BadInput(
            f"cache: in {type(model).__name__}, something of the frozen part reaches what trains by another way than into "
            f"{some(cut.trained, 2)} (a skip connection past it?): leave `cache` off"
        )


def _digest(x: Tensor) -> Tensor:
    """Return a number for each image, (batch, 1), that other images do not have: a fixed projection of its pixels."""
    flat = x.detach().flatten(1).float()
    return (flat * torch.arange(flat.shape[1], device=flat.device).mul(0.7).cos()).mean(1, keepdim=True)


class InstalledPrefix(Installed):
    """A model whose frozen prefix is kept; all outside of the trained parts runs in eval while it trains."""

    def __init__(self, model: nn.Module, trainable: tuple[str, ...], example: Tensor, cache: Literal[True, "fp16"]) -> None:
        super().__init__(trainable, freezes=True)
        find_cut(model, example[:1])  # refuses what cannot work; others may still change the model, so it is found again
        self._dtype: Literal["fp32", "fp16"] = "fp16" if cache == "fp16" else "fp32"
        self._cuts: dict[tuple[int, ...], tuple[Cut, Kept]] = {}
        self._modes: list[tuple[nn.Module, bool]] = []
        self._open = ExitStack()
        model.register_forward_pre_hook(self._enter, with_kwargs=True)
        model.register_forward_hook(self._leave, always_call=True)

    def facts(self) -> Mapping[str, Any]:
        """Return {"prefix_cache": hits, misses, bytes, …}."""
        found = [kept.facts() for _, kept in self._cuts.values()]
        sums = {k: sum(f[k] for f in found) for k in ("hits", "misses", "earlier", "bytes")}
        return {"prefix_cache": {"part": found[0]["part"], **sums}} if found else {}

    def undo(self) -> None:
        """Let go of the cache's files."""
        for _, kept in self._cuts.values():
            kept.close()

    def _tell(self, text: str) -> None:
        self.note(text)  # a tracked run may begin after this

    def _enter(self, model: nn.Module, args: Any, kwargs: Any) -> None:
        if not model.training:
            return
        x = next(leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor))
        cut, kept = self._cut(model, x)
        self._modes = [(m, m.training) for m in model.modules()]
        for module, _ in self._modes:
            module.training = False
        samples, found = self.samples, {}
        if samples is not None and torch.is_grad_enabled() and len(samples.positions) == len(x):
            own = {_IMAGE: _digest(x)}
            with self.phase("prefix"):
                names = (*cut.places, _IMAGE)
                found = kept.layers(samples, lambda: {**frozen_part(model, cut, args, kwargs), **own}, names, x.device)
            if not torch.allclose(found[_IMAGE], own[_IMAGE], rtol=1e-3, atol=1e-4):  # not the images of these positions
                found = {}
        trained = {id(m) for path in cut.trained for m in model.get_submodule(path).modules()}
        for module, training in self._modes:
            module.training = training and id(module) in trained
        if found:
            self._open.enter_context(skipping(model, cut, found, len(x)))

    def _leave(self, model: nn.Module, args: Any, output: Any) -> None:
        self._open.close()
        for module, training in self._modes:
            module.training = training
        self._modes = []

    def _cut(self, model: nn.Module, x: Tensor) -> tuple[Cut, Kept]:
        size = tuple(x.shape[1:])
        if size not in self._cuts:  # in a thread of its own: who counts this step's FLOPs would take it for part of each step
            with ThreadPoolExecutor(1) as aside:
                self._cuts[size] = aside.submit(self._look, model, image(model, (size[0], size[1], size[2])).to(x)).result()
        return self._cuts[size]

    def _look(self, model: nn.Module, example: Tensor) -> tuple[Cut, Kept]:
        cut = find_cut(model, example)
        with quiet(model):
            answers = frozen_part(model, cut, (example,), {})
        seen = ", ".join(f"{n} {a.float().abs().mean():.4g}" for n, a in answers.items())  # hooks have no weights to compare
        learned = {n for n, p in model.named_parameters() if p.requires_grad}
        state = {n: t for n, t in model.state_dict().items() if not cut.holds(n) and n not in learned}
        state[f"{model!r} {seen}"] = torch.empty(0)
        part = f"{type(model).__name__}: what enters {some(cut.trained, 2)}"
        return cut, Kept(part, models.fingerprint(state), dtype=self._dtype, note=self._tell)
