"""A text with each image, of words that training shows."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from greenvis.core.example import Example
from greenvis.data.image_set import ImageSet
from greenvis.data.splits import UNKNOWN
from greenvis.data.transforms import Transform

OVER, OTHER, FIRST = 0, 1, 2  # no word any more, a word that training does not have, the first word


def words(text: str) -> list[str]:
    """Return the words and signs of a text, in lower case."""
    return re.findall(r"\w+|[^\w\s]", text.lower())


@dataclass(frozen=True)
class Vocabulary:
    """Words with a number each: 0 is no word, 1 any other word, the last the end of a text.

    Args:
        words: Sorted.
        length: Tokens of a text, its end included; longer texts are cut.
    """

    words: tuple[str, ...]
    length: int

    @property
    def size(self) -> int:
        """Numbers there are."""
        return FIRST + len(self.words) + 1

    def encode(self, texts: Sequence[str]) -> Tensor:
        """Return the tokens of texts, int64 (N, length)."""
        number = {word: FIRST + i for i, word in enumerate(self.words)}
        out = torch.full((len(texts), self.length), OVER)
        for row, text in enumerate(texts):
            if text:
                own = [number.get(word, OTHER) for word in words(text)][: self.length - 1]
                out[row, : len(own) + 1] = torch.tensor([*own, self.size - 1])
        return out


def vocabulary(texts: Iterable[str]) -> Vocabulary:
    """Return the words of the texts of a training."""
    each = [words(text) for text in texts]
    return Vocabulary(
        tuple(sorted({word for text in each for word in text})),
        max((len(text) for text in each), default=0) + 1,
    )


def texts_of(images: ImageSet, classes: Sequence[str], template: str) -> list[str]:
    """Return each image's text, of its own name, else of its class; "" where neither is known.

    Args:
        images: Named, or labelled by class.
        classes: Names, by label.
        template: Such as "a picture of {name}".
    """
    names: Sequence[str] = images.split.names
    if not names:
        if images.split.kind != "class":
            return [""] * len(images)
        names = [classes[int(y)] if y >= 0 else "" for y in images.targets.tolist()]
    return [template.replace("{name}", str(name)) if name else "" for name in names]


class Captioned(ImageSet):
    """Images with a text each. A batch is an `Example` of images and tokens int64 (B, length), and
    y int64 (B,): the number of the text, the same for the same text, -1 where there is none.

    Args:
        images: The images.
        texts: One for each; "" where there is none.
        numbers: Of each text.
        known_words: How texts become tokens.
    """

    label_kind = "caption"

    def __init__(
        self,
        images: ImageSet,
        texts: Sequence[str],
        numbers: Mapping[str, int],
        known_words: Vocabulary,
    ) -> None:
        labels = torch.tensor([numbers[t] if t else UNKNOWN for t in texts], dtype=torch.int64)
        own = images.relabeled(labels)
        super().__init__(own.split, own.ids, own.transform)
        self.images, self.texts, self.numbers, self.words = own, list(texts), numbers, known_words
        self._tokens = known_words.encode(self.texts)

    def batch(self, positions: Sequence[int] | Tensor, epoch: int = 0) -> tuple[Any, Any]:
        """Return an `Example` of images (B, C, H, W) and tokens, and the numbers of the texts."""
        x, y = self.images.batch(positions, epoch)
        return Example((x, self._tokens[torch.as_tensor(positions, dtype=torch.int64)])), y

    def take(self, positions: Sequence[int] | Tensor) -> ImageSet:
        """Return a subset, with its texts."""
        rows = torch.as_tensor(positions, dtype=torch.int64)
        texts = [self.texts[i] for i in rows.tolist()]
        return Captioned(self.images.take(rows), texts, self.numbers, self.words)

    def shown(self, transform: Transform) -> ImageSet:
        """Return the same images and texts, the images augmented otherwise."""
        return Captioned(self.images.shown(transform), self.texts, self.numbers, self.words)

    def unlabeled(self) -> ImageSet:
        """Return the images alone, of which nothing is known."""
        return self.images.unlabeled()

    def key(self) -> dict[str, str]:
        """Return what a cache of outputs over this set depends on."""
        return {**self.images.key(), "texts": str(self._tokens.tolist())}
