"""Visual words: what a patch is, said in the entries of a codebook, one or several (mc-BEiT: Li, Ge
et al., 2022)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from greenvis.errors import BadInput

POINTS = 50_000  # patches that a codebook is learned from, at most


def word_probabilities(
    features: Tensor, words: Tensor, scale: Tensor, temperature: float
) -> Tensor:
    """Return how likely each word is for each patch, P = softmax(z / τ) with z = −d² / mean d².

    Args:
        features: (batch, patches, dim).
        words: (words, dim).
        scale: mean squared distance of the patches that the words were learned from to the words.
        temperature: τ.

    Returns:
        (batch, patches, words), each patch's sum is 1.
    """
    squares = torch.cdist(features.flatten(0, 1), words).square().unflatten(0, features.shape[:2])
    return (-squares / (scale * temperature)).softmax(-1)


def similarity(features: Tensor, temperature: float) -> Tensor:
    """Return how alike an image's patches are, W = softmax(cos(f, f′) / τ), without a gradient.

    Args:
        features: (batch, patches, dim).
        temperature: τ.

    Returns:
        (batch, patches, patches), each row's sum is 1.
    """
    unit = F.normalize(features.detach().float(), dim=-1)
    return (unit @ unit.mT / temperature).softmax(-1)


def smoothed(probabilities: Tensor, alike: Tensor, share: float) -> Tensor:
    """Return P̂ = ω W P + (1 − ω) P, in which patches that look alike share their words.

    Args:
        probabilities: P, (batch, patches, words).
        alike: W, (batch, patches, patches).
        share: ω.

    Returns:
        (batch, patches, words).
    """
    return share * alike @ probabilities + (1 - share) * probabilities


def words_loss(logits: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """Return the cross entropy with soft words, averaged over the masked patches, a scalar.

    Args:
        logits, target: (batch, patches, words).
        mask: (batch, patches), 1 where hidden.
    """
    return (-(target * logits.log_softmax(-1)).sum(-1) * mask).sum() / mask.sum()


def likeliest(probabilities: Tensor, count: int) -> dict[str, Tensor]:
    """Return each patch's likeliest words: "word", their numbers, and "share", probabilities whose
    sum is 1, (batch, patches, count) each."""
    share, word = probabilities.topk(min(count, probabilities.shape[-1]), dim=-1)
    return {"word": word, "share": share / share.sum(-1, keepdim=True)}


class VisualWords(BaseModel):
    """Words that patches are said in: mini-batch k-means, and how sure a patch's word is."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    count: int = Field(default=128, ge=2, le=2048, description="words of the codebook")
    kind: Literal["hard", "soft", "similar"] = Field(
        default="similar",
        description="a patch's nearest word; all by their distance; the same, shared with patches "
        "of the image that look alike",
    )
    temperature: float = Field(default=0.1, gt=0, description="softens the words; above 1: flat")
    similarity: float = Field(
        default=0.1, gt=0, description="temperature of the likeness between patches"
    )
    share: float = Field(
        default=0.2, ge=0, le=1, description="of the words of patches that look alike"
    )
    images: int = Field(
        default=1024, ge=1, description="training images that the words are learned from"
    )


class Codebook:
    """The words of one kind of feature, learned once.

    Args:
        spec: How many, how soft.
        what: What they are words of, for messages.
    """

    def __init__(self, spec: VisualWords, what: str) -> None:
        self.spec, self.what = spec, what
        self.words: Tensor | None = None
        self.scale = torch.ones(())

    def learn(self, patches: Iterator[Tensor], seed: int) -> None:
        """Learn the words by mini-batch k-means (Sculley, 2010).

        Args:
            patches: Features (batch, patches, dim), batch by batch; 50,000 of the patches are drawn
                where there are more.
            seed: Of the first words.

        Raises:
            BadInput: Where there are fewer patches than words.
        """
        from sklearn.cluster import MiniBatchKMeans

        with _disable_current_modes(), torch.no_grad():
            points = torch.cat([p.flatten(0, 1).float().cpu() for p in patches])
            generator = torch.Generator().manual_seed(seed)
            points = points[torch.randperm(len(points), generator=generator)[:POINTS]]
            if len(points) < self.spec.count:
                raise BadInput(
                    f"{self.spec.count} words of {self.what} are to be learned from {len(points)} "
                    "patches: ask for fewer (count), or learn from more images (images)"
                )
            means = MiniBatchKMeans(
                self.spec.count, batch_size=4096, n_init="auto", random_state=seed
            )
            centres = means.fit(points.numpy()).cluster_centers_
            self.words = torch.as_tensor(centres, dtype=torch.float32)
            self.scale = torch.cdist(points, self.words).square().mean()

    def probabilities(self, features: Tensor, alike: Tensor) -> Tensor:
        """Return what stands for each patch, as `kind` says, without a gradient.

        Args:
            features: (batch, patches, dim), which the words are of.
            alike: (batch, patches, width), what patches are compared by.

        Returns:
            (batch, patches, words).
        """
        assert self.words is not None
        spec = self.spec
        with torch.no_grad():
            words, scale = self.words.to(features.device), self.scale.to(features.device)
            out = word_probabilities(features.float(), words, scale, spec.temperature)
            if spec.kind == "hard":
                return F.one_hot(out.argmax(-1), spec.count).to(out.dtype)
            if spec.kind == "similar":
                out = smoothed(out, similarity(alike, spec.similarity), spec.share)
            return out

    def state_dict(self) -> dict[str, Tensor]:
        """Return the words, once they are learned."""
        return {} if self.words is None else {"words": self.words, "scale": self.scale}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Load what `state_dict` returned."""
        if state:
            self.words, self.scale = state["words"].clone().cpu(), state["scale"].clone().cpu()
