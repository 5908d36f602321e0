"""What a technique may do beside a step's terms, and what a loop calls for it: a second stream of
images, the images of an epoch, the backward again, another state to answer in."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from greenvis.core import distributed
from greenvis.core.feeds import Feeds
from greenvis.core.modes import learning
from greenvis.core.owners import Owners
from greenvis.core.technique import Installed, Technique
from greenvis.errors import BadInput, GreenvisError, nearest, some
from greenvis.tasks import answers

# optional seams that are refused where several processes train, and what a technique does by each
SINGLE_PROCESS = {
    "again": "runs the backward of each step again",
    "visit": "chooses the images of each epoch",
    "wants": "draws from a second stream of images",
    "adapts": "learns while it answers",
    "by_domain": "compares the domains in a batch",
    "assesses": "asks for the loss on images held out",
}

# optional seams that at most one technique may use, and what several would do
EXCLUSIVE = {
    "again": "run the backward of a step again, at weights of their own",
    "visit": "choose the images of an epoch",
}


def uses(live: Installed, seam: str) -> bool:
    """Whether a live change has an optional seam of its own."""
    if not callable(getattr(Installed, seam)):
        return bool(getattr(live, seam))
    return getattr(type(live), seam) is not getattr(Installed, seam)


def of_known(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return a loss of classes that leaves out the images whose label is -1, which techniques put
    into the batch; 0, with a graph, where none is left."""

    def known(logits: Any, y: Any = None, *rest: Any, **more: Any) -> Tensor:
        if not answers.is_tensor(y) or y.dim() != 1 or y.is_floating_point():
            return loss(logits, y, *rest, **more)
        rows = y != answers.UNKNOWN
        if rows.all():
            return loss(logits, y, *rest, **more)
        if not rows.any():
            return 0.0 * answers.logits_of(logits).sum()
        return loss(answers.logits_of(logits)[rows], y[rows], *rest, **more)

    return known


class Seams(Owners):
    """The part of a wrapped model that serves the optional seams of its techniques."""

    techniques: tuple[Technique, ...]
    installed: list[Installed]

    def __init__(self) -> None:
        super().__init__()
        self.feeds = Feeds()
        self._random: Any = None  # the random state that a step's forward begins with
        self._repeated = False  # whether `again` was called in this step
        self._visited = False  # whether the loop asked which images to visit
        self._serving = False  # whether a `served` is open

    if TYPE_CHECKING:

        @property
        def active(self) -> bool: ...

    def using(self, seam: str) -> list[tuple[Technique, Installed]]:
        """Return the techniques, and their live changes, that use an optional seam."""
        return [(t, live) for t, live in self._pairs() if uses(live, seam)]

    def refuse_processes(self) -> None:
        """Raise BadInput where several processes train, and a technique uses a seam that is not
        right there."""
        if distributed.world_size() == 1:
            return
        for seam, what in SINGLE_PROCESS.items():
            if users := self.using(seam):
                raise BadInput(
                    f"'{users[0][0].name}' {what}, which is not right yet where several processes "
                    "train: train as one process"
                )

    def visit(self, epoch: int, images: Any) -> Tensor | None:
        """Return which images an epoch visits, where a technique chooses; call before each epoch.

        Args:
            epoch: From 0.
            images: The training data set, with its labels in `targets`, (N,).

        Returns:
            Positions in `images`, int64 (n,), in the order to show them, such as for
            `DataLoader(images, sampler=positions.tolist())`; None for the loop's own order.

        Raises:
            BadInput: Where the images do not say what they are of, or several processes train.
        """
        self.refuse_processes()
        self._visited = True
        for technique, live in self.using("visit"):
            targets: Any = getattr(images, "targets", None)
            if not hasattr(targets, "__len__") or len(targets) != len(images):
                raise BadInput(
                    f"'{technique.name}' chooses images by their labels, and this "
                    f"{type(images).__name__} shows none: give it `targets`, (images,)"
                )
            return live.visit(epoch, images)
        return None

    @property
    def wanted(self) -> dict[str, str]:
        """The streams of images that techniques draw from, each with the technique that does."""
        return {name: t.name for t, live in self.using("wants") for name in live.wants}

    def feed(self, **streams: Any) -> None:
        """Give the techniques second streams of images to draw from; before the first step.

        Args:
            streams: Loaders of images, or of (images, …), under "unlabeled" or "target"; with the
                labelled loader's batch size. They are begun again when they end.

        Raises:
            BadInput: For another name, one that no technique wants, or a loader that can be gone
                through once only.
        """
        for name, loader in streams.items():
            if name not in self.wanted:
                raise BadInput(
                    f"no technique of this model draws from '{name}'"
                    f"{nearest(name, self.wanted)} leave it out"
                )
            self.feeds.add(name, loader)

    @contextmanager
    def served(self) -> Iterator[nn.Module]:
        """Hold the model within as it is to answer: with averaged weights, other statistics, or
        learning as it goes, where a technique says so. Afterwards it is as before, bit for bit.

        Yields:
            The model. Put it into eval mode and call it.
        """
        if self._serving or not self.active:  # merged, it is so for good
            yield self.model
            return
        self._serving = True
        try:
            with ExitStack() as stack:
                with torch.inference_mode(False):  # what is set up here outlives the mode
                    for _, live in self.using("served"):
                        stack.enter_context(live.served())
                if self.using("adapts"):
                    stack.enter_context(learning(self.model))
                yield self.model
        finally:
            self._serving = False

    def again(self, closure: Callable[[], Any]) -> None:
        """Call between the backward and the optimizer step, once the gradients are unscaled, where
        a technique may want the step's backward at other weights; nothing happens where none does.

        Args:
            closure: Runs forward, loss and backward of the same batch again (the batch that `batch`
                returned). Gradients are cleared, and the random state is that of the first time.

        Raises:
            BadInput: Where several processes train.
        """
        self.refuse_processes()
        self._repeated = True
        for _, live in self.using("again"):
            live.again(partial(self._repeat, closure))

    def _repeat(self, closure: Callable[[], Any]) -> None:
        for parameter in self.model.parameters():
            parameter.grad = None
        for live in self.installed:
            live.repeated = True
        try:
            with nullcontext() if self._random is None else self._random.again():
                closure()
        finally:
            for live in self.installed:
                live.repeated = False

    def check_offered(self) -> None:
        """Raise GreenvisError at a step's end where a technique wants the step's backward `again`,
        or to choose the images, and the loop did not offer it."""
        if (waiting := self.using("again")) and not self._repeated:
            raise GreenvisError(
                f"{some([t.name for t, _ in waiting])} runs the backward of each step again, and "
                "the loop does not offer it: call live.again(closure) between loss.backward() and "
                "optimizer.step(), where closure() runs forward, loss and backward of the batch"
            )
        if (choosing := self.using("visit")) and not self._visited:
            raise GreenvisError(
                f"{some([t.name for t, _ in choosing])} chooses the images of each epoch, and the "
                "loop does not ask: before an epoch call positions = live.visit(epoch, images) "
                "and show these: DataLoader(images, sampler=positions.tolist())"
            )
