"""Generators trained on a job's images, to draw others for scarce classes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from greenvis import data
from greenvis.experiment.recipe import SynthesisSpec
from greenvis.meters.track import Tracker
from greenvis.models.vae import Vae

ROWS = 256  # images drawn at once
GUIDANCE, STEPS = 1.5, 20  # of the diffusion model
AVERAGE = 0.999  # share of the mean of its weights that a step leaves

Batches = Callable[[], Iterator[tuple[Tensor, Tensor]]]


def draw(
    images: data.ImageSet, labels: Tensor, spec: SynthesisSpec, seed: int, tracker: Tracker
) -> Tensor:
    """Train a generator on all classes, and draw images of `labels`.

    Args:
        images: The training set, of one class per image.
        labels: Classes, int64 (n,).
        spec: Of the arm; `by` says which generator.
        seed: Of all that is drawn at random.
        tracker: Meters it.

    Returns:
        Images as the set has them to train on, float32 (n, C, H, W).
    """
    plain = images.plain()

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        for epoch in range(spec.epochs):
            loader = data.batches(plain, spec.batch_size, epoch=epoch, seed=seed, shuffle=True)
            yield from tracker.steps(loader, phase=None, progress=False)

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        sample = GENERATORS[spec.by](images, batches, spec.lr)
        with torch.no_grad():
            return torch.cat([sample(part) for part in labels.split(ROWS)])


def _classes(images: data.ImageSet) -> int:
    return int(images.targets.max()) + 1


def _learn(model: nn.Module, batches: Batches, lr: float) -> Iterator[None]:
    """Train a model by its own loss; yield after each step."""
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    for x, y in batches():
        loss = model(x, y)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        yield


def _cvae(images: data.ImageSet, batches: Batches, lr: float) -> Callable[[Tensor], Tensor]:
    channels, side, _ = images.shape
    model = Vae(_classes(images), channels, side)
    for _ in _learn(model, batches, lr):
        pass
    return model.eval().sample


def _diffusion(images: data.ImageSet, batches: Batches, lr: float) -> Callable[[Tensor], Tensor]:
    """Return what draws with guidance (Ho et al., 2020; Ho and Salimans, 2022) and DPM-Solver++,
    of the mean of the weights of training."""
    from greenvis import models
    from greenvis.models.diffusion import Diffusion
    from greenvis.models.drawing import Setting

    channels, height, width = images.shape
    even = [side + side % 2 for side in (height, width)]
    model: Any = models.build(
        "diffusers/UNet2DModel", head="images", num_classes=_classes(images), in_chans=channels,
        img_size=even, block_out_channels=[32, 64], layers_per_block=1, norm_num_groups=8,
        down_block_types=["DownBlock2D", "AttnDownBlock2D"],
        up_block_types=["AttnUpBlock2D", "UpBlock2D"],
    )  # fmt: skip
    assert isinstance(model, Diffusion)
    mean = deepcopy(model)

    def padded() -> Iterator[tuple[Tensor, Tensor]]:
        for x, y in batches():
            yield nn.functional.pad(x, (0, width % 2, 0, height % 2), mode="replicate"), y

    for step, _ in enumerate(_learn(model.train(), padded, lr)):
        keep = min(AVERAGE, (1 + step) / (10 + step))
        with torch.no_grad():
            pairs = zip(mean.parameters(), model.parameters(), strict=True)
            for own, new in pairs:
                own.lerp_(new, 1 - keep)
    mean.range.copy_(model.range)
    mean.eval().set(Setting("dpm++", STEPS, GUIDANCE, "trailing"))
    return lambda y: mean.sample(y)[..., :height, :width]


def _gan(images: data.ImageSet, batches: Batches, lr: float) -> Callable[[Tensor], Tensor]:
    """Return what a generator draws that learned against a judge, both shown changed images."""
    from greenvis.models import gan

    classes, (channels, height, width) = _classes(images), images.shape
    generator = gan.Generator(classes, (channels, height, width))
    judge = gan.Judge(classes, channels)
    optimizers = tuple(
        torch.optim.Adam(m.parameters(), lr=lr, betas=(0.0, 0.9)) for m in (generator, judge)
    )
    form = images.transform
    mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (form.mean, form.std))
    for x, y in batches():
        gan.step(generator, judge, gan.in_range(x * std + mean), y, (optimizers[0], optimizers[1]))
    generator.eval()
    return lambda y: (generator(y) / 2 + 0.5 - mean) / std


# by name, what trains on batches and returns what draws images of classes (n,)
GENERATORS: dict[str, Callable[[data.ImageSet, Batches, float], Callable[[Tensor], Tensor]]] = {
    "cvae": _cvae,
    "diffusion": _diffusion,
    "gan": _gan,
}
