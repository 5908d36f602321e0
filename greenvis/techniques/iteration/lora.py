"""Low-rank adaptation: freeze the model, learn a low-rank change of some of its weights. Through PEFT, never rewritten."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import layer as peft_layers
from pydantic import Field, field_validator
from torch import Tensor, nn
from torch.func import functional_call

from greenvis.errors import BadInput, nearest, some
from greenvis.surgery import find, freeze
from greenvis.technique import Installed, Stage, Technique
from greenvis.views import View, view

ROLES = ("attention", "qkv", "mlp", "conv", "linear")
_KINDS = (nn.Linear, nn.Conv2d, nn.MultiheadAttention)
_NAME = "default"


class Lora(Technique):
    """Adapt a frozen model by low-rank changes of its weights (Hu et al., 2021; DoRA: Liu et al., 2024; rsLoRA: Kalajdzievski,
    2023; LoRA+: Hayou et al., 2024), through PEFT.

    Saves optimizer memory and storage per task (the delta), and a few per cent of training compute: the backward still runs
    through the whole model. Costs nothing at inference once merged; unmerged, and on small models, it is slower.
    A role takes those of its layers that LoRA can change and merge (so no depthwise convolutions); an explicit pattern
    that hits a layer it cannot is refused. The head is left out of patterns unless they name nothing else.
    """

    name: ClassVar[str] = "lora"
    stage: ClassVar[Stage] = "weights"
    examples: ClassVar[tuple[Mapping[str, Any], ...]] = (
        {"rank": 2},
        {"rank": 2, "targets": ["mlp"], "variant": "dora", "lr_ratio": 4.0},
        {"rank": 2, "targets": ["conv"], "variant": "rslora", "head": "freeze"},
    )
    nothing: ClassVar[Mapping[str, Any] | None] = {"targets": ["no.such.layer*"]}

    rank: Annotated[int, Field(ge=1, description="rank r of each change")] = 8
    alpha: Annotated[float | None, Field(gt=0, description="scale: alpha / r (rslora: alpha / √r); default r")] = None
    dropout: Annotated[float, Field(ge=0, lt=1, description="dropout on the input of each change")] = 0.0
    variant: Annotated[Literal["lora", "dora", "rslora"], Field(description="which low-rank method")] = "lora"
    targets: Annotated[
        tuple[str, ...], Field(min_length=1, description=f"roles ({', '.join(ROLES)}) or patterns of module paths")
    ] = ("attention",)
    head: Annotated[Literal["train", "freeze"], Field(description="train the classifier in full, or leave it")] = "train"
    init: Annotated[
        Literal["default", "gaussian", "orthogonal", "pissa", "olora"], Field(description="how the factors start")
    ] = "default"
    lr_ratio: Annotated[float, Field(gt=0, description="LoRA+: learning rate of B over that of A")] = 1.0
    input_shape: Annotated[
        tuple[int, int, int] | None, Field(description="(channels, height, width) of an image, if it cannot be inferred")
    ] = None

    @field_validator("targets", mode="before")
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    def install(self, model: nn.Module) -> Installed:
        """Put low-rank layers around the targets. Raises BadInput where nothing matches or a layer cannot be changed."""
        found = view(model, self.input_shape, probe=False)
        paths = self._targets(model, found)
        heads = [p for path in found.heads for p in model.get_submodule(path).parameters()] if self.head == "train" else []
        places = {path: _places(model, path) for path in paths}
        self._inject(model, paths)
        layers: dict[str, Any] = {}
        for path in paths:
            layer = layers[path] = model.get_submodule(path)
            if path in found.functional:
                layer.__class__ = _ReadLinear
            for parent, name in places[path]:  # PEFT wraps one alias of a shared module
                parent._modules[name] = layer
        _keep_off_the_fast_path(model, layers)
        learned = {id(p) for layer in layers.values() for n, p in layer.named_parameters() if "lora_" in n}
        learned |= {id(p) for p in heads}
        freeze(model, but=[p for p in model.parameters() if id(p) in learned])
        trainable = tuple(n for n, p in model.named_parameters() if id(p) in learned)
        return InstalledLora(self, model, layers, trainable)

    def _targets(self, model: nn.Module, found: View) -> list[str]:
        """Return the paths to change, in the model's order. Raises BadInput before anything is touched."""
        chosen: dict[str, None] = {}
        for target in self.targets:
            if target in ROLES:
                paths = found.role(target)
                why = {p: self._why_not(model, found, p, merging=True) for p in paths}
                good = [p for p in paths if not why[p]]
                if not good:
                    raise BadInput(f"lora cannot change any '{target}' layer of this model: {why[paths[0]]}")
                chosen.update(dict.fromkeys(good))
            else:
                chosen.update(dict.fromkeys(self._matches(model, found, target)))
        return [p for p, _ in model.named_modules() if p in chosen]

    def _matches(self, model: nn.Module, found: View, pattern: str) -> list[str]:
        try:
            hits = find(model, [pattern], _KINDS)
        except BadInput:
            try:
                hits = find(model, [pattern])
            except BadInput as error:
                raise BadInput(f"{error}{nearest(pattern, ROLES) if pattern.isalpha() else ''}") from None
        inner = _inner(model)
        outer = [p for p in hits if p not in inner]
        if not outer:
            raise BadInput(f"'{hits[0]}' is read as a weight by its nn.MultiheadAttention: target '{inner[hits[0]]}' itself")
        special = {*found.heads, found.patch_embed}
        named = [p for p in outer if p not in special] or outer
        if self.head == "train" and set(named) <= set(found.heads):
            raise BadInput(f"'{pattern}' names the classifier {some(named)}, which trains in full; set head: freeze")
        ran = {*found.linears, *found.convs, *(a.path for a in found.attention)}
        live = [p for p in named if p in ran]
        if not live:
            raise BadInput(f"{some(named)} matches '{pattern}' but never runs in a forward, so it would learn nothing")
        for path in live:
            if reason := self._why_not(model, found, path, merging=False):
                raise BadInput(f"'{pattern}' names '{path}', which lora cannot change: {reason}")
        return live

    def _why_not(self, model: nn.Module, found: View, path: str, merging: bool) -> str:
        """Return why a layer cannot be changed, or "". merging: also where the change could not be merged."""
        module = model.get_submodule(path)
        if not isinstance(module, _KINDS):
            return f"'{path}' is a {type(module).__name__}, not a Linear, Conv2d or MultiheadAttention"
        if path in found.computed:
            return f"'{path}' does not use its weight as it is (a standardised {type(module).__name__})"
        if isinstance(module, nn.Conv2d):
            if module.groups > 1 and (merging or self.rank % module.groups):
                return f"'{path}' is a convolution of {module.groups} groups; PEFT cannot merge it and needs a rank they divide"
            if set(module.dilation) != {1} or module.padding_mode != "zeros":
                return f"'{path}' has dilation {module.dilation} and padding '{module.padding_mode}', which PEFT ignores"
        if isinstance(module, nn.Conv2d) and path in found.functional:
            return f"'{path}' is a convolution whose weight another module reads"
        whole = isinstance(module, nn.MultiheadAttention)
        if whole and not module._qkv_same_embed_dim:
            return f"'{path}' has q, k and v of different widths, which PEFT does not support"
        if whole or path in found.functional:
            how = "an nn.MultiheadAttention" if whole else "read as a weight by another module"
            if self.variant == "dora":
                return f"'{path}' is {how}, for which there is no DoRA; use variant lora or rslora"
            if self.dropout:
                return f"'{path}' is {how}, so dropout cannot act on its input; set dropout: 0"
        return ""

    def _inject(self, model: nn.Module, paths: list[str]) -> None:
        config = LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha or self.rank,  # type: ignore[arg-type]  # any positive number scales
            lora_dropout=self.dropout,
            use_dora=self.variant == "dora",
            use_rslora=self.variant == "rslora",
            init_lora_weights=True if self.init == "default" else self.init,
            target_modules="|".join(re.escape(p) for p in paths),
        )
        config._register_custom_module({nn.MultiheadAttention: _Multihead})
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # grouped convolutions: said by `unmergeable`
                inject_adapter_in_model(config, model, adapter_name=_NAME)
        except (ValueError, TypeError, AttributeError, NotImplementedError, RuntimeError) as error:
            raise BadInput(f"PEFT cannot put LoRA on {some(paths)} with {self.recipe_form()}: {error}") from error


