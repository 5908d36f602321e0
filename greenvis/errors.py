"""The errors greenvis raises, and the "did you mean" they share. Standard library only."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class GreenvisError(Exception):
    """Any failure greenvis reports on purpose: says what, where, and what to do. The CLI exits with
    1.

    reported: whether another of several processes says the same.

    Example:
        >>> issubclass(gv.BadInput, gv.GreenvisError)
        True
    """

    reported: bool = False


class BadInput(GreenvisError):
    """The input (recipe, option, model, data) cannot be used. Nothing was changed. The CLI exits
    with 2.

    Example:
        >>> gv.Lora(ranks=4)
        Traceback (most recent call last):
            ...
        greenvis.errors.BadInput: Lora: ranks: unknown field 'ranks'; did you mean 'rank'?
    """


def nearest(name: str, known: Iterable[str]) -> str:
    """Return "; did you mean 'x'?" for the closest of `known`, else a short list of what there
    is."""
    names = sorted(set(known))
    plain = {_plain(n): n for n in reversed(names)}
    close = difflib.get_close_matches(_plain(name[:100]), plain, n=1, cutoff=0.6)
    if close:
        return f"; did you mean '{one_line(plain[close[0]])}'?"
    return f"; known: {some(names)}" if names else ""


def _plain(name: str) -> str:
    """Return a name as it compares with others: LoRA is lora, token-merge is token_merge."""
    return name.casefold().replace("-", "_")


def some(names: Iterable[str], most: int = 6) -> str:
    """Format names for a message: "'a', 'b', … (+22)"."""
    items = list(names)
    shown = ", ".join(f"'{one_line(n)}'" for n in items[:most])
    return shown + (f", … (+{len(items) - most})" if len(items) > most else "")


def printable(text: str) -> str:
    """Return a text as a terminal may get it: lines kept, every other control character (escape
    sequences) replaced."""
    # these take no room or a space's, and do nothing: pages of ours have them
    shown = "\n\t\N{WORD JOINER}\N{NO-BREAK SPACE}"
    return "".join(
        c if c.isprintable() or c in shown else "\N{REPLACEMENT CHARACTER}" for c in text
    )


def one_line(text: object) -> str:
    """Return a name, or what holds some, as a terminal may get it within a line: it cannot begin a
    line of its own."""
    return printable("".join(" " if c.isspace() else c for c in str(text)))
