"""The report's plots, each saved twice: as an SVG for the page, and as a PNG file.

In the SVG, colours are variables of the page's style sheet and text uses the page's font, so a plot follows the light
or dark theme of the page.
"""

from __future__ import annotations

import io
import itertools
import math
import re
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter
from matplotlib.transforms import Bbox

from distill.core import stop
from distill.reporting.tables import BY_KEY, Column, significant
from distill.reporting.tradeoff import Row, figure, pareto

INKS = {"ink": "#1d1f21", "muted": "#6c7076", "line": "#dcdad3", "accent": "#0f6b62", "paper": "#fdfdfb"}
"""The light theme's colours, as in page.css. In the SVG, they are replaced by ``var(--name)``."""
Series = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Plot:
    """One plot.

    Attributes:
        name: file name without suffix.
        title: for the heading and for screen readers.
        svg: an ``<svg>`` element without URLs.
        png: the same plot as the bytes of a PNG file.
        note: a caption, such as which models are missing and why; may be empty.
    """

    name: str
    title: str
    svg: str
    png: bytes
    note: str = ""


def pareto_plot(rows: Sequence[Row], cost: str, title: str, quality: str = "perplexity") -> Plot | None:
    """A plot of quality over cost with the Pareto front; None if fewer than two rows have both."""
    drawn = [row for row in rows if _finite(row, quality) is not None and _finite(row, cost) is not None]
    if len(drawn) < 2:
        return None
    front = pareto(drawn, quality, cost)
    x, y = BY_KEY[cost], BY_KEY[quality]
    left_out = [row for row in rows if row not in drawn]
    simulated = [row.name for row in left_out if row.lacks_speed and _finite(row, cost) is None]
    missing = [row.name for row in left_out if row.name not in simulated]
    notes = [f"{', '.join(simulated)}: simulated here, so without a speed."] if simulated else []
    notes += [f"{', '.join(missing)}: not measured."] if missing else []
    name = f"{quality}_against_{cost}"
    svg, png = render(name, (4.25, 3.15), lambda axes: _pareto(axes, drawn, front, x, y))
    return Plot(name, title, svg, png, " ".join(notes))


def curve_plot(name: str, title: str, train: Series, validation: Series) -> Plot | None:
    """A plot of one loss term over training tokens: training raw and smoothed in grey, validation in colour."""
    train, validation = ([(x, y) for x, y in s if math.isfinite(x) and math.isfinite(y)] for s in (train, validation))
    if len(train) < 2 and len(validation) < 2:
        return None
    svg, png = render(name, (3.0, 2.05), lambda axes: _curve(axes, train, validation))
    return Plot(name, title, svg, png)


def _finite(row: Row, key: str) -> float | None:
    value = figure(row, key)
    return value if value is not None and math.isfinite(value) and value > 0 else None


def render(
    name: str,
    size: tuple[float, float],
    draw: Callable[[Axes], object],
    title: str = "",
    note: str = "",
) -> tuple[str, bytes]:
    """Draw a plot and return it as (SVG text, PNG bytes), without changing pyplot's state.

    Title and note are drawn into the PNG only; the page shows them next to the SVG.
    """
    style: Any = {"svg.fonttype": "none", "svg.hashsalt": name, "font.size": 8.2, "axes.linewidth": 0.7}
    style["text.parse_math"] = False  # names come from recipes and paths, and a $ in one is no formula
    with matplotlib.rc_context(style):
        figure_ = Figure(figsize=size, layout="constrained", facecolor="none")
        axes = figure_.add_subplot()
        _frame(axes)
        draw(axes)
        svg = _save(figure_, "svg")
        stop.check()
        for text in axes.texts:  # in the SVG, the page's style sheet gives them the same halo
            text.set_path_effects([withStroke(linewidth=2, foreground=INKS["paper"])])
        if title or note:
            _caption(figure_, title, note)
        else:
            figure_.set_layout_engine(None)  # the positions are those of the SVG; finding them is half of the time
        figure_.set_facecolor(INKS["paper"])
        return _themed(svg.decode()), _save(figure_, "png")


