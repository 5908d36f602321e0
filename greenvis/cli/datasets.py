"""`greenvis data ls`, `show` and `fetch`: the data sets that recipes can name."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from greenvis.cli import app
from greenvis.cli.app import EXAMPLES, EXIT_CODES, Verb, Verbs, argument, effect, epilog, option
from greenvis.cli.output import answer, print_rows, say, write
from greenvis.errors import BadInput, GreenvisError

MOST_VALUES = 12  # of what may stand behind a colon, each with a line of its own

EXAMPLES |= {
    "data": "greenvis data ls",
    "data ls": "greenvis data ls",
    "data show": "greenvis data show digits",
    "data fetch": "greenvis data fetch emoji:google",
}
data = typer.Typer(
    cls=Verbs, rich_markup_mode=None, epilog=EXIT_CODES, help="list, show and fetch data sets"
)
app.app.add_typer(data, name="data", rich_help_panel=app.TRAIN)

Name = Annotated[str, argument("as a recipe's data.name: emoji:google, folder:PATH", "NAME")]
Root = Annotated[str | None, option("folder of its files", "FOLDER")]


@data.command("ls", cls=Verb, rich_help_panel=app.TRAIN, epilog=epilog(EXAMPLES["data ls"]))
def ls(as_json: app.Json = False) -> None:
    """list the data sets that recipes can name, and whether they are here"""
    from greenvis.data import dataset

    rows = [row for name in dataset.DOOR.names() for row in _rows(dataset.DOOR.find(name))]

    def show() -> None:
        columns = ("name", "here", "images", "classes", "licence", "shows")
        shown = [{column: row[column] for column in columns} for row in rows]
        for before, row in zip(rows, shown[1:], strict=False):
            row["shows"] = "" if row["shows"] == before["shows"] else row["shows"]
        print_rows(shown, "data sets")
        write(
            "fetch what is not here with `greenvis data fetch NAME`; see it with `data show NAME`"
        )

    answer(as_json, rows, show)


@data.command("show", cls=Verb, rich_help_panel=app.TRAIN, epilog=epilog(EXAMPLES["data show"]))
def show(
    name: Name,
    out: Annotated[str | None, option("the sheet, a PNG; NAME.png where absent", "FILE")] = None,
    part: Annotated[str, option("train or test")] = "train",
    count: Annotated[int, option("images", "N", min=1, max=1000)] = 48,
    root: Root = None,
    as_json: app.Json = False,
) -> None:
    """draw some images of a data set, with their labels, masks or boxes, as a PNG"""
    from greenvis.core import files
    from greenvis.data import sheets

    if part not in ("train", "test"):
        raise BadInput(f"--part is train or test, not '{part}'")
    chosen = _find(name, root)
    chosen.check()
    stored = chosen.read()
    split = getattr(stored, part)
    path = Path(out or f"{Path(name.replace(':', '-')).name}.png")
    with files.replacing(path) as target:
        sheets.sheet(split, stored.classes, count).save(target, format="PNG")
    facts = {
        "name": name,
        "sheet": str(path),
        "train": len(stored.train),
        "test": len(stored.test),
        "labels": split.kind,
        "classes": list(stored.classes),
        "source": chosen.source,
        "licence": chosen.licence,
        "checksum": stored.checksum,
    }

    def show_facts() -> None:
        for key in ("train", "test", "labels", "source", "licence", "checksum"):
            write(f"{key}: {facts[key]}")
        write(f"classes: {len(stored.classes)}: {', '.join(stored.classes[:12])}")
        write(f"sheet: {path}")

    answer(as_json, facts, show_facts)


@data.command("fetch", cls=Verb, rich_help_panel=app.TRAIN, epilog=epilog(EXAMPLES["data fetch"]))
def fetch(name: Name, root: Root = None, as_json: app.Json = False) -> None:
    """fetch a data set's files into your cache folder, or into --root"""
    chosen = _find(name, root)
    if not as_json:
        say(f"fetching {name} ({chosen.licence}) from {chosen.source}")
    folder = chosen.fetch()
    answer(as_json, {"name": name, "folder": str(folder)}, lambda: write(f"{name}: {folder}"))


def _find(name: str, root: str | None) -> Any:
    from greenvis.data import DataSpec, dataset

    return dataset.find(DataSpec(name=name, root=root))


def _rows(cls: Any) -> list[dict[str, Any]]:
    """Return a line for a data set, or one for each of its values where they are few."""
    values = cls.values if len(cls.values) <= MOST_VALUES else ()
    names = [f"{cls.name}:{value}" for value in values]
    form = f"{cls.name}:{cls.argument}" if cls.argument else cls.name
    return [_row(cls, name) for name in names or [form]]


def _row(cls: Any, name: str) -> dict[str, Any]:
    from greenvis.data import DataSpec

    here, how = "yours" if cls.argument == "PATH" else "", ""
    if not here and name.endswith(f":{cls.argument}") and cls.argument:
        here, how = f"one of {len(cls.values)}", ", ".join(cls.values)
    if not here:
        try:
            cls(DataSpec(name=name)).check()
            here = "yes"
        except GreenvisError as error:
            here, how = "no", str(error)
    return {
        "name": name,
        "here": here,
        "images": sum(cls.size.values()) or "",
        "classes": len(cls.classes) or "",
        "licence": cls.licences().get(name.partition(":")[2], cls.licence),
        "shows": effect(cls.__doc__),
        "source": cls.source,
        "checksum": cls.checksum,
        "how": how,
    }
