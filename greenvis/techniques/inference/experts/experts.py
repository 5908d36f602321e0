"""Experts: each multi-layer perceptron in parts, of which a token takes the few that matter."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from greenvis.core.example import call
from greenvis.core.modes import removing
from greenvis.core.surgery import find, mark_skippable, names_of, replace
from greenvis.core.technique import InputShape, Installed, Technique
from greenvis.errors import BadInput, some
from greenvis.models.structure import Mlp, View, view
from greenvis.models.structure.probing import probing
from greenvis.tasks.answers import ALL_BUT_VQA, main_output
from greenvis.techniques._shared.attach import check_runs
from greenvis.techniques.inference.experts._clusters import balanced
from greenvis.techniques.inference.experts._routing import Down, Routing, Up


class Experts(Technique):
    """Let each token take a few parts of every multi-layer perceptron: those of a trained one, its
    neurons in clusters (`split`, MoEfication: Zhang et al., 2022), or copies of it (`upcycle`,
    Komatsuzaki et al., 2023; V-MoE: Riquelme et al., 2021).

    `split` saves energy of training and inference: only the chosen experts are computed, so that a
    perceptron of a ViT-Ti took 0.37 to 0.41 of its time with k/E = 1/4 in batches of 1,568 and
    3,136 tokens on a processor, and no less than before where they are few. A block took 0.57 to
    0.69: attention and norms alone are 0.39 to 0.46 of it, which leaves 0.54 to 0.60 at best.
    Answers change, so train on, or distil from the original; with k = E they do not. Its router
    learns beside the model, from images that go through the whole perceptrons (an eighth of each
    batch): the softmax of its answers shall be the experts' shares of what the hidden neurons
    contribute. `upcycle` saves nothing: it takes k times
    the time and E times the memory, for accuracy; its copies are weighed by the router,
    renormalised so that the first answers equal the model's, and part by noise, with a loss for
    equal loads. `expert_choice` fills experts evenly but looks at the whole batch, so that an
    answer depends on the images beside it; `top_k` leaves samples independent.

    Example:
        >>> live = gv.wrap(model, gv.Experts(experts=4, active=1))
        >>> live.facts()["experts"]["layers"]
        2
        >>> live.undo() is model
        True
    """

    name = "experts"
    stage = "base"
    order = 1
    tasks = ALL_BUT_VQA
    instead = "kv_cache and image_tokens make such a model cheaper"
    needs = frozenset({"trainable_base"})
    only_with = {"balance": ("form", ("upcycle",)), "balance_loss": ("form", ("upcycle",))}
    examples = (
        {"experts": 4, "active": 1},
        {"experts": 4, "active": 2, "routing": "expert_choice"},
        {"experts": 4, "active": 1, "form": "upcycle"},
        {"experts": 4, "active": 2, "form": "upcycle", "balance_loss": "importance"},
    )
    neutral = None
    nothing = {"targets": ["no_such_layer"]}

    form: Literal["split", "upcycle"] = Field(
        default="split", description="parts of each multi-layer perceptron, or copies of it"
    )
    experts: int = Field(default=8, ge=2, description="how many, E")
    active: int = Field(default=2, ge=1, description="how many a token takes, k")
    routing: Literal["top_k", "expert_choice"] = Field(
        default="top_k", description="tokens choose experts, or experts tokens"
    )
    balance: float = Field(default=0.01, ge=0, description="weight of the loss for equal loads")
    balance_loss: Literal["load", "importance"] = Field(
        default="load",
        description="load: Switch's E Σ f P; importance: V-MoE's squared coefficient of variation",
    )
    targets: list[str] | None = Field(
        default=None,
        description="shell patterns on paths of the perceptrons' first layers; default all",
    )
    input_shape: InputShape = None

    @model_validator(mode="after")
    def _enough(self) -> Experts:
        if self.active > self.experts:
            raise ValueError(f"active is {self.active}, more than the {self.experts} experts")
        return self

    @property
    # experts that choose their tokens look at the whole batch
    def breaks(self) -> frozenset[str]:  # type: ignore[override]
        """What this breaks for others: with expert choice the independence of samples."""
        return frozenset({"batch_independence"} if self.routing == "expert_choice" else ())

    def install(self, model: nn.Module) -> Installed:
        """Divide or copy perceptrons. Raises BadInput for a model without any whose hidden neurons
        are independent of each other."""
        structure = view(model, self.input_shape, probe=False)
        mlps = self._mlps(model, structure)
        with probing(model):
            before = main_output(model(structure.example))
        routings = [self._divide(model, structure, mlp) for mlp in mlps]
        self._check(model, structure, routings, before)
        layers = [r.layer for r in routings if r.layer is not None]
        added = [p for layer in layers for p in layer.parameters()]
        if self.form == "upcycle":
            check_runs(model, structure.example, [], "copies")
        copies = [p for m in model.modules() if isinstance(m, (Up, Down)) for p in m.parameters()]
        new = copies if self.form == "upcycle" else added
        return InstalledExperts(self, model, routings, names_of(model, new))

    def _check(
        self, model: nn.Module, structure: View, routings: Sequence[Routing], before: Tensor
    ) -> None:
        """Hold the sum of all experts against the model's answers."""
        limit = 1e-4 if before.dtype.itemsize >= 4 else 5e-2
        try:
            with probing(model), _all(routings):
                after = main_output(model(structure.example))
            difference = float((after - before).abs().max())
        except Exception:  # whatever a layer raises that does not fit
            difference = math.inf
        if not difference <= limit * float(before.abs().max()):
            raise BadInput(
                f"the multi-layer perceptrons of {type(model).__name__} do not divide: their "
                "hidden neurons depend on each other (a norm or a convolution stands between the "
                "layers)"
            )

    def _mlps(self, model: nn.Module, structure: View) -> list[Mlp]:
        mlps = [m for m in structure.mlps if not structure.in_classifier(m.up)]
        if self.targets is not None:
            paths = find(model, self.targets, nn.Linear)
            mlps = [m for m in mlps if m.up in paths]
        mlps = [m for m in mlps if _fits(model, structure, m)]
        if not mlps:
            raise BadInput(
                f"{type(model).__name__} has no multi-layer perceptron of plain Linears to divide"
                + ("" if self.targets is None else f" among {some(self.targets)}")
            )
        for mlp in mlps:
            width = _linear(model, mlp.up).out_features
            if self.form == "split" and width % self.experts:
                raise BadInput(
                    f"'{mlp.up}' has {width} neurons, which do not divide into {self.experts} "
                    "experts of equal size"
                )
        return mlps

    def _divide(self, model: nn.Module, structure: View, mlp: Mlp) -> Routing:
        firsts: list[Any] = [model.get_submodule(p) for p in (mlp.up, mlp.gate) if p is not None]
        firsts.sort(key=lambda m: structure.linears.index(_path(model, m)))
        up, down = firsts[0], _linear(model, mlp.down)
        routing = Routing(
            up.in_features, self.experts, self.active, self.routing == "expert_choice",
            self.form == "upcycle", up.weight.detach(),
        )  # fmt: skip
        with torch.no_grad():
            if self.form == "split":
                order = _ordered(firsts, down, self.experts)
                _start(routing, up, down, order)
                for layer in firsts:
                    layer.weight.copy_(layer.weight[order])
                    if layer.bias is not None:
                        layer.bias.copy_(layer.bias[order])
                down.weight.copy_(down.weight[:, order])
        for i, layer in enumerate(firsts):
            new = Up(layer, routing, leads=i == 0).train(layer.training)
            # torch's encoder layer runs a path of its own that reads weights, but not with hooks
            new.register_forward_pre_hook(_seen)
            replace(model, layer, new)
        replace(model, down, Down(down, routing).train(down.training))
        return routing


