"""Masks that nobody drew: clusters of a frozen model's features, as labels to learn from."""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from greenvis import models
from greenvis.core.technique import InputShape, Installed, Technique, logits_of
from greenvis.errors import BadInput
from greenvis.models.structure import view
from greenvis.models.structure.probing import probing
from greenvis.techniques._shared.frozen import FrozenOutputs, fingerprint, other_model
from greenvis.techniques.annotation.dense._maps import Maps
from greenvis.techniques.annotation.dense._pass import ATTACHED, Attention, otsu

_CHUNK = 64  # images at once
_WEIGHED = ("attention", "foreground")  # levels that ask for attention


class LabelMaps(Technique):
    """Fine-tune for segmentation on label maps that a frozen, pretrained model makes of the
    training images: clusters of its features, and a foreground (PASS: Gao et al., 2022).

    Saves every mask: those of the data are not looked at. Costs a forward of the base per image,
    once where views of the images repeat, and k-means, whose time is the pixels' where each is a
    point: over 100 times that of one point an image in the paper. The threshold of the foreground
    is Otsu's, on how much attention pixels get; the authors choose theirs on masks. They weigh all
    places of an image by attention, which after a short pretraining lies near 0.5 everywhere:
    level `foreground` leaves out what lies below the threshold. Clusters bear no names: task
    `unsupervised_segmentation` matches them with classes. Loses where objects are smaller than a
    place of the base's last features.

    Example:
        >>> gv.LabelMaps(base="run:pass", clusters=10).level
        'foreground'
    """

    name = "label_maps"
    stage = "objective"
    tasks = frozenset({"segmentation"})
    instead = "it makes masks; take `consistency` or `pseudo_label` where images have one class"
    trains_on = "train"
    role = "base"
    examples = (
        {
            "base": copy.deepcopy,
            "level": "pixel",
            "foreground": "largest",
            "clusters": 3,
            "images": 8,
            "repeats": 1,
        },
    )

    base: Any = Field(description='a model, or a reference to one: "run:NAME", "file:PATH", …')
    clusters: int = Field(default=10, ge=1, description="beside the background")
    level: Literal["foreground", "attention", "image", "pixel"] = Field(
        default="foreground",
        description="what is clustered: an image's features weighed by attention, of its "
        "foreground alone or of all places (the authors' form), their mean, or those of each pixel",
    )
    foreground: Literal["attention", "largest"] = Field(
        default="attention",
        description="pixels of much attention (a base that `pixel_attention` taught); or all but "
        "the largest cluster, of one more",
    )
    threshold: float | None = Field(
        default=None, gt=0, lt=1, description="attention of the foreground; Otsu's where absent"
    )
    images: int = Field(default=3000, ge=1, description="training images that are clustered")
    repeats: int = Field(default=10, ge=1, description="starts of k-means, of which the best stays")
    iterations: int = Field(default=20, ge=1, description="of each start")
    scale: int = Field(
        default=4,
        ge=1,
        description="features are enlarged so many times before pixels are labelled",
    )
    answers: bool = Field(
        default=False, description="answer with the label maps themselves: nothing is fine-tuned"
    )
    cache: Literal["on", "off"] = Field(default="on", description="keep the label maps on disk")
    input_shape: InputShape = None

    def install(self, model: nn.Module) -> Installed:
        """Look at the base. Raises BadInput for a base without maps, and for a model of too few
        answers."""
        base = other_model("the base", self.base, model)
        structure = view(model, self.input_shape, probe=False)
        with probing(model), torch.no_grad():
            shape = logits_of(model(structure.example)).shape
        if len(shape) != 4:
            raise BadInput(
                f"{type(model).__name__} answers {tuple(shape)}, not a class per pixel: give it "
                "`head: dense`"
            )
        answers = shape[1]
        if answers <= self.clusters:
            raise BadInput(
                f"{self.clusters} clusters and the background are {self.clusters + 1} answers, and "
                f"{type(model).__name__} has {answers}: ask for fewer clusters, or set num_classes"
            )
        maps = Maps(base, structure.input_shape)
        return InstalledLabelMaps(self, model, answers, maps)


