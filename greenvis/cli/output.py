"""What commands share: how an answer is shown in a terminal."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from greenvis.core import files, yamlfile
from greenvis.errors import BadInput, one_line, printable

MOST_COLUMNS = 16  # of a table in a terminal
_UNUSUAL = re.compile(r"[^ -~\n]")
WIDE = 200  # characters of a line that no terminal shows


def answer(as_json: bool, data: Any, show: Callable[[], None]) -> None:
    """Print an answer.

    Args:
        as_json: whether for programs.
        data: what programs get.
        show: prints it for people.
    """
    if as_json:
        print(json_text(data, indent=2))
    else:
        show()


def reported(as_json: bool, page: Path) -> None:
    """Print the results of a report that was just written; for people as a table."""
    from greenvis.report import stored

    results = stored.read(page.parent / stored.NAME)

    def show() -> None:
        from rich.text import Text

        from greenvis.report import table

        console().print(table(results))
        console().print(Text.assemble("report: ", (one_line(page), "bold")), soft_wrap=True)

    answer(as_json, {"report": str(page), "results": results.as_json()}, show)


def left_by(text: str, runs: str) -> str:
    """Return the folder of the model that a run left, by its id in `runs` as `greenvis ls` shows
    it; a path as it is.

    Raises BadInput where the run left none, or another run's came after it.
    """
    from greenvis.meters import run_names

    return _left_by_id(text, runs) or run_names.named(text, runs)


def base(text: str, runs: str) -> str:
    """Return what names a base: the folder of the model that a run left, by its id; else the text
    as it is, a model's reference. Raises BadInput as `left_by`."""
    return _left_by_id(text, runs) or text


def _left_by_id(text: str, runs: str) -> str | None:
    from greenvis.meters import run_names

    run = None if os.path.exists(text) else run_names.by_id(text, runs)
    if run is None:
        return None
    folder = run[1][0].parent
    done = folder / "done.json"
    finished = files.read_json(done, "mark of a finished run") if done.is_file() else {}
    left = finished.get("run") if isinstance(finished, dict) else None
    if left != run[0]:
        raise BadInput(
            f"run {run[0]} left no model; {folder} holds "
            + (f"that of run {left}" if left else "none")
        )
    return str(folder)


def model_options(texts: Sequence[str] | None, **sizes: int | None) -> dict[str, Any]:
    """Return the options of a model.

    Args:
        texts: of `--option`, each KEY=VALUE.
        sizes: those with an option of their own; None where it was left out.
    """
    options: dict[str, Any] = {k: v for k, v in sizes.items() if v is not None}
    for text in texts or ():
        key, equals, value = text.partition("=")
        if not equals:
            raise BadInput(f"--option takes KEY=VALUE, as in --option depth=6; got '{text}'")
        options[key] = yamlfile.parse(value, f"--option {key[:80]}")
    return options


def console() -> Any:
    """Return the terminal; what goes to a file or another program is not folded to 80 columns,
    unless COLUMNS says so."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() or os.environ.get("COLUMNS") else WIDE)


def say(text: str) -> None:
    """Tell how far the work has come, beside the answer."""
    print(printable(text), file=sys.stderr, flush=True)


def write(text: object) -> None:
    """Print a line of an answer; names in it, from files of any origin, change neither the terminal
    nor other lines."""
    print(one_line(text))


def write_block(text: str) -> None:
    """Print a text of several lines, such as a recipe or Markdown."""
    print(printable(text).rstrip("\n"))


def message(error: object) -> str:
    """Return what went wrong as the terminal gets it; lines after the first are indented: none can
    look like ours."""
    return f"greenvis: {printable(str(error))}".replace("\n", "\n  ")


def json_text(value: Any, indent: int | None = None) -> str:
    """Return JSON for programs, in which a terminal that shows it finds no control character
    either."""
    text = json.dumps(value, indent=indent, default=str, ensure_ascii=False)
    return _UNUSUAL.sub(lambda c: c[0] if c[0].isprintable() else json.dumps(c[0])[1:-1], text)


def teller(as_json: bool) -> Callable[[str], None]:
    """Return what tells how the work goes on: `say`, and nothing where the answer is for
    programs."""
    return (lambda text: None) if as_json else say


def print_rows(rows: Sequence[dict[str, Any]], title: str, spare: Sequence[str] = ()) -> None:
    """Print rows as a table, or in a line where they have more columns than a terminal shows.

    Args:
        rows: Cells by column.
        title: Of the table.
        spare: Columns that are left out, in this order, as far as the terminal is too narrow.
    """
    from rich.measure import Measurement

    columns = list(dict.fromkeys(k for row in rows for k in row))
    if len(columns) > MOST_COLUMNS:
        return write(
            f"{title}: {len(rows)} rows of {len(columns)} columns, too wide to print; --json has "
            "them, --out a report"
        )
    terminal, table = console(), _table(rows, columns, title)
    ample = terminal.options.update_width(10_000)
    left_out = []
    for column in spare:
        if Measurement.get(terminal, ample, table).maximum <= terminal.width:
            break
        if column in columns:
            columns.remove(column)
            left_out.append(column)
            table = _table(rows, columns, title)
    terminal.print(table)
    if left_out:
        write(f"too narrow for: {', '.join(left_out)}; a wider terminal or --json has them")


def _table(rows: Sequence[dict[str, Any]], columns: Sequence[str], title: str) -> Any:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(
        title=Text(one_line(title)), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False
    )
    for column in columns:
        # a name to copy stays on one line; words are where a heading breaks
        copied = column == "run"
        table.add_column(Text(one_line(column.replace("_", " "))), overflow="fold", no_wrap=copied)
    for row in rows:
        table.add_row(*(Text("" if row.get(c) is None else one_line(row[c])) for c in columns))
    return table
