"""What a model is called with, where that is more than one tensor: an image with a text, a bag of
images."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils.data._utils.collate import default_collate_fn_map

BAG = "bag"  # the argument that says which sample each row of the others is of


@dataclass(frozen=True)
class Example:
    """A batch of samples as a model takes them. A batch of one tensor is that tensor.

    Where there is an argument `bag`, int64 (rows,) from 0 on without gaps, several rows of each
    tensor make one sample, packed without padding; else each row is one.

    Args:
        args: Tensors (rows, …), and what all samples share.
        kwargs: The same, by name.

    Example:
        >>> from greenvis.core.example import Example
        >>> pair = Example((torch.zeros(3, 2),), {"tokens": torch.arange(3)})
        >>> len(pair), pair[1:].kwargs["tokens"].tolist()
        (3, [1, 2])
        >>> bags = Example((torch.zeros(5, 2),), {"bag": torch.tensor([0, 0, 1, 1, 1])})
        >>> len(bags), bags[[1]].args[0].shape, bags[[1]].kwargs["bag"].tolist()
        (2, torch.Size([3, 2]), [0, 0, 0])
    """

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        """Return how many samples it holds."""
        bag = self.kwargs.get(BAG)
        if bag is not None:
            return int(bag.max()) + 1 if len(bag) else 0
        return len(self._tensors()[0]) if self._tensors() else 0

    def __getitem__(self, rows: Any) -> Example:
        """Return some samples: a slice, positions or a mask of them."""
        if BAG not in self.kwargs:
            index = rows if isinstance(rows, (slice, Tensor)) else torch.as_tensor(rows)
            return self._map(
                lambda t: t[index.to(t.device) if isinstance(index, Tensor) else index]
            )
        bag = self.kwargs[BAG]
        numbers = torch.arange(len(self), device=bag.device)[rows].reshape(-1)
        each = [(bag == number).nonzero().flatten() for number in numbers]
        where = torch.cat(each) if each else bag.new_empty(0)
        again = torch.arange(len(each), device=bag.device).repeat_interleave(
            torch.tensor([len(rows) for rows in each], dtype=torch.int64, device=bag.device)
        )
        part = self._map(lambda t: t[where])
        return Example(part.args, {**part.kwargs, BAG: again})

    @property
    def device(self) -> torch.device:
        """Of its tensors."""
        tensors = self._tensors()
        return tensors[0].device if tensors else torch.device("cpu")

    def to(self, *args: Any, **kwargs: Any) -> Example:
        """Return it on a device, as `Tensor.to` does; a dtype is that of what has a fraction."""
        floats = any(isinstance(a, torch.dtype) for a in (*args, *kwargs.values()))
        return self._map(
            lambda t: t if floats and not t.is_floating_point() else t.to(*args, **kwargs)
        )

    def pin_memory(self) -> Example:
        """Return it in pinned memory, for loaders."""
        return self._map(lambda t: t.pin_memory())

    def call(self, model: Callable[..., Any]) -> Any:
        """Return what a model answers."""
        return model(*self.args, **self.kwargs)

    def _tensors(self) -> list[Tensor]:
        return [v for v in (*self.args, *self.kwargs.values()) if isinstance(v, Tensor)]

    def _map(self, change: Callable[[Tensor], Tensor]) -> Example:
        def changed(value: Any) -> Any:
            return change(value) if isinstance(value, Tensor) else value

        return Example(
            tuple(map(changed, self.args)), {k: changed(v) for k, v in self.kwargs.items()}
        )


def call(model: Callable[..., Any], x: Any) -> Any:
    """Return what a model answers to a batch.

    Args:
        model: What to call.
        x: An `Example`, or the one thing the model takes.
    """
    return x.call(model) if isinstance(x, Example) else model(x)


def tensors_in(values: Any) -> Iterator[Tensor]:
    """Yield the tensors in what a model takes or answers: nested tuples, lists, mappings and
    examples."""
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, Example):
        yield from tensors_in((values.args, values.kwargs))
    elif isinstance(values, Mapping):
        yield from tensors_in(list(values.values()))
    elif isinstance(values, (tuple, list)):
        for value in values:
            yield from tensors_in(value)


def collate(samples: Sequence[Example]) -> Example:
    """Return samples as one batch: rows stacked, bags (of one sample each) packed.

    Args:
        samples: Alike but for the values of their tensors, which have no batch axis; of bags all
            rows.
    """
    first = samples[0]
    bags = BAG in first.kwargs

    def joined(values: Sequence[Any]) -> Any:
        if not isinstance(values[0], Tensor):
            return values[0]
        return torch.cat(list(values)) if bags else torch.stack(list(values))

    args = tuple(joined(values) for values in zip(*(s.args for s in samples), strict=True))
    kwargs = {name: joined([s.kwargs[name] for s in samples]) for name in first.kwargs}
    if bags:
        sizes = torch.tensor([len(s.kwargs[BAG]) for s in samples])
        kwargs[BAG] = torch.arange(len(samples)).repeat_interleave(sizes)
    return Example(args, kwargs)


# torch's own default_collate, and so a plain DataLoader, makes batches of them
default_collate_fn_map[Example] = lambda batch, *, collate_fn_map=None: collate(batch)
