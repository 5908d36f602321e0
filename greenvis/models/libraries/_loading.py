"""A model reference taken apart, and what building and loading have in common whatever the
library."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from greenvis.core import weights
from greenvis.errors import BadInput, nearest


class Request(NamedTuple):
    """A model reference taken apart. pretrained: a weight file, or whether to use the library's
    own; None: not said."""

    ref: str
    library: str
    name: str
    folder: Path
    pretrained: bool | Path | None
    # as the user names them, without `pretrained`, `memory_format`, `head` and what is the head's
    options: dict[str, Any]
    file: Path | None
    memory_format: torch.memory_format | None
    head: str | None = None
    head_options: Mapping[str, Any] = MappingProxyType({})


class Library(NamedTuple):
    """How one library's models are checked (raises BadInput, builds nothing) and built.

    local_weights: the folder whose weights a reference begins with, though nobody asked for any.
    """

    check: Callable[[Request], Any]
    build: Callable[[Request], nn.Module]
    local_weights: Callable[[Request], Path | None] = lambda request: None


def check_options(request: Request, options: Iterable[str], known: Iterable[str]) -> None:
    """Refuse an option that is not known, with the nearest that is."""
    names = set(known)
    for option in options:
        if option not in names:
            raise BadInput(f"{request.ref} has no option '{option}'{nearest(option, names)}")


def option_names(function: Callable[..., Any]) -> set[str] | None:
    """Return the names of a builder's options, with those of the class it says it returns; None
    where that stays open."""
    try:
        signature = inspect.signature(function, eval_str=True)
    except (NameError, ValueError):
        return None
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    names = {n for n, p in signature.parameters.items() if p.kind not in variadic}
    if all(p.kind not in variadic for p in signature.parameters.values()):
        return names
    built = signature.return_annotation
    if not inspect.isclass(built) or not issubclass(built, nn.Module) or built is nn.Module:
        return None
    for base in built.__mro__:  # up to the constructor that passes nothing on
        parameters = inspect.signature(base.__init__).parameters
        names |= {n for n, p in parameters.items() if p.kind not in variadic} - {"self"}
        if all(p.kind not in variadic for p in parameters.values()):
            break
    return names


def fetch(request: Request, load: Callable[[], Any]) -> Any:
    """Fetch the weights a library publishes, from its local cache or the net; say what to do where
    neither has them."""
    try:
        return load()
    except (
        Exception
    ) as error:  # offline, not published, a broken file: each library has its own words
        raise BadInput(
            f"{request.ref}: the published weights are neither in the local cache nor within reach "
            f"({weights.first_line(error)}); give `pretrained` a local safetensors file"
        ) from error


def set_in_chans(model: nn.Module, channels: int) -> None:
    """Give the model's first convolution another number of input channels; its weights become
    theirs summed or shared."""
    name, conv = next(
        ((n, m) for n, m in model.named_modules() if isinstance(m, nn.Conv2d)), ("", None)
    )
    if conv is None:
        raise BadInput(f"{type(model).__name__} has no convolution to take {channels} channels")
    if conv.in_channels == channels:
        return
    new = nn.Conv2d(
        channels,
        conv.out_channels,
        conv.kernel_size,  # type: ignore[arg-type]
        conv.stride,  # type: ignore[arg-type]
        conv.padding,  # type: ignore[arg-type]
        conv.dilation,  # type: ignore[arg-type]
        conv.groups,
        conv.bias is not None,
        conv.padding_mode,
    )
    with torch.no_grad():
        new.weight.copy_(adapt_channels(conv.weight, channels))
        if new.bias is not None and conv.bias is not None:
            new.bias.copy_(conv.bias)
    model.set_submodule(name, new)


def adapt_channels(weight: Tensor, channels: int) -> Tensor:
    """Turn a first convolution's weight (out, in, kh, kw) to other input channels, so that a grey
    image's output stays.

    To one channel: the sum over the old ones. To more: their mean repeated, over the ratio of
    channels.
    """
    if channels == weight.shape[1]:
        return weight
    grey = weight.sum(1, keepdim=True)
    return grey.expand(-1, channels, -1, -1) / channels


def load_pretrained(model: nn.Module, state: dict[str, Tensor], source: str) -> None:
    """Place weights made for maybe other channels and classes: the stem is adapted, a head of
    another shape starts anew."""
    own = model.state_dict()
    stem = next((f"{n}.weight" for n, m in model.named_modules() if isinstance(m, nn.Conv2d)), "")
    if (
        stem in state
        and stem in own
        and state[stem].dim() == 4
        and state[stem].shape[1] != own[stem].shape[1]
    ):
        state = {**state, stem: adapt_channels(state[stem], own[stem].shape[1])}
    head = weights.head_names(model)
    same = all(n in state and state[n].shape == own[n].shape for n in head)
    weights.load_state(model, state, head="match" if same else "replace", source=source)
