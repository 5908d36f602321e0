"""A recipe, section by section: YAML -> validated `Recipe`. Every error names file:line and the
nearest valid name; nothing here imports torch.

A new key is a field of its section: `data` and `data.stream` stand in `data`, `model` and `serve`
in `model`, `train`, `stages` and `search` in `train`, `subset`, `synthesis` and `active` in
`images`, `report` and `meter` in `report`, `frontier` in `frontier`; a new section is a class of
its own and a field of `arms.ArmSpec` or `recipe.Recipe`. What is wrong between two keys is said in
`checks`.
"""

from greenvis.experiment.recipe.arms import Arm, ArmSpec
from greenvis.experiment.recipe.data import ARM_DATA, DataSpec, StreamSpec
from greenvis.experiment.recipe.frontier import FrontierSpec
from greenvis.experiment.recipe.images import ActiveSpec, SubsetSpec, SynthesisSpec
from greenvis.experiment.recipe.model import ModelSpec, ServeSpec
from greenvis.experiment.recipe.recipe import Recipe, load_recipe, parse_techniques, schema
from greenvis.experiment.recipe.report import MeterSpec, ReportSpec
from greenvis.experiment.recipe.train import UNHASHED, SearchSpec, StageSpec, TrainSpec

__all__ = [
    "ARM_DATA",
    "UNHASHED",
    "ActiveSpec",
    "Arm",
    "ArmSpec",
    "DataSpec",
    "FrontierSpec",
    "MeterSpec",
    "ModelSpec",
    "Recipe",
    "ReportSpec",
    "SearchSpec",
    "ServeSpec",
    "StageSpec",
    "StreamSpec",
    "SubsetSpec",
    "SynthesisSpec",
    "TrainSpec",
    "load_recipe",
    "parse_techniques",
    "schema",
]
