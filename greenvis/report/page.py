"""Results to files: index.html (self-contained), report.md, results.json, results.csv,
figures/*.svg, exports/."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

from greenvis.errors import printable
from greenvis.report import (
    archive,
    charts,
    continual,
    exports,
    figures,
    floor,
    formatting,
    methodology,
    settings,
    tables,
    verdict,
)
from greenvis.report.figures import Drawing
from greenvis.report.folder import publish
from greenvis.report.markup import fence, md, shell
from greenvis.report.results_file import to_json

TEMPLATES = Path(__file__).with_name("templates")
FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n", "＝", "＋", "－", "＠")


def write(results: dict[str, Any], folder: Path, packed: bytes | None = None) -> Path:
    """Write all files of a report into `folder`, `packed` records among them, and return the path
    of its index.html."""
    drawings = charts.draw(results)
    view = _view(results, drawings) | {"packed": packed is not None}
    contents: dict[str, str | bytes] = {f"figures/{d.name}.svg": d.svg for d in drawings}
    contents |= {archive.NAME: packed} if packed else {}
    contents |= {"results.json": to_json(results), "results.csv": to_csv(results)}
    contents |= {f"exports/{name}": text for name, text in exports.files(results).items()}
    contents["report.md"] = render("report.md.j2", view)
    contents["index.html"] = render("index.html.j2", view)  # last: where it is, all is there
    publish(folder, contents)
    return folder / "index.html"


def render(template: str, view: dict[str, Any]) -> str:
    """Render a template; HTML is escaped by jinja, Markdown by `md`. No control character reaches
    either."""
    import jinja2

    # not what is markup already
    env = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=template.startswith("index.html"),
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
        finalize=lambda value: printable(value) if type(value) is str else value,
    )
    env.filters.update(md=md, fence=fence, clean=figures.clean, shell=shell)
    return env.get_template(template).render(view).rstrip() + "\n"


def _view(results: dict[str, Any], drawings: list[Drawing]) -> dict[str, Any]:
    """What the templates show."""
    top = verdict.headline(results)
    return {
        "r": results,
        "title": figures.clean(results["title"] or results["name"]),
        "note": results["note"] and figures.clean(results["note"]),
        "margin": verdict.margin(results),
        "verdict": verdict.opening(results),
        "others": [
            verdict.sentence(results, a)
            for a in results["order"]
            if a not in (top, results["baseline"])
        ][:20],
        "more_arms": max(0, len(results["order"]) - 22),
        "rows_left_out": max(0, len(results["order"]) - tables.MOST_ROWS),
        "costs": _table(results, tables.costs(results)),
        "sizes": _table(results, tables.sizes()),
        "tasks": _table(results, continual.columns()),
        "cycle": _table(results, tables.cycle(results)),
        "paybacks": _paybacks(results),
        "settings": {
            "head": settings.HEAD,
            "rows": (switched := settings.table(results)),
            "note": settings.note(switched),
        },
        "drawings": drawings,
        "methodology": methodology.sections(results),
        "noise_floor": floor.sentence(results),
        "assumed_grid": any(
            g.get("assumed") for g in results["carbon_intensity"] if isinstance(g, dict)
        ),
        "formatting": formatting,
        "exports": exports.NAMES,
        "css": (TEMPLATES / "style.css").read_text(encoding="utf-8"),
    }


def _table(results: dict[str, Any], columns: list[tables.Column]) -> dict[str, Any]:
    columns = tables.used(results, columns)
    return {"columns": columns, "rows": tables.cells(results, columns)}


def _paybacks(results: dict[str, Any]) -> list[str]:
    out = []
    for a in results["order"][: tables.MOST_ROWS]:
        vs = results["arms"][a]["vs_baseline"]
        if not vs:
            continue
        p, base = vs["payback"], str(results["baseline"])
        text = formatting.payback(p["own"] if p else None, a, base)
        if p and p["own"]["verdict"] != "not shown" and (charged := verdict.builds_on(results, a)):
            with_reuse = formatting.payback(p["with_reuse"], a, base)
            also = f" Including {charged}"
            text += (
                f"{also} changes nothing in this."
                if with_reuse == text
                else f"{also}: {with_reuse}"
            )
        out.append(text)
    return out


def to_csv(results: dict[str, Any]) -> str:
    """Return one row an arm: plain numbers, the unit in each column's name. Text never becomes a
    formula."""
    metric = results["metric"]
    columns = [
        *tables.costs(results),
        *tables.sizes(),
        *continual.columns(),
        *tables.cycle(results),
    ]
    readings = (
        "train_energy_with_reuse_j",
        "train_energy_j",
        "total_energy_j",
        "carbon_g",
        "inference_energy_j",
    )
    head = [
        "arm",
        "status",
        "seeds",
        f"{metric}_std",
        *dict.fromkeys(c.key for c in columns if c.key not in readings),
    ]
    head += [k + end for k in readings for end in ("", "_low", "_high", "_provenance")]
    by_key = {c.key: c for c in columns}
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow([_cell(h) for h in head])
    for a in results["order"]:
        row = results["arms"][a]
        values: list[Any] = [a, row["status"], len(row["seeds"]), row[metric]["std"]]
        values += [by_key[k].number(row) for k in head[4:] if k in by_key and k not in readings]
        values += [row[k][p] for k in readings for p in ("value", "low", "high", "provenance")]
        writer.writerow([_cell(v) for v in values])
    return buffer.getvalue()


def _cell(value: Any) -> Any:
    """Return a CSV cell; text that a spreadsheet would run gets a leading apostrophe."""
    if value is None:
        return ""
    if not isinstance(value, str):
        return repr(value)
    value = figures.clean(value)
    return "'" + value if value.lstrip().startswith(FORMULA) or value.startswith(FORMULA) else value
