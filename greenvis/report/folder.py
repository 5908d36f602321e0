"""The folder of a report: we replace and delete what an earlier report of ours left there, and
nothing else."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from pathlib import Path

from greenvis.core import files
from greenvis.errors import BadInput, some
from greenvis.report.stored import MOST_BYTES

LIST = ".greenvis-report.json"  # the mark of a folder of ours: the files we wrote there
# what a report may consist of; whatever a list says, nothing else is touched
KINDS = (
    "index.html",
    "report.md",
    "results.json",
    "results.csv",
    "records.*",
    "figures/*.svg",
    "figures/*.pdf",
    "exports/*",
)


PAGES = ("index.html", "report.md", "results.json", "results.csv")


def refuse_foreign(folder: Path, names: Iterable[str] = PAGES) -> None:
    """Raise BadInput where a file of these names stands in a folder that no report wrote there."""
    before = written(folder)
    foreign = [name for name in names if name not in before and _is_there(folder / name)]
    if foreign:
        raise BadInput(
            f"{folder} holds {some(foreign, 3)}, which no report of greenvis wrote: give another "
            "folder with --out, or move them away"
        )


def publish(folder: Path, contents: Mapping[str, str | bytes]) -> None:
    """Write a report's files, whole or not at all each, and delete those of the report that was
    there before.

    Args:
        folder: made where there is none.
        contents: text or bytes by name, relative to the folder.

    Raises:
        BadInput: where a file stands in the way that no report wrote; nothing was changed.
        GreenvisError: where a folder below is a link.
    """
    refuse_foreign(folder, contents)
    before = written(folder)
    for parent in sorted({(folder / name).parent for name in (LIST, *contents)}):
        files.own_folder(parent, folder)
    names = {name for name in before if _is_there(folder / name)} | set(contents)
    # first: a kill leaves nothing unlisted
    files.write(folder / LIST, json.dumps({"files": sorted(names)}, indent=1) + "\n")
    for name in sorted(before - set(contents)):
        (folder / name).unlink(missing_ok=True)
        if (folder / name).parent.is_dir():
            files.sweep((folder / name).parent, (folder / name).name)
    for name, content in contents.items():
        files.write(folder / name, content)
    files.write(folder / LIST, json.dumps({"files": sorted(contents)}, indent=1) + "\n")


def written(folder: Path) -> set[str]:
    """Return the names of the files that a report of ours wrote there."""
    try:
        names = files.read_json(folder / LIST, "list of a report's files")["files"]
        ours = {name for name in names if isinstance(name, str) and _is_ours(name)}
    except (BadInput, KeyError, TypeError):  # one of an earlier greenvis has results, but no list
        ours = _unlisted(folder)
    return {
        name
        for name in ours
        if not (folder / name).parent.is_symlink() and not (folder / name).is_dir()
    }


def _unlisted(folder: Path) -> set[str]:
    try:
        results = files.read_json(folder / "results.json", "results", MOST_BYTES)
    except BadInput:
        return set()
    if not (
        isinstance(results, dict)
        and isinstance(results.get("schema"), int)
        and isinstance(results.get("arms"), dict)
    ):
        return set()
    return {str(p.relative_to(folder)) for kind in KINDS for p in folder.glob(kind)}


def _is_ours(name: str) -> bool:
    return (
        any(fnmatchcase(name, kind) and name.count("/") == kind.count("/") for kind in KINDS)
        and ".." not in name
    )


def _is_there(path: Path) -> bool:
    return path.is_symlink() or path.exists()
