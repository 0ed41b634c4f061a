"""A report in plain lines, as ``print(report)`` shows it: a summary, one line a block, equal neighbours folded."""
from __future__ import annotations

import re
from collections.abc import Iterator


def lines(report: dict) -> list[str]:
    out = [plain(report["summary"])]
    # One name for all stands in the first line already.
    each = isinstance(report["options"]["connectivity"], dict)
    rows = [_rows(layer, each) for layer in report["layers"]]
    at = 0
    while at < len(rows):
        run = next((n for n in range(at + 1, len(rows)) if not _alike(rows[at], at, rows[n], n)), len(rows))
        if run - at > 2:
            out += [f"  {row}" for row in _several(rows[at], at, run - 1)]
            at = run
        else:
            out += [f"  layer {at}{row}" for row in rows[at]]
            at += 1
    return out


def _rows(layer: dict, each: bool) -> list[str]:
    rows = [f": connectivity {plain(layer['connectivity'])}"] if each else []
    if layer["refused"]:
        return [*rows, f" {layer['kind']}: refused: {plain(layer['refused']['text'])}"]
    return rows + [f" {read['block']}: reads {plain(read['now'])}"
                   + (f"  (was: {plain(read['was'])})" if read["now"] != read["was"] else "") for read in layer["reads"]]


# --- layers that differ in their numbers only --------------------------------------------------------------------

_NUMBER = re.compile(r"layer (\d+)")


def _relative(rows: list[str], k: int) -> list[str]:
    return [_NUMBER.sub(lambda m: f"layer k{int(m[1]) - k:+d}", row) for row in rows]


def _alike(rows: list[str], k: int, others: list[str], n: int) -> bool:
    return _relative(rows, k) == _relative(others, n)


def _several(rows: list[str], first: int, last: int) -> Iterator[str]:
    for row in _relative(rows, first):
        yield f"layers {first}-{last}{row.replace('k+0', 'k')}"


# --- names from the model ----------------------------------------------------------------------------------------

def plain(text: str, most: int = 300) -> str:
    """For a terminal: no control characters (ANSI escapes, line ends, reversed text), and not endless."""
    text = "".join(c if c.isprintable() else "?" for c in str(text))
    return text if len(text) <= most else f"{text[:most - 3]}..."
