"""What of a prompt's keys and values stays while a model answers in words."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field
from torch import Tensor, nn

from greenvis.core.technique import Installed, Technique
from greenvis.errors import BadInput

if TYPE_CHECKING:
    from transformers.cache_utils import Cache

Method = Literal["static", "window", "h2o", "snapkv", "key_norm"]
EVICTING = ("window", "h2o", "snapkv", "key_norm")


class KvCache(Technique):
    """Keep the keys and values of a prompt in a buffer made at once, or keep some of them alone,
    while a model answers in words about images: in `model.generate`.

    Saves decode energy, the more the longer the prompt; costs nothing in training, of which it
    takes no part. "static" is without loss: rows stand in a buffer with room for more, so that none
    is copied when one is added, and attention sees those alone that are there, without the mask
    that transformers' StaticCache wants (which is for compiled models). The others let rows go, by
    layer and head: "window" keeps the first and the newest (StreamingLLM: Xiao et al., 2024); "h2o"
    the newest half and what got most attention so far (Zhang et al., 2023); "snapkv" the prompt's
    end and what that attends to (Li et al., 2024), and all of the answer; "key_norm" the newest and
    the shortest keys (Devoto et al., 2024). "h2o" and "snapkv" compute attention of their own
    beside the fused kernel: once more for all queries, and for the last of the prompt. Positions
    count on, so that RoPE goes on as if nothing had gone.

    Loses where answers are short: then nearly all is the prompt, which is read in full before
    anything goes (`image_tokens` shortens that), and below about 1,000 rows "static" saves nothing.
    Saves more with several prompts at once: the weights are read once for all of them, the rows,
    which transformers' dynamic cache copies for each token, of each.

    Example:
        >>> from greenvis import models
        >>> llava = models.build("plain/llava", img_size=32)
        >>> live = gv.wrap(llava, gv.KvCache(method="snapkv", rows=0.25))
        >>> prompt = torch.tensor([[64] * 16 + [5, 6, 7, 8]])  # 64 stands for a patch
        >>> images = torch.rand(1, 3, 32, 32)
        >>> answer = llava.generate(input_ids=prompt, pixel_values=images, max_new_tokens=2)
        >>> live.installed[0].cache.layers[0].keys.shape[2]  # of 20 rows 5 stay, and the answer's
        6
    """

    name = "kv_cache"
    stage = "exits"
    needs = frozenset({"batch_independence", "every_block"})
    tasks = frozenset({"vqa"})
    instead = "it keeps what `generate` reads again, and this task has one answer per forward"
    only_with = {
        "rows": ("method", EVICTING),
        "sinks": ("method", ("window",)),
        "recent": ("method", ("snapkv", "key_norm")),
        "kernel": ("method", ("snapkv",)),
    }
    examples = ({}, {"method": "snapkv", "rows": 6, "recent": 2}, {"method": "window", "rows": 0.5})

    method: Method = Field(default="static", description="which rows stay")
    rows: Annotated[int, Field(ge=1)] | Annotated[float, Field(gt=0, le=1)] = Field(
        default=0.25,
        description="how many stay for each layer and head: a number, or a share of the prompt's",
    )
    sinks: int = Field(default=4, ge=0, description="rows at the beginning that stay")
    recent: int = Field(
        default=32, ge=1, description="newest rows that stay; snapkv observes their queries"
    )
    kernel: int = Field(default=5, ge=1, description="rows attention is averaged over; odd")

    def install(self, model: nn.Module) -> Installed:
        """Take the place of `generate`.

        Raises:
            BadInput: For a model that does not generate, has an encoder of its own for the prompt,
                or layers that are not full attention.
        """
        if self.kernel % 2 == 0:
            raise BadInput(f"kernel is {self.kernel}; give an odd number, with a row in its middle")
        config = text_config(model, self.name)
        if self.method in EVICTING:
            kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention"}
            if kinds or getattr(config, "sliding_window", None):
                raise BadInput(
                    f"{type(model).__name__} has layers of {sorted(kinds) or 'a sliding window'}, "
                    "which keep some rows by themselves: use method: static"
                )
        live = InstalledKvCache(self, model, config)
        model.generate = live.generate  # type: ignore[assignment]
        return live


def text_config(model: Any, name: str) -> Any:
    """Return the configuration of the part of a model that generates words.

    Args:
        model: Of transformers.
        name: Of the technique, for the message.

    Raises:
        BadInput: For one that does not generate, or reads its prompt by an encoder.
    """
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "get_text_config") or not callable(getattr(model, "generate", None)):
        raise BadInput(
            f"{type(model).__name__} does not generate: {name} wants a language or "
            "vision–language model of transformers, such as transformers/"
            "LlavaForConditionalGeneration or plain/llava"
        )
    if getattr(config, "is_encoder_decoder", False):
        raise BadInput(
            f"{type(model).__name__} reads its prompt by an encoder; {name} wants a model that "
            "reads prompt and answer alike, as Llava"
        )
    return config.get_text_config(decoder=True)


class InstalledKvCache(Installed):
    """The cache at work in `generate`.

    Attributes:
        cache: Of the last answer, for those who look at what stayed; None before.
    """

    unmergeable = "which rows a cache keeps is no weight; keep the model wrapped"

    def __init__(self, request: KvCache, model: nn.Module, config: Any) -> None:
        super().__init__()
        self.request, self.model, self.config = request, model, config
        self.inner: Any = model.generate
        self.cache: Cache | None = None

    def replacement_blocker(self, path: str) -> str:
        """Return "": nothing of a module that is not its own."""
        return ""

    def new_cache(self) -> Cache:
        """Return an empty cache, of a layer for each of the model's."""
        from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

        from greenvis.techniques.inference.kv_cache import _layers

        r = self.request
        if r.method == "static":
            cache = DynamicCache(config=self.config)
            cache.layers = [
                _layers.BufferedLayer() if type(layer) is DynamicLayer else layer
                for layer in cache.layers
            ]
            return cache
        make = {
            "window": lambda: _layers.Window(r.rows, r.sinks),
            "h2o": lambda: _layers.HeavyHitters(r.rows),
            "snapkv": lambda: _layers.Observed(r.rows, r.recent, r.kernel),
            "key_norm": lambda: _layers.KeyNorm(r.rows, r.recent),
        }[r.method]
        return Cache(layers=[make() for _ in range(self.config.num_hidden_layers)])

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Answer as `model.generate` does, its arguments the same, with the cache asked for.

        Raises:
            BadInput: For another cache, for none, and for what rows that go would break: padded
                batches, tokens taken back.
        """
        own = self._own_cache(kwargs)
        if own:
            raise BadInput(
                f"generate was given {own}, and kv_cache makes the cache: leave it out, or undo() "
                "kv_cache"
            )
        self.cache = self.new_cache()
        if self.request.method == "static":
            return self.inner(*args, **kwargs, past_key_values=self.cache)
        self._refuse_padding(args, kwargs)
        for name in ("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit"):
            if kwargs.get(name) or getattr(kwargs.get("generation_config"), name, None):
                raise BadInput(
                    f"{name} takes tokens back, and rows that went do not come back: leave it out, "
                    "or set method: static"
                )
        from greenvis.techniques.inference.kv_cache._attention import observed

        if not self.cache.layers[0].reads_queries:  # type: ignore[union-attr]
            return self.inner(*args, **kwargs, past_key_values=self.cache)
        with observed(self.config, self.cache):
            return self.inner(*args, **kwargs, past_key_values=self.cache)

    def _own_cache(self, kwargs: dict[str, Any]) -> str:
        """Return what in a call asks for another cache, or for none; "" where nothing does."""
        config = kwargs.get("generation_config")
        for name in ("past_key_values", "cache_implementation"):
            if kwargs.get(name) is not None or getattr(config, name, None) is not None:
                return name
        if kwargs.get("use_cache", getattr(config, "use_cache", True)) is False:
            return "use_cache=False"
        return ""

    def _refuse_padding(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        mask, ids = kwargs.get("attention_mask"), kwargs.get("input_ids", kwargs.get("inputs"))
        ids = args[0] if args else ids
        padded = mask is not None and not bool(mask.all())
        if mask is None and isinstance(ids, Tensor):
            config = kwargs.get("generation_config") or getattr(self.model, "generation_config", {})
            pad = kwargs.get("pad_token_id", getattr(config, "pad_token_id", None))
            padded = isinstance(pad, int) and bool((ids == pad).any())
        if padded:
            raise BadInput(
                f"kv_cache {self.request.method}: prompts in this batch are padded, and the rows "
                "that stay of one are not those of another: answer prompts of one length together, "
                "or one by one, or set method: static"
            )
