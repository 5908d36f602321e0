"""Linear probing: train the classifier on the features of a frozen model."""

from __future__ import annotations

from torch import nn

from greenvis.core.technique import InputShape, Installed, PrefixCache, Technique
from greenvis.models.structure import view
from greenvis.tasks.answers import IMAGES
from greenvis.techniques._shared.attach import train_only
from greenvis.techniques.iteration.peft._frozen_prefix import InstalledPrefix


class LinearProbe(Technique):
    """Train only the classifier; all below is frozen, its batch norms held (the baseline any
    adaptation must beat).

    A classifier of several layers trains whole (VGG's three, too: freeze the first ones before, and
    they stay frozen).

    Saves the whole backward but the head's, and all optimizer memory but the head's. Costs accuracy
    where the features do not fit the task. Dropout and stochastic depth of the frozen part stay as
    `model.train()` sets them; with `cache`, all but
    the classifier runs in eval, and its forward, too, is saved from the second time on that a
    version of an image is seen: what enters the classifier is kept on disk. In a loop of one's own,
    `Wrapped.set_samples` says which samples a batch holds.

    Example:
        >>> live = gv.wrap(model, gv.LinearProbe())
        >>> sorted(live.trainable)
        ['head.bias', 'head.weight']
    """

    name = "linear_probe"
    stage = "weights"
    examples = ({}, {"cache": True})

    cache: PrefixCache = False
    input_shape: InputShape = None

    @property
    def tasks(self) -> frozenset[str] | None:  # type: ignore[override]
        """What it is right for: what is cached is what batches of images give."""
        return IMAGES if self.cache else None

    def install(self, model: nn.Module) -> Installed:
        """Freeze all but the classifier. Raises BadInput for a model without one."""
        structure = view(model, self.input_shape, probe=False)
        structure.role("head")  # refuses a model that shows none
        names = train_only(model, [], structure, "train")
        if self.cache:
            return InstalledPrefix(model, names, structure.example, self.cache)
        return Installed(names, freezes=True)
