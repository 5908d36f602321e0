"""greenvis in a transformers `Trainer`: the meter as a callback, the techniques' terms as
`compute_loss_func`."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from greenvis.core import distributed, files
from greenvis.core.technique import Installed, logits_of
from greenvis.core.wrap import Wrapped
from greenvis.errors import BadInput
from greenvis.integrations import _state
from greenvis.meters.track import Tracker, track
from greenvis.tasks.base import Task

FORMS = ("classification", "multilabel", "regression", "segmentation")  # of tasks it trains
_WEIGHTS = (
    "model.safetensors",
    "pytorch_model.bin",
    "model.safetensors.index.json",
    "pytorch_model.bin.index.json",
)


class GreenCallback(TrainerCallback):
    """Meter a Trainer's run and train it with the techniques of `live`.

        green = GreenCallback(live, "pets")
        GreenTrainer(model, args, callbacks=[green], compute_loss_func=green.loss, …)

    An optimizer step learns the mean over all its samples, replayed ones included, however many
    micro-batches and processes (DDP) they came in. `run` is the tracked run, a new one at each
    `train()`.

    Args:
        live: What `gv.wrap` returned.
        name: Of the run, as `gv.track` takes it.
        task_loss: Of logits (batch, classes) and labels, a mean over them; where absent, that of
            the task `wrap` was told, else cross entropy with the arguments' label smoothing.
        image_key: The images in a batch.
        label_key: The labels in a batch.
        options: Those of `gv.track`.

    Raises:
        BadInput: Where the trainer is not a `GreenTrainer`, where codecarbon would meter the same
            run again, for DataParallel, FSDP and DeepSpeed, for settings that would be without
            effect, and for tasks whose loss is no mean over samples of a batch of images.
    """

    def __init__(
        self, live: Wrapped, name: str, *, task_loss: Callable[..., Tensor] | None = None,
        image_key: str = "pixel_values",
        label_key: str = "labels", **options: Any,
    ) -> None:  # fmt: skip
        _state.check_live(live, "GreenCallback")
        _state.refuse_seams(live, "transformers' Trainer", _state.COUNTED)
        self.live = live
        self._new_run = partial(track, name, live, **options)
        self.run: Tracker = self._new_run()
        self._started = False
        if live.task is not None:
            _refuse_task(live.task)
            if live.task.form != "classification":
                task_loss = task_loss or live.task.loss
        self._task_loss = task_loss
        self._criterion = live.criterion(task_loss or F.cross_entropy)
        self._image_key, self._label_key = image_key, label_key
        self._images: Any = None
        self._batch_called = self._loss_called = False
        self._samples = 0
        self._mean = distributed.SampleMean()
        self._changes_batches = any(type(i).batch is not Installed.batch for i in live.installed)
        self._open = ExitStack()
        self._eval: AbstractContextManager[Any] | None = None

    def loss(self, outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        """Return the task loss plus, in training, the techniques' terms: what Trainer calls as
        `compute_loss_func`.

        num_items_in_batch: labels of all micro-batches and processes of the step, before techniques
        added any; the loss is then this batch's part of their mean, as Trainer wants it.
        """
        logits = logits_of(outputs) if self.live.task is None else self.live.task.outputs(outputs)
        count: Any = num_items_in_batch
        if not self.live.model.training:
            return self._criterion(logits, labels) * (
                1.0 if count is None else _items(labels) / count
            )
        if not self._batch_called and self.live.techniques:
            raise BadInput(
                "techniques want each batch before the forward, where Trainer offers no place: use "
                "GreenTrainer"
            )
        self._samples += len(labels)
        self._loss_called = True
        value = self._criterion(logits, labels) + self.live.loss(self._images, labels, logits)
        # what is to be divided by is known when the step is complete
        if count is None or self._changes_batches:
            return value * self._mean.weight(_items(labels), count)
        return value * (_items(labels) / count)

    def batch(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Return a training batch as the techniques want it."""
        self._batch_called, self._loss_called = True, False
        x, y = self.live.batch(inputs[self._image_key], inputs[self._label_key])
        return {**inputs, self._image_key: x, self._label_key: y}

    def settle(self, counted: bool) -> None:
        """After the last backward of an optimizer step: make its gradient the mean over what was
        trained on.

        counted: whether Trainer gave `num_items_in_batch`, and so took the number of processes into
        account.
        """
        if not counted or self._changes_batches:
            self._mean.rescale(
                self.live.model.parameters(), 1 if counted else distributed.world_size()
            )

    def check(self, args: TrainingArguments) -> None:
        """Take what the arguments say of the loss. Raises BadInput for what would be without
        effect, or wrong."""
        if args.n_gpu > 1:
            raise BadInput(
                f"DataParallel copies the model to {args.n_gpu} GPUs at each step, without its "
                "techniques: use torchrun"
            )
        if args.world_size > 1 and not args.average_tokens_across_devices:
            raise BadInput(
                "average_tokens_across_devices=False weighs processes alike, whatever they hold: "
                "leave it True"
            )
        if args.label_smoothing_factor and self._task_loss is not None:
            raise BadInput(
                f"label_smoothing_factor={args.label_smoothing_factor} has no effect on a task "
                "without classes or a task_loss of your own: smooth there"
            )
        if args.label_smoothing_factor:
            self._criterion = self.live.criterion(
                partial(F.cross_entropy, label_smoothing=args.label_smoothing_factor)
            )

    def fail(self, error: BaseException) -> None:
        """End the run as failed."""
        self._eval = None
        self._open.__exit__(type(error), error, error.__traceback__)

    # -- what Trainer calls -----------------------------------------------------------------------

    def on_train_begin(
        self, args: TrainingArguments, state: Any, control: Any, **more: Any
    ) -> None:
        """Start the meter."""
        reporters = [args.report_to] if isinstance(args.report_to, str) else args.report_to or []
        if {"codecarbon", "all"} & set(reporters):
            raise BadInput(
                f"report_to={reporters} lets codecarbon meter this run as well: name the trackers "
                "you want without it, or "
                'report_to="none"'
            )
        distributed.refuse_sharding(self.live.model)
        if state is not None:
            self.check(args)
            self.live.plan(state.max_steps)
        self._open.close()
        if self._started:
            self.run = self._new_run()
        self._started = True
        self._open.enter_context(self.run)
        self._open.enter_context(self.run.phase("train"))
        hook = self.live.model.register_forward_pre_hook(self._before_forward, with_kwargs=True)
        self._open.callback(hook.remove)

    def on_optimizer_step(
        self, args: TrainingArguments, state: Any, control: Any, **more: Any
    ) -> None:
        """Let schedules of techniques go on, while the gradients are there."""
        self.live.step_end()

    def on_step_end(self, args: TrainingArguments, state: Any, control: Any, **more: Any) -> None:
        """Count the step."""
        self.run.add(steps=1, samples=self._samples)
        self._samples = 0

    def on_epoch_end(self, args: TrainingArguments, state: Any, control: Any, **more: Any) -> None:
        """Let techniques end their epoch."""
        self.live.epoch_end()

    def on_evaluate(self, args: TrainingArguments, state: Any, control: Any, **more: Any) -> None:
        """Close the phase "eval" and record its metrics."""
        if self._eval is not None:
            self._eval.__exit__(None, None, None)
            self._eval = None
        numbers = {
            k.removeprefix("eval_"): v
            for k, v in more["metrics"].items()
            if isinstance(v, (int, float))
        }
        self.run.log(
            epoch=state.epoch,
            step=state.global_step,
            **{k: v for k, v in numbers.items() if k != "epoch"},
        )
        self.run.fact(**_state.reached(self.live, numbers))

    def on_log(self, args: TrainingArguments, state: Any, control: Any, **more: Any) -> None:
        """Record the training loss as Trainer logs it."""
        if "loss" in more["logs"]:
            self.run.log(epoch=state.epoch, step=state.global_step, loss=more["logs"]["loss"])

    def on_train_end(self, args: TrainingArguments, state: Any, control: Any, **more: Any) -> None:
        """End the run."""
        self._open.close()

    # -- inside -----------------------------------------------------------------------------------

    def _before_forward(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """Hold the images of this forward for the techniques; the first one in eval mode opens the
        phase "eval"."""
        self._images = kwargs.get(self._image_key, args[0] if args else None)
        if not model.training and self._eval is None:
            self._eval = self.run.phase("eval")
            self._eval.__enter__()


class GreenTrainer(Trainer):
    """A Trainer that counts the FLOPs of each step and shows batches to the techniques, which may
    change them (replay).

    Needs a `GreenCallback` among its callbacks, whose `loss` it takes as `compute_loss_func`.
    `save_model` writes plain weights, which `from_pretrained` takes, where the techniques can be
    folded into them; else none, so that nobody takes the weights without their techniques. Beside
    them, in the folder "greenvis", lies what was learned and
    what techniques hold: a resume takes it from there, and `live.load(folder / "greenvis")`.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._warned = False  # that checkpoints hold no plain weights
        green = self._green()
        if green is not None:
            green.check(self.args)
            self.compute_loss_func = self.compute_loss_func or green.loss

    def _green(self) -> GreenCallback | None:
        return next(
            (c for c in self.callback_handler.callbacks if isinstance(c, GreenCallback)), None
        )

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train, as Trainer does; a training that fails ends its run as failed."""
        try:
            return super().train(*args, **kwargs)
        except BaseException as error:
            if (green := self._green()) is not None:
                green.fail(error)
            raise

    def training_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        num_items_in_batch: Any = None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        """Train on the batch as the techniques want it, as Trainer does."""
        green = self._green()
        if green is None:
            raise BadInput("GreenTrainer needs callbacks=[GreenCallback(live, name)]")
        with green.run.flops(inputs):
            changed = green.batch(inputs)
            loss = super().training_step(model, changed, num_items_in_batch, *args, **kwargs)
        if not green._loss_called:
            raise BadInput(
                "the techniques' terms are in no loss: give compute_loss_func=green.loss, or none"
            )
        if self.accelerator.sync_gradients:
            green.settle(num_items_in_batch is not None)
        if num_items_in_batch is None:
            return loss / self.current_gradient_accumulation_steps
        before, after = (batch[green._label_key] for batch in (inputs, changed))
        # for the log: a mean of its own
        return loss if before is after else loss * (_items(before) / _items(after)).to(loss)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate or predict with the model as it is to answer."""
        green = self._green()
        with nullcontext() if green is None else green.live.served():
            return super().evaluation_loop(*args, **kwargs)

    # -- saving -----------------------------------------------------------------------------------

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """Write plain weights where there are some, and what is needed to go on beside them."""
        green = self._green()
        if green is None or not green.live.active:
            super()._save(output_dir, state_dict)
            return
        live, folder = green.live, Path(output_dir or str(self.args.output_dir))
        reason = next(
            (f"{t.name} {i.unmergeable}" for t, i in live._pairs() if i.unmergeable), None
        )
        if reason is None:
            super()._save(output_dir, live.plain_state_dict() if self.args.should_save else {})
        elif self.args.should_save:
            self._save_without_weights(folder, reason)
        _state.save(live, folder / _state.FOLDER)

    def _save_without_weights(self, folder: Path, reason: str) -> None:
        """Write configuration and processor; what was learned goes into the folder "greenvis"
        alone."""
        way = (
            "wrap a plain model with the same techniques and call "
            f"live.load('{folder / _state.FOLDER}')"
        )
        stale = [name for name in _WEIGHTS if (folder / name).exists()]
        if stale:
            raise BadInput(
                f"{folder} holds {stale[0]} of another model, which from_pretrained would load: "
                "save elsewhere"
            )
        folder.mkdir(parents=True, exist_ok=True)
        for part in (getattr(self.model, "config", None), self.processing_class):
            if part is not None:
                part.save_pretrained(folder)
        with files.replacing(folder / "training_args.bin") as part, open(part, "wb") as file:
            torch.save(self.args, file)
        message = (
            "%s gets no weights of its own, for from_pretrained would load them without their "
            "techniques (%s): %s"
        )
        if not self._warned:
            logging.getLogger(__name__).warning(message, folder, reason, way)
        self._warned = True

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        green = self._green()
        if green is None or not green.live.active:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            _state.load(green.live, Path(resume_from_checkpoint) / _state.FOLDER)

    def _load_best_model(self) -> None:
        green, best = self._green(), self.state.best_model_checkpoint
        if green is None or not green.live.active or best is None:
            super()._load_best_model()
        else:
            _state.load(green.live, Path(best) / _state.FOLDER)


def _refuse_task(task: Task) -> None:
    """Raise BadInput for a task whose loss is no mean over samples, each an image."""
    if task.form not in FORMS:
        raise BadInput(
            f"GreenTrainer adds up means over samples, each an image with its label, and task "
            f"'{task.name}' is learned otherwise: train it by a recipe or in a loop of your own "
            "(gv.wrap)"
        )


def _items(labels: Tensor) -> Tensor:
    """Return how many labels count, as Trainer counts them."""
    return labels.ne(-100).sum()