class InstalledLabelMaps(Installed):
    """Labels at work: they take the place of the batch's own."""

    wants = ("train",)

    def __init__(self, request: LabelMaps, model: nn.Module, answers: int, maps: Maps) -> None:
        super().__init__()
        self.request, self.model, self.count, self.maps = request, model, answers, maps
        self.centres: Tensor | None = None
        self.threshold, self.background = 0.0, -1
        self._clustered: dict[str, Any] = {}
        self.outputs: FrozenOutputs | None = None
        self._modes = [(m, m.training) for m in maps.model.modules()]
        maps.model.eval()
        if request.answers:
            self.unmergeable = "its answers are label maps of another model"

    def batch(self, x: Any, y: Any) -> tuple[Any, Any]:
        """Return the images with their label maps, int64 (batch, height, width)."""
        self._begin(x)
        if self.samples is None or self.request.cache == "off":
            return x, self._labels(x)
        if self.outputs is None:
            self.outputs = FrozenOutputs(
                f"label maps of {type(self.maps.model).__name__}: "
                f"{models.fingerprint(self.state_dict())}",
                fingerprint(self.maps.model),
                dtype="fp16",
                note=lambda text: self.note(text),
            )
        stored = self.outputs.outputs(self.samples, lambda: self._labels(x).float(), x.device)
        return x, stored.long()

    @contextmanager
    def _answering(self) -> Iterator[None]:
        def answer(module: nn.Module, args: Any, output: Any) -> Tensor:
            if args[0].device.type == "meta":  # who counts FLOPs so counts with data instead
                raise NotImplementedError("label maps are of images that have values")
            self._begin(args[0])
            labels = F.one_hot(self._labels(args[0]), self.count).movedim(-1, 1)
            return labels.to(logits_of(output).dtype)

        with self.model.register_forward_hook(answer):
            yield

    def served(self) -> Any:
        """Return a context in which label maps are the answers, where that is asked for."""
        return self._answering() if self.request.answers else super().served()

    def _begin(self, x: Tensor) -> None:
        if self.centres is None:
            parts, count = [], 0
            for part in self.feeds.sweep("train", x.device):  # no image counts twice
                parts.append(part[: self.request.images - count])
                count += len(parts[-1])
                if count == self.request.images:
                    break
            self._learn(torch.cat(parts))

    def _attention(self, features: Tensor) -> Tensor | None:
        """Return the attention (batch, channels, height, width) to features of length 1; None where
        it is not asked for."""
        if self.request.level not in _WEIGHED and self.request.foreground != "attention":
            return None
        state = models.attached(self.maps.model, ATTACHED)
        if state is None:
            raise BadInput(
                f"the base {type(self.maps.model).__name__} has no pixel attention beside it: let "
                "a stage of `pixel_attention` end its run, or set level: image and foreground: "
                "largest"
            )
        attention = Attention(features.shape[1]).to(features)
        attention.load_state_dict(state)
        return attention.eval()(features)

    def _features(self, x: Tensor) -> Tensor:
        """Return the base's features of length 1, (batch, channels, height, width)."""
        weight = next(self.maps.model.parameters())
        if weight.device != x.device:
            self.maps.model.to(x.device)
        with torch.no_grad(), probing(self.maps.model):
            return F.normalize(self.maps(x.to(weight.dtype))[-1].float(), dim=1)

    def _learn(self, images: Tensor) -> None:
        """Find the centres of clusters, and the threshold of the foreground."""
        request, parts = self.request, images.split(_CHUNK)
        with self.phase("label_maps"), torch.no_grad():
            weights = [
                attention.mean(1).flatten().cpu()
                for part in parts
                if (attention := self._attention(self._features(part))) is not None
            ]
            if weights:
                self.threshold = request.threshold or otsu(torch.cat(weights))
            vectors = F.normalize(torch.cat([self._points(part) for part in parts]), dim=1)
        largest = request.foreground == "largest"
        count = request.clusters + largest
        if len(vectors) < count:
            raise BadInput(f"{count} clusters of {len(vectors)} points: give more images")
        self.centres = self._clusters(vectors, count)
        if largest:
            with self.phase("label_maps"), torch.no_grad():
                counts = torch.zeros(count, dtype=torch.int64)
                for part in parts:
                    nearest = self._nearest(self._features(part))
                    counts += torch.bincount(nearest.flatten().cpu(), minlength=count)
                self.background = int(counts.argmax())

    def _points(self, images: Tensor) -> Tensor:
        """Return what is clustered of images, (points, channels)."""
        level, features = self.request.level, self._features(images)
        if level == "pixel":
            return features.movedim(1, -1).flatten(0, 2).cpu()
        attention = self._attention(features) if level in _WEIGHED else None
        if attention is not None:
            features = features * attention
            if level == "foreground":
                front = attention.mean(1, keepdim=True) >= self.threshold
                # all places of an image that has no foreground
                features = features * (front | ~front.any(-1, True).any(-2, True))
        return features.mean((2, 3)).cpu()

    def _clusters(self, vectors: Tensor, count: int) -> Tensor:
        from sklearn.cluster import KMeans

        repeats: Any = self.request.repeats  # its stub says str
        means = KMeans(
            count, n_init=repeats, max_iter=self.request.iterations,
            random_state=self.seed % 2**32,
        )  # fmt: skip
        with self.phase("clustering"), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of fewer distinct points than clusters
            before = time.process_time()
            means.fit(vectors.numpy())
            spent = time.process_time() - before
        self._clustered = {"points": len(vectors), "cpu_s": {"clustering": spent}}
        return F.normalize(torch.as_tensor(means.cluster_centers_).float(), dim=1)

    def _nearest(self, features: Tensor) -> Tensor:
        """Return the nearest centre of each place, int64 (batch, height, width)."""
        assert self.centres is not None
        return torch.einsum("bchw,kc->bkhw", features, self.centres.to(features)).argmax(1)

    def _labels(self, x: Tensor) -> Tensor:
        """Return the label map of each image, int64 (batch, height, width): 0 is the background."""
        with self.phase("label_maps"), torch.no_grad():
            features = self._features(x)
            size = [self.request.scale * side for side in features.shape[2:]]
            size = [min(a, b) for a, b in zip(size, x.shape[2:], strict=True)]
            large = F.interpolate(features, size, mode="bilinear", align_corners=False)
            large = F.normalize(large, dim=1)
            attention = self._attention(large)
            if self.request.level in _WEIGHED and attention is not None:
                labels = self._nearest(large * attention)
            else:
                labels = self._nearest(large)
            if self.background >= 0:
                first, own = labels == self.background, labels < self.background
                labels = torch.where(first, 0, torch.where(own, labels + 1, labels))
            elif attention is not None:
                labels = torch.where(attention.mean(1) >= self.threshold, labels + 1, 0)
            return F.interpolate(labels[:, None].float(), x.shape[2:])[:, 0].long()

    def facts(self) -> Mapping[str, Any]:
        """Return the threshold of the foreground, how many points were clustered in how many CPU
        seconds (unless centres were loaded), and how many label maps were read back."""
        about: dict[str, Any] = {"threshold": self.threshold, **self._clustered}
        if self.outputs is not None:
            about["kept"] = self.outputs.facts()
        return {"label_maps": about}

    def state_dict(self) -> dict[str, Tensor]:
        """Return centres and threshold, once they are known."""
        if self.centres is None:
            return {}
        numbers = torch.tensor([self.threshold, float(self.background)], dtype=torch.float64)
        return {"centres": self.centres, "numbers": numbers}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Load what `state_dict` returned."""
        if state:
            self.centres = state["centres"].clone().cpu()
            self.threshold, background = state["numbers"].tolist()
            self.background = int(background)

    def undo(self) -> None:
        """Close the cache and give the base its own modes back."""
        if self.outputs is not None:
            self.outputs.close()
        for module, training in self._modes:
            module.training = training
