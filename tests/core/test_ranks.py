"""What processes agree on, as one of them and on real shards; for launches see test_two_ranks.py,
test_recipe_ranks.py."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.utils.data import DataLoader, TensorDataset
from transformers import TrainingArguments

import greenvis as gv
from greenvis.core import distributed as ranks
from greenvis.errors import BadInput
from greenvis.integrations.lightning import GreenCallback as InLightning
from greenvis.integrations.transformers import GreenCallback as InTransformers
from greenvis.planning.advise import advise


def _net() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))


class _Module(pl.LightningModule):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        return self.net(batch[0]).sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.fixture
def group(tmp_path: Path) -> Iterator[None]:
    """A process group of this process alone: what shards a model wants one."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'meet'}", rank=0, world_size=1)
    yield
    ranks.destroy_process_group()


def test_one_process_takes_every_batch_whole_and_hears_its_own_errors() -> None:
    loader = DataLoader(TensorDataset(torch.arange(5)), batch_size=2)
    assert ranks.split_batches(loader) is loader
    assert (ranks.rank(), ranks.launched_world_size()) == (0, 1)
    assert ranks.main_first(lambda: 7) == 7
    with pytest.raises(BadInput) as caught:
        ranks.main_first(lambda: gv.Lora(rank=0))
    assert not caught.value.reported
    state = torch.get_rng_state()
    ranks.seed_per_rank()
    ranks.barrier()
    assert torch.equal(torch.get_rng_state(), state)


def test_what_is_for_one_process_is_refused_under_a_launcher(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    ranks.require_single_process("this")
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(
        BadInput,
        match="this runs as one process, and this is one of 3: start it without the launcher",
    ):
        ranks.require_single_process("this")
    with pytest.raises(BadInput, match="greenvis advise runs as one process"):
        advise("plain/mlp", "digits", runs=tmp_path)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["FSDP", "DeepSpeed", "Megatron_LM"])
def test_a_sharding_that_accelerate_is_to_do_is_refused_and_nothing_changes(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = _net()
    monkeypatch.setenv(f"ACCELERATE_USE_{name.upper()}", "true")
    with pytest.raises(
        BadInput, match=f"^{name} cuts a model's parameters up, .* use plain data parallelism"
    ):
        gv.wrap(model, [])
    monkeypatch.setenv(f"ACCELERATE_USE_{name.upper()}", "false")
    assert gv.wrap(model, []).undo() is model


@pytest.mark.usefixtures("group")
def test_a_sharded_model_is_refused() -> None:
    for sharded in (
        fully_shard(_net()),
        FullyShardedDataParallel(_net(), device_id=torch.device("cpu")),
    ):
        with pytest.raises(BadInput, match="cuts a model's parameters up"):
            gv.wrap(sharded, [])


@pytest.mark.usefixtures("group")
def test_a_model_that_is_sharded_after_wrap_is_refused_at_its_first_step_and_by_its_delta() -> None:
    model = _net()
    live = gv.wrap(model, [])
    fully_shard(model)
    with pytest.raises(BadInput, match="FSDP cuts a model's parameters up"):
        live.loss(torch.ones(2, 4), torch.tensor([0, 1]), torch.ones(2, 2))
    with pytest.raises(BadInput, match="FSDP cuts a model's parameters up"):
        live.state_dict()


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("original", [True, False])
def test_a_model_that_the_first_fsdp_was_put_around_is_refused_at_its_first_step(
    original: bool,
) -> None:
    live = gv.wrap(_net(), [])
    FullyShardedDataParallel(live.model, device_id=torch.device("cpu"), use_orig_params=original)
    with pytest.raises(BadInput, match="FSDP cuts a model's parameters up"):
        live.loss(torch.ones(2, 4), torch.tensor([0, 1]), torch.ones(2, 2))
    with pytest.raises(BadInput, match="FSDP cuts a model's parameters up"):
        live.state_dict()


@pytest.mark.usefixtures("group")
def test_trainers_refuse_a_model_that_was_sharded_after_wrap(tmp_path: Path) -> None:
    model = _net()
    live = gv.wrap(model, [])
    fully_shard(model)
    trainer = pl.Trainer(
        max_epochs=1, callbacks=[InLightning(live, "sharded", dir=tmp_path / "runs")],
        accelerator="cpu", logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    with pytest.raises(BadInput, match="FSDP cuts a model's parameters up"):
        trainer.fit(
            _Module(model),
            DataLoader(TensorDataset(torch.ones(4, 4), torch.zeros(4)), batch_size=2),
        )
    given = TrainingArguments(output_dir=str(tmp_path / "out"), report_to="none", use_cpu=True)
    with pytest.raises(BadInput, match="FSDP cuts a model's parameters up"):
        InTransformers(live, "sharded", dir=tmp_path / "runs").on_train_begin(given, None, None)
    assert not (tmp_path / "runs").exists()
