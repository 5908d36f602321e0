"""Two networks that divide the images into rightly and wrongly labelled ones for each other, and
learn from the latter without their labels."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from greenvis.core.modes import forwarding, in_mode
from greenvis.core.technique import Installed, Technique, logits_of
from greenvis.data.splits import stratified
from greenvis.errors import BadInput, GreenvisError
from greenvis.techniques._shared.views import random_view
from greenvis.techniques.annotation.noisy_labels._mixture import clean_probability
from greenvis.techniques.annotation.noisy_labels._peer import TwoNetworks, one_class_each

_AREA = 0.75  # least share of an image that its second view shows


def sharpened(probabilities: Tensor, temperature: float) -> Tensor:
    """Return p^(1 / T) with a sum of 1, (batch, classes) (Li et al., 2020, equation 5)."""
    powers = probabilities ** (1 / temperature)
    return powers / powers.sum(1, keepdim=True)


def refined(y: Tensor, clean: Tensor, own: Tensor, both: Tensor, temperature: float) -> Tensor:
    """Return what images are taught (Li et al., 2020, equations 3 to 5): those rightly labelled
    their label, moved towards the network's own answer the less sure it is; the others both
    networks' answer.

    Args:
        y: Labels int64 (batch,).
        clean: Probability of each label's being right, (batch,).
        own: The network's answers, (batch, classes).
        both: The mean of both networks', likewise.
        temperature: Of sharpening.

    Returns:
        Probabilities (batch, classes).
    """
    share = clean[:, None].to(own.dtype)
    moved = share * F.one_hot(y, own.shape[1]) + (1 - share) * own
    return sharpened(torch.where(share > 0.5, moved, both), temperature)


def divided_loss(
    logits: Tensor, targets: Tensor, labelled: Tensor, weight: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (cross entropy of the labelled, weight · squared error of the others, penalty) (Li et
    al., 2020, equations 9 to 12). The penalty is KL(even ‖ mean answer), so that not all images
    become one class. A part of no image is 0.

    Args:
        logits: (batch, classes).
        targets: Probabilities (batch, classes).
        labelled: bool (batch,).
        weight: Of the unlabelled part.
    """
    p = logits.softmax(1)
    labels = -(targets * logits.log_softmax(1)).sum(1)[labelled]
    guesses = (p - targets).square().mean(1)[~labelled]
    even = 1 / logits.shape[1]
    penalty = (even * (even / p.mean(0).clamp(min=1e-12)).log()).sum()
    return _mean(labels), weight * _mean(guesses), penalty


def _mean(values: Tensor) -> Tensor:
    return values.sum() / max(len(values), 1)


class Dividemix(Technique):
    """Train two networks that tell wrong labels by a mixture of two Gaussians on their losses, and
    learn from those images by MixMatch (DivideMix: Li et al., 2020).

    Saves labels: those of a crowd will do, without knowing how many are wrong. Costs about five
    times the joules of a training (published: twelve; its evaluation of all images before each
    epoch is left out here, as losses come from the forwards that guess labels), and twice the cost
    of serving where both networks answer (`together`). After `warmup` epochs each network divides
    the images for the other before an epoch (`live.visit`), those rightly labelled spread evenly
    over it; an epoch without such images is learned from guesses alone. `weight` is by noise:
    0 for asymmetric noise, 25 to 50 for half of the labels, 150 beyond. Replaces the task loss by
    the term "dividemix".

    Example:
        >>> live = gv.wrap(model, gv.Dividemix(warmup=1))
        >>> images = torch.utils.data.TensorDataset(x)
        >>> images.targets = y
        >>> sorted(live.visit(0, images).tolist()) == [*range(len(x))]
        True
    """

    name = "dividemix"
    stage = "objective"
    tasks = frozenset({"classification"})
    instead = "it divides images by the loss of their one class: leave it out"
    needs = frozenset({"gradients", "trainable_base"})
    examples: ClassVar = ({"warmup": 1}, {"warmup": 1, "together": False})

    warmup: int = Field(default=5, ge=1, description="epochs on all labels, before images divide")
    alpha: float = Field(default=4.0, gt=0, description="of the shares that images are mixed by")
    temperature: float = Field(default=0.5, gt=0, description="sharpens guessed labels")
    weight: float = Field(default=25.0, ge=0, description="factor of the guessed labels' loss")
    ramp: int = Field(default=16, ge=0, description="epochs in which that factor grows")
    together: bool = Field(default=True, description="both networks answer, at twice the cost")
    restart: bool = Field(
        default=True,
        description="the second network begins with new weights; else with the model's and a new "
        "classifier, as for pretrained ones",
    )

    def install(self, model: nn.Module) -> Installed:
        """Make the second network. Raises BadInput where other techniques are in the model."""
        return InstalledDividemix(self, model)


