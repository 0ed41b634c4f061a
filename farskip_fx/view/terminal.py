"""A report in the terminal: what changed, what it costs, what stays exposed and why; of one layer everything.

Takes ``Report.to_dict()``. Names that come from a model go through ``plain``: no escapes of a terminal, no markup.
"""
from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from .text import lines, plain

SIDES = ("before", "after")
_MOST = 6           # rows of what stays exposed


def show(report: dict, console: Console, *, layer: int | None = None, sides: Sequence[str] = SIDES) -> None:
    """Args:
        layer: everything about this layer; None: the whole model.
        sides: "before", "after" or both.
    """
    for line in lines(report) if layer is None else [plain(report["summary"])]:
        console.print(Text(line), soft_wrap=True)
    if report["folded"]:
        fold = report["folded"]
        console.print(f"{fold['traced']} of {fold['layers']} layers were traced; the others repeat the last "
                      f"{_count(fold['period'], 'layer')} of them", highlight=False)
    for error in report["errors"]:
        console.print(Text(f"error in a pass: {plain(error)}", style="red"))
    if layer is not None:
        return _one_layer(report, console, layer, sides)
    _refused(report, console)
    _changes(report, console, report["changes"])
    _phases(report, console, sides)
    for phase in report["phases"]:
        _exposed(phase, console, sides)
    _agreed(report, console)


# --- the whole model ---------------------------------------------------------------------------------------------

def _refused(report: dict, console: Console) -> None:
    for one in report["layers"]:
        if one["refused"]:
            console.print(Text(f"layer {one['index']} ({plain(one['label'])}) stays as it is: {plain(one['refused']['text'])}",
                               style="yellow"))


def _changes(report: dict, console: Console, changes: Sequence[dict]) -> None:
    """The edges that lead elsewhere; those of layers that differ in their number only stand in one row."""
    if not changes:
        return
    drawn = table("changed edges", "layer", "block", "operation", "reads", "instead of", "source")
    for group in _folded(changes):
        first, more = group[0], ", ..." if len(group) > 1 else ""
        drawn.add_row(_range([c["layer"] for c in group]), *(Text(plain(t)) for t in (
            first["block"], f"{first['op']} ({first['node']}{more})", first["now"] + more, first["was"] + more,
            first["source"].partition(" in ")[0])))
    console.print(drawn)


def _folded(changes: Sequence[dict]) -> list[list[dict]]:
    """Neighbouring layers with the same changes: one group a change."""
    by_layer: dict[int, list[dict]] = {}
    for change in changes:
        by_layer.setdefault(change["layer"], []).append(change)
    groups: list[list[dict]] = []
    run: list[list[dict]] = []
    for rows in by_layer.values():
        same = [(c["block"], c["op"], c["source"]) for c in rows]
        if run and [(g[0]["block"], g[0]["op"], g[0]["source"]) for g in run] == same and \
                run[0][-1]["layer"] + 1 == rows[0]["layer"]:
            for group, row in zip(run, rows):
                group.append(row)
        else:
            groups += run
            run = [[row] for row in rows]
    return groups + run


def _phases(report: dict, console: Console, sides: Sequence[str]) -> None:
    if not report["phases"]:
        return
    drawn = table("predicted", "phase", "", "time", "exposed", "communication", "peak memory", right=4)
    for phase in report["phases"]:
        for side in sides:
            line = phase[side]
            drawn.add_row(phase["name"], side, milliseconds(line["seconds"]), milliseconds(line["exposed_s"]),
                          milliseconds(sum(c["seconds"] for c in line["collectives"])), megabytes(line["peak_bytes"]))
        drawn.add_row("", "bound", milliseconds(phase["bound_s"]), "", "", "")
    console.print(drawn)
    for phase in report["phases"]:
        if phase["reason"]:
            console.print(Text(f"{phase['name']}: the order stayed: {plain(phase['reason'])}"))


