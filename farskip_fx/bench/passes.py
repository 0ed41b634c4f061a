"""What our passes cost, and how that grows with the number of layers: tracing only, nothing runs.

    python -m farskip_fx.bench.passes --layers 4 16 64

HF Qwen3-MoE with expert parallelism over two ranks, of which one exists: Dynamo traces it, our passes rewire it,
AOTAutograd makes its forward and backward graphs, and the schedule orders them.
"""
from __future__ import annotations

import argparse
import contextlib
import time
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from rich.console import Console
from rich.table import Table

from ..passes._torch import fake_ranks
from ..passes.costs import Rates
from ..passes.schedule import schedule
from .model import build
from .spec import Shape


class _Traced(Exception):
    """Raised in place of running: the other ranks do not exist."""


OURS = ("normalize", "residual", "detect", "rewire", "schedule")


def measure(layers: int, around: Callable[[], AbstractContextManager] = contextlib.nullcontext) -> dict[str, float]:
    """CPU seconds by stage for one depth (``rewiring``: all before the schedule). ``around()`` is entered wherever our passes
    run."""
    import farskip_fx as fs

    torch._dynamo.reset()
    shape = Shape(layers=layers, hidden=64, tokens=64, moe_intermediate=32)
    found: dict[str, float] = {"layers": layers, "schedule": 0.0}
    model = build(shape, seed=0)
    fs.expert_parallel(model, torch.distributed.group.WORLD)

    def ordered(gm, example_inputs):
        start = time.process_time()
        with around():
            schedule(gm.graph, rates=Rates())
        found["schedule"] += time.process_time() - start
        found["aten nodes"] = found.get("aten nodes", 0) + len(gm.graph.nodes)
        return gm.forward

    def traced(gm, example_inputs):
        from torch._dynamo.backends.common import aot_autograd
        found["nodes"] = len(gm.graph.nodes)
        start = time.process_time()
        with around():
            fs.farskip_backend(gm, example_inputs, options={"inner": "eager"})
        found["rewiring"] = time.process_time() - start
        aot_autograd(fw_compiler=ordered, bw_compiler=ordered)(gm, example_inputs)
        return stop

    def stop(*args):
        raise _Traced

    ids = torch.randint(0, 512, (1, shape.tokens))
    start = time.process_time()
    with contextlib.suppress(_Traced):
        torch.compile(model, backend=traced, dynamic=False, fullgraph=True)(ids, use_cache=False)
    found["trace"] = time.process_time() - start
    found.update(fs.last_reports()[-1].seconds)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="+", default=[4, 16, 64])
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    fake_ranks(2)
    rows = [measure(layers) for layers in args.layers]
    table = Table(title="seconds by stage; trace is Dynamo and AOTAutograd, ours included")
    for name in ("layers", "nodes", "aten nodes", "trace", *OURS, "ours", "ours / trace", "ms a layer"):
        table.add_column(name, justify="right")
    for row in rows:
        total = sum(row[name] for name in OURS)
        table.add_row(str(row["layers"]), str(row["nodes"]), str(row["aten nodes"]), f"{row['trace']:.1f}",
                      *(f"{row[name]:.3f}" for name in OURS), f"{total:.3f}", f"{100 * total / row['trace']:.1f} %",
                      f"{1e3 * total / row['layers']:.1f}")
    Console(width=150).print(table)


if __name__ == "__main__":
    main()
