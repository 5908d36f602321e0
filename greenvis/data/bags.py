"""Images in bags, of which only the bag has a label: multiple instances (Dietterich, 1997)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from greenvis.core.example import BAG, Example
from greenvis.data.changes import Change, Changed
from greenvis.data.image_set import Concat, ImageSet
from greenvis.data.splits import Lazy, Split
from greenvis.data.transforms import Transform
from greenvis.errors import BadInput

CLASSES = ("negative", "positive")
SPREAD = 0.2  # deviation of a bag's size, as a share of the average
MOST_POSITIVE = 0.5  # of a bag's images


class Bags(ImageSet):
    """Bags of images, packed without padding. A position is a bag's.

    Args:
        images: Those in the bags.
        members: Positions in `images` of each bag, int64 (n,).
        labels: Of each bag, int64 (N,).
        positive: Classes of images that make a bag positive, for judging what a model says of
            single images; () where nobody knows.
    """

    label_kind = "bag"

    def __init__(
        self, images: ImageSet, members: Sequence[Tensor], labels: Any, positive: Sequence[int] = ()
    ) -> None:
        self.images, self.members, self.positive = images, list(members), tuple(positive)
        shown = Lazy(lambda bag: images.split.take(self.members[bag]).images, range(len(members)))
        first = torch.tensor([int(rows[0]) for rows in members], dtype=torch.int64)
        super().__init__(Split(shown, labels), images.ids[first], images.transform)

    def batch(self, positions: Sequence[int] | Tensor, epoch: int = 0) -> tuple[Any, Any]:
        """Return an `Example` of instances (rows, C, H, W) and `bag`, int64 (rows,): which of the
        bags each is of; and y int64 (B,)."""
        bags = torch.as_tensor(positions, dtype=torch.int64)
        rows = [self.members[bag] for bag in bags.tolist()]
        x, _ = self.images.batch(torch.cat(rows), epoch)
        sizes = torch.tensor([len(own) for own in rows])
        bag = torch.arange(len(rows)).repeat_interleave(sizes)
        return Example((x,), {BAG: bag}), self.targets[bags]

    def take(self, positions: Sequence[int] | Tensor) -> ImageSet:
        """Return some of the bags."""
        bags = torch.as_tensor(positions, dtype=torch.int64)
        members = [self.members[b] for b in bags.tolist()]
        return Bags(self.images, members, self.targets[bags], self.positive)

    def in_domains(self, parts: Sequence[Tensor], changes: Sequence[Change]) -> Bags:
        """Return the bags, each shown in one domain.

        Args:
            parts: Positions of the bags of each domain, int64 (n,).
            changes: What each domain does to images.
        """
        images = [Changed(self.images, change) for change in changes]
        rows = torch.cat([*parts]).sort().values
        which = {bag: i for i, part in enumerate(parts) for bag in part.tolist()}
        members = [self.members[b] + which[b] * len(self.images) for b in rows.tolist()]
        shown = images[0] if len(images) == 1 else Concat(images)
        return Bags(shown, members, self.targets[rows])

    def shown(self, transform: Transform) -> ImageSet:
        """Return the same bags, their images augmented otherwise."""
        return Bags(self.images.shown(transform), self.members, self.targets, self.positive)

    def relabeled(self, labels: Any) -> ImageSet:
        """Return the same bags with other labels."""
        return Bags(self.images, self.members, labels, self.positive)

    def unlabeled(self) -> ImageSet:
        """Return the same bags, of which nothing is known."""
        return Bags(self.images.unlabeled(), self.members, torch.full((len(self),), -1))

    @property
    def makes_positive(self) -> Tensor | None:
        """Which images make their bag positive, bag by bag, bool (rows,); None where nobody
        knows."""
        if not self.positive:
            return None
        labels = self.images.targets[torch.cat(self.members)]
        return torch.isin(labels, torch.tensor(self.positive))

    def key(self) -> dict[str, str]:
        """Return what a cache of outputs over this set depends on."""
        return {**self.images.key(), "bags": str([rows.tolist() for rows in self.members])}


def deal(images: ImageSet, positive: Sequence[int], size: int, seed: int) -> Bags:
    """Deal images out to bags, each to one at most, as many positive bags as negative ones.

    A positive bag has one image of a positive class at least, at most half of it; a negative one
    has none. Sizes are normal about `size`, by a fifth of it (Ilse et al., 2018).

    Args:
        images: Labelled by class.
        positive: Classes that make a bag positive.
        size: Images of a bag, on average.
        seed: Of the draw.

    Returns:
        The bags, in an order drawn from `seed`.

    Raises:
        BadInput: For too few images of either kind.
    """
    labels, generator = images.classes("bags"), torch.Generator().manual_seed(seed)
    makes = torch.isin(labels, torch.tensor(list(positive)))
    drawn = torch.randperm(len(labels), generator=generator)
    good, rest = drawn[makes[drawn]].tolist(), drawn[~makes[drawn]].tolist()
    pairs = min(len(labels) // (2 * size), len(good))
    most = max(1, int(MOST_POSITIVE * size))
    while pairs and 2 * pairs * size - min(len(good), pairs * most) > len(rest):
        pairs -= 1  # by the average size, so that every seed has as many bags
    if not pairs:
        raise BadInput(
            f"data: {len(good)} images of positive classes and {len(rest)} others make no bags of "
            f"{size}; give more images, or smaller bags"
        )
    sizes = torch.normal(float(size), SPREAD * size, (2 * pairs,), generator=generator)
    sizes = sizes.round().clamp(min=2).long().tolist()
    share = [1] * pairs  # images of a positive class, of each positive bag
    for number in range(len(good) - pairs):
        bag = number % pairs
        if share[bag] + 1 <= MOST_POSITIVE * sizes[bag]:
            share[bag] += 1
    while sum(sizes) - sum(share) > len(rest):  # by chance large: the largest gives one back
        largest = max(range(2 * pairs), key=sizes.__getitem__)
        sizes[largest] -= 1
        if largest < pairs:
            share[largest] = min(share[largest], max(1, int(MOST_POSITIVE * sizes[largest])))
    members = []
    for bag in range(2 * pairs):
        own = share[bag] if bag < pairs else 0
        members.append([good.pop() for _ in range(own)])
        members[-1] += [rest.pop() for _ in range(sizes[bag] - own)]
    order = torch.randperm(2 * pairs, generator=generator).tolist()
    truth = torch.tensor([int(bag < pairs) for bag in order])
    packed = [torch.tensor(members[bag]).sort().values for bag in order]
    return Bags(images, packed, truth, positive)
