"""What a paper needs of a report: a LaTeX table, a paragraph on methods, citations, and what
reviewers ask first."""

from __future__ import annotations

import datetime
import re
import unicodedata
from collections.abc import Callable

from greenvis.meters.pricing import JOULES_PER_KWH
from greenvis.report import brief_table, comparison, figures, formatting, measures, verdict
from greenvis.report.blocks import ArmTable, Cell
from greenvis.report.estimates import Estimate, Free
from greenvis.report.formatting import MISSING, si
from greenvis.report.shape import Results

MOST_NAMED = 4  # machines, sources, grids that a sentence names
TEX = {
    "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
    **{c: "\\" + c for c in "&%$#_{}"}, "<": "$<$", ">": "$>$", "|": "$|$",
    "●": r"$\bullet$", "○": r"$\circ$", "▽": r"$\nabla$", "×": r"$\times$", "÷": r"$\div$",
    "±": r"$\pm$", "−": "$-$", "–": "--", "—": "---", "Δ": r"$\Delta$", "µ": r"$\mu$", "₂": "$_2$",
    "·": r"$\cdot$", "…": r"\dots{}", "“": "``", "”": "''", "’": "'", "\u00a0": "~",
}  # fmt: skip
ACCENTS = {"\u0300": "`", "\u0301": "'", "\u0302": "^", "\u0303": "~", "\u0308": '"'}


def tex(text: str) -> str:
    """Return text as pdflatex sets it; a letter that it has no sign for as its plain one."""
    return "".join(_tex(c) for c in figures.clean(text))


def _tex(c: str) -> str:
    if c in TEX:
        return TEX[c]
    if c.isascii():
        return c
    letters = unicodedata.normalize("NFD", c)
    if len(letters) == 2 and letters[0].isascii() and letters[1] in ACCENTS:
        return rf"{{\{ACCENTS[letters[1]]}{letters[0]}}}"
    plain = unicodedata.normalize("NFKD", c).encode("ascii", "ignore").decode()
    return "".join(TEX.get(p, p) for p in plain) or "?"


def table(results: Results) -> str:
    """Return the table of arms as LaTeX, with its caption and a label."""
    t: ArmTable = brief_table.table(results)
    head = " & ".join(tex(title) for title in ("Arm", *t.titles))
    rows = [" & ".join([tex(row.arm), *map(_cell, row.cells)]) for row in t.rows]
    key = re.sub(r"[^A-Za-z0-9]+", "-", results.name).strip("-")[:40] or "report"
    caption = f"{results.title or results.name}. {t.note}"
    lines = [
        r"% \usepackage{booktabs,graphicx}",
        r"\begin{table}[t]",
        r"\centering",
        rf"\caption{{{tex(caption)}}}",
        rf"\label{{tab:{key}}}",
        r"\resizebox{\ifdim\width>\linewidth\linewidth\else\width\fi}{!}{%",
        rf"\begin{{tabular}}{{l{'r' * len(t.titles)}}}",
        r"\toprule",
        rf"{head} \\",
        r"\midrule",
        *(rf"{row} \\" for row in rows),
        r"\bottomrule",
        r"\end{tabular}}",
        r"\end{table}",
    ]
    return "\n".join(lines) + "\n"


def _cell(cell: Cell) -> str:
    text = tex(f"{cell.mark} {cell.text}" if cell.mark else cell.text)
    return rf"\textbf{{{text}}}" if cell.shown else text


def bibtex(results: Results) -> str:
    """Return BibTeX entries for the report and for greenvis."""
    year = datetime.datetime.fromtimestamp(results.newest_run_s, datetime.UTC).year
    key = re.sub(r"[^A-Za-z0-9]+", "-", results.name).strip("-")[:40] or "report"
    total = results.totals.energy_j.value
    spent = f"{si(total, 'J')} in all" if total is not None else "energy unknown"
    name = tex(measures.written(results.measure))
    return (
        f"@misc{{greenvis-{key},\n  title = {{{tex(results.name)}: energy and {name} of "
        f"{len(results.order)} arms}},\n"
        f"  year = {{{year}}},\n  howpublished = {{greenvis report}},\n  note = "
        f"{{{tex(spent)}}},\n}}\n"
        f"\n@software{{greenvis,\n  title = {{greenvis: cheaper training, adaptation and inference "
        f"of vision models, with the energy proved}},\n  author = {{{{greenvis contributors}}}},\n"
        f"  version = {{{tex(_version(results))}}},\n  year = {{{year}}},\n}}\n"
    )