@dataclass(frozen=True)
class _Mixed:
    """One network's mixed batch: images, targets (batch, classes), and which count as labelled."""

    images: Tensor
    targets: Tensor
    labelled: Tensor


class InstalledDividemix(TwoNetworks):
    """Two networks and their division at work."""

    def __init__(self, request: Dividemix, model: nn.Module) -> None:
        super().__init__(request.name, model, request.restart)
        self.request = request
        if request.together:
            self.unmergeable = "is two networks that answer together (`together: false` is one)"
        self.epoch = self.shown = -1  # images of the epoch that were shown
        self.losses = torch.zeros(2, 0)  # of both networks, by image; NaN where not known
        self.clean = torch.zeros(2, 0)  # probability that a label is right, by either; before: none
        self._order = self._targets = torch.zeros(0, dtype=torch.int64)
        self._step: tuple[_Mixed, _Mixed] | Tensor | None = None  # or positions, in warm-up

    def visit(self, epoch: int, images: Any) -> Tensor:
        """Divide the images by the losses so far, once an epoch, and spread the rightly labelled
        ones evenly over it."""
        targets = torch.as_tensor(images.targets)
        if targets.dim() != 1 or targets.is_floating_point():
            raise BadInput("dividemix divides images of one class each: labels int64 (images,)")
        if self.losses.shape[1] != len(targets):
            self.losses = torch.full((2, len(targets)), torch.nan)
        if self.epoch != epoch:  # a resumed one has its division already
            self.epoch, self.shown = epoch, 0
            if epoch >= self.request.warmup and self.losses.isfinite().any(1).all():
                self.clean = torch.stack([self._divide(own) for own in self.losses])
        self._targets = targets
        groups = torch.zeros_like(targets)
        if self.clean.numel():
            groups = (self.clean.mean(0) > 0.5).long()
        self._order = stratified(groups, 1_000_003 * self.seed + epoch)
        return self._order

    @staticmethod
    def _divide(losses: Tensor) -> Tensor:
        known = losses.isfinite()
        out = torch.ones(len(losses))
        out[known] = clean_probability(losses[known]).float()
        return out

    def batch(self, x: Any, y: Any) -> tuple[Any, Any]:
        """Mix two views of the images, for each network by the other's division."""
        rows = one_class_each(self.request.name, x, y)
        self._step = None
        if not len(self._order) or len(rows) != len(y):
            if len(rows) != len(y):
                raise BadInput("dividemix takes images that all have a label: leave out the others")
            return x, y  # a loop that has not asked which images to visit
        positions = self._positions(y)
        if not self.clean.numel():
            self._step = positions
            return x, y
        views = [x, random_view(x, _AREA, 0.0, flip=False)]
        answers = self._answers(views)
        self._note(positions, y, answers)
        guesses = [torch.stack([z.softmax(1) for z in own]).mean(0) for own in answers]
        both = (guesses[0] + guesses[1]) / 2
        mixed = []
        for own, other in ((0, 1), (1, 0)):
            clean = self.clean[other, positions].to(x.device)
            targets = refined(y, clean, guesses[own], both, self.request.temperature)
            mixed.append(self._mix(torch.cat(views), targets.repeat(2, 1), (clean > 0.5).repeat(2)))
        self._step = mixed[0], mixed[1]
        return mixed[0].images, y.repeat(2)

    def _positions(self, y: Tensor) -> Tensor:
        """Return where the batch's images stand, and go on in the epoch's order."""
        if self.samples is not None:
            positions = self.samples.positions.cpu()
        else:
            at = torch.arange(self.shown, self.shown + len(y)) % len(self._order)
            positions = self._order[at]
        self.shown += len(y)
        if not torch.equal(self._targets[positions], y.cpu()):
            raise GreenvisError(
                "dividemix: this batch is not of the images that visit(epoch, images) chose; show "
                "these, in their order: DataLoader(images, sampler=positions.tolist())"
            )
        return positions

    def _answers(self, views: list[Tensor]) -> list[list[Tensor]]:
        """Return both networks' answers to each view, without a gradient, float32."""
        out = []
        for network in (self.model, self.peer.to(views[0].device)):
            with in_mode(network, False), torch.no_grad():
                out.append([logits_of(network(view)).float() for view in views])
        return out

    def _note(self, positions: Tensor, y: Tensor, answers: list[list[Tensor]]) -> None:
        """Keep both networks' losses of the images as they are labelled."""
        for own, logits in zip(self.losses, answers, strict=True):
            each = [F.cross_entropy(z.detach(), y, reduction="none") for z in logits]
            own[positions] = torch.stack(each).mean(0).cpu()

    def _mix(self, images: Tensor, targets: Tensor, labelled: Tensor) -> _Mixed:
        """Blend images and targets in pairs, by one share for all (MixMatch: Berthelot et al.,
        2019); the larger share says which count as labelled."""
        share = float(torch.distributions.Beta(self.request.alpha, self.request.alpha).sample())
        share, partner = max(share, 1 - share), torch.randperm(len(images)).to(images.device)
        return _Mixed(
            share * images + (1 - share) * images[partner],
            share * targets + (1 - share) * targets[partner],
            labelled,
        )

    def terms(self, x: Any, y: Any, logits: Tensor | None) -> Mapping[str, Tensor]:
        """Return {"dividemix": the sum of both networks' losses}."""
        own, step = logits_of(logits).float(), self._step
        if isinstance(step, tuple):
            weight = self.request.weight * self._ramp()
            first = sum(divided_loss(own, step[0].targets, step[0].labelled, weight))
            with torch.set_grad_enabled(not self.repeated):
                other = self.peer_logits(step[1].images)
            second = sum(divided_loss(other, step[1].targets, step[1].labelled, weight))
            return {"dividemix": own.new_zeros(()) + first + second}
        with torch.set_grad_enabled(not self.repeated):
            other = self.peer_logits(x)
        if step is not None and not self.repeated:
            self._note(step, y, [[own], [other]])
        return {"dividemix": F.cross_entropy(own, y) + F.cross_entropy(other, y)}

    def _ramp(self) -> float:
        if not self.request.ramp:
            return 1.0
        return min(1.0, (self.epoch - self.request.warmup + 1) / self.request.ramp)

    def served(self) -> AbstractContextManager[None]:
        """Let both networks answer, where they are to: the mean of their logits."""
        return self._both() if self.request.together else nullcontext()

    @contextmanager
    def _both(self) -> Iterator[None]:
        forward, device = self.model.forward, next(self.model.parameters()).device
        peer = self.peer.to(device)  # here: images without data, for counting, must not move it

        def answer(x: Any, *args: Any, **kwargs: Any) -> Tensor:
            peer.train(self.model.training)
            own = logits_of(forward(x, *args, **kwargs))
            return (own + logits_of(peer(x, *args, **kwargs))) / 2

        with forwarding(self.model, answer):
            yield

    def facts(self) -> Mapping[str, Any]:
        """Return the share of labels taken for right in the last epoch."""
        if not self.clean.numel():
            return {}
        return {"dividemix_clean": round(float((self.clean > 0.5).float().mean()), 4)}

    def state_dict(self) -> dict[str, Tensor]:
        """Return the second network, the losses, and the epoch's division."""
        at = torch.tensor([self.epoch, self.shown])
        division = {"losses": self.losses.clone(), "clean": self.clean.clone(), "at": at}
        return {**super().state_dict(), **division}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Load what `state_dict` returned."""
        super().load_state_dict(state)
        self.losses, self.clean = (state[name].cpu().clone() for name in ("losses", "clean"))
        self.epoch, self.shown = state["at"].tolist()