def _exposed(phase: dict, console: Console, sides: Sequence[str]) -> None:
    """Alike in neighbouring layers: one row. The largest sums first."""
    for side in sides:
        groups: dict[tuple, list[dict]] = {}
        for row in phase[side]["collectives"]:
            if row["exposed_s"] > 0:
                key = (row["block"], row["part"], milliseconds(row["seconds"]), milliseconds(row["exposed_s"]),
                       row["name"] if row["layer"] is None else "")
                groups.setdefault(key, []).append(row)
        if not groups:
            continue
        ordered = sorted(groups.values(), key=lambda rows: -sum(r["exposed_s"] for r in rows))
        drawn = table(f"exposed, {phase['name']} {side}", "collective", "waited for by", "bytes", "takes", "exposed",
                       "free to run meanwhile", right=4)
        for rows in ordered[:_MOST]:
            first = rows[0]
            layers = [r["layer"] for r in rows if r["layer"] is not None]
            name = f"{part_of(first)} of layer{'s' if len(layers) > 1 else ''} {_range(layers)}" if layers else plain(first["name"])
            drawn.add_row(Text(name), Text(plain(first["needed_by"]) + (", ..." if len(rows) > 1 else "")),
                          megabytes(first["bytes"]), milliseconds(first["seconds"]), milliseconds(first["exposed_s"]),
                          milliseconds(first["free_s"]))
        console.print(drawn)


def _agreed(report: dict, console: Console) -> None:
    rewired = [one["index"] for one in report["layers"] if one["rewired"]]
    count = len(report["collectives"])
    console.print(f"all ranks must agree on: the options, {_count(len(rewired), 'rewired layer')}, "
                  f"{_count(count, 'collective')} in this order"
                  + (" (farskip_fx.check_agreement compares them)" if count else ""), highlight=False)


# --- one layer ---------------------------------------------------------------------------------------------------

def _one_layer(report: dict, console: Console, index: int, sides: Sequence[str]) -> None:
    layer = next((one for one in report["layers"] if one["index"] == index), None)
    if layer is None:
        console.print(f"there is no layer {index}: this report has {len(report['layers'])}", highlight=False)
        return
    console.print(Text(f"layer {index}: {plain(layer['label'])}, connectivity {plain(layer['connectivity'])}, "
                       f"{'rewired' if layer['rewired'] else 'not rewired'}", style="bold"))
    if layer["refused"]:
        console.print(Text(f"refused: {plain(layer['refused']['text'])}", style="yellow"))
    for read in layer["reads"]:
        for side, what in (("before", read["was"]), ("after", read["now"])):
            if side in sides:
                console.print(Text(f"  {read['block']} {side}: reads {plain(what)}"))
    for block in layer["blocks"]:
        sure = "" if block["certain"] else " (not certain)"
        console.print(Text(f"  {block['block']} {plain(block['label'])}: {plain(block['evidence'])}{sure}; "
                           f"{block['operations']} operations from {plain(block['reads'])} to {plain(block['adds'])}"
                           + (", with a shared part" if block["shared"] else "")))
        if block["source"]:
            console.print(Text(f"    {plain(block['source'])}", style="dim"))
    _changes(report, console, [c for c in report["changes"] if c["layer"] == index])
    for phase in report["phases"]:
        for side in sides:
            for row in phase[side]["collectives"]:
                if row["layer"] == index:
                    console.print(Text(
                        f"  {phase['name']} {side}: {collective(row)}, {megabytes(row['bytes'])}, takes "
                        f"{milliseconds(row['seconds'])}, exposed {milliseconds(row['exposed_s'])}"
                        + (f", behind {plain(', '.join(row['behind']))}" if row["behind"] else "")
                        + (f", waited for by {plain(row['needed_by'])}" if row["needed_by"] else "")))


# --- words -------------------------------------------------------------------------------------------------------

def collective(row: dict) -> str:
    """``dispatch of layer 3 (all_to_all_single_4)``."""
    return plain(row["name"]) if row["layer"] is None else f"{part_of(row)} of layer {row['layer']} ({plain(row['name'])})"


def part_of(row: dict) -> str:
    return row["part"] if row["part"] != "all" else row["block"]


def _range(layers: Sequence[int]) -> str:
    """``0, 3-93``."""
    runs: list[list[int]] = []
    for k in sorted(set(layers)):
        if runs and runs[-1][1] + 1 == k:
            runs[-1][1] = k
        else:
            runs.append([k, k])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def table(title: str, *columns: str, right: int = 0) -> Table:
    """``right``: how many of the last columns are figures."""
    drawn = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for i, name in enumerate(columns):
        figures = i >= len(columns) - right
        drawn.add_column(name, justify="right" if figures else "left", no_wrap=figures, overflow="fold")
    return drawn


def milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms" if seconds < 0.9995 else f"{seconds * 1e3:,.0f} ms"


def megabytes(count: int) -> str:
    return f"{count / 2**20:,.1f} MiB" if count >= 2**20 / 10 else f"{count:,} B"


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
