"""Commands that put records into tables: `ls`, `compare`, `diff`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Annotated, Any

from greenvis.cli import app
from greenvis.cli.app import argument, option, verb
from greenvis.cli.output import answer, console, message, print_rows

Side = Annotated[
    str,
    argument("a record, a folder of them, a report's folder, or a run as `greenvis ls` shows it"),
]
SPARE = ("CO₂e", "time", "seed")  # columns of runs that a narrow terminal goes without
MOST_LEFT_OUT = 20  # lines that say what was left out
WHOLE_RECORDS = (
    "Energy, CO₂e and time are of whole records: starting up and measuring are in them, and in no "
    "training of a report."
)


@verb(app.REPORT, "greenvis ls --sort -energy")
def ls(
    paths: Annotated[
        list[str] | None,
        argument("records, their folders, ids or RECIPE/ARM; all below runs/ else"),
    ] = None,
    where: Annotated[
        str, option("only runs whose name, arm, id or status contains this", "TEXT")
    ] = "",
    sort: Annotated[
        str, option("column to sort by; -energy for descending (default: by start)", "COLUMN")
    ] = "",
    by: Annotated[
        str, option("one row for each value of these: name,arm", "COLUMNS", name="--group")
    ] = "",
    as_json: app.Json = False,
) -> None:
    """list recorded runs"""
    from greenvis.meters import run_names
    from greenvis.report.listing import group, ls

    paths = [run_names.named(path) for path in paths or ["runs"]]
    left_out: list[str] = []
    order = "started_s" if by else sort or "started_s"
    rows = ls(paths, where=where, sort=order, say=left_out.append)
    more = len(left_out) - MOST_LEFT_OUT
    for line in left_out[:MOST_LEFT_OUT] + ([f"left out: {more} more"] if more > 0 else []):
        print(message(line), file=sys.stderr)
    if by:
        rows = group(rows, by.split(","), sort)

    def show() -> None:
        _print_runs(rows, f"{len(rows)} {'groups' if by else 'runs'}")
        if rows:
            console().print(WHOLE_RECORDS, highlight=False)

    answer(as_json, rows, show)


@verb(app.REPORT, "greenvis compare quickstart/scratch quickstart/lora")
def compare(a: Side, b: Side, runs: app.Runs = "runs", as_json: app.Json = False) -> None:
    """compare two runs figure by figure"""
    from greenvis.meters import run_names
    from greenvis.report.comparing import compare

    rows = compare(*(run_names.named(side, runs) for side in (a, b)))
    answer(as_json, rows, lambda: _print_runs(rows, f"{a} and {b}"))


@verb(app.REPORT, "greenvis diff quickstart/full quickstart/lora --max-energy +100%")
def diff(
    a: Side,
    b: Side,
    runs: app.Runs = "runs",
    max_energy: Annotated[str, option("the most B's energy may exceed A's", "PERCENT")] = "+5%",
    as_json: app.Json = False,
) -> int:
    """fail (exit 1) where run B costs more than run A allows: a gate for CI"""
    from greenvis.meters import run_names
    from greenvis.report.comparing import diff

    fine, rows = diff(*(run_names.named(side, runs) for side in (a, b)), max_energy=max_energy)
    title = "within the limit" if fine else "over the limit"
    answer(as_json, {"ok": fine, "rows": rows}, lambda: _print_runs(rows, title))
    return 0 if fine else 1


def _print_runs(rows: Sequence[dict[str, Any]], title: str) -> None:
    from greenvis.report import terminal

    print_rows(terminal.rows(rows), title, SPARE)
