"""Charts as inline SVG: lines over a number, bars, a matrix. No library, no network.

Colours are CSS classes `series-0` … `series-7` of the page that holds them, so that one
picture serves dark and light; drawn alone (`standalone`), they bring a style along.
Every name is escaped.
"""

import math
from collections.abc import Mapping, Sequence
from html import escape

WIDTH, HEIGHT = 360, 220
LEFT, RIGHT, TOP, BOTTOM = 48, 20, 24, 34
COLOURS = 8  # of series; more begin again, dashed

Number = float | int
Points = Sequence[tuple[Number, Number]]

STYLE = """<style>
svg{font:11px system-ui,sans-serif;background:#fff;color:#222}
.chart text{fill:currentColor}.grid{stroke:#ccc}.axis{stroke:#888}
.chart path{fill:none;stroke-width:2}.dashed{stroke-dasharray:5 3}
.series-0{stroke:#0b62c4}.series-1{stroke:#c4500b}.series-2{stroke:#0a7d4b}
.series-3{stroke:#8c2bb8}.series-4{stroke:#a37a00}.series-5{stroke:#b0125b}
.series-6{stroke:#007d8a}.series-7{stroke:#555}
</style>"""


def ticks(low: Number, high: Number, count: int = 4) -> list[Number]:
    """Round numbers from at most `low` to at least `high`, in about `count` steps."""
    if not (math.isfinite(low) and math.isfinite(high)):
        return [0.0, 1.0]
    if high <= low:
        low, high = low - (abs(low) or 1.0) / 2, high + (abs(high) or 1.0) / 2
    rough = (high - low) / count
    size = 10 ** math.floor(math.log10(rough))
    step = next(size * m for m in (1, 2, 5, 10) if size * m >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, last + 1)]


def number(value: Number) -> str:
    """A short text of a number: 0.25, 1.2e-05, 12k."""
    if value and (abs(value) < 1e-3 or abs(value) >= 1e6):
        return f"{value:.1e}".replace("e-0", "e-").replace("e+0", "e")
    if abs(value) >= 10000:
        return f"{value / 1000:g}k"
    return f"{value:.4g}"


def _tick(value: Number, all_: Sequence[Number]) -> str:
    """The number of a tick, with the digits that tell it from its neighbours."""
    step, largest = all_[1] - all_[0], max(abs(all_[0]), abs(all_[-1]))
    if largest >= 1e4 or largest < 1e-3:
        return number(float(f"{value:.6g}")) if abs(value) > step / 2 else "0"
    return f"{value:.{max(0, -math.floor(math.log10(step) + 1e-9))}f}"


def series_class(i: int) -> str:
    """The CSS classes of the i-th series."""
    return f"series-{i % COLOURS}" + (" dashed" if i // COLOURS % 2 else "")


def lines(
    title: str,
    series: Mapping[str, Points],
    x_label: str = "step",
    y_label: str = "",
    numbers: Mapping[str, int] | None = None,
    marks: bool = False,
    standalone: bool = False,
) -> str:
    """Lines of (x, y); points that are not finite are gaps.

    numbers: {name: which colour}, the order of `series` where it is not given; marks:
    draw the points too; standalone: with styles and a legend, for a file of its own.
    """
    numbers = numbers or {name: i for i, name in enumerate(series)}
    good = [p for points in series.values() for p in points if _finite(p)]
    xs = ticks(
        min((x for x, _ in good), default=0), max((x for x, _ in good), default=1)
    )
    ys = ticks(
        min((y for _, y in good), default=0), max((y for _, y in good), default=1)
    )
    legend = list(series) if standalone else []
    height = HEIGHT + 16 * len(legend)
    x_of = lambda x: LEFT + (x - xs[0]) / (xs[-1] - xs[0]) * (WIDTH - LEFT - RIGHT)
    y_of = lambda y: (
        HEIGHT - BOTTOM - (y - ys[0]) / (ys[-1] - ys[0]) * (HEIGHT - TOP - BOTTOM)
    )
    parts = [_text(LEFT, 14, title, "start", 'font-weight="600"')]
    for y in ys:
        parts.append(_line(LEFT, y_of(y), WIDTH - RIGHT, y_of(y), "grid"))
        parts.append(_text(LEFT - 5, y_of(y) + 4, _tick(y, ys), "end"))
    for x in xs:
        parts.append(_text(x_of(x), HEIGHT - BOTTOM + 15, _tick(x, xs), "middle"))
    base = HEIGHT - BOTTOM
    parts.append(_line(LEFT, base, WIDTH - RIGHT, base, "axis"))
    words = " · ".join(word for word in (x_label, y_label) if word)
    parts.append(_text((LEFT + WIDTH) / 2, HEIGHT - 4, words, "middle"))
    for name, points in series.items():
        places = [(x_of(x), y_of(y)) if _finite((x, y)) else None for x, y in points]
        parts.append(_path(name, places, numbers[name], marks or len(places) == 1))
    for i, name in enumerate(legend):
        y = HEIGHT + 16 * i + 6
        parts.append(_line(LEFT, y, LEFT + 24, y, series_class(numbers[name])))
        parts.append(_text(LEFT + 30, y + 4, name, "start"))
    return _svg(title, parts, height, summary(series), standalone)


def summary(series: Mapping[str, Points]) -> str:
    """What a chart says, in words: where each line ends."""
    last = {
        name: next((y for _, y in reversed(points) if math.isfinite(y)), math.nan)
        for name, points in series.items()
    }
    return "; ".join(f"{name} ends at {number(y)}" for name, y in last.items())


def _finite(point: tuple[Number, Number]) -> bool:
    return all(math.isfinite(value) for value in point)


def _path(name: str, places, i: int, marks: bool) -> str:
    """A path with a gap at each None, and a name that a pointer shows."""
    words, pen = [], "M"
    for place in places:
        if place is None:
            pen = "M"
            continue
        words.append(f"{pen}{place[0]:.1f} {place[1]:.1f}")
        pen = "L"
    run = f'data-run="{escape(name, quote=True)}"'
    dots = "".join(
        f'<circle cx="{p[0]:.1f}" cy="{p[1]:.1f}" r="3" class="{series_class(i)}"/>'
        for p in places
        if p is not None and marks
    )
    path = f'<path class="{series_class(i)}" d="{" ".join(words)}"/>'
    return f"<g {run}><title>{escape(name)}</title>{path}{dots}</g>"


def _text(x: Number, y: Number, words: str, anchor: str, more: str = "") -> str:
    place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"'
    return f"<text {place} {more}>{escape(words)}</text>"


def _line(x: Number, y: Number, x2: Number, y2: Number, style: str) -> str:
    ends = f'x1="{x:.1f}" y1="{y:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"'
    return f'<line class="{style}" {ends}/>'


def _svg(title: str, parts, height: Number, words: str, standalone: bool) -> str:
    label = escape(f"{title}: {words}", quote=True)
    style = STYLE if standalone else ""
    size = f'viewBox="0 0 {WIDTH} {height:g}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" class="chart" {size} role="img"'
    return f'{head} aria-label="{label}">{style}{"".join(parts)}</svg>'
