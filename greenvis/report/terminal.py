"""Results and listed rows as a terminal of 80 columns can show them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from textwrap import wrap
from typing import Any

from greenvis.errors import one_line
from greenvis.report import figures, floor, formatting, measures, tables
from greenvis.report.formatting import MISSING, si
from greenvis.report.shape import Results
from greenvis.tasks.base import Measure

HEADS = {
    "train_energy_j": "Training",
    "train_energy_with_reuse_j": "Training, with base",
    "carbon_g": "CO₂e, own",
}
HEAD_WIDTH = 12  # of a line of a heading: six columns fit 80
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
    out = Table(title=Text(one_line(results.name)), box=box.SIMPLE_HEAD, show_edge=False, padding=0)
    out.caption = Text(one_line(floor.sentence(results)))
    out.add_column("Arm", overflow="fold", min_width=10)
    for column in columns:
        against = column.key.startswith("vs_")
        head = "vs baseline" if against else HEADS.get(column.key, column.title)
        out.add_column(
            Text("\n".join(wrap(one_line(head), HEAD_WIDTH))),
            justify="right",
            no_wrap=not against,
            width=16 if against else None,
        )
    for label in results.order[: tables.MOST_ROWS]:
        row, texts = results.arms[label], []
        for column, cell in zip(columns, tables.cells(row, columns), strict=True):
            words = one_line(cell.text).replace(" + ", "\n+ ")  # "+ not known" takes its own line
            text = Text(words, style="bold" if cell.shown else "")
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
    entries = list(entries)
    one = len({r["metric"] for r in entries if r.get("metric")}) == 1
    return [
        _listed(r, one)
        if "run" in r
        else _grouped(r, one)
        if "runs" in r
        else _compared(r)
        if "quantity" in r
        else _gated(r)
        if "limit" in r
        else _any(r)
        for r in entries
    ]


def _measure(row: Mapping[str, Any]) -> Measure:
    known = measures.named(row.get("metric") or row.get("quantity") or measures.DEFAULT)
    unit = row.get("metric_unit")
    return known if unit is None else known._replace(unit=unit)


def _score(row: Mapping[str, Any], one: bool) -> dict[str, str]:
    """Return what a run reached; of several metrics, each with its name. one: all rows have one
    metric, which is the column's head."""
    measure, score = _measure(row), row["score"]
    text = formatting.gain(measure, score) if isinstance(score, (int, float)) else MISSING
    if one:
        return {measures.written(measure): text}
    return {"metric": text if text == MISSING else f"{text} {measures.written(measure)}"}


def _grouped(row: Mapping[str, Any], one: bool) -> dict[str, str]:
    head: dict[str, Any] = {}
    for key, value in row.items():
        if key == "metric":
            head |= _score(row, one)
        elif key not in ("metric_unit", "score"):
            head[key] = value
    return _any(head)


def _listed(row: Mapping[str, Any], one: bool) -> dict[str, str]:
    arm = row["arm"] if row["arm"] == row["name"] else f"{row['name']}/{row['arm']}"
    return {
        "run": str(row["run"])[-12:],
        "arm": figures.clean(arm),
        "seed": str(row["seed"]),
        "status": str(row["status"]),
        **_score(row, one),
        "energy": si(row["energy_j"], "J"),
        "CO₂e": si(row["carbon_g"], "g"),
        "time": formatting.duration(row["wall_s"]),
    }


def _compared(row: Mapping[str, Any]) -> dict[str, str]:
    quantity, change, a, b = (row[k] for k in ("quantity", "change_percent", "a", "b"))
    texts = {"a": _number(quantity, a), "b": _number(quantity, b)}
    moved = MISSING if change is None else f"{formatting.fixed(change, sign=True)} %"
    if "metric_unit" in row:
        measure = _measure(row)
        quantity = measures.written(measure)
        texts = {"a": formatting.gain(measure, a), "b": formatting.gain(measure, b)}
        moved = formatting.points(measure, None if a is None or b is None else b - a)
    return {"arm": figures.clean(row["arm"]), "quantity": quantity, **texts, "change": moved}


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
