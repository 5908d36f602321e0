"""Fewer tokens for each image before a language model reads them."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from greenvis.core.technique import Installed, Technique
from greenvis.errors import BadInput
from greenvis.models.structure import view
from greenvis.tasks import vqa
from greenvis.techniques._shared.blocks import split_blocks
from greenvis.techniques.inference.tokens._attention_inputs import Source, sources
from greenvis.techniques.inference.tokens._matching import bipartite_soft_matching
from greenvis.techniques.inference.tokens._pruning import best, class_attention

PROJECTOR, TOWER = "multi_modal_projector", "vision_tower"


class ImageTokens(Technique):
    """Merge or remove tokens of each image before a vision–language model reads its prompt.

    Saves prefill and decode alike, for images and for all that comes behind them, in training too:
    where answers are short nearly all a prompt costs is its image tokens. Costs a comparison of
    the tokens, once an image, and accuracy where detail is asked for. "merge" joins the most
    similar ones to their mean, again and again (bipartite soft matching of ToMe: Bolya et al.,
    2023); "pool" takes the mean of neighbours on a smaller grid (adaptive average pooling, DeCo:
    Yao et al., 2024); "prune" keeps those that the class token of the image encoder attends to
    most (EViT: Liang et al., 2022; for language models FasterVLM: Zhang et al., 2024). Those that
    stay keep their order. What `generate` returns has the full prompt in front, as without. Where
    the grid allows the number, try "pool" first: with as many tokens it showed no loss where
    "merge" lost 4 ± 3 points (reports/image-tokens).

    Loses against an encoder with larger patches, where one is to be trained anyway: it makes as
    few tokens, and is itself cheaper.

    Example:
        >>> from greenvis import models
        >>> llava = models.build("plain/llava", img_size=32)
        >>> live = gv.wrap(llava, gv.ImageTokens(keep=0.25))
        >>> prompt = torch.tensor([[64] * 16 + [5, 6, 7, 8]])  # 64 stands for a patch
        >>> images = torch.rand(1, 3, 32, 32)
        >>> llava(input_ids=prompt, pixel_values=images).logits.shape[1]  # 4 and the question
        8
        >>> llava.generate(input_ids=prompt, pixel_values=images, max_new_tokens=2).shape
        torch.Size([1, 22])
    """

    name = "image_tokens"
    stage = "tokens"
    tasks = frozenset({"vqa"})
    instead = "token_merge and token_prune make tokens of image classifiers fewer"
    examples = ({"keep": 0.5}, {"method": "prune", "keep": 3}, {"method": "pool", "keep": 4})
    neutral = {"keep": 1.0}

    method: Literal["merge", "pool", "prune"] = Field(
        default="merge",
        description="join similar tokens, or neighbours, or remove what matters least",
    )
    keep: Annotated[int, Field(ge=1)] | Annotated[float, Field(gt=0, le=1)] = Field(
        default=0.25, description="tokens of an image that remain: a number, or a share of them"
    )

    def install(self, model: nn.Module) -> Installed:
        """Put it in front of the projector, `forward` and `generate`.

        Raises:
            BadInput: For a model without a projector of image tokens, and where "prune" finds no
                class token.
        """
        config: Any = getattr(model, "config", None)
        projectors = _named(model, PROJECTOR)
        if not projectors or not hasattr(config, "vision_config"):
            raise BadInput(
                f"{type(model).__name__} has no `{PROJECTOR}` of image tokens: image_tokens wants "
                "a Llava, such as plain/llava or transformers/LlavaForConditionalGeneration"
            )
        count = vqa.image_tokens(config)
        remain = self.keep if isinstance(self.keep, int) else math.ceil(self.keep * count)
        if remain > count:
            raise BadInput(f"keep is {remain}, and an image has {count} tokens: give fewer")
        live = InstalledImageTokens(model, count, remain)
        if remain == count:
            return live
        if self.method == "prune":
            live.attended = _attended(model, config, live)
        if self.method == "pool":
            live.grids = _grids(count, remain)
        projectors[0].register_forward_pre_hook(live.reduce)
        model.register_forward_pre_hook(live.shorten, with_kwargs=True)
        if callable(getattr(model, "generate", None)):
            live.inner = model.generate
            model.generate = live.generate  # type: ignore[assignment]
        return live


class InstalledImageTokens(Installed):
    """Fewer image tokens at work."""

    unmergeable = "which tokens an image keeps is no weight; keep the model wrapped"

    def __init__(self, model: nn.Module, count: int, remain: int) -> None:
        super().__init__()
        self.model, self.count, self.remain = model, count, remain
        config: Any = model.config
        self.token = getattr(config, "image_token_id", getattr(config, "image_token_index", None))
        self.forward_names = [*inspect.signature(model.forward).parameters]
        self.attended: _Attended | None = None
        self.grids: tuple[int, tuple[int, int]] | None = None
        self.inner: Any = None

    def replacement_blocker(self, path: str) -> str:
        """Return "": nothing of a module that is not its own."""
        return ""

    def reduce(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Return the projector's input with fewer tokens, (images, remaining, channels)."""
        x = args[0]
        if x.dim() != 3 or x.shape[1] != self.count:
            raise BadInput(
                f"image_tokens wants {self.count} tokens of each image, and the encoder gives "
                f"{tuple(x.shape)}: give images of the size the model was made for"
            )
        if self.grids is not None:
            return (pooled(x, *self.grids), *args[1:])
        if self.attended is None:
            return (merged(x, self.remain), *args[1:])
        index = best(self.attended.scores(self.count), self.remain).sort(dim=1).values
        return (x.gather(1, index.unsqueeze(-1).expand(-1, -1, x.shape[2])), *args[1:])

    def shorten(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Take the places of the tokens that go out of the prompt, in `forward`."""
        named = {**dict(zip(self.forward_names, args, strict=False)), **kwargs}
        return (), self._short(named)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Answer as `model.generate` does, from the shorter prompt; the one that was given stands
        in front of the answer."""
        if args:
            kwargs = {"input_ids": args[0], **kwargs}
        if "inputs" in kwargs:
            kwargs["input_ids"] = kwargs.pop("inputs")
        short, before = self._short(kwargs), kwargs.get("input_ids")
        if not isinstance(before, Tensor):
            return self.inner(*args[1:], **short)
        length = short["input_ids"].shape[1]
        if isinstance(short.get("max_length"), int):
            short["max_length"] -= before.shape[1] - length
        out = self.inner(*args[1:], **short)
        tokens = out if isinstance(out, Tensor) else out.sequences
        prompt = before.repeat_interleave(len(tokens) // len(before), 0)
        tokens = torch.cat([prompt, tokens[:, length:]], 1)
        if isinstance(out, Tensor):
            return tokens
        out["sequences"] = tokens
        return out

    def _short(self, named: Mapping[str, Any]) -> dict[str, Any]:
        """Return a call's arguments with the tokens of images that remain alone."""
        ids, images = named.get("input_ids"), named.get("pixel_values")
        if images is None:
            return dict(named)  # tokens of an answer
        if ids is None:
            raise BadInput("image_tokens shortens prompts of tokens: give input_ids, no embeddings")
        image = ids == self.token
        total = int(image.sum())
        if total == len(images) * self.remain:
            return dict(named)  # `generate` has done so
        if total != len(images) * self.count:
            raise BadInput(
                f"{len(images)} images of {self.count} tokens each, and {total} tokens for them in "
                "the prompt: give as many as the model's processor does"
            )
        stay = ~image | ((image.cumsum(1) - 1) % self.count < self.remain)
        lengths = stay.sum(1)
        if bool((lengths != lengths[0]).any()):
            raise BadInput(
                "prompts of this batch have different numbers of images, so that some would be "
                "shorter than others: answer those with as many images together"
            )
        return {
            key: value[stay].view(len(ids), -1)
            if isinstance(value, Tensor) and value.shape == ids.shape
            else value
            for key, value in named.items()
        }


def merged(x: Tensor, remain: int) -> Tensor:
    """Return tokens of which the most similar have become their mean, until `remain` are left.

    Args:
        x: (images, tokens, channels); the choice has no gradient, the means do.
        remain: How many.

    Returns:
        (images, remain, channels), in the order of their places.
    """
    size: Tensor | None = None
    while x.shape[1] > remain:
        matching = bipartite_soft_matching(x, min(x.shape[1] - remain, x.shape[1] // 2))
        x, size = matching.merge(x, size)
        order = matching.positions.argsort(1)
        x = x.gather(1, order.unsqueeze(-1).expand(-1, -1, x.shape[2]))
        size = size.gather(1, order)
    return x


def pooled(x: Tensor, side: int, grid: tuple[int, int]) -> Tensor:
    """Return the mean tokens of the fields of a smaller grid (adaptive average pooling).

    Args:
        x: (images, tokens, channels), the last side · side of them patches, row by row; class and
            register tokens in front stay as they are.
        side: Rows, and columns, of patches.
        grid: Rows and columns of fields.

    Returns:
        (images, remaining, channels), row by row.
    """
    front, patches = x.split([x.shape[1] - side * side, side * side], 1)
    places = patches.mT.unflatten(2, (side, side))
    return torch.cat([front, F.adaptive_avg_pool2d(places, grid).flatten(2).mT], 1)


def _grids(count: int, remain: int) -> tuple[int, tuple[int, int]]:
    """Return the side of the grid of patches, and that of `remain` tokens nearest to a square."""
    side = math.isqrt(count)
    fields = remain - (count - side * side)
    sizes = [(fields // n, n) for n in range(1, side + 1) if fields > 0 and fields % n == 0]
    fits = [size for size in sizes if size[0] <= side]
    if not fits:
        raise BadInput(
            f"keep is {remain}, and neighbours on a grid of {side} × {side} become rows × columns "
            "of fields: give a product, such as "
            f"{max(side // 2, 1) ** 2 + count - side * side}"
        )
    return side, min(fits, key=lambda size: abs(size[0] - size[1]))


class _Attended:
    """Queries and keys of the block whose output the projector reads."""

    def __init__(self, tower: nn.Module, query: Source, key: Source) -> None:
        self.tower, self.query, self.key = tower, query, key
        self._values: dict[str, Tensor] = {}

    def watch(self) -> None:
        """Watch them from here on."""
        self.query.watch(self.tower, self._keep_query)
        self.key.watch(self.tower, self._keep_key)

    def scores(self, count: int) -> Tensor:
        """Return how much the class token attends to each patch, (images, count)."""
        query, key = (
            s.read(self.tower.get_submodule(s.path), self._values[s.which])
            for s in (self.query, self.key)
        )
        self._values = {}
        return class_attention(query, key)[:, -count:]

    def _keep_query(self, value: Tensor) -> None:
        self._values["query"] = value.detach()

    def _keep_key(self, value: Tensor) -> None:
        self._values["key"] = value.detach()


def _attended(model: nn.Module, config: Any, live: InstalledImageTokens) -> _Attended:
    tower = next(iter(_named(model, TOWER)), None)
    layer = getattr(config, "vision_feature_layer", -1)
    if tower is None or not isinstance(layer, int):
        raise BadInput(
            f"{type(model).__name__} has no one layer of a `{TOWER}` whose class token says what "
            "matters: set method: merge"
        )
    structure = view(tower, probe=False)
    if not structure.prefix_tokens:
        raise BadInput(
            f"{type(tower).__name__} has no class token that says which patches matter: set "
            "method: merge"
        )
    blocks = split_blocks(tower, structure, "image_tokens")
    number = layer - 1 if layer > 0 else len(blocks) + layer
    pair = (sources(tower, structure, blocks, which)[number] for which in ("query", "key"))
    attended = _Attended(tower, *pair)
    attended.watch()
    return attended


def _named(model: nn.Module, name: str) -> list[nn.Module]:
    return [m for path, m in model.named_modules() if path.split(".")[-1] == name]
