"""Progressive columns: what a column computes, that earlier ones stay bit for bit, and going on in
the middle of a stream."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hosts import HOSTS
from torch import Tensor, nn

import greenvis as gv
from greenvis.core.technique import Experience

TASKS = [Experience(t, (t,), tuple(range(t + 1)), 3, True) for t in range(3)]


def _live(name: str = "timm-vit") -> Any:
    model = HOSTS[name].build()
    torch.manual_seed(3)
    return gv.wrap(model, gv.Pnn(width=4))


def _train(live: Any, seed: int, steps: int = 3, size: int = 32) -> None:
    optimizer = torch.optim.SGD(live.param_groups(0.1))
    live.model.train()
    for step in range(steps):
        torch.manual_seed(100 * seed + step)
        x, y = live.batch(torch.rand(4, 3, size, size), torch.randint(5, (4,)))
        logits = live.model(x)
        (F.cross_entropy(logits, y) + live.loss(x, y, logits)).backward()
        optimizer.step()
        live.step_end()
        optimizer.zero_grad()


def _stream(live: Any, tasks: range, size: int = 32) -> list[Tensor]:
    """Train on tasks; return what the model says on some images when each has ended."""
    said = []
    for t in range(tasks.stop):
        live.begin_experience(TASKS[t])
        if t in tasks:
            _train(live, t, size=size)
            live.end_experience([])
            said.append(_answers(live.model, size))
    return said


def _answers(model: nn.Module, size: int = 32) -> Tensor:
    model.eval()
    with torch.no_grad():
        return model(
            torch.rand(3, 3, size, size, generator=torch.Generator().manual_seed(9))
        ).clone()


class _Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 6)) for _ in range(2)
        )
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


def test_a_column_adds_what_adapters_make_of_the_one_before() -> None:
    """Equation 2, written out for two columns."""
    net = _Net()
    live = gv.wrap(net, gv.Pnn(width=4, input_shape=(1, 2, 3)))
    installed: Any = live.installed[0]
    live.begin_experience(TASKS[0])
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    live.end_experience([])
    old = {n: v.clone() for n, v in installed.columns[0].items()}
    live.begin_experience(TASKS[1])
    fresh = _Net()
    x = torch.rand(4, 1, 2, 3)
    with torch.no_grad():
        assert torch.equal(net(x), fresh(x))  # a new column is the given model at first
        nets = [lateral.adapters[1][0] for lateral in installed.laterals]
        for adapter in nets:
            adapter.up.weight.normal_()

        def block(values: Any, i: int, h: Tensor) -> Tensor:
            hidden = F.linear(
                h, values[f"blocks.{i}.0.weight"], values[f"blocks.{i}.0.bias"]
            ).relu()
            return F.linear(hidden, values[f"blocks.{i}.2.weight"], values[f"blocks.{i}.2.bias"])

        first = second = x.flatten(1)
        now = dict(fresh.named_parameters())
        for i in range(2):
            entering = second + nets[i].up(nets[i].down(first).relu())
            second = second + block(now, i, entering)
            first = first + block(old, i, first)
        assert torch.allclose(net(x), fresh.head(second), atol=1e-5)


@pytest.mark.parametrize(
    ("name", "size"), [("timm-vit", 32), ("timm-resnet", 64), ("transformers-swin", 32)]
)
def test_a_task_that_is_told_is_not_forgotten_by_a_bit(name: str, size: int) -> None:
    live = _live(name)
    model = live.model
    plain = model.forward

    def logits(*args: Any, **kwargs: Any) -> Any:
        given = plain(*args, **kwargs)
        return getattr(given, "logits", given)

    model.forward = logits
    said = _stream(live, range(3), size)
    latest = _answers(model, size)
    assert torch.equal(latest, said[2])
    for t in range(3):
        live.eval_experience(TASKS[t])
        assert torch.equal(_answers(model, size), said[t])
        live.eval_experience(None)
        assert torch.equal(_answers(model, size), latest)
    assert not torch.allclose(said[0], said[1])
    assert live.facts()["pnn_columns"] == 3


def test_only_the_current_column_learns() -> None:
    live = _live()
    _stream(live, range(2))
    live.begin_experience(TASKS[2])
    names = set(live.trainable)
    assert {n for n in names if ".pnn" in n} == {
        n for n, _ in live.model.named_parameters() if ".pnn2." in n
    }
    before = [{n: v.clone() for n, v in c.items()} for c in live.installed[0].columns]
    earlier = {n: p.detach().clone() for n, p in live.model.named_parameters() if ".pnn1." in n}
    _train(live, 2)
    assert all(
        torch.equal(v, live.installed[0].columns[i][n])
        for i, c in enumerate(before)
        for n, v in c.items()
    )
    assert earlier
    assert all(torch.equal(v, live.model.get_parameter(n)) for n, v in earlier.items())


def test_resumes_in_the_middle_of_a_stream(tmp_path: Path) -> None:
    uninterrupted, first, second = (_live() for _ in range(3))
    torch.manual_seed(4)
    _stream(uninterrupted, range(3))
    torch.manual_seed(4)
    _stream(first, range(2))
    first.save(tmp_path)
    for task in TASKS[:2]:
        second.begin_experience(task)
    second.load(tmp_path)
    torch.manual_seed(100 + 2)  # as after the last step of the second task
    torch.rand(4, 3, 32, 32)
    torch.randint(5, (4,))
    _stream_from(second, 2)
    assert all(
        torch.equal(a, b)
        for a, b in zip(second.model.parameters(), uninterrupted.model.parameters(), strict=True)
    )


def _stream_from(live: Any, task: int) -> None:
    live.begin_experience(TASKS[task])
    _train(live, task)
    live.end_experience([])


def test_undo_leaves_no_adapter_and_a_model_without_blocks_is_refused() -> None:
    live = _live()
    expected = HOSTS["timm-vit"].build().state_dict()
    _stream(live, range(2))
    model = live.undo()
    assert list(model.state_dict()) == list(expected)
    assert all(torch.equal(t, expected[n]) for n, t in model.state_dict().items())
    with pytest.raises(gv.BadInput, match="packnet takes any layer"):
        gv.wrap(HOSTS["plain"].build(), gv.Pnn())