def _caption(figure_: Figure, title: str, note: str) -> None:
    if title:
        figure_.suptitle(title, x=0.02, ha="left", fontsize=8.2, color=INKS["ink"])
    if note:
        width, height = figure_.get_size_inches()
        lines = textwrap.wrap(note, int(width * 21))
        figure_.set_size_inches(width, height + 0.12 * len(lines) + 0.2)  # the drawing itself keeps its room
        figure_.supxlabel("\n".join(lines), x=0.02, ha="left", fontsize=6.2, color=INKS["muted"])


def _save(figure_: Figure, form: str) -> bytes:
    buffer = io.BytesIO()
    figure_.savefig(buffer, format=form, dpi=220, metadata={"Date": None} if form == "svg" else None)
    return buffer.getvalue()


def _themed(svg: str) -> str:
    """Only the element: no prologue, metadata, addresses, size or font; colours become the page's variables."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.S)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*" height="[^"]*"', r"\1", svg.replace("\n", " "), count=1)
    svg = re.sub(r'(<svg[^>]*?)height="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?)width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg)
    svg = re.sub(r"font: (?:\w+ )*?([\d.]+px) [^;\"]*", r"font-size: \1", svg)
    svg = re.sub(r"font-family: [^;\"]*;? ?", "", svg)
    for name, ink in INKS.items():
        svg = svg.replace(ink, f"var(--{name})")
    return re.sub(r"\s{2,}", " ", svg).replace("<svg", '<svg aria-hidden="true"', 1)


SUPERSCRIPTS = str.maketrans("-0123456789", "\u207b\u2070\u00b9\u00b2\u00b3\u2074\u2075\u2076\u2077\u2078\u2079")


def log_scale(axes: Axes) -> None:
    """A logarithmic y axis labelled by powers of ten, or by numbers within one; matplotlib's labels are formulas."""

    def between(value: float, _: Any) -> str:
        low, high = axes.get_ylim()
        return f"{value:g}" if high < 10 * low else ""

    axes.set_yscale("log")
    power = FuncFormatter(lambda value, _: "10" + f"{math.log10(value):.0f}".translate(SUPERSCRIPTS))
    axes.yaxis.set_major_formatter(power)
    axes.yaxis.set_minor_formatter(FuncFormatter(between))


def _frame(axes: Axes) -> None:
    """A quiet frame: hairlines below and left, faint horizontals, muted labels."""
    axes.set_facecolor("none")
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(INKS["line"])
    axes.tick_params(which="both", color=INKS["line"], labelcolor=INKS["muted"], length=2.5, width=0.7, pad=3)
    axes.grid(axis="y", color=INKS["line"], linewidth=0.6, alpha=0.7)
    axes.set_axisbelow(True)
    axes.xaxis.label.set_color(INKS["muted"])
    axes.yaxis.label.set_color(INKS["muted"])


def _scale(axes: Axes, which: str, values: Sequence[float]) -> None:
    """Room on both sides; logarithmic when the values span more than a factor of four, with plain numbers as ticks."""
    low, high = min(values), max(values)
    axis = getattr(axes, f"{which}axis")
    if high > 4 * low > 0:
        margin = (high / low) ** 0.14
        getattr(axes, f"set_{which}scale")("log")
        getattr(axes, f"set_{which}lim")(low / margin, high * margin)
        decades = math.log10(high / low)
        axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if decades < 2 else (1.0,)))
        axis.set_minor_formatter(NullFormatter())
        axis.set_minor_locator(LogLocator(subs=()))
    else:
        margin = 0.16 * (high - low or abs(high) or 1)
        getattr(axes, f"set_{which}lim")(low - margin, high + margin)
        axis.set_major_locator(MaxNLocator(4))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))


