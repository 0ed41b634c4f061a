"""The planner against the lab: predicted step times beside those that ``farskip bench --json`` measured.

    python -m farskip_fx.plan.validate bench1.json bench2.json

Contract: files of the bench in, one row for each mode, ratio and variant out. The rates are those that the bench measured on
its own machine and link; nothing is fitted to the step times. The model is traced again with the bench's shape.
"""
from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path

from rich.console import Console
from rich.table import Table

from ..bench.families import config_of
from ..bench.spec import MODES, Shape
from ..errors import ConfigError, FarskipError
from ..passes.costs import Rates
from .devices import Link
from .exchanges import Network
from .planner import STANDARD, Planner, Point, chunked
from .traced import Traced, trace

MEASURED = {"stock": STANDARD, "farskip": "farskip", "farskip_chunks": chunked("farskip")}
WANTED = 0.15


@dataclass(frozen=True)
class Row:
    file: str
    mode: str
    ratio: float
    variant: str
    measured_s: float
    predicted_s: float

    @property
    def error(self) -> float:
        return self.predicted_s / self.measured_s - 1


def rows_of(path: Path) -> Iterator[Row]:
    """
    Raises:
        ConfigError: it is no file of ``farskip bench --json``.
    """
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        modes = [(mode, result[mode]) for mode in MODES if mode in result]
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}; give a file of farskip bench --json") from error
    if not modes:
        raise ConfigError(f"{path} has none of {', '.join(MODES)}; give a file of farskip bench --json")
    for mode, one in modes:
        try:
            yield from _rows(path.name, mode, one)
        except (KeyError, TypeError) as error:
            raise ConfigError(f"{path}: {mode} has no {error}; write it again with farskip bench --json") from error


def _rows(name: str, mode: str, result: Mapping) -> Iterator[Row]:
    if result["ranks_on_a_core"] > 1:
        print(f"{name}, {mode}: several ranks shared a core, so times mean nothing there; left out", file=sys.stderr)
        return
    traced = {variant: trace_shape(Shape(**result["shape"]), training=mode != "forward", ep=result["ep"], causal=variant != "stock")
              for variant in MEASURED if variant != "farskip_chunks" or result.get("chunks", 2) == 2}       # as planned
    for point in result["curve"]:
        for variant in point["variants"]:
            if (model := traced.get(variant["name"])) is not None:
                at = predict(model, _rates(result, point), result["ep"], result["dp"], mode)
                predicted = {v.name: v.step_s for v in at.variants}
                yield Row(name, mode, point["ratio"], variant["name"], variant["slow_ms"] / 1e3,
                          predicted[MEASURED[variant["name"]]])


def trace_shape(shape: Shape, *, training: bool, ep: int, causal: bool) -> Traced:
    """``causal``: as our backend compiles it; stock Inductor keeps the mask until torch 2.14."""
    with tempfile.TemporaryDirectory(prefix="farskip-") as folder:
        config = config_of(shape)
        config.dtype = "float32"
        config.save_pretrained(folder)
        return trace(folder, tokens=shape.tokens, training=training, ep=ep, attention=None, causal=causal)


def predict(traced: Traced, rates: Rates, ep: int, dp: int, mode: str) -> Point:
    link = Link(rates.link_bytes, 1.0, rates.link_latency, "measured")
    # Mode train ends with the gradients: no means, no optimizer.
    return Planner(traced, rates, Network(link, link, 1), updates=mode == "step").at(ep, dp)


def _rates(result: Mapping, point: Mapping) -> Rates:
    given = {**result["compute_rates"], **point["link_rates"]}
    return Rates(**{f.name: given[f.name] for f in fields(Rates) if f.name in given})


def show(rows: list[Row], console: Console) -> None:
    table = Table(title="a step of the lab, on the slow link", title_justify="left")
    for heading in ("file", "mode", "comm/compute", "variant", "measured", "predicted", "error"):
        table.add_column(heading, justify="left" if heading in ("file", "mode", "variant") else "right")
    for row in rows:
        table.add_row(row.file, row.mode, f"{row.ratio:g}", row.variant, f"{row.measured_s * 1e3:,.0f} ms",
                      f"{row.predicted_s * 1e3:,.0f} ms", f"{row.error:+.0%}")
    console.print(table)
    within = sum(abs(row.error) <= WANTED for row in rows)
    console.print(f"{within} of {len(rows)} within {WANTED:.0%}; the largest error is {max(abs(r.error) for r in rows):.0%}",
                  highlight=False)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m farskip_fx.plan.validate", description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+", type=Path, metavar="BENCH.json")
    args = parser.parse_args(argv)
    try:
        rows = [row for path in args.files for row in rows_of(path)]
    except FarskipError as error:
        print(error, file=sys.stderr)
        return 2
    if not rows:
        print("nothing to compare", file=sys.stderr)
        return 2
    show(rows, Console(width=120))
    return 0


if __name__ == "__main__":
    sys.exit(main())
