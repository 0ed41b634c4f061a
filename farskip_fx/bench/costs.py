"""How far predicted costs are from a step that really runs, by kind: from formulas and rates, and from kernels that were
measured at their own shapes.

    python -m farskip_fx.bench.costs                                    every family, forward and forward + backward
    python -m farskip_fx.bench.costs --family deepseek --tokens 512

One process, without exchanges: compute alone. Measured is torch.profiler's time of each operator, and for loops what is left of
the step. Needs a quiet core.
"""
from __future__ import annotations

import argparse
from collections.abc import Iterator

import torch
from rich.console import Console
from rich.table import Table

from ..diagnose.profiling import Cost
from .model import build, tokens
from .spec import BOTH, FAMILIES, Shape


def costs_of(shape: Shape, *, train: bool) -> Iterator[tuple[Cost, Cost]]:
    """Each kind of cost, predicted from rates and with measured kernels."""
    import farskip_fx as fs

    from ..calibrate import calibrate_for
    from ..diagnose.profiling import compare

    torch._dynamo.reset()
    decoder, ids = build(shape, 0).model, tokens(shape, 0, 0)
    call = dict(input_ids=ids, use_cache=False)
    plain = calibrate_for(decoder)
    measured = fs.profile_kernels(decoder, rates=plain, gradients=train, **call)
    reports = [fs.explain(decoder, config={"rates": rates}, fold=False, gradients=train, **call) for rates in (plain, measured)]
    fs.apply(decoder, rates=plain)

    def step() -> None:
        with torch.set_grad_enabled(train):
            out = decoder(**call).last_hidden_state
            if train:
                out.sum().backward()

    first = fs.profile(step, warmup=3, report=reports[0])
    return zip(first.costs, compare(reports[1], first.trace).costs, strict=True)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m farskip_fx.bench.costs", description=__doc__.splitlines()[0])
    parser.add_argument("--family", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--tokens", type=int, default=1024, metavar="N", help="of the sequence (1024)")
    args = parser.parse_args(argv)
    console = Console(width=120)
    table = Table(title="a step, ms", title_justify="left")
    for heading in ("family", "mode", "cost", "measured", "from rates", "", "kernels measured", ""):
        table.add_column(heading, justify="left" if heading in ("family", "mode", "cost") else "right")
    for family in args.family:
        for mode in BOTH:
            console.print(f"{family}, {mode} ...", highlight=False)
            shape = Shape(family=family, layers=2, tokens=args.tokens, top_k=1 if family == "llama4" else 2)
            for rates, kernels in costs_of(shape, train=mode == "train"):
                table.add_row(family, mode, rates.kind, f"{rates.measured_s * 1e3:.1f}", *_beside(rates), *_beside(kernels))
    console.print(table)


def _beside(cost: Cost) -> tuple[str, str]:
    return f"{cost.predicted_s * 1e3:.1f}", f"{cost.predicted_s / cost.measured_s - 1:+.0%}" if cost.measured_s else ""


if __name__ == "__main__":
    main()
