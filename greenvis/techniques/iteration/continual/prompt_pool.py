"""Learning to prompt: a frozen vision transformer, and a pool of prompts from which each image
picks its own by key."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from greenvis.core.technique import Classifier, InputShape, Installed, Samples, Technique
from greenvis.errors import GreenvisError
from greenvis.models.structure import view
from greenvis.tasks.answers import IMAGES, IMAGES_ALONE
from greenvis.techniques._shared.attach import check_runs, like, train_only
from greenvis.techniques._shared.doors import Doors, Passing, again, refuse_tracing
from greenvis.techniques._shared.prompts import Joined, prompt_blocks
from greenvis.techniques.iteration.continual._queries import (
    Asker,
    at,
    feature,
    fingerprint,
    readers,
)

_CHILD = "prompt_pool"


def similarities(query: Tensor, keys: Tensor) -> Tensor:
    """Return the cosine of each query with each key.

    Args:
        query: (batch, dim).
        keys: (pool, dim).

    Returns:
        (batch, pool).
    """
    return F.normalize(query, dim=-1) @ F.normalize(keys, dim=-1).T


def nearest_prompts(similarity: Tensor, top_n: int, penalty: Tensor | None = None) -> Tensor:
    """Return the `top_n` prompts of least distance (1 - cosine) × penalty for each sample (Wang et
    al., 2022, eq. 3 and 4).

    Args:
        similarity: cosines, (batch, pool).
        top_n: prompts per sample.
        penalty: (pool,), greater for prompts that earlier tasks used often; None: all alike.

    Returns:
        int64 (batch, top_n), the nearest first.
    """
    scores = similarity.detach()
    return (scores if penalty is None else (scores - 1) * penalty).topk(top_n, dim=1).indices


def majority(index: Tensor, pool: int) -> Tensor:
    """Return the prompts that most samples picked, the most frequent first.

    Args:
        index: prompts picked per sample, (batch, top_n).
        pool: prompts in the pool.

    Returns:
        int64 (top_n,).
    """
    counts = torch.bincount(index.flatten(), minlength=pool)
    picked = counts.nonzero().flatten()
    # as wide as the pool, so that ties fall as in the authors' port
    padded = F.pad(counts[picked], (0, pool - len(picked)))
    return picked[padded.topk(index.shape[1]).indices]


def reduce_sim(similarity: Tensor, index: Tensor) -> Tensor:
    """Return the similarities of the picked prompts, summed over them and averaged over the batch
    (eq. 5).

    Args:
        similarity: cosines, (batch, pool).
        index: prompts picked per sample, (batch, top_n).

    Returns:
        A scalar.
    """
    return similarity.gather(1, index).sum() / len(index)


class PromptPool(Technique):
    """Learn a pool of prompts for a frozen vision transformer; each image picks its `top_n` by key
    (L2P: Wang et al., 2022).

    Saves, over a stream of tasks, the storage and training of a model per task, and replay: nothing
    of earlier tasks is kept but the pool. Costs compute for good: a second forward (query: class;
    with query: patch none) to ask the frozen model for the image's class feature, and top_n·length
    more tokens in every block; nothing merges. Order: [class and other prefix
    tokens][prompts][patches], prompts without position embedding. The keys learn by the term
    "prompt_pool", -pull·(mean similarity of picked keys to the query), and by that alone. Each
    image picks for itself. The authors' port takes one majority for the whole batch, in tests too,
    so that accuracy depends on how tests are batched: select: batch, which breaks batch
    independence. diversity: 1 multiplies distances by how often earlier tasks used a prompt (eq.
    4), in training. cache: the query of each image is computed once and read back in later epochs
    and runs. readout: prompts gives the head the mean of the prompts' outputs in place of every
    token (before the final norm; the authors average behind it). The classifier trains in full; the
    authors' loss is among a task's own classes (a stream with head: multi).

    Example:
        >>> live = gv.wrap(model, gv.PromptPool(pool=5, length=2, top_n=2))
        >>> sorted(live.terms(x, y, model(x)))
        ['prompt_pool']
    """

    name = "prompt_pool"
    stage = "tokens"
    tasks = IMAGES
    instead = IMAGES_ALONE
    examples = (
        {"pool": 4, "length": 2, "top_n": 2},
        {"pool": 3, "length": 1, "top_n": 3, "query": "patch", "readout": "class",
         "select": "batch", "head": "freeze"},
    )  # fmt: skip
    neutral = None

    pool: int = Field(default=10, ge=1, description="prompts in the pool")
    length: int = Field(default=5, ge=1, description="tokens of each prompt")
    top_n: int = Field(default=5, ge=1, description="prompts each image picks")
    pull: float = Field(
        default=0.1, gt=0, description="factor of the term that draws picked keys to their queries"
    )
    query: Literal["class", "patch"] = Field(
        default="class",
        description="what picks: the frozen model's feature (a second forward), or the mean "
        "patch embedding",
    )
    select: Literal["sample", "batch"] = Field(
        default="sample", description="each image its own prompts, or the batch's majority"
    )
    diversity: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="how far prompts that earlier tasks used are put back in training",
    )
    readout: Literal["prompts", "class"] = Field(
        default="prompts",
        description="what the head reads: the prompts' mean, or what it always read",
    )
    cache: bool = Field(
        default=False, description="compute each training image's query once, and keep it on disk"
    )
    head: Classifier = "train"
    input_shape: InputShape = None

    @model_validator(mode="after")
    def _enough(self) -> PromptPool:
        if self.top_n > self.pool:
            raise ValueError(
                f"top_n is {self.top_n}, but the pool has {self.pool} prompts: give fewer, or a "
                "larger pool"
            )
        return self

    @property
    # a majority is a matter of the whole batch
    def breaks(self) -> frozenset[str]:  # type: ignore[override]
        """What this breaks for others: the grid of tokens, and with select "batch" the independence
        of samples."""
        return frozenset(
            {"token_grid"} | ({"batch_independence"} if self.select == "batch" else set())
        )

    def install(self, model: nn.Module) -> Installed:
        """Put the pool in. Raises BadInput for anything but a plain sequence of patches through all
        blocks."""
        structure = view(model, self.input_shape, probe=False)
        blocks = prompt_blocks(model, structure)
        dim = structure.layouts[blocks[0]].output[2]
        width = dim if self.query == "patch" else feature(model, structure).shape[1]
        kind = like(model.get_submodule(blocks[0]))
        rows = torch.empty(self.pool, self.length, dim, **kind).uniform_(-1, 1)
        pool = Pool(
            self,
            rows,
            torch.empty(self.pool, width, **kind).uniform_(-1, 1),
            structure.prefix_tokens,
        )
        asker = None
        if self.query == "class":
            heads = at(model, structure.classifier)
            asker = Asker(
                pool,
                structure.classifier,
                readers(structure),
                fingerprint(model, heads) if self.cache else "",
            )
            asker.put(model)
        doors = Doors(model, [model.get_submodule(path) for path in blocks])
        pool.put(model, blocks, _CHILD, doors)
        doors.put()
        doors.settle(structure.example)
        check_runs(model, structure.example, [pool.rows], f"{self.top_n} prompts of {self.length}")
        live = InstalledPromptPool(
            train_only(model, [pool.rows, pool.keys], structure, self.head), pool, asker
        )
        live.unmergeable = (
            "prompts are tokens of the sequence, not a change of weights; keep the model wrapped"
        )
        return live


class Pool(Joined):
    """Prompts `rows` (pool, length, dim) with `keys` (pool, query width); picks for each sequence
    that passes.

    picked: how many samples picked each prompt in this task's training. before: the same in all
    earlier tasks.
    """

    picked: Tensor
    before: Tensor

    def __init__(self, request: PromptPool, rows: Tensor, keys: Tensor, prefix: int) -> None:
        super().__init__(prefix, request.top_n * request.length)
        self.request = request
        self.rows, self.keys = nn.Parameter(rows), nn.Parameter(keys)
        for name in ("picked", "before"):
            self.register_buffer(
                name, torch.zeros(len(rows), dtype=torch.float64, device=rows.device)
            )
        # "query": (batch, dim), "asked" too until it is used; "pull": how near the picked prompts
        # are
        self.now: dict[str, Tensor] = Passing()

    @property
    def query(self) -> Tensor | None:
        """What the model asked gave for the batch, (batch, dim)."""
        return self.now.get("query")

    def ask(self, query: Tensor) -> None:
        """Take the query for the next pass."""
        self.now.update(query=query, asked=query)

    def rows_for(self, x: Tensor) -> Tensor:
        """Pick by the query and return the prompts (batch, top_n · length, dim)."""
        refuse_tracing(x, "which prompts an image picks")
        if self.request.query == "class" and not again() and self.now.pop("asked", None) is None:
            raise GreenvisError(
                "prompt_pool asks the whole model which prompts to take, and this call of its "
                "blocks went past that: call the model itself, or set query: patch"
            )
        query = (
            x[:, self.prefix :].mean(1).detach()
            if self.request.query == "patch"
            else self.now["query"]
        )
        similarity = similarities(query, self.keys.to(query.dtype))
        learning = self.training and torch.is_grad_enabled()
        index = nearest_prompts(
            similarity, self.request.top_n, self._penalty(similarity) if learning else None
        )
        if self.request.select == "batch":
            index = majority(index, len(self.keys)).expand(len(x), -1)
        if learning:
            self.picked += torch.bincount(index.flatten(), minlength=len(self.keys))
        self.now["pull"] = reduce_sim(similarity, index)
        return self.rows[index].flatten(1, 2)

    def _penalty(self, similarity: Tensor) -> Tensor | None:
        """Return 1 - diversity + diversity · (share of earlier picks), (pool,); nothing before the
        first task has ended."""
        if not self.request.diversity or not self.before.any():
            return None
        share = (self.before / self.before.sum()).to(similarity.dtype)
        # unused ones: by distance still
        return (1 - self.request.diversity + self.request.diversity * share).clamp(min=1e-6)

    def last(self, x: Tensor, rows: Tensor, laid_out: bool) -> Tensor:
        """Return the sequence; with readout "prompts" every token of it becomes the mean of the
        prompts' outputs."""
        if self.request.readout == "class":
            return x
        if laid_out:
            raise GreenvisError(
                "prompt_pool puts the prompts' mean in the place of every token, so there are no "
                "features of patches to give: set readout: class"
            )
        return rows.mean(1, keepdim=True).expand_as(x)


