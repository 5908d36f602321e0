"""Text of others in Markdown and shell commands: what it holds stays text."""

from __future__ import annotations

import re
import shlex
from typing import Any
from urllib.parse import quote

from greenvis.errors import printable
from greenvis.report import figures


def md(text: Any) -> str:
    """Return text that Markdown shows as it is: no markup, no HTML, no link, no table cell, no line
    break."""
    text = " ".join(figures.clean(str(text)).split())
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    text = re.sub(r"([\\`*_\[\]|~$])", r"\\\1", text)
    text = re.sub(r"(?i)\b(www)\.", r"\1\\.", text.replace("://", "\\://"))
    text = re.sub(r"^(\d+)([.)])(?=\s|$)", r"\1\\\2", re.sub(r"^([-+=#])", r"\\\1", text))
    return text.replace("@", "@\u2060")  # a word joiner: no mention, no mail link


def words(text: Any) -> str:
    """Return a piece of a line as `md` does, with the blanks at its ends."""
    text = str(text)
    inner = md(text)
    return (
        (" " if text[:1].isspace() else "") + inner + (" " if text[-1:].isspace() and inner else "")
    )


def code(text: Any) -> str:
    """Return a name or a command as code within a line of Markdown; as plain text where a backtick
    or a bar would end it."""
    text = " ".join(figures.clean(str(text)).split())
    return md(text) if not text or set(text) & set("`|\\") else f"`{text}`"


def link(text: Any, path: str) -> str:
    """Return a link in Markdown to a file beside; a path is never taken for another scheme or the
    end of the link."""
    return f"[{md(text)}]({quote(path)})"


def fence(text: Any) -> str:
    """Return text as a fenced code block that its own backticks cannot end."""
    body = printable(str(text).replace("\r", ""))
    longest = max((len(m) for m in re.findall(r"`+", body)), default=0)
    ticks = "`" * max(3, longest + 1)
    return f"{ticks}text\n{body.rstrip()}\n{ticks}"


def shell(command: Any) -> str:
    """Return a recorded command, text or a list of words, as one would type it."""
    return shlex.join(map(str, command)) if isinstance(command, list) else str(command)
