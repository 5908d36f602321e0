"""A finished run taken up again: its model, and the data it was trained on."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import nn

from greenvis import data, models
from greenvis.core import files, yamlfile
from greenvis.core.validation import explain
from greenvis.data import assignment, images, loading
from greenvis.data.splits import UNKNOWN, Split
from greenvis.data.transforms import Transform
from greenvis.errors import BadInput
from greenvis.experiment import answers, lineage
from greenvis.experiment.recipe import Arm, Recipe
from greenvis.experiment.run_folder import ROUNDS_FILE

BATCH = 256


@dataclass(frozen=True)
class OwnImages:
    """Images of a folder, as a run's model is shown them.

    Attributes:
        images: The images; their label is -1 where no class folder says it.
        paths: Their files.
        skipped: What could not be read, a line each.
    """

    images: data.ImageSet
    paths: list[Path]
    skipped: list[str]


class Saved:
    """A finished run.

    Args:
        run: Its folder, runs/RECIPE/ARM/seed0, or its model's file.
        trust: Whether references may import code.

    Raises:
        BadInput: Where there is no model with a card, or it answers for no classes.
    """

    def __init__(self, run: str | Path, trust: bool = False) -> None:
        self.card = lineage.read_card(run)
        self.trust, self.file = trust, Path(self.card["file"])
        if self.arm.task.form != "classification":
            raise BadInput(
                f"{self.file} answers for {self.arm.task.name}; this works with classes of images"
            )

    @cached_property
    def recipe(self) -> Recipe:
        """As its card has it; paths in it are relative to the folder one works in."""
        source = yamlfile.parse(self.card.get("recipe", ""), f"{self.file}: the recipe in its card")
        try:
            return Recipe(**source)
        except (TypeError, ValidationError) as error:
            where = f"{self.file}: the recipe in its card"
            if isinstance(error, TypeError):
                raise BadInput(f"{where} is none") from error
            raise BadInput(explain(error, Recipe, lambda *key: where, ())) from error

    @cached_property
    def arm(self) -> Arm:
        """Its arm of the recipe."""
        name = self.card["arm"].rpartition("/")[2]
        if name not in self.recipe.arms:
            raise BadInput(f"{self.file}: the recipe in its card has no arm '{name}'")
        return self.recipe.arm(name)

    @cached_property
    def model(self) -> nn.Module:
        """As it was saved, in eval mode."""
        return models.build(f"file:{self.file.resolve()}", trust=self.trust).eval()

    @property
    def classes(self) -> tuple[str, ...]:
        """Names, in the order of its logits; numbers where it knows none."""
        known = models.description(self.model)["classes"]
        return tuple(known or map(str, range((self.card.get("data") or {}).get("classes") or 0)))

    @cached_property
    def pool(self) -> data.Data:
        """Its data set, read anew, all of its training images labelled.

        Raises:
            BadInput: Where it cannot be read from here.
        """
        try:
            return loading.read(self.arm.data.pool(), ".")
        except BadInput as error:
            raise BadInput(
                f"the data that {self.file.parent} was trained on cannot be read: {error} (paths "
                "in a recipe are relative to it: work in its folder)"
            ) from error

    @cached_property
    def data(self) -> data.Data:
        """Its data, each image in the role it had."""
        return assignment.assign(self.pool, self.arm.data, self.card["seed"])

    def labelled(self) -> data.ImageSet:
        """Return the images whose labels it learned from."""
        if self.arm.active is None:
            return self.data.train
        return self.data.train.take(sorted(self._bought()))

    def unlabelled(self) -> data.ImageSet:
        """Return its training images that have no label yet.

        Raises:
            BadInput: Where each has one.
        """
        if self.arm.active is not None:
            bought = self._bought()
            rows = [row for row in range(len(self.data.train)) if row not in bought]
            rest = self.data.train.take(rows)
        else:
            spec = self.arm.data.model_copy(update={"unlabeled": "rest"})
            if self.arm.data.labels is None:
                raise BadInput(
                    f"all images that {self.file.parent} was trained on have a label: name a "
                    "folder of others (--images)"
                )
            rest = assignment.assign(self.pool, spec, self.card["seed"]).unlabeled
        assert rest is not None
        return rest.plain().unlabeled()

    def _bought(self) -> set[int]:
        """Return the positions in the pool whose labels its run bought."""
        lists = sorted(self.file.parent.glob("*-" + ROUNDS_FILE))
        if len(lists) != 1:
            raise BadInput(
                f"{self.file.parent} has {len(lists)} lists of the labels its run bought "
                f"(*-{ROUNDS_FILE}), not one"
            )
        try:
            rounds = files.read_json(lists[0], "list of labels bought")["rounds"]
            rows = {int(row) for own in rounds for row in own}
        except (KeyError, TypeError, ValueError) as error:
            raise BadInput(f"{lists[0]} is no list of labels bought ({error})") from error
        if not all(0 <= row < len(self.data.train) for row in rows):
            raise BadInput(f"{lists[0]} names images that its data does not have")
        return rows

    def own_images(self, folder: str | Path) -> OwnImages:
        """Return the images below a folder.

        Args:
            folder: Of images, in class folders or not.

        Raises:
            BadInput: Where there is none, or none that can be read.
        """
        root = Path(folder)
        paths, skipped = images.readable(root)
        names = {name: number for number, name in enumerate(self.classes)}
        labels = [names.get(path.relative_to(root).parts[0], UNKNOWN) for path in paths]
        split = Split(images.lazy(paths), torch.tensor(labels))
        return OwnImages(
            data.ImageSet(split, torch.arange(len(paths)), self._form()), paths, skipped
        )

    def _form(self) -> Transform:
        """Return how the model is shown images."""
        facts, pixels = self.card.get("data") or {}, models.description(self.model)
        size, channels = facts.get("img_size"), facts.get("in_chans")
        if size is None or channels is None:
            raise BadInput(f"{self.file} does not say which images it was trained on")
        form = Transform(int(size), int(channels))
        if pixels["mean"] is None:
            return form
        return replace(form, mean=tuple(pixels["mean"]), std=tuple(pixels["std"]))

    def answers(self, shown: data.ImageSet, features: bool = False) -> answers.Answers:
        """Return what its model answers to images, shown without augmentation."""
        batches: Any = data.batches(shown.plain(), BATCH)
        return answers.answers(self.model, batches, self.arm.task, features)
