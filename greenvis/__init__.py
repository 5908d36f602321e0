"""greenvis: make a vision model cheaper to train, adapt and run, and prove it. Imports are lazy: no
torch here."""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import sys
import types
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from greenvis.errors import BadInput, GreenvisError, nearest

__version__ = "0.1.0"

if TYPE_CHECKING:
    from greenvis.core.technique import Installed, Technique
    from greenvis.core.wrap import Wrapped, wrap
    from greenvis.experiment.recipe import load_recipe
    from greenvis.experiment.session import run
    from greenvis.meters.track import track
    from greenvis.models.folding import fold_norms
    from greenvis.models.fusing import fuse
    from greenvis.report import report
    from greenvis.techniques.annotation.consistency.consistency import Consistency
    from greenvis.techniques.annotation.consistency.pseudo_label import PseudoLabel
    from greenvis.techniques.annotation.contrastive.byol import Byol
    from greenvis.techniques.annotation.contrastive.dino import Dino
    from greenvis.techniques.annotation.contrastive.moco import Moco
    from greenvis.techniques.annotation.contrastive.rotation import Rotation
    from greenvis.techniques.annotation.contrastive.simclr import Simclr
    from greenvis.techniques.annotation.contrastive.vicreg import Vicreg
    from greenvis.techniques.annotation.cross_modal.cross_modal import CrossModal
    from greenvis.techniques.annotation.dense.label_maps import LabelMaps
    from greenvis.techniques.annotation.dense.pass_pretrain import PassPretrain
    from greenvis.techniques.annotation.dense.pixel_attention import PixelAttention
    from greenvis.techniques.annotation.masked.mae import Mae
    from greenvis.techniques.annotation.noisy_labels.co_teaching import CoTeaching
    from greenvis.techniques.annotation.noisy_labels.dividemix import Dividemix
    from greenvis.techniques.annotation.noisy_labels.noisy_labels import NoisyLabels
    from greenvis.techniques.annotation.noisy_labels.partial_labels import PartialLabels
    from greenvis.techniques.data.adapt.adabn import Adabn
    from greenvis.techniques.data.adapt.align import Align
    from greenvis.techniques.data.adapt.shot import Shot
    from greenvis.techniques.data.generalise.dsu import Dsu
    from greenvis.techniques.data.generalise.ema import Ema
    from greenvis.techniques.data.generalise.fishr import Fishr
    from greenvis.techniques.data.generalise.mixstyle import Mixstyle
    from greenvis.techniques.data.generalise.sam import Sam
    from greenvis.techniques.data.generalise.swad import Swad
    from greenvis.techniques.data.sampling.balance import Balance
    from greenvis.techniques.data.test_time.test_time import TestTime
    from greenvis.techniques.data.zero_shot.zero_shot import ZeroShot
    from greenvis.techniques.inference.attention.linear_attention import LinearAttention
    from greenvis.techniques.inference.distill.distill import Distill
    from greenvis.techniques.inference.distill.fusion import Fusion
    from greenvis.techniques.inference.exits.early_exit import EarlyExit
    from greenvis.techniques.inference.experts.experts import Experts
    from greenvis.techniques.inference.kv_cache.kv_cache import KvCache
    from greenvis.techniques.inference.precision.low_precision import LowPrecision
    from greenvis.techniques.inference.reparam.reparam import Reparam
    from greenvis.techniques.inference.sampling.consistency_model import ConsistencyModel
    from greenvis.techniques.inference.sampling.feature_cache import FeatureCache
    from greenvis.techniques.inference.sampling.flow import Flow
    from greenvis.techniques.inference.sampling.progressive import Progressive
    from greenvis.techniques.inference.sampling.sampler import Sampler
    from greenvis.techniques.inference.structure.prune import Prune
    from greenvis.techniques.inference.structure.res2net import Res2Net
    from greenvis.techniques.inference.structure.rfnext import RFNext
    from greenvis.techniques.inference.tokens.image_tokens import ImageTokens
    from greenvis.techniques.inference.tokens.token_merge import TokenMerge
    from greenvis.techniques.inference.tokens.token_prune import TokenPrune
    from greenvis.techniques.iteration.continual.hat import Hat
    from greenvis.techniques.iteration.continual.lora_stream import LoraStream
    from greenvis.techniques.iteration.continual.lwf import Lwf
    from greenvis.techniques.iteration.continual.ncm import Ncm
    from greenvis.techniques.iteration.continual.packnet import PackNet
    from greenvis.techniques.iteration.continual.pnn import Pnn
    from greenvis.techniques.iteration.continual.prompt_pool import PromptPool
    from greenvis.techniques.iteration.continual.regularize import Regularize
    from greenvis.techniques.iteration.continual.replay import Replay
    from greenvis.techniques.iteration.peft.adapter import Adapter
    from greenvis.techniques.iteration.peft.adapter_probe import AdapterProbe
    from greenvis.techniques.iteration.peft.bitfit import Bitfit
    from greenvis.techniques.iteration.peft.layer_decay import LayerDecay
    from greenvis.techniques.iteration.peft.linear_probe import LinearProbe
    from greenvis.techniques.iteration.peft.lora import Lora
    from greenvis.techniques.iteration.peft.norm_tune import NormTune
    from greenvis.techniques.iteration.peft.partial import Partial
    from greenvis.techniques.iteration.peft.prompt import Prompt
    from greenvis.techniques.iteration.peft.side import Side
    from greenvis.techniques.iteration.reuse.feature_distill import FeatureDistill
    from greenvis.techniques.iteration.reuse.reuse import Reuse