class InstalledLora(Installed):
    """The low-rank layers at work; the base is frozen, its batch norms held."""

    def __init__(self, request: Lora, model: nn.Module, layers: dict[str, Any], trainable: tuple[str, ...]) -> None:
        super().__init__(trainable, freezes=True)
        self.request = request
        self.model = model
        self.layers = layers
        self.outs = {p: layer.base_layer.out_proj for p, layer in layers.items() if isinstance(layer, _Multihead)}
        grouped = [p for p, m in layers.items() if getattr(m.base_layer, "groups", 1) > 1]
        if grouped:
            self.unmergeable = f"PEFT does not merge grouped convolutions, as '{grouped[0]}' is; keep the model wrapped"

    def param_groups(self, lr: float) -> list[dict[str, Any]]:
        """Return the B factors at `lr_ratio` times `lr` (LoRA+)."""
        if self.request.lr_ratio == 1.0:
            return []
        factors = [p for layer in self.layers.values() for n, p in layer.named_parameters() if "lora_B" in n]
        return [{"params": factors, "lr": lr * self.request.lr_ratio}]

    def merge(self) -> None:
        """Fold the changes into the weights, in fp32: a model of lower precision becomes float32, so that nothing is lost."""
        folded = {path: self._folded(path, layer) for path, layer in self.layers.items()}
        if any(p.is_floating_point() and p.dtype.itemsize < 4 for p in self.model.parameters()):
            _to_float32(self.model)
        for path, weights in folded.items():
            for name, weight in weights.items():
                parent, _, leaf = f"{path}.{name}".rpartition(".")
                old = self.model.get_parameter(f"{path}.{name}")
                self.model.get_submodule(parent)._parameters[leaf] = nn.Parameter(weight, old.requires_grad)

    def _folded(self, path: str, layer: Any) -> dict[str, Tensor]:
        if path not in self.outs:
            return {"weight": _merged(layer)}
        base = layer.base_layer.in_proj_weight
        with torch.no_grad():
            inputs = base.to(_precise(base)) + layer.get_delta_weight(_NAME)
        return {"in_proj_weight": inputs, "out_proj.weight": _merged(self.outs[path])}


