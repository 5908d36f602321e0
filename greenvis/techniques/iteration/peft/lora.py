"""Low-rank adaptation: freeze the model, learn a low-rank change of some of its weights. Through
PEFT, never rewritten."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from typing import Any, Literal

import torch
from peft import AdaLoraConfig, LoraConfig, LoraGAConfig, inject_adapter_in_model
from pydantic import Field, field_validator
from torch import Tensor, nn

from greenvis.core.surgery import freeze, parents_of
from greenvis.core.technique import Classifier, InputShape, Installed, Technique
from greenvis.errors import BadInput, some
from greenvis.models.structure import view
from greenvis.techniques._shared.attach import precise
from greenvis.techniques._shared.heads import head_parameters
from greenvis.techniques._shared.lora_layers import (
    NAME,
    Multihead,
    ReadLinear,
    keep_off_the_fast_path,
    merged,
    put_folded,
)
from greenvis.techniques.iteration.peft._lora_ranks import Ranks
from greenvis.techniques.iteration.peft._lora_start import checked, gradients
from greenvis.techniques.iteration.peft._lora_targets import ROLES, targets


class Lora(Technique):
    """Adapt a frozen model by low-rank changes of its weights (Hu et al., 2021; DoRA: Liu et al.,
    2024; rsLoRA: Kalajdzievski, 2023; AdaLoRA: Zhang et al., 2023; LoRA+: Hayou et al., 2024),
    through PEFT.

    Saves optimizer memory and storage per task (the delta), and a few per cent of training compute:
    the backward still runs through the whole model. Costs nothing at inference once merged;
    unmerged, and on small models, it is slower. A role takes those of its layers that LoRA can
    change and merge (so no depthwise convolutions); an explicit pattern that hits a layer it cannot
    is refused. The head is left out of patterns unless they name nothing else. AdaLoRA trains
    start_rank ranks of each layer and switches off those that matter least, over the whole
    training, until `rank` are left on average; what is off stays in the delta, as zeros.

    Example:
        >>> live = gv.wrap(model, gv.Lora(rank=4))
        >>> print(live.summary())
        VisionTransformer with lora
          lora: {'rank': 4}
          trains 1,701 of 33,925 parameters (5.01%); delta 0.01 MB
        >>> live.merge() is model
        True
    """

    name = "lora"
    stage = "weights"
    breaks = frozenset({"bare_layers"})
    examples = (
        {"rank": 2},
        {"rank": 2, "targets": ["conv"], "variant": "rslora", "head": "freeze"},
        {"rank": 2, "targets": ["mlp"], "variant": "dora", "lr_ratio": 4.0},
        {"rank": 2, "targets": ["linear"], "variant": "adalora", "start_rank": 4, "total_steps": 3},
    )
    nothing = {"targets": ["no.such.layer*"]}

    rank: int = Field(default=8, ge=1, description="rank r of each change")
    alpha: float | None = Field(
        default=None, gt=0, description="scale: alpha / r (rslora: alpha / √r); default r"
    )
    dropout: float = Field(
        default=0.0, ge=0, lt=1, description="dropout on the input of each change"
    )
    variant: Literal["lora", "dora", "rslora", "adalora"] = Field(
        default="lora", description="which low-rank method"
    )
    targets: tuple[str, ...] = Field(
        default=("attention",),
        min_length=1,
        description=f"roles ({', '.join(ROLES)}) or patterns of module paths",
    )
    head: Classifier = "train"
    init: Literal["default", "gaussian", "orthogonal", "pissa", "olora", "lora_ga"] = Field(
        default="default",
        description="how the factors start, as PEFT names it; lora_ga looks at `calibration`",
    )
    calibration: Any = Field(
        default=None, description="images and labels, two tensors, for lora_ga; not in a recipe"
    )
    lr_ratio: float = Field(
        default=1.0, gt=0, description="LoRA+: learning rate of B over that of A"
    )
    start_rank: int | None = Field(
        default=None,
        ge=2,
        description="adalora: ranks of each layer at the start; default half as many again as "
        "`rank`",
    )
    total_steps: int | None = Field(
        default=None,
        ge=1,
        description="adalora: optimizer steps of the whole training, where the loop does not say",
    )
    orthogonal: float = Field(
        default=0.1,
        ge=0,
        description="adalora: factor of the penalty that keeps factors orthogonal",
    )
    input_shape: InputShape = None

    @field_validator("targets", mode="before")
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    def install(self, model: nn.Module) -> Installed:
        """Put low-rank layers around the targets. Raises BadInput where nothing matches or a layer
        cannot be changed."""
        self._check()
        structure = view(model, self.input_shape, probe=False)
        paths = targets(self, model, structure)
        heads = head_parameters(model, structure) if self.head == "train" else []
        parents = {path: parents_of(model, model.get_submodule(path)) for path in paths}
        ranks = self._inject(model, paths)
        layers: dict[str, Any] = {}
        for path in paths:
            layer = layers[path] = model.get_submodule(path)
            if path in structure.functional:
                layer.__class__ = ReadLinear
            for parent, name in parents[path]:  # PEFT wraps one alias of a shared module
                parent._modules[name] = layer
        keep_off_the_fast_path(model, layers)
        learned = [
            p for layer in layers.values() for n, p in layer.named_parameters() if "lora_" in n
        ]
        follows = structure.in_classifier if heads else lambda path: False
        trainable = freeze(model, but=[*learned, *heads], follows=follows)
        return InstalledLora(self, model, layers, trainable, ranks)

    def _check(self) -> None:
        """Raise BadInput for settings that do not go together."""
        if self.variant == "adalora":
            if self.init != "default":
                raise BadInput(f"adalora has a start of its own; leave out init: {self.init}")
            if self.first_rank <= self.rank:
                raise BadInput(
                    f"adalora goes from start_rank to rank: {self.first_rank} must be above "
                    f"{self.rank}"
                )
        elif unused := sorted(
            {"start_rank", "total_steps", "orthogonal"} & self.recipe_form().keys()
        ):
            raise BadInput(f"{some(unused)} is for variant: adalora, not {self.variant}")
        if self.init == "lora_ga":
            checked(self.calibration)
        elif self.calibration is not None:
            raise BadInput(f"calibration is for init: lora_ga, not {self.init}")

    @property
    def first_rank(self) -> int:
        """Ranks of each layer when training begins."""
        return self.rank if self.variant != "adalora" else self.start_rank or -(-3 * self.rank // 2)

    def _inject(self, model: nn.Module, paths: list[str]) -> Ranks | None:
        common: dict[str, Any] = {
            "lora_alpha": self.alpha or self.first_rank,
            "lora_dropout": self.dropout,
            "target_modules": "|".join(re.escape(p) for p in paths),
        }
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # grouped convolutions: said by `unmergeable`
                if self.variant == "adalora":
                    config = AdaLoraConfig(
                        init_r=self.first_rank, target_r=self.rank, total_step=1, **common
                    )
                    return Ranks(model, config, self.total_steps)
                self._inject_lora(model, paths, common)
                return None
        except (ValueError, TypeError, AttributeError, NotImplementedError, RuntimeError) as error:
            raise BadInput(
                f"PEFT cannot put LoRA on {some(paths)} with {self.recipe_form()}: {error}"
            ) from error

    def _inject_lora(self, model: nn.Module, paths: list[str], common: dict[str, Any]) -> None:
        config = LoraConfig(
            r=self.rank,
            use_dora=self.variant == "dora",
            use_rslora=self.variant == "rslora",
            # lora_ga is not in its type
            init_lora_weights=self.init == "default" or self.init,  # type: ignore[arg-type]
            lora_ga_config=LoraGAConfig() if self.init == "lora_ga" else None,
            **common,
        )
        config._register_custom_module({nn.MultiheadAttention: Multihead})
        if self.init != "lora_ga":
            inject_adapter_in_model(config, model, adapter_name=NAME)
            return
        with torch.random.fork_rng():  # PEFT's decomposition draws numbers: the same ones each time
            torch.manual_seed(0)
            gradients(model, paths, config, checked(self.calibration))
            inject_adapter_in_model(config, model, adapter_name=NAME)


class InstalledLora(Installed):
    """The low-rank layers at work; the base is frozen, its batch norms held. With adalora adds the
    term "adalora"."""

    def __init__(
        self,
        request: Lora,
        model: nn.Module,
        layers: dict[str, Any],
        trainable: tuple[str, ...],
        ranks: Ranks | None,
    ) -> None:
        super().__init__(trainable, freezes=True)
        self.ranks = ranks
        self.request = request
        self.model = model
        self.layers = layers
        self.outs = {
            p: layer.base_layer.out_proj
            for p, layer in layers.items()
            if isinstance(layer, Multihead)
        }
        grouped = [p for p, m in layers.items() if getattr(m.base_layer, "groups", 1) > 1]
        if grouped:
            self.unmergeable = (
                f"PEFT does not merge grouped convolutions, as '{grouped[0]}' is; keep the model "
                "wrapped"
            )

    def terms(self, x: Any, y: Any, logits: Tensor | None) -> Mapping[str, Tensor]:
        """Return {"adalora": orthogonal · orthogonality of the factors}, or nothing."""
        if self.ranks is None:
            return {}
        return {"adalora": self.request.orthogonal * self.ranks.penalty(self.total_steps)}

    def step_end(self) -> None:
        """Move ranks to where they matter (adalora)."""
        if self.ranks is not None:
            self.ranks.advance(self.total_steps)

    def replacement_blocker(self, path: str) -> str:
        """Return "" but for the layers around which it put its own."""
        return "its factors" if any(path.startswith(layer) for layer in self.layers) else ""

    def state_dict(self) -> dict[str, Tensor]:
        """Return how far the allocation of ranks is."""
        return self.ranks.state_dict() if self.ranks is not None else {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take back what `state_dict` gave."""
        if self.ranks is not None:
            self.ranks.load_state_dict(state)
        else:
            super().load_state_dict(state)

    def param_groups(self, lr: float) -> list[dict[str, Any]]:
        """Return the B factors at `lr_ratio` times `lr` (LoRA+)."""
        if self.request.lr_ratio == 1.0:
            return []
        factors = [
            p
            for layer in self.layers.values()
            for n, p in layer.named_parameters()
            if "lora_B" in n
        ]
        return [{"params": factors, "lr": lr * self.request.lr_ratio}]

    def merge(self) -> None:
        """Fold the changes into the weights, in fp32."""
        layers = self.layers.items()
        put_folded(
            self.model,
            {f"{p}.{n}": w for p, layer in layers for n, w in self._folded(p, layer).items()},
        )

    def _folded(self, path: str, layer: Any) -> dict[str, Tensor]:
        if path not in self.outs:
            return {"weight": merged(layer)}
        base = layer.base_layer.in_proj_weight
        with torch.no_grad():
            inputs = base.to(precise(base)) + layer.get_delta_weight(NAME)
        return {"in_proj_weight": inputs, "out_proj.weight": merged(self.outs[path])}
