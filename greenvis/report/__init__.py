"""Reports: `report(paths)` turns run records into a page, a Markdown file, results.json,
results.csv and figures."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from greenvis.errors import BadInput, GreenvisError, nearest
from greenvis.meters.grid import constant, lookup

if TYPE_CHECKING:
    from greenvis.report.shape import Results

SERVED = 1_000_000  # images: the usage at which making and using a model are added up, unless told

Paths = str | os.PathLike[str] | Iterable[str | os.PathLike[str]]


def report(
    paths: Paths,
    out: str | os.PathLike[str] | None = None,
    baseline: str | None = None,
    metric: str | None = None,
    grid: float | str | Mapping[str, Any] | None = None,
    title: str | None = None,
    served: float | None = None,
    note: str | None = None,
    margin: float | None = None,
    label_seconds: Iterable[str] = (),
    coefficients: str | os.PathLike[str] | None = None,
    pdf: bool = False,
    arm: str | None = None,
) -> Path:
    """Write a report of recorded runs.

    Args:
        paths: records, folders of them or glob patterns; a report's folder, for the records packed
            in it; or one results.json, which is compared and written anew; or exports of other
            tools (`greenvis.report.foreign`): codecarbon's emissions.csv, CSV or JSON of MLflow
            or of Weights & Biases, a run per line, with a column such as energy_kwh.
        out: the folder to write, reports/<name> by default.
        baseline: the arm others are compared with (default: the one called "baseline").
        metric: what the arms gain, a fact of the runs; by default what their recipe asks for, else
            the primary metric of their task.
        grid: a zone ("SWE", see `greenvis.meters.grid`), g CO2e per kWh, or a carbon intensity
            {"value", "low", "high", "zone", "source"}, in place of the recorded one.
        title: headline of the report.
        served: the images at which making and using a model are added up.
        note: shown below the verdict, as its author's words.
        margin: points of a share (0.5), or of another metric its own unit (0), that an arm may
            lose and still keep it.
        label_seconds: what a label takes a person, "class=5" or "class=1,5,60" (low, central,
            high), in place of the figures of `meters/label_seconds.json`.
        coefficients: a file as `meters.coefficients.load_coefficients` takes it, which prices what
            was observed, of training and of serving, in the place of the recorded coefficients.
        pdf: write the figures as PDF as well, with their fonts embedded.
        arm: the arm that is asked about, of which the verdict speaks (default: the recipe's, else
            the one that the intervals speak for).

    Returns:
        The path of its index.html.

    Raises:
        BadInput: where there is nothing to report.
        GreenvisError: where the folder cannot be written.

    Example:
        >>> with gv.track("mine", dir=folder / "runs") as tracker:
        ...     tracker.fact(accuracy=0.9)
        >>> page = gv.report(folder / "runs", out=folder / "report")
        >>> page.name
        'index.html'
    """
    from greenvis.report import foreign

    priced: dict[str, Any] = {
        "baseline": baseline,
        "metric": metric,
        "grid": grid,
        "served": served,
        "margin": margin,
        "label_seconds": tuple(label_seconds),
        "coefficients": coefficients,
    }
    words = {"title": title, "note": note, "arm": arm}
    with _no_collection(), foreign.converted(_listed(paths)) as records:
        return _write(records, priced, words, None if out is None else Path(out), pdf)


def _write(
    paths: Sequence[str | os.PathLike[str]],
    priced: Mapping[str, Any],
    words: Mapping[str, str | None],
    out: Path | None,
    pdf: bool,
) -> Path:
    """Write the page of records or of a results.json, its records packed beside it, and return the
    path of its index.html. priced: arguments of `results`; words: title, note, arm, where told."""
    from greenvis.report import archive, page, stored

    content = results(paths, **priced)
    results_file = stored.file(paths)
    beside = results_file and results_file.parent / archive.NAME
    with archive.unpacked(([beside] if beside.is_file() else []) if beside else paths) as each:
        packed = archive.pack(each)
    if packed and packed.rounded and not results_file:
        # what is written is what the records written beside it say
        with archive.opened(packed) as records:
            content = results(records, **priced)
    if words["arm"] is not None and words["arm"] not in content.arms:
        raise BadInput(f"no arm '{words['arm']}' to speak of{nearest(words['arm'], content.arms)}")
    folder = results_file.parent if results_file else Path("reports") / _file_name(content.name)
    content = content.model_copy(update={key: text for key, text in words.items() if text})
    try:
        with stored.believed(results_file):
            return page.write(content, out or folder, packed.content if packed else None, pdf=pdf)
    except OSError as error:
        raise GreenvisError(f"cannot write the report to {folder}: {error}") from error


def results(
    paths: Paths,
    baseline: str | None = None,
    metric: str | None = None,
    grid: float | str | Mapping[str, Any] | None = None,
    served: float | None = None,
    margin: float | None = None,
    label_seconds: Iterable[str] = (),
    coefficients: str | os.PathLike[str] | None = None,
) -> Results:
    """Return what a report says, writing nothing.

    Args:
        paths: as in `report`.
        baseline: as in `report`.
        metric: as in `report`.
        grid: as in `report`.
        served: as in `report`.
        margin: as in `report`.
        label_seconds: as in `report`.
        coefficients: as in `report`.

    Returns:
        The results; `results.as_json()` is the content of results.json.

    Raises:
        BadInput: where there is nothing to report.
    """
    from pydantic import ValidationError

    from greenvis.report import archive, build, foreign, groups, shape, stored

    _check(served, margin)
    with foreign.converted(_listed(paths)) as records:
        if results_file := stored.file(records):
            if coefficients is not None:
                raise BadInput(
                    f"{results_file} holds figures that are priced: coefficients want run records"
                )
            with stored.believed(results_file):
                return stored.again(
                    results_file,
                    baseline=baseline,
                    metric=metric,
                    grid=grid,
                    served=served,
                    margin=margin,
                    label_seconds=label_seconds,
                )
        with archive.unpacked(records) as each:
            loaded = groups.load(each, metric, coefficients)
    try:
        return build.results(
            loaded,
            baseline=baseline,
            grid=_intensity(grid),
            served=round(SERVED if served is None else served),
            margin=margin,
            label_seconds=label_seconds,
        )
    except ValidationError as error:  # records of other hands
        raise BadInput(f"these records make no report: {shape.problems(error)}") from error


def _check(served: float | None, margin: float | None) -> None:
    for name, value, least, most in (("served", served, 1, 1e18), ("margin", margin, 0, 1e6)):
        if value is not None and not (isinstance(value, (int, float)) and least <= value < most):
            what = (
                "number of images the model will answer, 1 or more"
                if name == "served"
                else "points that may be lost, 0 or more"
            )
            raise BadInput(f"{name} is {value!r}; give the {what}")


def _listed(paths: Paths) -> list[str | os.PathLike[str]]:
    return [paths] if isinstance(paths, (str, os.PathLike)) else list(paths)


@contextmanager
def _no_collection() -> Iterator[None]:
    """Hold Python's cycle collector: going through thousands of records again and again takes a
    third of the time."""
    before = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if before:
            gc.enable()


def table(results: Results) -> Any:
    """Return results as a rich table for a terminal: one row per arm.

    Args:
        results: of `results`.
    """
    from greenvis.report import terminal

    return terminal.table(results)


def _intensity(grid: float | str | Mapping[str, Any] | None) -> dict[str, Any] | None:
    if grid is None:
        return None
    if isinstance(grid, Mapping):
        if not isinstance(grid.get("value"), (int, float)):
            raise BadInput(
                f'a grid is {{"value": g CO2e per kWh, "zone", "source"}}; this one has no number '
                f'"value": {dict(grid)}'
            )
        return dict(grid)
    try:
        value = float(grid)
    except ValueError:
        return lookup(str(grid))
    return {**constant(value), "source": "given by the reader of this report"}


def _file_name(name: str) -> str:
    return (
        "".join(c if c.isalnum() or c in "-_." else "-" for c in name).strip("-.")[:80] or "report"
    )
