"""What two reports differ in: two versions, two connectivities, two ranks. Layers are matched by their index, by identity
and never by text; collectives by their place in the order that ranks share.

``compare(a, b)`` returns data; ``lines`` words it.
"""
from __future__ import annotations

from collections.abc import Iterator
from itertools import zip_longest

from .terminal import milliseconds
from .text import plain

NOTHING = "the same rewiring, collectives and predictions"


def compare(a: dict, b: dict) -> list[dict]:
    """Differences, each {what, where, a, b}; what: "option", "layer", "read", "edge", "collective" or "time"."""
    return [*_options(a, b), *_layers(a, b), *_edges(a, b), *_collectives(a, b), *_times(a, b)]


def lines(differences: list[dict], most: int = 40) -> list[str]:
    out = [f"{d['what']} {plain(d['where'])}: {plain(d['b'])}  (was: {plain(d['a'])})" for d in differences[:most]]
    more = len(differences) - most
    return [*out, f"and {more} more"] if more > 0 else out or [NOTHING]


def _row(what: str, where: str, a, b) -> dict:
    return {"what": what, "where": where, "a": "nothing" if a is None else a, "b": "nothing" if b is None else b}


def _options(a: dict, b: dict) -> Iterator[dict]:
    for name in ("model", "graph", "rank"):
        if a[name] != b[name]:
            yield _row("option", name, a[name], b[name])
    for name in sorted({*a["options"], *b["options"]}):
        one, other = a["options"].get(name), b["options"].get(name)
        if one != other:
            yield _row("option", name, one, other)


def _layers(a: dict, b: dict) -> Iterator[dict]:
    for one, other in zip_longest(a["layers"], b["layers"]):
        where = str((one or other)["index"])
        if one is None or other is None:
            yield _row("layer", where, one and one["label"], other and other["label"])
            continue
        for key in ("kind", "connectivity", "rewired"):
            if one[key] != other[key]:
                yield _row("layer", f"{where} {key}", one[key], other[key])
        if (one["refused"] or {}).get("code") != (other["refused"] or {}).get("code"):
            yield _row("layer", f"{where} refused", *(x["refused"] and x["refused"]["text"] for x in (one, other)))
        for read, theirs in zip(one["reads"], other["reads"]):
            if read["now"] != theirs["now"]:
                yield _row("read", f"layer {where} {read['block']}", read["now"], theirs["now"])


def _edges(a: dict, b: dict) -> Iterator[dict]:
    def edges(report: dict) -> dict:
        return {(c["layer"], c["block"], c["node"], c["was"]): c["now"] for c in report["changes"]}
    ours, theirs = edges(a), edges(b)
    for key in sorted({*ours, *theirs}):
        if ours.get(key) != theirs.get(key):
            layer, block, node, was = key
            yield _row("edge", f"layer {layer} {block} {node}", ours.get(key, was), theirs.get(key, was))


def _collectives(a: dict, b: dict) -> Iterator[dict]:
    for i, (one, other) in enumerate(zip_longest(a["collectives"], b["collectives"])):
        if one != other:
            yield _row("collective", str(i), one, other)


def _times(a: dict, b: dict) -> Iterator[dict]:
    for one, other in zip_longest(a["phases"], b["phases"]):
        name = (one or other)["name"]
        if one is None or other is None:
            yield _row("time", name, one and milliseconds(one["after"]["seconds"]), other and milliseconds(other["after"]["seconds"]))
            continue
        for side in ("before", "after"):
            for key in ("seconds", "exposed_s"):
                x, y = one[side][key], other[side][key]
                if abs(x - y) > 1e-9 * max(abs(x), abs(y)):
                    yield _row("time", f"{name} {side}{' exposed' if key == 'exposed_s' else ''}", milliseconds(x), milliseconds(y))