def methods(results: Results) -> str:
    """Return a paragraph on how energy was measured and what intervals are, to paste."""
    n = sorted({len(row.seeds) for row in results.arms.values() if row.seeds})
    seeds = f"{n[0]}" if len(n) == 1 else f"{n[0]} to {n[-1]}" if n else "no finished"
    drew = "seed that draws" if seeds == "1" else "seeds that draw"
    text = [
        f"Energy was measured with greenvis {_version(results)} on {hardware(results)}.",
        f"{metering(results)}.",
        f"Carbon: {region(results)}.",
        f"Each arm was trained with {seeds} {drew} the training "
        "images and the first weights; figures are means over seeds.",
    ]
    if results.comparisons:
        lost, name = verdict.margin(results), measures.written(results.measure)
        rule = (
            f"the whole interval lies within {lost} of the baseline's" if lost else "it lies at 0"
        )
        text.append(
            f"Arms are compared with {results.baseline} by simultaneous 95 % intervals (Dunnett's, "
            f"the variance pooled over the arms); an arm keeps the {name} where {rule}."
        )
    if tested := comparison.tested(results):
        text.append(f"The smallest test has {tested}.")
    if any(row.uses for row in results.arms.values()):
        text.append("Energy includes that of the bases and teachers an arm builds on.")
    if unknown := sorted({name for row in results.arms.values() for name in row.unknown}):
        text.append(f"Not included, for its cost is not known: {', '.join(unknown[:MOST_NAMED])}.")
    text.append(f"All runs together took {energy(results)} and {carbon(results)}.")
    return " ".join(text)


def reviewers(results: Results) -> list[tuple[str, str]]:
    """Return what reviewers ask first, and the answers."""
    return [
        ("Energy of all runs", energy(results)),
        ("CO₂e of all runs", carbon(results)),
        ("Hardware", hardware(results)),
        ("Region", region(results)),
        ("How measured", metering(results)),
    ]


def energy(results: Results) -> str:
    """Return the energy of all runs in kWh, with its band."""
    total = results.totals.energy_j
    if total.value is None:
        return "an unknown energy"
    text = f"{_kwh(total.value)} kWh{_band(total, _kwh)}"
    return f"{text}, {total.provenance}" if total.provenance else text


def carbon(results: Results) -> str:
    """Return the carbon of all runs, with its band."""
    total = results.totals.carbon_g
    if total.value is None:
        return "an unknown carbon"
    return f"{formatting.reading(total, 'g')} CO₂e{_band(total, lambda grams: si(grams, 'g'))}"


def _band(total: Estimate, written: Callable[[float], str]) -> str:
    if total.low is None or total.high is None or total.low == total.high:
        return ""
    return f" ({written(total.low)} to {written(total.high)})"


def hardware(results: Results) -> str:
    """Return the processors and GPUs of the records."""
    env = results.environment
    names = [_machine(value) for value in (*env.cpu, *env.gpu)]
    known = list(dict.fromkeys(n for n in names if n))[:MOST_NAMED]
    return " and ".join(known) or "an unknown machine"


def _machine(value: object) -> str:
    if not isinstance(value, dict):
        return str(value)
    name = str(value.get("name") or value.get("model") or "")
    cores = value.get("allowed") or value.get("logical")
    if name and isinstance(cores, int):
        name += f" ({cores} logical CPU{'s' if cores > 1 else ''}"
        name += ", virtual machine)" if value.get("virtual") else ")"
    return name


def region(results: Results) -> str:
    """Return the grids that grams were priced with."""
    texts = [_grid(g) for g in results.carbon_intensity[:MOST_NAMED] if g.get("value") is not None]
    pue = ", ".join(f"{p:g}" for p in results.pue) or "1"
    return f"{'; '.join(texts)}; PUE {pue}" if texts else "no carbon intensity is known"


def _grid(g: Free) -> str:
    text = f"{g.get('zone', '?')}, {g['value']:g} g CO₂e per kWh"
    if g.get("low") is not None and g.get("high") is not None:
        text += f" ({g['low']:g} to {g['high']:g})"
    year = f", {g['year']}" if g.get("year") else ""
    assumed = ", assumed: no region was given" if g.get("assumed") else ""
    return f"{text}{year}{assumed}"


def metering(results: Results) -> str:
    """Return how each part of the machine was metered."""
    parts = list(dict.fromkeys(_source(s) for s in results.sources))[:MOST_NAMED]
    return "; ".join(p for p in parts if p) or "No source of energy was recorded"


def _source(s: Free) -> str:
    name, source = str(s.get("name") or "?").upper(), str(s.get("source") or "none")
    k, known = s.get("coefficient") or {}, s.get("provenance") or "not observed"
    text = f"{name}: {source}, {known}"
    if s.get("provenance") != "measured" and "central" in k:
        low, high = k.get("low", k["central"]), k.get("high", k["central"])
        text += f" at {k['central']:g} {k.get('unit', '')}".rstrip() + f" ({low:g} to {high:g})"
    return text


def _kwh(joules: float) -> str:
    return formatting.figures(joules / JOULES_PER_KWH, 2)


def _version(results: Results) -> str:
    known = [str(v["greenvis"]) for v in results.environment.versions if v.get("greenvis")]
    return ", ".join(dict.fromkeys(known)) or MISSING
