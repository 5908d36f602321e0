"""A section of a report: what one says of the results, computed once and shown alike in HTML and
Markdown."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar, Generic, TypeVar

from greenvis.report.blocks import Block
from greenvis.report.shape import Results

T = TypeVar("T")


class Section(ABC, Generic[T]):
    """One section.

    Attributes:
        name: unique among sections; the anchor on the page.
        title: its heading.
        folded: whether the page shows its heading alone until it is opened.

    Example:
        >>> from greenvis.report.blocks import paragraph
        >>> class Starts(Section[int]):
        ...     name, title = "starts", "Starts"
        ...
        ...     def compute(self, results):
        ...         return sum(results.totals.attempts.values()) or None
        ...
        ...     def render(self, value):
        ...         return [paragraph(f"{value} starts.")]
        >>> Starts().render(3)[0].text
        ('3 starts.',)
    """

    name: ClassVar[str]
    title: ClassVar[str]
    folded: ClassVar[bool] = False

    @abstractmethod
    def compute(self, results: Results) -> T | None:
        """Return what there is to say.

        Args:
            results: of the report. Any figure may be missing (None), any name hostile.

        Returns:
            What `render` shows; None where the section has nothing to say and is left out.
        """

    @abstractmethod
    def render(self, value: T) -> Sequence[Block]:
        """Return the blocks that show it.

        Args:
            value: of `compute`.
        """