@mark_skippable
def _seen(module: nn.Module, args: Any) -> None:
    return None


def _fits(model: nn.Module, structure: View, mlp: Mlp) -> bool:
    layers = [p for p in (mlp.up, mlp.gate, mlp.down) if p is not None]
    plain = all(type(model.get_submodule(p)) is nn.Linear for p in layers)
    return plain and not {*layers} & (structure.functional | structure.computed)


def _linear(model: nn.Module, path: str) -> Any:
    return model.get_submodule(path)


def _path(model: nn.Module, module: nn.Module) -> str:
    return next(path for path, m in model.named_modules() if m is module)


def _ordered(firsts: Sequence[Any], down: Any, experts: int) -> Tensor:
    """Return the neurons' order, cluster by cluster, of what they read and write."""
    points = torch.cat([F.normalize(m.weight.float(), dim=1) for m in firsts], 1)
    return balanced(points, experts).argsort(stable=True)


def _start(routing: Routing, up: Any, down: Any, order: Tensor) -> None:
    """Let the router begin with each expert's mean neuron, weighed by what it writes."""
    if routing.layer is None:
        return
    strength = down.weight.norm(dim=0)[order].unflatten(0, (routing.experts, -1))
    share = strength / strength.mean()
    rows = up.weight[order].unflatten(0, (routing.experts, -1))
    routing.layer.weight.copy_((share.unsqueeze(2) * rows).mean(1))
    routing.layer.bias.zero_()
    if up.bias is not None:
        routing.layer.bias.copy_(
            (share * up.bias[order].unflatten(0, (routing.experts, -1))).mean(1)
        )


