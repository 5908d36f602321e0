"""Which images have a label, a wrong one or none: drawn by seed, nested in every budget.

Every draw comes from the run's seed and the data's: seeds draw different images, and the arms of
one seed the same ones. Of one seed, fewer labels are among more labels, and the images that noise
spoils at a low rate among those it spoils, in the same way, at a higher one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from greenvis.data import bags
from greenvis.data.changes import Change, Changed, parse
from greenvis.data.image_set import Concat, ImageSet
from greenvis.data.spec import NoiseSpec, PerClass
from greenvis.data.splits import UNKNOWN, stratified
from greenvis.data.transforms import mix
from greenvis.errors import BadInput

# what is drawn, each apart from the others
LABELS, NOISE, WRONG, TAIL, DOMAINS, BAGS, CANDIDATES = range(7)


class Draw:
    """What one run draws of a data set.

    Args:
        data_seed: The recipe's `data.seed`.
        run_seed: The run's.
    """

    def __init__(self, data_seed: int, run_seed: int) -> None:
        self.data_seed, self.run_seed = data_seed, run_seed

    def seed(self, purpose: int) -> int:
        """Return the seed of one kind of draw."""
        return int(mix(np.array([self.run_seed]), self.data_seed, purpose)[0] >> np.uint64(1))

    def long_tail(self, groups: Tensor, ratio: float) -> Tensor:
        """Return rows whose classes shrink exponentially from the first to the last, the largest
        `ratio` times the smallest, as many as there can be.

        Args:
            groups: Classes int64 (N,).
            ratio: At least 1.

        Returns:
            int64 (n,), by row.
        """
        available = torch.bincount(groups[groups >= 0]).double()
        share = ratio ** -(torch.arange(len(available)).double() / max(len(available) - 1, 1))
        counts = (float((available / share).min()) * share).round().clamp(min=1).long()
        return _first_of_each(groups, stratified(groups, self.seed(TAIL)), counts)

    def labelled(
        self, groups: Tensor, rows: Tensor, budget: int | float | PerClass | None
    ) -> tuple[Tensor, Tensor]:
        """Divide rows into those with a label and the others, in the order in which they would get
        one.

        Args:
            groups: Classes int64 (N,), of all images.
            rows: int64 (n,), which of them count.
            budget: Labels, a share of them, or so many a class; None: all.

        Returns:
            Rows with a label, sorted, and those without.

        Raises:
            BadInput: For a budget beyond the images.
        """
        order = rows[stratified(groups[rows], self.seed(LABELS))]
        if budget is None:
            return rows, rows[:0]
        if isinstance(budget, PerClass):
            counts = torch.bincount(groups[rows])
            if (least := int(counts.min())) < budget.per_class:
                raise BadInput(
                    f"data: labels asks for {budget.per_class} a class, and class "
                    f"{int(counts.argmin())} has {least} images"
                )
            chosen = _first_of_each(groups, order, torch.full_like(counts, budget.per_class))
        else:
            count = budget if isinstance(budget, int) else max(1, round(budget * len(rows)))
            if count > len(rows):
                raise BadInput(
                    f"data: labels asks for {count}, but there are {len(rows)} training images "
                    f"beside the test's: ask for {len(rows)} or fewer"
                )
            chosen = order[:count].sort().values
        return chosen, order[~torch.isin(order, chosen)]

    def noisy(self, images: ImageSet, classes: int, noise: NoiseSpec) -> Tensor:
        """Return the labels of images, the share `noise.rate` of which is wrong.

        Args:
            images: With classes as labels, int64 (N,).
            classes: How many there are.
            noise: "symmetric": any other class, each as likely. "pairs": the next class.
                "asymmetric": the next class, for every second class alone; the others are right,
                and the rate is that of those mistaken.
        """
        labels = images.targets
        if images.split.kind != "class":
            raise BadInput("data: noise mistakes one class for another, and these labels are none")
        mistaken = labels >= 0
        if noise.kind == "asymmetric":
            mistaken &= labels % 2 == 0
        at = mistaken.nonzero().squeeze(1)
        order = at[stratified(labels[at], self.seed(NOISE))]
        wrong = order[: round(noise.rate * len(order))]
        step = torch.ones(len(images), dtype=torch.int64)
        if noise.kind == "symmetric":
            draws = mix(images.ids.numpy(), self.seed(WRONG)) % np.uint64(classes - 1)
            step = 1 + torch.from_numpy(draws.astype(np.int64))
        out = labels.clone()
        out[wrong] = (labels[wrong] + step[wrong]) % classes
        return out

    def candidates(self, images: ImageSet, classes: int, rate: float) -> Tensor:
        """Return even probabilities of each image's candidates, float32 (N, classes): its class,
        and each other one with probability `rate`.

        Args:
            images: With classes as labels, int64 (N,).
            classes: How many there are.
            rate: Of classes that are wrong.

        Raises:
            BadInput: Where a label is no class, or not known.
        """
        labels = images.classes("data: noise of candidates")
        ids = images.ids.numpy()[:, None] * classes + np.arange(classes)
        drawn = mix(ids.reshape(-1), self.seed(CANDIDATES)).reshape(ids.shape)
        candidates = torch.from_numpy(drawn >> np.uint64(11)).double() * 2.0**-53 < rate
        candidates[torch.arange(len(labels)), labels] = True
        return candidates.float() / candidates.sum(1, keepdim=True)

    def dealt(self, images: ImageSet, domains: Sequence[str]) -> ImageSet:
        """Return images dealt out evenly to named changes: each is shown in one of them."""
        changes = [change for name in domains if (change := parse(name)) is not None]
        if len(changes) < 2:
            return in_domain(images, changes[0]) if changes else images
        order = stratified(images.split.groups, self.seed(DOMAINS))
        parts = [order[i :: len(changes)].sort().values for i in range(len(changes))]
        if isinstance(images, bags.Bags):
            return images.in_domains(parts, changes)
        shown = zip(parts, changes, strict=True)
        return Concat([Changed(images.take(part), change) for part, change in shown])


def _first_of_each(groups: Tensor, order: Tensor, counts: Tensor) -> Tensor:
    """Return, of rows in an order, the first `counts` of each class, sorted."""
    ordered = groups[order]
    chosen: list[Any] = [order[ordered == c][:n] for c, n in enumerate(counts.tolist())]
    return torch.cat([order[ordered == UNKNOWN][:0], *chosen]).sort().values


def in_domain(images: ImageSet, change: Change) -> ImageSet:
    """Return images as a change shows them; of bags, those in them."""
    if isinstance(images, bags.Bags):
        return images.in_domains([torch.arange(len(images))], [change])
    return Changed(images, change)
