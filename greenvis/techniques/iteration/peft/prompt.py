"""Visual prompt tuning: freeze a vision transformer, learn tokens that stand between its own."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field
from sklearn.cluster import KMeans
from torch import Tensor, nn

from greenvis.core import distributed
from greenvis.core.technique import Classifier, InputShape, Installed, Technique
from greenvis.errors import BadInput
from greenvis.models.structure import view
from greenvis.models.structure.probing import probing
from greenvis.tasks.answers import IMAGES
from greenvis.techniques._shared.attach import check_runs, like, train_only
from greenvis.techniques._shared.doors import Doors
from greenvis.techniques._shared.prompts import Joined, prompt_blocks

_CHILD = "prompt"
_IMAGES = 64  # of the first batch that are looked at for prototypes


def prototypes(tokens: Tensor, number: int, rounds: int = 20) -> Tensor:
    """Return centres of the tokens by Lloyd's k-means, the same ones each time.

    Starts from tokens spread evenly over the list.

    Args:
        tokens: (count, dim).
        number: centres.
        rounds: iterations at most.

    Returns:
        (number, dim).

    Raises:
        BadInput: for fewer tokens than centres.
    """
    if len(tokens) < number:
        raise BadInput(
            f"{number} prototypes need as many tokens, and there are {len(tokens)}: give larger "
            "batches, or fewer"
        )
    points = tokens.detach().cpu().numpy()
    start = points[np.linspace(0, len(points) - 1, number).astype(int)]
    options: dict[str, Any] = {"init": start, "n_init": 1, "max_iter": rounds}
    kmeans = KMeans(number, **options).fit(points)
    return torch.from_numpy(kmeans.cluster_centers_).to(tokens)


class Prompt(Technique):
    """Learn prompt tokens in the input of a frozen vision transformer (VPT: Jia et al., 2022):
    before the first block (shallow) or, new ones, before each (deep).

    Saves optimizer memory and storage per task (the delta). Costs compute, in training and for
    good: every block carries more tokens, and nothing merges. Order: [class and other prefix
    tokens][prompts][patches]. Prompts get no position embedding and start from U(±√(6 / (c·p² +
    dim))) for patches of c channels and side p; with init "prototypes", at the first training
    batch, from centres of its patch tokens at their block (Wang et al., 2024, who take the whole
    set). Behind the last block they are taken out, so a head that pools the patches does not see
    them. The classifier trains in full. Dropout and stochastic depth of the frozen part stay as
    `model.train()` sets them (the authors hold them off: give a model without).

    Example:
        >>> live = gv.wrap(model, gv.Prompt(tokens=4))
        >>> print(live.summary())
        VisionTransformer with prompt
          prompt: {'tokens': 4}
          trains 293 of 32,517 parameters (0.90%); delta 0.00 MB
    """

    name = "prompt"
    stage = "tokens"
    breaks = frozenset({"token_grid", "token_places"})
    examples = (
        {"tokens": 3},
        {"tokens": 2, "depth": "deep", "head": "freeze"},
        {"tokens": 2, "depth": "deep", "init": "prototypes"},
    )
    neutral = None

    tokens: int = Field(default=10, ge=1, description="prompts in each prompted block")
    depth: Literal["shallow", "deep"] = Field(
        default="shallow", description="prompt the first block, or each with its own"
    )
    init: Literal["uniform", "prototypes"] = Field(
        default="uniform",
        description="how prompts start; prototypes looks at the first training batch",
    )
    dropout: float = Field(default=0.0, ge=0, lt=1, description="dropout on the prompts")
    head: Classifier = "train"
    input_shape: InputShape = None

    @property
    def tasks(self) -> frozenset[str] | None:  # type: ignore[override]
        """What it is right for: prototypes are of batches of images."""
        return IMAGES if self.init == "prototypes" else None

    def install(self, model: nn.Module) -> Installed:
        """Put the prompts in. Raises BadInput for anything but a plain sequence of patches through
        all blocks."""
        structure = view(model, self.input_shape, probe=False)
        blocks = prompt_blocks(model, structure)
        length, dim = structure.layouts[blocks[0]].output[1:]
        # c·p², also behind a convolutional stem
        patch = math.prod(structure.example.shape[1:]) / (length - structure.prefix_tokens)
        bound = math.sqrt(6 / (patch + dim))
        kind = like(model.get_submodule(blocks[0]))
        put: list[Prompts] = []
        for _ in blocks if self.depth == "deep" else blocks[:1]:
            rows = torch.empty(self.tokens, dim, **kind).uniform_(-bound, bound)
            prompts = Prompts(rows, structure.prefix_tokens, self.dropout)
            put.append(prompts)
        doors = Doors(model, [model.get_submodule(path) for path in blocks])
        for path, prompts in zip(blocks, put, strict=False):
            prompts.put(model, [path] if self.depth == "deep" else blocks, _CHILD, doors)
        doors.put()
        doors.settle(structure.example)
        added = [prompts.rows for prompts in put]
        check_runs(model, structure.example, added, f"{self.tokens} {self.depth} prompts")
        names = train_only(model, added, structure, self.head)
        return InstalledPrompt(model, put, names, started=self.init == "uniform")


class InstalledPrompt(Installed):
    """The prompts at work."""

    unmergeable = (
        "prompts are tokens of the sequence, not a change of weights; keep the model wrapped"
    )

    def __init__(
        self, model: nn.Module, put: list[Prompts], trainable: tuple[str, ...], started: bool
    ) -> None:
        super().__init__(trainable, freezes=True)
        self.model, self.put = model, put
        self.uniform = self.started = started

    def batch(self, x: Any, y: Any) -> tuple[Any, Any]:
        """Start from the first batch, where asked to."""
        if not self.started:
            self._start(x[:_IMAGES])
            self.started = True
        return x, y

    def terms(self, x: Any, y: Any, logits: Tensor | None) -> Mapping[str, Tensor]:
        """Return no terms. Raises BadInput where the loop never showed the batch that prompts were
        to start from."""
        if not self.started:
            raise BadInput(
                "prompts with init: prototypes start from the first training batch: call batch(x, "
                "y) of the wrapped model before its forward"
            )
        return {}

    def replacement_blocker(self, path: str) -> str:
        """Return "": nothing of a module that is not its own."""
        return ""

    def state_dict(self) -> dict[str, Tensor]:
        """Return whether the prompts have started, where that is not when they are put in."""
        return {} if self.uniform else {"started": torch.tensor(self.started)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take back what `state_dict` gave."""
        self.started = self.uniform or bool(state.get("started", True))

    def _start(self, images: Tensor) -> None:
        with probing(self.model):  # which gives back what `noted` and `away` were
            for prompts in self.put:
                prompts.away = True
            self.model(images)
            noted = [torch.cat([t.flatten(0, 1) for t in p.noted]).float() for p in self.put]
        starts = [
            prototypes(tokens, prompts.length)
            for tokens, prompts in zip(noted, self.put, strict=True)
        ]
        with torch.no_grad():
            for prompts, start in zip(self.put, starts, strict=True):
                prompts.rows.copy_(start)
        distributed.sync(prompts.rows for prompts in self.put)


class Prompts(Joined):
    """Rows (tokens, dim), the same for each sample, that join a sequence behind its prefix, and
    leave it again."""

    def __init__(self, rows: Tensor, prefix: int, dropout: float) -> None:
        super().__init__(prefix, len(rows))
        self.rows = nn.Parameter(rows)
        self.dropout = nn.Dropout(dropout)
        self.noted: list[Tensor] = []  # patch tokens, while these are away

    def passed(self, number: int, x: Tensor) -> None:
        """Note the patch tokens."""
        if not number:
            self.noted.append(x[:, self.prefix :])

    def rows_for(self, x: Tensor) -> Tensor:
        """Return the rows as (batch, tokens, dim)."""
        return self.dropout(self.rows).expand(x.shape[0], -1, -1)
