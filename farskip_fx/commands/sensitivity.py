"""``farskip sensitivity``: which layers to convert."""
from __future__ import annotations

import argparse
from pathlib import Path

from .common import screen

TEXT = """\
Which layers to convert: the KL of converting each layer, or one half of it, alone; the communication that each choice hides, by
prediction; and the least KL for a wanted share of that. Reads the file of farskip distill and trains nothing. Of its part
distill count choices, deployment (ep, tokens, context, rates: where the model will run), scan_batches, and layers: auto:SHARE."""


def add(verbs: argparse._SubParsersAction) -> None:
    scan = verbs.add_parser("sensitivity", help="which layers to convert: KL of each, and what it hides",
                            description=TEXT, formatter_class=argparse.RawTextHelpFormatter)
    scan.add_argument("config", type=Path, metavar="CONFIG.yaml", help="the run, as for farskip distill")
    scan.add_argument("--share", type=float, metavar="S", help="of the hidden time that is kept (the file's auto:SHARE, or 0.9)")
    scan.add_argument("--json", type=Path, metavar="PATH", help="write the scan there")
    scan.add_argument("--svg", type=Path, metavar="PATH", help="draw the front there")
    scan.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    from ..distill.sensitivity_command import scan
    scan(args.config, screen(), share=args.share, json=args.json, svg=args.svg)
    return 0
