"""YAML -> validated recipe."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import ConfigDict, Field, PrivateAttr, ValidationError

from greenvis.core import yamlfile
from greenvis.core.technique import Technique
from greenvis.core.validation import explain
from greenvis.core.yamlfile import Key
from greenvis.errors import BadInput, nearest
from greenvis.experiment.recipe import checks
from greenvis.experiment.recipe._section import Name, Section, Where, named, validated
from greenvis.experiment.recipe.arms import Arm, ArmSpec
from greenvis.experiment.recipe.data import ARM_DATA, DataSpec, StreamSpec
from greenvis.experiment.recipe.frontier import FrontierSpec, ladder
from greenvis.experiment.recipe.model import ModelSpec, ServeSpec
from greenvis.experiment.recipe.report import MeterSpec, ReportSpec
from greenvis.experiment.recipe.train import TrainSpec
from greenvis.tasks import registry as task_registry
from greenvis.techniques import registry


class Recipe(Section):
    """One runnable experiment: data, a model, how to train, and the arms to compare."""

    model_config = ConfigDict(protected_namespaces=())

    name: Annotated[Name, Field(description="also the folder of runs and report")]
    data: DataSpec
    model: ModelSpec
    task: Annotated[
        str | dict[str, dict[str, Any] | None],
        Field(description="what the model answers, by name, or {NAME: {its fields}}"),
    ] = "classification"
    train: TrainSpec = TrainSpec()
    serve: Annotated[
        ServeSpec | None, Field(description="how models are served; batches of 64 where absent")
    ] = None
    arms: Annotated[dict[Name, ArmSpec], Field(min_length=1)]
    frontier: FrontierSpec | None = Field(
        default=None, description="plain arms that savings are read against; {} for the usual ones"
    )
    report: ReportSpec = ReportSpec()
    meter: MeterSpec = MeterSpec()

    _path: Path = PrivateAttr(default=Path("recipe"))
    _source: dict[str, Any] = PrivateAttr(default_factory=dict)
    _lines: dict[Key, str] = PrivateAttr(default_factory=dict)

    @property
    def folder(self) -> Path:
        """Paths in the recipe are relative to this folder."""
        return self._path.parent

    @property
    def path(self) -> Path:
        """The recipe's file."""
        return self._path

    @property
    def baseline(self) -> str:
        """The arm the others are measured against."""
        return self.report.baseline or next(iter(self.arms))

    def text(self) -> str:
        """Return the recipe as YAML with inheritance and overrides applied: enough to run it
        again."""
        return yaml.safe_dump(self._source, sort_keys=False, allow_unicode=True)

    def where(self, *key: str | int) -> str:
        """Return "file:line" of a key, or of the nearest one above it."""
        for end in range(len(key), -1, -1):
            if key[:end] in self._lines:
                return self._lines[key[:end]]
        return str(self._path)

    def arm(self, name: str) -> Arm:
        """Return the arm with the recipe's own model and train filled in; a model of another `ref`
        inherits no options."""
        spec = self.arms[name]
        other = spec.model.get("ref", self.model.ref) != self.model.ref
        model = {**({} if other else self.model.model_dump(exclude_unset=True)), **spec.model}
        train = {**self.train.model_dump(exclude_unset=True), **spec.train}
        if spec.stream and self.data.stream is None:
            raise BadInput(
                f"{self.where('arms', name, 'stream')}: data.stream is missing, so there is "
                "nothing to change here"
            )
        own = self.data.stream and {
            **self.data.stream.model_dump(exclude_unset=True),
            **spec.stream,
        }
        at = ("arms", name, "techniques")
        techniques = tuple(
            named(registry.find, item, self.where, (*at, i))
            for i, item in enumerate(spec.techniques)
        )
        arm = Arm(
            name=name,
            data=self._arm_data(name),
            model=validated(ModelSpec, model, self.where, ("arms", name, "model")),
            task=named(task_registry.find, self.task, self.where, ("task",)),
            train=validated(TrainSpec, train, self.where, ("arms", name, "train")),
            techniques=techniques,
            stream=None
            if own is None
            else validated(StreamSpec, own, self.where, ("arms", name, "stream")),
            subset=spec.subset,
            synthesis=spec.synthesis,
            active=spec.active,
            search=spec.search,
            serve=spec.serve or self.serve,
        )
        checks.refuse_active(self, arm)
        checks.refuse_synthesis(self, arm)
        checks.refuse_search(self, arm)
        if arm.stream is not None and arm.subset is not None:
            raise BadInput(
                f"{self.where('arms', name, 'subset')}: an arm has a subset or data.stream, not "
                "both"
            )
        return arm.model_copy(update={"stages": self._stages(arm)})

    def _arm_data(self, name: str) -> DataSpec:
        """Return the recipe's data with the arm's own budgets."""
        own = self.arms[name].data
        if not own:
            return self.data
        at = ("arms", name, "data")
        if denied := [key for key in own if key in DataSpec.model_fields and key not in ARM_DATA]:
            raise BadInput(
                f"{self.where(*at, denied[0])}: data.{denied[0]} is the same for all arms, so that "
                f"they are tested on the same images; an arm may set {', '.join(ARM_DATA)}"
            )
        every = {**self.data.model_dump(exclude_unset=True), **own}
        return validated(DataSpec, every, self.where, at)

    def _stages(self, arm: Arm) -> tuple[Arm, ...]:
        """Return the arm's stages, each as an arm of its own."""
        specs, at = self.arms[arm.name].stages, ("arms", arm.name, "stages")
        for beside, present in (("techniques", arm.techniques), ("data.stream", arm.stream)):
            if specs and present:
                raise BadInput(
                    f"{self.where(*at)}: an arm has stages or {beside}, not both; a stage has its "
                    "own techniques"
                )
        out: list[Arm] = []
        for i, spec in enumerate(specs):
            stage = spec.name or f"stage{i + 1}"
            run_wide = sorted({"seeds", "threads"} & spec.train.keys())
            if run_wide or stage in [s.stage for s in out]:
                names = (
                    f"train.{run_wide[0]} belongs to the whole arm"
                    if run_wide
                    else f"a second stage is named '{stage}'"
                )
                raise BadInput(f"{self.where(*at, i)}: {names}")
            own = {**arm.train.model_dump(exclude_unset=True), **spec.train}
            made = [
                named(registry.find, item, self.where, (*at, i, "techniques", j))
                for j, item in enumerate(spec.techniques)
            ]
            train = validated(TrainSpec, own, self.where, (*at, i, "train"))
            update = {
                "stage": stage,
                "train": train,
                "techniques": tuple(made),
                "layers": spec.layers,
                "on": spec.on or "",
            }
            out.append(arm.model_copy(update=update))
        return tuple(out)


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe, its `extends:` parents and `overrides` ("train.epochs=3"), and check all of it
    but the files it names.

    Raises BadInput with file:line and the nearest right name.

    Example:
        >>> loaded = gv.load_recipe(recipe, ["train.epochs=3"])
        >>> loaded.train.epochs, list(loaded.arms)
        (3, ['plain', 'frozen'])
    """
    path = Path(path)
    source, lines = yamlfile.read(path)
    for text in overrides:
        yamlfile.override(source, lines, text)

    def where(*key: str | int) -> str:
        return next(
            (lines[key[:end]] for end in range(len(key), -1, -1) if key[:end] in lines), str(path)
        )

    checks.refuse_unknown_models(source, where)  # before techniques import torch
    try:
        recipe = Recipe(**source)
    except ValidationError as error:
        raise BadInput(explain(error, Recipe, where, ())) from error
    recipe._path, recipe._source, recipe._lines = path, source, lines
    for key, name in (("baseline", recipe.baseline), ("arm", recipe.report.arm)):
        if name is not None and name not in recipe.arms:
            raise BadInput(
                f"{where('report', key)}: report.{key} '{name}' is no arm"
                f"{nearest(name, recipe.arms)}"
            )
    if recipe.report.arm == recipe.baseline:
        raise BadInput(
            f"{where('report', 'arm')}: report.arm '{recipe.baseline}' is the baseline: name one "
            "that is compared with it"
        )
    if recipe.frontier is not None:
        recipe = _with_ladder(recipe)
    checks.refuse_idle(recipe)
    checks.refuse_unknown_metric(recipe)
    return recipe


def _with_ladder(recipe: Recipe) -> Recipe:
    """Return the recipe with the plain arms of its frontier."""
    rungs = {
        name: validated(ArmSpec, fields, recipe.where, ("frontier",))
        for name, fields in ladder(recipe).items()
    }
    return recipe.model_copy(update={"arms": {**recipe.arms, **rungs}})


def schema() -> dict[str, Any]:
    """Return the JSON Schema of a recipe, with that of each technique and task under `$defs`."""
    out = Recipe.model_json_schema()
    out["properties"]["extends"] = {
        "type": "string",
        "description": "a recipe to start from, relative to this one",
    }
    for name in registry.names():
        out.setdefault("$defs", {})[f"technique:{name}"] = registry.about(name)["schema"]
    for name in task_registry.names():
        out["$defs"][f"task:{name}"] = task_registry.find(name).model_json_schema()
    return out


def parse_techniques(text: str) -> list[Technique]:
    """Return techniques written as in a recipe, YAML or JSON: '[{lora: {rank: 8}}]'. Raises
    BadInput."""
    items = yamlfile.parse(text, "techniques")
    entries = items if isinstance(items, list) else [items]
    where: Where = lambda *key: "techniques"  # noqa: E731
    return [named(registry.find, item, where, (i,)) for i, item in enumerate(entries)]
