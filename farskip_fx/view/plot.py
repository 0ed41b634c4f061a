"""Two plots as SVG, for pages and documents: lines over an axis in powers of two, and bars side by side.

Contract: numbers and names in, one <svg> out, readable on light and dark; names are text, so everything is escaped. No script,
no font and no style from outside.
"""
from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

from .text import plain

_WIDTH, _HEIGHT, _LEFT, _TOP, _RIGHT, _BOTTOM = 680, 300, 64, 44, 150, 44
_STYLE = """
svg { color: #1b1f24; --c0: #6b7280; --c1: #1a7f5a; --c2: #b5651d; --c3: #7a5195; --c4: #0b62c4; --c5: #b3261e }
@media (prefers-color-scheme: dark) { svg { color: #e8eaed; --c0: #9aa0a6; --c1: #5bc79a; --c2: #e0a060; --c3: #c39be0;
 --c4: #7ab7ff; --c5: #ff8a80 } }
text { font: 12px system-ui, sans-serif; fill: currentColor } .title { font-size: 14px } .axis { stroke: currentColor }
.grid { stroke: currentColor; stroke-opacity: .15 }
"""
COLOURS = 6


def lines(title: str, x_name: str, y_name: str, series: Mapping[str, Mapping[float, float]]) -> str:
    """A line for each of ``series``, {x: y}; x > 0, its axis in powers of two; y from zero."""
    at = sorted({x for line in series.values() for x in line})
    first, last = math.log2(at[0]), math.log2(at[-1])
    scale = _Scale(max(y for line in series.values() for y in line.values()))

    def x_of(x: float) -> float:
        return _LEFT + (math.log2(x) - first) / ((last - first) or 1.0) * (_WIDTH - _LEFT - _RIGHT)

    parts = [*scale.drawn(y_name), *(text(x_of(x), scale.of(0) + 18, f"{x:g}", anchor="middle") for x in at),
             text((_LEFT + _WIDTH - _RIGHT) / 2, _HEIGHT - 6, x_name, anchor="middle")]
    for number, (name, line) in enumerate(series.items()):
        points = [(x_of(x), scale.of(y)) for x, y in sorted(line.items())]
        colour = f"var(--c{number % COLOURS})"
        parts.append(f'<polyline points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in points)}" fill="none" stroke="{colour}" '
                     'stroke-width="2"/>')
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"><title>{safe(f"{name}: {value:.4g}")}</title></circle>'
                  for (x, y), (_, value) in zip(points, sorted(line.items()))]
    return _svg(title, [*parts, *_legend(series)])


def bars(title: str, y_name: str, groups: Sequence[str], series: Mapping[str, Sequence[float]]) -> str:
    """A bar of each of ``series`` for each group, side by side; from zero."""
    scale = _Scale(max((y for line in series.values() for y in line), default=0.0))
    step = (_WIDTH - _LEFT - _RIGHT) / max(len(groups), 1)
    width, parts = 0.8 * step / max(len(series), 1), scale.drawn(y_name)
    for place, group in enumerate(groups):
        left = _LEFT + (place + 0.1) * step
        parts.append(text(left + 0.4 * step, scale.of(0) + 18, group, anchor="middle"))
        for number, (name, values) in enumerate(series.items()):
            top = scale.of(values[place])
            parts.append(f'<rect x="{left + number * width:.1f}" y="{top:.1f}" width="{0.92 * width:.1f}" '
                         f'height="{scale.of(0) - top:.1f}" fill="var(--c{number % COLOURS})">'
                         f'<title>{safe(f"{group}, {name}: {values[place]:.4g}")}</title></rect>')
    return _svg(title, [*parts, *_legend(series)])


class _Scale:
    """The axis of values: from zero to a round number at or above ``most``, four or five steps."""

    def __init__(self, most: float) -> None:
        unit = 10 ** math.floor(math.log10(most or 1.0))
        self.step = next(s * unit for s in (0.2, 0.25, 0.5, 1.0, 2.0) if 5 * s * unit >= most)
        self.steps = max(1, math.ceil(round(most / self.step, 6)))

    def of(self, value: float) -> float:
        return _HEIGHT - _BOTTOM - (_HEIGHT - _TOP - _BOTTOM) * value / (self.step * self.steps)

    def drawn(self, name: str) -> list[str]:
        parts = [text(_LEFT - 8, _TOP - 10, name, anchor="start")]
        for number in range(self.steps + 1):
            y = self.of(number * self.step)
            parts += [f'<line class="{"grid" if number else "axis"}" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>',
                      text(_LEFT - 8, y + 4, f"{number * self.step:g}", anchor="end")]
        return parts


def _legend(names: Mapping[str, object]) -> list[str]:
    return [part for number, name in enumerate(names) for part in (
        f'<rect x="{_WIDTH - _RIGHT + 16}" y="{_TOP + 20 * number}" width="11" height="11" fill="var(--c{number % COLOURS})"/>',
        text(_WIDTH - _RIGHT + 33, _TOP + 10 + 20 * number, name, anchor="start"))]


def _svg(title: str, parts: Sequence[str]) -> str:
    body = "\n".join([f'<text class="title" x="{_LEFT - 8}" y="20">{safe(title)}</text>', *parts])
    return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{safe(title)}">\n'
            f"<style>{_STYLE}</style>\n{body}\n</svg>\n")


def text(x: float, y: float, words: str, kind: str = "plain", *, anchor: str = "start") -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{safe(words)}</text>'


def safe(words: str) -> str:
    """For text and attributes of XML."""
    return escape(plain(words), quote=True)
