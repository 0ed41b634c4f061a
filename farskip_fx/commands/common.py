"""What several verbs have in common."""
from __future__ import annotations

import argparse
import os
from pathlib import Path

from rich.console import Console

from ..exchanges import EXCHANGES
from ..passes.costs import PRESETS
from ..payload import PAYLOADS


def screen() -> Console:
    """The terminal; into a log, lines wide enough for the tables."""
    console = Console()
    if not console.is_terminal and "COLUMNS" not in os.environ:
        return Console(width=120)
    return console


def add_model(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("model", type=Path, metavar="MODEL",
                      help="config.json, a folder with one, or a Python file with build()")


def add_place(verb, *, tokens: int) -> None:
    """Where a model runs, or would run."""
    verb.add_argument("--ep", type=int, default=1, metavar="N", help="ranks that the experts are split over (1: no exchanges)")
    verb.add_argument("--tokens", type=int, default=tokens, metavar="N", help=f"of a sequence ({tokens})")
    verb.add_argument("--batch", type=int, default=1, metavar="N", help="sequences on a rank (1)")
    verb.add_argument("--train", action="store_true", help="forward and backward")


ONE_GROUP = [name for name in EXCHANGES if name != "hierarchical"]       # which needs a mesh of two dimensions


def add_exchange(verb) -> None:
    """Options of ``expert_parallel``."""
    verb.add_argument("--exchange", choices=ONE_GROUP, default="all_to_all", help="how tokens travel (all_to_all)")
    verb.add_argument("--chunks", type=int, default=1, metavar="N", help="parts of the tokens that travel one after the other (1)")
    verb.add_argument("--payload", choices=list(PAYLOADS), help="how rows are rounded to travel (not)")


def exchange_of(args: argparse.Namespace) -> dict:
    return {"exchange": args.exchange, "chunks": args.chunks, "payload": args.payload}


def add_rates(verb) -> None:
    verb.add_argument("--rates", metavar="RATES", help=f"of device and link: {', '.join(PRESETS)}, or a file of farskip calibrate "
                      "(one CPU core and a slow link)")
