"""Structured pruning: channels, attention heads and MLP neurons go, and a smaller model stays."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from greenvis.core.attached import attach_settings, attach_sizes
from greenvis.core.surgery import find, names_of, replace
from greenvis.core.technique import InputShape, Installed, Technique
from greenvis.errors import BadInput, GreenvisError, some
from greenvis.models.structure import View, view
from greenvis.techniques._shared.attach import check_runs
from greenvis.techniques.inference.structure import _cuts, _heads, _planned
from greenvis.techniques.inference.structure._cuts import Plan, Share

PARTS = ("channels", "heads", "neurons")


class Prune(Technique):
    """Take the least important channels, attention heads and MLP neurons out of a trained model,
    together with all that is coupled to them (DepGraph: Fang et al., 2023; heads: Michel et al.,
    2019), and go on with the smaller one.

    Saves MACs, weights and time of each image: with `ratio` 0.5 about three quarters of a
    convolutional network's MACs, half of each MLP's. Costs accuracy, most of which comes back with
    training; distil from the original (`distill`) in the same arm. Importance is the norm of what
    a unit's weights are in all layers that hang on it; `random` is the baseline it has to beat.
    Where few units go, a library's fast kernels may be lost and nothing is saved: `multiple_of` 8
    or 16 keeps channels and neurons in step with a processor's registers.
    The width of a transformer's residual stream stays, as does what the classifier answers. It
    merges into a plain, smaller model of the same keys, whose file says how small it is, so that
    `run:` and `file:` build it again.

    `widths` makes it a ladder: each training step runs the model at one width in turn (ordered
    dropout: Horváth et al., 2021), so that the finished one can be served at any of them, as
    operating points. Not where batch norms stand behind what goes: they have the statistics of one
    width.

    Example:
        >>> live = gv.wrap(model, gv.Prune(ratio=0.5))
        >>> live.facts()["pruned"]["share_of_parameters"] < 0.8
        True
        >>> small = live.merge()
    """

    name = "prune"
    stage = "base"
    needs = frozenset({"trainable_base"})
    only_with = {}
    examples = (
        {},
        {"ratio": 0.3, "importance": "random", "multiple_of": 2},
        {"parts": ["neurons"], "widths": [0.5]},
    )
    neutral = {"ratio": 0.0, "widths": []}
    nothing = {"targets": ["no_such_layer"]}

    ratio: float = Field(
        default=0.5, ge=0, lt=1, description="share of the units of each layer that goes"
    )
    parts: list[Literal["channels", "heads", "neurons"]] | None = Field(
        default=None,
        min_length=1,
        description="which units: of convolutions, of attention, of MLPs; all it has where absent",
    )
    importance: Literal["magnitude", "random"] = Field(
        default="magnitude", description="which units go: those of small weights, or any"
    )
    multiple_of: int = Field(
        default=1, ge=1, description="of which the channels and neurons that stay are a multiple"
    )
    widths: list[float] = Field(
        default=[], description="shares of what stays, below 1, to be served at as well"
    )
    targets: list[str] | None = Field(
        default=None,
        description="shell patterns on paths of convolutions, attentions and MLPs' first layers; "
        "default all",
    )
    input_shape: InputShape = None

    def install(self, model: nn.Module) -> Installed:
        """Take units out. Raises BadInput for a model without such units, or whose layers cannot be
        followed."""
        _planned.require_torch_pruning()
        if any(not 0 < width < 1 for width in self.widths):
            raise BadInput(f"widths are {self.widths}; each is a share between 0 and 1")
        chosen = None if self.targets is None else frozenset(find(model, self.targets, nn.Module))
        structure = view(model, self.input_shape, probe=False)
        parts = self._parts(model, structure, chosen)
        share = Share(self.ratio, parts, self.importance, self.multiple_of, chosen)
        plan = _planned.planned(model, structure, share)
        if self.ratio and not plan:
            raise BadInput(
                f"{type(model).__name__} has no unit to take out at a ratio of {self.ratio:g}"
                + ("" if chosen is None else f" among {some(sorted(chosen))}")
                + ": raise ratio, or name others by targets"
            )
        ladder = {w: self._rung(model, structure, share, plan, w) for w in self.widths}
        total = sum(p.numel() for p in model.parameters())
        sizes = _cuts.sizes(model, plan)
        pairs = []
        before = {id(p) for p in model.parameters()}
        for path, cut in plan.items():
            old = model.get_submodule(path)
            if "forward" in vars(old):
                raise BadInput(f"'{path}' has a forward of its own: prune a plain model")
            new = _cuts.smaller(old, cut)
            replace(model, old, new)
            pairs.append((path, old, new))
        added = [p for p in model.parameters() if id(p) not in before]
        check_runs(model, structure.example, added, "fewer units")
        live = InstalledPrune(self, model, plan, pairs, ladder, sizes, names_of(model, added))
        live.share = sum(p.numel() for p in model.parameters()) / total
        return live

    def _parts(
        self, model: nn.Module, structure: View, chosen: frozenset[str] | None
    ) -> frozenset[str]:
        """Return which units there are to take out, of those asked for."""
        has: dict[str, str] = {}
        if not structure._role("conv"):
            has["channels"] = "it has no convolution behind its patch embedding"
        if not structure.mlps:
            has["neurons"] = "it has no MLP"
        why = [_heads.obstacle(model, a) for a in structure.attention]
        if not why or all(why):
            has["heads"] = why[0] if why else "it has no attention"
        elif self.ratio:
            share = Share(self.ratio, frozenset({"heads"}), self.importance, 1, chosen)
            has |= self._heads_fail(model, structure, share)
        for part in self.parts or ():
            if part in has:
                raise BadInput(f"{type(model).__name__} cannot lose {part}: {has[part]}")
        parts = frozenset(self.parts or [p for p in PARTS if p not in has])
        if not parts:
            reasons = "; ".join(f"{part}: {reason}" for part, reason in has.items())
            raise BadInput(f"{type(model).__name__} has nothing to prune ({reasons})")
        return parts

    def _heads_fail(self, model: nn.Module, structure: View, share: Share) -> dict[str, str]:
        """Try whether the model without heads answers as with them silent."""
        trial = _cuts.applied(model, _planned.planned(model, structure, share))
        silent = _heads.silent(model, structure, share)
        try:
            same = _cuts.same_answers(silent, trial, structure.example)
            why = "without them it does not answer as with them silent"
        except Exception as error:  # whatever a forward raises that counts its heads elsewhere
            same, why = False, f"it does not run without: {str(error).strip()[:150]}"
        return {} if same else {"heads": why}

    def _rung(
        self, model: nn.Module, structure: View, share: Share, plan: Plan, width: float
    ) -> Plan:
        """Return what stays at a width, of what `plan` leaves."""
        ratio = 1 - (1 - self.ratio) * width
        narrow = _planned.planned(model, structure, Share(ratio, *_rest(share)))
        norm = next(
            (
                path
                for path, cut in narrow.items()
                if any(n in cut.tensors for n in model.get_submodule(path)._buffers)
            ),
            None,
        )
        if norm is not None:
            raise BadInput(
                f"widths: '{norm}' has the statistics of one width, so that "
                f"{type(model).__name__} cannot be served at several: leave widths out, or parts "
                "with such norms"
            )
        inner = _cuts.within(plan, narrow)
        if inner is None:
            raise BadInput(
                f"at a width of {width:g} other units would stay than at 1: leave it out"
            )
        return inner


def _rest(share: Share) -> tuple[Any, ...]:
    return share.parts, share.importance, share.multiple_of, share.chosen


class InstalledPrune(Installed):
    """Smaller modules in a live model. pairs: path, what was there, what stands in its place."""

    shrinks = True
    share = 1.0  # of the parameters, that stays

    def __init__(
        self,
        request: Prune,
        model: nn.Module,
        plan: Plan,
        pairs: list[tuple[str, nn.Module, nn.Module]],
        ladder: Mapping[float, Plan],
        sizes: Mapping[str, tuple[int, ...]],
        trainable: tuple[str, ...],
    ) -> None:
        super().__init__(trainable)
        self.request, self.model, self.plan, self.pairs = request, model, plan, pairs
        self.ladder, self.sizes, self.steps = dict(ladder), dict(sizes), 0
        self._narrowed: list[AbstractContextManager[None]] = []
        if self.ladder:
            model.register_forward_pre_hook(self._before)
            model.register_forward_hook(self._after, always_call=True)

    def step_end(self) -> None:
        """Go on to the next width."""
        self.steps += 1

    def _before(self, module: nn.Module, args: Any) -> None:
        rungs: list[Plan | None] = [None, *self.ladder.values()]
        plan = rungs[self.steps % len(rungs)] if module.training else None
        if plan is not None:
            self._narrowed.append(self._at(plan))
            self._narrowed[-1].__enter__()

    def _after(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._narrowed:
            self._narrowed.pop().__exit__(None, None, None)

    @contextmanager
    def _at(self, plan: Plan) -> Iterator[None]:
        """Hold the model at a width; gradients reach what it has in full."""
        modules = [(self.model.get_submodule(path), cut) for path, cut in plan.items()]
        saved = [
            (m, {n: m._parameters[n] for n in cut.tensors}, {n: vars(m)[n] for n in cut.settings})
            for m, cut in modules
        ]
        try:
            for module, cut in modules:
                parameters: dict[str, Any] = module._parameters
                for name, positions in cut.tensors.items():
                    parameters[name] = _cuts.taken(parameters[name], positions)
                vars(module).update(cut.settings)
            yield
        finally:
            for module, tensors, settings in saved:
                module._parameters.update(tensors)
                vars(module).update(settings)

    @contextmanager
    def _point(self, plan: Plan | None) -> Iterator[dict[str, Any]]:
        if plan is None:
            yield {}
            return
        with torch.no_grad(), self._at(plan):
            yield {}

    def operating_points(self) -> Mapping[str, AbstractContextManager[dict[str, Any]]]:
        """Return the widths it can be served at, the full one first; none where there is one."""
        if not self.ladder:
            return {}
        narrow = {f"width {w:g}": self._point(plan) for w, plan in self.ladder.items()}
        return {"width 1": self._point(None), **narrow}

    def facts(self) -> Mapping[str, Any]:
        """Return the share of parameters that stays, and how many of which units of each layer."""
        pairs: list[tuple[str, Any, Any]] = [*self.pairs]
        units = {
            path: [n, len(old.weight)]
            for path, old, new in pairs
            if isinstance(new, (nn.Linear, nn.modules.conv._ConvNd))
            and (n := len(new.weight)) < len(old.weight)  # type: ignore[arg-type]
        }
        return {"pruned": {"share_of_parameters": self.share, "stay_of": units}}

    def state_dict(self) -> dict[str, Tensor]:
        """Return which units stay, and the number of steps."""
        return {"steps": torch.tensor(self.steps), **self._positions()}

    def _positions(self) -> dict[str, Tensor]:
        first = {
            path: cut.tensors["weight"]
            for path, cut in self.plan.items()
            if "weight" in cut.tensors
        }
        return {
            f"stays.{path}": t.flatten(1)[:, 0] if t.dim() > 1 else t for path, t in first.items()
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Load what `state_dict` returned. Raises GreenvisError where other units stayed there."""
        own = self._positions()
        theirs = {n: t for n, t in state.items() if n != "steps"}
        if own.keys() != theirs.keys() or any(
            not torch.equal(own[n], theirs[n].cpu()) for n in own
        ):
            raise GreenvisError(
                "this state is of a model that lost other units: wrap the weights it was pruned "
                "from, with the same settings"
            )
        self.steps = int(state["steps"])

    def merge(self) -> None:
        """Leave the smaller layers in the model, whose file says how small they are."""
        changes = {}
        for path, old, new in self.pairs:
            cut = self.plan[path]
            for name in cut.tensors:
                mine = old._parameters if name in new._parameters else old._buffers
                mine[name] = getattr(new, name)
            changes[old] = cut.settings
        attach_settings(self.model, changes)
        attach_sizes(self.model, self.sizes)
