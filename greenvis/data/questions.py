"""Questions about images, with answers in words by rule: from the mask of each, or from its
class."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from greenvis.core.example import Example
from greenvis.data.captions import Vocabulary, words
from greenvis.data.image_set import ImageSet
from greenvis.data.splits import UNKNOWN
from greenvis.data.transforms import Transform
from greenvis.errors import BadInput

LEAST_AREA = 0.005  # of an image that a thing is seen with
NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
BACKGROUND = "background"
WHAT = "what can be seen ?"


class Things:
    """What a mask shows.

    Args:
        mask: Integers (height, width), the class of each pixel.
        names: Of the classes, a word each.
    """

    def __init__(self, mask: Tensor, names: Sequence[str]) -> None:
        area, left = [], []
        for number in range(len(names)):
            columns = (mask == number).nonzero(as_tuple=True)[1]
            area.append(len(columns) / mask.numel())
            left.append(float(columns.float().mean()) if len(columns) else 0.0)
        seen = [n for n, share in enumerate(area) if share >= LEAST_AREA and names[n] != BACKGROUND]
        self.names, self.area = names, area
        self.seen = sorted(seen, key=lambda n: left[n])  # from left to right

    def name(self, number: int | None) -> str:
        """Return the name of a class; "nothing" of none."""
        return "nothing" if number is None else self.names[number]


def _present(things: Things, generator: torch.Generator) -> tuple[str, str]:
    kinds = [n for n, name in enumerate(things.names) if name != BACKGROUND]
    others = [n for n in kinds if n not in things.seen]
    yes = bool(things.seen) and (not others or _drawn(2, generator) == 0)
    among = things.seen if yes else others
    return f"is there a {things.names[among[_drawn(len(among), generator)]]} ?", (
        "yes" if yes else "no"
    )


def _largest(things: Things, generator: torch.Generator) -> tuple[str, str]:
    best = max(things.seen, key=lambda n: things.area[n], default=None)
    return "what is the largest ?", things.name(best)


def _leftmost(things: Things, generator: torch.Generator) -> tuple[str, str]:
    return "what is most left ?", things.name(things.seen[0] if things.seen else None)


def _count(things: Things, generator: torch.Generator) -> tuple[str, str]:
    count = len(things.seen)
    return "how many kinds here ?", NUMBERS[count] if count < len(NUMBERS) else "many"


def _all(things: Things, generator: torch.Generator) -> tuple[str, str]:
    return WHAT, " ".join(map(things.name, things.seen)) or "nothing"


def _drawn(below: int, generator: torch.Generator) -> int:
    return int(torch.randint(below, (), generator=generator))


# of one number of words, so that no question in a batch needs padding
RULES: tuple[Callable[[Things, torch.Generator], tuple[str, str]], ...] = (
    _present, _largest, _leftmost, _count, _all,
)  # fmt: skip


def ask(images: ImageSet, classes: Sequence[str], count: int, seed: int) -> list[tuple[str, str]]:
    """Return so many questions about each image, with their answers, image after image.

    Args:
        images: With masks or classes as labels; a class that is not known has no answer.
        classes: Their names; "background" is not asked about.
        count: Of each image; kinds of questions take turns. One where labels are classes.
        seed: Of what is asked for.

    Raises:
        BadInput: For other labels, and more than one question about a class.
    """
    if images.split.kind == "class":
        if count > 1:
            raise BadInput(f"data: a class answers one question, not {count}: set questions: 1")
        texts = [" ".join(re.findall(r"\w+", name.lower())) for name in classes]
        return [(WHAT, texts[y] if y >= 0 else "") for y in images.targets.tolist()]
    if images.split.kind != "mask":
        raise BadInput(
            f"data: questions are answered from masks or classes, and these labels are of kind "
            f"{images.split.kind}: take scenes, or another data set with masks"
        )
    names = [re.sub(r"\W+", "_", name).strip("_").lower() for name in classes]
    out = []
    for image, row in enumerate(images.ids.tolist()):
        things = Things(torch.as_tensor(images.split.labels[image]), names)
        generator = torch.Generator().manual_seed((seed << 32) + row)
        first = _drawn(len(RULES), generator)
        for number in range(count):
            out.append(RULES[(first + number) % len(RULES)](things, generator))
    return out


def vocabulary(pairs: Sequence[tuple[str, str]]) -> Vocabulary:
    """Return the words of questions and answers; its length is that of the longest pair."""
    each = [(words(question), words(answer)) for question, answer in pairs]
    known = {word for pair in each for text in pair for word in text}
    longest = max((len(q) + len(a) for q, a in each), default=0) + 1
    return Vocabulary(tuple(sorted(known)), longest)


class Asked(ImageSet):
    """Images with a question each. A batch is an `Example` of images and questions int64 (B, Q),
    and y int64 (B, A): the answer's tokens and the end's, -1 behind.

    Args:
        images: The images, one for each question.
        pairs: Questions of as many words each, and answers.
        known_words: How texts become tokens.
    """

    label_kind = "caption"

    def __init__(
        self, images: ImageSet, pairs: Sequence[tuple[str, str]], known_words: Vocabulary
    ) -> None:
        numbers = {answer: i for i, answer in enumerate(sorted({a for _, a in pairs}))}
        labels = torch.tensor([numbers[a] for _, a in pairs], dtype=torch.int64)
        own = images.relabeled(labels)
        super().__init__(own.split, own.ids, own.transform)
        self.images, self.pairs, self.words = own, list(pairs), known_words
        questions = known_words.encode([q for q, _ in pairs])
        answers = known_words.encode([a for _, a in pairs])
        lengths = (questions != 0).sum(1) - 1  # without the end
        if len(lengths) and bool((lengths != lengths[0]).any()):
            raise BadInput("data: questions are of one number of words, so that none is padded")
        longest = int((answers != 0).sum(1).max()) if len(answers) else 1
        self.questions = questions[:, : int(lengths[0]) if len(lengths) else 0]
        self.answers = answers.masked_fill(answers == 0, UNKNOWN)[:, :longest]

    def batch(self, positions: Sequence[int] | Tensor, epoch: int = 0) -> tuple[Any, Any]:
        """Return an `Example` of images (B, C, H, W) and questions, and the answers."""
        rows = torch.as_tensor(positions, dtype=torch.int64)
        x, _ = self.images.batch(rows, epoch)
        return Example((x, self.questions[rows])), self.answers[rows]

    def take(self, positions: Sequence[int] | Tensor) -> ImageSet:
        """Return a subset, with its questions."""
        rows = torch.as_tensor(positions, dtype=torch.int64)
        return Asked(self.images.take(rows), [self.pairs[i] for i in rows.tolist()], self.words)

    def shown(self, transform: Transform) -> ImageSet:
        """Return the same questions, the images augmented otherwise."""
        return Asked(self.images.shown(transform), self.pairs, self.words)

    def unlabeled(self) -> ImageSet:
        """Return the images alone, of which nothing is known."""
        return self.images.unlabeled()

    def key(self) -> dict[str, str]:
        """Return what a cache of outputs over this set depends on."""
        return {**self.images.key(), "questions": str(self.questions.tolist())}


def asked(images: ImageSet, pairs: Sequence[tuple[str, str]], known: Vocabulary) -> Asked:
    """Return images once for each question about them.

    Args:
        images: N images.
        pairs: k·N questions, image after image.
        known: How texts become tokens.
    """
    each = len(pairs) // max(len(images), 1)
    rows = torch.arange(len(images)).repeat_interleave(each)
    return Asked(images.take(rows), pairs, known)
