"""Experience replay: a small buffer of earlier examples, some of which join each batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from greenvis.errors import GreenvisError
from greenvis.technique import Installed, Stage, Technique, logits_of
from greenvis.techniques.iteration._buffer import Buffer, herding
from greenvis.views import view
from greenvis.views.quiet import quiet

Method = Literal["er", "er_ace", "der", "derpp"]


def er_ace_loss(
    logits: Tensor, y: Tensor, fresh: int, task_loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy
) -> Tensor:
    """Return the asymmetric loss of ER-ACE (Caccia et al., 2022, eq. 3), a scalar.

    logits: (fresh + replayed, classes), the new images first. New ones compete among the classes of their own batch, so
    that they do not push earlier classes down; replayed ones among all. Each part is a mean of its own.
    """
    away = torch.ones(logits.shape[1], dtype=torch.bool, device=logits.device)
    away[y[:fresh].unique()] = False
    loss = task_loss(logits[:fresh].masked_fill(away, torch.finfo(logits.dtype).min), y[:fresh])
    return loss + task_loss(logits[fresh:], y[fresh:]) if len(y) > fresh else loss


class Replay(Technique):
    """Mix kept examples of earlier tasks into each batch, so that they are not forgotten.

    method: "er", one mean loss over new and replayed (Riemer et al., 2019; Chaudhry et al., 2019); "er_ace", new ones compete
    among their own classes (Caccia et al., 2022); "der", match the logits an example had when it was kept, alpha · mean
    squared error; "derpp", that and, from a second draw, beta · task loss (Buzzega et al., 2020).
    Saves training again on everything, whose cost grows with the square of the number of tasks. Costs the buffer
    (images as uint8 with their own range) and, each step, forward and backward of what is replayed: 128 for a batch of 10
    are 13.8 times the images, so with few tasks it may save nothing. New and replayed run as one batch. Kept after the
    optimizer step, as they were shown, augmentation included.
    """

    name: ClassVar[str] = "replay"
    stage: ClassVar[Stage] = "objective"
    examples: ClassVar[tuple[Mapping[str, Any], ...]] = ({"size": 6}, {"size": 5, "method": "derpp", "policy": "balanced"})

    size: Annotated[int, Field(ge=1, description="examples kept")] = 500
    method: Method = "er"
    policy: Annotated[
        Literal["reservoir", "ring", "balanced", "herding"],
        Field(description="who stays: all alike; a class's latest; classes alike; at a task's end, those nearest the mean"),
    ] = "reservoir"
    batch_size: Annotated[int | None, Field(ge=1, description="replayed a step; `share` of the batch where absent")] = None
    share: Annotated[float, Field(gt=0, description="replayed for each new image")] = 1.0
    every: Annotated[int, Field(ge=1, description="replay at every so many steps")] = 1
    alpha: Annotated[float, Field(ge=0, description="of der and derpp: weight of the kept logits")] = 0.5
    beta: Annotated[float, Field(ge=0, description="of derpp: weight of the kept labels")] = 0.5
    exact: Annotated[bool, Field(description="keep float32 instead of uint8: four times the memory")] = False

    def install(self, model: nn.Module) -> Installed:
        """Make the buffer; the model stays as it is."""
        return InstalledReplay(self, model)


class InstalledReplay(Installed):
    """The buffer at work. Adds the terms "der" and "derpp"."""

    def __init__(self, request: Replay, model: nn.Module) -> None:
        super().__init__()
        self.request, self.model = request, model
        self.buffer = Buffer(request.size, request.policy, torch.initial_seed() % 2**63, request.exact)
        self.steps = 0
        self._parts: list[int] = []  # of the batch now: how many are new, and of each draw
        self._wanted: Tensor | None = None  # the kept logits of the first draw
        self._new: list[dict[str, Tensor]] = []  # to be kept after the optimizer step
        if request.method != "er":
            self.criterion = self._criterion

    def batch(self, x: Any, y: Any) -> tuple[Any, Any]:
        """Return the batch with examples from the buffer behind it."""
        if not isinstance(x, Tensor) or not isinstance(y, Tensor) or y.ndim != 1:
            raise GreenvisError("replay needs a batch of one tensor of images and one label each, (batch, …) and (batch,)")
        r = self.request
        self._new.append({"x": x, "y": y})
        self._parts, self._wanted = [len(x)], None
        self.steps += 1
        if not len(self.buffer) or self.steps % r.every:
            return x, y
        count = r.batch_size or max(1, round(r.share * len(x)))
        xs, ys = [x], [y]
        for draw in range(2 if r.method == "derpp" else 1):
            rows = self.buffer.draw(count)
            old_x, old_y = self.buffer.take(rows, x.device)
            xs.append(old_x.to(x.dtype))
            ys.append(old_y)
            self._parts.append(len(rows))
            if draw == 0 and "logits" in self.buffer.columns:
                self._wanted = self.buffer.columns["logits"][rows].to(x.device)
        return torch.cat(xs), torch.cat(ys)

    def terms(self, x: Any, y: Any, logits: Tensor | None) -> Mapping[str, Tensor]:
        """Return {"der": alpha · MSE to the kept logits}, where the method has it."""
        if self.request.method not in ("der", "derpp"):
            return {}
        if logits is None:
            raise GreenvisError("replay of logits needs logits; a pretext technique gives none: use method er")
        now = logits_of(logits)
        self._new[-1]["logits"] = now[: self._parts[0]].detach()
        if self._wanted is None:
            return {}
        first = self._parts[0]
        return {"der": self.request.alpha * F.mse_loss(now[first : first + self._parts[1]], self._wanted.to(now.dtype))}

    def step_end(self) -> None:
        """Offer the new examples to the buffer."""
        for new in self._new:
            if self.request.policy != "herding":
                self.buffer.offer(**new)
        self._new.clear()

    def end_task(self, loader: Any) -> None:
        """Choose each class's examples anew where they are chosen at a task's end."""
        if self.request.policy != "herding":
            return
        found: dict[int, list[tuple[Tensor, Tensor]]] = {}
        for x, y, features in self._features(loader):
            for label in y.unique().tolist():
                found.setdefault(label, []).append((x[y == label], features[y == label]))
        old_x, old_y = self.buffer.take(torch.arange(len(self.buffer))) if len(self.buffer) else (None, torch.zeros(0))
        before = [c for c in dict.fromkeys(old_y.long().tolist()) if c not in found]
        share = max(1, self.request.size // (len(before) + len(found)))
        xs = [] if old_x is None else [old_x[old_y == c][:share] for c in before]
        ys = [torch.full((len(x),), c) for x, c in zip(xs, before, strict=True)]
        for label, parts in found.items():
            images, features = (torch.cat(column) for column in zip(*parts, strict=True))
            xs.append(images[herding(features, share)])
            ys.append(torch.full((len(xs[-1]),), label))
        self.buffer.replace(torch.cat(xs)[: self.request.size], torch.cat(ys)[: self.request.size])

    def _features(self, loader: Any) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield x, y and what the classifier is given for x, (batch, values), on the CPU."""
        seen: list[Tensor] = []
        device = next(self.model.parameters()).device
        head = ""
        for x, y in loader:
            head = head or view(self.model, tuple(x.shape[1:]), probe=False).heads[0]
            hook = self.model.get_submodule(head).register_forward_pre_hook(lambda module, args: seen.append(args[0]))
            try:
                with quiet(self.model):
                    self.model(x.to(device))
            finally:
                hook.remove()
            yield x.cpu(), y.cpu(), seen.pop().detach().float().flatten(1).cpu()

    def _criterion(self, task_loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """Return the task loss over the parts of the batch, as the method has it."""

        def loss(logits: Tensor, y: Tensor) -> Tensor:
            fresh = self._parts[0]
            if self.request.method == "er_ace":
                return er_ace_loss(logits, y, fresh, task_loss)
            own = task_loss(logits[:fresh], y[:fresh])
            if self.request.method == "der" or len(self._parts) < 3:
                return own
            again = slice(fresh + self._parts[1], None)
            return own + self.request.beta * task_loss(logits[again], y[again])

        return loss

    def facts(self) -> Mapping[str, Any]:
        """Return what the buffer holds and takes."""
        return {"buffer_images": len(self.buffer), "buffer_bytes": self.buffer.nbytes}

    def state_dict(self) -> dict[str, Tensor]:
        """Return the buffer and how many steps there were."""
        return {"steps": torch.tensor(self.steps), **{f"buffer.{k}": v for k, v in self.buffer.state_dict().items()}}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take the buffer back; what it goes on to keep and draw is what it would have."""
        self.steps = int(state["steps"])
        self.buffer.load_state_dict({k.removeprefix("buffer."): v for k, v in state.items() if k != "steps"})
