"""``farskip bisect``: a model from a configuration or a script, run until it is known what is wrong; on every rank."""
from __future__ import annotations

import argparse
from pathlib import Path

import torch
from rich.console import Console
from rich.text import Text

from ..diagnose.bisect import bisect
from ..diagnose.planned import planned, ranks_for
from ..report import rank
from .common import add_model, add_place, screen


def search(source: Path, console: Console, *, ep: int, tokens: int, batch: int, training: bool, slower: bool, options: dict,
        output: Path) -> int:
    """Exit status: 0 where nothing is wrong, else 1."""
    with ranks_for(ep, real=True):
        own = rank()
        if torch.cuda.is_available():
            torch.set_default_device(torch.device("cuda", own % torch.cuda.device_count()))

        def say(line: object) -> None:
            if own == 0:
                console.print(Text(str(line)))

        # Where a rank has ids of its own, they are the same in each run of this command.
        torch.manual_seed(own)
        model, inputs = planned(source, tokens=tokens, batch=batch, training=training, ep=ep, weights=True)
        if source.suffix != ".py" and not slower:
            model.float()       # what a coarser dtype rounds would hide the fault
        found = bisect(model, config=options, gradients=training, slower=slower, told=say,
                       source=source if source.suffix == ".py" else None, **inputs)
        say(found.verdict)
        if not found.ok:
            path = found.write(output)
            say(f"written: {path}")
    return int(not found.ok)


TEXT = """\
Find by halving what makes a converted model compute something else than its connectivity says, or run slower than stock: the
stage (rewire, causal masks, AOTAutograd, Inductor, schedule, fence, attention in parts, or a cache), the layer, and the half of
it; and write the smallest reproducer as a script, which exits with 1 as long as it is wrong. Exit status: 0 if nothing is wrong,
else 1.

MODEL is as for farskip explain. Weights are drawn at random, in float32, unless its build() makes others. Every rank runs it:

  torchrun --nproc-per-node 2 -m farskip_fx.cli bisect config.json --ep 2 --train

For a model of your own in Python: farskip_fx.bisect(model, **inputs)."""


def add(verbs: argparse._SubParsersAction) -> None:
    verb = verbs.add_parser("bisect", help="which stage, layer and half makes outputs wrong, or the model slower; a reproducer",
                            description=TEXT, formatter_class=argparse.RawTextHelpFormatter)
    add_model(verb)
    verb.add_argument("--connectivity", default="farskip", metavar="NAME", help="as in explain (farskip)")
    verb.add_argument("--inner", default="inductor", metavar="NAME", help="inductor (usual), aot_eager or eager")
    add_place(verb, tokens=128)
    verb.add_argument("--slower", action="store_true", help="ask for time instead of outputs")
    verb.add_argument("--output", type=Path, default=Path("bisect"), metavar="FOLDER", help="of the script (bisect)")
    verb.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    return search(args.model, screen(), ep=args.ep, tokens=args.tokens, batch=args.batch, training=args.train,
                  slower=args.slower, options={"connectivity": args.connectivity, "inner": args.inner},
                  output=args.output)
