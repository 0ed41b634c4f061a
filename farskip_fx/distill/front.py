"""A choice of layers to look at: tables for the terminal, and the front as SVG."""
from __future__ import annotations

from collections.abc import Mapping

from rich.markup import escape
from rich.table import Table

from ..view.plot import safe, text
from ..view.text import plain
from .choice import Choice, Point
from .sensitivity import Sensitivity

_WIDTH, _HEIGHT, _LEFT, _TOP, _RIGHT, _BOTTOM = 640, 400, 70, 46, 24, 84
_STYLE = """
  svg { --ink: #1b1f24; --faint: #8a929b; --line: #0b62c4; --mark: #b3261e; color-scheme: light dark }
  @media (prefers-color-scheme: dark) { svg { --ink: #e8eaed; --faint: #8a929b; --line: #7ab7ff; --mark: #ff8a80 } }
  text { font: 12px system-ui, sans-serif; fill: var(--ink) } .small { font-size: 10px } .title { font-size: 14px }
  .axis { stroke: var(--faint); stroke-width: 1 } .front { stroke: var(--line); stroke-width: 2; fill: none }
  .point { fill: var(--line) } .uniform { fill: none; stroke: var(--ink); stroke-width: 1.5 } .chosen { fill: var(--mark) }
  .none { fill: none; stroke: var(--faint) } .half { fill: var(--line); fill-opacity: 0.45 } .whole { fill: var(--line) }
"""


def layers_table(found: Sensitivity, choice: Choice | None = None) -> Table:
    """Layers x connectivities: KL in nats a token, what was refused, and what was chosen."""
    drawn = Table(title="KL of converting one layer (nats a token)",
                  caption=f"{found.tokens} tokens; a layer that is not chosen stays as it is")
    for name in ("layer", "", *found.choices, *(("chosen",) if choice else ())):
        drawn.add_column(name, justify="left" if name in ("", "chosen") else "right")
    for i, layer in enumerate(found.layers):
        cells = [f"{layer.kl[name]:.5f}" if name in layer.kl else "refused" for name in found.choices]
        chosen = [choice.names[i] if choice.names[i] != "none" else "-"] if choice else []
        drawn.add_row(str(i), escape(plain(layer.structure.label)), *cells, *chosen)
    return drawn


def refusals(found: Sensitivity) -> list[str]:
    """One line for each layer that refuses something."""
    return [f"layer {i} ({plain(layer.structure.label)}) refuses {name}: {plain(why)}"
            for i, layer in enumerate(found.layers) for name, why in layer.refused.items()]


def front_table(choice: Choice, rows: int = 12) -> Table:
    """The front, thinned out, and each connectivity in all layers."""
    drawn = Table(title="share of the hidden time -> sum of KL", caption="predicted, see docs/distill.md")
    for name in ("hidden", "KL (sum)", "layers left", ""):
        drawn.add_column(name, justify="left" if not name else "right")
    front = choice.front
    kept = sorted({round(i * (len(front) - 1) / max(rows - 1, 1)) for i in range(min(rows, len(front)))})
    points = [(front[i], "") for i in kept]
    points += [(p, f"{name} in all layers") for name, p in choice.uniform.items() if name != "none"]
    points.append((Point(share=choice.share, kl=choice.kl, names=choice.names), f"chosen for {choice.wanted:.0%}"))
    for point, what in sorted(points, key=lambda entry: (entry[0].share, entry[0].kl)):
        drawn.add_row(f"{point.share:.1%}", f"{point.kl:.5f}", str(point.names.count("none")), escape(plain(what)),
                      style="bold" if what.startswith("chosen") else None)
    return drawn


def front_svg(choice: Choice, title: str = "") -> str:
    """The front, each connectivity in all layers, and below them the chosen one of each layer. Dark and light."""
    top = max([p.kl for p in (*choice.front, *choice.uniform.values())] + [choice.kl, 1e-12]) * 1.05
    right = max([1.0, choice.share, *(p.share for p in (*choice.front, *choice.uniform.values()))])

    def at(share: float, kl: float) -> tuple[float, float]:
        return (_LEFT + (_WIDTH - _LEFT - _RIGHT) * max(share, 0.0) / right,
                _HEIGHT - _BOTTOM - (_HEIGHT - _TOP - _BOTTOM) * kl / top)

    parts = [text(_LEFT, 22, title or "Which layers: KL over hidden time", "title")]
    left, base = at(0, 0)
    parts += [_line(left, base, _WIDTH - _RIGHT, base), _line(left, base, left, _TOP)]
    for step in range(6):
        x, _ = at(step / 5, 0)
        _, y = at(0, top * step / 5)
        parts += [text(x, base + 16, f"{step * 20} %", "small", anchor="middle"),
                  text(left - 6, y + 4, f"{top * step / 5:.3g}", "small", anchor="end")]
    parts += [text((left + _WIDTH - _RIGHT) / 2, base + 32, "predicted share of the hidden time", anchor="middle"),
              text(left, _TOP - 8, "sum of KL, nats a token", "small")]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (at(p.share, p.kl) for p in choice.front))
    parts.append(f'<polyline class="front" points="{path}"/>')
    parts += [f'<circle class="point" cx="{x:.1f}" cy="{y:.1f}" r="2"/>' for x, y in (at(p.share, p.kl) for p in choice.front)]
    for name, p in choice.uniform.items():
        x, y = at(p.share, p.kl)
        parts += [f'<circle class="uniform" cx="{x:.1f}" cy="{y:.1f}" r="4">{_hint(_of(p, name))}</circle>',
                  text(x - 8, y - 6, name, "small", anchor="end" if p.share > 0.5 * right else "start")]
    x, y = at(choice.share, choice.kl)
    what = f"chosen for {choice.wanted:.0%}: {choice.share:.1%} hidden, KL {choice.kl:.4g}"
    parts += [f'<circle class="chosen" cx="{x:.1f}" cy="{y:.1f}" r="5">{_hint(what)}</circle>', text(left, _HEIGHT - 34, what)]
    parts += _strip(choice.names, left, _HEIGHT - 26, _WIDTH - _RIGHT - left)
    body = "\n  ".join(parts)
    return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img">\n'
            f"  <style>{_STYLE}</style>\n  {body}\n</svg>\n")


def _strip(names, left: float, y: float, width: float) -> list[str]:
    """A box for each layer: empty, half filled or filled; its name when pointed at."""
    step = width / max(len(names), 1)
    kinds: Mapping[str, str] = {"none": "none", "attn_only": "half", "mlp_only": "half"}
    return [f'<rect class="{kinds.get(name, "whole")}" x="{left + i * step:.2f}" y="{y}" width="{max(step - 1, 0.5):.2f}" '
            f'height="14">{_hint(f"layer {i}: {name}")}</rect>' for i, name in enumerate(names)]


def _of(point: Point, name: str) -> str:
    return f"{name}: {point.share:.1%} hidden, KL {point.kl:.4g}"


def _line(x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line class="axis" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def _hint(words: str) -> str:
    return f"<title>{safe(words)}</title>"
