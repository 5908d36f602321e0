"""Several tasks on one base: saved, listed, switched bit for bit without reloading, removed; a
wrong base is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hosts import HOSTS
from torch import Tensor

from greenvis.core.deltas import DELTA_FILE
from greenvis.core.technique import Technique, logits_of
from greenvis.core.wrap import Wrapped, wrap
from greenvis.errors import BadInput
from greenvis.techniques.iteration.peft.adapter import Adapter
from greenvis.techniques.iteration.peft.bitfit import Bitfit
from greenvis.techniques.iteration.peft.lora import Lora
from greenvis.techniques.iteration.peft.norm_tune import NormTune
from greenvis.techniques.iteration.peft.prompt import Prompt
from greenvis.techniques.iteration.peft.side import Side

TASKS = ("cats", "dogs", "fish")
REQUESTS: list[tuple[str, Technique | tuple[()]]] = [
    ("timm-vit", Lora(rank=2)),
    ("timm-vit", Lora(rank=2, init="pissa")),
    ("timm-vit", Lora(rank=2, variant="adalora", start_rank=4, total_steps=2)),
    ("timm-vit", Adapter(width=4)),
    ("timm-vit", Prompt(tokens=2)),
    ("timm-vit", Side(reduction=4)),
    ("timm-vit", Bitfit()),
    ("timm-resnet", NormTune()),
    ("timm-resnet", ()),  # all weights, and the statistics of the batch norms
]


def _task(live: Wrapped, host: str, seed: int) -> Tensor:
    """Learn a task of its own, and return what the model then answers."""
    torch.manual_seed(seed)
    x, y = HOSTS[host].batch()
    x, y = x.roll(seed, -1), y.roll(seed)
    live.model.train()
    optimizer = torch.optim.SGD(live.param_groups(0.1))
    for _ in range(2):
        logits = logits_of(live.model(x))
        (F.cross_entropy(logits, y) + live.loss(x, y, logits)).backward()
        optimizer.step()
        live.step_end()
        optimizer.zero_grad()
    return _answers(live, host)


def _answers(live: Wrapped, host: str) -> Tensor:
    live.model.eval()
    with torch.no_grad():
        return logits_of(live.model(HOSTS[host].batch()[0])).clone()


@pytest.mark.one_in(4)
@pytest.mark.parametrize(("host", "request_"), REQUESTS, ids=lambda v: str(v)[:40])
def test_three_tasks_on_one_base(host: str, request_: Any, tmp_path: Path) -> None:
    answers: dict[str, Tensor] = {}
    for seed, task in enumerate(TASKS):
        torch.manual_seed(9)
        live = wrap(HOSTS[host].build(), request_)
        answers[task] = _task(live, host, seed)
        live.save(tmp_path / task)
    torch.manual_seed(9)
    live = wrap(HOSTS[host].build(), request_)
    fresh = _answers(live, host)
    parameters = dict(live.model.named_parameters())
    for task in TASKS:
        live.add(task, tmp_path / task)
    assert torch.equal(_answers(live, host), fresh)  # adding shows nothing yet
    assert live.deltas() == {
        t: pytest.approx((tmp_path / t / DELTA_FILE).stat().st_size, rel=0.5, abs=20_000)
        for t in TASKS
    }
    for task in ("fish", "cats", "dogs", "cats"):
        live.use(task)
        assert live.in_use == task
        assert torch.equal(_answers(live, host), answers[task])
    live.use(None)
    assert torch.equal(_answers(live, host), fresh)
    assert all(p is parameters[n] for n, p in live.model.named_parameters())
    live.remove("cats")
    assert list(live.deltas()) == ["dogs", "fish"]
    live.use("dogs")
    live.undo()
    before = HOSTS[host].build().state_dict()
    assert all(torch.equal(t, before[n]) for n, t in live.model.state_dict().items())


def test_what_is_learned_stays_with_the_delta_in_use() -> None:
    live = wrap(HOSTS["timm-vit"].build(), Lora(rank=2))
    live.add("a")
    live.add("b")
    live.use("a")
    learned = _task(live, "timm-vit", 1)
    live.use("b")
    assert not torch.equal(_answers(live, "timm-vit"), learned)
    live.use("a")
    assert torch.equal(_answers(live, "timm-vit"), learned)


def test_another_base_is_refused_with_nothing_changed(tmp_path: Path) -> None:
    live = wrap(
        HOSTS["timm-resnet"].build(), Lora(rank=2, targets=("conv",), input_shape=(3, 64, 64))
    )
    _task(live, "timm-resnet", 0)
    live.save(tmp_path)
    other = HOSTS["timm-resnet"].build()
    with torch.no_grad():
        other.conv1.weight[0, 0, 0, 0] += 1e-3
    wrapped = wrap(other, Lora(rank=2, targets=("conv",), input_shape=(3, 64, 64)))
    before = _answers(wrapped, "timm-resnet")
    for take in (wrapped.load, lambda folder: wrapped.add("a", folder)):
        with pytest.raises(BadInput, match="belongs to another base"):
            take(tmp_path)
    assert wrapped.deltas() == {}
    assert torch.equal(_answers(wrapped, "timm-resnet"), before)


def test_says_what_is_wrong(tmp_path: Path) -> None:
    live = wrap(HOSTS["timm-vit"].build(), Lora(rank=2))
    live.add("task-a")
    for call, says in (
        (lambda: live.use("task-b"), "no delta 'task-b'.*did you mean 'task-a'"),
        (lambda: live.add("task-a"), "there is a delta 'task-a' already"),
        (lambda: live.remove("tusk-a"), "to remove.*did you mean 'task-a'"),
        (lambda: live.add("b", tmp_path), "cannot load a delta"),
    ):
        with pytest.raises(BadInput, match=says):
            call()
    live.use("task-a")
    with pytest.raises(BadInput, match="is in use"):
        live.remove("task-a")
