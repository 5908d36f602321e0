"""What a recipe means in work: one job an arm and seed, what each builds on, and what it leaves
when done."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from greenvis import data, models
from greenvis.core import files, weights
from greenvis.core.technique import Technique
from greenvis.data import assignment, loading
from greenvis.errors import BadInput, nearest
from greenvis.experiment.recipe import Arm, Recipe, load_recipe
from greenvis.experiment.run_folder import (
    BOUNDARY,
    CHECKPOINT_FILE,
    DONE_FILE,
    PLAN_FILE,
    ROUNDS_FILE,
    SEARCH_FILE,
    SUBSET_FILE,
    SYNTHESIS_FILE,
    WEIGHTS_FILE,
    write_json,
)
from greenvis.meters.header import versions
from greenvis.tasks.base import Task


@dataclass(frozen=True)
class Job:
    """One arm with one seed: the unit that is trained, skipped or resumed."""

    recipe: Recipe
    arm: Arm
    seed: int
    folder: Path
    inputs: str
    uses: dict[str, Job]  # by reference, "run:NAME"

    @property
    def name(self) -> str:
        """How reports call it."""
        return f"{self.recipe.name}/{self.arm.name}"

    def caches(self, runs: Path) -> Path:
        """Return the folder below which it keeps outputs of frozen parts: its own, or that of all
        runs."""
        return self.folder if self.recipe.meter.own_caches else runs

    def done(self) -> dict[str, Any] | None:
        """Return what its finished run left, or None where it is yet to run, ran with other inputs,
        or left other weights."""
        left = self._done_entry()
        return left if left is not None and self._has_weights_of(left) else None

    def spoiled(self) -> bool:
        """Whether it was done once, but its weights are no longer those that its run left."""
        left = self._done_entry()
        return left is not None and not self._has_weights_of(left)

    def finished(self, run: str) -> None:
        """Mark it as done. The mark names run and weights: a process killed before leaves a mark
        that fits neither."""
        digest = _digest(self.folder / WEIGHTS_FILE)
        entry = {
            "inputs": self.inputs, "run": run, "weights": digest, "versions": versions(),
            "seeds": self._seeds(),
        }  # fmt: skip
        write_json(self.folder / DONE_FILE, entry)

    def other_versions(self) -> str:
        """Return in words which libraries its finished run had in other versions than there are
        now; "" where none."""
        then = (self._done_entry() or {}).get("versions")
        then, now = then if isinstance(then, dict) else {}, versions()
        return ", ".join(
            f"{name} {then[name]} then, {now[name]} now"
            for name in now
            if then.get(name, now[name]) != now[name]
        )

    def _done_entry(self) -> dict[str, Any] | None:
        left = _mark(self.folder / DONE_FILE)
        if left.get("inputs") != self.inputs:
            return None
        return left if left.get("seeds", self._seeds()) == self._seeds() else None

    def _seeds(self) -> dict[str, int]:
        """Return which seed of each it builds on: its own, where that arm has it."""
        return {ref: used.seed for ref, used in self.uses.items()}

    def _has_weights_of(self, entry: dict[str, Any]) -> bool:
        path = self.folder / WEIGHTS_FILE
        try:
            if "weights" in entry:
                return _digest(path) == entry["weights"]
            # of an earlier greenvis, which noted no digest: at least it is whole
            weights.metadata(path)
        except (OSError, BadInput):
            return False
        return True


class Jobs:
    """The jobs of one call: recipes read once, data loaded once."""

    def __init__(self, runs: Path) -> None:
        self.runs = runs
        self._pools: dict[tuple[data.DataSpec, Path], data.Data] = {}
        self._data: dict[tuple[data.DataSpec, Path, int], data.Data] = {}
        self._recipes: dict[Path, Recipe] = {}
        self._jobs: dict[tuple[str, str, int], Job] = {}

    def of(self, recipe: Recipe) -> list[Job]:
        """Return the recipe's jobs, each after those it builds on. Seeds interleave the arms.
        Raises BadInput."""
        self._recipes[recipe.path.resolve()] = recipe
        arms = [recipe.arm(name) for name in recipe.arms]
        ordered: dict[int, Job] = {}
        for seed in dict.fromkeys(seed for arm in arms for seed in arm.train.seeds):
            for arm in arms:
                if seed in arm.train.seeds:
                    ordered.update(
                        (id(job), job) for job in _with_needs(self._job(recipe, arm, seed, ()))
                    )
        return list(ordered.values())

    def images(self, recipe: Recipe, arm: Arm, seed: int) -> data.Data:
        """Return an arm's data in its roles, read once for all arms and drawn once for each
        seed."""
        where, folder = recipe.where("data", "name"), recipe.folder.resolve()
        spec = arm.data.model_copy(update={"stream": None})
        key = (spec, folder, seed if spec.roles() else 0)
        if key not in self._data:
            pool = (spec.pool(), folder)
            if pool not in self._pools:
                self._pools[pool] = located(where, loading.read, spec.pool(), recipe.folder)
            self._data[key] = located(where, assignment.assign, self._pools[pool], spec, seed)
        return self._data[key]

    def _job(self, recipe: Recipe, arm: Arm, seed: int, above: tuple[str, ...]) -> Job:
        name = f"{recipe.name}/{arm.name}"
        if name in above:
            raise BadInput(
                f"{recipe.where('arms', arm.name)}: arms build on each other in a circle: "
                f"{' -> '.join((*above, name))}"
            )
        key = (str(recipe.path.resolve()), arm.name, seed)
        if key not in self._jobs:
            uses = {
                ref: self._needed(recipe, arm, ref, seed, (*above, name)) for ref in arm.needs()
            }
            # left out: what runs were known by before there was a choice
            usual: dict[str, Any] = {"classifier": "new", "fold_norms": False}
            usual |= {"average": (), "average_norms": "mean"}
            inputs = {
                "data": self.images(recipe, arm, seed).facts(),
                "model": arm.model.model_dump(
                    exclude={f for f, value in usual.items() if getattr(arm.model, f) == value}
                ),
                "train": arm.train.inputs(),
                "techniques": [{t.name: t.recipe_form()} for t in arm.techniques],
            }
            if task := _unusual(arm.task):
                inputs["task"] = task
            if arm.stream is not None:
                inputs["stream"] = arm.stream.model_dump()
            if arm.serve is not None:
                inputs["serve"] = arm.serve.model_dump()
            if arm.subset is not None:
                inputs["subset"] = arm.subset.model_dump()
            if arm.synthesis is not None:
                file = recipe.folder / (arm.synthesis.layout or "")
                digest = _digest(file) if file.is_file() else None
                inputs["synthesis"] = {**arm.synthesis.model_dump(), "file": digest}
            if arm.active is not None:
                inputs["active"] = arm.active.model_dump()
            if arm.search is not None:
                inputs["search"] = arm.search.model_dump()
            if arm.stages:
                inputs["stages"] = [_stage(stage) for stage in arm.stages]
            if weight_files := model_files(arm, recipe.folder):
                inputs["files"] = [file.is_file() and _digest(file) for _, file in weight_files]
            folder = self.runs / recipe.name / arm.name / f"seed{seed}"
            known_as = _known_as(inputs, uses, folder)
            self._jobs[key] = Job(recipe, arm, seed, folder, known_as, uses)
        return self._jobs[key]

    def _needed(self, recipe: Recipe, arm: Arm, ref: str, seed: int, above: tuple[str, ...]) -> Job:
        """Return the job that "run:NAME" means: an arm of this recipe, or of the recipe NAME.yaml
        beside it ("NAME/ARM")."""
        name_wanted = ref.removeprefix("run:")
        if name_wanted in recipe.arms:
            other, name = recipe, name_wanted
        else:
            stem, _, name = name_wanted.partition("/")
            path = recipe.folder / f"{stem}.yaml"
            if not path.is_file():
                names = [*recipe.arms, *(p.stem for p in recipe.folder.glob("*.yaml"))]
                raise BadInput(
                    f"{recipe.where('arms', arm.name)}: '{ref}' is neither an arm of this recipe "
                    f"nor a recipe {path}{nearest(name_wanted, names)}"
                )
            other = self._recipes.setdefault(path.resolve(), load_recipe(path))
            name = name or other.baseline
            if name not in other.arms:
                raise BadInput(
                    f"{recipe.where('arms', arm.name)}: recipe {path} has no arm "
                    f"'{name}'{nearest(name, other.arms)}"
                )
        base = other.arm(name)
        return self._job(
            other, base, seed if seed in base.train.seeds else base.train.seeds[0], above
        )


def model_files(arm: Arm, folder: Path) -> list[tuple[str, Path]]:
    """Return the files of models an arm begins with, "file:PATH" in its recipe, as (role, path)."""
    named: list[tuple[str, Any]] = [("base", ref) for ref in (*arm.model.starts, arm.model.ref)]
    named += [
        (t.role, value)
        for one in (arm, *arm.stages)
        for t in one.techniques
        for value in t.recipe_form().values()
    ]
    refs = [
        (role, ref)
        for role, reference in named
        for ref in (reference if isinstance(reference, list) else [reference])
    ]
    return [
        (role, models.file_of(ref, folder))
        for role, ref in refs
        if isinstance(ref, str) and ref.startswith("file:")
    ]


def placed(technique: Technique, folder: Path) -> Technique:
    """Return the request with the folder before each "file:PATH": paths in a recipe are relative to
    it."""

    def full(value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return type(value)(map(full, value))
        return (
            f"file:{models.file_of(value, folder)}"
            if isinstance(value, str) and value.startswith("file:")
            else value
        )

    files_named = {
        name: (value, full(value))
        for name, value in technique
        if isinstance(value, (str, list, tuple))
    }
    return technique.model_copy(
        update={name: new for name, (old, new) in files_named.items() if new != old}
    )


def _digest(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _known_as(inputs: dict[str, Any], uses: dict[str, Job], folder: Path) -> str:
    """Return what an arm's runs are known by: one name for all of its seeds.

    Earlier versions put the seeds of its bases into it. An arm with runs that finished then keeps
    that name.
    """

    def name(used: dict[str, Any]) -> str:
        text = json.dumps(inputs | {"uses": used}, sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    now = name({ref: used.inputs for ref, used in uses.items()})
    then = name({ref: [used.inputs, used.arm.train.seeds] for ref, used in uses.items()})
    finished = {_mark(path).get("inputs") for path in folder.parent.glob(f"seed*/{DONE_FILE}")}
    return then if then in finished and now not in finished else now


def _mark(path: Path) -> dict[str, Any]:
    """Return the mark of a finished run; empty where there is none that can be read."""
    try:
        left = files.read_json(path, "mark of a finished run")
    except BadInput:
        return {}
    return left if isinstance(left, dict) else {}


def _unusual(task: Task) -> dict[str, Any]:
    """Return a task as a recipe writes it; empty where it is what all recipes had before there was
    a choice."""
    form = {task.name: task.model_dump(mode="json", exclude_defaults=True)}
    return {} if form == {"classification": {}} else form


def _stage(stage: Arm) -> dict[str, Any]:
    made = [{t.name: t.recipe_form()} for t in stage.techniques]
    return ({"on": stage.on} if stage.on else {}) | {
        "name": stage.stage,
        "train": stage.train.inputs(),
        "techniques": made,
        "layers": stage.layers,
    }


def _with_needs(job: Job) -> Iterator[Job]:
    for used in job.uses.values():
        yield from _with_needs(used)
    yield job


def located(where: str, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call, and put "file:line" before a BadInput."""
    try:
        return call(*args, **kwargs)
    except BadInput as error:
        raise BadInput(f"{where}: {error}") from error


def predicted(job: Job) -> dict[str, Any] | None:
    """Return what `greenvis plan` said of a job like this one, if it was asked: observations,
    {"value", "low", "high"} each."""
    try:
        arm = files.read_json(job.folder.parent.parent / PLAN_FILE, "plan")["arms"][job.name]
        return arm["each"] if arm["inputs"] == job.inputs else None
    except (BadInput, KeyError, TypeError):
        return None


def forget(job: Job, done: bool = True) -> None:
    """Remove checkpoints and, with `done`, make the job run again; its records stay, for energy
    once spent stays spent."""
    if done:
        (job.folder / DONE_FILE).unlink(missing_ok=True)
    made = (SUBSET_FILE, SYNTHESIS_FILE, ROUNDS_FILE, SEARCH_FILE) if done else ()
    for name in (CHECKPOINT_FILE, BOUNDARY, *made):
        for checkpoint in job.folder.glob("*-" + name):
            checkpoint.unlink()