class _ReadLinear(peft_layers.Linear):
    """A LoRA Linear whose weight another module reads (torchvision's Swin, BEiT): the weight it shows holds the change."""

    @property
    def weight(self) -> Tensor:
        layer: Any = self.get_base_layer()
        return layer.weight + self.get_delta_weight(_NAME).to(layer.weight.dtype)


class _Multihead(peft_layers.MultiheadAttention):
    """PEFT's LoRA of nn.MultiheadAttention, run on changed weights without touching the base.

    PEFT adds the change to the base and takes it off again at each forward, which lets the frozen weights drift by
    rounding and replaces the parameter objects; here the sum exists for the call only.
    """

    def forward(self, query: Tensor, *args: Any, **kwargs: Any) -> Any:
        base: Any = self.get_base_layer()
        inputs, out = base.in_proj_weight, base.out_proj.get_base_layer().weight
        weights = {
            "in_proj_weight": inputs + self.get_delta_weight(_NAME).to(inputs.dtype),
            "out_proj.base_layer.weight": out + base.out_proj.get_delta_weight(_NAME).to(out.dtype),
        }
        return functional_call(base, weights, (query, *args), kwargs)

    def _restore_weights(self) -> None:
        """Nothing to restore: the parameters never leave the base."""


def _keep_off_the_fast_path(model: nn.Module, layers: dict[str, Any]) -> None:
    """In eval nn.TransformerEncoderLayer reads its parts' own weights, and would miss the change; not where there are hooks."""
    fused = [p for p, m in model.named_modules() if isinstance(m, nn.TransformerEncoderLayer)]
    for path, layer in layers.items():
        if any(path.startswith(f"{p}.") or not p for p in fused):
            layer.register_forward_hook(_nothing)


def _nothing(module: nn.Module, inputs: Any, output: Any) -> None:
    return None


def _merged(layer: Any) -> Tensor:
    """Return the weight with the change folded in by PEFT, in fp32 or better; `layer` stays as it is."""
    layer = copy.deepcopy(layer)
    layer.to(_precise(layer.base_layer.weight))
    layer.merge(safe_merge=True)
    return layer.base_layer.weight.detach()


def _precise(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _to_float32(model: nn.Module) -> None:
    """Replace every tensor of lower precision, leaving the old ones as they are for `undo`."""
    done: dict[int, Any] = {}
    for module in model.modules():
        for held in (module._parameters, module._buffers):
            for name, tensor in held.items():
                if tensor is None or not tensor.is_floating_point() or tensor.dtype.itemsize >= 4:
                    continue
                if id(tensor) not in done:
                    new = tensor.detach().float()
                    done[id(tensor)] = nn.Parameter(new, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else new
                held[name] = done[id(tensor)]


def _inner(model: nn.Module) -> dict[str, str]:
    """Return the Linears inside nn.MultiheadAttention, each with the attention's path."""
    wholes = [p for p, m in model.named_modules() if isinstance(m, nn.MultiheadAttention)]
    return {f"{w}.out_proj" if w else "out_proj": w for w in wholes}


def _places(model: nn.Module, path: str) -> list[tuple[nn.Module, str]]:
    target = model.get_submodule(path)
    return [(parent, name) for parent in model.modules() for name, child in parent._modules.items() if child is target]
