"""Results and listed rows as a terminal of 80 columns can show them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from greenvis.report import figures, tables, words
from greenvis.report.words import MISSING, si

HEADS = {"train_energy_j": "Energy", "carbon_g": "CO₂e"}
UNITS = {"_j": "J", "_g": "g", "_s": "s", "_bytes": "B"}


def table(found: Mapping[str, Any]) -> Any:
    """Return results as a rich table: one row an arm, what was gained and what it cost."""
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    kept = (found["metric"], "vs_metric", "train_energy_j", "vs_train_energy", "carbon_g")
    columns = [c for c in tables.used(dict(found), tables.costs(dict(found))) if c.key in kept]
    out = Table(title=escape(figures.clean(found["name"])), box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    out.add_column("Arm", overflow="fold", min_width=10)
    for column in columns:
        against = column.key.startswith("vs_")
        head = "vs baseline" if against else HEADS.get(column.key, column.title)
        out.add_column(escape(head), justify="right", no_wrap=not against, width=16 if against else None)
    for row in tables.cells(dict(found), columns):
        texts = []
        for column, cell in zip(columns, row["cells"], strict=True):
            text = f"[bold]{escape(cell['text'])}[/bold]" if cell["best"] else escape(cell["text"])
            sub = cell["sub"].split(" (p")[0].split(":")[0] if column.key.startswith("vs_") else ""
            texts.append(text + (f"\n[dim]{escape(sub)}[/dim]" if sub else ""))
        status = "" if row["status"] == "done" else f"\n[dim]{row['status']}[/dim]"
        out.add_row(escape(figures.short(row["arm"], 28)) + status, *texts)
    return out


def rows(listed: Iterable[Mapping[str, Any]]) -> list[dict[str, str]]:
    """Return rows of `ls`, `group`, `compare` or `diff` in words: few columns, units people read, no long digits."""
    return [
        _listed(r) if "run" in r else _compared(r) if "quantity" in r else _gated(r) if "limit" in r else _any(r)
        for r in listed
    ]


def _listed(row: Mapping[str, Any]) -> dict[str, str]:
    arm = row["arm"] if row["arm"] == row["name"] else f"{row['name']}/{row['arm']}"
    return {
        "run": str(row["run"])[-12:],
        "arm": figures.clean(arm),
        "seed": str(row["seed"]),
        "status": str(row["status"]),
        "accuracy": _number("accuracy", row["accuracy"]),
        "energy": si(row["energy_j"], "J"),
        "CO₂e": si(row["carbon_g"], "g"),
        "time": words.duration(row["wall_s"]),
    }


def _compared(row: Mapping[str, Any]) -> dict[str, str]:
    quantity, change = row["quantity"], row["change_percent"]
    return {
        "arm": figures.clean(row["arm"]),
        "quantity": quantity,
        "a": _number(quantity, row["a"]),
        "b": _number(quantity, row["b"]),
        "change": MISSING if change is None else f"{change:+.1f} %",
    }


def _gated(row: Mapping[str, Any]) -> dict[str, str]:
    return {
        "arm": figures.clean(row["arm"]),
        "a": si(row["a_j"], "J"),
        "b": si(row["b_j"], "J"),
        "change": MISSING if row["ratio"] is None else f"{(row['ratio'] - 1) * 100:+.1f} %",
        "limit": f"{(row['limit'] - 1) * 100:+.1f} %",
        "ok": "yes" if row["ok"] else "NO",
        "why": figures.clean(row["why"]),
    }


def _any(row: Mapping[str, Any]) -> dict[str, str]:
    return {k: _number(k, v) if isinstance(v, float) or v is None else figures.clean(str(v)) for k, v in row.items()}


def _number(quantity: str, value: Any) -> str:
    """Return a figure with the unit its name ends in."""
    if not isinstance(value, (int, float)):
        return MISSING
    if words.share(quantity):
        return words.gain(quantity, value)
    if quantity.endswith("_ms"):
        return si(value / 1e3, "s")
    if quantity.endswith("_mb"):
        return si(value * 1e6, "B")
    return si(value, next((u for end, u in UNITS.items() if quantity.endswith(end) and not quantity.endswith("per_s")), ""))
