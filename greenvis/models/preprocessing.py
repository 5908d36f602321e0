"""What a model says of its inputs and classes: mean and deviation of its pixels, names of its
classes, in their order."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from greenvis.errors import BadInput, some

_DESCRIPTION = "_greenvis_inputs"


class Pixels(NamedTuple):
    """Mean and standard deviation by channel, of pixels from 0 to 1, by which a model's images are
    normalised."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def of(self, channels: int) -> Pixels | None:
        """Return those of images with so many channels: the same for all where all are alike, else
        None."""
        if len(self.mean) == channels:
            return self
        alike = len({*self.mean}) == len({*self.std}) == 1
        return Pixels(self.mean[:1] * channels, self.std[:1] * channels) if alike else None

    def __str__(self) -> str:
        return f"mean {_short(self.mean)}, deviation {_short(self.std)}"


def describe(
    model: nn.Module,
    *,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    classes: Sequence[str] | None = None,
    words: Sequence[str] | None = None,
) -> None:
    """Say which images a model knows, before what its library says of it; `models.save` puts it
    into the model's file.

    Args:
        model: The model.
        mean: By channel, of pixels from 0 to 1; None: not known.
        std: By channel, of pixels from 0 to 1; None: not known.
        classes: Their names, in the order of the logits; None: not known.
        words: That it reads, in the order of their numbers (`greenvis.data.captions.Vocabulary`);
            None: it reads none, or not known.

    Raises:
        BadInput: Where mean and std are not of as many channels.
    """
    if (mean is None) != (std is None) or (
        mean is not None and std is not None and len(mean) != len(std)
    ):
        raise BadInput(
            f"describe takes mean and std of as many channels, or neither; got {mean} and {std}"
        )
    model.__dict__[_DESCRIPTION] = {
        "mean": None if mean is None else [float(v) for v in mean],
        "std": None if std is None else [float(v) for v in std],
        "classes": None if classes is None else [str(name) for name in classes],
        **({} if words is None else {"words": [str(word) for word in words]}),
    }


def description(model: nn.Module) -> dict[str, Any]:
    """Return what `describe` takes: as it was said, else as the model's library says it.

    Args:
        model: The model.

    Returns:
        "mean", "std" and "classes", None where not known; "words" where it reads some.
    """
    if _DESCRIPTION in model.__dict__:
        return dict(model.__dict__[_DESCRIPTION])
    pixels, classes = pixels_of(model), classes_of(model)
    return {
        "mean": None if pixels is None else list(pixels.mean),
        "std": None if pixels is None else list(pixels.std),
        "classes": None if classes is None else list(classes),
    }


def pixels_of(model: nn.Module) -> Pixels | None:
    """Return how a model's images are normalised.

    As `describe` said it; else timm's `pretrained_cfg`, torchvision's `weights` where the model
    holds them, or the image processor that lies beside a transformers model's weights.

    Args:
        model: The model.

    Returns:
        Mean and deviation by channel; None where nothing says so.
    """
    if _DESCRIPTION in model.__dict__:
        stored = model.__dict__[_DESCRIPTION]
        return (
            None if stored["mean"] is None else Pixels(tuple(stored["mean"]), tuple(stored["std"]))
        )
    cfg = _timm(model)
    if not cfg:
        weights = _torchvision(model)
        cfg = vars(weights.transforms()) if weights is not None else _processor(model)
    mean, std = cfg.get("mean"), cfg.get("std")
    if (
        not isinstance(mean, (tuple, list))
        or not isinstance(std, (tuple, list))
        or len(mean) != len(std)
        or not mean
    ):
        return None
    return Pixels(tuple(map(float, mean)), tuple(map(float, std)))


def classes_of(model: nn.Module) -> tuple[str, ...] | None:
    """Return the names of a model's classes in their order.

    Args:
        model: The model.

    Returns:
        Names; None where nothing says them (transformers' "LABEL_0" is none).
    """
    if _DESCRIPTION in model.__dict__:
        stored = model.__dict__[_DESCRIPTION]["classes"]
        return None if stored is None else tuple(stored)
    config: Any = getattr(model, "config", None)
    names: Any = getattr(config, "id2label", None) or _timm(model).get("label_names")
    if not names:
        weights = _torchvision(model)
        names = weights.meta.get("categories") if weights is not None else None
    if isinstance(names, Mapping):
        names = [names.get(i, names.get(str(i))) for i in range(len(names))]
    if not names or None in names or all(str(name) == f"LABEL_{i}" for i, name in enumerate(names)):
        return None
    count = getattr(model, "num_classes", len(names))
    return tuple(map(str, names)) if count == len(names) else None


