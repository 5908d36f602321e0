"""The live change a technique makes (`Installed`), and what a training loop tells it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, ClassVar

from greenvis.core.feeds import Feeds
from greenvis.core.samples import Experience, Samples
from greenvis.errors import GreenvisError

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class Installed:
    """One technique, live on a model. Every seam is optional; the defaults do nothing.

    Args:
        trainable: Names of the parameters (of the model, after install) which this technique trains
            and saves.
        freezes: True where every parameter no technique lists is to stay frozen.

    Attributes:
        unmergeable: Why the change cannot be folded into the model's own weights, if it cannot.
        shrinks: Whether the merged model is smaller than the one it was put on.
        samples: Which samples the current batch holds; None where the loop does not say, or where
            they were changed.
        total_steps: Optimizer steps of the training; None where the loop does not say.
        seed: Of what it draws for an epoch ahead.
        repeated: Whether this is a step's second forward and backward (`again`): what is counted or
            stored of a step was that of the first.
        wants: Second streams of images it draws from (`feed`): "unlabeled", "target".
        adapts: Whether the model learns while it answers (in `served`): its forward then runs with
            gradients, outside of inference mode, and no file can hold what it will answer.
        by_domain: Whether it must know the domain of each image.
        domains: That of each sample of the current batch, int64 (batch,), -1 where it is not known;
            None where the loop does not say. Rows that techniques put into the batch stand behind.
        assesses: Whether it asks for the loss on images held out as training goes.
        held_out_loss: Returns it, of the model as it is; None where the loop does not offer it.
        calibrates: Whether `calibrate` wants held-out images after training.
        criterion: Builds the loss that replaces the task loss; None where it does not.

    Example:
        >>> class Small(gv.Installed):
        ...     def terms(self, x, y, logits):
        ...         return {"small": 0.1 * logits.square().mean()}
        >>> sorted(Small().terms(x, y, model(x)))
        ['small']
    """

    pretext: ClassVar[bool] = False
    unmergeable: str = ""
    shrinks: bool = False
    samples: Samples | None = None
    total_steps: int | None = None
    seed: int = 0
    repeated: bool = False
    wants: tuple[str, ...] = ()
    adapts: bool = False
    by_domain: bool = False
    domains: Tensor | None = None
    assesses: bool = False
    held_out_loss: Callable[[], float] | None = None
    calibrates: bool = False
    criterion: Callable[[Callable[..., Tensor]], Callable[..., Tensor]] | None = None

    def __init__(self, trainable: tuple[str, ...] = (), freezes: bool = False) -> None:
        self.trainable = trainable
        self.freezes = freezes
        self.feeds = Feeds()  # those of the wrapped model
        self.phase: Callable[[str], AbstractContextManager[Any]] = nullcontext
        self.note: Callable[[str], None] = _warn  # a tracked run's record, else a warning

    # a copy of the model belongs to no run, and is shown other batches
    def __getstate__(self) -> dict[str, Any]:
        alone = {"phase": nullcontext, "note": _warn, "samples": None, "feeds": Feeds()}
        alone |= {"domains": None, "held_out_loss": None}
        return {**vars(self), **alone}

    def feed(
        self, name: str, device: torch.device, times: int = 1, where: Tensor | None = None
    ) -> Tensor:
        """Return images of a second stream for this step, as often as it is asked for the same.

        In a recipe which images come depends on the seed and the number of the step alone.

        Args:
            name: One that `wants` holds.
            device: Where to.
            times: How many of the stream's batches, each of the labelled batch's size.
            where: Which of these images alone, int64 (n,): the others are not even read.

        Returns:
            Images (times · batch, channels, height, width), augmented as the data says.

        Raises:
            GreenvisError: Where the loop gave no such stream.
        """
        return self.feeds.draw(name, times, device, where)

    def feed_positions(self, name: str, times: int = 1) -> Tensor | None:
        """Return where the images of `feed(name, …, times)` stand in their set, so that what was
        learned of an image can be kept: int64 (times · batch,); None where the stream does not say,
        as a loader of a loop's own.

        Args:
            name: One that `wants` holds.
            times: As for `feed`.

        Raises:
            GreenvisError: Where the loop gave no such stream.
        """
        return self.feeds.positions(name, times)

    def batch(self, x: Any, y: Any) -> tuple[Any, Any]:
        """Return the batch to train on, before the forward.

        Args:
            x: Images (batch, channels, height, width), or what the model takes.
            y: Labels (batch, …).

        Returns:
            The images and labels to train on.
        """
        return x, y

    def terms(self, x: Any, y: Any, logits: Tensor | None) -> Mapping[str, Tensor]:
        """Return the extra loss terms of this step.

        Args:
            x: Images (batch, channels, height, width) that `batch` returned.
            y: Their labels.
            logits: (batch, classes), or the model's output that has them; None of a pretext.

        Returns:
            Scalars, already weighted, by name.
        """
        return {}

    def param_groups(self, lr: float) -> list[dict[str, Any]]:
        """Return optimizer groups for parameters that want other settings than the rest.

        Args:
            lr: The learning rate of the rest.

        Returns:
            Groups for a `torch.optim` optimizer.
        """
        return []

    def visit(self, epoch: int, images: Any) -> Tensor | None:
        """Before an epoch: choose which images it visits, in which order, and how often.

        The answer must follow from the arguments, `seed` and what `state_dict` holds: a resumed
        epoch asks again.

        Args:
            epoch: From 0.
            images: The training images: `targets` (N,), int64 with -1 where one is not known, and a
                length.

        Returns:
            Positions, int64 (n,); None for the usual order.
        """
        return None

    def again(self, closure: Callable[[], None]) -> None:
        """Between the backward and the optimizer step: the gradients are those of the step,
        unscaled, and may be replaced by others at other weights.

        Args:
            closure: Clears the gradients, and runs the forward, loss and backward of the same batch
                once more, with the random numbers of the first time, at the weights there are when
                it is called.
        """

    def served(self) -> AbstractContextManager[Any]:
        """Return a context in which the model answers: an evaluation, a measurement, serving.

        What it changes on the model (averaged weights, other statistics) it takes back at its end,
        bit for bit; what is to stay in the model it leaves in `merge`.
        """
        return nullcontext()

    def step_end(self) -> None:
        """After the optimizer step."""

    def epoch_end(self) -> None:
        """After an epoch."""

    def begin_experience(self, experience: Experience) -> None:
        """Before training on an experience, and before its optimizer is built: parameters may be
        added here, named in `trainable`.

        A resumed run calls it for each experience so far, in order, without training, and then
        loads the state: what it adds must depend on the experiences alone, and nothing may be added
        elsewhere.

        Args:
            experience: The experience to come.
        """

    def replacement_blocker(self, path: str) -> str:
        """Say what this technique knows of a module that a new one at its path (a larger
        classifier) would not have; asked when somebody has replaced it.

        The default speaks for techniques that are nothing but names of parameters.

        Args:
            path: Of the module.

        Returns:
            A reason; "" where nothing hangs on the old module: the new one's parameters then
            replace its parameters in `trainable`.
        """
        return "" if type(self) is Installed else "what it keeps may hang on the one that was there"

    def eval_experience(self, experience: Experience | None) -> None:
        """Before an evaluation that says which task its images are of.

        Args:
            experience: The experience; None where the test does not say, or the evaluation is over.
        """

    def end_experience(self, loader: Any) -> None:
        """At a task boundary.

        Args:
            loader: Yields (x, y) of the finished experience.
        """

    def calibrate(self, loader: Any) -> Mapping[str, Any]:
        """Choose, after training, what is to be chosen on images that no training step has seen;
        called where `calibrates`.

        Args:
            loader: Yields their (x, y).

        Returns:
            Facts for the run record.
        """
        return {}

    def choices(self) -> Mapping[str, Sequence[int]]:
        """Return settings of the structure that a search may choose (`search:` of an arm).

        Returns:
            The values of each, by name.
        """
        return {}

    def chosen(self) -> Mapping[str, int]:
        """Return the values that `choices` has now, by name."""
        return {}

    def choose(self, values: Mapping[str, int], trial: bool) -> None:
        """Set what `choices` names.

        Args:
            values: By name.
            trial: Whether it is one of a search, which nothing else is to change meanwhile; else
                the training proper begins with it.
        """

    def operating_points(self) -> Mapping[str, AbstractContextManager[dict[str, Any]]]:
        """Return settings between which the finished model can be switched without training, for a
        report to compare.

        Returns:
            New contexts by name. A setting holds within its context; the context yields facts of
            what was answered within: lists of counts ("exits": how many samples left where), and
            numbers that are means per image. Under "answer" it may say how a stream of batches is
            answered: an iterator of images to one of their logits, in order.
        """
        return {}

    def facts(self) -> Mapping[str, Any]:
        """Return what the run record should say of this technique's work, once training has ended.

        Returns:
            Facts by name.
        """
        return {}

    def state_dict(self) -> dict[str, Tensor]:
        """Return state that is not among the model's parameters and buffers (a replay buffer, a
        running mean).

        Returns:
            Tensors by name.
        """
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Load what `state_dict` returned.

        Args:
            state: Tensors by name.

        Raises:
            GreenvisError: Where this technique has no such state.
        """
        if state:
            raise GreenvisError(
                f"{type(self).__name__} holds no state of its own, but was given {sorted(state)}"
            )

    def merge(self) -> None:
        """Fold the change into the model's own weights; the default is right where nothing was
        added.

        Called by `Wrapped.merge` when the model has its own structure back (the plain modules, with
        the weights they have now), so a technique that added modules keeps references to them to
        fold from.
        """

    def undo(self) -> None:
        """Release what lies outside the model (files, a teacher's hooks). `wrap` restores the model
        itself."""


def _warn(text: str) -> None:
    warnings.warn(text, stacklevel=4)
