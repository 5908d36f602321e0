"""Replay on two real processes over gloo: each keeps a share of the buffer, no image twice, and
goes on from what it saved."""

from __future__ import annotations

from pathlib import Path

import forked
import pytest
import torch

SCRIPT = """
import sys
import torch, torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
import greenvis as gv

out, policy = sys.argv[1], sys.argv[2]
accelerator = Accelerator(cpu=True)
set_seed(0)
model = nn.Sequential(nn.Flatten(), nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))
live = gv.wrap(model, gv.Replay(size=21, policy=policy, batch_size=6, exact=True, input_shape=(1, 2, 2)))
prepared, optimizer = accelerator.prepare(model, torch.optim.SGD(live.param_groups(0.05)))
after = []
for task in range(2):
    x = torch.arange(40.0).view(40, 1, 1, 1).expand(40, 1, 2, 2) / 100 + task
    y = torch.arange(40) % 2 + 2 * task
    loader = accelerator.prepare(DataLoader(TensorDataset(x, y), batch_size=4, shuffle=True))
    for given in loader:
        bx, by = live.batch(*given)
        logits = prepared(bx)
        loss = live.criterion(F.cross_entropy)(logits, by) + live.loss(bx, by, logits)
        accelerator.backward(loss)
        optimizer.step(); live.step_end(); optimizer.zero_grad()
    live.end_experience(loader)
    buffer = live.installed[0].buffer
    after.append(buffer.take(range(len(buffer)))[0][:, 0, 0, 0].clone())
torch.save({"kept": after, "size": buffer.size, "drawn": buffer.draw(5),
            "weights": [p.detach().clone() for p in model.parameters()]}, f"{out}/{accelerator.process_index}.pt")
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["reservoir", "balanced", "herding"])
def test_each_process_keeps_its_share_and_no_image_is_kept_twice(
    policy: str, tmp_path: Path
) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    forked.ranks(str(tmp_path / "script.py"), str(tmp_path), policy, cwd=tmp_path)
    one, other = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert (one["size"], other["size"]) == (11, 10)
    for task, (a, b) in enumerate(zip(one["kept"], other["kept"], strict=True)):
        together = torch.cat([a, b]).tolist()
        assert len(set(together)) == len(together)
        assert len(a) >= 8
        assert len(b) >= 8
        assert max(together) < task + 1  # nothing of a task to come
    assert (
        len(set(torch.cat([one["kept"][1], other["kept"][1]]).floor().tolist())) == 2
    )  # both tasks are there
    assert one["drawn"] != other["drawn"]  # each draws for itself
    assert all(torch.equal(a, b) for a, b in zip(one["weights"], other["weights"], strict=True))