class InstalledPromptPool(Installed):
    """The pool at work. Adds the term "prompt_pool"."""

    def __init__(self, trainable: tuple[str, ...], pool: Pool, asker: Asker | None) -> None:
        super().__init__(trainable, freezes=True)
        self.pool = pool
        self.asker = asker
        self.cache = asker.cache if asker is not None else None
        if self.cache is not None:
            self.cache.note = self._tell

    @property
    def samples(self) -> Samples | None:
        """Which samples the current batch holds."""
        return self.asker.samples if self.asker is not None else None

    @samples.setter
    def samples(self, samples: Samples | None) -> None:  # type: ignore[override]
        if self.asker is not None:
            self.asker.samples = samples

    def _tell(self, text: str) -> None:
        self.note(text)  # a tracked run may begin after this

    def terms(self, x: Any, y: Any, logits: Tensor | None) -> Mapping[str, Tensor]:
        """Return {"prompt_pool": -pull · reduce_sim} of the forward just done."""
        pulled = self.pool.now.pop("pull", None)
        return {} if pulled is None else {"prompt_pool": -self.pool.request.pull * pulled}

    def end_experience(self, loader: Any) -> None:
        """Count this task's picks among the earlier ones."""
        self.pool.before += self.pool.picked
        self.pool.picked.zero_()

    def replacement_blocker(self, path: str) -> str:
        """Return "" where no query was kept of the earlier model."""
        return "the queries that were kept" if self.cache is not None else ""

    @property
    def shares(self) -> Tensor:
        """How often each prompt was picked in training so far, as shares that add up to 1:
        (pool,)."""
        counts = self.pool.before + self.pool.picked
        return counts / counts.sum().clamp(min=1)

    def facts(self) -> Mapping[str, Any]:
        """Return how often each prompt was picked, and what the kept queries saved."""
        queries = {"prompt_pool_queries": self.cache.facts()} if self.cache is not None else {}
        return {"prompt_pool_shares": [round(s, 4) for s in self.shares.tolist()], **queries}

    def undo(self) -> None:
        """Let go of the kept queries' files."""
        if self.cache is not None:
            self.cache.close()
