"""Results to files: index.html (self-contained), report.md, results.json, results.csv,
figures/*.svg, exports/."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from greenvis.errors import printable
from greenvis.report import archive, exports, figures, label_columns, sections, tables, task_columns
from greenvis.report.blocks import Block, Drawings, Inline, Link, paragraph
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

    @property
    def drawings(self) -> list[Drawing]:
        """Its figures."""
        return [d for block in self.blocks if isinstance(block, Drawings) for d in block.items]


def shown(results: Results, section: Section[Any]) -> Shown | None:
    """Return what a section shows of results; None where it has nothing to say."""
    value = section.compute(results)
    return None if value is None else Shown(section.name, section.title, section.render(value))


def write(results: Results, folder: Path, packed: bytes | None = None) -> Path:
    """Write all files of a report into `folder`, `packed` records among them, and return the path
    of its index.html."""
    every = [s for section in sections.ordered() if (s := shown(results, section))]
    every.append(_files(packed is not None))
    contents: dict[str, str | bytes] = {
        f"figures/{d.name}.svg": d.svg for s in every for d in s.drawings
    }
    contents |= {archive.NAME: packed} if packed else {}
    contents |= {"results.json": to_json(results), "results.csv": to_csv(results)}
    contents |= {f"exports/{name}": text for name, text in exports.files(results).items()}
    title = results.title or results.name
    contents["report.md"] = markdown(title, every)
    contents["index.html"] = html(title, every)  # last: where it is, all is there
    publish(folder, contents)
    return folder / "index.html"


def html(title: str, every: Sequence[Shown]) -> str:
    """Return a page of those sections, self-contained."""
    css = (TEMPLATES / "style.css").read_text(encoding="utf-8")
    return _render("index.html.j2", title=title, sections=every, css=css, missing=MISSING)


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
    return Shown("files", "Take it along", [paragraph(*links, how)])


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
