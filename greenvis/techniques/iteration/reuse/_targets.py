"""What a base is asked for as training goes: its targets of each image, computed once where that is
possible."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, Protocol

import torch
from torch import Tensor

from greenvis import models
from greenvis.core.technique import Installed
from greenvis.techniques._shared import tec as tec
from greenvis.techniques._shared.frozen import FrozenOutputs, fingerprint
from greenvis.techniques._shared.words import Codebook, VisualWords, likeliest
from greenvis.techniques.iteration.reuse._bases import Base

TOP = 8  # words of a patch that are kept
_EXACT_IN_HALF = 2048  # integers up to here are themselves in fp16
AXES = {
    "tokens": tec.normalise_tokens,
    "channels": tec.normalise_channels,
    "none": lambda features: features,
}


class Asks(Protocol):
    """What a request says of targets; see `Reuse`."""

    @property
    def normalise(self) -> Literal["tokens", "channels", "none"]: ...
    @property
    def rows(self) -> int: ...
    @property
    def words(self) -> VisualWords: ...
    @property
    def cache(self) -> Literal["fp16", "fp32", "off"]: ...


class Targets:
    """The targets of one base.

    Args:
        base: The base.
        names: Of "feature", "attention" and "words".
        request: How they are made and kept.
        live: The technique at work, which knows the batch's samples, the phase and the streams.
    """

    def __init__(self, base: Base, names: Sequence[str], request: Asks, live: Installed) -> None:
        self.base, self.live = base, live
        self.normalise, self.rows, self.cache = request.normalise, request.rows, request.cache
        self.codebook = None
        self.names = [n for n in ("feature", "attention") if n in names]
        if base.attention and self.rows:
            self.names.append("top")
        if "words" in names:
            self.codebook = Codebook(request.words, f"features of the base {base.what}")
            self.names += ["word", "share"]
        self.outputs: FrozenOutputs | None = None

    def __call__(self, x: Tensor) -> dict[str, Tensor]:
        """Return what the base says of images, kept from earlier or asked for.

        Args:
            x: (batch, channels, height, width).

        Returns:
            "feature" (batch, patches, channels), "attention" (batch, 1 + rows, heads, patches), the
            rows' patches "top" (batch, rows), each patch's words "word" and their probabilities
            "share" (batch, patches, 8).
        """
        if self.codebook is not None and self.codebook.words is None:
            self._learn(self.codebook, x)
        samples = self.live.samples if self.cache != "off" else None
        out: dict[str, Tensor] = {}
        if self.base.attention and not self.rows:
            out["top"] = torch.empty(len(x), 0, device=x.device)
        if samples is None:
            every = self._ask(x)
            return out | {name: every[name].float() for name in self.names}
        if self.outputs is None:
            self.outputs = self._kept()
        return out | self.outputs.layers(samples, lambda: self._ask(x), self.names, x.device)

    def _ask(self, x: Tensor) -> dict[str, Tensor]:
        with self.live.phase("base_reuse"):
            shown = self.base.ask(x)
            out = shown.targets(lambda f: AXES[self.normalise](f.float()), self.rows)
            if self.codebook is not None:
                features = tec.normalise_channels(shown.features.float())
                out |= likeliest(self.codebook.probabilities(features, features), TOP)
            return out

    def _learn(self, codebook: Codebook, x: Tensor) -> None:
        images = codebook.spec.images
        with self.live.phase("base_reuse"):
            shown = self.live.feed("train", x.device, -(-images // len(x)))[:images]
            features = (self.base.ask(part).features.float() for part in shown.split(64))
            codebook.learn(map(tec.normalise_channels, features), self.live.seed)

    def _kept(self) -> FrozenOutputs:
        base, patches = self.base, self.base.grid[0] * self.base.grid[1]
        words = ""
        if self.codebook is not None:
            digest = models.fingerprint(self.codebook.state_dict())
            words = f", words {self.codebook.spec.model_dump_json()} {digest}"
        description = (
            f"{len(base.blocks)} blocks normalised over {self.normalise}, {self.rows} rows, on "
            f"{base.grid}{words}"
        )
        return FrozenOutputs(
            f"base {base.what}: {description}{base.images.key}",
            fingerprint(base.model),
            dtype="fp32" if self.cache == "fp32" or patches > _EXACT_IN_HALF else "fp16",
            note=lambda text: self.live.note(text),
        )

    def state_dict(self) -> dict[str, Tensor]:
        """Return the words, once they are learned."""
        return {} if self.codebook is None else self.codebook.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Load what `state_dict` returned."""
        if self.codebook is not None:
            self.codebook.load_state_dict(state)
