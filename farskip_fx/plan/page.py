"""A plan as one HTML page that needs no network and no script: tables, and the curves as SVG.

Names come from the user and are text: everything is escaped.
"""
from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from ..view.text import plain
from .planner import Plan, Point
from .show import ends_lines, label, memory_line

_STYLE = """
:root { color-scheme: light dark; --a: #888; --b: #1a7f5a; --c: #b5651d; --d: #7a5195; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; margin: .5rem 0 1.5rem; } td, th { padding: .2rem .7rem; text-align: right; }
th { border-bottom: 1px solid var(--a); } td:first-child, th:first-child { text-align: left; }
svg { width: 100%; height: auto; } text { font: 11px system-ui, sans-serif; fill: currentColor; } .note { color: var(--a); }
"""
_COLOURS = ("var(--a)", "var(--b)", "var(--c)", "var(--d)")
_WIDTH, _HEIGHT, _LEFT, _BOTTOM = 640, 260, 60, 40


def page(plan: Plan) -> str:
    what = "training step" if plan.training else "forward"
    title = f"{plain(plan.model)}: {what} on {plan.gpus} x {plan.device}"
    asked = plan.asked
    rows = [[label(v.name), f"{v.step_s * 1e3:,.1f} ms", f"{asked.variants[0].step_s / v.step_s:.2f}x",
             f"{v.exposed_s * 1e3:,.1f} ms", f"{plan.tokens * plan.gpus / v.step_s:,.0f}"] for v in asked.variants]
    parts = [
        f"<h1>{escape(title)}</h1>",
        f"<p>{plan.tokens} tokens a rank in sequences of {plan.context}; link {escape(plain(plan.link))}; table of devices "
        f"version {plan.table}. A prediction: nothing was run.</p>",
        f"<h2>ep {asked.ep} x dp {asked.dp}</h2>",
        _table(["connectivity", "step", "over standard", "exposed", "tokens/s in all"], rows),
        f"<p>{escape(memory_line(asked))}</p>",
        "<h2>Over the number of ranks that share the experts</h2>", _curve(plan.by_ep, [p.ep for p in plan.by_ep], "ep"),
        _points(plan.by_ep, plan.best),
        "<h2>Over the link</h2>", _curve(plan.by_link, [p.link_bytes / 1e9 for p in plan.by_link], "GB/s"),
        _points(plan.by_link),
        *(f"<p>{escape(plain(line))}</p>" for line in ends_lines(plan)),
        "<h2>What it does not know</h2><ul>", *(f"<li>{escape(line)}</li>" for line in plan.unknown), "</ul>"]
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    return (f'<!doctype html><html lang=en><meta charset=utf-8><meta http-equiv=Content-Security-Policy content="{policy}">'
            f"<title>{escape(title)}</title><style>{_STYLE}</style><body>{''.join(parts)}</body></html>\n")


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(h)}</th>" for h in headings)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><tr>{head}</tr>{body}</table>"


def _points(points: Sequence[Point], best: int | None = None) -> str:
    names = [label(v.name) for v in points[0].variants] if points else []
    return _table(["ep x dp", "link", *names, "gain", "GiB a rank"], [
        [f"{p.ep} x {p.dp}{' (best)' if p.ep == best else ''}", f"{p.link_bytes / 1e9:,.3g} GB/s",
         *(f"{v.step_s * 1e3:,.1f} ms" for v in p.variants), f"{p.gain:.2f}x",
         f"{p.memory.total / 2**30:,.0f}{'' if p.fits else ' (too much)'}"] for p in points])


def _curve(points: Sequence[Point], at: Sequence[float], unit: str) -> str:
    """Step times over ``at``, in powers of two."""
    if len(points) < 2:
        return ""
    logs = [math.log2(x) for x in at]
    most = max(v.step_s for p in points for v in p.variants)

    def x(value: float) -> float:
        return _LEFT + (value - logs[0]) / (logs[-1] - logs[0]) * (_WIDTH - _LEFT - 130)

    def y(seconds: float) -> float:
        return (_HEIGHT - _BOTTOM) * (1 - seconds / most) + 12

    parts = [f'<line x1="{_LEFT}" x2="{_WIDTH - 130}" y1="{y(0):.1f}" y2="{y(0):.1f}" stroke="currentColor"/>']
    for share in (0.25, 0.5, 0.75, 1.0):
        seconds = most * share
        parts.append(f'<text x="{_LEFT - 6}" y="{y(seconds) + 4:.1f}" text-anchor="end">{seconds * 1e3:,.0f} ms</text>')
    for value, log in zip(at, logs):
        parts.append(f'<text x="{x(log):.1f}" y="{y(0) + 16:.1f}" text-anchor="middle">{value:,.3g}</text>')
    parts.append(f'<text x="{_WIDTH - 124}" y="{y(0) + 16:.1f}">{escape(unit)}</text>')
    for number, colour in enumerate(_COLOURS):
        line = " ".join(f"{x(log):.1f},{y(p.variants[number].step_s):.1f}" for log, p in zip(logs, points))
        last = points[-1].variants[number]
        parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2"/>'
                     f'<rect x="{_WIDTH - 118}" y="{16 + 18 * number}" width="10" height="10" fill="{colour}"/>'
                     f'<text x="{_WIDTH - 102}" y="{25 + 18 * number}">{escape(label(last.name))}</text>')
    return f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="step time">{"".join(parts)}</svg>'
