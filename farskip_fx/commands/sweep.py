"""``farskip sweep``: short distillation runs, to choose batch and learning rate."""
from __future__ import annotations

import argparse
from pathlib import Path

from .common import screen

TEXT = """\
Short runs of one file, to choose batch and learning rate. As in the paper: first the batches, at the learning rate of the
file, then the learning rates, at the best batch; with --grid every pair. Each trial has a folder under OUTPUT_DIR/sweep. Run it
again after an interruption: finished trials are kept. Works under torchrun."""

END = """\
example, with the paper's values for sequences of 1024 tokens:
  farskip sweep run.yaml --batch 64 128 256 --learning-rate 2e-5 4e-5 8e-5 --steps 2000"""


def add(verbs: argparse._SubParsersAction) -> None:
    sweep = verbs.add_parser("sweep", help="short distillation runs, to choose batch and learning rate", description=TEXT,
                             epilog=END, formatter_class=argparse.RawTextHelpFormatter)
    sweep.add_argument("config", type=Path, metavar="CONFIG.yaml", help="the run, as for farskip distill")
    sweep.add_argument("--batch", nargs="+", type=int, default=[], metavar="N", help="sequences a step, over all ranks (the file's)")
    sweep.add_argument("--learning-rate", nargs="+", type=float, default=[], metavar="R", help="learning rates (the file's)")
    sweep.add_argument("--steps", type=int, default=2000, metavar="N", help="of each trial (2000)")
    sweep.add_argument("--grid", action="store_true", help="every pair of batch and learning rate")
    sweep.add_argument("--metric", default="kl", metavar="NAME",
                       help="of the held-out rows: kl, cross_entropy, bits_per_byte, agree or correct (kl)")
    sweep.add_argument("--output", type=Path, metavar="FOLDER", help="of the trials (OUTPUT_DIR/sweep)")
    sweep.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    from ..distill.sweep import sweep
    sweep(args.config, batches=args.batch, learning_rates=args.learning_rate, steps=args.steps, grid=args.grid, metric=args.metric,
          output=args.output, console=screen())
    return 0
