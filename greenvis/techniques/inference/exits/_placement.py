"""Where early exits can stand: blocks behind which samples may leave, found by structure and tried
out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from greenvis.core.modes import removing
from greenvis.core.technique import logits_of
from greenvis.errors import BadInput, nearest
from greenvis.models.structure import View, view
from greenvis.models.structure.layout import Layout, layouts
from greenvis.models.structure.probing import probing
from greenvis.models.structure.trace import Trace, trace
from greenvis.techniques._shared.attach import patches_matter, seat
from greenvis.techniques._shared.rows import notify, rows_of
from greenvis.techniques.inference.exits._early_exit_runtime import ExitHead, Exits, Outer

CHILD = "exit"


@dataclass(frozen=True)
class Placement:
    """The modules chosen to have an exit behind them.

    Attributes:
        paths: in the order they are reached.
        layouts: of what each returns.
        view: of the model.
        classes: of its answer.
        macs: of the model without exits, per image.
    """

    paths: tuple[str, ...]
    layouts: tuple[Layout, ...]
    view: View
    classes: int
    macs: float


def find_placement(
    model: nn.Module, at: Sequence[int | float | str], shape: tuple[int, int, int] | None
) -> Placement:
    """Choose the modules that `at` names.

    Args:
        model: in which samples leave early.
        at: numbers of blocks from 1, shares of the MACs, or paths.
        shape: (channels, height, width) of an image; None: inferred.

    Raises:
        BadInput: where no sample can leave there, with what can be named instead.
    """
    what = type(model).__name__
    structure = view(model, shape, probe=False)
    traced = trace(model, structure.example)
    logits = logits_of(traced.output)
    if logits.dim() != 2 or len(logits) != len(structure.example) or logits.shape[1] < 2:
        raise BadInput(
            f"exits answer with (batch, classes), two or more, and {what} gives "
            f"{tuple(logits.shape)}"
        )
    named = [p for p in at if isinstance(p, str)]
    for path in named:
        if path not in traced.executed or not path:
            raise BadInput(
                f"at names '{path}', but {what} runs no such "
                f"module{nearest(path, structure.blocks or traced.executed)}"
            )
    within = [p for p in traced.executed if p and "." not in p]
    layout_of = layouts(traced, dict.fromkeys([*structure.blocks, *within, *named]))
    for path in named:
        if why := _why_not(model, traced, layout_of, path):
            raise BadInput(f"no exit can stand behind '{path}' of {what}: {why}")
    candidates = [p for p in structure.blocks if not _why_not(model, traced, layout_of, p)]
    if not candidates:
        candidates = [
            p
            for p in within
            if p not in structure.heads and not _why_not(model, traced, layout_of, p)
        ]
        candidates = [p for p, why in _one_leaves(model, structure.example, candidates) if not why]
    spent = _spent(model, structure.example, [*candidates, *named])
    chosen = {*named, *(_by_number(candidates, n, what) for n in at if isinstance(n, int))}
    chosen |= {_by_share(candidates, spent, s, what) for s in at if isinstance(s, float)}
    paths = tuple(p for p in spent if p in chosen)
    for path, why in _one_leaves(model, structure.example, paths):
        if why:
            raise BadInput(
                f"samples cannot leave {what} behind '{path}': {why}; choose another place"
            )
    return Placement(
        paths, tuple(layout_of[p] for p in paths), structure, logits.shape[1], spent[""]
    )


def _by_number(candidates: list[str], number: int, what: str) -> str:
    if not 1 <= number <= len(candidates):
        raise BadInput(
            f"at names block {number}, but samples can leave {what} after {len(candidates)} "
            f"blocks: give 1 to {len(candidates)}"
        )
    return candidates[number - 1]


def _by_share(candidates: list[str], spent: dict[str, float], share: float, what: str) -> str:
    if not 0 < share < 1:
        raise BadInput(f"at has the share {share}: a share of the MACs lies between 0 and 1")
    # an exit behind the last block saves nothing
    before = [p for p in candidates if spent[p] < 0.97 * spent[""]]
    if not before:
        raise BadInput(
            f"{what} shows no block before its end behind which samples could leave; name a module "
            "by its path"
        )
    return min(before, key=lambda p: abs(spent[p] / spent[""] - share))


def _why_not(model: nn.Module, traced: Trace, layout_of: dict[str, Layout], path: str) -> str:
    """Say why no exit can stand behind `path`, "" where one can."""
    runs = traced.runs.get(path, [])
    if len(runs) != 1:
        return f"it runs {len(runs)} times in a forward"
    if path not in layout_of:
        return "it does not give one tensor"
    if layout_of[path].output[0] != traced.input_shape[0]:
        return f"what it gives, {layout_of[path].output}, is not laid out by sample"
    if len(layout_of[path].output) > 4:
        return f"it gives {len(layout_of[path].output)} axes"
    if seat(model, path) is not None:
        return ""
    return "it runs every module it holds, so it cannot hold a head"


def _one_leaves(
    model: nn.Module, example: Tensor, paths: Sequence[str]
) -> Iterator[tuple[str, str]]:
    """Take one sample of three out behind each path, and say why that will not do: "" where the
    others' answers stay."""
    if example.device.type == "meta":
        yield from ((p, "") for p in paths)
        return
    one, stay = example[:1], torch.tensor([0, 2], device=example.device)
    images = torch.cat([one, 1 - one.flip(-1), one.roll(one.shape[-2] // 3, -2)])
    with probing(model):
        full = logits_of(model(images)).float()
        apart, fine = (full - full.mean(0)).abs().max(), images.dtype.itemsize >= 4
        for path in paths:
            hook = model.get_submodule(path).register_forward_hook(partial(_thinned, model, stay))
            try:
                rest = logits_of(model(images)).float()
            except Exception as error:  # whatever a model raises here means: not with fewer samples
                yield (
                    path,
                    f"the rest does not run with fewer ({type(error).__name__}: "
                    f"{str(error).strip()[:200]})",
                )
                continue
            finally:
                hook.remove()
            limit = (1e-2 if fine else 0.2) * apart + (1e-5 if fine else 1e-2) * full.abs().max()
            same = rest.shape == full[stay].shape and bool((rest - full[stay]).abs().max() <= limit)
            yield (
                path,
                ""
                if same
                else "the others' answers change, so what comes later joins the samples of a batch",
            )


def _thinned(model: nn.Module, rows: Tensor, module: nn.Module, args: Any, output: Any) -> Any:
    notify(model, rows, 3)
    return rows_of(output, rows, 3)


def _spent(model: nn.Module, example: Tensor, paths: Sequence[str]) -> dict[str, float]:
    """Return the MACs of one image until each module has run, in that order, and of all ("")."""
    with probing(model), _counting() as mode:
        spent: dict[str, float] = {}
        hooks = [
            model.get_submodule(p).register_forward_hook(
                lambda m, a, o, p=p: spent.update({p: mode.get_total_flops() / 2})
            )
            for p in dict.fromkeys(paths)
        ]
        with removing(hooks):
            model(example)
        return spent | {"": max(mode.get_total_flops() / 2, 1.0)}


@contextmanager
def _counting() -> Iterator[FlopCounterMode]:
    """Count as the field does: attention as plain products, which torch counts right with gradients
    enabled only."""
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as mode:
        yield mode


def pooling(model: nn.Module, structure: View) -> str:
    """Return what the model's own classifier reads of the tokens: "token" where that is the class
    token alone, else "mean"."""
    if not structure.prefix_tokens or not structure.blocks:
        return "mean"
    return "mean" if patches_matter(model, structure, structure.blocks[-1]) else "token"


def attach_exits(exits: Exits, placement: Placement, pool: str) -> None:
    """Build the heads from the shapes traced and put each behind its place."""
    model = exits.model
    for path, layout in zip(placement.paths, placement.layouts, strict=True):
        home = seat(model, path)
        assert home is not None
        prefix = placement.view.prefix_tokens if len(layout.output) == 3 else 0
        kind = pool if prefix else "mean"
        if pool in ("token", "both") and not prefix:
            raise BadInput(
                f"pool is '{pool}', but what '{path}' gives has no class token; set pool to mean "
                "or auto"
            )
        if hasattr(home, CHILD):
            raise BadInput(f"two exits would stand behind '{path}': name one place only")
        weight = next(
            (p for p in (*home.parameters(), *model.parameters()) if p.is_floating_point()),
            torch.empty(0),
        )
        head = ExitHead(
            layout.width, placement.classes, layout.channels, prefix, kind, device=weight.device,
            dtype=weight.dtype
        )  # fmt: skip
        exits.attach(path, home, CHILD, head)


def try_out(exits: Exits, outer: Outer, placement: Placement) -> list[float]:
    """Run every exit once and note the types of the model's answers.

    Returns:
        MACs per image until each exit, and to the end.
    """
    model, one = exits.model, placement.view.example[:1]
    costs: list[float] = []
    with probing(model), _counting() as mode, exits.record() as recorded:
        hooks = [
            h.register_forward_hook(lambda m, a, o: costs.append(mode.get_total_flops() / 2))
            for h in exits.heads
        ]
        with removing(hooks):
            outer.keep_type(model(one))
        costs.append(mode.get_total_flops() / 2)
        exits.dtype = recorded[-1].dtype if recorded[0].dtype != recorded[-1].dtype else None
    return costs
