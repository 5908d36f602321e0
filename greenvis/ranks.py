"""What processes that train one model together must agree on. Without several processes nothing here does anything."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.utils.hooks import RemovableHandle

T = TypeVar("T")


def count() -> int:
    """Return how many processes train together: 1 where none was asked for."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def add_up(total: Mapping[str, Tensor], seen: int) -> int:
    """Add every process's tensors, in place and by name, and return the sum of what they have seen.

    Each process must name the same tensors. What is then divided by the sum is a mean over all processes' samples.
    """
    if count() == 1:
        return seen
    for tensor in total.values():
        dist.all_reduce(tensor)
    number = torch.tensor(seen, dtype=torch.int64, device=next(iter(total.values())).device if total else None)
    dist.all_reduce(number)
    return int(number)


def mean(tensors: Iterable[Tensor]) -> None:
    """Give every process the mean of all processes' tensors, in place."""
    if (many := count()) > 1:
        for tensor in tensors:
            dist.all_reduce(tensor.div_(many))


def agree(values: Iterable[Tensor]) -> None:
    """Give every process the first one's values, in place, where each saw other images."""
    if count() > 1:
        for value in values:
            dist.broadcast(value.detach(), 0)


def first(ask: Callable[[], T]) -> T:
    """Ask in the first process, and return its answer in all of them; what it raises there, all raise."""
    if count() == 1:
        return ask()
    held: list[Any] = [None]
    if dist.get_rank() == 0:
        try:
            held = [(ask(), None)]
        except Exception as error:  # whatever it is, the others must not wait for an answer
            held = [(None, error)]
    dist.broadcast_object_list(held, 0)
    answer, error = held[0]
    if error is not None:
        raise error
    return answer


def share_gradients(parameters: Iterable[nn.Parameter]) -> list[RemovableHandle]:
    """Make each gradient the mean over all processes as it comes, for a loss that no DistributedDataParallel sees.

    Every process must run the same backward, so that gradients come in one order.
    """
    if count() == 1:
        return []

    def shared(gradient: Tensor) -> Tensor:
        whole = gradient.clone()
        mean([whole])
        return whole

    return [parameter.register_hook(shared) for parameter in parameters if parameter.requires_grad]
