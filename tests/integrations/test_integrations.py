"""greenvis in others' trainers: the same counts as in our own loop, no second carbon tracker,
failures told."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset
from transformers import Trainer, TrainingArguments

import greenvis as gv
from greenvis.core.technique import Installed, Stage, Technique
from greenvis.errors import BadInput
from greenvis.integrations import _state
from greenvis.integrations import lightning as on_lightning
from greenvis.integrations import transformers as on_transformers
from greenvis.meters.record import Run, find, read

X = torch.randn(20, 6, generator=torch.Generator().manual_seed(1))
Y = (X.sum(1) > 0).long()


class _Double(Technique):
    """Double every training batch, as replay does, and count the calls of each seam."""

    name: ClassVar[str] = "double"
    stage: ClassVar[Stage] = "objective"

    def install(self, model: nn.Module) -> Installed:
        return _Doubled()


class _Doubled(Installed):
    def __init__(self) -> None:
        super().__init__()
        self.steps = self.epochs = 0
        self.sizes: list[tuple[int, int]] = []

    def batch(self, x: Any, y: Any) -> tuple[Any, Any]:
        return torch.cat([x, x]), torch.cat([y, y])

    def terms(self, x: Any, y: Any, logits: Tensor | None) -> Mapping[str, Tensor]:
        assert logits is not None
        self.sizes.append((len(x), len(logits)))
        return {"double": 0.0 * logits.sum()}

    def step_end(self) -> None:
        self.steps += 1

    def epoch_end(self) -> None:
        self.epochs += 1


class _Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 2)

    def forward(self, pixel_values: Tensor) -> dict[str, Tensor]:
        return {"logits": self.layer(pixel_values)}


class _Rows(Dataset):
    def __len__(self) -> int:
        return 20

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {"pixel_values": X[i], "labels": Y[i]}


def _stack(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {k: torch.stack([r[k] for r in rows]) for k in rows[0]}


def _trainer(
    green: on_transformers.GreenCallback, out: Path, kind: type[Trainer] = Trainer, **more: Any
) -> Trainer:
    settings: dict[str, Any] = {
        "report_to": "none",
        "eval_strategy": "epoch",
        "remove_unused_columns": False,
        "label_names": ["labels"],
        **more,
    }
    arguments = TrainingArguments(
        str(out), num_train_epochs=2, per_device_train_batch_size=5, save_strategy="no",
        use_cpu=True, disable_tqdm=True,
        max_grad_norm=0.0, **settings,
    )  # fmt: skip
    return kind(
        green.live.model, arguments, train_dataset=_Rows(), eval_dataset=_Rows(), callbacks=[green],
        compute_loss_func=green.loss, data_collator=_stack,
    )  # fmt: skip


def _record(folder: Path) -> Run:
    return read(next(iter(find([folder]))))


def test_a_transformers_trainer_is_metered_and_trains_with_the_terms(tmp_path: Path) -> None:
    live = gv.wrap(_Net(), _Double())
    green = on_transformers.GreenCallback(live, "t", dir=tmp_path)
    _trainer(green, tmp_path / "out", on_transformers.GreenTrainer).train()
    installed = live.installed[0]
    assert isinstance(installed, _Doubled)
    assert (installed.steps, installed.epochs) == (8, 2)
    assert installed.sizes == [(10, 10)] * 8
    run = _record(tmp_path)
    assert run.status == "done"
    assert run.sum("steps", "train") == 8
    assert run.sum("samples", "train") == 80
    # forward and the weight's gradient, of each of the doubled rows; evaluation is not a step
    assert run.sum("flops", "train") == 80 * 2 * (2 * 6 * 2)
    assert [log["epoch"] for log in run.logs if "runtime" in log] == [1.0, 2.0]
    assert run.sum("wall_s", "train/eval") > 0
    assert not live.model._forward_pre_hooks


def test_what_a_transformers_trainer_must_not_do_is_refused(tmp_path: Path) -> None:
    green = on_transformers.GreenCallback(gv.wrap(_Net(), _Double()), "t", dir=tmp_path)
    with pytest.raises(BadInput, match="codecarbon"):
        green.on_train_begin(TrainingArguments(str(tmp_path), report_to=["codecarbon"]), None, None)
    assert not list(find([tmp_path]))
    with pytest.raises(BadInput, match="GreenTrainer"):
        _trainer(green, tmp_path / "out").train()


def test_a_transformers_trainer_learns_by_the_loss_of_the_task_and_records_its_metric(
    tmp_path: Path,
) -> None:
    live = gv.wrap(_Net(), task="multilabel")
    green = on_transformers.GreenCallback(live, "t", dir=tmp_path)
    rows = torch.nn.functional.one_hot(Y, 2).float()
    logits = live.model(X)["logits"]
    live.model.eval()
    loss = green.loss({"logits": logits}, rows)
    torch.testing.assert_close(loss, F.binary_cross_entropy_with_logits(logits, rows))
    green.on_train_begin(TrainingArguments(str(tmp_path), report_to=[]), None, None)
    state = type("State", (), {"epoch": 1.0, "global_step": 4})
    green.on_evaluate(
        TrainingArguments(str(tmp_path)), state, None, metrics={"eval_map": 0.4, "eval_accuracy": 1}
    )
    green.on_train_end(TrainingArguments(str(tmp_path)), state, None)
    facts = _record(tmp_path).facts
    assert facts["map"] == 0.4
    assert "accuracy" not in facts
    assert facts["task"]["metrics"][0]["name"] == "map"


@pytest.mark.parametrize("task", ["detection", "generation", "bags", "image_text"])
def test_a_transformers_trainer_refuses_tasks_that_are_no_mean_over_images(
    task: str, tmp_path: Path
) -> None:
    with pytest.raises(BadInput, match=f"'{task}' is learned otherwise"):
        on_transformers.GreenCallback(gv.wrap(_Net(), task=task), "t", dir=tmp_path)


class _Module(pl.LightningModule):
    def __init__(self, live: Any, fails: bool = False) -> None:
        super().__init__()
        self.live, self.net, self.fails = live, live.model, fails

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        if self.fails:
            raise ValueError("a bad batch")
        x, y = self.live.batch(*batch)
        logits = self.net(x)["logits"]
        return F.cross_entropy(logits, y) + self.live.loss(x, y, logits)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.log(
            "val_accuracy", (self.net(batch[0])["logits"].argmax(-1) == batch[1]).float().mean()
        )

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.live.param_groups(0.1), lr=0.1)


def _fit(
    green: on_lightning.GreenCallback, out: Path, fails: bool = False, **more: Any
) -> pl.Trainer:
    loader = DataLoader(TensorDataset(X, Y), batch_size=5)
    trainer = pl.Trainer(
        max_epochs=2, callbacks=[green], accelerator="cpu", default_root_dir=str(out), logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, **more,
    )  # fmt: skip
    trainer.fit(_Module(green.live, fails), loader, loader)
    return trainer


def test_a_lightning_run_is_metered_by_epoch(tmp_path: Path) -> None:
    live = gv.wrap(_Net(), _Double())
    trainer = _fit(
        on_lightning.GreenCallback(live, "l", dir=tmp_path), tmp_path, accumulate_grad_batches=2
    )
    installed = live.installed[0]
    assert isinstance(installed, _Doubled)
    assert (installed.steps, installed.epochs) == (4, 2)
    run = _record(tmp_path)
    assert run.status == "done"
    assert [run.sum("steps", f"train/epoch{e}") for e in (1, 2)] == [4, 4]
    assert run.sum("flops", "train") == 80 * 2 * (2 * 6 * 2)
    assert run.facts["accuracy"] == pytest.approx(float(trainer.callback_metrics["val_accuracy"]))
    assert run.sum("wall_s", "setup") > 0


def test_a_lightning_run_records_the_metric_of_its_task(tmp_path: Path) -> None:
    live = gv.wrap(_Net(), task="multilabel")
    logged = {"val/map": torch.tensor(0.25), "map": 0.5, "val_accuracy": 1.0}
    assert _state.reached(live, logged) == {"map": 0.25}
    assert _state.reached(gv.wrap(_Net()), logged) == {"accuracy": 1.0}
    assert _state.reached(gv.wrap(_Net(), task="segmentation"), logged) == {}


def test_a_lightning_run_that_fails_says_so(tmp_path: Path) -> None:
    green = on_lightning.GreenCallback(gv.wrap(_Net(), _Double()), "l", dir=tmp_path)
    with pytest.raises(ValueError, match="bad batch"):
        _fit(green, tmp_path, fails=True)
    run = _record(tmp_path)
    assert run.status == "failed"
    assert "a bad batch" in str(run.end)
