"""Every technique on every task: it trains there, or refuses with the reason."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from greenvis.core.example import Example
from greenvis.core.technique import Technique
from greenvis.core.wrap import wrap
from greenvis.errors import BadInput
from greenvis.tasks import registry
from greenvis.testing._loop import Broken, arguments, fed, train

STEPS = 2


@dataclass(frozen=True)
class TaskHost:
    """A small model of a task, and a batch.

    Args:
        task: Its name.
        builder: Returns a new model.
        batch: Returns (x, y), always the same.
    """

    task: str
    builder: Callable[[], nn.Module]
    batch: Callable[[], tuple[Any, Any]]

    def build(self) -> nn.Module:
        """Return a new model, in train mode, with the same weights each time."""
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return self.builder().train()


@dataclass(frozen=True)
class TaskResult:
    """How one technique, with one example of its arguments, does on one task."""

    technique: str
    arguments: str
    task: str
    outcome: Literal["works", "refuses", "fails"]
    reason: str = ""

    def __str__(self) -> str:
        what = f"{self.technique} {self.arguments} on {self.task}: {self.outcome}"
        return what + (f": {self.reason}" if self.reason else "")


def check_tasks(
    technique: type[Technique],
    hosts: Iterable[TaskHost] | None = None,
    examples: Sequence[Mapping[str, Any]] | None = None,
) -> list[TaskResult]:
    """Try a technique on every task, with each of its examples: `wrap(…, task=…)` and two steps as
    the loop takes them.

    Args:
        technique: Its class.
        hosts: A model of each task; by default `task_hosts()`.
        examples: Arguments of the class; by default its `examples`.

    Returns:
        For each pair: it "works" (finite losses and gradients), "refuses" (BadInput) or "fails".
    """
    hosts = task_hosts() if hosts is None else [*hosts]
    return [
        _try(technique, example, host)
        for host in hosts
        for example in (technique.examples if examples is None else examples)
    ]


def _try(technique: type[Technique], example: Mapping[str, Any], host: TaskHost) -> TaskResult:
    shown = str({k: getattr(v, "__name__", v) if callable(v) else v for k, v in example.items()})
    result: tuple[Literal["works", "refuses", "fails"], str] = "works", ""
    try:
        _train(technique, example, host)
    except BadInput as error:
        result = "refuses", str(error)
    except Broken as error:
        result = "fails", str(error)
    except Exception as error:  # whatever a technique raises is its failure, not the checker's
        result = "fails", f"{type(error).__name__}: {error}"
    return TaskResult(technique.name, shown, host.task, *result)


def _train(technique: type[Technique], example: Mapping[str, Any], host: TaskHost) -> None:
    """Train for two steps and answer once. Raises Broken, or what the technique raises."""
    model, task = host.build(), registry.find(host.task)()
    live = wrap(model, technique(**arguments(example, model)), task=task)
    x, y = host.batch()
    fed(live, x, y)
    optimizer = torch.optim.SGD(live.param_groups(1e-3), lr=1e-3)
    train(live, task, optimizer, host.batch, range(STEPS))
    with torch.no_grad():
        task.answer(model.eval(), x, y)
    live.undo()


def task_hosts() -> list[TaskHost]:
    """Return a tiny model of each of greenvis's tasks: vision transformers where one will do."""

    def vit() -> nn.Module:
        from timm.models.vision_transformer import VisionTransformer

        return VisionTransformer(
            img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=5
        )

    def headed(head: str) -> Callable[[], nn.Module]:
        def build() -> nn.Module:
            from greenvis.models.heads import with_head

            return with_head(vit(), head, 5, 32)

        return build

    def detector() -> nn.Module:
        from torchvision.models.detection import ssdlite320_mobilenet_v3_large

        return ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=5)

    def plain(name: str, **options: Any) -> Callable[[], nn.Module]:
        def build() -> nn.Module:
            from greenvis import models

            return models.build(f"plain/{name}", **options)

        return build

    def images(y: Any) -> Callable[[], tuple[Any, Any]]:
        generator = torch.Generator().manual_seed(1)
        x = torch.rand(4, 3, 32, 32, generator=generator)
        return lambda: (x.clone(), y.clone() if isinstance(y, Tensor) else y)

    numbers = torch.arange(4) % 5
    box = {"boxes": torch.tensor([[4.0, 4.0, 20.0, 24.0]]), "labels": torch.tensor([1])}
    x, _ = images(numbers)()
    tokens = torch.tensor([[3, 4, 31], [5, 31, 0], [6, 7, 31], [8, 31, 0]])
    small = {"img_size": 32, "embed_dim": 32, "tokens": 32}
    rows = torch.tensor([0, 0, 1, 2])
    return [
        TaskHost("classification", vit, images(numbers)),
        TaskHost("multilabel", vit, images(torch.eye(5)[numbers] + torch.eye(5)[numbers - 1])),
        TaskHost("regression", vit, images(torch.linspace(-1, 1, 20).view(4, 5))),
        *(TaskHost(name, headed("dense"), images(numbers[:, None, None].expand(-1, 32, 32)))
          for name in ("segmentation", "unsupervised_segmentation")),
        TaskHost("bags", headed("attention"),
                 lambda: (Example((x.clone(),), {"bag": rows}), numbers[:3])),
        TaskHost("image_text", plain("clip", **small),
                 lambda: (Example((x.clone(), tokens)), numbers)),
        TaskHost("vqa", plain("llava", vision_dim=32, vision_depth=1, depth=2, **small),
                 lambda: (Example((x.clone(), tokens)), tokens.masked_fill(tokens == 0, -1))),
        TaskHost("detection", detector, images([box] * 4)),
        TaskHost("generation", plain("vae", num_classes=5, in_chans=3, img_size=32),
                 images(numbers)),
    ]  # fmt: skip
