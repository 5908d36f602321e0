"""Docstrings as the reference reads them: their "Example:" is a section of code, and brackets in
prose are no links."""

from __future__ import annotations

from typing import Any

from griffe import Extension

SECTION = "Example:\n"


class Examples(Extension):
    """Rewrites each docstring before it is parsed."""

    def on_object(self, *, obj: Any, **_: Any) -> None:
        """Rewrite the docstring of a module, class, function or attribute."""
        if obj.docstring is not None:
            obj.docstring.value = rewritten(obj.docstring.value)


def rewritten(text: str) -> str:
    """Return a docstring in the words of Google's style, with no accidental links in its prose."""
    prose, section, example = text.partition(SECTION)
    return prose.replace("][", "]\\[") + ("Examples:\n" + example if section else "")
