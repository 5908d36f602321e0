"""greenvis in a transformers `Trainer`: the meter as a callback, the techniques' terms as `compute_loss_func`."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from greenvis import ranks
from greenvis.errors import BadInput
from greenvis.meters.track import Tracker, track
from greenvis.technique import logits_of
from greenvis.wrap import Wrapped


class GreenCallback(TrainerCallback):
    """Meter a Trainer's run and train it with the techniques of `live`.

        green = GreenCallback(live, "pets")
        GreenTrainer(model, args, callbacks=[green], compute_loss_func=green.loss, …)

    name and options are those of `gv.track`; `run` is the tracked run. task_loss: of logits (batch, classes) and labels.
    Raises BadInput where the trainer is not a `GreenTrainer`, where codecarbon would meter the same run again, and for FSDP and
    DeepSpeed; several processes (DDP) may train.
    """

    def __init__(
        self, live: Wrapped, name: str, *, task_loss: Callable[..., Tensor] = F.cross_entropy, image_key: str = "pixel_values",
        label_key: str = "labels", **options: Any,
    ) -> None:  # fmt: skip
        self.live = live
        self.run: Tracker = track(name, live, **options)
        self._criterion = live.criterion(task_loss)
        self._image_key, self._label_key = image_key, label_key
        self._images: Any = None
        self._shown = False
        self._samples = 0
        self._open = ExitStack()
        self._eval: AbstractContextManager[Any] | None = None

    def loss(self, outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        """Return the task loss plus, in training, the techniques' terms: what Trainer calls as `compute_loss_func`."""
        logits = logits_of(outputs)
        if not self.live.model.training:
            return self._criterion(logits, labels)
        self._samples += len(labels)
        if not self._shown:
            self._open.close()
            raise BadInput("techniques want each batch before the forward, where Trainer offers no place: use GreenTrainer")
        return self._criterion(logits, labels) + self.live.loss(self._images, labels, logits)

    def batch(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Return a training batch as the techniques want it."""
        self._shown = True
        x, y = self.live.batch(inputs[self._image_key], inputs[self._label_key])
        return {**inputs, self._image_key: x, self._label_key: y}

    # -- what Trainer calls -------------------------------------------------------------------------------------------

    def on_train_begin(self, args: TrainingArguments, state: Any, control: Any, **more: Any) -> None:
        """Start the meter."""
        reporters = [args.report_to] if isinstance(args.report_to, str) else args.report_to or []
        if {"codecarbon", "all"} & set(reporters):
            raise BadInput(
                f"report_to={reporters} lets codecarbon meter this run as well: name the trackers you want without it, or "
                'report_to="none"'
            )
        ranks.refuse_sharding(self.live.model)
        self._open.enter_context(self.run)
        self._open.enter_context(self.run.phase("train"))
        hook = self.live.model.register_forward_pre_hook(self._seen, with_kwargs=True)
        self._open.callback(hook.remove)

    def on_step_end(self, args: TrainingArguments, state: Any, control: Any, **more: Any) -> None:
        """Let schedules of techniques go on."""
        self.live.step_end()
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
        numbers = {k.removeprefix("eval_"): v for k, v in more["metrics"].items() if isinstance(v, (int, float))}
        self.run.log(epoch=state.epoch, step=state.global_step, **{k: v for k, v in numbers.items() if k != "epoch"})
        if "accuracy" in numbers:
            self.run.fact(accuracy=numbers["accuracy"])

    def on_log(self, args: TrainingArguments, state: Any, control: Any, **more: Any) -> None:
        """Record the training loss as Trainer logs it."""
        if "loss" in more["logs"]:
            self.run.log(epoch=state.epoch, step=state.global_step, loss=more["logs"]["loss"])

    def on_train_end(self, args: TrainingArguments, state: Any, control: Any, **more: Any) -> None:
        """End the run."""
        self._open.close()

    # -- inside -------------------------------------------------------------------------------------------------------

    def _seen(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Hold the images of this forward for the techniques; the first one in eval mode opens the phase "eval"."""
        self._images = kwargs.get(self._image_key, args[0] if args else None)
        if not model.training and self._eval is None:
            self._eval = self.run.phase("eval")
            self._eval.__enter__()


class GreenTrainer(Trainer):
    """A Trainer that counts the FLOPs of each step and shows batches to the techniques, which may change them (replay).

    Needs a `GreenCallback` among its callbacks.
    """

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        """Train on the batch as the techniques want it, as Trainer does."""
        green = next((c for c in self.callback_handler.callbacks if isinstance(c, GreenCallback)), None)
        if green is None:
            raise BadInput("GreenTrainer needs callbacks=[GreenCallback(live, name)]")
        with green.run.flops(inputs):
            return super().training_step(model, green.batch(inputs), *args, **kwargs)
