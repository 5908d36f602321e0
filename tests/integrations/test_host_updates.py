"""Updates inside host trainers are those of one big batch: accumulated or not, one process or two,
replay or none."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import forked
import pytest
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parents[1]))
import host_updates as hosts


def _check(kind: str, left: list[dict[str, Any]]) -> None:
    """Step by step, one batch of all that all processes were shown must leave the same weights."""
    net = hosts.Net()
    shown = [one for process in left for one in process["shown"]]
    steps = 1 + max(step for step, _, _ in shown)
    assert steps > 1 or len(shown) > 1
    smoothing = 0.1 if "smoothing" in kind else 0.0
    optimizer = torch.optim.SGD(net.parameters(), lr=hosts.LR)
    for step in range(steps):
        x, y = (torch.cat([part[i] for part in shown if part[0] == step]) for i in (1, 2))
        optimizer.zero_grad()
        F.cross_entropy(net(x)["logits"], y, label_smoothing=smoothing).backward()
        optimizer.step()
    if kind not in ("plain", "smoothing"):
        assert sum(len(y) for _, _, y in shown) > hosts.IMAGES  # something was added
    for process in left:
        for name, value in net.state_dict().items():
            assert torch.allclose(process["state"][name], value, atol=1e-5, rtol=0), (
                name,
                process["state"][name] - value,
            )


@pytest.mark.one_in(5)
@pytest.mark.parametrize("accumulate", hosts.ACCUMULATE)
@pytest.mark.parametrize("kind", hosts.KINDS)
@pytest.mark.parametrize("host", hosts.HOSTS)
def test_of_one_process(host: str, kind: str, accumulate: int, tmp_path: Path) -> None:
    _check(kind, [hosts.train(host, kind, accumulate, tmp_path)])


@pytest.mark.slow
@pytest.mark.parametrize(
    "host", [*hosts.HOSTS[:1], *(pytest.param(h, marks=pytest.mark.slow) for h in hosts.HOSTS[1:])]
)
def test_of_two_processes(host: str, tmp_path: Path) -> None:
    forked.ranks(hosts.__file__, str(tmp_path), host, cwd=tmp_path)
    for kind in hosts.KINDS:
        for accumulate in hosts.ACCUMULATE:
            both = [
                torch.load(tmp_path / f"{host}-{kind}-{accumulate}-{rank}.pt", weights_only=True)
                for rank in (0, 1)
            ]
            _check(kind, both)


def test_a_loss_in_evaluation_is_the_batchs_part_of_all_processes_mean(tmp_path: Path) -> None:
    """Trainer multiplies it by the number of processes and takes the mean over them."""
    live = hosts.wrapped("plain")
    green = hosts.GreenCallback(live, "h", dir=tmp_path)
    live.model.eval()
    with torch.no_grad():
        logits = live.model(hosts.X)["logits"]
    whole = F.cross_entropy(logits, hosts.Y)
    count = torch.tensor(hosts.IMAGES)
    torch.testing.assert_close(green.loss({"logits": logits}, hosts.Y, count), whole)
    first, second = (
        green.loss({"logits": logits[part]}, hosts.Y[part], count)
        for part in (slice(0, 8), slice(8, None))
    )
    torch.testing.assert_close(first + second, whole)
