"""Learning without forgetting: answer for earlier classes as the model did before the task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.func import functional_call

from greenvis.core.attached import below, prefixed
from greenvis.core.modes import in_mode
from greenvis.core.technique import Experience, Installed, Technique, logits_of
from greenvis.errors import GreenvisError
from greenvis.tasks.answers import PIXELS_TOO, class_rows


def lwf_loss(
    new_logits: Tensor,
    old_logits: Tensor,
    classes: Sequence[int] | Tensor | None = None,
    temperature: float = 2.0,
    form: Literal["kl", "cross_entropy"] = "kl",
) -> Tensor:
    """Return the distance of softened answers for earlier classes (LwF: Li and Hoiem, 2016, eq. 2).

    Summed over the classes, averaged over the rows, without a factor T².

    Args:
        new_logits, old_logits: (rows, classes) each.
        classes: the earlier ones; None: all.
        temperature: divides both logits.
        form: "kl" and "cross_entropy" differ by the old answers' entropy: another value, the same
            gradient.

    Returns:
        A scalar.
    """
    if classes is not None:
        at = torch.as_tensor(classes, device=new_logits.device)
        new_logits, old_logits = new_logits[:, at], old_logits[:, at]
    new = (new_logits / temperature).log_softmax(-1)
    old = (old_logits / temperature).log_softmax(-1)
    value = -(old.exp() * new).sum(-1).mean()
    return value + (old.exp() * old).sum(-1).mean() if form == "kl" else value


def between(old: Tensor, new: Tensor, share: float) -> Tensor:
    """Return weights between two tasks' (WiSE-FT: Wortsman et al., 2022).

    Args:
        old, new: of one shape.
        share: of the old ones, 0 to 1.

    Returns:
        share · old + (1 − share) · new.
    """
    return torch.lerp(new, old, share) if new.is_floating_point() else new


class Lwf(Technique):
    """Keep the answers for earlier classes as they were, on the new task's images (LwF: Li and
    Hoiem, 2016), and, if asked, some of the earlier weights (Wortsman et al., 2022).

    Saves a buffer and training again. Costs, from the second task on, a forward of the earlier
    model each step, in the phase "earlier", and a copy of the weights that learn. Temperature 2 and
    no factor T², as libraries have it. Where the test does not say the task, it does not keep
    classes apart. Of a segmentation model every pixel is a sample.

    Example:
        >>> live = gv.wrap(model, gv.Lwf())
        >>> live.end_experience([(x, y)])
        >>> sorted(live.terms(x, y, model(x)))
        ['lwf']
    """

    name = "lwf"
    stage = "objective"
    tasks = PIXELS_TOO
    instead = "hold the weights by importances that read no labels (MAS, SI)"
    examples = ({"weight": 0.5},)

    weight: float = Field(default=1.0, ge=0, description="factor of the term")
    temperature: float = Field(default=2.0, gt=0, description="softens both answers")
    form: Literal["kl", "cross_entropy"] = Field(
        default="kl", description="another value, the same gradient"
    )
    keep: float = Field(
        default=0.0, ge=0, lt=1, description="share of the earlier weights taken at each task's end"
    )

    def install(self, model: nn.Module) -> Installed:
        """Leave the model as it is."""
        return InstalledLwf(self, model)


class InstalledLwf(Installed):
    """The weights before the task. Adds the term "lwf"."""

    def __init__(self, request: Lwf, model: nn.Module) -> None:
        super().__init__()
        self.request, self.model = request, model
        # what learns, and buffers, as they were when the last task ended
        self.earlier: dict[str, Tensor] = {}
        self.classes: list[int] = []  # of earlier tasks; empty where nobody said
        self._seen_classes: tuple[int, ...] = ()

    def begin_experience(self, experience: Experience) -> None:
        """Note which classes count as earlier from the task's end on."""
        self._seen_classes = experience.classes_so_far

    def terms(self, x: Any, y: Any, logits: Tensor | None) -> Mapping[str, Tensor]:
        """Return {"lwf": weight · lwf_loss}, from the second task on."""
        if not self.earlier:
            return {}
        if logits is None:
            raise GreenvisError(
                "lwf needs logits; a pretext technique gives none: use them in separate stages"
            )
        now = logits_of(logits)
        with self.phase("earlier"), in_mode(self.model, False), torch.no_grad():
            before = logits_of(functional_call(self.model, self.earlier, (x,)))
        # behind the images may stand features that were replayed, of which there is no image
        now = now[: len(before)]
        if before.shape != now.shape:
            raise GreenvisError(
                f"the earlier model answers with {tuple(before.shape)}, the model with "
                f"{tuple(now.shape)}: lwf needs an output for every class from the start"
            )
        r = self.request
        now, before = class_rows(now), class_rows(before.to(now.dtype))
        return {
            "lwf": r.weight * lwf_loss(now, before, self.classes or None, r.temperature, r.form)
        }

    def end_experience(self, loader: Any) -> None:
        """Go a share of the way back to the earlier weights, if asked; from now on these are the
        earlier ones."""
        now = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        with torch.no_grad():
            for name, value in now.items():
                if self.request.keep and name in self.earlier:
                    value.copy_(between(self.earlier[name], value, self.request.keep))
        self.earlier = {
            n: t.detach().clone() for n, t in [*now.items(), *self.model.named_buffers()]
        }
        self.classes = list(self._seen_classes)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the earlier weights and classes."""
        earlier = prefixed("earlier.", self.earlier)
        return {**earlier, "classes": torch.tensor(self.classes, dtype=torch.int64)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take them back."""
        device = next(self.model.parameters()).device
        self.earlier = {k: v.clone().to(device) for k, v in below(state, "earlier.").items()}
        self.classes = state["classes"].tolist()
