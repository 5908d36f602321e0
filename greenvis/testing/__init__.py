"""The contracts of what is found by name, as checks that authors of plug-ins can run:
`check_technique(MyTechnique)`, `check_task(MyTask)`, `check_dataset(MyDataSet)`,
`check_meter_source(MySource)`, `check_section(MySection)`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from greenvis.core.technique import Technique
from greenvis.testing._loop import Broken
from greenvis.testing.datasets import DataSetResult, check_dataset
from greenvis.testing.meter_sources import check_meter_source
from greenvis.testing.sections import check_section
from greenvis.testing.tasks import check_task
from greenvis.testing.trial import Trial

__all__ = [
    "DataSetResult",
    "Host",
    "Result",
    "check_dataset",
    "check_meter_source",
    "check_section",
    "check_task",
    "check_technique",
    "check_together",
    "default_hosts",
]


@dataclass(frozen=True)
class Host:
    """A small model to try techniques on, with the same weights at each `build()`.

    Args:
        name: In results.
        builder: Returns a new model.
        input_shape: (channels, height, width).
        classes: Outputs of the model.
    """

    name: str
    builder: Callable[[], nn.Module]
    input_shape: tuple[int, int, int]
    classes: int

    def build(self) -> nn.Module:
        """Return a new model, in train mode."""
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return self.builder().train()

    def batch(self) -> tuple[Tensor, Tensor]:
        """Return images (4, channels, height, width) and labels (4,), always the same."""
        generator = torch.Generator().manual_seed(1)
        return torch.rand(4, *self.input_shape, generator=generator), torch.arange(4) % self.classes


@dataclass(frozen=True)
class Result:
    """How one technique, with one example of its arguments, does on one host."""

    technique: str
    arguments: str
    host: str
    outcome: Literal["works", "refuses", "fails"]
    reason: str = ""

    def __str__(self) -> str:
        return f"{self.technique} {self.arguments} on {self.host}: {self.outcome}" + (
            f": {self.reason}" if self.reason else ""
        )


def check_technique(
    technique: type[Technique] | Technique,
    hosts: Mapping[str, Host] | Iterable[Host] | None = None,
    examples: Sequence[Mapping[str, Any]] | None = None,
) -> list[Result]:
    """Try a technique on every host, with each of its examples, against the contract.

    Args:
        technique: A class, or an instance to be tried as it is.
        hosts: Small models; by default three.
        examples: Arguments of the class; by default its `examples`.

    Returns:
        For each pair: it "works", "refuses" (BadInput, the model unchanged) or "fails".
    """
    host_list = (
        default_hosts()
        if hosts is None
        else hosts.values()
        if isinstance(hosts, Mapping)
        else hosts
    )
    kind = technique if isinstance(technique, type) else type(technique)
    if examples is None:
        examples = (
            kind.examples
            if isinstance(technique, type)
            else ({k: getattr(technique, k) for k in kind.model_fields},)
        )
    return [_try([(kind, example)], host) for host in host_list for example in examples]


def check_together(
    kinds: Sequence[tuple[type[Technique], Mapping[str, Any]]], host: Host
) -> Result:
    """Try several techniques at once on a host, against the contract as `check_technique` does.

    Args:
        kinds: Classes, each with its arguments.
        host: A small model.

    Returns:
        Whether they work together there.
    """
    return _try(kinds, host)


def default_hosts() -> list[Host]:
    """Return a vision transformer, a residual network and a plain convolutional network, all
    tiny."""
    from timm.models.resnet import BasicBlock, ResNet
    from timm.models.vision_transformer import VisionTransformer

    def vit() -> nn.Module:
        return VisionTransformer(
            img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=5
        )

    def resnet() -> nn.Module:
        sizes = {"channels": (8, 16, 16, 32), "stem_width": 8}
        return ResNet(BasicBlock, (1, 1, 1, 1), num_classes=5, **sizes)  # type: ignore[arg-type]

    def plain() -> nn.Module:
        layers = [
            nn.Conv2d(3, 8, 3, 2, 1),
            nn.ReLU(),
            nn.Conv2d(8, 16, 3, 2, 1),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        ]
        return nn.Sequential(*layers, nn.Linear(16, 5))

    builders = {"vit": vit, "resnet": resnet, "plain": plain}
    return [Host(name, build, (3, 32, 32), 5) for name, build in builders.items()]


def _try(parts: Sequence[tuple[type[Technique], Mapping[str, Any]]], host: Host) -> Result:
    name = " + ".join(kind.name for kind, _ in parts)
    arguments = " + ".join(
        str(
            {
                k: getattr(v, "__name__", type(v).__name__) if callable(v) else v
                for k, v in example.items()
            }
        )
        for _, example in parts
    )
    trial = Trial(parts, host)
    try:
        trial.recipe_form()
        trial.nothing_matches()
        reason = trial.refusal()
        if reason:
            return Result(name, arguments, host.name, "refuses", reason)
        trial.neutral()
        trial.rollback()
        trial.undo()
        trial.training()
        trial.resume()
    except Broken as error:
        return Result(name, arguments, host.name, "fails", str(error))
    except Exception as error:  # whatever a technique raises is its failure, not the checker's
        return Result(name, arguments, host.name, "fails", f"{type(error).__name__}: {error}")
    return Result(name, arguments, host.name, "works")
