"""A few images a class that stand for a whole training set: drawn, chosen by herding, or made by
distribution matching."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from greenvis.core import weights
from greenvis.data.herding import herding
from greenvis.data.image_set import ImageSet
from greenvis.data.splits import Split
from greenvis.errors import BadInput

Method = Literal["random", "herding", "condensed"]
MOMENTUM = 0.5
LEAST_SIDE = 3


def random_convnet(
    in_chans: int, side: int, width: int, generator: torch.Generator
) -> list[Tensor]:
    """Return the filters (out, in, 3, 3) of a random convolutional network, drawn as He et al.
    (2015) do.

    As many as halve images of `side` pixels to a map of 3 × 3 or more (three for 28 or 32): on a
    smaller one, instance norm leaves next to nothing of an image.
    """
    channels = _channels(in_chans, side, width)
    return [
        torch.randn(o, i, 3, 3, generator=generator) * (2 / (9 * i)) ** 0.5
        for i, o in pairwise(channels)
    ]


def _channels(in_chans: int, side: int, width: int) -> list[int]:
    return [in_chans] + [width] * max(1, int(math.log2(side / LEAST_SIDE)))


def convnet(
    num_classes: int = 10, in_chans: int = 1, img_size: int = 28, width: int = 32
) -> nn.Module:
    """Return a network to train of the kind whose random embeddings are matched: condensed images
    suit it best."""
    channels = _channels(in_chans, img_size, width)
    layers: list[nn.Module] = []
    for i, o in pairwise(channels):
        layers += [
            nn.Conv2d(i, o, 3, padding=1),
            nn.InstanceNorm2d(o, affine=True),
            nn.ReLU(),
            nn.AvgPool2d(2),
        ]
    return nn.Sequential(
        *layers, nn.Flatten(), nn.Linear(width * (img_size >> len(channels) - 1) ** 2, num_classes)
    )


def embed(x: Tensor, filters: list[Tensor]) -> Tensor:
    """Return x (batch, channels, height, width) as (batch, features): convolutions, each with
    instance norm, ReLU, pooling."""
    for weight in filters:
        x = F.avg_pool2d(F.relu(F.instance_norm(F.conv2d(x, weight.to(x.device), padding=1))), 2)
    return x.flatten(1)


def matching_loss(real: Tensor, synthetic: Tensor) -> Tensor:
    """Return the squared distance of the classes' mean embeddings, summed over classes (Zhao and
    Bilen, 2023, eq. 5).

    Args:
        real: (classes, n, features).
        synthetic: (classes, m, features).

    Returns:
        A scalar.
    """
    return (real.mean(1) - synthetic.mean(1)).square().sum()


def condense(
    images: Tensor,
    labels: Tensor,
    start: Tensor,
    *,
    iterations: int = 300,
    lr: float = 1.0,
    batch: int = 32,
    width: int = 32,
    flip: bool = True,
    seed: int = 0,
    count: Callable[[int], AbstractContextManager[Any]] = nullcontext,
) -> Tensor:
    """Return synthetic images whose mean embeddings match the classes' own, in new random networks
    each time (distribution matching: Zhao and Bilen, 2023).

    Costs iterations · classes · (batch + 3 · m) forwards of a network of `width` channels.

    Args:
        images: float (N, C, H, W), normalised.
        labels: int64 (N,), 0 … classes - 1.
        start: Real images to start from, (classes, m, C, H, W).
        iterations: Steps.
        lr: Falls to zero, which averages the networks' chance out.
        batch: Real images per class and iteration.
        width: Channels of the networks.
        flip: Whether real and synthetic images are flipped, alike each time, besides being shifted.
        seed: Of networks and draws.
        count: The context of an iteration (`Tracker.flops`).

    Returns:
        (classes, m, C, H, W).
    """
    generator = torch.Generator().manual_seed(seed)
    rows = [(labels == c).nonzero().squeeze(1) for c in range(len(start))]
    made, velocity = start.clone(), torch.zeros_like(start)
    for number in range(iterations):
        with count(number):
            filters = random_convnet(images.shape[1], images.shape[-1], width, generator)
            drawn = torch.stack(
                [r[torch.randint(len(r), (batch,), generator=generator)] for r in rows]
            )
            change = _random_shift(images.shape[-1], flip, generator)
            with torch.no_grad():
                real = embed(change(images[drawn.flatten()]), filters).unflatten(
                    0, (len(start), batch)
                )
            made.requires_grad_(True)
            synthetic = embed(change(made.flatten(0, 1)), filters).unflatten(0, made.shape[:2])
            (grad,) = torch.autograd.grad(matching_loss(real, synthetic), made)
            velocity = MOMENTUM * velocity + grad
            made = made.detach() - lr * (1 - number / iterations) * velocity
    return made


def _random_shift(side: int, flip: bool, generator: torch.Generator) -> Callable[[Tensor], Tensor]:
    """Return one random shift (up to an eighth of the side) and flip, the same for all images it is
    given."""
    pad = max(1, side // 8)
    top, left = torch.randint(2 * pad + 1, (2,), generator=generator).tolist()
    turned = flip and bool(torch.randint(2, (), generator=generator))

    def change(x: Tensor) -> Tensor:
        x = F.pad(x, [pad] * 4, mode="replicate")[..., top : top + side, left : left + side]
        return x.flip(-1) if turned else x

    return change


def check(images: ImageSet, per_class: int) -> None:
    """Raise BadInput where a class has fewer images than asked for, or one is not known."""
    for number, count in enumerate(torch.bincount(images.classes("a subset")).tolist()):
        if count < per_class:
            raise BadInput(
                f"a subset of {per_class} images a class: class {number} has {count}; ask for fewer"
            )


def make(
    images: ImageSet,
    *,
    method: Method,
    per_class: int,
    seed: int = 0,
    file: Path | None = None,
    count: Callable[[int], AbstractContextManager[Any]] = nullcontext,
    **options: Any,
) -> ImageSet:
    """Return a few images per class that stand for a training set, shown as those are.

    Args:
        images: The training set.
        method: "random": drawn. "herding": those whose mean embedding, in a random network, stays
            nearest to the class's. "condensed": made, starting from those drawn (`condense`, which
            takes options), and rounded to 8 bits.
        per_class: Images per class.
        seed: Of draws and networks.
        file: Where the outcome is stored, and read from if it exists.
        count: The context of an iteration (`Tracker.flops`).
        options: Of `condense`.

    Returns:
        The subset.

    Raises:
        BadInput: For a class with fewer images.
    """
    check(images, per_class)
    if file is not None and file.exists():
        state = weights.read_state(file)
    else:
        state = _select(images, method, per_class, seed, count, options)
        if file is not None:
            weights.write(file, state, {"method": method, "per_class": per_class, "seed": seed})
    if "rows" in state:
        return images.take(state["rows"])
    # no other set has these ids
    first = int.from_bytes(hashlib.sha256(state["images"].numpy().tobytes()).digest()[:5], "big")
    return ImageSet(
        Split(state["images"], state["labels"]),
        first + torch.arange(len(state["labels"])),
        images.transform,
    )


def _select(
    images: ImageSet,
    method: Method,
    per_class: int,
    seed: int,
    count: Callable[[int], AbstractContextManager[Any]],
    options: dict[str, Any],
) -> dict[str, Tensor]:
    """Return {"rows"} of `images`, or {"images", "labels"} of new ones."""
    generator = torch.Generator().manual_seed(seed)
    rows = [
        (images.targets == c).nonzero().squeeze(1) for c in range(int(images.targets.max()) + 1)
    ]
    drawn = [r[torch.randperm(len(r), generator=generator)[:per_class]] for r in rows]
    if method == "random":
        return {"rows": torch.cat(drawn)}
    plain = images.plain()
    x = torch.cat([plain.batch(part)[0] for part in torch.arange(len(plain)).split(256)])
    if method == "herding":
        filters = random_convnet(x.shape[1], x.shape[-1], options.get("width", 32), generator)
        with torch.no_grad():
            features = torch.cat([embed(part, filters) for part in x.split(256)])
        return {"rows": torch.cat([r[herding(features[r], per_class)] for r in rows])}
    flip = images.transform.augment not in ("none", "crop")
    start = torch.stack([x[d] for d in drawn])
    made = condense(x, images.targets, start, flip=flip, seed=seed, count=count, **options)
    mean, std = (
        torch.tensor(v).view(-1, 1, 1) for v in (images.transform.mean, images.transform.std)
    )
    pixels = ((made.flatten(0, 1) * std + mean).clamp(0, 1) * 255).round().to(torch.uint8)
    return {"images": pixels, "labels": torch.arange(len(made)).repeat_interleave(per_class)}