def _pareto(axes: Axes, rows: Sequence[Row], front: set[str], x: Column, y: Column) -> None:
    points = {row.name: (getattr(row, x.key) * x.scale, getattr(row, y.key) * y.scale) for row in rows}
    _scale(axes, "x", [p[0] for p in points.values()])
    _scale(axes, "y", [p[1] for p in points.values()])
    axes.set_xlabel(x.header)
    axes.set_ylabel(y.header)
    for teacher in (row for row in rows if row.role == "teacher"):
        axes.plot(axes.get_xlim(), [points[teacher.name][1]] * 2, color=INKS["muted"], linewidth=0.9, dashes=(4, 3),
                  zorder=1)  # fmt: skip
    line = sorted(points[name] for name in front)
    axes.plot(*zip(*line, strict=True), color=INKS["accent"], linewidth=1.1, alpha=0.55, zorder=2)
    for row in rows:
        color = INKS["muted"] if row.role == "teacher" else INKS["accent"]
        fill = color if row.name in front else "none"
        shape = {"teacher": "s", "control": "D"}.get(row.role, "o")
        axes.scatter(*points[row.name], s=30, marker=shape, facecolor=fill, edgecolor=color, linewidth=1.2, zorder=3)
    where, side, word = (0.985, "right", "better \N{SOUTH EAST ARROW}") if x.higher_is_better else (
        0.02, "left", "\N{SOUTH WEST ARROW} better")  # fmt: skip
    axes.text(where, 0.02, word, transform=axes.transAxes, ha=side, va="bottom", color=INKS["muted"], fontsize=7.4)
    _label(axes, rows, points)


def _label(axes: Axes, rows: Sequence[Row], points: dict[str, tuple[float, float]]) -> None:
    """Names beside the points: each takes the nearest free place around its own, so that none covers another."""
    canvas = axes.figure.canvas
    canvas.draw()  # the layout has to be settled before anything can be measured
    room, scale = axes.get_window_extent(), axes.figure.dpi / 72
    places = {name: axes.transData.transform(point) for name, point in points.items()}
    taken = [Bbox.from_bounds(px - 4 * scale, py - 4 * scale, 8 * scale, 8 * scale) for px, py in places.values()]
    taken += [text.get_window_extent() for text in axes.texts]
    for line in axes.lines:  # a name across a line is hard to read
        ends = axes.transData.transform(line.get_xydata()) if line.get_transform() == axes.transData else ()
        for (ax, ay), (bx, by) in itertools.pairwise(ends):
            steps = max(1, int(math.hypot(bx - ax, by - ay) / (3 * scale)))
            spots = [(ax + (bx - ax) * i / steps, ay + (by - ay) * i / steps) for i in range(steps + 1)]
            taken += [Bbox.from_bounds(sx - scale, sy - scale, 2 * scale, 2 * scale) for sx, sy in spots]
    for row in sorted(rows, key=lambda row: -places[row.name][1]):
        text = axes.annotate(row.name, points[row.name], color=INKS["ink"], fontsize=7.8, textcoords="offset points",
                             xytext=(0, 0), va="center", zorder=4)  # fmt: skip
        width, height = text.get_window_extent().width * 1.04, text.get_window_extent().height
        px, py = places[row.name]
        best: tuple[float, float, float, str] | None = None
        for away in (7, 13, 20, 28):
            for dx, dy in (
                (1, 0),
                (-1, 0),
                (0.55, 0.9),
                (0.55, -0.9),
                (-0.55, 0.9),
                (-0.55, -0.9),
                (0, 1.25),
                (0, -1.25),
            ):
                align = "left" if dx > 0 else "right" if dx < 0 else "center"
                left = px + dx * away * scale - {"left": 0, "right": width, "center": width / 2}[align]
                box = Bbox.from_bounds(left, py + dy * away * scale - height / 2, width, height)
                inside = room.x0 <= box.x0 and box.x1 <= axes.figure.bbox.x1 and room.y0 <= box.y0 and box.y1 <= room.y1
                cost = sum(_overlap(box, other) for other in taken) + (0 if inside else 1e6) + 0.01 * away
                rivals = [_distance(box, place) for name, place in places.items() if name != row.name]
                cost += 50 * scale**2 if rivals and min(rivals) < 1.5 * _distance(box, places[row.name]) else 0
                if best is None or cost < best[0]:
                    best, chosen = (cost, dx * away, dy * away, align), box
        assert best is not None
        taken.append(chosen)
        text.set(position=best[1:3], ha=best[3])
        if math.hypot(*best[1:3]) > 14:
            axes.annotate("", points[row.name], xytext=best[1:3], textcoords="offset points", zorder=1,
                          arrowprops={"arrowstyle": "-", "color": INKS["line"], "linewidth": 0.8})  # fmt: skip


