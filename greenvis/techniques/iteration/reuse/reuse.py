"""Masked pretraining from a frozen base: a new model learns what an old one says of the patches it
cannot see."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from greenvis import models
from greenvis.core.attached import below
from greenvis.core.surgery import names_of
from greenvis.core.technique import InputShape, Installed, Technique
from greenvis.errors import BadInput
from greenvis.models.structure import view
from greenvis.tasks.answers import IMAGES, IMAGES_ALONE
from greenvis.techniques._shared import tec as tec
from greenvis.techniques._shared.frozen import other_model
from greenvis.techniques._shared.masked import (
    Encoder,
    adapt_token,
    begin_anew,
    class_token,
    fold_token,
)
from greenvis.techniques._shared.words import VisualWords, words_loss
from greenvis.techniques.iteration.reuse._bases import Base
from greenvis.techniques.iteration.reuse._parts import Parts
from greenvis.techniques.iteration.reuse._targets import Targets

_CHILD = "reuse"


class Reuse(Technique):
    """Pretrain a vision transformer from a frozen base by masked reconstruction of the base's
    features and attention (TEC: Gao et al., 2022).

    Saves the energy already spent on the base, against pretraining from scratch; 75 % of the
    patches never enter the encoder. Costs a forward of the base for each image in the phase
    "base_reuse": once, where views of the images repeat (`data.augment: none`, or `data.views`),
    for its targets are kept on disk. A pretext: labels are not used, and the classifier stays
    untrained. Adds the terms "reuse_feature" and "reuse_attention". Targets, each predicted by a
    head of its own behind one shared decoder: the mean of the base's last blocks, normalised over
    the patches (masked patches count); the attention of the last block, rows of the class token
    and of the patches it attends to most; and, where asked for, the visual words of its features
    (mc-BEiT: Li et al., 2022), of which 8 a patch are kept: a sixth of what features take at a
    width of 96. Words are learned from the base's features of training images before the first
    step, and are refused where several processes train. The class token passes an MLP, which
    `merge` folds away exactly; encoder adapters and decoder are dropped. A base may be any model
    that `greenvis inspect` understands: of another width, depth, grid or library, without a class
    token (the mean query stands for it), or without attention (targets: [feature]); it never
    changes. It is handed the images of the loop in its own size and channels, and with its own mean
    and deviation where both it and the model say theirs (`greenvis.models.describe`).

    Example:
        >>> live = gv.wrap(model, gv.Reuse(base=teacher))
        >>> sorted(live.terms(x, y, model(x)))
        ['reuse_attention', 'reuse_feature']
    """

    name = "reuse"
    stage = "objective"
    tasks = IMAGES
    instead = IMAGES_ALONE
    role = "base"
    needs = frozenset({"token_grid", "trainable_base"})
    examples = (
        {"base": copy.deepcopy},
        {
            "base": copy.deepcopy,
            "targets": ("feature",),
            "input_adapter": False,
            "encoder_adapters": 0,
            "decoder_depth": 1,
            "init": "mae",
        },
        {
            "base": copy.deepcopy,
            "targets": ("words",),
            "words": {"count": 5, "images": 4},
            "decoder_depth": 1,
        },
    )
    neutral = {"input_adapter": False, "init": "model"}

    base: Any = Field(
        description='a model or a list of models, or references: "run:NAME", "file:PATH", '
        '"timm/NAME", …'
    )
    targets: tuple[Literal["feature", "attention", "words"], ...] = Field(
        default=("feature", "attention"), min_length=1, description="what the base is asked for"
    )
    mask_ratio: float = Field(
        default=0.75, gt=0, lt=1, description="share of the patches hidden from the encoder"
    )
    rows: int = Field(
        default=15, ge=0, description="patches whose attention is a target, besides the class token"
    )
    words: VisualWords = Field(default=VisualWords(), description="of the base's features")
    temperature: float = Field(
        default=1.8, gt=0, description="softens the base's attention (above 1)"
    )
    last_layers: int = Field(
        default=2, ge=1, description="blocks of the base whose outputs are averaged"
    )
    normalise: Literal["tokens", "channels", "none"] = Field(
        default="tokens", description="axis over which a base's features are normalised"
    )
    input_adapter: bool | None = Field(
        default=None,
        description="send the class token through an MLP; absent: where there is a class token",
    )
    encoder_adapters: int = Field(
        default=3, ge=0, description="blocks to an encoder adapter; 0: the last block's output only"
    )
    keep_adapters: bool = Field(
        default=False,
        description="leave the encoder adapters beside the merged model and in its file, to "
        "probe with",
    )
    decoder_depth: int = Field(default=2, ge=1, description="blocks of the decoder")
    decoder_dim: int | None = Field(
        default=None, ge=4, multiple_of=4, description="its width; two thirds of the model's"
    )
    cache: Literal["fp16", "fp32", "off"] = Field(
        default="fp16", description="precision in which a base's targets are kept on disk"
    )
    base_size: int | None = Field(
        default=None,
        ge=4,
        description="side in pixels at which bases see the images, as a convolutional one needs "
        "for a map; as they come where absent",
    )
    init: Literal["model", "mae"] = Field(
        default="model",
        description="begin with the model's weights; or with MAE's, and with fixed positions",
    )
    input_shape: InputShape = None

    @model_validator(mode="after")
    def _words_are_a_target(self) -> Self:
        if "words" not in self.targets and self.words != VisualWords():
            raise ValueError("'words' changes nothing without the target words; add it to targets")
        return self

    def runs(self) -> dict[str, str]:
        """Bases that name another run, by their number."""
        return {
            str(i): base
            for i, base in enumerate(self.bases)
            if isinstance(base, str) and base.startswith("run:")
        }

    def with_runs(self, results: Mapping[str, Any]) -> Technique:
        """Return the request with what those runs left in their place."""
        return self.model_copy(
            update={"base": [results.get(str(i), base) for i, base in enumerate(self.bases)]}
        )

    @property
    def bases(self) -> list[Any]:
        """The bases, one or several."""
        return list(self.base) if isinstance(self.base, (list, tuple)) else [self.base]

    def install(self, model: nn.Module) -> Installed:
        """Put encoder hooks, adapters and decoder in. Raises BadInput for a model or a base that
        does not fit."""
        bases = [other_model("the base", base, model) for base in self.bases]
        if not bases:
            raise BadInput("reuse needs a base: a model, or a reference to one")
        structure = view(model, self.input_shape, probe=False)
        encoder = Encoder(model, structure)
        asks = "attention" in self.targets
        if asks and self.rows > encoder.patches:
            raise BadInput(
                f"rows is {self.rows}, but {type(model).__name__} has {encoder.patches} patches: "
                "give no more"
            )
        if not 1 <= self.num_visible(encoder.patches) < encoder.patches:
            raise BadInput(
                f"mask_ratio {self.mask_ratio} of {encoder.patches} patches leaves none hidden or "
                "none visible: choose another"
            )
        source = models.pixels_of(model)
        image, side = structure.input_shape, self.base_size
        shown = [
            Base(base, image, encoder.grid, self.last_layers, asks, source, side) for base in bases
        ]
        token = None
        if self.input_adapter is not False:
            token = class_token(model, structure, encoder.blocks[0])
        if token is None and self.input_adapter:
            raise BadInput(
                f"{type(model).__name__} shows no class token for an input adapter; leave "
                "`input_adapter` out"
            )
        if self.keep_adapters and not self.encoder_adapters:
            raise BadInput(
                "keep_adapters keeps encoder adapters, and there are none; give encoder_adapters: 3"
            )
        parts = Parts(self, encoder, shown).to(**encoder.kind)
        if self.init == "mae":
            begin_anew(model, encoder, structure, parts)
        model.get_submodule(encoder.blocks[-1]).add_module(_CHILD, parts)
        adapter = None
        if token is not None:
            adapter = tec.TokenMlp(encoder.dim, 4 * encoder.dim).to(**encoder.kind)
            adapt_token(token, adapter)
        names = names_of(
            model, (*parts.parameters(), *(adapter.parameters() if adapter is not None else ()))
        )
        fold = None
        if token is not None and adapter is not None:
            fold = partial(fold_token, token, adapter)
        return InstalledReuse(self, names, encoder, parts, shown, fold)

    def num_visible(self, patches: int) -> int:
        """Return how many patches of so many stay visible."""
        return int(patches * (1 - self.mask_ratio))


class InstalledReuse(Installed):
    """Pretraining at work: the loop's forward is its own."""

    pretext = True

    def __init__(
        self,
        request: Reuse,
        names: tuple[str, ...],
        encoder: Encoder,
        parts: Parts,
        bases: Sequence[Base],
        fold: Any,
    ) -> None:
        super().__init__(names)
        self.request, self.encoder, self.parts, self.bases = request, encoder, parts, bases
        self._fold = fold
        self._modes = [(m, m.training) for base in bases for m in base.model.modules()]
        self.asked = [Targets(base, request.targets, request, self) for base in bases]
        if "words" in request.targets:
            self.wants = ("train",)
        # of an earlier pretraining
        self._beside = models.attached(encoder.model, tec.ENCODER_ADAPTERS)
        for base in bases:
            base.model.eval()
            base.images.note = lambda text: self.note(text)

    def terms(self, x: Any, y: Any, logits: Tensor | None) -> Mapping[str, Tensor]:
        """Return {"reuse_feature", "reuse_attention", "reuse_words"}, those asked for: means over
        the bases, of images x (batch, channels, height, width)."""
        targets = [ask(x) for ask in self.asked]
        patches = self.encoder.patches
        noise = torch.rand(len(x), patches, device=x.device)
        ids_keep, restore, mask = tec.random_mask(noise, self.request.num_visible(patches))
        encoded = self.parts.encoded(self.encoder(x, ids_keep))
        losses: dict[str, list[Tensor]] = {target: [] for target in self.request.targets}
        for i, target in enumerate(targets):
            if "feature" in losses:
                predicted = self.parts.predicted(i, "feature", encoded, restore)
                losses["feature"].append(
                    tec.feature_loss(predicted.float(), target["feature"], mask)
                )
            if "attention" in losses:
                predicted = self.parts.predicted(
                    i, "attention", encoded, restore, target["top"].long()
                )
                losses["attention"].append(
                    tec.attention_loss(
                        predicted.float(), target["attention"], self.request.temperature
                    )
                )
            if "words" in losses:
                predicted = self.parts.predicted(i, "words", encoded, restore).float()
                shares = torch.zeros_like(predicted).scatter(
                    -1, target["word"].long(), target["share"]
                )
                losses["words"].append(words_loss(predicted, shares, mask))
        return {f"reuse_{name}": torch.stack(each).mean() for name, each in losses.items()}

    def state_dict(self) -> dict[str, Tensor]:
        """Return the words of each base, once they are learned."""
        return {
            f"{i}.{name}": value
            for i, asked in enumerate(self.asked)
            for name, value in asked.state_dict().items()
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Load what `state_dict` returned."""
        for i, asked in enumerate(self.asked):
            asked.load_state_dict(below(state, f"{i}."))

    def replacement_blocker(self, path: str) -> str:
        """Nothing: its parts are asked for where they hang."""
        return ""

    def facts(self) -> Mapping[str, Any]:
        """Return how many of the bases' targets were read back and computed, and how bases were
        shown the images."""
        caches = [asked.outputs.facts() for asked in self.asked if asked.outputs is not None]
        cached = {"reuse_targets": caches} if caches else {}
        shown = [base.images.fact for base in self.bases if base.images.fact]
        return {**cached, "reuse_images": shown} if shown else cached

    def merge(self) -> None:
        """Fold the class token's MLP into the token; all else that was added is gone, but for
        adapters to keep."""
        if self._fold is not None:
            self._fold()
        if self.request.keep_adapters and self.parts.adapters is not None:
            models.attach(
                self.encoder.model, tec.ENCODER_ADAPTERS, self.parts.adapters.state_dict()
            )

    def undo(self) -> None:
        """Close the caches and give the bases their own modes back."""
        models.attach(self.encoder.model, tec.ENCODER_ADAPTERS, self._beside)
        for asked in self.asked:
            if asked.outputs is not None:
                asked.outputs.close()
        for module, training in self._modes:
            module.training = training
