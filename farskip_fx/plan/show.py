"""A plan in the terminal."""
from __future__ import annotations

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..view.text import plain
from .planner import HALVES, STANDARD, Plan, Point

LABELS = {STANDARD: "standard", HALVES: "two halves, exact"}


def label(name: str) -> str:
    return LABELS.get(name, name)


def show(plan: Plan, console: Console) -> None:
    phase = "training step" if plan.training else "forward"
    model, device, link = (escape(plain(name)) for name in (plan.model, plan.device, plan.link))
    console.print(f"[bold]{model}[/]: {phase}, {plan.gpus} x {device}, {plan.tokens} tokens a rank in sequences of {plan.context}, "
                  f"link {link}. A prediction: nothing was run.", highlight=False)
    console.print(asked_table(plan))
    console.print(memory_line(plan.asked), highlight=False)
    console.print(exchanges_table(plan))
    console.print(points_table(plan, plan.by_ep, f"all ways to split {plan.gpus} devices", best=plan.best))
    console.print(points_table(plan, plan.by_link, f"ep {plan.asked.ep} over other links"))
    for line in ends_lines(plan):
        console.print(line, highlight=False)
    console.print("what it does not know:", highlight=False)
    for line in plan.unknown:
        console.print(f"  {line}", highlight=False)


def asked_table(plan: Plan) -> Table:
    point = plan.asked
    table = Table(title=f"ep {point.ep} x dp {point.dp}", title_justify="left")
    for heading in ("connectivity", "step", "over standard", "exposed communication", "tokens/s in all"):
        table.add_column(heading, justify="left" if heading == "connectivity" else "right")
    for one in point.variants:
        table.add_row(label(one.name), f"{one.step_s * 1e3:,.1f} ms", f"{point.variants[0].step_s / one.step_s:.2f}x",
                      f"{one.exposed_s * 1e3:,.1f} ms ({one.exposed_s / one.step_s:.0%})",
                      f"{plan.tokens * plan.gpus / one.step_s:,.0f}")
    return table


def memory_line(point: Point) -> str:
    memory = point.memory
    parts = ", ".join(f"{name} {getattr(memory, name) / 2**30:,.1f}" for name in
                      ("weights", "gradients", "optimizer", "activations") if getattr(memory, name))
    return (f"memory a rank: {memory.total / 2**30:,.1f} GiB ({parts}){'' if point.fits else '; it does not fit'}. Exchanges: "
            f"{point.exchange_bytes / 2**20:,.0f} MiB leave a rank, {point.link_s * 1e3:,.1f} ms beside "
            f"{point.compute_s * 1e3:,.1f} ms of compute")


def exchanges_table(plan: Plan) -> Table:
    table = Table(title=f"exchanges at ep {plan.asked.ep} x dp {plan.asked.dp}", title_justify="left")
    for heading in exchange_headings(plan):
        table.add_column(heading, justify="left" if heading == "exchange" else "right")
    for row in exchange_rows(plan):
        table.add_row(*row)
    return table


def exchange_headings(plan: Plan) -> list[str]:
    return ["exchange", *(label(one.name) for one in plan.asked.variants), "MiB leave a rank"]


def exchange_rows(plan: Plan) -> list[list[str]]:
    """The fastest of each column is marked."""
    least = [min(p.variants[i].step_s for p in plan.by_exchange) for i in range(len(plan.asked.variants))]
    return [[p.exchange, *(f"{v.step_s * 1e3:,.1f} ms{' (best)' if v.step_s == best else ''}" for v, best in zip(p.variants, least)),
             f"{p.exchange_bytes / 2**20:,.0f}"] for p in plan.by_exchange]


def points_table(plan: Plan, points: tuple[Point, ...], title: str, best: int | None = None) -> Table:
    table = Table(title=title, title_justify="left")
    names = [label(one.name) for one in points[0].variants] if points else []
    for heading in ("ep", "dp", "link", *names, "gain", "GiB a rank"):
        table.add_column(heading, justify="right")
    for p in points:
        mark = " (best)" if p.ep == best else ""
        steps = (f"{v.step_s * 1e3:,.1f} ms" for v in p.variants)
        table.add_row(str(p.ep), str(p.dp), f"{p.link_bytes / 1e9:,.3g} GB/s", *steps, f"{p.gain:.2f}x{mark}",
                      f"{p.memory.total / 2**30:,.0f}{'' if p.fits else ' (too much)'}")
    return table


def ends_lines(plan: Plan) -> list[str]:
    ends = plan.ends
    lines = []
    if ends["links"] is None:
        lines.append(f"{plan.connectivity} gains less than {ends['gain'] - 1:.0%} on every link of the table")
    else:
        low, high = (f"{rate / 1e9:,.3g} GB/s" for rate in ends["links"])
        lines.append(f"{plan.connectivity} gains {ends['gain'] - 1:.0%} or more on links from {low} to {high} of those in the "
                     f"table; most ({ends['most']:.2f}x) at {ends['most_at'] / 1e9:,.3g} GB/s")
    if ends["ep"]:
        lines.append(f"and with ep {ends['ep'][0]} to {ends['ep'][1]} of those that divide devices and experts")
    if plan.best is None:
        lines.append("no split fits the memory: take more devices, --shard, fewer --tokens, or recompute activations")
    return lines
