"""A teacher at work: asked once a batch for its answers and features, live, cheaper, or read back
from a cache."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn

from greenvis import models
from greenvis.core.example import Example, call
from greenvis.core.technique import Samples, logits_of
from greenvis.errors import BadInput, GreenvisError
from greenvis.techniques._shared.frozen import FrozenOutputs, fingerprint, other_model, slow_path
from greenvis.techniques.inference.distill._layers import TapPoint, Taps

ANSWER = "logits"
ITSELF = "ema"
_MODES: weakref.WeakKeyDictionary[nn.Module, tuple[int, list[tuple[nn.Module, bool]]]] = (
    weakref.WeakKeyDictionary()
)


class Teacher(BaseModel):
    """One of several teachers."""

    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True)

    model: Any = Field(
        description='a model, or a reference: "run:NAME", "file:PATH", "timm/NAME", …'
    )
    weight: float = Field(default=1.0, gt=0, description="how much it counts beside the others")
    size: int | None = Field(
        default=None, gt=0, description="side in pixels at which it sees the images"
    )

    @model_validator(mode="before")
    @classmethod
    def _short(cls, value: Any) -> Any:
        return value if isinstance(value, (Mapping, cls)) else {"model": value}


class CacheOptions(BaseModel):
    """How a teacher's outputs are kept on disk."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    dtype: Literal["fp32", "fp16"] = Field(
        default="fp32", description="fp32 gives the same weights as a live teacher"
    )
    top_k: int | None = Field(default=None, ge=1, description="keep only the k greatest logits")
    max_bytes: int | None = Field(default=None, gt=0, description="of all caches beside it")


