"""Losses of several means (ER-ACE, DER, DER++) over uneven processes and micro-batches: those of
one big batch, or refused."""

from __future__ import annotations

from pathlib import Path

import forked
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import greenvis as gv
from greenvis.errors import BadInput

SCRIPT = """
import sys
import torch, torch.distributed as dist, torch.nn.functional as F
from torch import nn
import greenvis as gv
from greenvis.techniques.iteration.continual._parts import er_ace_loss

torch.set_default_dtype(torch.float64)
dist.init_process_group("gloo")
rank = dist.get_rank()

def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5))

for method in ("er_ace", "der", "derpp"):
    model = net()
    live = gv.wrap(model, gv.Replay(size=14, method=method, batch_size=3 + 2 * rank, exact=True))
    torch.manual_seed(10 + rank)
    (replay,) = live.installed
    kept = {"x": torch.randn(7, 4), "y": torch.arange(7) % 2}
    replay.buffer.offer(**kept, **({"logits": torch.randn(7, 5)} if method != "er_ace" else {}))
    fresh = (4, 1)[rank]
    x, y = live.batch(torch.randn(fresh, 4), torch.full((fresh,), 3 + rank))
    out = model(x)
    loss = live.criterion(F.cross_entropy)(out, y) + live.loss(x, y, out)
    number = torch.tensor([len(y)])
    dist.all_reduce(number)
    (loss * len(y) / number).backward()  # weighed by samples, as trainers do
    gradients = [p.grad for p in model.parameters()]
    for g in gradients:
        dist.all_reduce(g)
    both = [None, None]
    dist.all_gather_object(both, (x, y, replay.parts.sizes, replay._stored_logits))
    torch.save({"gradients": gradients, "both": both, "state": model.state_dict()}, f"{sys.argv[1]}/{method}.pt")
dist.barrier()
dist.destroy_process_group()
"""


def _net(width: int = 4) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(width, 5))


def _one_big_batch(model: nn.Module, method: str, both: list[tuple]) -> torch.Tensor:
    """Write the methods' losses down as the papers have them, over all processes' new images, then
    all their draws."""
    columns = [(x.split(parts), y.split(parts)) for x, y, parts, _ in both]
    new, *draws = (
        tuple(torch.cat([side[i][k] for side in columns]) for i in (0, 1))
        for k in range(3 if method == "derpp" else 2)
    )
    if method == "er_ace":
        away = ~torch.isin(torch.arange(5), new[1])
        logits = model(new[0]).masked_fill(away, -1e300)
        return F.cross_entropy(logits, new[1]) + F.cross_entropy(model(draws[0][0]), draws[0][1])
    expected = torch.cat([w for *_, w in both])
    loss = F.cross_entropy(model(new[0]), new[1]) + 0.5 * F.mse_loss(model(draws[0][0]), expected)
    return loss + (
        0.5 * F.cross_entropy(model(draws[1][0]), draws[1][1]) if method == "derpp" else 0
    )


def test_uneven_processes_learn_as_one_big_batch(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    forked.ranks(str(tmp_path / "script.py"), str(tmp_path), cwd=tmp_path)
    for method in ("er_ace", "der", "derpp"):
        left = torch.load(tmp_path / f"{method}.pt", weights_only=True)
        assert [parts[:2] for _, _, parts, _ in left["both"]] == [[4, 3], [1, 5]]
        model = _net().double()
        model.load_state_dict(left["state"])
        _one_big_batch(model, method, left["both"]).backward()
        for parameter, gradient in zip(model.parameters(), left["gradients"], strict=True):
            assert torch.allclose(parameter.grad, gradient, rtol=0, atol=1e-12), method


def _started(method: str, **more: object) -> gv.Wrapped:
    live = gv.wrap(_net(), gv.Replay(size=8, method=method, exact=True, **more))
    x, y = torch.randn(6, 4), torch.arange(6) % 2
    x, y = live.batch(x, y)
    out = live.model(x)
    live.loss(x, y, out)
    live.step_end()
    return live


@pytest.mark.parametrize("method", ["der", "derpp"])
def test_micro_batches_of_one_shape_learn_as_one_big_batch(method: str) -> None:
    live = _started(method)
    (replay,) = live.installed
    both, total = [], 0
    for size in (4, 2):
        x, y = live.batch(torch.randn(size, 4), torch.full((size,), 4))
        out = live.model(x)
        (len(y) * (live.criterion(F.cross_entropy)(out, y) + live.loss(x, y, out))).backward()
        both.append((x, y, replay.parts.sizes, replay._stored_logits))
        total += len(y)
    model = _net()
    _one_big_batch(model, method, both).backward()
    for parameter, mine in zip(model.parameters(), live.model.parameters(), strict=True):
        assert torch.allclose(parameter.grad, mine.grad / total, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("method", "more"), [("er_ace", {}), ("der", {"batch_size": 2}), ("derpp", {"every": 2})]
)
def test_micro_batches_that_are_no_big_batch_are_refused(method: str, more: dict) -> None:
    live = _started(method, **more)
    live.batch(torch.randn(4, 4), torch.ones(4).long())
    with pytest.raises(
        BadInput, match=f"replay with {method} cannot accumulate gradients here.*live.step_end"
    ):
        live.batch(torch.randn(3, 4), torch.ones(3).long())
    live.batch(torch.randn(4, 4), torch.ones(4).long())  # a step of one batch goes on
