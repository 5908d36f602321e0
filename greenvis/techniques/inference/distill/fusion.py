"""Experts of different tasks in one student: what each of them answers, from a head each."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from greenvis.core.technique import InputShape, Installed, Technique
from greenvis.errors import BadInput, GreenvisError
from greenvis.models.structure import view
from greenvis.tasks.answers import IMAGES, IMAGES_ALONE
from greenvis.techniques._shared.representation import Representation
from greenvis.techniques.inference.distill._frozen_teacher import (
    ANSWER,
    CacheOptions,
    FrozenTeacher,
    Teacher,
    built,
)

_CHILD = "fusion"


class Scale(nn.Module):
    """Mean of an expert's outputs, and one scale for all of them, over the images shown so far.

    Args:
        width: Outputs.
    """

    count: Tensor
    total: Tensor
    squares: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        for name, shape in (("count", ()), ("total", (width,)), ("squares", (width,))):
            self.register_buffer(name, torch.zeros(shape, dtype=torch.float64), persistent=False)

    def add(self, outputs: Tensor) -> None:
        """Count the outputs of some images, (batch, width)."""
        exact = outputs.detach().double()
        self.count += len(exact)
        self.total += exact.sum(0)
        self.squares += exact.square().sum(0)

    def forward(self, outputs: Tensor) -> Tensor:
        """Return outputs (batch, width) with mean 0 and, over outputs, a mean variance of 1."""
        count = self.count.clamp(min=1)
        mean = self.total / count
        variance = (self.squares / count - mean.square()).clamp(min=0).mean().clamp(min=1e-12)
        return ((outputs.double() - mean) / variance.sqrt()).to(outputs.dtype)


class Fusion(Technique):
    """Pretrain a student on what frozen experts of different tasks answer, from a head for each
    (in the spirit of DenseFusion: Li et al., 2024; balanced as in AM-RADIO and PHI-S: Ranzinger et
    al., 2024).

    Saves labels, and inference energy where several models were served: one student of their size
    stands for all, and is fine-tuned on few labels. A pretext: labels are not used, and the
    classifier stays untrained. Each expert's answers are brought to mean 0 and one scale, so that
    a loss of 1 is that of knowing nothing, whichever expert it is. Adds a term "fusion_NAME" for
    each expert, the mean squared distance of its head's answers; the heads stand beside the
    classifier, and `merge` drops them. Costs each expert's training, and a forward for each image;
    `cache` keeps what they answer, so that they are asked once. Loses where one expert knows all
    that the task asks for.

    Example:
        >>> live = gv.wrap(model, gv.Fusion(experts={"one": teacher, "other": resnet}))
        >>> sorted(live.terms(x, y, None))
        ['fusion_one', 'fusion_other']
    """

    name = "fusion"
    stage = "objective"
    role = "expert"
    tasks = IMAGES
    instead = IMAGES_ALONE
    needs = frozenset({"trainable_base"})
    examples = ({"experts": lambda model: {"itself": copy.deepcopy(model)}},)

    experts: dict[str, Teacher] = Field(
        min_length=1, description="by name, each as a model or with weight and size"
    )
    cache: bool | CacheOptions = Field(
        default=False, description="keep what the experts answer on disk"
    )
    input_shape: InputShape = None

    def runs(self) -> dict[str, str]:
        """Return experts that name another run, by field and name."""
        named = {f"experts.{n}": t.model for n, t in self.experts.items()}
        return {
            key: ref for key, ref in named.items() if isinstance(ref, str) and ref[:4] == "run:"
        }

    def with_runs(self, results: Mapping[str, Any]) -> Technique:
        """Return the request with models in the place of the runs."""
        placed = {
            n: t.model_copy(update={"model": results.get(f"experts.{n}", t.model)})
            for n, t in self.experts.items()
        }
        return self.model_copy(update={"experts": placed})

    def install(self, model: nn.Module) -> Installed:
        """Put a head for each expert beside the classifier.

        Raises:
            BadInput: For what is no expert, or a model that shows no classifier.
        """
        modules = {name: built(name, t.model, model) for name, t in self.experts.items()}
        structure = view(model, self.input_shape, probe=False)
        representation = Representation(model, structure)
        return InstalledFusion(self, modules, representation, structure.example)


class InstalledFusion(Installed):
    """Pretraining at work: the loop's forward is its own."""

    pretext = True

    def __init__(
        self,
        request: Fusion,
        modules: Mapping[str, nn.Module],
        representation: Representation,
        example: Tensor,
    ) -> None:
        super().__init__()
        self.request, self.representation = request, representation
        options = CacheOptions() if request.cache is True else request.cache or None
        self.experts = {
            name: FrozenTeacher(
                name, module, request.experts[name].size, None, options,
                lambda text: self.note(text), representation.model, names=False,
            )
            for name, module in modules.items()
        }  # fmt: skip
        for expert in self.experts.values():
            expert.begin()
        try:
            widths = {name: _width(name, expert, example) for name, expert in self.experts.items()}
        except BadInput:
            self.undo()
            raise
        self.heads = nn.ModuleDict(
            {name: nn.Linear(representation.dim, width) for name, width in widths.items()}
        )
        self.scales = {name: Scale(width).to(example.device) for name, width in widths.items()}
        self.trainable = representation.add(_CHILD, self.heads)
        self.losses: dict[str, float] = {}

    def terms(self, x: Any, y: Any, logits: Tensor | None) -> Mapping[str, Tensor]:
        """Return {"fusion_NAME": weight · mean squared distance to that expert's answers}."""
        with self.phase("teacher"):
            answers = {
                name: expert.outputs(x, (), self.samples)[ANSWER].float().detach()
                for name, expert in self.experts.items()
            }
        features = self.representation(x)
        out = {}
        for name, answer in answers.items():
            scale = self.scales[name]
            if not self.repeated:
                scale.add(answer)
            distance = (self.heads[name](features).float() - scale(answer)).square().mean()
            out[f"fusion_{name}"] = self.request.experts[name].weight * distance
        return out

    def facts(self) -> Mapping[str, Any]:
        """Return what caches did."""
        caches = [fact for expert in self.experts.values() for fact in expert.facts()]
        return {"fusion_cache": caches} if caches else {}

    def state_dict(self) -> dict[str, Tensor]:
        """Return the mean and scale of each expert's answers so far."""
        return {
            f"{name}.{key}": value.clone()
            for name, scale in self.scales.items()
            for key, value in scale.named_buffers()
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take back what `state_dict` gave."""
        for name, scale in self.scales.items():
            for key, value in scale.named_buffers():
                value.copy_(state[f"{name}.{key}"])

    def undo(self) -> None:
        """Let go of the caches, give the experts their own modes back."""
        for expert in self.experts.values():
            expert.end()


def _width(name: str, expert: FrozenTeacher, example: Tensor) -> int:
    """Return how many outputs an expert has."""
    try:
        answer = expert.outputs(example, (), None)[ANSWER]
    except BadInput:
        raise
    except GreenvisError as error:  # it does not take such images
        raise BadInput(str(error)) from error
    if answer.dim() != 2:
        raise BadInput(
            f"the expert '{name}' answers {tuple(answer.shape)} to an image: fusion wants experts "
            "with one answer for an image, (batch, outputs)"
        )
    return answer.shape[1]
