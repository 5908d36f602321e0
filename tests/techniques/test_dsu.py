"""Uncertain and mixed styles against their formulas and a reference layer, and what they leave
alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hosts import HOSTS
from own_parts import Own, of_batches, resumed_and_not
from torch import Tensor, nn

import greenvis as gv
from greenvis.errors import BadInput, GreenvisError
from greenvis.experiment import loop
from greenvis.experiment.recipe import TrainSpec
from greenvis.models.structure import view
from greenvis.techniques.data.generalise._style import Site, sites, style
from greenvis.techniques.data.generalise.dsu import Dsu, perturbed, uncertainty
from greenvis.techniques.data.generalise.mixstyle import Mixstyle, across, mixed

FIXTURE = Path(__file__).parents[1] / "fixtures" / "dsu_layer.pt"
X = torch.randn(6, 3, 9, 7, generator=torch.Generator().manual_seed(1))
Y = torch.arange(6) % 3


def _net() -> Any:
    torch.manual_seed(5)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 5, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(5, 3),
    )  # fmt: skip


def test_the_layer_is_that_of_the_reference() -> None:
    case = torch.load(FIXTURE, weights_only=True)
    mean, std = style(case["x"], (2, 3))
    for name, mine in (
        ("channel_mean", mean),
        ("channel_std", std),
        ("sqrtvar_mu", uncertainty(mean).expand_as(mean)),
    ):
        assert torch.allclose(mine.squeeze(), case[name].squeeze(), atol=1e-5), name
    noise = [case[name].reshape(mean.shape) for name in ("noise_mu", "noise_std")]
    assert torch.allclose(perturbed(case["x"], (2, 3), *noise), case["y"], atol=1e-5)
    last = perturbed(case["x"].movedim(1, -1), (1, 2), *(n.movedim(1, -1) for n in noise))
    assert torch.allclose(last.movedim(-1, 1), case["y"], atol=1e-5)


def test_mixing_is_the_papers_by_loops() -> None:
    partner, share = torch.tensor([3, 0, 2, 5, 1, 4]), torch.linspace(0, 1, 6)
    got = mixed(X, (2, 3), partner, share)
    for i, (j, s) in enumerate(zip(partner.tolist(), share.tolist(), strict=True)):
        for c in range(3):
            own, other = X[i, c], X[j, c]
            deviations = [(o.var() + 1e-6).sqrt() for o in (own, other)]
            gamma = s * deviations[0] + (1 - s) * deviations[1]
            beta = s * own.mean() + (1 - s) * other.mean()
            expected = gamma * (own - own.mean()) / deviations[0] + beta
            assert torch.allclose(got[i, c], expected, atol=1e-5)
    assert torch.allclose(mixed(X, (2, 3), torch.arange(6), share), X, atol=1e-5)


def test_no_gradient_flows_through_statistics_that_are_mixed_and_one_does_through_uncertain() -> (
    None
):
    share, partner = torch.full((6,), 0.3), torch.arange(6).roll(1)
    x = X.clone().requires_grad_()
    mixed(x, (2, 3), partner, share)[0].sum().backward()
    assert x.grad is not None
    assert x.grad[1:].abs().max() == 0
    y = X.clone().requires_grad_()
    perturbed(y, (2, 3), torch.ones(6, 3, 1, 1), torch.ones(6, 3, 1, 1))[0].sum().backward()
    assert y.grad is not None
    assert y.grad[1:].abs().max() > 0


def test_partners_are_of_another_domain_where_there_is_one() -> None:
    domains = torch.tensor([0, 1, 1, 2, -1, 0, 1])
    for _ in range(20):
        partner = across(domains)
        assert partner[4] == 4
        rest = torch.tensor([0, 1, 2, 3, 5, 6])
        assert (domains[partner[rest]] != domains[rest]).all()
        assert (domains[partner[rest]] >= 0).all()
    assert across(torch.tensor([2, 2, -1])).tolist() == [0, 1, 2]


@pytest.mark.parametrize("request_", [Dsu(p=1.0), Mixstyle(p=1.0)])
def test_it_acts_in_training_alone_and_draws_from_torch(request_: Any) -> None:
    plain, live = _net(), gv.wrap(_net(), request_)
    assert torch.equal(live.model.eval()(X), plain.eval()(X))
    live.model.train()
    torch.manual_seed(1)
    first = live.model(X)
    assert not torch.allclose(first, plain(X), atol=1e-3)
    assert not torch.allclose(live.model(X), first, atol=1e-3)
    torch.manual_seed(1)
    assert torch.equal(live.model(X), first)
    assert torch.equal(live.undo().train()(X), plain.train()(X))


def test_never_is_never_and_half_the_time_is_half() -> None:
    live, plain = gv.wrap(_net(), Dsu(p=0.0)), _net()
    assert torch.equal(live.model.train()(X), plain.train()(X))
    live = gv.wrap(_net(), Dsu(p=0.5, where=(0,)))
    torch.manual_seed(0)
    acted = [not torch.equal(live.model.train()(X), plain(X)) for _ in range(200)]
    assert 70 < sum(acted) < 130


def test_a_batch_of_one_and_a_map_of_one_position_pass_unchanged() -> None:
    live, plain = gv.wrap(_net(), Dsu(p=1.0)), _net()
    live.model.train()
    assert torch.equal(live.model(X[:1]), plain(X[:1]))
    small = X[..., :5, :5]  # the second convolution's map is of one position
    last = gv.wrap(_net(), Dsu(p=1.0, where=(1,)))
    assert torch.equal(last.model.train()(small), plain(small))
    assert last.model(X).isfinite().all()


def test_class_and_register_tokens_stay_as_they_are() -> None:
    host = HOSTS["timm-dinov2-registers"]
    model = host.build()
    own = sites(model, view(model, host.input_shape, probe=False))
    assert sorted(own) == [0, 1]  # behind the last block the class token alone is read
    assert (own[1].prefix, own[1].channels) == (5, -1)
    tokens = torch.randn(4, 5 + 6, 8)

    def change(x: Tensor, axes: tuple[int, ...]) -> Tensor:
        return x + 1

    after = own[1].apply(change, (tokens, "rest"))
    assert after[1] == "rest"
    assert torch.equal(after[0][:, :5], tokens[:, :5])
    assert torch.allclose(after[0][:, 5:], tokens[:, 5:] + 1)
    behind = Site("", -1, 5, True).apply(change, tokens)
    assert torch.equal(behind[:, 6:], tokens[:, 6:])


@pytest.mark.parametrize(
    ("name", "paths"),
    [
        ("torchvision-resnet", ["conv1", "layer1.0", "layer2.0", "layer3.0", "layer4.0"]),
        ("timm-convnext", ["stem.0", "stages.0.blocks.0", "stages.1.blocks.0",
                           "stages.2.blocks.1", "stages.3.blocks.0"]),
        ("timm-swin", ["patch_embed.proj", "layers.0.blocks.1", "layers.1.blocks.1"]),
    ],
)  # fmt: skip
def test_it_acts_behind_the_first_layer_and_each_stage(name: str, paths: list[str]) -> None:
    host = HOSTS[name]
    model = host.build()
    own = sites(model, view(model, host.input_shape, probe=False))
    assert [site.path for site in own.values()] == paths
    assert own[1].channels == (-1 if "swin" in name else 1)


@pytest.mark.one_in(2)
@pytest.mark.parametrize("request_", [Dsu(), Mixstyle(shuffle="crossdomain", p=1.0)])
def test_a_resumed_recipe_draws_what_an_uninterrupted_one_draws(
    request_: Any, tmp_path: Path
) -> None:
    spec = TrainSpec(epochs=2, checkpoint_every_s=1e-9, batch_size=6, lr=0.1, optimizer="sgd")

    def fit(batches: Any, checkpoint: Path | None = None) -> nn.Module:
        part = of_batches(batches, 3, lambda: [(X, Y)], spec, [request_])
        vars(part)["domains"] = torch.tensor([0, 1, 1, 0, 2, 2])
        with gv.track("style", dir=tmp_path) as run:
            return loop.run(Own(_net, [part], 3, checkpoint), run).live.model

    def epoch(number: int, start: int) -> list[Any]:
        return [(X + number, Y, torch.arange(6))] * (3 - start)

    resumed, uninterrupted = resumed_and_not(fit, epoch, tmp_path / "c.pt")
    for name, value in uninterrupted.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name])


def test_what_cannot_be_right_is_refused() -> None:
    with pytest.raises(BadInput, match=r"no stage 7 .* it has 0, 1 .*`where`"):
        gv.wrap(_net(), Dsu(where=(0, 7)))
    with pytest.raises(BadInput, match="shows none"):
        gv.wrap(nn.Sequential(nn.Flatten(), nn.Linear(27, 3)), Dsu(input_shape=(3, 3, 3)))
    for fields in ({"p": 1.5}, {"where": (-1,)}):
        with pytest.raises(BadInput):
            Dsu(**fields)
    live = gv.wrap(_net(), Mixstyle(p=1.0, shuffle="crossdomain", where=(0,)))
    with pytest.raises(GreenvisError, match=r"live\.set_domains\(domains\)"):
        live.model.train()(X)
    live.set_domains(torch.tensor([0, 0, 1, 1]))  # two rows more are a technique's
    F.cross_entropy(live.model(X), Y).backward()
    torch.manual_seed(0)
    assert torch.allclose(live.model(X)[4:], _net().train()(X)[4:], atol=1e-5)
