"""Queries as a language model's attention has them: asked for by transformers' own interface for
attention functions, which hands on to the one the model uses."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from greenvis.errors import BadInput

PREFIX = "greenvis_"
_CACHE: ContextVar[Cache | None] = ContextVar("greenvis_cache", default=None)


@contextmanager
def observed(config: Any, cache: Cache) -> Iterator[None]:
    """Let a cache's layers see the queries that attend to them within.

    Args:
        config: Of the language model, whose attention function is another within.
        cache: Of layers that `observe` queries.

    Raises:
        BadInput: For an attention function that is not transformers' own.
    """
    before = config._attn_implementation or "eager"
    name = PREFIX + before
    if before != "eager" and before not in ALL_ATTENTION_FUNCTIONS:
        raise BadInput(f"kv_cache does not know the attention '{before}': use sdpa or eager")
    ALL_ATTENTION_FUNCTIONS.register(name, _Observing(before))
    if before in ALL_MASK_ATTENTION_FUNCTIONS:
        ALL_MASK_ATTENTION_FUNCTIONS.register(name, ALL_MASK_ATTENTION_FUNCTIONS[before])
    token = _CACHE.set(cache)
    config._attn_implementation = name
    try:
        yield
    finally:
        config._attn_implementation = before
        _CACHE.reset(token)


class _Observing:
    """An attention function that shows the queries to the cache's layer before it attends."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        **kwargs: Any,
    ) -> Any:
        """Return what the model's own attention function does."""
        cache = _CACHE.get()
        attention: Any = module
        layer: Any = None if cache is None else cache.layers[attention.layer_idx]
        if layer is not None:
            scaling = kwargs.get("scaling") or query.shape[-1] ** -0.5
            layer.observe(query.detach(), scaling)
            layer.evict()
        if self.name == "eager":
            own = sys.modules[type(module).__module__].eager_attention_forward
        else:
            own = ALL_ATTENTION_FUNCTIONS[self.name]
        return own(module, query, key, value, attention_mask, **kwargs)
