"""A plan as one HTML page that needs no network and no script: tables, and the curves as SVG.

Names come from the user and are text: everything is escaped.
"""
from __future__ import annotations

from collections.abc import Sequence
from html import escape

from ..view.plot import lines
from ..view.text import plain
from .planner import Plan, Point
from .show import ends_lines, exchange_headings, exchange_rows, label, memory_line

_STYLE = """
:root { color-scheme: light dark; --a: #888; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; margin: .5rem 0 1.5rem; } td, th { padding: .2rem .7rem; text-align: right; }
th { border-bottom: 1px solid var(--a); } td:first-child, th:first-child { text-align: left; }
svg { width: 100%; height: auto; }
"""


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
        "<h2>Exchanges</h2>", _table(exchange_headings(plan), exchange_rows(plan)),
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
    return lines("Step time", unit, "ms", {label(variant.name): {x: p.variants[number].step_s * 1e3 for x, p in zip(at, points)}
                                           for number, variant in enumerate(points[0].variants)})
