"""A model's structure in rows, for people."""

from __future__ import annotations

from collections.abc import Iterable

from greenvis.errors import some
from greenvis.models.structure import View


def describe(structure: View) -> list[tuple[str, str]]:
    """Return rows for `greenvis inspect`.

    Args:
        structure: What `view` returned.

    Returns:
        (part, what it is) by row.
    """
    first = structure.attention[0] if structure.attention else None
    rows = [
        ("library", structure.library),
        ("input", "×".join(map(str, structure.input_shape))),
        ("patch embedding", structure.patch_embed or "none"),
        (
            "prefix tokens",
            f"{structure.prefix_tokens} {structure.prefix_position} the patches"
            if structure.prefix_tokens
            else "0",
        ),
        (
            "stages",
            f"{len(structure.stages)}: {' + '.join(str(len(s)) for s in structure.stages)} blocks"
            if structure.blocks
            else "none",
        ),
        ("blocks", _counted(structure.blocks)),
        ("attention", _counted(a.path for a in structure.attention)),
    ]
    if first is not None:
        inputs = {"qkv": first.qkv} if first.qkv else {"q": first.q, "k": first.k, "v": first.v}
        parts = ", ".join(
            f"{n} '{p}'" for n, p in {**inputs, "out": first.out}.items() if p is not None
        )
        heads = " and ".join(map(str, sorted({a.heads for a in structure.attention})))
        rows += [("", f"{first.kind}; {heads} heads" + (f"; first: {parts}" if parts else ""))]
    rows += [
        ("mlp", _counted(m.path or "." for m in structure.mlps)),
        ("convolutions", _counted(structure.convs)),
        ("linear layers", _counted(structure.linears)),
        ("norms", _counted(structure.norms)),
        ("pooling", structure.pooling or "none seen"),
        ("classifier", some(structure.classifier) or "none"),
        ("flags", ", ".join(sorted(structure.flags)) or "none"),
    ]
    return rows


def _counted(paths: Iterable[str]) -> str:
    names = list(paths)
    return f"{len(names)}: {some(names, 2)}" if names else "none"