def _overlap(a: Any, b: Any) -> float:
    width, height = min(a.x1, b.x1) - max(a.x0, b.x0), min(a.y1, b.y1) - max(a.y0, b.y0)
    return width * height if width > 0 and height > 0 else 0.0


def _distance(box: Any, point: Any) -> float:
    return math.hypot(max(box.x0 - point[0], 0, point[0] - box.x1), max(box.y0 - point[1], 0, point[1] - box.y1))


def _curve(axes: Axes, train: Series, validation: Series) -> None:
    every = [x for series in (train, validation) for x, _ in series]
    unit, divisor = ("M", 1e6) if max(every) >= 1e6 else ("k", 1e3) if max(every) >= 1e3 else ("", 1)
    if train:
        thin = train[:: max(1, len(train) // 400)]
        axes.plot([x / divisor for x, _ in thin], [y for _, y in thin], color=INKS["muted"], linewidth=0.7, alpha=0.3)
        smooth = _smoothed(train)[:: max(1, len(train) // 400)]
        axes.plot([x / divisor for x, _ in smooth], [y for _, y in smooth], color=INKS["muted"], linewidth=1.2)
    if validation:
        axes.plot([x / divisor for x, _ in validation], [y for _, y in validation], color=INKS["accent"],
                  linewidth=1.5, marker="o", markersize=2.8 if len(validation) < 30 else 0)  # fmt: skip
        last = validation[-1]
        axes.annotate(significant(last[1]), (last[0] / divisor, last[1]), xytext=(-1, 6), textcoords="offset points",
                      ha="right", color=INKS["accent"], fontsize=7.8)  # fmt: skip
    axes.set_xlabel(f"training tokens [{unit}]" if unit else "training tokens")
    axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.yaxis.set_major_locator(MaxNLocator(4))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    _skip_the_fall(axes, train, validation)


def _skip_the_fall(axes: Axes, train: Series, validation: Series) -> None:
    """Let the first steep steps leave the plot at the top, or the rest would be a flat line at its bottom."""
    values = sorted(y for series in (train, validation) for _, y in series)
    low, high = values[0], values[-1]
    usual = values[int(0.97 * (len(values) - 1))]
    top = usual + 0.25 * (usual - low) if len(values) > 30 and high - low > 2 * (usual - low) > 0 else high
    margin = 0.06 * (top - low or abs(top) or 1)
    axes.set_ylim(low - margin, top + margin)


def _smoothed(series: Series) -> list[tuple[float, float]]:
    """Mean over about a twentieth of the curve around each point, which does not lag behind as a running mean does."""
    reach = max(1, len(series) // 40)
    sums = [0.0, *itertools.accumulate(y for _, y in series)]
    result = []
    for i, (x, _) in enumerate(series):
        first, last = max(0, i - reach), min(len(series), i + reach + 1)
        result.append((x, (sums[last] - sums[first]) / (last - first)))
    return result
