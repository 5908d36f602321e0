"""Many runs at once, listed (`greenvis ls`): plain rows, which the command line prints."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

from greenvis.core import files
from greenvis.errors import BadInput, nearest
from greenvis.meters import carbon, pricing, record
from greenvis.meters.record import MOST_BYTES, Run
from greenvis.report import schema, stats, stored
from greenvis.report.facts import measures_of
from greenvis.report.groups import record_files
from greenvis.report.listing_index import Index
from greenvis.report.measures import DEFAULT, named

COLUMNS = (
    "run", "name", "arm", "seed", "rank", "status", "started_s", "metric",
    "metric_unit", "score", "energy_j", "energy_low_j", "energy_high_j",
    "provenance", "carbon_g", "wall_s", "path",
)  # fmt: skip
SUMS = ("energy_j", "carbon_g", "wall_s")
WORDS = {"co₂e": "carbon_g", "co2e": "carbon_g", "time": "wall_s"}  # how a terminal heads a column


def ls(
    paths: stored.Paths,
    where: str = "",
    sort: str = "started_s",
    say: Callable[[str], None] = lambda text: None,
) -> list[dict[str, Any]]:
    """Return one row per record: run, name, arm, seed, rank, status, started_s, metric (its
    task's primary one), metric_unit, score (what it reached), energy_j, carbon_g, wall_s, path.

    Args:
        paths: records and folders; files that are no records are left out.
        where: keep rows in whose name, arm, run id or status this text occurs.
        sort: a column, or the metric's own name, "-" before it for descending; rows
            without a value come last.
        say: called with what was left out, and why; not for files without a byte, which processes
            killed before their first line leave.

    Raises:
        BadInput: for an unknown column, and where files were named and none of them is a record.
    """
    words, rows, refused = ("name", "arm", "run", "status"), [], []
    with Index(_code()) as index:
        for path, named in record_files(stored.listed(paths)):
            try:
                row, left_out = _indexed(index, path)
            except BadInput as error:
                refused.append(error if named else None)
                if named or not record.is_empty(path):
                    say(f"left out: {error}")
                continue
            for line in left_out:
                say(line)
            if any(where.lower() in str(row[word]).lower() for word in words):
                rows.append(row | {"path": str(path)})
    if refused and not rows and not where and all(refused):
        raise BadInput(str(refused[0]))
    key = column(sort.removeprefix("-"), COLUMNS, "sort", _metrics(rows))
    return _sorted(rows, key, sort.startswith("-"), lambda row: row["run"])


def group(
    rows: Iterable[dict[str, Any]], by: Iterable[str] = ("name", "arm"), sort: str = ""
) -> list[dict[str, Any]]:
    """Return `ls` rows put together: one row for each value of the columns `by`.

    Args:
        rows: of `ls`.
        by: columns.
        sort: as in `ls`, by a column of the groups; those of `by` where it is empty.

    Returns:
        Rows with runs and done (counts), metric and score (the mean over finished runs that have
        one; None where they have several metrics), and energy_j, carbon_g and wall_s (sums over
        all).

    Raises:
        BadInput: for an unknown column.
    """
    rows = list(rows)
    columns = [column(name, COLUMNS, "group") for name in by]
    heads = (*columns, "runs", "done", "metric", "metric_unit", "score", *SUMS)
    key = ""
    if sort:
        key = column(sort.removeprefix("-"), heads, "sort these groups", _metrics(rows))
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(tuple(row[c] for c in columns), []).append(row)
    out = []
    for values, members in sorted(groups.items(), key=lambda kv: tuple(map(str, kv[0]))):
        scores = {
            i: r["score"]
            for i, r in enumerate(members)
            if r["status"] == "done" and r["score"] is not None
        }
        judged = {(r["metric"], r["metric_unit"]) for r in members if r["score"] is not None}
        metric, unit = judged.pop() if len(judged) == 1 else (None, None)
        sums = {k: math.fsum(r[k] for r in members if r[k] is not None) for k in SUMS}
        done = sum(r["status"] == "done" for r in members)
        mean = None if metric is None else stats.summary(scores).mean
        out.append(
            dict(zip(columns, values, strict=True))
            | {"runs": len(members), "done": done}
            | {"metric": metric, "metric_unit": unit, "score": mean}
            | sums
        )
    return (
        _sorted(out, key, sort.startswith("-"), lambda row: tuple(str(row[c]) for c in columns))
        if key
        else out
    )


def _metrics(rows: Iterable[dict[str, Any]]) -> dict[str, str]:
    """Return the column of each metric's own name."""
    return {str(name).lower(): "score" for name in {r["metric"] for r in rows} | {DEFAULT}}


def column(
    name: str, columns: Sequence[str], doing: str, words: Mapping[str, str] | None = None
) -> str:
    """Return the column that a name means: its own, one without its unit, or as a terminal heads
    it. Raises BadInput."""
    requested = (WORDS | dict(words or {})).get(name.lower(), name.lower())
    match = next((c for c in columns if requested in (c, c.rpartition("_")[0])), None)
    if match is None:
        raise BadInput(f"cannot {doing} by '{name}'{nearest(requested, columns)}")
    return match


def _sorted(
    rows: list[dict[str, Any]], key: str, down: bool, then: Callable[[dict[str, Any]], Any]
) -> list[dict[str, Any]]:
    """Return rows by the values of a column, those without one last."""
    known = sorted(
        (r for r in rows if r[key] is not None), key=lambda r: (r[key], then(r)), reverse=down
    )
    return known + [r for r in rows if r[key] is None]


def _indexed(index: Index, path: Path) -> tuple[dict[str, Any], list[str]]:
    """Return what `ls` says of a record but its path, and what of it was left out, in words; parsed
    where the index does not know its content.

    Raises BadInput where it is no record of a known schema.
    """
    content = files.read(path, "record", MOST_BYTES)
    row = index[content]
    if isinstance(row, dict) and {*row, "path"} == {*COLUMNS}:
        return row, []
    run = record.parse(content, path)
    left_out = schema.check(run)
    row = _row(run)
    if run.end and not left_out:  # what has no end may go on
        index[content] = row
    return row, left_out


def _code() -> bytes:
    """Return what changes with the code that makes a row."""
    meters = sorted(Path(str(record.__file__)).parent.glob("*.py"))
    sources = (*meters, Path(str(schema.__file__)), Path(__file__))
    return blake2b(b"".join(s.read_bytes() for s in sources), digest_size=32).digest()


def _row(run: Run) -> dict[str, Any]:
    h = run.header
    spent = pricing.add(pricing.energy(_sums(run), h.get("components") or []).values())
    pue = h.get("pue")
    grams = carbon.grams(
        spent, h.get("carbon_intensity") or {}, pue if isinstance(pue, (int, float)) else 1.0
    )
    measure = next(iter(measures_of(run.facts)), named(DEFAULT))
    logged = next((log[measure.name] for log in reversed(run.logs) if measure.name in log), None)
    score = run.facts.get(measure.name, logged)
    name = str(h.get("name") or "run")
    return {
        "run": run.id,
        "name": name,
        "arm": str(h.get("arm") or name),
        "seed": h.get("seed", 0),
        "rank": h.get("rank", 0),
        "status": run.status,
        "started_s": h.get("clock_s"),
        "metric": None if score is None else measure.name,
        "metric_unit": None if score is None else measure.unit,
        "score": score,
        "energy_j": spent.value,
        "energy_low_j": spent.low,
        "energy_high_j": spent.high,
        "provenance": None if spent.value is None else spent.provenance,
        "carbon_g": grams.value,
        "wall_s": run.sum("wall_s"),
    }


def _sums(run: Run) -> dict[str, float]:
    """Return each quantity over all phases: the pricing model is linear, so the sum can be priced
    in one go."""
    parts: dict[str, list[float]] = {}
    for totals in run.totals.values():
        for quantity, value in totals.items():
            parts.setdefault(quantity, []).append(value)
    return {quantity: math.fsum(values) for quantity, values in parts.items()}
