"""Figures as SVG text: one theme, the same bytes for the same results, real text, described for
screen readers.

Files are drawn on white. On the page the theme's colours become CSS variables, so light and dark
are one drawing.
"""

from __future__ import annotations

import io
import re
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

from greenvis.errors import printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# (on white, on dark): at least 3:1 against the ground for marks and 4.5:1 for text; told apart by
# marker and line as well
INK, MUTED, GRID, GROUND = "#1c2431", "#59636e", "#d5dae2", "#ffffff"
SERIES = (
    ("#5b6471", "#a8b3c2"), ("#0f766d", "#2dd4bf"), ("#b4530a", "#fbbf24"), ("#6d28d8", "#b79cff"),
    ("#be123d", "#fb7185"), ("#1d4ed7", "#7aa7ff"), ("#4d7c10", "#a3e635"), ("#a21caf", "#f0abfc"),
)  # fmt: skip
VARIABLES = {
    INK: "ink",
    MUTED: "muted",
    GRID: "line",
    GROUND: "card",
    **{s[0]: f"s{i}" for i, s in enumerate(SERIES)},
}
MARKERS, LINES = "osD^vPX*", ("-", "--", "-.", ":")
STAGES = {"setup": 3, "train": 1, "teacher": 2, "eval": 5, "calibrate": 6, "measure": 0, "other": 7}
MOST_ARMS = 12  # more bars or curves than this cannot be read

_RC: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "greenvis",
    "text.parse_math": False,
    "font.size": 11,
    "font.family": "DejaVu Sans",
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.labelsize": 11,
    "text.color": INK,
    "axes.grid": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "axes.axisbelow": True,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "legend.fontsize": 10,
    "figure.facecolor": GROUND,
    "axes.facecolor": GROUND,
    "savefig.facecolor": GROUND,
    "lines.linewidth": 1.8,
    "axes.unicode_minus": True,
    "path.simplify": False,
}


@dataclass(frozen=True)
class Drawing:
    """One figure: `name` is its file's, `svg` the file's text, `desc` all it shows, in words,
    `caption` how to read it."""

    name: str
    title: str
    desc: str
    caption: str
    svg: str

    @property
    def inline(self) -> str:
        """The SVG for the page: colours as CSS variables, ids of its own, no size but its
        aspect."""
        text = self.svg[self.svg.index("<svg") :]
        for colour, variable in VARIABLES.items():
            text = text.replace(colour, f"var(--{variable})")
        text = re.sub(r"'DejaVu Sans'(, [^;\"]*)?", "system-ui, sans-serif", text)
        text = re.sub(r'\bid="([^"]+)"', rf'id="{self.name}-\1"', text)
        text = re.sub(r'(xlink:href="#|url\(#)', rf"\g<1>{self.name}-", text)
        text = re.sub(
            r'aria-labelledby="t d"', f'aria-labelledby="{self.name}-t {self.name}-d"', text
        )
        return re.sub(
            r'(<svg[^>]*?) width="[^"]*pt"',
            r"\1",
            re.sub(r'(<svg[^>]*?) height="[^"]*pt"', r"\1", text, count=1),
            count=1,
        )


def canvas(
    width: float = 5.2, height: float = 3.7, columns: int = 1, rows: int = 1
) -> tuple[Figure, list[Axes]]:
    """Return a figure of that many inches in the theme, and its axes. Call inside `theme()`."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    return figure, list(axes.flat)


def theme() -> Any:
    """Return the context in which figures are drawn."""
    import logging

    import matplotlib

    logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)
    return matplotlib.rc_context(_RC)


def save(figure: Figure, name: str, title: str, desc: str, caption: str) -> Drawing:
    """Return the figure as SVG with its title and description (for who cannot see it) inside."""
    import warnings

    from matplotlib.backends.backend_svg import FigureCanvasSVG

    buffer = io.StringIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a glyph DejaVu lacks: the reader's browser has it
        FigureCanvasSVG(figure).print_svg(
            buffer, metadata={"Date": None, "Creator": "greenvis", "Format": None, "Type": None}
        )
    text = re.sub(r"\s*<metadata>.*?</metadata>", "", buffer.getvalue(), flags=re.S)
    text = re.sub(r"<!--.*?-->\s*", "", text, flags=re.S)
    head = (
        f'<title id="t">{escape(clean(title))}</title>\n <desc id="d">{escape(clean(desc))}</desc>'
    )
    text = re.sub(
        r"(<svg[^>]*)>",
        lambda m: f'{m[1]} role="img" aria-labelledby="t d">\n {head}',
        text,
        count=1,
    )
    return Drawing(name, title, desc, caption, printable(text))


def style(i: int) -> dict[str, Any]:
    """Return colour, marker and line of the i-th series; the baseline is 0."""
    # grey and circle are the baseline's alone
    turn, k = divmod(i - 1, len(SERIES) - 1) if i else (0, -1)
    return {
        "color": SERIES[k + 1][0],
        "marker": MARKERS[(k + turn) % (len(MARKERS) - 1) + 1] if i else MARKERS[0],
        "linestyle": LINES[turn % len(LINES)],
    }


def short(label: str, most: int = 22) -> str:
    """Return a label that fits a figure: start and end, for names of arms often differ in one of
    them."""
    label = clean(label)
    end = (most - 1) // 3
    return (
        label if len(label) <= most else label[: most - 1 - end] + "…" + label[len(label) - end :]
    )


def clean(text: str) -> str:
    """Return text without control characters, which neither XML nor HTML can hold."""
    return "".join(c if c.isprintable() else " " for c in str(text))


def unit_axis(axis: Any, unit: str) -> None:
    """Label the ticks of an axis with SI prefixes: "5 kJ"."""
    from matplotlib.ticker import FuncFormatter

    from greenvis.report.formatting import si

    axis.set_major_formatter(
        FuncFormatter(lambda v, _: re.sub(r"\.0(?= |$)", "", si(v, unit, 2)) if v else "0")
    )


def legend_below(figure: Figure, axes: Axes, columns: int = 2) -> None:
    """Put the legend under the figure, where it hides nothing."""
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        figure.legend(
            handles,
            labels,
            loc="outside lower center",
            ncols=min(columns, len(handles)),
            handlelength=2.2,
            columnspacing=1.2,
        )
