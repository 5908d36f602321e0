"""Low-rank changes for a stream of tasks: one for each task, those of earlier tasks frozen. Through
PEFT, never rewritten."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from peft import LoraConfig, inject_adapter_in_model
from pydantic import Field, field_validator
from torch import Tensor, nn

from greenvis.core.surgery import find, freeze, names_of, parents_of
from greenvis.core.technique import Classifier, Experience, InputShape, Installed, Technique
from greenvis.errors import BadInput, nearest, some
from greenvis.models.structure import View, view
from greenvis.techniques._shared.heads import TaskHeads, head_parameters
from greenvis.techniques._shared.lora_layers import (
    inner_linears,
    keep_off_the_fast_path,
    merged,
    put_folded,
)

ROLES = ("linear", "attention", "qkv", "mlp", "conv")


def orthogonality(earlier: Sequence[Tensor], current: Tensor) -> Tensor:
    """Return the sum over earlier tasks of ‖A_i·Aᵀ‖² (Wang et al., 2023).

    Args:
        earlier: factors A of the earlier tasks, (rank, inputs) each; the rank may differ.
        current: the current task's, (rank, inputs).

    Returns:
        A scalar, 0 where the row spaces are orthogonal.
    """
    return torch.stack([(a @ current.T).square().sum() for a in earlier]).sum()


class LoraStream(Technique):
    """Learn a low-rank change of frozen weights for each task of a stream, kept apart from those of
    earlier tasks (O-LoRA: Wang et al., 2023; task arithmetic: Chitale et al., 2023), through PEFT.

    mode "orthogonal": a task trains on top of all earlier changes, which are frozen; the term
    "lora_stream" keeps its input space orthogonal to theirs. mode "arithmetic": each task trains
    alone on the base; once it has ended all are summed, each times `scale`. Where a test tells its
    task, the changes up to that task are used (arithmetic: that one alone). Saves the storage of a
    model per task, and replay. Costs as LoRA does in training, and each task adds a change, in
    memory and in compute, until they are merged: at inference then nothing. Where no test tells its
    task, forgetting is lessened, not excluded; where it does, a task is answered as when it ended.
    The classifier trains in full; a told task has it as it was when the task ended. Build a new
    optimizer for each task: each has parameters of its own.

    Example:
        >>> live = gv.wrap(model, gv.LoraStream(rank=2))
        >>> live.begin_experience(experience)
        >>> print(live.summary())
        VisionTransformer with lora_stream
          lora_stream: {'rank': 2}
          trains 2,213 of 34,437 parameters (6.43%); delta 0.01 MB
    """

    name = "lora_stream"
    only_with = {"weight": ("mode", ("orthogonal",)), "scale": ("mode", ("arithmetic",))}
    stage = "weights"
    needs = frozenset({"bare_layers"})
    breaks = frozenset({"bare_layers"})
    examples = (
        {"rank": 2},
        {"rank": 2, "targets": ["conv"], "mode": "arithmetic", "head": "freeze"},
    )
    nothing = {"targets": ["no.such.layer*"]}

    rank: int = Field(default=8, ge=1, description="rank r of each task's change")
    alpha: float | None = Field(
        default=None, gt=0, description="scale alpha / r of each change; default r"
    )
    targets: tuple[str, ...] = Field(
        default=("linear",),
        min_length=1,
        description=f"roles ({', '.join(ROLES)}) or patterns of module paths",
    )
    mode: Literal["orthogonal", "arithmetic"] = Field(
        default="orthogonal", description="train on top of earlier changes, or apart from them"
    )
    weight: float = Field(default=0.5, ge=0, description="factor of the orthogonality term")
    scale: float = Field(
        default=1.0, gt=0, description="arithmetic: factor of each change in the sum"
    )
    head: Classifier = "train"
    input_shape: InputShape = None

    @field_validator("targets", mode="before")
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    def install(self, model: nn.Module) -> Installed:
        """Put the first task's change around the targets. Raises BadInput where nothing matches or
        a layer does not fit."""
        structure = view(model, self.input_shape, probe=False)
        paths = self._paths(model, structure)
        parents = {path: parents_of(model, model.get_submodule(path)) for path in paths}
        heads = head_parameters(model, structure) if self.head == "train" else []
        inject(self, model, paths, 0)
        layers: dict[str, Any] = {path: model.get_submodule(path) for path in paths}
        for path, layer in layers.items():
            for parent, name in parents[path]:  # PEFT wraps one alias of a shared module
                parent._modules[name] = layer
        keep_off_the_fast_path(model, layers)
        live = InstalledLoraStream(self, model, layers, heads)
        freeze(
            model,
            but=live.learns(0),
            follows=structure.in_classifier if heads else lambda path: False,
        )
        live.use([1.0])
        return live

    def _paths(self, model: nn.Module, structure: View) -> list[str]:
        """Return the paths to change, in the model's order. Raises BadInput before anything is
        touched."""
        chosen: set[str] = set()
        for target in self.targets:
            role = target in ROLES
            try:
                hits = (
                    structure.role(target)
                    if role
                    else tuple(find(model, [target], (nn.Linear, nn.Conv2d)))
                )
            except BadInput as error:
                raise BadInput(
                    f"{error}{'' if role or not target.isalpha() else nearest(target, ROLES)}"
                ) from None
            if not role:
                hits = (
                    tuple(
                        p
                        for p in hits
                        if not structure.in_classifier(p) and p != structure.patch_embed
                    )
                    or hits
                )
            why = {p: _why_not(model, structure, p) for p in hits}
            good = [p for p in hits if not why[p]]
            if not good or (not role and len(good) < len(hits)):
                bad = next(p for p in hits if why[p])
                raise BadInput(
                    f"lora_stream cannot change '{bad}', which '{target}' names: {why[bad]}"
                )
            chosen.update(good)
        if self.head == "train" and (inside := sorted(filter(structure.in_classifier, chosen))):
            raise BadInput(
                f"{some(inside)} is the classifier, which trains in full; set head: freeze"
            )
        return [p for p, _ in model.named_modules() if p in chosen]


def _why_not(model: nn.Module, structure: View, path: str) -> str:
    """Return why a layer cannot be changed, or ""."""
    module = model.get_submodule(path)
    if not isinstance(module, (nn.Linear, nn.Conv2d)):
        return (
            f"it is a {type(module).__name__}, not a Linear or Conv2d; the technique 'lora' takes "
            "it for one task"
        )
    if path not in (*structure.linears, *structure.convs):
        return "it never runs in a forward, so it would learn nothing"
    if path in structure.functional or path in inner_linears(model):
        return "its weight is read by another module; the technique 'lora' takes it for one task"
    if path in structure.computed:
        return f"it does not use its weight as it is (a standardised {type(module).__name__})"
    if isinstance(module, nn.Conv2d) and (
        module.groups > 1 or set(module.dilation) != {1} or module.padding_mode != "zeros"
    ):
        return (
            "it is a convolution in groups, dilated or not padded by zeros, which PEFT does not "
            "change and merge"
        )
    return ""


def _name(task: int) -> str:
    return f"task{task}"


def inject(request: LoraStream, model: nn.Module, paths: Sequence[str], task: int) -> None:
    """Have PEFT add the change of task number `task` to the layers."""
    config = LoraConfig(
        r=request.rank,
        # any positive number scales
        lora_alpha=request.alpha or request.rank,  # type: ignore[arg-type]
        target_modules="|".join(re.escape(p) for p in paths),
    )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that the model has changes already
            inject_adapter_in_model(config, model, adapter_name=_name(task))
    except (ValueError, TypeError, AttributeError, NotImplementedError, RuntimeError) as error:
        raise BadInput(
            f"PEFT cannot put LoRA on {some(paths)} with {request.recipe_form()}: {error}"
        ) from error


class InstalledLoraStream(Installed):
    """The changes at work; the base is frozen, its batch norms held. Adds the term "lora_stream"
    from the second task on.

    factors: of each task's change, in the order of tasks, as used now.
    """

    def __init__(
        self,
        request: LoraStream,
        model: nn.Module,
        layers: dict[str, Any],
        heads: list[nn.Parameter],
    ) -> None:
        super().__init__(freezes=True)
        self.request, self.model, self.layers, self.heads = request, model, layers, TaskHeads(heads)
        self.factors: list[float] = []
        self._latest_factors: list[float] | None = (
            None  # the factors to go back to after a test that told its task
        )

    def use(self, factors: Sequence[float]) -> None:
        """Use each task's change times a factor; the next task sets them anew.

        Args:
            factors: one per task: 0 leaves its change out, a negative one takes it away (task
                negation).

        Raises:
            BadInput: for another number of factors than there are tasks.
        """
        tasks = len(next(iter(self.layers.values())).lora_A)
        if len(factors) != tasks:
            raise BadInput(
                f"{len(factors)} factors were given, but there are changes of {tasks} tasks: give "
                "one for each"
            )
        self.factors = [float(f) for f in factors]
        names = [_name(i) for i, f in enumerate(self.factors) if f]
        for layer in self.layers.values():
            layer.set_adapter(names)
            for i, factor in enumerate(self.factors):
                layer.set_scale(_name(i), factor)
        for layer in self.layers.values():  # PEFT lets all that it uses train
            for i in range(tasks):
                for parameter in _change(layer, i):
                    parameter.requires_grad_(i == tasks - 1)
        self.trainable = names_of(self.model, self.learns(tasks - 1))

    def begin_experience(self, experience: Experience) -> None:
        """Freeze the earlier tasks' changes and add this one's."""
        for index in range(len(self.factors), experience.index + 1):
            inject(self.request, self.model, list(self.layers), index)
            self.use([0.0 if self.request.mode == "arithmetic" else 1.0] * index + [1.0])

    def eval_experience(self, experience: Experience | None) -> None:
        """Use the changes up to the task (arithmetic: its own), and again those of before when the
        test is over."""
        if self._latest_factors is not None:
            self.use(self._latest_factors)
        self._latest_factors = None
        self.heads.select(experience.index if experience is not None else None)
        if experience is not None and experience.index < len(self.factors):
            own_only = self.request.mode == "arithmetic"
            self._latest_factors = self.factors
            self.use(
                [
                    float(i == experience.index if own_only else i <= experience.index)
                    for i in range(len(self.factors))
                ]
            )

    def end_experience(self, loader: Any) -> None:
        """Sum the changes (arithmetic); orthogonal ones are summed all along."""
        self.heads.save(len(self.factors) - 1)
        if self.request.mode == "arithmetic":
            self.use([self.request.scale] * len(self.factors))

    def terms(self, x: Any, y: Any, logits: Tensor | None) -> Mapping[str, Tensor]:
        """Return {"lora_stream": weight · Σ ‖A_i·Aᵀ‖² over layers and earlier tasks}."""
        last = len(self.factors) - 1
        if not last or self.request.mode == "arithmetic" or not self.request.weight:
            return {}
        over = [
            orthogonality([self._factor(layer, i) for i in range(last)], self._factor(layer, last))
            for layer in self.layers.values()
        ]
        return {"lora_stream": self.request.weight * torch.stack(over).sum()}

    def facts(self) -> Mapping[str, Any]:
        """Return how many changes there are, and how many parameters each has."""
        size = sum(p.numel() for layer in self.layers.values() for p in _change(layer, 0))
        return {"lora_stream_tasks": len(self.factors), "lora_stream_parameters_per_task": size}

    def state_dict(self) -> dict[str, Tensor]:
        """Return the factors (tasks,), and the classifiers of the tasks that ended."""
        return {
            "factors": torch.tensor(self.factors, dtype=torch.float64),
            **self.heads.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Use the factors that were saved."""
        self.use(state["factors"].tolist())
        self.heads.load_state_dict(state)

    def merge(self) -> None:
        """Fold the sum of changes, as used now, into the weights, in fp32."""
        put_folded(self.model, {f"{p}.weight": merged(layer) for p, layer in self.layers.items()})

    def learns(self, task: int) -> list[nn.Parameter]:
        """Return what trains in task number `task`."""
        return [
            *self.heads.parameters,
            *(p for layer in self.layers.values() for p in _change(layer, task)),
        ]

    @staticmethod
    def _factor(layer: Any, task: int) -> Tensor:
        return layer.lora_A[_name(task)].weight.flatten(1)


def _change(layer: Any, task: int) -> tuple[nn.Parameter, nn.Parameter]:
    return layer.lora_A[_name(task)].weight, layer.lora_B[_name(task)].weight
