"""greenvis: make a vision model cheaper to train, adapt and run, and prove it. Imports are lazy: no torch here."""

from __future__ import annotations

import importlib
import sys
import types
from typing import TYPE_CHECKING, Any

from greenvis.errors import BadInput, GreenvisError

__version__ = "0.1.0"

if TYPE_CHECKING:
    from greenvis.experiment import run
    from greenvis.folding import fold_norms
    from greenvis.meters.track import track
    from greenvis.recipe import load_recipe
    from greenvis.report import report
    from greenvis.technique import Installed, Technique
    from greenvis.techniques.inference.distill import Distill
    from greenvis.techniques.inference.early_exit import EarlyExit
    from greenvis.techniques.inference.token_merge import TokenMerge
    from greenvis.techniques.inference.token_prune import TokenPrune
    from greenvis.techniques.iteration.adapter import Adapter
    from greenvis.techniques.iteration.adapter_probe import AdapterProbe
    from greenvis.techniques.iteration.bitfit import Bitfit
    from greenvis.techniques.iteration.feature_distill import FeatureDistill
    from greenvis.techniques.iteration.hat import Hat
    from greenvis.techniques.iteration.layer_decay import LayerDecay
    from greenvis.techniques.iteration.linear_probe import LinearProbe
    from greenvis.techniques.iteration.lora import Lora
    from greenvis.techniques.iteration.lora_stream import LoraStream
    from greenvis.techniques.iteration.lwf import Lwf
    from greenvis.techniques.iteration.mae import Mae
    from greenvis.techniques.iteration.ncm import Ncm
    from greenvis.techniques.iteration.norm_tune import NormTune
    from greenvis.techniques.iteration.packnet import PackNet
    from greenvis.techniques.iteration.partial import Partial
    from greenvis.techniques.iteration.pnn import Pnn
    from greenvis.techniques.iteration.prompt import Prompt
    from greenvis.techniques.iteration.prompt_pool import PromptPool
    from greenvis.techniques.iteration.regularize import Regularize
    from greenvis.techniques.iteration.replay import Replay
    from greenvis.techniques.iteration.reuse import Reuse
    from greenvis.techniques.iteration.rotation import Rotation
    from greenvis.techniques.iteration.side import Side
    from greenvis.techniques.iteration.simclr import Simclr
    from greenvis.wrap import Wrapped, wrap

_HOMES = {
    "wrap": "wrap",
    "Wrapped": "wrap",
    "track": "meters.track",
    "report": "report",
    "run": "experiment",
    "load_recipe": "recipe",
    "fold_norms": "folding",
    "Technique": "technique",
    "Installed": "technique",
}

__all__ = [
    "Adapter", "AdapterProbe", "BadInput", "Bitfit", "Distill", "EarlyExit", "FeatureDistill", "GreenvisError", "Hat",
    "Installed", "LayerDecay", "LinearProbe", "Lora", "LoraStream", "Lwf", "Mae", "Ncm", "NormTune", "PackNet", "Partial",
    "Pnn", "Prompt", "PromptPool", "Regularize", "Replay", "Reuse", "Rotation", "Side", "Simclr", "Technique", "TokenMerge",
    "TokenPrune", "Wrapped", "fold_norms", "load_recipe", "report", "run", "track", "wrap",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"greenvis.{_HOMES[name]}"), name)
    if name[:1].isupper():  # a technique class: gv.Lora, gv.Distill, and those of installed plug-ins
        registry = importlib.import_module("greenvis.registry")
        found = registry.find_class(name)
        if found is not None:
            return found
    raise AttributeError(f"module 'greenvis' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])


class _Package(types.ModuleType):
    """Keeps `greenvis.wrap` and `greenvis.report` the functions, though files of the same names exist below."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _HOMES and isinstance(value, types.ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
