"""Knowledge distillation: a small student learns from a large frozen teacher's soft answers."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from greenvis import models
from greenvis.errors import BadInput, GreenvisError
from greenvis.technique import Installed, Stage, Technique, logits_of


def kd_loss(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """Return T² · KL(teacher ‖ student) of softened answers (Hinton et al., 2015, section 2), a scalar.

    Both logits: (batch, classes). Summed over classes, averaged over the batch; T² keeps its gradient comparable to the
    task loss's whatever the temperature.
    """
    student = F.log_softmax(student_logits / temperature, dim=-1)
    teacher = F.log_softmax(teacher_logits / temperature, dim=-1)
    return F.kl_div(student, teacher, reduction="batchmean", log_target=True) * temperature**2


class Distill(Technique):
    """Add the soft answers of a frozen teacher to the loss (Hinton et al., 2015).

    Saves inference energy, where the student is smaller than the model it replaces. Costs one teacher forward a step, in
    the phase "teacher", and the teacher's own training: it pays back after N* images served, or never.
    """

    name: ClassVar[str] = "distill"
    stage: ClassVar[Stage] = "objective"
    examples: ClassVar[tuple[Mapping[str, Any], ...]] = ({"teacher": copy.deepcopy, "temperature": 2.0},)

    teacher: Any = Field(description='a model, or a reference: "run:NAME", "file:PATH", "timm/NAME", …')
    temperature: Annotated[float, Field(gt=0, description="softens both answers")] = 4.0
    weight: Annotated[float, Field(ge=0, description="factor of the distillation term")] = 1.0
    task_weight: Annotated[float, Field(ge=0, description="factor of the task loss")] = 1.0

    def install(self, model: nn.Module) -> Installed:
        """Check the teacher and put it into eval. Raises BadInput for a teacher that shares weights with `model`."""
        teacher = self.teacher
        if isinstance(teacher, str):
            if teacher.startswith("run:"):
                raise BadInput(
                    f"the teacher '{teacher}' names a run: only a recipe can resolve it; give a model or 'file:PATH' here"
                )
            teacher = models.build(teacher, folder=Path())
        if not isinstance(teacher, nn.Module):
            raise BadInput(f"the teacher must be a model or a reference to one, not {type(teacher).__name__}")
        own = {id(t) for t in (*model.parameters(), *model.buffers())}
        shared = [n for n, t in (*teacher.named_parameters(), *teacher.named_buffers()) if id(t) in own]
        if shared or teacher is model:
            raise BadInput(f"the teacher shares '{(shared or ['all'])[0]}' with the student, so it would change as the student "
                           "learns; give copy.deepcopy(model) or another model")  # fmt: skip
        return InstalledDistill(self, teacher)


class InstalledDistill(Installed):
    """The teacher at work. Adds the term "distill"."""

    def __init__(self, request: Distill, teacher: nn.Module) -> None:
        super().__init__()
        self.request = request
        self.teacher = teacher
        self._modes = [(m, m.training) for m in teacher.modules()]
        teacher.eval()
        if request.task_weight != 1.0:
            self.criterion = self._weighted

    def terms(self, x: Any, y: Any, logits: Tensor | None) -> Mapping[str, Tensor]:
        """Return {"distill": weight · kd_loss}."""
        if logits is None:
            raise GreenvisError(
                "distill needs the student's logits; a pretext technique gives none: use them in separate stages"
            )
        student = logits_of(logits)
        with self.phase("teacher"), torch.no_grad():
            if next(iter(self.teacher.parameters()), student).device != student.device:
                self.teacher.to(student.device)
            teacher = logits_of(self.teacher(x))
        if teacher.shape != student.shape:
            raise GreenvisError(
                f"the teacher's logits are {tuple(teacher.shape)}, the student's {tuple(student.shape)}: both must answer "
                "for the same classes; set num_classes of the teacher"
            )
        return {"distill": self.request.weight * kd_loss(student, teacher.to(student.dtype), self.request.temperature)}

    def undo(self) -> None:
        """Give the teacher its own modes back."""
        for module, training in self._modes:
            module.training = training

    def _weighted(self, task_loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda *a, **k: self.request.task_weight * task_loss(*a, **k)
