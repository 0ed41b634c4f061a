"""`make gpu-check`: what can be shown on one NVIDIA GPU, in a few minutes.

    python -m farskip_fx.bench.gpu [--only numbers order] [--json FILE]

The experts' exchanges run over an emulated link (`emulated.py`): a process group of one rank, on a side stream, as slow as it
is told to be. Launches, waits, kernels and streams are real; what arrives is what was sent, so all numbers can be checked.

1 numbers   every connectivity under Inductor, float32, forward and gradients, against the eager reference of the bench. The
            link is slow, so a kernel that reads a received buffer before its wait reads something else. `farskip` once more in
            two chunks, and over NCCL (a group of one rank).
2 order     how many kernels stand between a launch and its wait in Inductor's code.
3 time      bf16, stock Inductor and ours, forward + backward, with the link so slow that the exchanges alone take as long as
            the compute alone (ratio 1), and half as long.
4 trace     of the same step, by torch.profiler: how much of the time in which the link is busy kernels run beside it.
"""
from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..caches import graph_caches_off
from . import emulated
from .model import build, logits_of, loss_of, reference_logits, relative_difference
from .spec import Shape

CONNECTIVITIES = ("none", "farskip", "ladder", "attn_only", "mlp_only")
SMALL = Shape(layers=3, hidden=256, tokens=512, experts=8, top_k=2, moe_intermediate=256, heads=4, kv_heads=2, head_dim=64)
LARGE = Shape(layers=6, hidden=2048, tokens=8192, experts=16, top_k=4, moe_intermediate=1024, heads=16, kv_heads=4, head_dim=128,
              vocab=8192)
# (options of the backend, None: Inductor alone; chunks of an exchange)
VARIANTS = {"stock": (None, 1), "rewired_stock": ({"connectivity": "farskip", "overlap": False}, 1),
            "farskip": ({"connectivity": "farskip"}, 1), "exact_chunks": ({"connectivity": "none"}, 2),
            "farskip_chunks": ({"connectivity": "farskip"}, 2)}


def model_of(shape: Shape, device: str, dtype: torch.dtype) -> tuple[nn.Module, Tensor]:
    model = build(shape, 0).to(device=device, dtype=dtype)
    ids = torch.randint(shape.vocab, (1, shape.tokens), generator=torch.Generator().manual_seed(1))
    return model, ids.to(device)


def exchanging(shape: Shape, dtype: torch.dtype, *, chunks: int = 1, device: str = "cuda", group=None) -> tuple[nn.Module, Tensor]:
    import farskip_fx as fs

    model, ids = model_of(shape, device, dtype)
    fs.expert_parallel(model, group, chunks=chunks)
    return model, ids


def compiled(model: nn.Module, options: dict | None) -> Callable:
    import farskip_fx as fs

    torch._dynamo.reset()
    if options is None:
        return torch.compile(model, dynamic=False)
    return torch.compile(model, backend=lambda gm, inputs: fs.farskip_backend(gm, inputs, options=options), dynamic=False)


def step(call: Callable, model: nn.Module, ids: Tensor) -> Tensor:
    model.zero_grad(set_to_none=True)
    logits = logits_of(call, ids)
    loss_of(logits, ids).backward()
    return logits.detach()


# --- 1 numbers ----------------------------------------------------------------------------------------------------
def numbers(device: str) -> list[dict]:
    """Largest differences from the eager reference; a connectivity that failed has its error instead."""
    import farskip_fx as fs

    model, ids = model_of(SMALL, device, torch.float32)
    wanted = {}
    for connectivity in CONNECTIVITIES:
        model.zero_grad(set_to_none=True)
        logits = reference_logits(model, ids, connectivity)
        loss_of(logits, ids).backward()
        wanted[connectivity] = logits.detach(), {n: p.grad.clone() for n, p in model.named_parameters()}
    rows = []

    def add(connectivity: str, how: str) -> None:
        logits, gradients = wanted[connectivity]
        row: dict = {"connectivity": connectivity, "how": how}
        try:
            got = step(compiled(model, {"connectivity": connectivity}), model, ids)
            row.update(max_diff=(got - logits).abs().max().item(),
                       grad_diff=max(relative_difference(p.grad, gradients[n]) for n, p in model.named_parameters()))
        except Exception as error:      # the next one is worth its own line
            traceback.print_exc()
            row["error"] = f"{type(error).__name__}: {error}"[:500]
        rows.append(row)
        print(row, flush=True)

    fs.expert_parallel(model, None)
    with emulated.slow(1e9):
        for connectivity in CONNECTIVITIES:
            add(connectivity, "slow link")
        model, _ = exchanging(SMALL, torch.float32, chunks=2, device=device)
        add("farskip", "slow link, 2 chunks")
    if device == "cuda":
        model, _ = exchanging(SMALL, torch.float32, device=device, group=dist.new_group(backend="nccl"))
        add("farskip", "NCCL")
    return rows


# --- 2 order ------------------------------------------------------------------------------------------------------
def kernels_in_flight(source: str) -> list[int]:
    """For each exchange in Inductor's code: kernels between its launch and its wait."""
    found, flying = [], []
    for line in source.splitlines():
        if line.lstrip().startswith("#"):       # Inductor's comments name the graph's nodes
            continue
        if re.search(r"_c10d_functional\.(all_to_all_single|all_reduce)", line):
            flying.append(0)
        elif "_c10d_functional.wait_tensor" in line and flying:
            found.append(flying.pop(0))
        elif re.search(r"extern_kernels\.|\.run\(|torch\.ops\.aten\.[a-z_]*(attention|grouped_mm)", line):
            flying = [count + 1 for count in flying]
    return found


