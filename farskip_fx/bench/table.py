"""Results on the screen. Every function takes plain data, as it is in the JSON, and gives something rich can print."""
from __future__ import annotations

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from .exchanges import SMALL_BYTES
from .spec import PEERS
from .variants import WHAT

WHAT_OF_MODE = {"forward": "forward", "train": "forward + backward",
                "step": "forward + backward with means of gradients + clipping + AdamW"}
TOLERANCE = 1e-3                            # a variant further from the reference than this computed something else
ROUNDED = 0.2                               # one that rounds what travels


def variants_table(names: tuple[str, ...]) -> RenderableType:
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for name in names:
        table.add_row(name, f"[dim]{WHAT[name]}[/]")
    return table


def layers_table(layers: list[dict], max_diff: float) -> RenderableType:
    table = Table(title="Rewiring: what each layer reads (R: the residual stream)", title_justify="left")
    for heading in ("layer", "attention before", "attention after", "MoE before", "MoE after", "rewired"):
        table.add_column(heading, justify="right" if heading == "layer" else "left")
    for layer in layers:
        table.add_row(str(layer["index"]), layer["attention_read_before"], layer["attention_reads"],
                      layer["mlp_read_before"], layer["mlp_reads"],
                      "yes" if layer["rewired"] else f"no: {layer['reason']}")
    agrees = Text(f"The rewired graph, run as it is, differs from the eager reference by {max_diff:.1e} at most.")
    return Group(table, agrees, warning_if_wrong(max_diff))


def warning_if_wrong(max_diff: float) -> RenderableType:
    if max_diff <= TOLERANCE:
        return Text("")
    return Text(f"That is more than {TOLERANCE:g}: it computes something else.", style="bold red")


def schedule_table(title: str, schedules: list[dict]) -> RenderableType:
    tables: list[RenderableType] = []
    for graph, schedule in zip(("forward", "backward"), schedules):
        names = exchange_names([one["bytes"] for one in schedule["collectives"]], backward=graph == "backward",
                               means=[one["kind"].startswith("all_reduce") for one in schedule["collectives"]])
        table = Table(title=f"{title}, {graph}: what each exchange hides behind (predicted)", title_justify="left")
        for heading, side in (("exchange", "left"), ("MB", "right"), ("ms", "right"), ("hidden", "right"),
                              ("exposed", "right"), ("behind", "left")):
            table.add_column(heading, justify=side, no_wrap=heading != "behind")
        for name, one in zip(names, schedule["collectives"]):
            table.add_row(name, f"{one['bytes'] / 1e6:.2f}", f"{one['ms']:.1f}", f"{one['hidden_ms']:.1f}",
                          f"{one['exposed_ms']:.1f}", _behind(one["behind"]))
        tables.append(table)
        if any(name.startswith("mean") for name in names):
            exposed = {mean: sum(one["exposed_ms"] for name, one in zip(names, schedule["collectives"])
                                 if name.startswith("mean") == mean) for mean in (False, True)}
            tables.append(Text(f"exposed (predicted): exchanges of experts {exposed[False]:.0f} ms, means of gradients "
                               f"{exposed[True]:.0f} ms"))
    return Group(*tables)


def exchange_names(sizes: list[int], backward: bool, means: list[bool] | None = None) -> list[str]:
    """What each collective of a graph is, in launch order: the chain of all-to-alls through the layers is serial, so order
    tells. ``means`` marks the means of gradients.

    forward   counts 0, dispatch 0, combine 0, counts 1, ...
    backward  combine' and dispatch' of the last layer first (the gradient travels the other way)
    """
    means = means or [False] * len(sizes)
    large = [index for index, size in enumerate(sizes) if size > SMALL_BYTES and not means[index]]
    small = [index for index, size in enumerate(sizes) if size <= SMALL_BYTES and not means[index]]
    names = {index: f"counts {layer}" for layer, index in enumerate(small)}
    names.update({index: f"mean {number}" for number, index in enumerate(i for i, mean in enumerate(means) if mean)})
    last = len(large) // 2 - 1
    for place, index in enumerate(large):
        layer = last - place // 2 if backward else place // 2
        names[index] = f"{('combine', 'dispatch')[place % 2]}' {layer}" if backward else (
            f"{('dispatch', 'combine')[place % 2]} {layer}")
    return [names[index] for index in range(len(sizes))]


def _behind(behind: list[str]) -> str:
    return ", ".join(behind).replace("model.layers.", "layer ") or "nothing"


def times_table(mode: str, result: dict, rounds: int) -> RenderableType:
    """One ratio's times. Milliseconds a step; the median, with the minimum behind it."""
    what = WHAT_OF_MODE[mode]
    table = Table(title=f"{what}, comm/compute {result['ratio']:g}: ms a step, median (minimum) of {rounds}",
                  title_justify="left")
    for heading in ("variant", "fast link", "slow link", "over stock, fast", "over stock, slow", "max diff"):
        table.add_column(heading, justify="left" if heading == "variant" else "right")
    for one in result["variants"]:
        worst = worst_of(one)
        how = "" if one.get("how", "compiled") == "compiled" else f" ({one['how']})"
        table.add_row(one["name"] + how, f"{one['fast_ms']:.0f} ({one['fast_min_ms']:.0f})",
                      f"{one['slow_ms']:.0f} ({one['slow_min_ms']:.0f})", f"{one['speedup_fast']:.2f}x",
                      f"[bold]{one['speedup_slow']:.2f}x[/]",
                      f"{worst:.1e}" if worst <= tolerance_of(one["name"]) else f"[bold red]{worst:.1e}[/]")
    return Group(table, Text(_figures(mode, result)))


