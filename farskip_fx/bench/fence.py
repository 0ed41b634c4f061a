"""What the fence costs: kernels and bytes of the code that Inductor makes with it and without it.

    python -m farskip_fx.bench.fence [--layers 3] [--json FILE]

One process over an emulated group (`emulated.py`), Qwen3-MoE small, forward and backward. Each pair is the same graph, compiled by
stock Inductor and once more with schedule and fence; attention stays whole and keeps its mask in both, so that they differ by the
fence alone. Kernels: loops that Inductor generates (what it calls by name, such as matrix products, is the same in both). Bytes:
Inductor's own count of what its kernels and calls read and write. Both are counted when code is made, so nothing is timed.
"""
from __future__ import annotations

import argparse
import dataclasses
import json
import logging
from pathlib import Path

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

from . import emulated
from .gpu import SMALL, compiled, exchanging, making_code, step
from .spec import Shape


def counted(shape: Shape, options: dict, chunks: int) -> dict[str, float]:
    """{"kernels", "megabytes"} of forward and backward together."""
    from torch._inductor import compile_fx, metrics

    compile_fx.inductor_metrics_log.setLevel(logging.INFO)       # or Inductor does not count bytes
    compile_fx.inductor_metrics_log.propagate = False
    model, ids = exchanging(shape, torch.float32, chunks=chunks, device="cpu")
    call = compiled(model, options)
    metrics.reset()
    with making_code():
        step(call, model, ids)
    return {"kernels": metrics.generated_kernel_count, "megabytes": metrics.num_bytes_accessed / 1e6}


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
