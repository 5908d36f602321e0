"""greenvis in a Lightning `Trainer`: a callback that meters the run and tells techniques of steps
and epochs."""

from __future__ import annotations

from contextlib import AbstractContextManager, ExitStack
from functools import partial
from typing import Any

import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torch.optim import Optimizer

from greenvis.core import distributed as ranks
from greenvis.core.wrap import Wrapped
from greenvis.errors import BadInput
from greenvis.integrations import _state
from greenvis.meters.steps import samples_in
from greenvis.meters.track import Tracker, track


class GreenCallback(Callback):
    """Meter a Lightning run and train it with the techniques of `live`, which wraps the module's
    network.

    The module's own `training_step` changes the batch and adds the terms: `x, y = live.batch(x, y)`
    and `loss = criterion(logits, y) + live.loss(x, y, logits)`, a mean over its batch;
    `configure_optimizers` takes `live.param_groups(lr)`. An optimizer step of automatic
    optimization learns the mean over all its samples, replayed ones included, however many
    micro-batches and processes they came in. Lightning's checkpoints hold, beside the weights, what
    the techniques are and hold: a module whose network is wrapped alike takes it back, any other
    refuses it. For plain weights see `live.plain_state_dict`. `run` is the tracked run, a new one
    at each `fit`.

    Args:
        live: What `gv.wrap` returned.
        name: Of the run, as `gv.track` takes it.
        options: Those of `gv.track`.
    """

    def __init__(self, live: Wrapped, name: str, **options: Any) -> None:
        _state.check_live(live, "GreenCallback")
        _state.refuse_seams(live, "Lightning's Trainer", _state.CLOSED)
        self.live = live
        self._new_run = partial(track, name, live, **options)
        self.run: Tracker = self._new_run()
        self._started = False
        self._open = ExitStack()
        self._step = ExitStack()
        self._epoch: AbstractContextManager[Any] | None = None
        self._eval: AbstractContextManager[Any] | None = None
        self._served = ExitStack()
        self._steps = 0
        self._mean = ranks.SampleMean()
        self._module: LightningModule | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let the module's state hold what the techniques hold, also once training is over."""
        if self._module is not pl_module:
            pl_module.register_state_dict_post_hook(lambda *of: self._add_state(*of))
            self._module = pl_module

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the meter. Raises BadInput for FSDP and DeepSpeed."""
        ranks.refuse_sharding(trainer.strategy.model)
        if self._started:
            self.run = self._new_run()
        self._started = True
        self._epoch = self._eval = None
        self._steps = trainer.global_step
        steps = trainer.estimated_stepping_batches
        if 0 < steps < float("inf"):
            self.live.plan(int(steps))
        self._open.enter_context(self.run)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open the phase of the epoch."""
        self._epoch = self.run.phase(f"train/epoch{trainer.current_epoch + 1}")
        self._epoch.__enter__()

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Count the FLOPs of the step, once for each kind."""
        self.live.trained_on = samples_in(batch)
        self._step.enter_context(self.run.flops(batch))

    def on_before_backward(
        self, trainer: Trainer, pl_module: LightningModule, loss: Tensor
    ) -> None:
        """Weigh the micro-batch by its samples."""
        if pl_module.automatic_optimization and loss.requires_grad:
            weight = self._mean.weight(self.live.trained_on)
            loss.register_hook(lambda gradient: gradient * weight)

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        """Make the gradient the mean over the samples of the step."""
        if pl_module.automatic_optimization:
            self._mean.rescale(
                pl_module.parameters(), trainer.accumulate_grad_batches * ranks.world_size()
            )

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
        self._served.enter_context(self.live.served())

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Close the phase."""
        self._served.close()
        if self._eval is not None:
            self._eval.__exit__(None, None, None)
            self._eval = None

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Hold the model as it is to answer."""
        self._served.enter_context(self.live.served())

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take that back."""
        self._served.close()

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Hold the model as it is to answer."""
        self._served.enter_context(self.live.served())

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take that back."""
        self._served.close()

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End the run; a metric of the task logged under its name ("miou" or "val_miou"; "accuracy"
        where `wrap` was told no task) is the run's."""
        self.run.fact(**_state.reached(self.live, self._log(trainer)))
        self._open.close()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """End the run as failed."""
        self._step.close()
        self._served.close()
        self._open.__exit__(type(exception), exception, exception.__traceback__)

    def state_dict(self) -> dict[str, Any]:
        """Return what each process holds for itself (its share of a replay buffer), where several
        train."""
        own: Any = _state.own_state(self.live)
        if not own:
            return {}
        parts: list[Any] = [None] * ranks.world_size()
        dist.all_gather_object(parts, {k: v.cpu() for k, v in own.items()})
        return {"parts": parts}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take it back. Raises BadInput where another number of processes left it."""
        parts = state_dict.get("parts", [None])
        if any(t.rank_local for t in self.live.techniques):
            if len(parts) != ranks.world_size():
                raise BadInput(
                    f"the checkpoint holds the parts of {len(parts)} process(es), and here train "
                    f"{ranks.world_size()}"
                )
            _state.give_own(self.live, parts[ranks.rank()] or {})

    def _add_state(
        self, module: LightningModule, state: dict[str, Any], prefix: str, metadata: Any
    ) -> None:
        """Put what the techniques are and hold beside the wrapped model's own state."""
        if self.live.active:
            for name, part in module.named_modules():
                if part is self.live.model:
                    state.update(
                        {f"{prefix}{name}.{k}": v for k, v in self.live.checkpoint_state().items()}
                    )

    def _log(self, trainer: Trainer) -> dict[str, float]:
        values = {k: float(v) for k, v in trainer.callback_metrics.items()}
        if values:
            self.run.log(epoch=trainer.current_epoch + 1, step=trainer.global_step, **values)
        return values
