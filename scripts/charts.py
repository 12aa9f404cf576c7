"""Charts as inline SVG: no script, nothing to load, colours by the classes of the page (see `STYLE`).

A chart is drawn 360 units wide, the width of a phone, so that its text can be read there; wider pages show several
beside each other.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape

Point = tuple[float, float | None]
"""x and y; no y breaks the line."""

STYLE = """\
svg { display: block; width: 100%; height: auto; overflow: visible }
svg text { font: 11px system-ui, sans-serif; fill: var(--soft); font-variant-numeric: tabular-nums }
svg .grid { stroke: var(--line); stroke-width: 1 }
svg .axis { stroke: var(--soft); stroke-width: 1 }
svg .curve { fill: none; stroke-width: 1.75; stroke-linejoin: round; stroke-linecap: round }
.c0 { stroke: var(--c0); fill: var(--c0) } .c1 { stroke: var(--c1); fill: var(--c1) }
.c2 { stroke: var(--c2); fill: var(--c2) } .c3 { stroke: var(--c3); fill: var(--c3) }
.c4 { stroke: var(--c4); fill: var(--c4) } .c5 { stroke: var(--c5); fill: var(--c5) }
.c6 { stroke: var(--c6); fill: var(--c6) } .c7 { stroke: var(--c7); fill: var(--c7) }
rect[class] { stroke: none }
"""

_WIDTH, _HEIGHT = 360.0, 190.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 44.0, 352.0, 10.0, 166.0
_MOST_POINTS = 600  # of a curve; there are fewer places to draw them


@dataclass(frozen=True)
class Curve:
    """A series of a chart."""

    name: str
    points: Sequence[Point]
    dots: bool = False
    """Few points, each worth to be seen."""


def line_chart(title: str, curves: Sequence[Curve], *, from_zero: bool = False) -> str:
    """A figure with the curves over one axis, and a legend where there are several; empty where there is nothing to draw.

    Args:
        title: says what is drawn, with its unit.
        curves: x are steps.
        from_zero: start the axis at zero, for sizes and speeds.
    """
    curves = [curve for curve in curves if any(y is not None for _, y in curve.points)]
    if not curves:
        return ""
    xs = [x for curve in curves for x, y in curve.points if y is not None]
    ys = [y for curve in curves for _, y in curve.points if y is not None]
    low, high = min(ys), max(ys)
    if from_zero:
        low = min(0.0, low)
    ticks = nice_ticks(low, high, 5)
    low, high = min(low, ticks[0]), max(high, ticks[-1])
    first, last = min(xs), max(xs)

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - first) / (last - first) if last > first else 0.5
        up = (y - low) / (high - low)
        return _LEFT + across * (_RIGHT - _LEFT), _BOTTOM - up * (_BOTTOM - _TOP)

    parts = []
    for tick in ticks:
        _, y = place(first, tick)
        parts.append(f'<path class="grid" d="M{_LEFT} {y:.1f}H{_RIGHT}"/>')
        parts.append(
            f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{short(tick)}</text>'
        )
    parts.append(f'<path class="axis" d="M{_LEFT} {_BOTTOM}H{_RIGHT}"/>')
    for tick in nice_ticks(first, last, 5) if last > first else [first]:
        if first <= tick <= last and tick == int(tick):
            x, _ = place(tick, low)
            parts.append(
                f'<text x="{x:.1f}" y="{_BOTTOM + 15}" text-anchor="middle">{short(tick)}</text>'
            )
    for number, curve in enumerate(curves):
        for run in _runs(curve.points):
            spots = [place(x, y) for x, y in thin(run, _MOST_POINTS)]
            path = " ".join(f"{x:.1f},{y:.1f}" for x, y in spots)
            if len(spots) > 1:
                parts.append(f'<polyline class="curve c{number}" points="{path}"/>')
            if curve.dots or len(spots) == 1:
                for (x, y), (step, value) in zip(spots, thin(run, _MOST_POINTS), strict=True):
                    parts.append(
                        f'<circle class="c{number}" cx="{x:.1f}" cy="{y:.1f}" r="3">'
                        f"<title>step {short(step)}: {value:.5g}</title></circle>"
                    )
    drawing = (
        f'<svg viewBox="0 0 {_WIDTH:g} {_HEIGHT:g}" role="img" aria-label="{escape(title)}">'
        f"{''.join(parts)}</svg>"
    )
    return _figure(title, legend([curve.name for curve in curves]), drawing)


def column_chart(title: str, columns: Sequence[tuple[str, float]]) -> str:
    """A figure with one column for each (label, value)."""
    most = max((value for _, value in columns), default=0) or 1
    width = min(48.0, (_RIGHT - 8) / max(len(columns), 1))
    parts = []
    for number, (label, value) in enumerate(columns):
        height = (_BOTTOM - _TOP - 14) * value / most
        x = 8 + number * width
        middle = x + width / 2
        parts.append(
            f'<rect class="c0" x="{x + 1:.1f}" y="{_BOTTOM - height:.1f}" width="{max(width - 2, 1):.1f}" '
            f'height="{height:.1f}"><title>{escape(label)}: {value:,g}</title></rect>'
            f'<text x="{middle:.1f}" y="{_BOTTOM - height - 4:.1f}" text-anchor="middle">{short(value)}</text>'
            f'<text x="{middle:.1f}" y="{_BOTTOM + 15}" text-anchor="middle">{escape(label)}</text>'
        )
    parts.append(f'<path class="axis" d="M8 {_BOTTOM}H{_RIGHT}"/>')
    return _figure(
        title,
        "",
        f'<svg viewBox="0 0 {_WIDTH:g} {_HEIGHT:g}" role="img" aria-label="{escape(title)}">{"".join(parts)}</svg>',
    )


def share_bar(title: str, shares: Sequence[tuple[str, float]]) -> str:
    """One bar as wide as the page, divided as the (name, value) of `shares` are, in their order."""
    total = sum(value for _, value in shares) or 1
    parts, x = [], 0.0
    for number, (name, value) in enumerate(shares):
        width = 1000 * value / total
        parts.append(
            f'<rect class="c{number % 8}" x="{x:.1f}" y="0" width="{max(width - 2, 0.5):.1f}" height="24">'
            f"<title>{escape(name)}: {100 * value / total:.1f} %</title></rect>"
        )
        x += width
    return (
        f'<svg class="bar" viewBox="0 0 1000 24" preserveAspectRatio="none" role="img" '
        f'aria-label="{escape(title)}">{"".join(parts)}</svg>'
    )


def legend(names: Sequence[str]) -> str:
    """The colours of the curves by name; nothing for one alone."""
    if len(names) < 2:
        return ""
    keys = "".join(
        f'<span><svg class="key" viewBox="0 0 10 10"><rect class="c{number}" width="10" height="10" rx="2"/></svg>'
        f"{escape(name)}</span>"
        for number, name in enumerate(names)
    )
    return f'<div class="legend">{keys}</div>'


def _figure(title: str, keys: str, drawing: str) -> str:
    return f"<figure><figcaption>{escape(title)}{keys}</figcaption>{drawing}</figure>"


def _runs(points: Sequence[Point]) -> Iterator[list[tuple[float, float]]]:
    """The stretches of a curve that have a y."""
    run: list[tuple[float, float]] = []
    for x, y in points:
        if y is not None:
            run.append((x, y))
        elif run:
            yield run
            run = []
    if run:
        yield run


def thin(points: Sequence[tuple[float, float]], most: int) -> list[tuple[float, float]]:
    """At most `most` of the points, in their order: of each stretch the lowest and the highest, so that no spike is lost."""
    if len(points) <= most:
        return list(points)
    size = math.ceil(2 * len(points) / most)
    kept = []
    for start in range(0, len(points), size):
        stretch = points[start : start + size]
        ends = {min(stretch, key=lambda point: point[1]), max(stretch, key=lambda point: point[1])}
        kept += sorted(ends)
    return kept


def nice_ticks(low: float, high: float, most: int) -> list[float]:
    """At least two and about `most` multiples of 1, 2 or 5 times a power of ten, from `low` or just below to `high` or just above."""
    if high - low <= 1e-9 * abs(low):  # all the same, but for rounding
        margin = abs(low) * 0.1 or 1.0
        low, high = low - margin, high + margin
    raw = (high - low) / most
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(number * step, 12) for number in range(first, last + 1)]


def short(value: float) -> str:
    """1234567 -> 1.23M, 0.00012 -> 1.2e-4."""
    size = abs(value)
    for factor, unit in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if size >= factor:
            factor = 1e3 if unit == "k" else factor
            return f"{value / factor:.3g}{unit}"
    if size and size < 1e-3:
        number, _, exponent = f"{value:.1e}".partition("e")
        return f"{number.removesuffix('.0')}e{int(exponent)}"
    return f"{value:.4g}"