def order(options: dict | None, chunks: int) -> list[list[int]]:
    """The same for each graph, forward and backward."""
    from torch._inductor.utils import run_and_get_code

    model, ids = exchanging(SMALL, torch.float32, chunks=chunks)
    call = compiled(model, options)
    with graph_caches_off():
        _, sources = run_and_get_code(lambda: step(call, model, ids))
    return [found for source in sources if (found := kernels_in_flight(source))]


# --- 3 time -------------------------------------------------------------------------------------------------------
def seconds(run: Callable[[], object], rounds: int) -> float:
    """Median; each round starts and ends with an idle device."""
    found = []
    for _ in range(rounds):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        run()
        torch.cuda.synchronize()
        found.append(time.perf_counter() - begin)
    return statistics.median(found)


def times(shape: Shape, ratios: list[float], rounds: int, trace: Path | None, keep: Callable[[dict], None]) -> None:
    """Rows of (ratio, variant); the first is stock Inductor without a delay, from which the link's rate follows."""
    from ..passes.costs import PRESETS

    model, ids = exchanging(shape, torch.bfloat16)
    call = compiled(model, None)
    step(call, model, ids), step(call, model, ids)
    compute = seconds(lambda: step(call, model, ids), rounds)
    emulated.LINK.carried = 0
    step(call, model, ids)
    payload = emulated.LINK.carried
    keep({"variant": "stock without a delay", "compute_ms": compute * 1e3, "payload_mb": payload / 1e6, "shape": shape.__dict__})
    for ratio in ratios:
        rate = payload / (ratio * compute)
        rates = {**PRESETS["h100-nvlink"].__dict__, "link_bytes": rate, "link_latency": 0.0}
        for name, (options, chunks) in VARIANTS.items():
            keep({"ratio": ratio, "variant": name,
                  **timed(shape, None if options is None else {**options, "rates": rates}, chunks, rate, rounds,
                          trace if name == "farskip" and ratio == ratios[0] else None)})


def timed(shape: Shape, options: dict | None, chunks: int, rate: float, rounds: int, trace: Path | None) -> dict:
    import farskip_fx as fs

    model, ids = exchanging(shape, torch.bfloat16, chunks=chunks)
    own = compiled(model, options)
    one = lambda: step(own, model, ids)     # noqa: E731
    one(), one()
    torch.cuda.reset_peak_memory_stats()
    row = {"fast_ms": seconds(one, rounds) * 1e3, "peak_gb": torch.cuda.max_memory_allocated() / 1e9}
    with emulated.slow(rate):
        one()
        row["slow_ms"] = seconds(one, rounds) * 1e3
        row.update(traced(one, trace))
    if options is not None and options.get("overlap", True):
        row["schedules"] = [{"moved": s.moved, "before_ms": s.before_s * 1e3, "after_ms": s.after_s * 1e3,
                             "bound_ms": s.bound_s * 1e3, "reason": str(s.reason)} for s in fs.last_reports()[-1].schedules]
    return row


# --- 4 trace ------------------------------------------------------------------------------------------------------
def traced(run: Callable[[], object], path: Path | None) -> dict:
    """Milliseconds in which the link is busy, and the share of it in which other kernels run."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        run()
        torch.cuda.synchronize()
    if path is not None:
        profiler.export_chrome_trace(str(path))
    kernels = [(e.time_range.start, e.time_range.end, e.name) for e in profiler.events()
               if e.device_type == torch.autograd.DeviceType.CUDA and e.time_range.end > e.time_range.start]
    busy = [(a, b) for a, b, name in kernels if "spin_kernel" in name]
    beside = _union([(a, b) for a, b, name in kernels if "spin_kernel" not in name])
    total = sum(b - a for a, b in busy)
    covered = sum(max(0.0, min(b, d) - max(a, c)) for a, b in busy for c, d in beside)
    return {"link_busy_ms": total / 1e3, "hidden": covered / total if total else None}


def _union(spans: list[tuple[float, float]]) -> list[tuple[float, float]]:
    joined: list[list[float]] = []
    for begin, end in sorted(spans):
        if joined and begin <= joined[-1][1]:
            joined[-1][1] = max(joined[-1][1], end)
        else:
            joined.append([begin, end])
    return [(a, b) for a, b in joined]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m farskip_fx.bench.gpu", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=("numbers", "times", "order"), default=("numbers", "times", "order"),
                        help="the trace comes with the times (all)")
    parser.add_argument("--ratio", type=float, nargs="+", default=[1.0, 0.5], help="exchanges alone over compute alone")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--trace", type=Path, help="write the profiler's trace of our step there")
    given = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("gpu-check: skipped, torch sees no NVIDIA GPU")
        return 0
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    emulated.init()
    result: dict = {"card": torch.cuda.get_device_name(), "torch": torch.__version__, "date": time.strftime("%Y-%m-%d"),
                    "numbers": [], "times": [], "kernels_in_flight": {}}

    def kept() -> None:     # whatever comes next may fail
        if given.json:
            given.json.write_text(json.dumps(result, indent=1))

    def keep(row: dict) -> None:
        result["times"].append(row)
        print(row, flush=True)
        kept()

    print(result, flush=True)
    if "numbers" in given.only:
        result["numbers"] = numbers("cuda")
        kept()
    if "times" in given.only:
        times(LARGE, given.ratio, given.rounds, given.trace, keep)
    for name, (options, chunks) in VARIANTS.items() if "order" in given.only else ():
        result["kernels_in_flight"][name] = order(options, chunks)
        print(name, result["kernels_in_flight"][name], flush=True)
    kept()
    wrong = [row for row in result["numbers"] if "error" in row or row["max_diff"] > 1e-4 or row["grad_diff"] > 1e-4]
    dist.destroy_process_group()
    print("gpu-check:", f"WRONG: {wrong}" if wrong else "numbers agree")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
