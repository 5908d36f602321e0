"""What draws images for scarce classes: the changes its gradients pass through, its losses, sizes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from greenvis import data
from greenvis.data.splits import Split
from greenvis.data.transforms import Transform
from greenvis.experiment import generators
from greenvis.experiment.recipe import SynthesisSpec
from greenvis.models import gan


def _images() -> data.ImageSet:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(30) % 3
    pixels = torch.randint(0, 60, (30, 1, 5, 5), generator=generator)
    pixels[range(30), 0, labels] += 180  # a bright row, by class
    form = Transform(5, 1, mean=(0.3,), std=(0.2,))
    return data.ImageSet(Split(pixels.to(torch.uint8), labels), torch.arange(30), form)


@pytest.mark.parametrize("by", ["gan", "diffusion"])
def test_a_generator_draws_images_of_the_datas_size_and_range(by: Any) -> None:
    if by == "diffusion":
        pytest.importorskip("diffusers")
    images, labels = _images(), torch.tensor([2, 0, 0, 1])
    meter: Any = SimpleNamespace(steps=lambda loader, **_: loader)
    spec = SynthesisSpec(by=by, epochs=2, batch_size=15, lr=1e-3)
    before = torch.get_rng_state()
    drawn = generators.draw(images, labels, spec, 3, meter)
    assert torch.equal(before, torch.get_rng_state())
    assert drawn.shape == (4, 1, 5, 5)
    pixels = drawn * 0.2 + 0.3
    assert pixels.min() > -1e-3
    assert pixels.max() < 1 + 1e-3
    assert not torch.equal(drawn[1], drawn[2])
    assert torch.equal(drawn, generators.draw(images, labels, spec, 3, meter))


def _changed_by_hand(image: Tensor, light: float, shift: Any, cut: Any) -> Tensor:
    """Return an image (channels, height, width) lightened, shifted and cut, pixel by pixel."""
    _, height, width = image.shape
    out = torch.zeros_like(image)
    for i in range(height):
        for j in range(width):
            a, b = i + shift[0], j + shift[1]
            near = [
                abs(2 * (k - m) + (n % 2 == 0)) <= n * gan.CUT
                for k, m, n in ((i, cut[0], height), (j, cut[1], width))
            ]
            if 0 <= a < height and 0 <= b < width and not all(near):
                out[:, i, j] = image[:, a, b] + light
    return out


def test_changes_are_those_pixel_by_pixel_and_gradients_pass() -> None:
    torch.manual_seed(0)
    images = torch.rand(3, 2, 6, 5, requires_grad=True)
    change = gan.Change(
        torch.tensor([0.1, -0.2, 0.0]), torch.tensor([[1, 0], [0, -1], [0, 0]]),
        torch.tensor([[2, 1], [0, 4], [5, 0]]),
    )  # fmt: skip
    out = gan.changed(images, change)
    for i in range(3):
        by_hand = _changed_by_hand(
            images[i].detach(), float(change.light[i]), change.shift[i].tolist(),
            change.cut[i].tolist(),
        )  # fmt: skip
        assert torch.allclose(out[i], by_hand, atol=1e-6)
        assert 3 * 2 <= (by_hand == 0).sum() < by_hand.numel()
    out.sum().backward()
    assert images.grad is not None
    assert set(images.grad.unique().tolist()) == {0.0, 1.0}
    drawn = gan.change_of(torch.zeros(400, 1, 16, 8))
    assert drawn.shift.abs().amax(0).tolist() == [2, 1]
    assert drawn.light.abs().max() <= gan.LIGHT / 2
    assert drawn.cut.amax(0).tolist() == [15, 7]


def test_the_judge_learns_until_it_is_sure_and_the_generator_follows() -> None:
    loss = gan.judge_loss(torch.tensor([2.0, 0.5]), torch.tensor([-3.0, 0.0]))
    assert loss.item() == pytest.approx(0.25 + 0.5)
    torch.manual_seed(0)
    generator, judge = gan.Generator(3, (1, 5, 5)), gan.Judge(3, 1)
    optimizers = (
        torch.optim.Adam(generator.parameters(), 1e-3),
        torch.optim.Adam(judge.parameters(), 1e-3),
    )
    x, y = torch.rand(6, 1, 5, 5) * 2 - 1, torch.arange(6) % 3
    named = {n: p for m in (generator, judge) for n, p in m.named_parameters()}
    before = {n: p.detach().clone() for n, p in named.items()}
    losses = gan.step(generator, judge, x, y, optimizers)
    assert all(isinstance(v, float) for v in losses)
    still = {n for n, p in named.items() if torch.equal(p, before[n])}
    assert still <= {"last.bias"}  # which moves only once the judge is sure of some image
