"""What pretexts that compare views of an image have in common."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import ClassVar, Generic, TypeVar

from torch import Tensor, nn

from greenvis.core.technique import Installed, Stage
from greenvis.models.structure import view
from greenvis.techniques._shared.momentum import MomentumTarget
from greenvis.techniques._shared.representation import Representation
from greenvis.techniques._shared.views import RandomViews, random_views


class ViewPretext(RandomViews):
    """A pretext that looks at random views of each image: crop, flip, contrast and brightness."""

    stage: ClassVar[Stage] = "objective"
    needs = frozenset({"trainable_base"})

    def views(self, x: Tensor, count: int = 2) -> Tensor:
        """Return views of images x, (count · batch, channels, height, width), view by view."""
        return random_views(x, count, self.area, self.colour, self.flip)

    def represent(self, model: nn.Module) -> Representation:
        """Return what the classifier is handed. Raises BadInput for a model that shows none."""
        return Representation(model, view(model, self.input_shape, probe=False))


Request = TypeVar("Request", bound=ViewPretext)


class InstalledViews(Installed, Generic[Request]):
    """Pretraining at work: the loop's forward is its own.

    Args:
        request: The technique.
        representation: Of the model.
        heads: What it adds beside the classifier; "project" follows the representation.
    """

    pretext = True

    def __init__(
        self, request: Request, representation: Representation, heads: dict[str, nn.Module]
    ) -> None:
        super().__init__(representation.add(request.name, nn.ModuleDict(heads)))
        self.request, self.representation, self.heads = request, representation, heads

    def project(self, x: Tensor) -> Tensor:
        """Return the projections of images, (batch, dim)."""
        return self.heads["project"](self.representation(x))


class InstalledFollowed(InstalledViews[Request]):
    """Pretraining with a target that follows the model.

    Args:
        momentum: Share of the target that a step leaves, at the start.
        without: Names of heads that the target does without.
    """

    def __init__(
        self,
        request: Request,
        representation: Representation,
        heads: dict[str, nn.Module],
        momentum: float,
        without: tuple[str, ...] = (),
    ) -> None:
        super().__init__(request, representation, heads)
        unused = [p for name in without for p in heads[name].parameters()]
        self.target = MomentumTarget(representation.model, self.project, momentum, unused)

    def step_end(self) -> None:
        """Let the target follow."""
        self.target.follow(self.total_steps)

    def own_state(self) -> dict[str, Tensor]:
        """Return tensors beside the target's, by name, which `load_state_dict` copies into."""
        return {}

    def state_dict(self) -> dict[str, Tensor]:
        """Return the target and what else the pretext remembers."""
        return {**self.target.state_dict(), **self.own_state()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Load what `state_dict` returned."""
        self.target.load_state_dict({n: t for n, t in state.items() if n not in self.own_state()})
        for name, tensor in self.own_state().items():
            tensor.copy_(state[name])


def mlp(*widths: int, norm: bool = False, act: Callable[[], nn.Module] = nn.ReLU) -> nn.Sequential:
    """Return linear layers from width to width, with an activation between any two.

    Args:
        widths: Of the input, the hidden layers and the output.
        norm: Whether a batch norm stands before each activation.
        act: Makes an activation.
    """
    pairs = list(pairwise(widths))
    layers: list[nn.Module] = []
    for width, following in pairs[:-1]:
        layers.append(nn.Linear(width, following, bias=not norm))
        layers += [nn.BatchNorm1d(following), act()] if norm else [act()]
    return nn.Sequential(*layers, nn.Linear(*pairs[-1]))
