"""Charts as inline SVG whose colours follow the page's theme: a line chart and bars of shares.

No library, no script.
"""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from itertools import pairwise

Points = Sequence[tuple[float, float]]
WIDTH, HEIGHT = 760, 250
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 22, 32
MAX_POINTS = 400
MAX_CURVES = 4
MAX_BARS = 64


def line_chart(curves: Mapping[str, Points], *, x_name: str, y_name: str) -> str:
    """Curves over one pair of axes.

    Points that are not finite are left out, long curves are averaged in bins.
    """
    finite = {name: [p for p in points if all(map(math.isfinite, p))] for name, points in curves.items()}
    drawn = {name: _binned(points) for name, points in finite.items() if len(points) > 1}
    drawn = dict(list(drawn.items())[:MAX_CURVES])
    if not drawn:
        return ""
    every = [p for points in drawn.values() for p in points]
    x_ticks = _ticks(min(x for x, _ in every), max(x for x, _ in every))
    y_ticks = _ticks(min(y for _, y in every), max(y for _, y in every))
    x_of = _scale(min(x for x, _ in every), max(x for x, _ in every), LEFT, WIDTH - RIGHT)
    y_of = _scale(*_reach(y_ticks, [y for _, y in every]), HEIGHT - BOTTOM, TOP)
    parts = []
    for tick in y_ticks:
        y = y_of(tick)
        parts.append(f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{_tick(tick)}</text>')
    for tick in x_ticks:
        parts.append(
            f'<text x="{x_of(tick):.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{_tick(tick)}</text>'
        )
    for i, (name, points) in enumerate(drawn.items()):
        path = " ".join(f"{x_of(x):.1f},{y_of(y):.1f}" for x, y in points)
        parts.append(f'<polyline class="c{i}" points="{path}"/>')
        parts.append(f'<text class="c{i}" x="{LEFT + 4 + 150 * i}" y="12">{html.escape(name[:24])}</text>')
    parts.append(f'<text x="{WIDTH - RIGHT}" y="{HEIGHT - 3}" text-anchor="end">{html.escape(x_name)}</text>')
    label = html.escape(f"{y_name} over {x_name}: {', '.join(drawn)}")
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">{"".join(parts)}</svg>'


def share_bars(rows: Sequence[tuple[str, int, int]]) -> str:
    """One bar per (name, hits, n), the lowest shares first when there are more than fit."""
    rows = [row for row in rows if row[2] > 0]
    shown = rows if len(rows) <= MAX_BARS else sorted(rows, key=lambda r: r[1] / r[2])[:MAX_BARS]
    if not shown:
        return ""
    line, left, right = 20, 120, 90
    span = WIDTH - left - right
    parts = []
    for i, (name, hits, n) in enumerate(shown):
        y = i * line
        parts.append(f'<text x="{left - 8}" y="{y + 14}" text-anchor="end">{html.escape(name[:18])}</text>')
        parts.append(f'<rect class="track" x="{left}" y="{y + 5}" width="{span}" height="10" rx="3"/>')
        wide = f"{span * hits / n:.1f}"
        parts.append(f'<rect class="bar" x="{left}" y="{y + 5}" width="{wide}" height="10" rx="3"/>')
        parts.append(f'<text x="{left + span + 8}" y="{y + 14}">{hits / n:.0%} of {n}</text>')
    more = "" if len(shown) == len(rows) else f"<p>The {MAX_BARS} lowest of {len(rows)} classes.</p>"
    height = line * len(shown)
    label = "share of samples in which the classifier sees the class asked for"
    return f'{more}<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{label}">{"".join(parts)}</svg>'


def _binned(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most MAX_POINTS points: means of runs of neighbours, in order of x."""
    points = sorted(points)
    if len(points) <= MAX_POINTS:
        return points
    edges = [i * len(points) // MAX_POINTS for i in range(MAX_POINTS + 1)]
    bins = [points[a:b] for a, b in pairwise(edges)]
    return [(sum(x for x, _ in b) / len(b), sum(y for _, y in b) / len(b)) for b in bins]


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers inside [low, high], four to eight of them."""
    # A range below the normal numbers has no round ones in it.
    span = next(s for s in (high - low, abs(high), 1.0) if s > 1e-300)
    step = 10.0 ** math.floor(math.log10(span / 5))
    step *= next(f for f in (1, 2, 5, 10) if span / (step * f) <= 7)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [i * step for i in range(first, last + 1)]


def _reach(ticks: Sequence[float], values: Sequence[float]) -> tuple[float, float]:
    return min([*ticks, *values]), max([*ticks, *values])


class _scale:
    """Maps [low, high] to [start, stop]; a single value maps to the middle."""

    def __init__(self, low: float, high: float, start: float, stop: float) -> None:
        self.low, self.span, self.start, self.stop = low, high - low, start, stop

    def __call__(self, value: float) -> float:
        part = (value - self.low) / self.span if self.span else 0.5
        return self.start + part * (self.stop - self.start)


def _tick(value: float) -> str:
    if abs(value) >= 1e6:
        return f"{value / 1e6:.4g} M"
    return f"{value / 1e3:.4g} k" if abs(value) >= 1e4 else f"{value:.4g}"
