"""What the fence costs: kernels and bytes of the code that Inductor makes with it and without it.

    python -m farskip_fx.bench.fence [--layers 3] [--json FILE]

One process over an emulated group (`emulated.py`), Qwen3-MoE small, forward and backward. Each pair is the same graph, compiled by
stock Inductor and once more with schedule and fence; attention stays whole and keeps its mask in both, so that they differ by the
fence alone. Kernels: loops that Inductor generates (what it calls by name, such as matrix products, is the same in both). Bytes: what
its kernels and calls read and write, as Inductor counts it, but for dependencies that only order: those it would count as reads of
whole buffers, and the fence is made of them. Both are counted when code is made, so nothing is timed.
"""
from __future__ import annotations

import argparse
import dataclasses
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

from ..caches import graph_caches_off
from ..passes._torch import bytes_of
from . import emulated
from .gpu import SMALL, compiled, exchanging, step
from .spec import Shape


def counted(shape: Shape, options: dict, chunks: int) -> dict[str, float]:
    """{"kernels", "megabytes"} of forward and backward together."""
    from torch._inductor import metrics

    model, ids = exchanging(shape, torch.float32, chunks=chunks, device="cpu")
    call = compiled(model, options)
    metrics.reset()
    with graph_caches_off(), counting_bytes() as counts:
        step(call, model, ids)
    return {"kernels": metrics.generated_kernel_count, "megabytes": sum(counts) / 1e6}


@contextmanager
def counting_bytes() -> Iterator[list[int]]:
    """The bytes of each graph that Inductor makes code for within it."""
    from torch._inductor import compile_fx
    from torch._inductor.graph import GraphLowering

    counts: list[int] = []

    def count(graph: GraphLowering):
        counts.append(sum(bytes_of(node) for node in graph.scheduler.nodes))
        return counts[-1], [], []

    log = compile_fx.inductor_metrics_log
    level, propagate = log.level, log.propagate
    log.setLevel(logging.INFO)      # or Inductor does not count at all
    log.propagate = False
    try:
        with patch.object(GraphLowering, "count_bytes", count):
            yield counts
    finally:
        log.setLevel(level)
        log.propagate = propagate


def main(given: list[str] | None = None) -> list[dict]:
    parser = argparse.ArgumentParser(prog="python -m farskip_fx.bench.fence", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=SMALL.layers)
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args(given)
    if not dist.is_initialized():
        emulated.init("cpu")
    shape, rows, console = dataclasses.replace(SMALL, layers=args.layers), [], Console(width=110)
    same = {"attention_parts": 1, "causal_attention": False}
    for connectivity, chunks in (("none", 1), ("farskip", 1), ("farskip", 2)):
        for overlap in (False, True):
            console.print(f"{connectivity}, {chunks} chunk(s), {'schedule and fence' if overlap else 'stock Inductor'} ...")
            rows.append({"connectivity": connectivity, "chunks": chunks, "overlap": overlap,
                         **counted(shape, {"connectivity": connectivity, "overlap": overlap, **same}, chunks)})
    table = Table(title=f"{args.layers} layers, forward and backward; with the fence over without it", title_justify="left")
    for name in ("connectivity", "chunks", "kernels, stock", "fenced", "", "MB, stock", "fenced", ""):
        table.add_column(name, justify="right" if name != "connectivity" else "left")
    for stock, ours in zip(rows[::2], rows[1::2]):
        cells = [text for key, form in (("kernels", "d"), ("megabytes", ".1f"))
                 for text in (format(stock[key], form), format(ours[key], form), f"{ours[key] / stock[key] - 1:+.1%}")]
        table.add_row(stock["connectivity"], str(stock["chunks"]), *cells)
    console.print(table)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1))
    return rows


if __name__ == "__main__":
    main()
    dist.destroy_process_group()
