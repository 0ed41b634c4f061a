"""``farskip profile``: a model from a configuration or a script, compiled, run and measured on every rank."""
from __future__ import annotations

import argparse
from pathlib import Path

import torch
from rich.console import Console
from rich.text import Text

from ..caches import graph_caches_off
from ..convert import apply
from ..diagnose.planned import planned, ranks_for
from ..diagnose.profiling import Profile, profile
from ..report import rank
from ..view.terminal import megabytes, milliseconds, table
from ..view.text import plain
from .calibrate import rates_of
from .common import add_model, add_place, add_rates, screen


def measure(source: Path, console: Console, *, ep: int, tokens: int, batch: int, training: bool, steps: int, options: dict,
        trace: Path | None) -> None:
    with ranks_for(ep, real=True), graph_caches_off():      # a graph out of a cache has no schedule to compare with
        if torch.cuda.is_available():
            torch.set_default_device(torch.device("cuda", rank()))
        model, inputs = planned(source, tokens=tokens, batch=batch, training=training, ep=ep, weights=True)
        apply(model, **options)
        first = rank() == 0
        if first:
            console.print("compiling ...", highlight=False)

        def step() -> None:
            with torch.set_grad_enabled(training):
                logits = model(**inputs).logits
                if training:
                    logits.float().logsumexp(-1).mean().backward()

        found = profile(step, model, steps=steps, warmup=2)
        if not first:
            return
        show(found, console)
        if trace is not None:
            console.print(f"written: {found.to_trace(trace)}", highlight=False)


def show(found: Profile, console: Console) -> None:
    console.print(f"{milliseconds(found.step_s)} a step (median of {found.steps})", highlight=False)
    drawn = table("exposed communication of each collective", "phase", "collective", "bytes", "predicted", "measured", right=3)
    for row in found.exposures:
        drawn.add_row(row.phase, Text(plain(row.place)), megabytes(row.bytes), milliseconds(row.predicted_s),
                      milliseconds(row.measured_s))
    drawn.add_row("all", "", "", milliseconds(found.predicted_s), milliseconds(found.measured_s))
    console.print(drawn)
    drawn = table("costs", "kind", "rate", "predicted", "measured", right=2)
    for cost in found.costs:
        drawn.add_row(cost.kind, cost.rate, milliseconds(cost.predicted_s), milliseconds(cost.measured_s))
    console.print(drawn)
    console.print(Text(found.advice()))


TEXT = """\
Compile a model with random weights, run a few steps under torch.profiler, and set what each collective leaves exposed beside
what the schedule predicted; then say which cost was most wrong, and the rates to schedule with. Every rank runs it:

  torchrun --nproc-per-node 2 -m farskip_fx.cli profile config.json --ep 2 --train --trace build/measured.json

MODEL is as for farskip explain. For a model of your own with its weights: farskip_fx.profile(step, model)."""


def add(verbs: argparse._SubParsersAction) -> None:
    verb = verbs.add_parser("profile", help="measured beside predicted: exposed communication, and which cost is wrong",
                            description=TEXT, formatter_class=argparse.RawTextHelpFormatter)
    add_model(verb)
    verb.add_argument("--connectivity", default="farskip", metavar="NAME", help="as in explain (farskip)")
    add_place(verb, tokens=2048)
    verb.add_argument("--steps", type=int, default=3, metavar="N", help="under the profiler (3)")
    add_rates(verb)
    verb.add_argument("--trace", type=Path, metavar="PATH", help="write torch.profiler's trace with the predicted lanes")
    verb.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    measure(args.model, screen(), ep=args.ep, tokens=args.tokens, batch=args.batch, training=args.train, steps=args.steps,
            options={"connectivity": args.connectivity, **({"rates": rates_of(args.rates)} if args.rates else {})},
            trace=args.trace)
    return 0
