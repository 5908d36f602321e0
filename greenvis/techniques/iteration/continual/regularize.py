"""Regularisation for continual learning: hold the weights that mattered for earlier tasks (EWC,
MAS, SI)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from greenvis.core import distributed
from greenvis.core.modes import in_mode
from greenvis.core.technique import Installed, OnlyWith, Technique, logits_of
from greenvis.core.weights import below
from greenvis.tasks.answers import CLASSES, require_class_numbers
from greenvis.techniques.iteration.continual._gradients import sample_gradients

Fisher = Literal["sample", "batch", "weighted", "true"]
_TOGETHER = 256  # samples to take at once where batches do not matter


def fisher(
    model: nn.Module, names: list[str], loader: Any, definition: Fisher = "sample"
) -> dict[str, Tensor]:
    """Return the diagonal of a Fisher information by parameter, a mean over the loader's samples.

    Of several processes each may bring its own part of the data: the mean is over all of it.

    Args:
        model: images to logits (batch, classes).
        names: parameters.
        loader: batches (x, y).
        definition: "sample": the square of each sample's gradient (the empirical Fisher). "batch":
            the square of each batch's mean gradient, a mean over batches; smaller about by the
            batch size (avalanche's). "weighted": each sample's square times the probability of its
            label (mammoth's, but for its division by full batches). "true": labels from the model,
            the expectation over all classes taken exactly, at the cost of a backward for each
            (Kirkpatrick et al., 2017).

    Returns:
        By name a tensor of the parameter's shape.
    """
    total = _zeros(model, names)
    count = 0
    for x, y in _on_device(model, loader, least=1 if definition == "batch" else _TOGETHER):
        require_class_numbers(y, "a Fisher information", Regularize.instead)
        if definition == "batch":
            gradients = _gradients(
                model, names, lambda x=x, y=y: F.cross_entropy(_logits(model, x), y)
            )
            _add(total, {n: g.square() for n, g in gradients.items()})
            count += 1
            continue
        with torch.no_grad():
            p = _logits(model, x).softmax(-1)
        for label in range(p.shape[1]) if definition == "true" else (None,):
            labels = y if label is None else torch.full_like(y, label)
            chance = p.gather(1, labels[:, None]).squeeze(1)
            _add(
                total,
                _squares(
                    model,
                    names,
                    x,
                    labels,
                    torch.ones_like(chance) if definition == "sample" else chance,
                ),
            )
        count += len(x)
    count = distributed.all_reduce_sum(total, count)
    return {n: t / max(count, 1) for n, t in total.items()}


def mas(
    model: nn.Module,
    names: list[str],
    loader: Any,
    definition: Literal["sample", "batch"] = "batch",
) -> dict[str, Tensor]:
    """Return memory-aware importances by parameter (Aljundi et al., 2018, eq. 3), a mean over
    samples; labels are not used.

    Args:
        model: images to logits (batch, classes).
        names: parameters.
        loader: batches (x, y).
        definition: the absolute gradient of the squared L2 norm of the logits, of each "sample" or
            of each "batch"'s mean (as libraries have it).

    Returns:
        By name a tensor of the parameter's shape.
    """
    total = _zeros(model, names)
    count = 0
    for x, _ in _on_device(model, loader):
        for part in x.split(1 if definition == "sample" else len(x)):
            gradients = _gradients(
                model, names, lambda x=part: _logits(model, x).square().sum(1).mean()
            )
            _add(total, {n: len(part) * g.abs() for n, g in gradients.items()})
        count += len(x)
    count = distributed.all_reduce_sum(total, count)
    return {n: t / max(count, 1) for n, t in total.items()}


def path_importance(path: Tensor, moved: Tensor, damping: float) -> Tensor:
    """Return what a task's path through the weights adds to their importance (SI: Zenke et al.,
    2017, eq. 5).

    Args:
        path: the sum over steps of −gradient · change, of a parameter's shape.
        moved: the change over all steps.
        damping: added to its square.

    Returns:
        Of the parameter's shape, never negative.
    """
    return (path / (moved.square() + damping)).clamp_min(0)


def penalty(
    parameters: Mapping[str, Tensor], importance: Mapping[str, Tensor], anchor: Mapping[str, Tensor]
) -> Tensor:
    """Return Σ importance · (parameter − anchor)², without a factor ½, as libraries have it.

    Args:
        parameters, importance, anchor: by name, of one shape each.

    Returns:
        A scalar.
    """
    return torch.stack(
        [(w * (parameters[n] - anchor[n]).square()).sum() for n, w in importance.items()]
    ).sum()


class Regularize(Technique):
    """Keep weights close to those that mattered for earlier tasks (EWC: Kirkpatrick et al., 2017;
    online: Schwarz et al., 2018;
    MAS: Aljundi et al., 2018; SI: Zenke et al., 2017).

    Saves a buffer and training again. Costs a pass over the task's data at its end (a backward for
    each sample; SI: none), two copies of the weights, and the penalty each step; where the test
    does not say the task, it does not keep classes apart. weight · Σ importance · change², without
    ½: of two libraries' Fishers one is 8 times the other, so a weight belongs to its `fisher`.
    """

    name = "regularize"
    only_with: ClassVar[OnlyWith] = {
        "fisher": ("method", ("ewc", "mas")), "online": ("method", ("ewc",)), "damping": ("method",
        ("si",)),
    }  # fmt: skip
    stage = "objective"
    instead = "weigh by what reads no labels: method mas, or si"
    examples = ({"weight": 10.0}, {"method": "si", "weight": 1.0})

    method: Literal["ewc", "mas", "si"] = "ewc"
    weight: float = Field(default=100.0, ge=0, description="factor of the penalty")
    fisher: Fisher = Field(
        default="sample",
        description="of ewc, and of mas (sample or batch): what is squared; see greenvis explain",
    )
    online: bool = Field(
        default=True, description="of ewc: hold to the last weights; else to each task's own"
    )
    decay: float | None = Field(
        default=None,
        ge=0,
        le=1,
        description="factor on old importances at a task's end, 1; of mas: their share, 0.5",
    )
    damping: float = Field(default=0.1, gt=0, description="of si: added to the squared change")

    @property
    def tasks(self) -> frozenset[str] | None:  # type: ignore[override]
        """What it is right for: a Fisher information is that of a class per image; MAS and SI read
        no labels."""
        return CLASSES if self.method == "ewc" else None

    def install(self, model: nn.Module) -> Installed:
        """Leave the model as it is."""
        return InstalledRegularize(self, model)


class InstalledRegularize(Installed):
    """Importances and anchors by parameter. Adds the term "regularize"."""

    def __init__(self, request: Regularize, model: nn.Module) -> None:
        super().__init__()
        self.request, self.model = request, model
        self.importance: dict[str, Tensor] = {}
        self.anchor: dict[str, Tensor] = {}
        self.rest = 0.0  # of EWC per task: what the penalty is at its lowest
        # of SI: −gradient · change so far, where the task and where the step began
        self._path: dict[str, Tensor] = {}
        self._start: dict[str, Tensor] = {}
        self._last: dict[str, Tensor] = {}
        # the tensors themselves: what a trainer does to them until `step_end` counts
        self._grads: dict[str, Tensor] = {}
        self._hooks: list[RemovableHandle] = []
        self._hooked: set[int] = set()
        self._lr: float | None = None

    def param_groups(self, lr: float) -> list[dict[str, Any]]:
        """Note the learning rate, which bounds the penalty; there are no groups of its own."""
        self._lr = lr
        return []

    def terms(self, x: Any, y: Any, logits: Tensor | None) -> Mapping[str, Tensor]:
        """Return {"regularize": weight · penalty}, from the second task on."""
        if self.request.method == "si":
            self._follow()
        now = dict(self.model.named_parameters())
        importance = {n: w for n, w in self.importance.items() if n in now and now[n].requires_grad}
        if not importance:
            return {}
        return {
            "regularize": self.request.weight * (penalty(now, importance, self.anchor) + self.rest)
        }

    def step_end(self) -> None:
        """Add the step to the path of each weight. A step that was skipped moved nothing, and its
        gradients are not finite."""
        with torch.no_grad():
            for name, noted in self._grads.items():
                parameter = self.model.get_parameter(name)
                # None: cleared already
                gradient = noted if parameter.grad is None else parameter.grad
                gradient = gradient.to(self._path[name].dtype).nan_to_num(0.0, 0.0, 0.0)
                if name in self.importance:  # the task's own gradient, without the penalty's
                    pull = self.importance[name] * (self._last[name] - self.anchor[name])
                    gradient = gradient - 2 * self.request.weight * pull
                self._path[name] -= gradient * (parameter - self._last[name])
                self._last[name] = parameter.detach().clone()
        self._grads.clear()

    def end_experience(self, loader: Any) -> None:
        """Add the task's importances, and hold on to the weights as they are."""
        request, decay = self.request, self._decay()
        now = {n: p.detach().clone() for n, p in self.model.named_parameters() if p.requires_grad}
        if request.method == "si":
            self._follow()
            new = {
                n: path_importance(
                    self._path[n], (now[n] - self._start[n]).to(_precise(now[n])), request.damping
                )
                for n in now
            }
            self._path, self._start = {}, {}
        else:
            with in_mode(self.model, False), self.phase("importance"):
                if request.method == "mas":
                    new = mas(
                        self.model,
                        list(now),
                        loader,
                        "batch" if request.fisher == "batch" else "sample",
                    )
                else:
                    new = fisher(self.model, list(now), loader, request.fisher)
        for name, value in new.items():
            old = self.importance.get(name, torch.zeros_like(value))
            if request.method == "mas":
                share = decay if name in self.importance else 0.0
                self.importance[name] = share * old + (1 - share) * value
            elif request.method == "ewc" and not request.online:
                self._meet(name, old, value, now[name])
                continue
            else:
                self.importance[name] = decay * old + value
            self.anchor[name] = now[name]
        self._check_step()

    def _check_step(self) -> None:
        """Say where gradient descent cannot follow the penalty: steps of lr · 2 · weight ·
        importance > 2 grow."""
        greatest = max((float(value.max()) for value in self.importance.values()), default=0.0)
        if self._lr is not None and self._lr * self.request.weight * greatest > 1:
            bound = 1 / (self._lr * self.request.weight)
            self.note(
                f"regularize: at a learning rate of {self._lr:g}, gradient descent throws off a "
                f"weight whose importance tops 1 / (lr · weight) = {bound:.3g}, and the greatest "
                f"is {greatest:.3g}; expect a loss that is not finite, unless weight is below "
                f"{1 / (self._lr * greatest):.2g} or train.clip_norm is set"
            )

    def _decay(self) -> float:
        if self.request.decay is not None:
            return self.request.decay
        return 0.5 if self.request.method == "mas" else 1.0

    def _meet(self, name: str, old: Tensor, new: Tensor, now: Tensor) -> None:
        """Fold one more quadratic into the sum of all tasks', which is one quadratic about a
        weighted mean, and a rest."""
        old, anchor = self._decay() * old, self.anchor.get(name, now)
        total = old + new
        share = torch.where(total > 0, new / total.clamp_min(torch.finfo(total.dtype).tiny), 0.0)
        self.rest += float((old * share * (now - anchor).square()).double().sum())
        self.importance[name], self.anchor[name] = total, anchor + share * (now - anchor)

    def _follow(self) -> None:
        """Note each weight's gradient as it comes, and where the task began."""
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad and name not in self._path:
                self._path[name] = torch.zeros_like(parameter, dtype=_precise(parameter))
                self._start[name] = parameter.detach().clone()
                self._last[name] = parameter.detach().clone()
            if parameter.requires_grad and id(parameter) not in self._hooked:
                self._hooked.add(id(parameter))
                self._hooks.append(parameter.register_post_accumulate_grad_hook(self._note(name)))

    def _note(self, name: str) -> Callable[[Tensor], None]:
        def note(parameter: Tensor) -> None:
            assert parameter.grad is not None
            self._grads[name] = parameter.grad.detach()

        return note

    def state_dict(self) -> dict[str, Tensor]:
        """Return importances, anchors and the paths of the task under way."""
        groups = {
            "importance": self.importance,
            "anchor": self.anchor,
            "path": self._path,
            "start": self._start,
        }
        state = {f"{kind}.{n}": t for kind, tensors in groups.items() for n, t in tensors.items()}
        return {**state, "rest": torch.tensor(self.rest, dtype=torch.float64)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take them back."""
        devices = {n: p.device for n, p in self.model.named_parameters()}
        groups = {
            "importance": self.importance,
            "anchor": self.anchor,
            "path": self._path,
            "start": self._start,
        }
        for kind, group in groups.items():
            values = below(state, f"{kind}.")
            group.clear()
            group.update({n: v.clone().to(devices.get(n, v.device)) for n, v in values.items()})
        self._last = {n: self.model.get_parameter(n).detach().clone() for n in self._path}
        self.rest = float(state["rest"])

    def undo(self) -> None:
        """Let go of the gradients."""
        for hook in self._hooks:
            hook.remove()


def _squares(
    model: nn.Module, names: list[str], x: Tensor, y: Tensor, weights: Tensor
) -> dict[str, Tensor]:
    """Return by parameter the sum over samples of weight · gradient² of the cross entropy."""
    total = _zeros(model, names)
    for rows, gradients in sample_gradients(model, names, x, y):
        _add(
            total,
            {
                n: torch.einsum(
                    "b,b...->...", weights[rows].to(_precise(g)), g.to(_precise(g)).square()
                )
                for n, g in gradients.items()
            },
        )
    return total


def _gradients(model: nn.Module, names: list[str], loss: Callable[[], Tensor]) -> dict[str, Tensor]:
    parameters = [model.get_parameter(n) for n in names]
    gradients = torch.autograd.grad(loss(), parameters, allow_unused=True)
    pairs = zip(names, parameters, gradients, strict=True)
    return {n: (torch.zeros_like(p) if g is None else g).to(_precise(p)) for n, p, g in pairs}


def _logits(model: nn.Module, x: Tensor) -> Tensor:
    logits = logits_of(model(x))
    return logits.to(_precise(logits))


def _zeros(model: nn.Module, names: list[str]) -> dict[str, Tensor]:
    named = {n: model.get_parameter(n) for n in names}
    return {n: torch.zeros_like(p, dtype=_precise(p)) for n, p in named.items()}


def _precise(tensor: Tensor) -> torch.dtype:
    """Return the precision to add up in: the square of a small gradient is 0 in half precision."""
    return torch.promote_types(tensor.dtype, torch.float32)


def _add(total: dict[str, Tensor], more: Mapping[str, Tensor]) -> None:
    for name, value in more.items():
        total[name] += value


def _on_device(model: nn.Module, loader: Any, least: int = 1) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the loader's batches on the model's device, some together until they hold `least`
    samples."""
    device = next(model.parameters()).device
    pending: list[tuple[Tensor, Tensor]] = []
    for x, y in loader:
        pending.append((x, y))
        if sum(len(x) for x, _ in pending) >= least:
            yield (
                torch.cat([x for x, _ in pending]).to(device),
                torch.cat([y for _, y in pending]).to(device),
            )
            pending = []
    if pending:
        yield (
            torch.cat([x for x, _ in pending]).to(device),
            torch.cat([y for _, y in pending]).to(device),
        )
