"""``farskip demo``: the main job, shown step by step."""
from __future__ import annotations

import argparse
import os
from dataclasses import replace
from pathlib import Path

from ..bench.run import run
from ..bench.spec import VARIANTS, Spec
from .bench import report
from .common import screen

TEXT = """\
The main job: HF Qwen3-MoE (hidden 512, 4 layers, 8 experts, top-2, 2048 tokens a rank) over two ranks: what is rewired,
which exchange hides behind what, and the times of five variants (the last: exchanges in four chunks), forward and
forward+backward. About ten minutes on two cores; with --quick two layers, forward only, four variants, in under three."""


def add(verbs: argparse._SubParsersAction) -> None:
    demo = verbs.add_parser("demo", help="the main job, shown step by step", description=TEXT,
                            formatter_class=argparse.RawTextHelpFormatter)
    demo.add_argument("--quick", action="store_true", default=os.environ.get("QUICK", "") not in ("", "0"),
                      help="two layers, forward only; the environment variable QUICK=1 does the same")
    demo.add_argument("--json", type=Path, default=Path("build/demo.json"), metavar="PATH",
                      help="where the figures go (build/demo.json)")
    demo.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    spec = Spec(variants=(*VARIANTS, "farskip_chunks"), chunks=4, budget_s=75.0)
    if args.quick:
        spec = replace(spec, forward=replace(spec.forward, layers=2), variants=VARIANTS, modes=("forward",), rounds=5,
                       budget_s=25.0)
    console = screen()
    console.print(f"the demo: {'two layers, forward only; about three' if args.quick else 'about ten'} minutes on two "
                  "cores that do nothing else", highlight=False)
    return report(run(spec, console, json_path=args.json))
