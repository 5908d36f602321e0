"""Regularisation for continual learning: hold the weights that mattered for earlier tasks (EWC,
MAS, SI)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from greenvis.core.attached import below
from greenvis.core.modes import in_mode
from greenvis.core.technique import Installed, OnlyWith, Technique
from greenvis.tasks.answers import CLASSES
from greenvis.techniques._shared.attach import precise
from greenvis.techniques.iteration.continual._importance import (
    INSTEAD,
    Fisher,
    fisher,
    mas,
    path_importance,
    penalty,
)


class Regularize(Technique):
    """Keep weights close to those that mattered for earlier tasks (EWC: Kirkpatrick et al., 2017;
    online: Schwarz et al., 2018;
    MAS: Aljundi et al., 2018; SI: Zenke et al., 2017).

    Saves a buffer and training again. Costs a pass over the task's data at its end (a backward for
    each sample; SI: none), two copies of the weights, and the penalty each step; where the test
    does not say the task, it does not keep classes apart. weight · Σ importance · change², without
    ½: of two libraries' Fishers one is 8 times the other, so a weight belongs to its `fisher`.

    Example:
        >>> live = gv.wrap(model, gv.Regularize(method="ewc"))
        >>> live.end_experience([(x, y)])
        >>> sorted(live.terms(x, y, model(x)))
        ['regularize']
    """

    name = "regularize"
    only_with: ClassVar[OnlyWith] = {
        "fisher": ("method", ("ewc", "mas")), "online": ("method", ("ewc",)), "damping": ("method",
        ("si",)),
    }  # fmt: skip
    stage = "objective"
    instead = INSTEAD
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
                    self._path[n], (now[n] - self._start[n]).to(precise(now[n])), request.damping
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
                self._path[name] = torch.zeros_like(parameter, dtype=precise(parameter))
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
