"""Second streams of images beside the labelled batches: without labels, or of another domain."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from greenvis.errors import BadInput, GreenvisError, nearest
from greenvis.tasks.answers import is_tensor

if TYPE_CHECKING:
    import torch
    from torch import Tensor

# the streams there are, and what a recipe says to have them
STREAMS = {
    "unlabeled": "`unlabeled: rest` beside `labels: 40` below `data`",
    "train": "the images trained on, which a recipe has",
    "target": "a domain to adapt to below `data`, such as `domains: {target: [noise]}`",
}


@runtime_checkable
class Numbered(Protocol):
    """A stream whose batches are a function of their number, so that a resumed run needs no state
    of it."""

    def at(self, number: int, times: int) -> Tensor:
        """Return `times` batches' images, from batch `number * times` on: (images, …)."""
        ...

    def sweep(self) -> Iterator[Tensor]:
        """Yield each image once, in batches."""
        ...


@runtime_checkable
class Positioned(Numbered, Protocol):
    """A numbered stream that also says which images it gives."""

    def positions(self, number: int, times: int) -> Tensor:
        """Return where the images of `at(number, times)` stand in their set, int64 (images,)."""
        ...

    def at(self, number: int, times: int, where: Tensor | None = None) -> Tensor:
        """Return the images, of `where` alone: int64 (n,), which of the draw's."""
        ...


class Feeds:
    """The streams that a wrapped model's techniques may draw from.

    Attributes:
        number: Of the step's batch, which says what numbered streams give.
    """

    def __init__(self) -> None:
        self.number = 0
        self._sources: dict[str, Any] = {}
        self._drawn: dict[tuple[str, int], Tensor] = {}

    def add(self, name: str, source: Any) -> None:
        """Take a stream. Raises BadInput for a name that is none, and for what can be gone through
        once only."""
        if name not in STREAMS:
            raise BadInput(f"no stream '{name}'{nearest(name, STREAMS)}")
        if not isinstance(source, Numbered):
            if not isinstance(source, Iterable) or iter(source) is source:
                raise BadInput(
                    f"{name} takes a loader that can be gone through again and again, not "
                    f"{type(source).__name__}: give a DataLoader"
                )
            source = _Endless(source)
        self._sources[name] = source

    def begin_step(self) -> None:
        """Forget what was drawn for the step before."""
        self._drawn.clear()

    def draw(
        self, name: str, times: int, device: torch.device, where: Tensor | None = None
    ) -> Tensor:
        """Return images for this step, or those of `where` among them: the same, however often and
        by whomever they are asked for."""
        key, source = (name, times), self._source(name)
        if where is not None and key not in self._drawn and isinstance(source, Positioned):
            return source.at(self.number, times, where).to(device)
        if key not in self._drawn:
            self._drawn[key] = source.at(self.number, times).to(device)
        return self._drawn[key] if where is None else self._drawn[key][where.to(device)]

    def positions(self, name: str, times: int) -> Tensor | None:
        """Return where the images of `draw` stand in their set, int64 (images,); None where the
        stream does not say."""
        source = self._source(name)
        return source.positions(self.number, times) if isinstance(source, Positioned) else None

    def sweep(self, name: str, device: torch.device) -> Iterator[Tensor]:
        """Yield each image of a stream once, in batches."""
        return (x.to(device) for x in self._source(name).sweep())

    def _source(self, name: str) -> Any:
        if name not in self._sources:
            raise GreenvisError(
                f"there is no stream '{name}' to draw from: call live.feed({name}=loader) before "
                f"the first step; in a recipe set {STREAMS[name]}"
            )
        return self._sources[name]


class _Endless:
    """A user's loader, begun again when it ends; labels are left out."""

    def __init__(self, loader: Iterable[Any]) -> None:
        self._loader = loader
        self._batches = self._forever()

    def at(self, number: int, times: int) -> Tensor:
        """Return the next `times` batches, whatever the number."""
        import torch

        return torch.cat(list(islice(self._batches, times)))

    def sweep(self) -> Iterator[Tensor]:
        """Yield the loader's images from its beginning."""
        return map(_images, self._loader)

    def _forever(self) -> Iterator[Tensor]:
        while True:
            empty = True
            for batch in self._loader:
                empty = False
                yield _images(batch)
            if empty:
                raise GreenvisError("a stream of images is empty: its loader gives no batch")


def _images(batch: Any) -> Tensor:
    images = batch[0] if isinstance(batch, (tuple, list)) else batch
    if not is_tensor(images):
        raise BadInput(
            f"a stream gives images (batch, …), or (images, …), not {type(images).__name__}"
        )
    return images
