"""A piece of clothing and a digit in a place: one image, a task for each of several experts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from greenvis.data.dataset import DataSet
from greenvis.data.sets.digits import Digits
from greenvis.data.sets.fashion_mnist import FashionMnist
from greenvis.data.spec import DataSpec
from greenvis.errors import BadInput, nearest

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from greenvis.data.splits import Split, Stored

SIDE, ITEM = 32, 16
PLACES = ("rows", "columns", "slope", "checks", "rings")
WEAR = (0, 1, 0, 0, 0, 2, 0, 2, 3, 2)  # Fashion-MNIST's classes as top, trousers, shoe, bag
TOPICS = ("clothes", "digit", "place", "both")


class Duets(DataSet):
    """A piece of clothing at the left and a digit at the right, on one of five patterns, 32 pixels.

    `duets:clothes`, `duets:digit` and `duets:place` ask for one of the three; `duets:both` for what
    no one of them says: which kind of clothing (top, trousers, shoe or bag), and whether the digit
    is odd, eight classes. The images are the same. 4,000 to train and 1,000 to test, unless asked
    for others.
    """

    name = "duets"
    argument = "TOPIC"
    values = TOPICS
    source = "drawn by greenvis of Fashion-MNIST and scikit-learn's digits"
    licence = "MIT (Fashion-MNIST); CC-BY-4.0 (digits)"
    size = {"train": 20_000, "test": 10_000}

    def check(self) -> None:
        """Raise BadInput for an unknown topic, and where Fashion-MNIST is not here."""
        if self.value not in TOPICS:
            raise BadInput(f"duets has no topic '{self.value}'{nearest(self.value, TOPICS)}")
        FashionMnist(DataSpec(name=FashionMnist.name)).check()

    def read(self) -> Stored:
        """Draw as many as asked for."""
        import torch

        from greenvis.data.splits import Split, Stored, sha256

        clothes = FashionMnist(DataSpec(name=FashionMnist.name)).read()
        digits = Digits(DataSpec(name=Digits.name)).read()
        spec = self.spec
        counts = ((spec.train or 4000) + (spec.held_out or 0), spec.test or 1000)
        splits, names = [], self._classes(clothes.classes)
        for number, count in enumerate(counts):
            rng = torch.Generator().manual_seed(2 * spec.seed + number)
            parts = (clothes.train, digits.train) if number == 0 else (clothes.test, digits.test)
            images, labels = _drawn(*parts, count, rng)
            splits.append(Split(images, labels[self.value]))
        train, test = splits
        digest = sha256(
            part.numpy().tobytes() for s in (train, test) for part in (s.images, s.labels)
        )
        return Stored(train, test, names, digest, SIDE, 1)

    def _classes(self, clothes: tuple[str, ...]) -> tuple[str, ...]:
        kinds = ("top", "trousers", "shoe", "bag")
        return {
            "clothes": clothes,
            "digit": tuple("0123456789"),
            "place": PLACES,
            "both": tuple(f"{kind}, {parity}" for kind in kinds for parity in ("even", "odd")),
        }[self.value]


def _drawn(
    clothes: Split, digits: Split, count: int, rng: torch.Generator
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return images uint8 (count, 1, side, side), and the labels of each topic."""
    import torch
    from torch.nn import functional as F

    rows = [torch.randint(len(part), (count,), generator=rng) for part in (clothes, digits)]
    items = []
    for part, chosen in zip((clothes, digits), rows, strict=True):
        pixels = torch.as_tensor(part.images[chosen]).float()  # type: ignore[index]
        pixels = pixels / pixels.amax((1, 2, 3), keepdim=True).clamp(min=1)
        items.append(F.interpolate(pixels, size=(ITEM, ITEM), mode="area"))
    places = torch.randint(len(PLACES), (count,), generator=rng)
    canvas = 0.35 * _patterns(rng)[places]
    tops = torch.randint(SIDE - ITEM + 1, (count, 2), generator=rng)
    for image in range(count):
        for side in (0, 1):
            y, x = int(tops[image, side]), ITEM * side
            patch = canvas[image, :, y : y + ITEM, x : x + ITEM]
            canvas[image, :, y : y + ITEM, x : x + ITEM] = torch.maximum(patch, items[side][image])
    wear, digit = clothes.labels[rows[0]], digits.labels[rows[1]]
    both = 2 * torch.tensor(WEAR)[wear] + digit % 2
    labels = {"clothes": wear, "digit": digit, "place": places, "both": both}
    return (canvas * 255).round().to(torch.uint8), labels


def _patterns(rng: torch.Generator) -> Tensor:
    """Return a pattern for each place, 0 to 1, (places, 1, side, side)."""
    import torch

    axis = torch.arange(SIDE).float()
    y, x = axis[:, None], axis[None]
    middle = ((y - SIDE / 2) ** 2 + (x - SIDE / 2) ** 2).sqrt()
    rows, columns = (y % 6 < 3).expand(SIDE, SIDE), (x % 6 < 3).expand(SIDE, SIDE)
    every = [rows, columns, (x + y) % 6 < 3, rows ^ columns, middle % 6 < 3]
    return torch.stack(every).float()[:, None]
