"""Latent replay: what joins at a layer, what is frozen and not run below it, and what is
refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hosts import HOSTS
from torch import Tensor, nn

import greenvis as gv
from greenvis.errors import GreenvisError


def _live(name: str = "timm-vit", layer: Any = 2, **more: Any) -> Any:
    torch.manual_seed(5)  # of the buffer
    return gv.wrap(HOSTS[name].build(), gv.Replay(size=8, latent=layer, batch_size=4, **more))


def _step(live: Any, seed: int, optimizer: Any = None) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(seed)
    x, y = live.batch(torch.rand(4, 3, 32, 32), torch.randint(5, (4,)))
    optimizer = optimizer or torch.optim.SGD(live.param_groups(0.05))
    logits = live.model(x)
    (live.criterion(F.cross_entropy)(logits, y) + live.loss(x, y, logits)).backward()
    optimizer.step()
    live.step_end()
    optimizer.zero_grad()
    return x, y, logits.detach()


@pytest.mark.parametrize(
    ("name", "layer", "module"),
    [("timm-vit", 2, "blocks.2"), ("timm-convnext", "stages.2", "stages.2")],
)
def test_replayed_features_join_at_the_layer(name: str, layer: Any, module: str) -> None:
    """The logits of replayed rows are those of the kept images, to within the storage; nothing
    below runs for them."""
    live = _live(name, layer, exact=True)
    entered: list[int] = []
    first = next(m for m in live.model.modules() if isinstance(m, nn.Conv2d))
    first.register_forward_pre_hook(lambda m, args: entered.append(len(args[0])))
    shown, _, _ = _step(live, 0)
    buffer = live.installed[0].buffer
    kept_y = buffer.labels.clone()
    with torch.no_grad():
        live.model.eval()
        expected = live.model(shown)
        live.model.train()
    x, y = live.batch(torch.rand(4, 3, 32, 32), torch.zeros(4, dtype=torch.int64))
    entered.clear()
    logits = live.model(x)
    assert len(x) == 4
    assert (len(y), len(logits)) == (8, 8)
    assert entered == [4]  # images that went through what is frozen
    order = [int((expected - row).abs().amax(1).argmin()) for row in logits[4:].detach()]
    assert sorted(order) == [0, 1, 2, 3]
    assert torch.allclose(logits[4:], expected[order], atol=1e-4)
    assert y[4:].tolist() == kept_y[order].tolist()
    before = {n for n, p in live.model.named_parameters() if not p.requires_grad}
    assert before
    assert not any(n.startswith(module) for n in before)


@pytest.mark.parametrize(
    ("name", "layer"), [("timm-vit", 1), ("timm-swin", -1), ("timm-resnet", 3)]
)
def test_features_are_bytes_by_channel(name: str, layer: int) -> None:
    host = HOSTS[name]
    both: list[Any] = []
    for exact in (False, True):
        live = gv.wrap(host.build(), gv.Replay(size=4, latent=layer, exact=exact))
        x, y = live.batch(*host.batch())
        torch.manual_seed(0)  # of stochastic depth
        live.loss(x, y, live.model(x))
        live.step_end()
        both.append(live.installed[0].buffer)
    small, exact = both
    assert small.columns["x"].dtype == torch.uint8
    assert small.columns["range"].shape == (len(small.columns["x"]), 2, small.columns["x"].shape[1])
    taken, exact_x = small.take(range(4))[0], exact.take(range(4))[0]
    spread = exact_x.flatten(2).amax(2) - exact_x.flatten(2).amin(2)
    assert ((taken - exact_x).flatten(2).abs().amax(2) <= spread / 509 + 1e-6).all()


def test_the_part_below_stays_bit_for_bit() -> None:
    live = _live("timm-resnet", 4)
    below = [n for n, p in live.model.named_parameters() if not p.requires_grad]
    before = {n: t.clone() for n, t in live.model.state_dict().items()}
    optimizer = torch.optim.AdamW(live.param_groups(1e-2))
    for seed in range(3):
        torch.manual_seed(seed)
        x, y = live.batch(torch.rand(4, 3, 64, 64), torch.randint(5, (4,)))
        logits = live.model(x)
        (F.cross_entropy(logits, y) + live.loss(x, y, logits)).backward()
        optimizer.step()
        live.step_end()
        optimizer.zero_grad()
    now = live.model.state_dict()
    assert "conv1.weight" in below
    assert all(torch.equal(now[n], before[n]) for n in below)
    assert torch.equal(now["bn1.running_mean"], before["bn1.running_mean"])
    assert not torch.equal(now["fc.weight"], before["fc.weight"])


@pytest.mark.parametrize("method", ["er_ace", "derpp"])
def test_saved_and_loaded_it_goes_on_exactly(method: Any, tmp_path: Path) -> None:
    uninterrupted = _live(method=method)
    for seed in range(4):
        _step(uninterrupted, seed)
    first = _live(method=method)
    for seed in range(2):
        _step(first, seed)
    first.save(tmp_path)
    second = _live(method=method)
    second.load(tmp_path)
    for seed in range(2, 4):
        _step(second, seed)
    assert all(
        torch.equal(a, b)
        for a, b in zip(second.model.parameters(), uninterrupted.model.parameters(), strict=True)
    )


def test_an_evaluation_is_left_alone_and_undo_is_whole() -> None:
    model = HOSTS["timm-vit"].build()
    flags = [p.requires_grad for p in model.parameters()]
    live = gv.wrap(model, gv.Replay(size=8, latent=1))
    _step(live, 0)
    live.batch(torch.rand(2, 3, 32, 32), torch.zeros(2, dtype=torch.int64))
    with torch.no_grad():
        assert len(model(torch.rand(3, 3, 32, 32))) == 3
    live.undo()
    assert [p.requires_grad for p in model.parameters()] == flags
    assert not any(m._forward_pre_hooks for m in model.modules())


class _Skips(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        a = self.one(x)
        return self.head((a + self.two(a)).mean((2, 3)))


def test_refusals_say_what_to_do() -> None:
    with pytest.raises(gv.BadInput, match="block 9 of 3"):
        _live(layer=9)
    with pytest.raises(gv.BadInput, match=r"no module 'block\.1'"):
        _live(layer="block.1")
    with pytest.raises(gv.BadInput, match="reaches what lies above"):
        gv.wrap(_Skips(), gv.Replay(latent="two", input_shape=(3, 8, 8)))
    with pytest.raises(gv.BadInput, match="nothing below"):
        gv.wrap(_Skips(), gv.Replay(latent="one", input_shape=(3, 8, 8)))
    with pytest.raises(gv.BadInput, match="goes with neither gdumb"):
        gv.Replay(latent=1, method="gdumb")
    live = gv.wrap(HOSTS["timm-vit"].build(), [gv.Replay(size=8, latent=2), gv.Lora(rank=2)])
    with pytest.raises(GreenvisError, match=r"below 'blocks\.2' learns"):
        _step(live, 0)


def test_lwf_compares_the_images_and_not_what_joined_them() -> None:
    """Replayed features have no image that the earlier model could be shown."""
    torch.manual_seed(5)
    live: Any = gv.wrap(
        HOSTS["timm-vit"].build(), [gv.Replay(size=8, latent=2, batch_size=4), gv.Lwf()]
    )
    x, y = torch.rand(4, 3, 32, 32), torch.arange(4) % 5
    live.end_experience([(x, y)])
    _step(live, 0)
    shown, told = live.batch(x, y)
    logits = live.model(shown)
    assert len(logits) == len(told) == 8
    alone = live.terms(shown, told, logits[:4])["lwf"]
    assert live.terms(shown, told, logits)["lwf"] == alone > 0
