"""Training an encoder of images and one of texts to meet: contrast, pairs, and a locked image
tower."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from greenvis.core.surgery import hold_in_eval
from greenvis.core.technique import Installed, OnlyWith, PrefixCache, Technique
from greenvis.errors import BadInput
from greenvis.tasks.answers import UNKNOWN
from greenvis.tasks.image_text import ImageText
from greenvis.techniques._shared.frozen import FrozenOutputs, fingerprint

MOST = math.log(100)  # of the logarithm of the factor on cosines
_FACTOR, _BIAS = math.log(10), -10.0  # that SigLIP begins with
_SCALE, _OWN_BIAS = "logit_scale", "cross_modal_bias"
_TOWERS = ("image", "vision_model", "visual")  # of TwoTowers, transformers, open_clip


def clip_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the mean of the cross entropies of images among texts and of texts among images
    (CLIP: Radford et al., 2021, figure 3); texts of one number are all right for an image.

    Args:
        logits: (batch, batch), images by texts.
        labels: int64 (batch,), the number of each pair's text; -1 where there is none.
    """
    pairs: Any = type("Logits", (), {"logits": logits})
    known = labels != UNKNOWN
    return ImageText().losses(pairs, labels).sum() / known.sum().clamp(min=1)


def siglip_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the logistic loss of every image with every text, summed over texts, a mean over
    images (SigLIP: Zhai et al., 2023, equation 1).

    Args:
        logits: (batch, batch), images by texts, with factor and bias.
        labels: int64 (batch,), the number of each pair's text; -1 where there is none: neither
            such an image nor such a text counts.
    """
    known = labels != UNKNOWN
    signs = torch.where(labels[:, None] == labels[None], 1.0, -1.0)
    losses = -F.logsigmoid(signs * logits.float())
    counted = losses.masked_fill(~(known[:, None] & known[None]), 0.0)
    return counted.sum() / known.sum().clamp(min=1)


class CrossModal(Technique):
    """Train a dual encoder by contrast (CLIP: Radford et al., 2021) or pair by pair (SigLIP: Zhai
    et al., 2023), all of it or with the image tower locked (LiT: Zhai et al., 2022).

    `image: frozen` saves what the image tower's backward takes, and with `cache` its forward, too:
    it runs once for each image, and what it gives is kept on disk; text tower and projections
    train alone. It is as good as the features are: take a pretrained tower, for a random one
    teaches little. A frozen tower runs in eval. `clip` holds the factor on cosines at 100 at most;
    `siglip` adds a bias, which needs no large batch, and begins with a factor of 10. Loses to
    training both towers where the images are unlike those that the tower knows.

    Example:
        >>> clip = gv.models.build("plain/clip", tokens=32, embed_dim=32)
        >>> live = gv.wrap(clip, gv.CrossModal(image="frozen"), task="image_text")
        >>> any("vision_model" in name for name in live.trainable)
        False
    """

    name = "cross_modal"
    stage = "objective"
    tasks = frozenset({"image_text"})
    instead = "it joins images and texts: take `task: image_text`, and a model of both"
    needs = frozenset({"gradients"})
    only_with: ClassVar[OnlyWith] = {"cache": ("image", ("frozen",))}
    neutral: ClassVar[Mapping[str, Any] | None] = None
    examples: ClassVar = (
        {}, {"loss": "siglip"}, {"image": "frozen"},
        {"loss": "siglip", "image": "frozen", "cache": True},
    )  # fmt: skip

    loss: Literal["clip", "siglip"] = Field(
        default="clip", description="each among all of the batch, or each pair by itself"
    )
    image: Literal["train", "frozen"] = Field(
        default="train", description="whether the image tower learns"
    )
    cache: PrefixCache = False

    def install(self, model: nn.Module) -> Installed:
        """Freeze the image tower where that is asked for. Raises BadInput for a model that shows no
        factor on its cosines, or no image tower."""
        scales = [p for n, p in model.named_parameters() if n.split(".")[-1] == _SCALE]
        towers = [m for n, m in model.named_modules() if n.split(".")[-1] in _TOWERS]
        if len(scales) != 1 or not towers:
            raise BadInput(
                f"{type(model).__name__} is no dual encoder: it shows no '{_SCALE}' or image tower "
                f"({', '.join(_TOWERS)}); take plain/clip, transformers/NAME, or `head: text`"
            )
        trainable: list[str] = []
        if self.loss == "siglip":
            with torch.no_grad():
                scales[0].fill_(_FACTOR)
            model.register_parameter(_OWN_BIAS, nn.Parameter(torch.full_like(scales[0], _BIAS)))
            trainable.append(_OWN_BIAS)
        locked = self.image == "frozen"
        if locked:
            own = {id(p) for p in towers[0].parameters()}
            trainable = [n for n, p in model.named_parameters() if id(p) not in own]
            for module in towers[0].modules():
                hold_in_eval(module)
        return InstalledCrossModal(
            self, model, scales[0], towers[0] if locked else None, tuple(trainable)
        )


class InstalledCrossModal(Installed):
    """Both towers at work."""

    def __init__(
        self,
        request: CrossModal,
        model: nn.Module,
        scale: nn.Parameter,
        locked: nn.Module | None,
        trainable: tuple[str, ...],
    ) -> None:
        super().__init__(trainable, freezes=locked is not None)
        self.request, self.model, self.scale = request, model, scale
        self._features: FrozenOutputs | None = None
        self._output: type[Any] | None = None  # of the image tower
        if request.loss == "siglip":
            self.criterion = lambda task_loss: self._loss
        if locked is not None and request.cache:
            part = f"{type(locked).__name__}: the image tower"
            dtype: Literal["fp32", "fp16"] = "fp16" if request.cache == "fp16" else "fp32"
            self._features = FrozenOutputs(
                part, fingerprint(locked), dtype=dtype, note=lambda text: self.note(text)
            )
            self._own = locked.forward
            locked.forward = self._kept  # type: ignore[method-assign]

    def _loss(self, outputs: Any, y: Any) -> Tensor:
        logits = ImageText().outputs(outputs).logits
        return siglip_loss(logits + self.model.get_parameter(_OWN_BIAS), y)

    def _kept(self, *args: Any, **kwargs: Any) -> Any:
        """Answer for the image tower: what was kept of the images, in a step on known samples."""
        images = args[0] if args else next(iter(kwargs.values()))
        samples = self.samples if self.model.training and torch.is_grad_enabled() else None
        if samples is None or len(samples.positions) != len(images) or self._features is None:
            return self._own(*args, **kwargs)
        answers: list[Any] = []
        if self._output is None:  # what it answers with is asked once
            with torch.no_grad():
                answers.append(self._own(*args, **kwargs))
            self._output = type(answers[0])

        def compute() -> Tensor:
            out = answers.pop() if answers else self._own(*args, **kwargs)
            return out if isinstance(out, Tensor) else out.pooler_output

        with self.phase("image tower"):
            features = self._features.outputs(samples, compute, images.device)
        return (
            features if issubclass(self._output, Tensor) else self._output(pooler_output=features)
        )

    def step_end(self) -> None:
        """Hold the factor of CLIP at 100 at most."""
        if self.request.loss == "clip":
            with torch.no_grad():
                self.scale.clamp_(max=MOST)

    def facts(self) -> Mapping[str, Any]:
        """Return {"image_tower": hits, misses, bytes, …} of what was kept."""
        return {} if self._features is None else {"image_tower": self._features.facts()}

    def undo(self) -> None:
        """Let go of the files."""
        if self._features is not None:
            self._features.close()
