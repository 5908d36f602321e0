"""Adaptation of a trained model to a domain, from its images alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from greenvis.core.modes import in_mode
from greenvis.core.surgery import freeze
from greenvis.core.technique import InputShape, Installed, Technique, logits_of
from greenvis.models.structure import View, view
from greenvis.tasks.answers import CLASSES
from greenvis.techniques._shared.entropy import entropy, entropy_of
from greenvis.techniques._shared.representation import Representation
from greenvis.techniques.data.adapt._head_input import HeadInput

_ROUNDS = 2  # of labels and centroids


def information_loss(logits: Tensor) -> Tensor:
    """Return the mean entropy minus the entropy of the mean: lowest where each answer is sure and
    all classes occur (SHOT: Liang et al., 2020, equation 3). Of logits (batch, classes)."""
    return entropy(logits).mean() - entropy_of(logits.float().softmax(1).mean(0))


def centroid_labels(features: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    """Return the class whose centroid is nearest by cosine (SHOT, equations 4 to 6).

    Args:
        features: (images, dim); a 1 is appended to each.
        logits: (images, classes), whose probabilities weigh the first centroids.

    Returns:
        Labels int64 (images,), and the last centroids (classes, dim + 1), 0 of a class that no
        image is of; those have none in any round.
    """
    points = _appended(features)
    shares = logits.double().softmax(1)
    occurring = torch.bincount(logits.argmax(1), minlength=shares.shape[1]) > 0
    labels = logits.argmax(1)
    centroids = torch.zeros(shares.shape[1], points.shape[1], dtype=points.dtype)
    for _ in range(_ROUNDS):
        centroids = shares.T @ points / (1e-8 + shares.sum(0)[:, None])
        labels = nearest_label(points, torch.where(occurring[:, None], centroids, 0.0))
        shares = F.one_hot(labels, shares.shape[1]).double()
    return labels, torch.where(occurring[:, None], centroids, 0.0)


def nearest_label(points: Tensor, centroids: Tensor) -> Tensor:
    """Return the nearest centroid by cosine, int64 (images,), of points (images, dim + 1); one that
    is 0 is none."""
    cosines = F.normalize(points, dim=1) @ F.normalize(centroids, dim=1).T
    return cosines.masked_fill((centroids == 0).all(1)[None], -torch.inf).argmax(1)


def _appended(features: Tensor) -> Tensor:
    """Return features with a 1 behind them, of length 1 each: (images, dim + 1), in double
    precision."""
    double = features.detach().double()
    return F.normalize(torch.cat([double, double.new_ones(len(double), 1)], 1), dim=1)


class Shot(Technique):
    """Adapt a trained model to a domain from its unlabelled images, without any of the source's
    (SHOT: Liang et al., 2020).

    Saves the target's labels and every look at the source: begin from a trained model with its
    classifier (`init: run:source`, `classifier: keep`), and the training goes through the stream
    "target" in the place of labelled images. The classifier is frozen; features are to make its
    answers sure and diverse, and to agree with the nearest of the classes' centroids, which a
    forward over all target images finds before each epoch. The layers learn at a tenth of the
    learning rate, those of a classifier of several layers below its last one at all of it. The
    paper's own bottleneck and weight-normed classifier are not added; train the source with label
    smoothing 0.1. Loses where the target's classes are in other shares. Published figures are of
    the images adapted to; test on others. Adds the term "shot"; the task loss is 0.

    Example:
        >>> live = gv.wrap(model, gv.Shot())
        >>> live.feed(target=[x, x.flip(0)])
        >>> images, labels = live.batch(x, y)
        >>> outputs = model(images)
        >>> loss = live.criterion(F.cross_entropy)(outputs, labels)
        >>> loss = loss + live.loss(images, labels, outputs)
    """

    name = "shot"
    stage = "objective"
    tasks = CLASSES
    instead = "its pseudo-labels are classes of images: leave it out"
    trains_on = "target"
    needs = frozenset({"gradients", "trainable_base"})

    labels_weight: float = Field(default=0.3, ge=0, description="factor of the pseudo-labels' loss")
    backbone_lr: float = Field(default=0.1, gt=0, description="factor of the learning rate")
    input_shape: InputShape = None

    def install(self, model: nn.Module) -> Installed:
        """Freeze the last layer. Raises BadInput for a model that shows no classifier."""
        structure = view(model, self.input_shape, probe=False)
        representation = Representation(model, structure)
        frozen = {id(p) for path in structure.heads for p in model.get_submodule(path).parameters()}
        names = freeze(model, but=[p for p in model.parameters() if id(p) not in frozen])
        return InstalledShot(self, model, structure, names, HeadInput(representation))


class InstalledShot(Installed):
    """Source-free adaptation at work."""

    wants = ("target",)

    def __init__(
        self, request: Shot, model: nn.Module, structure: View, names: tuple[str, ...],
        features: HeadInput,
    ) -> None:  # fmt: skip
        super().__init__(names, freezes=True)
        self.request, self.model, self.structure = request, model, structure
        self.features = features
        self.labels: Tensor | None = None  # of all target images, for the epoch
        self.centroids: Tensor | None = None
        self.criterion = _nothing

    def param_groups(self, lr: float) -> list[dict[str, Any]]:
        """Return the backbone's parameters, at a part of the learning rate."""
        own = set(self.trainable)
        backbone = [
            p
            for n, p in self.model.named_parameters()
            if n in own and not self.structure.in_classifier(n)
        ]
        return [{"params": backbone, "lr": lr * self.request.backbone_lr}] if backbone else []

    def batch(self, x: Any, y: Any) -> tuple[Any, Any]:
        """Find the labels of an epoch before its first batch."""
        if self.labels is None:
            with self.phase("centroids"):
                self._label(x.device)
        return x, y

    def _label(self, device: torch.device) -> None:
        features, logits = [], []
        with in_mode(self.model, False), torch.no_grad():
            for x in self.feeds.sweep("target", device):
                outputs = logits_of(self.model(x))
                logits.append(outputs.cpu())
                features.append(self.features.take(len(x)).cpu())
        self.labels, self.centroids = centroid_labels(torch.cat(features), torch.cat(logits))

    def terms(self, x: Any, y: Any, logits: Tensor | None) -> Mapping[str, Tensor]:
        """Return {"shot": information_loss + labels_weight · cross entropy with the pseudo-labels}.

        Which image is which is known in a recipe; else labels are those of the nearest centroids.
        """
        outputs = logits_of(logits)
        features = self.features.take(len(x))
        assert self.labels is not None
        assert self.centroids is not None
        if self.samples is not None and self.samples.length == len(self.labels):
            labels = self.labels[self.samples.positions.cpu()]
        else:
            labels = nearest_label(_appended(features.cpu()), self.centroids)
        loss = F.cross_entropy(outputs.float(), labels.to(outputs.device))
        return {"shot": information_loss(outputs) + self.request.labels_weight * loss}

    def epoch_end(self) -> None:
        """Forget the epoch's labels."""
        self.labels = self.centroids = None

    def state_dict(self) -> dict[str, Tensor]:
        """Return the epoch's labels and centroids, once they are known."""
        if self.labels is None or self.centroids is None:
            return {}
        return {"labels": self.labels, "centroids": self.centroids}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Load what `state_dict` returned."""
        self.labels, self.centroids = state.get("labels"), state.get("centroids")


def _nothing(task_loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return a loss of 0: the images have no labels that may be looked at."""
    return lambda logits, y=None, *rest, **more: 0.0 * logits_of(logits).sum()