class FrozenTeacher:
    """One teacher: frozen, in eval from `begin` to `end`. Its hooks live only during a forward."""

    def __init__(
        self,
        name: str,
        module: nn.Module,
        size: int | None = None,
        precision: str | None = None,
        cache: CacheOptions | None = None,
        note: Callable[[str], None] | None = None,
        student: nn.Module | None = None,
        names: bool = True,
    ) -> None:
        self.name, self.module, self.size, self.precision = name, module, size, precision
        self.weight = 1.0
        stem = next((m for m in module.modules() if isinstance(m, nn.Conv2d)), None)
        channels = stem.in_channels if stem is not None and stem.in_channels in (1, 3) else None
        source = models.pixels_of(student) if student is not None else None
        who = f"the teacher '{name}' ({type(module).__name__})"
        self.shown = models.Renormalise(
            who, source, models.pixels_of(module), channels, note or (lambda text: None)
        )
        classes = [
            models.classes_of(m) if m is not None and names else None for m in (student, module)
        ]
        self._order = models.order_of(classes[0], classes[1], who)
        self._classes = len(classes[1] or ())
        self._caches: tuple[FrozenOutputs, FrozenOutputs] | None = None
        if cache is not None:
            at, weights = f" at {size} pixels" if size else "", fingerprint(module)
            options: dict[str, Any] = {
                "dtype": cache.dtype,
                "max_bytes": cache.max_bytes,
                "note": note,
            }
            what = (
                f"teacher {type(module).__name__}{at} ({precision or 'as trained'}){self.shown.key}"
            )
            what += f" (classes {self._order})" if self._order else ""
            answers = FrozenOutputs(f"{what}: answers", weights, top_k=cache.top_k, **options)
            self._caches = answers, FrozenOutputs(f"{what}: features", weights, **options)

    def begin(self) -> None:
        """Put the teacher into eval."""
        users, modes = _MODES.get(
            self.module, (0, [(m, m.training) for m in self.module.modules()])
        )
        _MODES[self.module] = users + 1, modes
        self.module.eval()

    def end(self) -> None:
        """Let go of the caches' files; where nobody else uses the teacher, give it its own modes
        back."""
        for cache in self._caches or ():
            cache.close()
        users, modes = _MODES.pop(self.module, (0, []))
        if users > 1:
            _MODES[self.module] = users - 1, modes
        else:
            for module, training in modes:
                module.training = training

    def outputs(
        self, x: Any, points: Sequence[TapPoint], samples: Samples | None, answers: bool = True
    ) -> dict[str, Tensor]:
        """Return the logits, under `ANSWER`, and what is at the places, by their keys, for images
        (batch, channels, h, w), or an `Example` whose first argument they are.

        answers: False where only features are compared: the teacher need not have an answer then.
        """
        once: dict[str, Tensor] = {}

        def compute() -> dict[str, Tensor]:
            if not once:
                once.update(self._run(x, points, answers))
            return once

        with torch.no_grad(), self._at_precision(x.device.type):
            if self._caches is None:
                return compute()
            on_answers, on_features = self._caches
            logits = on_answers.layers(samples, compute, (ANSWER,), x.device) if answers else {}
            if points:
                return {
                    **on_features.layers(samples, compute, [p.key for p in points], x.device),
                    **logits,
                }
            return logits

    def facts(self) -> list[dict[str, Any]]:
        """Return what its caches did."""
        return [
            {"teacher": self.name, **cache.facts()}
            for cache in self._caches or ()
            if cache.hits or cache.misses
        ]

    def follow(self, student: nn.Module, momentum: float) -> None:
        """Move weights and floating buffers towards the student's by 1 − momentum; other buffers
        become the student's."""
        ahead = {**dict(student.named_parameters()), **dict(student.named_buffers())}
        with torch.no_grad():
            for name, own in (*self.module.named_parameters(), *self.module.named_buffers()):
                new = ahead[name].detach().to(own.device)
                own.lerp_(
                    new.to(own.dtype), 1 - momentum
                ) if own.is_floating_point() else own.copy_(new)

    def _run(self, batch: Any, points: Sequence[TapPoint], answers: bool) -> dict[str, Tensor]:
        x = batch.args[0] if isinstance(batch, Example) else batch
        if next(iter(self.module.parameters()), x).device != x.device:
            self.module.to(x.device)
        x = self.shown(x)
        if self.size is not None and x.shape[-2:] != (self.size, self.size):
            x = F.interpolate(x, (self.size, self.size), mode="bilinear", antialias=True)
        taps = Taps(self.module, points)
        try:
            self.module.eval()
            with slow_path() if points else nullcontext():
                more = isinstance(batch, Example)
                shown = Example((x, *batch.args[1:]), batch.kwargs) if more else x
                output = call(self.module, shown)
            return {
                **taps.take(),
                **({ANSWER: self._by_name(logits_of(output))} if answers else {}),
            }
        except GreenvisError:
            raise
        except Exception as error:
            raise GreenvisError(
                f"the teacher '{self.name}' ({type(self.module).__name__}) does not take images "
                f"{tuple(x.shape[1:])}: "
                f"{str(error).strip()[:200]}; give the `size` in pixels that it wants"
            ) from error
        finally:
            taps.remove()

    def _by_name(self, logits: Tensor) -> Tensor:
        """Return the logits in the order of the student's classes, where both say their names."""
        if self._order is None:
            return logits
        if logits.shape[1] != self._classes:
            raise BadInput(
                f"the teacher '{self.name}' names {self._classes} classes and answers for "
                f"{logits.shape[1]}: say their names "
                "with greenvis.models.describe(model, classes=…)"
            )
        return logits[:, self._order]

    def _at_precision(self, device: str) -> Any:
        if self.precision is None:
            return nullcontext()
        return torch.autocast(device, torch.bfloat16, enabled=self.precision == "bf16")


def built(name: str, model: Any, student: nn.Module) -> nn.Module:
    """Return a teacher's module. Raises BadInput for what is none, and for one that shares weights
    with the student."""
    if model == ITSELF:
        return copy.deepcopy(student).requires_grad_(False)
    return other_model(f"the teacher '{name}'", model, student)
