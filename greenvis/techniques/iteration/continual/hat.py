"""Hard attention to the task: each task learns which hidden units it uses, and those are frozen for
the tasks after it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from greenvis.core.surgery import hold_norms, names_of
from greenvis.core.technique import Experience, InputShape, Installed, Technique
from greenvis.models.structure import reached, view
from greenvis.models.structure.parts import Mlp
from greenvis.techniques._shared.heads import TaskHeads, head_parameters
from greenvis.techniques.iteration.continual._frozen_elements import Mask
from greenvis.techniques.iteration.continual._gates import Gate, gated_mlps

_CHILD = "hat"
_MOST = 50.0  # bound on the argument of cosh
_EMBEDDING = 6.0  # bound on embeddings: a gate further out would not come back


def temperature(step: int, steps: int, s_max: float) -> float:
    """Return the gates' s, which rises linearly from 1 / s_max to s_max (Serra et al., 2018, eq.
    3).

    Args:
        step: of the training, from 0.
        steps: how many there are.
        s_max: s at the last step.

    Returns:
        s at `step`.
    """
    done = min(step / max(steps - 1, 1), 1.0)
    return 1 / s_max + (s_max - 1 / s_max) * done


def compensated(grad: Tensor, embedding: Tensor, s: float, s_max: float) -> Tensor:
    """Return the gradient of embeddings as if the gate had been sigmoid(e), times s_max (eq. 6, 7).

    Args:
        grad, embedding: (units,) each.
        s: of this step.
        s_max: s at the last step.

    Returns:
        (units,).
    """
    bent = torch.cosh((s * embedding).clamp(-_MOST, _MOST)) + 1
    return grad * (s_max / s) * bent / (torch.cosh(embedding) + 1)


def sparsity(gates: Sequence[Tensor], used: Sequence[Tensor]) -> Tensor:
    """Return the share of units not used by earlier tasks that the gates let through, over all
    layers (eq. 8).

    Args:
        gates: per layer (units,), 0 to 1.
        used: per layer (units,), 1 where an earlier task uses the unit, else 0.

    Returns:
        A scalar.
    """
    free = [1 - u for u in used]
    passed = torch.stack([(g * f).sum() for g, f in zip(gates, free, strict=True)]).sum()
    return passed / torch.stack([f.sum() for f in free]).sum().clamp(min=1)


class Hat(Technique):
    """Learn with each task which hidden units of the MLPs it uses, and freeze those for later tasks
    (HAT: Serra et al., 2018).

    Saves the storage of a model per task (a bit per unit instead) and replay; a task that a test
    tells is answered by its own units, bit for bit as when it ended. Costs a product per hidden
    unit; saves no compute: a shut unit is multiplied as others. What is free shrinks with each
    task; the record says how much is used. A gate is sigmoid(s·e), s rising from 1/s_max to s_max
    over `anneal_steps` steps, again and again; in eval it is open or shut, e > 0. Gates start open,
    e from U(0, 2). Gradients of e are compensated for s; the term "hat" is weight × (share of free
    units let through). Once a task has ended, the weights into and out of its units no longer
    learn, and all that has no gate (attention, norms, embeddings) learns in the first task only;
    the authors gate every layer, and scale gradients by soft gates, where here the units are used
    or not, so that any optimizer leaves them alone. Each task has its classifier as it was when it
    ended. In a loop of one's own call `batch` and `step_end`.

    Example:
        >>> live = gv.wrap(model, gv.Hat(s_max=100.0))
        >>> live.begin_experience(experience)
        >>> sorted(live.terms(x, y, model(x)))
        ['hat']
    """

    name = "hat"
    stage = "weights"
    order = 1
    needs = frozenset({"trainable_base"})
    examples = ({}, {"s_max": 50.0, "anneal_steps": 4})

    s_max: float = Field(default=400.0, gt=1, description="greatest steepness s of the gates")
    weight: float = Field(default=0.75, ge=0, description="factor of the sparsity term")
    anneal_steps: int = Field(
        default=100, ge=1, description="steps over which s rises once: as many as an epoch has"
    )
    lr_ratio: float = Field(
        default=10.0, gt=0, description="learning rate of the embeddings over that of the rest"
    )
    input_shape: InputShape = None

    def install(self, model: nn.Module) -> Installed:
        """Put the gates in. Raises BadInput for a model without MLPs whose hidden units can be
        gated."""
        structure = view(model, self.input_shape, probe=False)
        gated = gated_mlps(model, structure)
        learning = reached(model, structure.example)
        heads = head_parameters(model, structure)
        spared = {id(p) for p in heads}
        body = {n: p for n, p in model.named_parameters() if n in learning and id(p) not in spared}
        gates: list[Gate] = []
        for mlp in gated:
            down: Any = model.get_submodule(mlp.down)
            gates.append(Gate(down.weight).train(down.training))
            down.add_module(_CHILD, gates[-1])
            down.register_forward_pre_hook(gates[-1].shut)
        trainable = names_of(model, (*body.values(), *(g.embedding for g in gates), *heads))
        return InstalledHat(
            self, model, list(zip(gated, gates, strict=True)), list(body.values()), heads, trainable
        )


class InstalledHat(Installed):
    """The gates at work. Adds the term "hat". masks: the units of each ended task, a tensor
    (units,) an MLP."""

    def __init__(
        self,
        request: Hat,
        model: nn.Module,
        gates: list[tuple[Mlp, Gate]],
        body: list[nn.Parameter],
        heads: list[nn.Parameter],
        trainable: tuple[str, ...],
    ) -> None:
        super().__init__(trainable, freezes=True)
        self.request, self.model, self.gates = request, model, [g for _, g in gates]
        self.body = {id(p): Mask(p) for p in body}
        self.heads = TaskHeads(heads)
        self.masks: list[list[Tensor]] = []
        self.step = 0
        self.reads: list[tuple[nn.Module, list[nn.Module], Gate]] = []
        for mlp, gate in gates:
            ups = [model.get_submodule(p) for p in (mlp.up, mlp.gate) if p is not None]
            self.reads.append((model.get_submodule(mlp.down), ups, gate))
        self.hooks = [g.embedding.register_hook(partial(self._compensate, g)) for g in self.gates]

    def param_groups(self, lr: float) -> list[dict[str, Any]]:
        """Return the embeddings at `lr_ratio` times `lr`, without weight decay."""
        return [
            {
                "params": [g.embedding for g in self.gates],
                "lr": lr * self.request.lr_ratio,
                "weight_decay": 0.0,
            }
        ]

    def begin_experience(self, experience: Experience) -> None:
        """Draw new gates for a task after the first, and say where no unit is left for it."""
        if self.masks and experience.index == len(self.masks):
            if all(g.used.all() for g in self.gates):
                self.note(
                    f"hat: no free unit is left for task {experience.index + 1}, which can only "
                    "choose among those of earlier tasks: give a greater weight or lr_ratio, more "
                    "steps, or a wider model"
                )
            self.step = 0
            for gate in self.gates:
                gate.restart()

    def batch(self, x: Any, y: Any) -> tuple[Any, Any]:
        """Set the steepness of this step's gates; the batch stays as it is."""
        steps = self.request.anneal_steps
        for gate in self.gates:
            gate.s = temperature(self.step % steps, steps, self.request.s_max)
        return x, y

    def terms(self, x: Any, y: Any, logits: Tensor | None) -> Mapping[str, Tensor]:
        """Return {"hat": weight · sparsity} of this step's gates."""
        gates = [torch.sigmoid(g.s * g.embedding) for g in self.gates]
        return {
            "hat": self.request.weight
            * sparsity(gates, [g.used.to(g.embedding) for g in self.gates])
        }

    def step_end(self) -> None:
        """Take back what the optimizer did to frozen weights, and bound the embeddings."""
        self.step += 1
        with torch.no_grad():
            for gate in self.gates:
                gate.embedding.clamp_(-_EMBEDDING, _EMBEDDING)
        if self.masks:
            for elements in self.body.values():
                elements.hold()

    def eval_experience(self, experience: Experience | None) -> None:
        """Use the units of the task, once it has ended; None: the current gates again."""
        ended = None
        if experience is not None and experience.index < len(self.masks):
            ended = experience.index
        for i, gate in enumerate(self.gates):
            gate.override = None if ended is None else self.masks[ended][i]
        self.heads.select(ended)

    def end_experience(self, loader: Any) -> None:
        """Freeze the task's units, and in the first task all that has no gate."""
        self.heads.save(len(self.masks))
        self.masks.append([g.embedding.detach() > 0 for g in self.gates])
        for gate, mask in zip(self.gates, self.masks[-1], strict=True):
            gate.used |= mask
        self._freeze()

    def facts(self) -> Mapping[str, Any]:
        """Return the share of hidden units in use, and that which each ended task uses."""
        units = sum(len(g.used) for g in self.gates)
        shares = [round(sum(int(m.sum()) for m in masks) / units, 4) for masks in self.masks]
        return {
            "hat_used": round(sum(int(g.used.sum()) for g in self.gates) / units, 4),
            "hat_shares": shares,
        }

    def state_dict(self) -> dict[str, Tensor]:
        """Return the ended tasks' units and classifiers, and where in the rise of s this is."""
        masks = {
            f"mask.{t}.{i}": m for t, masks in enumerate(self.masks) for i, m in enumerate(masks)
        }
        return {"step": torch.tensor(self.step), **masks, **self.heads.state_dict()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take that back; the frozen values are those the model has now."""
        self.step = int(state["step"])
        ended = {int(key.split(".")[1]) for key in state if key.startswith("mask.")}
        self.masks = [
            [state[f"mask.{t}.{i}"].to(g.used, copy=True) for i, g in enumerate(self.gates)]
            for t in sorted(ended)
        ]
        self.heads.load_state_dict(state)
        if self.masks:
            self._freeze()

    def merge(self) -> None:
        """Fold the current task's gates, open or shut, into the layers that read its units."""
        with torch.no_grad():
            for down, _, gate in self.reads:
                weight: Any = down.weight
                weight.mul_(gate.eval().values())

    def undo(self) -> None:
        """Let go of the gradients."""
        for hook in (*self.hooks, *(elements.hook for elements in self.body.values())):
            hook.remove()

    def _freeze(self) -> None:
        """Hold the weights into and out of used units, and all that has no gate."""
        for elements in self.body.values():
            elements.mask = torch.ones((), dtype=torch.bool)
        for down, ups, gate in self.reads:
            self._hold(down.weight, gate.used[None, :])
            for up in ups:
                self._hold(up.weight, gate.used[:, None])
                if up.bias is not None:
                    self._hold(up.bias, gate.used)
        for elements in self.body.values():
            elements.take()
        hold_norms(self.model)

    def _hold(self, parameter: Any, mask: Tensor) -> None:
        if id(parameter) in self.body:
            self.body[id(parameter)].mask = mask.clone()

    def _compensate(self, gate: Gate, grad: Tensor) -> Tensor:
        return compensated(grad, gate.embedding.detach(), gate.s, self.request.s_max)
