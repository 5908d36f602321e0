"""Results to files: index.html (self-contained), report.md, results.json, results.csv,
figures/*.svg, exports/."""

from __future__ import annotations

import base64
import csv
import hashlib
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from greenvis.errors import printable
from greenvis.report import (
    archive,
    exports,
    figures,
    label_columns,
    measures,
    sections,
    tables,
    task_columns,
)
from greenvis.report.blocks import Block, Drawings, Inline, Lead, Link, paragraph
from greenvis.report.columns import Column
from greenvis.report.estimates import Estimate
from greenvis.report.figures import Drawing
from greenvis.report.folder import publish
from greenvis.report.formatting import MISSING
from greenvis.report.markup import fence, md, words
from greenvis.report.results_file import to_json
from greenvis.report.section import Section
from greenvis.report.shape import Results

TEMPLATES = Path(__file__).with_name("templates")
FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n", "＝", "＋", "－", "＠")
READINGS = (
    "train_energy_with_reuse_j",
    "train_energy_j",
    "total_energy_j",
    "carbon_g",
    "inference_energy_j",
)


@dataclass(frozen=True)
class Shown:
    """A section with its blocks."""

    name: str
    title: str
    blocks: Sequence[Block]
    folded: bool = False

    @property
    def drawings(self) -> list[Drawing]:
        """Its figures."""
        several = [d for block in self.blocks if isinstance(block, Drawings) for d in block.items]
        leads = [block.drawing for block in self.blocks if isinstance(block, Lead)]
        return [d for d in leads if d] + several


def shown(results: Results, section: Section[Any]) -> Shown | None:
    """Return what a section shows of results; None where it has nothing to say."""
    value = section.compute(results)
    return (
        None
        if value is None
        else Shown(section.name, section.title, section.render(value), section.folded)
    )


def write(
    results: Results, folder: Path, packed: bytes | None = None, *, pdf: bool = False
) -> Path:
    """Write all files of a report into `folder`, `packed` records among them, and return the path
    of its index.html.

    Args:
        results: What it says.
        folder: Where to.
        packed: The records as one archive.
        pdf: Whether figures are written as PDF as well.
    """
    with figures.with_pdf(pdf):
        every = [s for section in sections.ordered() if (s := shown(results, section))]
    every.append(_files(packed is not None))
    contents: dict[str, str | bytes] = {
        f"figures/{d.name}.svg": d.svg for s in every for d in s.drawings
    }
    contents |= {f"figures/{d.name}.pdf": d.pdf for s in every for d in s.drawings if d.pdf}
    contents |= {archive.NAME: packed} if packed else {}
    contents |= {"results.json": to_json(results), "results.csv": to_csv(results)}
    contents |= {f"exports/{name}": text for name, text in exports.files(results).items()}
    title = results.title or _title(results)
    contents["report.md"] = markdown(title, every)
    contents["index.html"] = html(title, every)  # last: where it is, all is there
    publish(folder, contents)
    return folder / "index.html"


def html(title: str, every: Sequence[Shown]) -> str:
    """Return a page of those sections, self-contained."""
    css, script = ((TEMPLATES / n).read_text(encoding="utf-8") for n in ("style.css", "page.js"))
    allowed = base64.b64encode(hashlib.sha256(f"\n{script}".encode()).digest()).decode()
    return _render(
        "index.html.j2",
        title=title,
        sections=every,
        css=css,
        script=script,
        allowed=f"'sha256-{allowed}'",
        missing=MISSING,
    )


def markdown(title: str, every: Sequence[Shown]) -> str:
    """Return those sections as Markdown."""
    return _render("report.md.j2", title=title, sections=every)


def _render(template: str, **view: Any) -> str:
    """Render a template; HTML is escaped by jinja, Markdown by `md`. No control character reaches
    either."""
    import jinja2

    env = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=template.startswith("index.html"),
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
        # not what is markup already
        finalize=lambda value: printable(value) if type(value) is str else value,
    )
    env.filters.update(md=md, words=words, fence=fence, clean=figures.clean)
    return env.get_template(template).render(view).rstrip() + "\n"


def _title(results: Results) -> str:
    """Return a title for results whose recipe states none."""
    words = results.name.replace("-", " ").replace("_", " ").strip() or results.name
    return f"{words[:1].upper()}{words[1:]}: {measures.written(results.measure)} and energy"


def _files(packed: bool) -> Shown:
    """Return the section on the files beside a page."""
    beside = {
        "results.json": "results.json",
        "results.csv": "results.csv",
        "report.md": "report.md",
        **({"run records": archive.NAME} if packed else {}),
        **{what: f"exports/{name}" for name, what in exports.NAMES.items()},
    }
    links: list[Inline] = ["All numbers and formats: "]
    for i, (text, path) in enumerate(beside.items()):
        links += [*([", "] if i else []), Link(text, path)]
    reads = "“greenvis report FOLDER” reads the run records."
    how = f". {reads if packed else 'The run records are not beside them.'}"
    return Shown("files", "Take it along", [paragraph(*links, how)], True)


def to_csv(results: Results) -> str:
    """Return one row per arm: plain numbers, the unit in each column's name. Text never becomes a
    formula."""
    columns = {c.key: c for c in _columns(results) if c.key not in READINGS}
    head = ["arm", "status", "seeds", f"{results.metric}_std", *columns]
    head += [key + end for key in READINGS for end in ("", "_low", "_high", "_provenance")]
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow([_cell(h) for h in head])
    for a, row in results.rows.items():
        values: list[Any] = [a, row.status, len(row.seeds), row.gain.std]
        values += [column.number(row) for column in columns.values()]
        for key in READINGS:
            reading: Estimate = getattr(row, key)
            values += [reading.value, reading.low, reading.high, reading.provenance]
        writer.writerow([_cell(v) for v in values])
    return buffer.getvalue()


def _columns(results: Results) -> Iterable[Column]:
    yield from tables.costs(results)
    yield from tables.further(results)
    yield from tables.sizes(results)
    yield from task_columns.columns(results)
    yield from tables.cycle(results)
    yield from label_columns.columns(results)


def _cell(value: Any) -> Any:
    """Return a CSV cell; text that a spreadsheet would run gets a leading apostrophe."""
    if value is None:
        return ""
    if not isinstance(value, str):
        return repr(value)
    value = figures.clean(value)
    return "'" + value if value.lstrip().startswith(FORMULA) or value.startswith(FORMULA) else value