def tolerance_of(variant: str) -> float:
    return ROUNDED if variant.endswith("_int8") else TOLERANCE


def worst_of(facts: dict) -> float:
    """A variant's largest difference from the reference: logits and loss absolute, gradients and their norm relative."""
    return max(value for name, value in facts.items() if name.endswith("_diff"))


def _figures(mode: str, result: dict) -> str:
    lines = [
        f"compute alone {result['compute_only_ms']:.0f} ms ({result['compute_only_of']} on the fast link), exchanges "
        f"alone {result['comm_only_ms']:.0f} ms (minimum {result['comm_only_min_ms']:.0f}); "
        f"limit max(compute, comm) {result['limit_ms']:.0f} ms, bound of the connectivity {result['bound_ms']:.0f} ms",
    ]
    by_name = {one["name"]: one for one in result["variants"]}
    others = ((result["best_exact"], "the best with the model's own connectivity"), ("overlapped_eager", "farskip by hand"))
    for ours in ("farskip", "farskip_chunks") if set(by_name) & set(PEERS) else ():
        for name, what in others:
            if ours in by_name and name in by_name:
                times = by_name[name]["slow_ms"] / by_name[ours]["slow_ms"]
                lines.append(f"{ours} over {name} ({what}), slow link: {times:.2f}x")
    if result["hidden"] is not None:
        ends = "the first or last exchange" + " or the last mean" * (mode == "step")
        inner = "" if result["hidden_inner"] is None else f"; {result['hidden_inner']:.0%} of what is not {ends}"
        if result["hidden_of_possible"] is not None:
            inner += f"; {result['hidden_of_possible']:.0%} of what the bound leaves to hide"
        lines.append(f"hidden: {result['hidden']:.0%} of what the slow link costs stock{inner}; "
                     f"farskip is {result['over_bound']:+.0%} from the bound")
    elif "over_bound" in result:
        lines.append("hidden: not defined, the slow link costs stock nothing here")
    if (exposed := result.get("exposed")) is not None:
        lines.append(f"exposed communication of farskip: predicted {exposed['predicted_ms']:.0f} ms, measured "
                     f"{exposed['measured_ms']:.0f} ms (its waits under torch.profiler, mean of the ranks)")
    lines.append("the slow link adds to " + "; ".join(f"{one['name']} {_added(one)}" for one in result["variants"]))
    if not result["rate_is_close"]:
        lines.append(f"the exchanges could not be brought to {result['ratio']:g} of compute on this link; the figures "
                     "stand for the times above, not for that ratio")
    return "\n".join(lines)


def _added(variant: dict) -> str:
    phases = zip(("forward", "backward", "update"), variant["slow_phases_ms"], variant["fast_phases_ms"])
    return ", ".join(f"{name} {slow - fast:+.0f} ms" for name, slow, fast in phases)


def conditions(result: dict) -> str:
    """What must be said beside a mode's times."""
    experts, means = result["traffic"]["experts_bytes"], result["traffic"]["means_bytes"]
    lines = [f"rank 0 sends {sum(experts) / 1e6:.1f} MB in the exchanges of experts (" +
             ", ".join(f"{name} {sent / 1e6:.1f}" for name, sent in zip(("forward", "backward"), experts)) + ")"]
    if means:
        lines[0] += (f" and {sum(means) / 1e6:.1f} MB in {len(means)} means of gradients (largest {max(means) / 1e6:.1f}, "
                     f"the last {result['traffic']['last_mean_bytes'] / 1e6:.1f})")
    rows = result["rows_of_ranks"]
    lines.append(f"experts of rank 0 to {len(rows) - 1} get " + ", ".join(f"{count / sum(rows):.0%}" for count in rows) +
                 f" of the rows ({result['shape']['family']}, routing {result['shape']['routing']})")
    if result["ranks_on_a_core"] > 1:
        lines.append(f"dp {result['dp']} x ep {result['ep']}, {result['ranks_on_a_core']} ranks on a core: they slow each "
                     "other down, and one may compute while another waits. Only ratios mean something, no time does.")
    return "\n".join(lines)


def curve_table(mode: str, curve: list[dict]) -> RenderableType:
    table = Table(title=f"{mode}: the curve over comm/compute, slow link, medians in ms", title_justify="left")
    names = [one["name"] for one in curve[0]["variants"]]
    for heading in ["ratio", *names, "bound", "limit", "hidden", "speed-up"]:
        table.add_column(heading, justify="right")
    for point in curve:
        by_name = {one["name"]: one for one in point["variants"]}
        last = by_name.get("farskip", point["variants"][-1])
        hidden = "-" if point["hidden"] is None else f"{point['hidden']:.0%}"
        table.add_row(f"{point['ratio']:g}", *(f"{one['slow_ms']:.0f}" for one in point["variants"]),
                      f"{point['bound_ms']:.0f}", f"{point['limit_ms']:.0f}", hidden, f"{last['speedup_slow']:.2f}x")
    return table
