"""Names of timm's and torchvision's models, read off the text of their files: what importing them
would take ten seconds to refuse is refused at once."""

from __future__ import annotations

import importlib.util
import re
from functools import cache
from pathlib import Path

from greenvis.errors import nearest

BUILDER = re.compile(r"^@register_model[^\n]*\n(?:@[^\n]*\n)*def (\w+)", re.MULTILINE)


def unknown(ref: str) -> str:
    """Say what is wrong with a model's reference; "" where nothing is, or only an import can tell.

    Args:
        ref: as in a recipe, such as "timm/resnet18.a1_in1k".

    Returns:
        The error's text, with the nearest right name.
    """
    library, _, name = ref.partition("/")
    base = name.partition(".")[0] if library == "timm" else name
    if library not in ("timm", "torchvision") or not base.isidentifier():
        return ""
    builders, text = _read(library)
    if not builders or re.search(rf"\b{re.escape(base)}\b", text):
        return ""  # names of old, too, stand somewhere
    return f"unknown model '{ref}'{nearest(base, sorted(builders))}"


@cache
def _read(library: str) -> tuple[frozenset[str], str]:
    spec = importlib.util.find_spec(library)
    if spec is None or spec.origin is None:
        return frozenset(), ""
    files = sorted((Path(spec.origin).parent / "models").rglob("*.py"))
    text = "\n".join(file.read_text(encoding="utf-8", errors="replace") for file in files)
    return frozenset(BUILDER.findall(text)), text
