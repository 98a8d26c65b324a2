# SPDX-License-Identifier: Apache-2.0
"""Curves and bars as inline SVG: text in, text out; no script, no font, no file from elsewhere."""

import math
from collections.abc import Sequence
from html import escape

# For readers that do not apply a page's style to its pictures; others, and the dark, override them.
_COLOURS = ("#8fb3d9", "#c2410c")
_LINES, _WORDS = "#dfe3e8", "#5b6570"
Points = Sequence[tuple[float, float]]
_WIDTH, _HEIGHT = 640, 240
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 16, 30, 36


def nice_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers between two ends, about `count` of them, the ends' neighbours included."""
    if not math.isfinite(low) or not math.isfinite(high):
        return [0.0, 1.0]
    if high <= low:
        low, high = low - (abs(low) or 1) / 2, low + (abs(low) or 1) / 2
    raw = (high - low) / max(count - 1, 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * f for f in (1, 2, 2.5, 5, 10) if power * f >= raw * 0.999)
    first = math.floor(low / step + 1e-9)
    last = math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, last + 1)]


def line_chart(title: str, series: Sequence[tuple[str, Points]], *, x: str = "step") -> str:
    """Curves over a common axis.

    Args:
        title: above the chart, and what a screen reader says.
        series: (name, points); the first is drawn thin, as it is noisy, the others with dots.
        x: what the axis counts.
    """
    drawn = [(name, [p for p in points if math.isfinite(p[1])]) for name, points in series]
    drawn = [(name, points) for name, points in drawn if points]
    if not drawn:
        return ""
    every = [point for _, points in drawn for point in points]
    xs = nice_ticks(min(p[0] for p in every), max(p[0] for p in every), 6)
    ys = nice_ticks(min(p[1] for p in every), max(p[1] for p in every))
    body = [_axes(xs, ys, x)]
    for number, (name, points) in enumerate(drawn):
        placed = [(_across(px, xs), _down(py, ys)) for px, py in points]
        kind, colour = f"s{number}", _COLOURS[min(number, 1)]
        path = " ".join(f"{a:.1f},{b:.1f}" for a, b in placed)
        body.append(f'<polyline class="{kind}" fill="none" stroke="{colour}" points="{path}"/>')
        if number or len(points) < 3:
            body += [
                f'<circle class="{kind}" fill="{colour}" cx="{a:.1f}" cy="{b:.1f}" r="3"/>'
                for a, b in placed
            ]
        at = _LEFT + 8 + 150 * number
        body += [_box(kind, colour, at, 8, 12, 4), _label("legend", at + 18, 14, name)]
    return _svg(title, body)


def bar_chart(title: str, bars: Sequence[tuple[float, float]], *, x: str) -> str:
    """Counts by the upper end of their bins."""
    if not bars:
        return ""
    top = nice_ticks(0, max(count for _, count in bars))
    ends = [0.0, *(end for end, _ in bars)]
    body = [_axes(nice_ticks(0, ends[-1], 6), top, x)]
    scale = nice_ticks(0, ends[-1], 6)
    for low, (high, count) in zip(ends, bars, strict=False):
        a, b, y = _across(low, scale), _across(high, scale), _down(count, top)
        told = f"up to {high:g}: {count:g}"
        height = _down(0, top) - y
        body.append(_box("bar", _COLOURS[0], a + 0.5, y, max(b - a - 1, 1), height, told))
    return _svg(title, body)


def _across(value: float, ticks: list[float]) -> float:
    return _LEFT + (value - ticks[0]) / (ticks[-1] - ticks[0]) * (_WIDTH - _LEFT - _RIGHT)


def _down(value: float, ticks: list[float]) -> float:
    share = (value - ticks[0]) / (ticks[-1] - ticks[0])
    return _HEIGHT - _BOTTOM - share * (_HEIGHT - _TOP - _BOTTOM)


def _axes(xs: list[float], ys: list[float], x: str) -> str:
    right, floor = _WIDTH - _RIGHT, _HEIGHT - _BOTTOM
    parts = []
    for value in ys:
        at = _down(value, ys)
        parts.append(_rule("grid", _LINES, at))
        parts.append(_label("tick", _LEFT - 8, at + 4, _number(value), "end"))
    for value in xs:
        parts.append(_label("tick", _across(value, xs), floor + 16, _number(value), "middle"))
    parts.append(_rule("axis", _WORDS, floor))
    parts.append(_label("tick", right, _HEIGHT - 4, x, "end"))
    return "".join(parts)


def _rule(kind: str, colour: str, y: float) -> str:
    ends = f'x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"'
    return f'<line class="{kind}" stroke="{colour}" {ends}/>'


def _label(kind: str, x: float, y: float, text: str, anchor: str = "start") -> str:
    look = f'class="{kind}" fill="{_WORDS}" font-size="11" text-anchor="{anchor}"'
    return f'<text {look} x="{x:.1f}" y="{y:.1f}">{escape(text)}</text>'


def _box(
    kind: str, colour: str, x: float, y: float, width: float, height: float, told: str = ""
) -> str:
    place = f'x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}"'
    title = f"<title>{escape(told)}</title>" if told else ""
    return f'<rect class="{kind}" fill="{colour}" {place}>{title}</rect>'


def _number(value: float) -> str:
    return "0" if abs(value) < 1e-12 else f"{value:.3g}"


def _svg(title: str, body: list[str]) -> str:
    return (
        f'<figure><figcaption>{escape(title)}</figcaption><svg viewBox="0 0 {_WIDTH} {_HEIGHT}" '
        f'role="img" aria-label="{escape(title)}">{"".join(body)}</svg></figure>'
    )