@contextmanager
def _all(routings: Sequence[Routing]) -> Iterator[None]:
    """Let every expert answer within, one by one."""
    before = [r.dense for r in routings]
    for routing in routings:
        routing.every, routing.dense = True, False
    try:
        yield
    finally:
        for routing, dense in zip(routings, before, strict=True):
            routing.every, routing.dense = False, dense


class InstalledExperts(Installed):
    """Experts in a live model."""

    def __init__(
        self,
        request: Experts,
        model: nn.Module,
        routings: Sequence[Routing],
        trainable: tuple[str, ...],
    ) -> None:
        super().__init__(trainable)
        self.request, self.model, self.routings = request, model, [*routings]
        routers = [r for r in routings if r.layer is not None]
        if routers:
            self.unmergeable = (
                "which experts answer depends on the token, so no dense layer gives what they "
                "give; keep the model wrapped"
            )

    def terms(self, x: Any, y: Any, logits: Tensor | None) -> Mapping[str, Tensor]:
        """Return the routers' loss (`split`), or that of unequal loads (`upcycle`)."""
        if self.request.form == "upcycle":
            losses = [self._unequal(r) for r in self.routings if r.logits is not None]
            if not losses or not self.request.balance:
                return {}
            return {"balance": self.request.balance * torch.stack(losses).sum()}
        if all(r.layer is None for r in self.routings):
            return {}
        return {"router": self._router_loss(x[: max(1, len(x) // 8)])}

    def step_end(self) -> None:
        """Let go of the step's routing, which no copy of the model could take along."""
        for routing in self.routings:
            routing.logits = routing.assignment = None

    def _unequal(self, routing: Routing) -> Tensor:
        """Return E Σ f_e P_e (Switch: Fedus et al., 2022, eq. 4), or the squared coefficient of
        variation of Σ P_e (V-MoE, eq. 8)."""
        assert routing.logits is not None
        shares = routing.logits.softmax(1)
        if self.request.balance_loss == "importance":
            importance = shares.sum(0)
            return importance.var(unbiased=False) / importance.mean().square()
        assert routing.assignment is not None
        counts = torch.tensor(routing.assignment.counts).to(shares)
        return routing.experts * (counts / counts.sum() * shares.mean(0)).sum()

    def _router_loss(self, x: Any) -> Tensor:
        """Return the cross-entropy between the experts' shares and the routers' softmax, over
        tokens of images that every expert answers."""
        taken: dict[int, list[Tensor]] = {}
        hooks = []
        for module in self.model.modules():
            if isinstance(module, Down) or (isinstance(module, Up) and module.leads):
                note = _noting(taken.setdefault(id(module.followed[0]), []))
                hooks.append(module.register_forward_pre_hook(note))
        strengths = {
            id(m.followed[0]): m.weight.detach().norm(dim=0)
            for m in self.model.modules()
            if isinstance(m, Down)
        }
        with removing(hooks), probing(self.model):
            for routing in self.routings:
                routing.dense = True
            call(self.model, x)
        losses = []
        for routing in self.routings:
            if routing.layer is None:
                continue
            tokens, hidden = taken[id(routing)][:2]
            written = (hidden.float() * strengths[id(routing)].float()).square()
            shares = written.unflatten(-1, (routing.experts, -1)).sum(-1).sqrt()
            shares = shares / shares.sum(-1, keepdim=True).clamp(min=1e-12)
            guess = routing.layer(tokens).float().log_softmax(-1)
            losses.append(-(shares * guess).sum(-1).mean())
        return torch.stack(losses).sum()

    def facts(self) -> Mapping[str, Any]:
        """Return how many perceptrons have experts, and each expert's share of the tokens so
        far."""
        loads = [[round(n / max(1, sum(r.load)), 4) for n in r.load] for r in self.routings]
        return {"experts": {"layers": len(self.routings), "loads": loads}}


def _noting(taken: list[Tensor]) -> Any:
    def note(module: nn.Module, args: Any) -> None:
        taken.append(args[0].detach())

    return note
