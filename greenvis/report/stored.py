"""A results.json read back: compared and put into words anew, where the records it came from are
not at hand."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from greenvis.core import files
from greenvis.errors import BadInput, GreenvisError, nearest, one_line
from greenvis.meters import record
from greenvis.report import archive, build, comparison
from greenvis.report.estimates import LabelSeconds
from greenvis.report.schema import is_plain
from greenvis.report.shape import SCHEMA, Results, problems

NAME = "results.json"
MOST_BYTES = 256 * 2**20
Paths = str | os.PathLike[str] | Iterable[str | os.PathLike[str]]
MOST_DEPTH = 60  # of values: a recipe may be among them


def listed(paths: Paths) -> list[str | os.PathLike[str]]:
    """Return one path, or several, as a list."""
    return [paths] if isinstance(paths, (str, os.PathLike)) else list(paths)


def file(paths: Paths) -> Path | None:
    """Return the results.json that `paths` names, itself or by a folder without records, packed or
    not; None for records."""
    entries = listed(paths)
    if len(entries) != 1:
        return None
    path = Path(entries[0])
    if path.suffix == ".json":
        return path
    is_report = (
        (path / NAME).is_file()
        and archive.inside(path) is None
        and next(iter(record.find([path])), None) is None
    )
    return path / NAME if is_report else None


@contextmanager
def believed(path: Path | None) -> Iterator[None]:
    """Turn what goes wrong within into BadInput, where `path` names results: a stranger's may lack
    or mistype anything."""
    try:
        yield
    except (GreenvisError, OSError):
        raise
    except Exception as error:
        if path is None:
            raise
        raise BadInput(
            f"{path} is not a whole {NAME} of greenvis: {type(error).__name__}: {error}"
        ) from error


def read(path: Path) -> Results:
    """Return the results in a file. Raises BadInput for what is none, or of another schema."""
    content = files.read_json(path, "results", MOST_BYTES)
    if not isinstance(content, dict) or not isinstance(content.get("arms"), dict):
        raise BadInput(f"{path} is not a {NAME} of greenvis: it has no arms")
    schema = content.get("schema", 0)
    if not isinstance(schema, int):
        raise BadInput(f"{path} is not a {NAME} of greenvis: its schema is no number")
    if schema != SCHEMA:
        way = "upgrade it" if schema > SCHEMA else "make the report again from its run records"
        raise BadInput(
            f"{path} has schema {str(schema)[:20]}, and this greenvis reads {SCHEMA}: {way}"
        )
    if not is_plain(content, most=MOST_DEPTH):
        problem = "numbers that are not finite, or nested too deeply"
        raise BadInput(f"{path} is not a {NAME} of greenvis: {problem}")
    try:
        results = Results.from_json(content)
    except ValidationError as error:
        raise BadInput(f"{path} is not a {NAME} of greenvis: {problems(error)}") from error
    if problem := _inconsistent(results):
        raise BadInput(f"{path} is not a {NAME} of greenvis: {problem}")
    return results


def _inconsistent(results: Results) -> str:
    """Return what does not fit together in results whose values are each possible, "" where all
    does."""
    known = sorted(results.arms)
    if sorted(results.order) != known or results.baseline not in (None, *known):
        return "its order or its baseline names arms that are not there"
    lacking = [a for a, row in results.arms.items() if row.uses and row.base_reuse is None]
    if lacking:
        return f"arms.{one_line(lacking[0])[:100]}: it uses others, and base_reuse is missing"
    return ""


def again(
    path: Path,
    *,
    baseline: str | None,
    metric: str | None,
    grid: Any,
    served: float | None,
    margin: float | None,
    label_seconds: Iterable[str] = (),
) -> Results:
    """Return stored results compared anew, with another baseline, usage or margin if told. Raises
    BadInput.

    Joules and grams stay as they are: to price them anew, and for another metric, the records are
    needed.
    """
    results = read(path)
    if grid is not None or metric not in (None, results.metric):
        raise BadInput(
            f"{path} holds figures that are priced, of {results.metric}: a grid or another "
            "metric wants run records"
        )
    if baseline is not None and baseline not in results.arms:
        raise BadInput(f"no arm '{baseline}' to be the baseline{nearest(baseline, results.arms)}")
    changed: dict[str, Any] = {
        "baseline": baseline,
        "served": served and round(served),
        "margin": margin,
    }
    if baseline is not None:
        changed["order"] = [baseline, *(a for a in results.order if a != baseline)]
    if asked := list(label_seconds):
        priced = build.priced_labels(results.arms, asked)
        changed["label_seconds"] = {k: LabelSeconds.model_validate(s) for k, s in priced.items()}
    known = {key: value for key, value in changed.items() if value is not None}
    return comparison.compared(results.model_copy(update=known))
