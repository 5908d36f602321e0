"""A data set in its roles: what is learned from, with and without labels, and what is tested on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from greenvis.data.captions import Vocabulary
from greenvis.data.image_set import ImageSet


@dataclass(frozen=True)
class Data:
    """A data set, ready: `train` is augmented as asked, `test` never.

    Attributes:
        name: As in the recipe.
        train: What is trained on with labels.
        test: What no training sees; the first of `tests`, where there are several.
        classes: Names, by label.
        checksum: sha256 over what was read.
        only: The classes that the recipe chose, as it wrote them.
        held_out: Training images that no training sees, to choose on; shown as the test is.
        unlabeled: Images to learn from without labels, all -1; no image of `train`.
        target: Images of the domain to adapt to, likewise.
        tests: Tests by name; empty where there is one without a name.
        truth: The labels of `train` before noise, for reports alone; None where there is none.
        words: How texts become tokens, where images have texts.
        settings: What the recipe says of roles, for the record.
        skipped: What is broken and was left out, a line each.
    """

    name: str
    train: ImageSet
    test: ImageSet
    classes: tuple[str, ...]
    checksum: str
    only: Sequence[str | int] | None = None
    held_out: ImageSet | None = None
    unlabeled: ImageSet | None = None
    target: ImageSet | None = None
    tests: Mapping[str, ImageSet] = field(default_factory=dict)
    truth: Tensor | None = None
    words: Vocabulary | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    skipped: tuple[str, ...] = ()

    @property
    def img_size(self) -> int:
        """Side of the images in pixels."""
        return self.train.transform.img_size

    @property
    def in_chans(self) -> int:
        """Channels: 1 or 3."""
        return self.train.transform.in_chans

    @property
    def inputs(self) -> dict[str, Any]:
        """What a model trained on it knows (`models.describe`)."""
        form = self.train.transform
        reads = {} if self.words is None else {"words": self.words.words}
        return {"mean": form.mean, "std": form.std, "classes": self.classes, **reads}

    def facts(self) -> dict[str, Any]:
        """Return what a run record says about its data; `classes` and roles are counts. The same
        for every seed."""
        t = self.train.transform
        counts = {"train": len(self.train), "test": len(self.test), "classes": len(self.classes)}
        form = {
            "img_size": t.img_size,
            "in_chans": t.in_chans,
            "augment": t.augment,
            "views": t.views,
        }
        roles = {role: getattr(self, role) for role in ("held_out", "unlabeled", "target")}
        return {
            "name": self.name,
            "checksum": self.checksum,
            **counts,
            **form,
            "mean": list(t.mean),
            "std": list(t.std),
            "seed": t.seed,
            "only": None if self.only is None else list(self.only),
            **{role: len(images) for role, images in roles.items() if images is not None},
            **({"tests": {name: len(s) for name, s in self.tests.items()}} if self.tests else {}),
            **({"roles": dict(self.settings)} if self.settings else {}),
            **({"skipped": list(self.skipped)} if self.skipped else {}),
        }
