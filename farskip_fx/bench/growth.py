"""How our passes grow with depth, what part of a compile they are, and what a second process and further steps pay.

    python -m farskip_fx.bench.growth                                   4 to 128 layers, and a compile of 2
    python -m farskip_fx.bench.growth --layers 4 16 --compile-layers 0  tracing only
    python -m farskip_fx.bench.growth --json build/growth.json          with everything in a file, too

Three tables, each row from a process of its own:

Seconds are CPU seconds of the process, so other work on the machine does not show in them.

growth      Dynamo and AOTAutograd trace HF Qwen3-MoE, forward and backward, as one of two ranks; nothing is compiled. Seconds
            of our passes, and the most memory that they held at once (Python's and C++'s objects as tracemalloc sees them: in
            a second process, which it slows); the whole process beside it
compile     Inductor really compiles a few layers, one rank with all experts: forward and backward; our share of it
warm start  the same once more in a fresh process, with the cache that the first left; and more steps in each: they must not
            compile again
"""
from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
import tracemalloc
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.table import Table

from .passes import OURS
from .spec import Shape

REWIRING = tuple(name for name in OURS if name != "schedule")
STEPS = 4


# --- in processes of their own --------------------------------------------------------------------
def traced(layers: int, memory: bool) -> dict[str, float]:
    """One depth: seconds by stage, or with ``memory`` the peak of what our passes allocate."""
    from ..passes._torch import fake_ranks
    from .passes import measure

    peaks = [0]

    @contextmanager
    def watched() -> Iterator[None]:
        tracemalloc.start()
        try:
            yield
        finally:
            peaks.append(tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()

    fake_ranks(2)
    found = measure(layers, watched) if memory else measure(layers)
    return {**found, "peak_mb": max(peaks) / 1e6, "process_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3}


def compiled(layers: int) -> dict[str, float]:
    """A first step, which compiles, and ``STEPS`` more."""
    import torch
    import torch.distributed as dist
    from torch._dynamo.utils import counters

    import farskip_fx as fs

    from .. import overlap
    from .model import build, logits_of, loss_of, tokens

    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    shape = Shape(layers=layers, hidden=64, tokens=64, moe_intermediate=32)
    seconds = {"schedule": 0.0, "fence": 0.0}
    for pass_type, name in ((overlap.FarskipSchedule, "schedule"), (overlap.FarskipFence, "fence"),
                            (overlap.FarskipVerify, "fence")):
        pass_type.__call__ = _timed(pass_type.__call__, seconds, name)
    model, ids = fs.expert_parallel(build(shape, 0), dist.group.WORLD), tokens(shape, 0, 0)
    fast = torch.compile(model, backend="farskip", dynamic=False)

    def step(clock) -> float:
        model.zero_grad(set_to_none=True)
        start = clock()
        loss_of(logits_of(fast, ids), ids).backward()
        return clock() - start

    first = step(time.process_time)
    graphs = counters["stats"]["unique_graphs"]
    later = min(step(time.perf_counter) for _ in range(STEPS))
    rewiring = sum(fs.last_reports()[-1].seconds.get(name, 0.0) for name in REWIRING)
    return {"layers": layers, "first": first, "later": later, "rewire": rewiring, **seconds,
            "recompiles": counters["stats"]["unique_graphs"] - graphs,
            "hits": counters["inductor"]["fxgraph_cache_hit"], "misses": counters["inductor"]["fxgraph_cache_miss"]}


def _timed(call, seconds: dict[str, float], name: str):
    def timed(self, *args):
        start = time.process_time()
        try:
            return call(self, *args)
        finally:
            seconds[name] += time.process_time() - start
    return timed


# --- the tables -----------------------------------------------------------------------------------
def child(*arguments: str, cache: str | None = None) -> dict[str, float]:
    """What a process of this module with ``--child`` found."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    if cache is not None:
        environment["TORCHINDUCTOR_CACHE_DIR"] = cache
    done = subprocess.run([sys.executable, "-m", "farskip_fx.bench.growth", "--child", *arguments], env=environment,
                          capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"growth, {' '.join(arguments)}: exit status {done.returncode}\n{done.stderr[-4000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def growth_table(rows: list[dict]) -> Table:
    table = Table(title="growth: CPU seconds, tracing only (trace: Dynamo and AOTAutograd, ours included)", title_justify="left")
    for name in ("layers", "nodes", "aten nodes", "trace", "rewire", "schedule", "ours", "of trace", "ms a layer",
                 "ours, MB", "process, MB"):
        table.add_column(name, justify="right")
    for row in rows:
        rewiring, ours = row["rewiring"], row["rewiring"] + row["schedule"]
        table.add_row(*(f"{row[name]:.0f}" for name in ("layers", "nodes", "aten nodes")), f"{row['trace']:.1f}",
                      f"{rewiring:.2f}", f"{row['schedule']:.2f}", f"{ours:.2f}", f"{ours / row['trace']:.1%}",
                      f"{1e3 * ours / row['layers']:.1f}", f"{row['peak_mb']:.0f}" if "peak_mb" in row else "-",
                      f"{row['process_mb']:.0f}")
    return table


def compile_table(rows: dict[str, dict]) -> Table:
    table = Table(title="compile and warm start: CPU seconds of the process; a later step in seconds", title_justify="left")
    for name in ("process", "layers", "first step", "rewire", "schedule", "fence", "ours", "a later step", "recompiles",
                 "cache hits", "misses"):
        table.add_column(name, justify="left" if name == "process" else "right")
    for name, row in rows.items():
        ours = row["rewire"] + row["schedule"] + row["fence"]
        table.add_row(name, f"{row['layers']:.0f}", f"{row['first']:.1f}", f"{row['rewire']:.2f}", f"{row['schedule']:.2f}",
                      f"{row['fence']:.2f}", f"{ours / row['first']:.1%}", f"{row['later']:.3f}",
                      *(str(int(row[key])) for key in ("recompiles", "hits", "misses")))
    return table


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m farskip_fx.bench.growth", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="*", default=[4, 16, 64, 128], metavar="N", help="(4 16 64 128)")
    parser.add_argument("--compile-layers", type=int, default=2, metavar="N", help="really compiled; 0: none (2)")
    parser.add_argument("--no-memory", action="store_true", help="no second process for the memory of our passes")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything measured there")
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.child:
        return _as_child(*args.child)
    console = Console(width=None if sys.stdout.isatty() else 140)
    rows = []
    for layers in args.layers:
        rows.append({**child("trace", str(layers))})
        del rows[-1]["peak_mb"]
        if not args.no_memory:
            rows[-1]["peak_mb"] = child("memory", str(layers))["peak_mb"]
        console.print(f"{layers} layers traced", highlight=False)
    if rows:
        console.print(growth_table(rows))
    found = {}
    if args.compile_layers:
        with tempfile.TemporaryDirectory(prefix="farskip-") as cache:
            found = {name: child("compile", str(args.compile_layers), cache=cache) for name in ("first", "second")}
        console.print(compile_table(found))
    if args.json:
        args.json.write_text(json.dumps({"traced": rows, "compiled": found}, indent=1) + "\n")
    return 1 if any(row["recompiles"] for row in found.values()) else 0


def _as_child(what: str, layers: str) -> int:
    import torch

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    found = compiled(int(layers)) if what == "compile" else traced(int(layers), memory=what == "memory")
    print("\n" + json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