_HOMES = {
    "wrap": "core.wrap",
    "Wrapped": "core.wrap",
    "track": "meters.track",
    "report": "report",
    "run": "experiment.session",
    "load_recipe": "experiment.recipe",
    "fold_norms": "models.folding",
    "fuse": "models.fusing",
    "Technique": "core.technique",
    "Installed": "core.technique",
}

_RENAMED = {  # modules of the first releases, which plug-ins and scripts still import
    "greenvis.record": "greenvis.meters.record",
    "greenvis.technique": "greenvis.core.technique",
    "greenvis.meters.nvml": "greenvis.meters.sources.nvml",
    "greenvis.meters.rapl": "greenvis.meters.sources.rapl",
}

__all__ = [
    "Adabn", "Adapter", "AdapterProbe", "Align", "BadInput", "Balance", "Bitfit", "Byol",
    "CoTeaching", "Consistency", "ConsistencyModel", "CrossModal", "Dino", "Distill", "Dividemix",
    "Dsu", "EarlyExit", "Ema", "Experts", "FeatureCache", "FeatureDistill", "Fishr", "Flow",
    "Fusion", "GreenvisError", "Hat", "ImageTokens", "Installed", "KvCache", "LabelMaps",
    "LayerDecay", "LinearAttention", "LinearProbe", "Lora", "LoraStream", "LowPrecision", "Lwf",
    "Mae", "Mixstyle", "Moco", "Ncm", "NoisyLabels", "NormTune", "PackNet", "Partial",
    "PartialLabels", "PassPretrain", "PixelAttention", "Pnn", "Progressive", "Prompt",
    "PromptPool", "Prune", "PseudoLabel", "RFNext", "Regularize", "Reparam", "Replay", "Res2Net",
    "Reuse", "Rotation", "Sam", "Sampler", "Shot", "Side", "Simclr", "Swad", "Technique",
    "TestTime", "TokenMerge", "TokenPrune", "Vicreg", "Wrapped", "ZeroShot", "fold_norms", "fuse",
    "load_recipe", "report", "run", "track", "wrap",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"greenvis.{_HOMES[name]}"), name)
    # a technique class: gv.Lora, gv.Distill, and those of installed plug-ins
    if name[:1].isupper():
        registry = importlib.import_module("greenvis.techniques.registry")
        cls = registry.find_class(name)
        if cls is not None:
            return cls
    hint = "" if name[:1] == "_" else nearest(name, __all__)
    raise AttributeError(f"module 'greenvis' has no attribute {name!r}{hint}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])


class _Package(types.ModuleType):
    """Keeps `greenvis.core.wrap` and `greenvis.report` the functions, though files of the same
    names exist below."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _HOMES and isinstance(value, types.ModuleType)):
            super().__setattr__(name, value)


class _Renamed(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds a renamed module under its old name, with a DeprecationWarning."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        return importlib.machinery.ModuleSpec(fullname, self) if fullname in _RENAMED else None

    def exec_module(self, module: types.ModuleType) -> None:
        new = _RENAMED[module.__name__]
        warnings.warn(f"{module.__name__} is {new} now", DeprecationWarning, stacklevel=2)
        sys.modules[module.__name__] = importlib.import_module(new)


sys.modules[__name__].__class__ = _Package
sys.meta_path.append(_Renamed())
