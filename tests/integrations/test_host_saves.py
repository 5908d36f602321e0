"""What host trainers save gives the same answers when it is loaded, or is refused; a resume goes on
exactly."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset
from transformers import TrainingArguments, ViTConfig, ViTForImageClassification

import greenvis as gv
from greenvis.core.technique import logits_of
from greenvis.errors import BadInput
from greenvis.integrations.accelerate import GreenAccelerator
from greenvis.integrations.lightning import GreenCallback as InLightning
from greenvis.integrations.transformers import GreenCallback, GreenTrainer
from greenvis.meters.record import find, read

X = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(1))
Y = torch.randint(5, (16,), generator=torch.Generator().manual_seed(2))
FOLDED: dict[str, Callable[[], list[gv.Technique]]] = {
    "nothing": list,
    "lora": lambda: [gv.Lora(rank=2)],
    "norms and head": lambda: [gv.NormTune()],
    "lora and replay": lambda: [gv.Lora(rank=2), gv.Replay(size=8)],
    "distill": lambda: [gv.Distill(teacher=_vit(7), losses=[{"kind": "hint"}])],
}
LIVE: dict[str, Callable[[], list[gv.Technique]]] = {
    "adapter": lambda: [gv.Adapter()],
    "prompt": lambda: [gv.Prompt()],
    "token_merge": lambda: [gv.TokenMerge(r=1)],
    "early_exit": lambda: [gv.EarlyExit(at=(1,), threshold=0.2)],
}
RESUMED: dict[str, Callable[[], list[gv.Technique]]] = {
    "replay": lambda: [gv.Replay(size=12)],
    "si": lambda: [gv.Lora(rank=2), gv.Regularize(method="si")],
    "ema teacher": lambda: [gv.Distill(teacher="ema")],
    "token_merge": lambda: [gv.TokenMerge(r=1)],
}


def _vit(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        image_size=8, patch_size=4,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    config.num_labels = 5
    return ViTForImageClassification(config)


class _Rows(Dataset):
    def __len__(self) -> int:
        return len(X)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {"pixel_values": X[i], "labels": Y[i]}


def _answers(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return logits_of(model.eval()(X))


def _wrapped(techniques: list[gv.Technique]) -> gv.Wrapped:
    model = _vit()
    torch.manual_seed(11)  # what techniques add starts alike
    return gv.wrap(model, techniques)


def _trainer(live: gv.Wrapped, out: Path, epochs: int = 1, **more: Any) -> GreenTrainer:
    settings = {"save_strategy": "no", "lr_scheduler_type": "constant", **more}
    arguments = TrainingArguments(
        str(out), num_train_epochs=epochs, per_device_train_batch_size=4, report_to="none",
        use_cpu=True, disable_tqdm=True,
        logging_strategy="no", **settings,
    )  # fmt: skip
    green = GreenCallback(live, "saved", dir=out / "runs")
    optimizer = torch.optim.SGD(live.param_groups(0.05), lr=0.05, momentum=0.9)
    return GreenTrainer(
        live.model, arguments, train_dataset=_Rows(), eval_dataset=_Rows(), callbacks=[green],
        compute_loss_func=green.loss,
        optimizers=(optimizer, None),
    )  # fmt: skip


# -- transformers ---------------------------------------------------------------------------------


@pytest.mark.one_in(3)
@pytest.mark.parametrize("name", FOLDED)
def test_save_model_writes_plain_weights_where_techniques_can_be_folded(
    name: str, tmp_path: Path
) -> None:
    live = _wrapped(FOLDED[name]())
    trainer = _trainer(live, tmp_path)
    trainer.train()
    keys = [*live.model.state_dict()]
    trainer.save_model(str(tmp_path / "saved"))
    assert [*live.model.state_dict()] == keys
    again, said = ViTForImageClassification.from_pretrained(
        tmp_path / "saved", output_loading_info=True
    )
    assert not said["missing_keys"]
    assert not said["unexpected_keys"]
    assert torch.allclose(_answers(again), _answers(live.model), atol=1e-5)
    trainer.train()  # and it goes on
    live.merge()
    trainer.save_model(str(tmp_path / "merged"))
    again = ViTForImageClassification.from_pretrained(tmp_path / "merged")
    assert torch.allclose(_answers(again), _answers(live.model), atol=1e-6)


@pytest.mark.one_in(3)
@pytest.mark.parametrize("name", LIVE)
def test_save_model_leaves_no_weights_to_take_for_the_whole(
    name: str, tmp_path: Path, caplog: Any
) -> None:
    live = _wrapped(LIVE[name]())
    trainer = _trainer(live, tmp_path)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    assert "live.load(" in caplog.text
    with pytest.raises(OSError, match=r"no file named model\.safetensors"):
        ViTForImageClassification.from_pretrained(tmp_path / "saved")
    again = _wrapped(LIVE[name]())
    again.load(tmp_path / "saved" / "greenvis")
    assert torch.equal(_answers(again.model), _answers(live.model))
    _vit().save_pretrained(tmp_path / "other")
    with pytest.raises(BadInput, match=r"holds model\.safetensors of another model"):
        trainer.save_model(str(tmp_path / "other"))


@pytest.mark.one_in(3)
@pytest.mark.parametrize("name", RESUMED)
def test_a_resume_goes_on_to_the_same_weights(name: str, tmp_path: Path) -> None:
    whole, first, second = (_wrapped(RESUMED[name]()) for _ in range(3))
    _trainer(whole, tmp_path / "whole", epochs=2).train()
    _trainer(first, tmp_path / "cut", epochs=2, save_strategy="epoch", max_steps=4).train()
    checkpoint = tmp_path / "cut" / "checkpoint-4"
    _trainer(second, tmp_path / "cut", epochs=2).train(resume_from_checkpoint=str(checkpoint))
    one, other = whole.state_dict(), second.state_dict()
    assert one.keys() == other.keys()
    assert not [k for k, v in one.items() if not torch.equal(v, other[k])]


def test_a_checkpoint_of_others_is_refused(tmp_path: Path) -> None:
    live = _wrapped([gv.Replay(size=8)])
    _trainer(live, tmp_path, save_strategy="epoch").train()
    with pytest.raises(BadInput, match="was saved with"):
        _trainer(_wrapped([gv.Lora(rank=2)]), tmp_path).train(
            resume_from_checkpoint=str(tmp_path / "checkpoint-4")
        )
    with pytest.raises(BadInput, match="cannot load a delta"):
        _trainer(_wrapped([gv.Lora(rank=2)]), tmp_path).train(resume_from_checkpoint=str(tmp_path))


def test_the_best_model_is_loaded_with_its_techniques(tmp_path: Path) -> None:
    live = _wrapped([gv.Lora(rank=2)])
    trainer = _trainer(
        live, tmp_path, epochs=3, save_strategy="epoch", eval_strategy="epoch",
        load_best_model_at_end=True,
        metric_for_best_model="loss",
    )  # fmt: skip
    seen: dict[str, Tensor] = {}
    save = trainer._save_checkpoint

    def noted(*args: Any, **kwargs: Any) -> None:
        save(*args, **kwargs)
        seen[f"checkpoint-{trainer.state.global_step}"] = _answers(live.model)
        live.model.train()

    trainer._save_checkpoint = noted  # type: ignore[method-assign]
    trainer.train()
    assert trainer.state.best_model_checkpoint is not None
    assert torch.equal(_answers(live.model), seen[Path(trainer.state.best_model_checkpoint).name])


def test_a_second_training_is_a_second_run_also_after_one_that_failed(tmp_path: Path) -> None:
    live = _wrapped([gv.Replay(size=8)])
    trainer = _trainer(live, tmp_path)
    trainer.train()
    trainer.train()
    data, trainer.train_dataset = trainer.train_dataset, torch.utils.data.Subset(_Rows(), [0, 99])
    with pytest.raises(IndexError):
        trainer.train()
    trainer.train_dataset = data
    trainer.train()
    runs = [read(path) for path in find([tmp_path / "runs"])]
    assert sorted(run.status for run in runs) == ["done", "done", "done", "failed"]
    assert {run.sum("steps", "train") for run in runs if run.status == "done"} == {4}


def test_what_has_no_effect_or_no_techniques_is_refused(tmp_path: Path) -> None:
    for of_host in (GreenCallback, InLightning):
        with pytest.raises(
            BadInput, match=r"not NoneType: .* GreenCallback\(gv.wrap\(model\), …\)"
        ):
            of_host(None, "n")  # type: ignore[arg-type]
    with pytest.raises(BadInput, match="not Linear"):
        GreenAccelerator(nn.Linear(2, 2))  # type: ignore[arg-type]
    live = _wrapped([gv.Replay(size=8)])
    green = GreenCallback(live, "s", task_loss=F.cross_entropy, dir=tmp_path)
    arguments = TrainingArguments(
        str(tmp_path), report_to="none", use_cpu=True, label_smoothing_factor=0.1
    )
    with pytest.raises(BadInput, match=r"no effect on .* a task_loss of your own"):
        GreenTrainer(live.model, arguments, callbacks=[green])
    trainer = _trainer(live, tmp_path)
    trainer.compute_loss_func = lambda outputs, labels, num_items_in_batch=None: F.cross_entropy(
        outputs.logits, labels
    )
    with pytest.raises(BadInput, match="terms are in no loss"):
        trainer.train()


# -- Lightning ------------------------------------------------------------------------------------


class _Module(pl.LightningModule):
    def __init__(self, net: nn.Module, live: gv.Wrapped | None = None) -> None:
        super().__init__()
        self.net, self.live = net, live

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        assert self.live is not None
        x, y = self.live.batch(*batch)
        outputs = self.net(x)
        return F.cross_entropy(logits_of(outputs), y) + self.live.loss(x, y, outputs)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        assert self.live is not None
        return torch.optim.SGD(self.live.param_groups(0.05), lr=0.05, momentum=0.9)


def _fit(live: gv.Wrapped, out: Path, epochs: int = 1, resume: Path | None = None) -> pl.Trainer:
    trainer = pl.Trainer(
        max_epochs=epochs, callbacks=[InLightning(live, "fit", dir=out / "runs")],
        accelerator="cpu", logger=False,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
        default_root_dir=out,
    )  # fmt: skip
    trainer.fit(
        _Module(live.model, live), DataLoader(TensorDataset(X, Y), batch_size=4), ckpt_path=resume
    )
    return trainer


@pytest.mark.one_in(3)
@pytest.mark.parametrize("name", RESUMED)
def test_lightning_goes_on_to_the_same_weights(name: str, tmp_path: Path) -> None:
    whole, first, second = (_wrapped(RESUMED[name]()) for _ in range(3))
    _fit(whole, tmp_path, epochs=2)
    _fit(first, tmp_path).save_checkpoint(tmp_path / "half.ckpt")
    _fit(second, tmp_path, epochs=2, resume=tmp_path / "half.ckpt")
    one, other = whole.state_dict(), second.state_dict()
    assert not [k for k, v in one.items() if not torch.equal(v, other[k])]


@pytest.mark.one_in(3)
@pytest.mark.parametrize("weights_only", [False, True])
@pytest.mark.parametrize("name", [*LIVE, "lora"])
def test_lightnings_checkpoint_gives_the_same_answers_or_is_refused(
    name: str, weights_only: bool, tmp_path: Path
) -> None:
    techniques = (FOLDED | LIVE)[name]
    live = _wrapped(techniques())
    file = tmp_path / "all.ckpt"
    trainer = _fit(live, tmp_path)
    trainer.save_checkpoint(file, weights_only=weights_only)
    again = _wrapped(techniques())
    _Module.load_from_checkpoint(
        file, net=again.model, live=again, map_location="cpu", weights_only=False
    )
    assert torch.equal(_answers(again.model), _answers(live.model))
    with pytest.raises(RuntimeError, match=r"Unexpected key[^$]*greenvis\.techniques"):
        _Module.load_from_checkpoint(file, net=_vit(), weights_only=False)
    other = _wrapped([gv.Replay(size=4)])
    with pytest.raises(BadInput, match="was saved with"):
        _Module.load_from_checkpoint(file, net=other.model, live=other, weights_only=False)


def test_a_second_fit_is_a_second_run(tmp_path: Path) -> None:
    live = _wrapped([gv.Replay(size=8)])
    green = InLightning(live, "fit", dir=tmp_path)
    for _ in range(2):
        trainer = pl.Trainer(
            max_epochs=1, callbacks=[green], accelerator="cpu", logger=False,
            enable_progress_bar=False,
            enable_model_summary=False, enable_checkpointing=False, default_root_dir=tmp_path,
        )  # fmt: skip
        trainer.fit(_Module(live.model, live), DataLoader(TensorDataset(X, Y), batch_size=4))
    assert [read(path).status for path in find([tmp_path])] == ["done", "done"]


# -- accelerate -----------------------------------------------------------------------------------


def _loop(live: gv.Wrapped, accelerator: GreenAccelerator, epochs: int) -> None:
    for _ in range(epochs):
        model = accelerator._models[0]
        model.train()
        for x, y in zip(X.split(4), Y.split(4), strict=True):
            x, y = live.batch(x, y)
            outputs = model(x)
            accelerator.backward(F.cross_entropy(logits_of(outputs), y) + live.loss(x, y, outputs))
            accelerator._optimizers[0].step()
            live.step_end()
            accelerator._optimizers[0].zero_grad()


def _accelerated(live: gv.Wrapped) -> GreenAccelerator:
    accelerator = GreenAccelerator(live, cpu=True)
    accelerator.prepare(live.model, torch.optim.SGD(live.param_groups(0.05), lr=0.05, momentum=0.9))
    return accelerator


@pytest.mark.one_in(3)
@pytest.mark.parametrize("name", [*RESUMED, *LIVE])
def test_accelerate_goes_on_to_the_same_weights_or_refuses(name: str, tmp_path: Path) -> None:
    techniques = (RESUMED | LIVE)[name]
    whole, first, second = (_wrapped(techniques()) for _ in range(3))
    _loop(whole, _accelerated(whole), 2)
    accelerator = _accelerated(first)
    _loop(first, accelerator, 1)
    accelerator.save_state(str(tmp_path))
    resumed = _accelerated(second)
    resumed.load_state(str(tmp_path))
    _loop(second, resumed, 1)
    one, other = whole.state_dict(), second.state_dict()
    assert not [k for k, v in one.items() if not torch.equal(v, other[k])]
    plain = Accelerator(cpu=True)
    plain.prepare(_vit())
    with pytest.raises(RuntimeError, match=r"greenvis\.techniques"):
        plain.load_state(str(tmp_path))


# -- loops of one's own ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", FOLDED)
def test_a_plain_state_is_that_of_merge_and_training_does_not_notice(name: str) -> None:
    live, twin = (_wrapped(FOLDED[name]()) for _ in range(2))
    for one in (live, twin):
        one.model.train()
        optimizer = torch.optim.SGD(one.param_groups(0.1), lr=0.1, momentum=0.9)
        torch.manual_seed(3)
        for step in range(3):
            if one is live and step == 1:
                plain = live.plain_state_dict()
                fresh = _vit(5)
                fresh.load_state_dict(plain)
                modes = [m.training for m in live.model.modules()]
                assert torch.allclose(
                    _answers(fresh), _answers(copy.deepcopy(live.model)), atol=1e-5
                )
                assert [m.training for m in live.model.modules()] == modes
                torch.manual_seed(4)
            if one is twin and step == 1:
                torch.manual_seed(4)
            x, y = one.batch(X, Y)
            outputs = one.model(x)
            (F.cross_entropy(logits_of(outputs), y) + one.loss(x, y, outputs)).backward()
            optimizer.step()
            one.step_end()
            optimizer.zero_grad()
    assert all(torch.equal(v, twin.state_dict()[k]) for k, v in live.state_dict().items())
    plain = live.plain_state_dict()
    merged = live.merge().state_dict()
    assert plain.keys() == merged.keys()
    assert all(torch.equal(v, merged[k]) for k, v in plain.items())
    assert all(torch.equal(v, plain[k]) for k, v in live.plain_state_dict().items())


@pytest.mark.parametrize("name", LIVE)
def test_a_state_that_cannot_be_plain_is_refused_with_the_reason(name: str) -> None:
    live = _wrapped(LIVE[name]())
    before = _answers(live.model)
    with pytest.raises(gv.GreenvisError, match="cannot be merged: "):
        live.plain_state_dict()
    assert torch.equal(_answers(live.model), before)
