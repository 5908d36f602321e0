"""Self-distillation: from small crops a model is to say what a slower copy says of large ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from greenvis.core import distributed
from greenvis.core.technique import Installed
from greenvis.models.structure.probing import probing
from greenvis.techniques._shared.representation import Representation
from greenvis.techniques._shared.views import random_views
from greenvis.techniques.annotation.contrastive._views import InstalledFollowed, ViewPretext, mlp

_LARGE = 2  # crops that the target sees
_WARMUP = 0.3  # share of the training in which the target's temperature rises


def dino_loss(
    student: Tensor,
    teacher: Tensor,
    centre: Tensor,
    student_temperature: float,
    teacher_temperature: float,
) -> Tensor:
    """Return the cross entropy of each crop's answer with the target's to every other crop (Caron
    et al., 2021, equation 3).

    Args:
        student: (crops, batch, dim), of which the first are the target's crops.
        teacher: (large crops, batch, dim); no gradient flows there.
        centre: (dim,), taken from the target's answers.
        student_temperature: Divides the student's.
        teacher_temperature: Divides the target's; smaller is sharper.

    Returns:
        The mean over pairs of different crops and the batch, a scalar.
    """
    targets = ((teacher.detach().float() - centre) / teacher_temperature).softmax(-1)
    answers = (student.float() / student_temperature).log_softmax(-1)
    pairs = -torch.einsum("tbk,sbk->ts", targets, answers) / student.shape[1]
    different = ~torch.eye(*pairs.shape, dtype=torch.bool, device=pairs.device)
    return pairs[different].mean()


class Dino(ViewPretext):
    """Pretrain a model to give small crops of an image the words that a slower copy has for large
    ones (DINO: Caron et al., 2021).

    Saves labels, not energy: with 8 small crops a step costs about 4 times a supervised one, and
    batches below some 64 images teach little. Small crops have half the image's side where the
    model takes such images, else all of it, which costs more (the record says which). Against
    collapse the target's answers are centred (a moving mean) and sharpened; where it collapses all
    the same, lower `teacher_temperature`. A pretext: labels are not used, and the classifier stays
    untrained. Adds the term "dino", from a projection and a layer of `dim` words beside the
    classifier that `merge` drops. The words stay as they are for `frozen_epochs`.

    Example:
        >>> live = gv.wrap(model, gv.Dino(dim=64, crops=2))
        >>> bool(live.loss(x, y, None) > 0)
        True
    """

    name = "dino"
    examples = ({"dim": 16, "crops": 2},)

    crops: int = Field(default=8, ge=0, description="small crops of each image, beside 2 large")
    area: float = Field(
        default=0.4, gt=0, le=1, description="share of the image that divides small and large crops"
    )
    least_area: float = Field(
        default=0.05, gt=0, le=1, description="smallest share of the image that a small crop shows"
    )
    student_temperature: float = Field(default=0.1, gt=0, description="divides its answers")
    teacher_temperature: tuple[float, float] = Field(
        default=(0.04, 0.07), description="divides the target's, at the start and later"
    )
    centre_momentum: float = Field(
        default=0.9, ge=0, lt=1, description="share of the centre that a step leaves"
    )
    momentum: float = Field(
        default=0.99, ge=0, le=1, description="share of the target that a step leaves, at first"
    )
    frozen_epochs: int = Field(
        default=1, ge=0, description="epochs in which the layer of words does not learn"
    )
    dim: int = Field(default=4096, ge=2, description="words")

    def install(self, model: nn.Module) -> Installed:
        """Put the heads in. Raises BadInput for a model that shows no classifier."""
        representation = self.represent(model)
        width = representation.dim
        narrow = min(256, width)
        project = nn.Sequential(
            mlp(width, 2 * width, 2 * width, narrow, act=nn.GELU), _Words(narrow, self.dim)
        )
        return InstalledDino(self, representation, {"project": project})


class _Words(nn.Module):
    """Cosines with words that learn: the last layer, of unit weights, on unit vectors."""

    def __init__(self, width: int, words: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(nn.init.trunc_normal_(torch.empty(words, width), std=0.02))
        self.learns = True

    def forward(self, x: Tensor) -> Tensor:
        # without learning its gradient is 0, not missing
        weight = self.weight if self.learns else self.weight.detach() + 0 * self.weight
        return F.linear(F.normalize(x, dim=1), F.normalize(weight, dim=1))


class InstalledDino(InstalledFollowed[Dino]):
    """Self-distillation at work."""

    def __init__(
        self, request: Dino, representation: Representation, heads: dict[str, nn.Module]
    ) -> None:
        super().__init__(request, representation, heads, request.momentum)
        words: Any = heads["project"]
        self._words: _Words = words[1]
        self.centre = torch.zeros(request.dim, device=self._words.weight.device)
        self.epochs = torch.zeros((), dtype=torch.int64)
        self._sizes: dict[tuple[int, ...], tuple[int, int]] = {}

    def terms(self, x: Any, y: Any, logits: Tensor | None) -> Mapping[str, Tensor]:
        """Return {"dino"}: `dino_loss` of crops of images x (batch, channels, height, width)."""
        request = self.request
        self._words.learns = int(self.epochs) >= request.frozen_epochs
        large = request.views(x, _LARGE)
        answers = [self.project(large)]
        if request.crops:
            area = min(request.least_area, request.area), request.area
            size = self._small(x)
            small = random_views(x, request.crops, area, request.colour, request.flip, size)
            answers.append(self.project(small))
        student = torch.cat(answers).unflatten(0, (-1, len(x)))
        teacher = self.target(large).unflatten(0, (_LARGE, len(x)))
        self.centre = self.centre.to(teacher.device)
        temperatures = request.student_temperature, self._temperature()
        loss = dino_loss(student, teacher, self.centre.clone(), *temperatures)
        if not self.repeated:
            mean = teacher.float().mean((0, 1))
            distributed.all_reduce_mean([mean])
            self.centre.lerp_(mean, 1 - request.centre_momentum)
        return {"dino": loss}

    def _temperature(self) -> float:
        start, end = self.request.teacher_temperature
        if not self.total_steps:
            return start
        return start + (end - start) * min(1.0, self.target.steps / (_WARMUP * self.total_steps))

    def _small(self, x: Tensor) -> tuple[int, int]:
        """Return the (height, width) of small crops: half the image's where the model takes it."""
        sides = x.shape[2], x.shape[3]
        if sides not in self._sizes:
            half = tuple(-(-side // 4) * 2 for side in sides)
            example = x[:1, :, : half[0], : half[1]]
            try:
                with probing(self.representation.model), torch.no_grad():
                    fits = self.representation(example).shape[1] == self.representation.dim
            except Exception:  # each library has its own way to refuse a size
                fits = False
            self._sizes[sides] = (half[0], half[1]) if fits else sides
        return self._sizes[sides]

    def epoch_end(self) -> None:
        """Count the epoch."""
        self.epochs += 1

    def facts(self) -> Mapping[str, Any]:
        """Return the side of small crops, in pixels."""
        sizes = [list(size) for size in self._sizes.values()]
        return {"dino_small_crops": sizes} if sizes else {}

    def own_state(self) -> dict[str, Tensor]:
        """Return the centre, and the epochs trained."""
        return {"centre": self.centre, "epochs": self.epochs}
