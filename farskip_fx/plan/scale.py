"""The tables of docs/scale.md: every published model at full size, rewired and scheduled, with 8 to 1024 ranks.

    python -m farskip_fx.plan.scale                     # all; a process for each row, so that its memory is its own
    python -m farskip_fx.plan.scale deepseek-v3 --ep 64
    python -m farskip_fx.plan.scale --unfolded deepseek-v3

Contract: names in, rows of Markdown out. Each row is ``explain`` of the whole model on a fake process group: traced, rewired,
lowered and scheduled, forward and backward.
"""
from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from types import SimpleNamespace

from ..config import FarskipConfig
from ..diagnose.explain import explain, graphs_of
from ..diagnose.planned import planned, ranks_for
from ..passes.costs import PRESETS
from ..passes.schedule import schedule
from .models import CONFIGS, experts_of, source_of
from .stand_ins import ATTENTION, stand_ins

RANKS = (8, 64, 256, 1024)
TOKENS = 4096
RATES = "h100-infiniband"
_LIMIT_S = 900
HEADINGS = ("model", "ep", "layers", "rewired", "refused", "exchanges a step", "GiB sent a step", "exposed before, ms",
            "exposed after, ms", "step before, ms", "step after, ms", "seconds", "CPU seconds", "GiB")
_EMPTY = " |" * (len(HEADINGS) - 3)


def row_of(name: str, ep: int, *, tokens: int = TOKENS) -> dict:
    """One model with ``ep`` ranks, in this process."""
    start, busy = time.perf_counter(), time.process_time()
    with source_of(name) as path, stand_ins(), ranks_for(ep):
        model, inputs = planned(path, tokens=tokens, training=True, ep=ep, attention=ATTENTION)
        experts = experts_of(model.config)
        report = explain(model, config=FarskipConfig(rates=PRESETS[RATES]), gradients=True, **inputs)
    phases = report.phases
    calls = [c for phase in phases for c in phase.after.collectives if c.layer is not None]
    # Counts travel in front of each dispatch; with known splits nothing reads them, so they belong to no layer.
    counts = sum(c.part == "dispatch" for c in phases[0].after.collectives) if phases else 0
    refused = [f"layer {l.index}: {l.reason}" for l in report.layers if l.reason is not None]
    if report.rewired is None:
        refused = [str(report.unchanged)]
    return {"model": name, "ep": ep, "layers": len(report.layers), "rewired": report.rewired.rewired if report.rewired else 0,
            "refused": refused, "exchanges": len(calls) + counts, "bytes": sum(c.bytes for c in calls), "experts": experts,
            "exposed_before_s": sum(p.before.exposed_s for p in phases),
            "exposed_after_s": sum(p.after.exposed_s for p in phases),
            "before_s": sum(p.before.seconds for p in phases), "after_s": sum(p.after.seconds for p in phases),
            "phases": len(phases), "seconds": time.perf_counter() - start, "cpu_s": time.process_time() - busy,
            "memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}


def text_of(row: dict) -> str:
    refused = "; ".join(row["refused"]) or "0"
    cells = [row["model"], row["ep"], row["layers"], row["rewired"], refused, row["exchanges"], f"{row['bytes'] / 2**30:.1f}",
             *(f"{row[key] * 1e3:,.1f}" for key in ("exposed_before_s", "exposed_after_s", "before_s", "after_s")),
             f"{row['seconds']:.0f}", f"{row['cpu_s']:.0f}", f"{row['memory'] / 2**30:.1f}"]
    return "| " + " | ".join(map(str, cells)) + " |"


def unfolded(name: str, ep: int) -> dict:
    """Seconds of ``schedule`` for all layers at once: nothing is folded."""
    with source_of(name) as path, stand_ins(), ranks_for(ep):
        model, inputs = planned(path, tokens=TOKENS, training=True, ep=ep, attention=ATTENTION)
        graphs, _ = graphs_of(model, gradients=True, fold=False, **inputs)
        found = []
        for graph in graphs:
            start, busy = time.perf_counter(), time.process_time()
            schedule(graph.graph, rates=PRESETS[RATES])
            found.append({"nodes": len(graph.graph.nodes), "seconds": time.perf_counter() - start,
                          "cpu_s": time.process_time() - busy})
    return {"model": name, "ep": ep, "graphs": found}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m farskip_fx.plan.scale", description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", metavar="MODEL", help=f"of {', '.join(CONFIGS)} (all)")
    parser.add_argument("--ep", type=int, nargs="+", default=list(RANKS), metavar="N")
    parser.add_argument("--here", action="store_true", help="one row, in this process, as JSON")
    parser.add_argument("--unfolded", action="store_true", help="seconds of schedule() on the whole graph instead")
    args = parser.parse_args(argv)
    names = args.models or list(CONFIGS)
    if args.unfolded:
        for name in names:
            print(json.dumps(unfolded(name, args.ep[0] if len(args.ep) == 1 else RANKS[0])), flush=True)
        return 0
    if args.here:
        print(json.dumps(row_of(names[0], args.ep[0])))
        return 0
    print("| " + " | ".join(HEADINGS) + " |\n|" + "---|" * len(HEADINGS), flush=True)
    failed = False
    for name in names:
        most = experts_of(SimpleNamespace(**CONFIGS[name]))
        for ep in args.ep:
            if most % ep:
                print(f"| {name} | {ep} | {most} experts: {ep} ranks do not divide them |" + _EMPTY, flush=True)
                continue
            failed = not _run(name, ep) or failed
    return int(failed)


def _run(name: str, ep: int) -> bool:
    command = [sys.executable, "-m", "farskip_fx.plan.scale", name, "--ep", str(ep), "--here"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_LIMIT_S, check=False)
    except subprocess.TimeoutExpired:
        print(f"| {name} | {ep} | not done after {_LIMIT_S} s |" + _EMPTY, flush=True)
        return False
    if done.returncode:
        print(f"| {name} | {ep} | failed: {done.stderr.strip().splitlines()[-1]} |" + _EMPTY, flush=True)
        return False
    print(text_of(json.loads(done.stdout.strip().splitlines()[-1])), flush=True)
    return True


if __name__ == "__main__":
    sys.exit(main())