def order_of(own: Sequence[str] | None, other: Sequence[str] | None, who: str) -> list[int] | None:
    """Match a model's classes to another's by name, without case and underscores.

    Args:
        own: The student's classes, in order.
        other: The other model's.
        who: The other model, for the message.

    Returns:
        The index of each own class among the others; None where both orders are alike or one is not
        known.

    Raises:
        BadInput: Where a class has no partner, or two of them.
    """
    if own is None or other is None:
        return None
    mine, theirs = [_plain(name) for name in own], [_plain(name) for name in other]
    if mine == theirs:
        return None
    lacking = [name for name, plain in zip(own, mine, strict=True) if plain not in theirs]
    counts = Counter(theirs)
    twice = [name for name, plain in zip(own, mine, strict=True) if counts[plain] > 1] or (
        [] if len({*mine}) == len(mine) else ["a class of its own twice"]
    )
    if lacking or twice:
        what = (
            f"has no class {some(lacking, 3)}"
            if lacking
            else f"has more than one class {some(twice, 3)}"
        )
        raise BadInput(
            f"{who} {what} (it says {some(other, 3)}; the student {some(own, 3)}): their answers "
            "cannot be compared class by class; give both the same names (`id2label`, or "
            "greenvis.models.describe(model, classes=…)), or distil features"
        )
    return [theirs.index(name) for name in mine]


class Renormalise:
    """How a frozen model is shown the images another one learns from: in its own channels, with its
    own mean and deviation.

    source: how the images come; target: how the frozen model `who` wants them; None where it is not
    known: then they go as they come. channels: that it takes; None: whatever comes. note: told,
    once, where only one of the two is known.
    """

    def __init__(
        self,
        who: str,
        source: Pixels | None,
        target: Pixels | None,
        channels: int | None = None,
        note: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.who, self.source, self.target, self.channels = who, source, target, channels
        self.note = note
        self.fact = ""  # what a record says of it, once it was shown something

    @property
    def key(self) -> str:
        """What a cache of the frozen model's outputs depends on beyond its weights and the
        images."""
        differ = self.source is not None and self.target is not None and self.source != self.target
        return f" (pixels from {self.source} to {self.target})" if differ else ""

    def __call__(self, x: Tensor) -> Tensor:
        """Return images (batch, channels, height, width) as the frozen model wants them."""
        if x.dim() != 4:
            return x
        channels = self.channels or x.shape[1]
        source = self.source.of(x.shape[1]) if self.source is not None else None
        target = self.target.of(channels) if self.target is not None else None
        if not self.fact:
            self._note_conversion(source, target)
        if source is None or target is None or source == target:
            return _channels(x, channels)
        pixels = _channels(x.float() * _row(source.std, x) + _row(source.mean, x), channels)
        return ((pixels - _row(target.mean, x)) / _row(target.std, x)).to(x.dtype)

    def _note_conversion(self, source: Pixels | None, target: Pixels | None) -> None:
        if source is not None and target is not None:
            self.fact = (
                "as they come" if source == target else f"converted from {source} to {target}"
            )
            return
        self.fact = "as they come; not known: " + " and ".join(
            [
                *(["how the images are normalised"] if source is None else []),
                *(["how it wants them"] if target is None else []),
            ]
        )
        if source is not None or target is not None:
            known = f"it was trained on {target}" if source is None else f"the images have {source}"
            self.note(
                f"{self.who} is shown the images {self.fact} ({known}): "
                "greenvis.models.describe(model, mean=…, std=…) says it"
            )


def _channels(x: Tensor, channels: int) -> Tensor:
    return x if x.shape[1] == channels else x.mean(1, keepdim=True).expand(-1, channels, -1, -1)


def _row(values: Sequence[float], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device=like.device).view(1, -1, 1, 1)


def _timm(model: nn.Module) -> dict[str, Any]:
    """Return timm's configuration of a model, or of the one in a transformers wrapper; empty where
    there is none."""
    for holder in (model, getattr(model, "config", None)):
        for name in ("pretrained_cfg", "default_cfg"):
            cfg: Any = getattr(holder, name, None)
            if cfg:
                return dict(cfg) if isinstance(cfg, Mapping) else dict(vars(cfg))
    return {}


def _torchvision(model: nn.Module) -> Any:
    weights: Any = getattr(model, "weights", None)
    if isinstance(getattr(weights, "meta", None), Mapping) and callable(weights.transforms):
        return weights
    return None


def _processor(model: nn.Module) -> dict[str, Any]:
    """Return mean and std of the image processor beside a transformers model's weights; empty where
    there is none."""
    path = getattr(model, "name_or_path", None)
    if not isinstance(path, str) or not path or not hasattr(model, "config"):
        return {}
    try:
        from transformers.image_processing_utils import BaseImageProcessor

        config, _ = BaseImageProcessor.get_image_processor_dict(path, local_files_only=True)
    except Exception:  # none there, or one this transformers cannot read: then nothing is known
        return {}
    factor = config.get("rescale_factor", 1 / 255) if config.get("do_rescale", True) else 1.0
    if abs(factor * 255 - 1) > 1e-3:
        return {}  # of another range than 0 to 1
    if not config.get("do_normalize", True):
        return {"mean": [0.0], "std": [1.0]}
    return {"mean": config.get("image_mean"), "std": config.get("image_std")}


def _plain(name: str) -> str:
    return " ".join(name.replace("_", " ").casefold().split())


def _short(values: Sequence[float]) -> str:
    texts = [f"{v:.4g}" for v in values]
    return texts[0] if len({*texts}) == 1 else "(" + ", ".join(texts) + ")"
