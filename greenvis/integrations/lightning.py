"""greenvis in a Lightning `Trainer`: a callback that meters the run and tells techniques of steps and epochs."""

from __future__ import annotations

from contextlib import AbstractContextManager, ExitStack
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from greenvis import ranks
from greenvis.meters.steps import samples_in
from greenvis.meters.track import Tracker, track
from greenvis.wrap import Wrapped


class GreenCallback(Callback):
    """Meter a Lightning run and train it with the techniques of `live`, which wraps the module's network.

    name and options are those of `gv.track`; `run` is the tracked run. The module's own `training_step` changes the batch
    and adds the terms: `x, y = live.batch(x, y)` and `loss = criterion(logits, y) + live.loss(x, y, logits)`;
    `configure_optimizers` takes `live.param_groups(lr)`. What the techniques hold (a buffer, ranks) goes into Lightning's
    checkpoints with the callback's state.
    """

    def __init__(self, live: Wrapped, name: str, **options: Any) -> None:
        self.live = live
        self.run: Tracker = track(name, live, **options)
        self._open = ExitStack()
        self._step = ExitStack()
        self._epoch: AbstractContextManager[Any] | None = None
        self._eval: AbstractContextManager[Any] | None = None
        self._steps = 0

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the meter. Raises BadInput for FSDP and DeepSpeed."""
        ranks.refuse_sharding(trainer.strategy.model)
        self._open.enter_context(self.run)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open the phase of the epoch."""
        self._epoch = self.run.phase(f"train/epoch{trainer.current_epoch + 1}")
        self._epoch.__enter__()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Count the FLOPs of the step, once for each kind."""
        self._step.enter_context(self.run.flops(batch))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the step; after an optimizer step let schedules of techniques go on."""
        self._step.close()
        self.run.add(steps=1, samples=samples_in(batch))
        if trainer.global_step > self._steps:
            self._steps = trainer.global_step
            self.live.step_end()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let techniques end their epoch, and record what was logged."""
        self.live.epoch_end()
        if self._epoch is not None:
            self._epoch.__exit__(None, None, None)
            self._epoch = None
        self._log(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open the phase "eval"; Lightning's sanity check before training is set-up."""
        self._eval = self.run.phase("setup" if trainer.sanity_checking else "eval")
        self._eval.__enter__()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Close the phase."""
        if self._eval is not None:
            self._eval.__exit__(None, None, None)
            self._eval = None

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End the run; a metric logged as "accuracy" or "val_accuracy" is its accuracy."""
        values = self._log(trainer)
        for name in ("val_accuracy", "accuracy"):
            if name in values:
                self.run.fact(accuracy=values[name])
                break
        self._open.close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """End the run as failed."""
        self._step.close()
        self._open.__exit__(type(exception), exception, exception.__traceback__)

    def state_dict(self) -> dict[str, Any]:
        """Return what the techniques hold beyond the model's weights, by technique."""
        pairs = zip(self.live.techniques, self.live.installed, strict=True)
        return {technique.name: dict(live.state_dict()) for technique, live in pairs}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take it back."""
        for technique, live in zip(self.live.techniques, self.live.installed, strict=True):
            live.load_state_dict(state_dict.get(technique.name, {}))

    def _log(self, trainer: Trainer) -> dict[str, float]:
        values = {k: float(v) for k, v in trainer.callback_metrics.items()}
        if values:
            self.run.log(epoch=trainer.current_epoch + 1, step=trainer.global_step, **values)
        return values
