"""Results and listed rows as a terminal of 80 columns can show them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from greenvis.errors import one_line
from greenvis.report import figures, floor, formatting, tables
from greenvis.report.formatting import MISSING, si
from greenvis.report.shape import Results

HEADS = {
    "train_energy_j": "Energy",
    "train_energy_with_reuse_j": "Energy, with base",
    "carbon_g": "CO₂e, own",
}
UNITS = {"_j": "J", "_g": "g", "_s": "s", "_bytes": "B"}


def table(results: Results) -> Any:
    """Return results as a rich table: one row an arm, what was gained and what it cost."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    available = tables.used(results, tables.costs(results))
    with_reuse = any(c.key.endswith("train_energy_with_reuse_j") for c in available)
    energy = "train_energy_with_reuse" if with_reuse else "train_energy"
    keys = (results.metric, "vs_metric", f"{energy}_j", f"vs_{energy}", "carbon_g")
    columns = [c for c in available if c.key in keys]
    out = Table(
        title=Text(one_line(results.name)),
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    out.caption = Text(one_line(floor.sentence(results)))
    out.add_column("Arm", overflow="fold", min_width=10)
    for column in columns:
        against = column.key.startswith("vs_")
        head = "vs baseline" if against else HEADS.get(column.key, column.title)
        out.add_column(
            Text(one_line(head)),
            justify="right",
            no_wrap=not against,
            width=16 if against else None,
        )
    for label in results.order[: tables.MOST_ROWS]:
        row, texts = results.arms[label], []
        for column, cell in zip(columns, tables.cells(row, columns), strict=True):
            text = Text(one_line(cell.text), style="bold" if cell.shown else "")
            texts.append(_below(text, cell.sub if column.key.startswith("vs_") else ""))
        status = "" if row.status == "done" else row.status
        out.add_row(_below(Text(figures.short(label, 28)), status), *texts)
    return out


def _below(text: Any, more: str) -> Any:
    """Return a rich text with a dim line below it; as it is where there is none."""
    return text.append(f"\n{one_line(more)}", style="dim") if more else text


def rows(entries: Iterable[Mapping[str, Any]]) -> list[dict[str, str]]:
    """Return rows of `ls`, `group`, `compare` or `diff` in words: few columns, units people read,
    no long digits."""
    return [
        _listed(r)
        if "run" in r
        else _compared(r)
        if "quantity" in r
        else _gated(r)
        if "limit" in r
        else _any(r)
        for r in entries
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
        "time": formatting.duration(row["wall_s"]),
    }


def _compared(row: Mapping[str, Any]) -> dict[str, str]:
    quantity, change = row["quantity"], row["change_percent"]
    return {
        "arm": figures.clean(row["arm"]),
        "quantity": quantity,
        "a": _number(quantity, row["a"]),
        "b": _number(quantity, row["b"]),
        "change": _change(quantity, row["a"], row["b"], change),
    }


def _change(quantity: str, a: float | None, b: float | None, percent: float | None) -> str:
    """Return a change in per cent, that of a share of 1 in points."""
    if formatting.share(quantity):
        return MISSING if a is None or b is None else formatting.points(quantity, b - a)
    return MISSING if percent is None else f"{formatting.fixed(percent, sign=True)} %"


def _gated(row: Mapping[str, Any]) -> dict[str, str]:
    return {
        "arm": figures.clean(row["arm"]),
        "a": si(row["a_j"], "J"),
        "b": si(row["b_j"], "J"),
        "change": MISSING
        if row["ratio"] is None
        else f"{formatting.fixed((row['ratio'] - 1) * 100, sign=True)} %",
        "limit": f"{formatting.fixed((row['limit'] - 1) * 100, sign=True)} %",
        "ok": "yes" if row["ok"] else "NO",
        "why": figures.clean(row["why"]),
    }


def _any(row: Mapping[str, Any]) -> dict[str, str]:
    return {
        k: _number(k, v) if isinstance(v, float) or v is None else figures.clean(str(v))
        for k, v in row.items()
    }


def _number(quantity: str, value: Any) -> str:
    """Return a figure with the unit its name ends in."""
    if not isinstance(value, (int, float)):
        return MISSING
    if formatting.share(quantity):
        return formatting.gain(quantity, value)
    if quantity.endswith("_ms"):
        return si(value / 1e3, "s")
    if quantity.endswith("_mb"):
        return si(value * 1e6, "B")
    return si(
        value,
        next(
            (
                u
                for end, u in UNITS.items()
                if quantity.endswith(end) and not quantity.endswith("per_s")
            ),
            "",
        ),
    )
