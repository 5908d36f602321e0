"""What a word names among records: a path, a run's id or one end of it, an arm's folder."""

from __future__ import annotations

import glob
import os
from pathlib import Path

from greenvis.errors import BadInput
from greenvis.meters.record import SUFFIX, parse_line

LEAST_OF_AN_ID = 6  # characters of one end of it that name a run


def named(text: str | os.PathLike[str], runs: str | os.PathLike[str] = "runs") -> str:
    """Return the path that a word means: itself where something is there or it is a pattern; else
    what it names in `runs`.

    That is what `greenvis ls` shows: a run's id, or one end of it (a pattern of its records, one a
    process), or RECIPE/ARM (a folder). Raises BadInput where several runs have that end; a word
    that names nothing is returned as it is.
    """
    word = os.fspath(text)
    if os.path.exists(word) or glob.has_magic(word):
        return word
    below = Path(runs) / word.removeprefix("run:")
    if word.removeprefix("run:") and below.is_dir():
        return str(below)
    run = by_id(word, runs)
    if run is None:
        return word
    first = run[1][0]
    return (
        os.path.join(glob.escape(str(first.parent)), f"{run[0]}.*")
        if len(run[1]) > 1
        else str(first)
    )


def by_id(word: str, runs: str | os.PathLike[str] = "runs") -> tuple[str, list[Path]] | None:
    """Return the id and the records of the run below `runs` that has this id, or an id that begins
    or ends so; None for none.

    Raises BadInput where several have.
    """
    if len(word) < LEAST_OF_AN_ID:
        return None
    # a pipe would hang
    candidates = [path for path in sorted(Path(runs).rglob(f"*{SUFFIX}")) if path.is_file()]
    # files may be renamed
    for id_of in (lambda path: path.name.removesuffix(SUFFIX).partition(".rank")[0], _first_id):
        ids: dict[str, list[Path]] = {}
        for path in candidates:
            if (run := id_of(path)).startswith(word) or run.endswith(word):
                ids.setdefault(run, []).append(path)
        if len(ids) > 1 and word not in ids:
            raise BadInput(
                f"'{word}' is one end of {len(ids)} ids below {runs}: {', '.join([*ids][:6])}; "
                "give more of it"
            )
        if ids:
            run = word if word in ids else next(iter(ids))
            return run, ids[run]
    return None


def _first_id(path: Path) -> str:
    """Return the run's id of the first line that has one, of those at the beginning."""
    try:
        with path.open("rb") as file:
            headers = (
                line
                for line in map(parse_line, file.read(2**20).split(b"\n"))
                if isinstance(line, dict) and line.get("type") == "header"
            )
            return str(next(headers, {}).get("run", ""))
    except OSError:
        return ""
