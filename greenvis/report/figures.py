"""Figures as SVG text: one theme, the same bytes for the same results, real text, described for
screen readers.

Files are drawn on white. On the page the theme's colours become CSS variables, so light and dark
are one drawing.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
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
COLOURS = tuple(light for light, _ in SERIES)
# of phases, which are no arms
PHASES = (
    ("#66758f", "#aab6c8"), ("#2f4a6b", "#8fb3d9"), ("#a3505f", "#e5a3b0"), ("#6d597a", "#b7a1c9"),
    ("#8a5a36", "#d4a373"), ("#5f7470", "#9fb5b0"), ("#8c7357", "#cdb49a"),
)  # fmt: skip
VARIABLES = {
    INK: "ink",
    MUTED: "muted",
    GRID: "line",
    GROUND: "card",
    **{s[0]: f"s{i}" for i, s in enumerate(SERIES)},
    **{p[0]: f"p{i}" for i, p in enumerate(PHASES)},
}
MARKERS, LINES = "osD^vPX*", ("-", "--", "-.", ":")
STAGES = ("setup", "train", "teacher", "eval", "calibrate", "measure", "other")
MOST_LINES = 6  # more lines than this are told apart by nobody
MOST_ARMS = 12  # more bars or curves than this cannot be read

_PDF: ContextVar[bool] = ContextVar("pdf", default=False)
_RC: dict[Any, Any] = {
    "pdf.fonttype": 42,
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
    pdf: bytes | None = None  # where it was asked for, see `with_pdf`

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
    return Drawing(name, title, desc, caption, printable(text), _pdf(figure))


@contextmanager
def with_pdf(wanted: bool) -> Iterator[None]:
    """Draw figures as PDF as well within, with their fonts embedded, as journals want them."""
    token = _PDF.set(wanted)
    try:
        yield
    finally:
        _PDF.reset(token)


def _pdf(figure: Figure) -> bytes | None:
    if not _PDF.get():
        return None
    import warnings

    from matplotlib.backends.backend_pdf import FigureCanvasPdf

    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        FigureCanvasPdf(figure).print_pdf(
            buffer, metadata={"CreationDate": None, "Creator": "greenvis", "Producer": None}
        )
    return buffer.getvalue()


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


@dataclass(frozen=True)
class Label:
    """A name beside what it names: its text, colour and point, in the units of the data."""

    text: str
    color: str
    x: float
    y: float


def label_ends(axes: Axes, labels: list[Label]) -> None:
    """Write names to the right of the axes, each as near to the end of its line as the others
    allow."""
    axes.autoscale_view()
    gap = 0.185 / _inches(axes)[1] * 1.35  # a line of text, of the axes' height
    ends = sorted(((_fraction(axes, entry)[1], entry) for entry in labels), key=lambda e: e[0])
    heights = [at for at, _ in ends]
    for i in range(1, len(heights)):
        heights[i] = max(heights[i], heights[i - 1] + gap)
    over = (heights[-1] if heights else 0.0) - 1.0
    for i in range(len(heights) - 1, -1, -1):
        top = 1.0 if i == len(heights) - 1 else heights[i + 1] - gap
        heights[i] = min(heights[i], top) if over > 0 else heights[i]
    for (at, entry), height in zip(ends, heights, strict=True):
        x, _ = _fraction(axes, entry)
        axes.annotate(
            entry.text, xy=(x, at), xycoords="axes fraction", xytext=(1.03, height),
            textcoords="axes fraction", color=entry.color, va="center", fontsize=10,
            arrowprops={"arrowstyle": "-", "color": entry.color, "lw": 0.6, "alpha": 0.6,
                        "shrinkA": 0, "shrinkB": 2},
        )  # fmt: skip


Span = tuple[float, float, float, float]


def label_points(axes: Axes, labels: list[Label], bars: Sequence[Span] = ()) -> None:
    """Write names beside their points, where they hide neither a point nor another name, and few
    bars.

    Args:
        axes: With the limits they will have.
        labels: The names.
        bars: From x, y to x, y, in the units of the data.
    """
    axes.autoscale_view()
    width, height = _inches(axes)
    one, line = 0.088 / (width * 0.82), 0.2 / (height * 0.78)  # of the axes: a letter, a line
    points = [_fraction(axes, entry) for entry in labels]
    taken: list[Span] = [(x - 0.015, y - 0.02, x + 0.015, y + 0.02) for x, y in points]
    for x0, y0, x1, y1 in bars:
        (a, b), (c, d) = (_fraction(axes, Label("", "", x, y)) for x, y in ((x0, y0), (x1, y1)))
        taken.append((a - 0.004, b - 0.006, c + 0.004, d + 0.006))
    for (x, y), entry in sorted(zip(points, labels, strict=True), key=lambda e: -e[0][1]):
        size = one * len(entry.text)
        tries = [
            (x + 0.025 if right else x - 0.025 - size, y + k * line * 0.75)
            for k in (0.6, -0.6, 0.0, 1.4, -1.4, 2.2, -2.2, 3.0, -3.0)
            for right in (True, False)
        ]

        def hidden(at: tuple[float, float], size: float = size) -> float:
            box = (at[0], at[1] - line / 2, at[0] + size, at[1] + line / 2)
            outside = max(0.0, -box[0]) + max(0.0, box[2] - 1.0) + max(0.0, -box[1])
            return sum(_overlap(box, other) for other in taken) + 2 * outside * line

        left, middle = min(tries, key=lambda at: round(hidden(at), 5))
        taken.append((left, middle - line / 2, left + size, middle + line / 2))
        axes.text(left, middle, entry.text, transform=axes.transAxes, color=entry.color,
                  ha="left", va="center", fontsize=10)  # fmt: skip


def _inches(axes: Axes) -> tuple[float, float]:
    """Return the size of the figure."""
    box, dpi = axes.figure.bbox, axes.figure.dpi
    return box.width / dpi, box.height / dpi


def _fraction(axes: Axes, entry: Label) -> tuple[float, float]:
    """Return where a point lies in the axes, each side from 0 to 1."""
    at = (axes.transScale + axes.transLimits).transform((entry.x, entry.y))
    return float(at[0]), float(at[1])


def _overlap(a: Span, b: Span) -> float:
    wide = min(a[2], b[2]) - max(a[0], b[0])
    high = min(a[3], b[3]) - max(a[1], b[1])
    return wide * high if wide > 0 and high > 0 else 0.0
