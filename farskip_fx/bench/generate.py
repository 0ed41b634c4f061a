"""Prefill and decode over a slow link: time to first token and per output token, standard against converted.

    python -m farskip_fx.bench.generate --batch 1 16
    python -m farskip_fx.bench.generate --batch 256 --comm-ratio 1.0 --json build/generate.json

Two ranks hold all tokens and a half of the experts each, as inference servers run expert parallelism: one all-reduce in every
MoE layer, in prefill and for each token. Both variants go through ``generate`` of transformers, greedy, with a cache, compiled
in place by ``farskip_fx.apply``:

    stock    connectivity none, Inductor's own order
    farskip  rewired, scheduled and fenced

The prompts of a batch have ``--tokens`` tokens together, so prefill is as much work for each batch size. The slow link is the
one on which the all-reduces of a prefill alone take ``--comm-ratio`` of a prefill of stock on the fast link; decode sends few
bytes, so latency is what it pays, and a link of network namespaces has less of it than a real one. The logits of every step
are compared with an eager reference without a cache before anything is timed.
"""
from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from .generate_spec import GenerateSpec
from .launch import run_ranks
from .link import KINDS, open_link
from .progress import Progress
from .run import machine, versions
from .spec import FAMILIES, Shape, SpecError
from .table import TOLERANCE

WORKER = "farskip_fx.bench.generate_rank"
QUICK = {"layers": 2, "hidden": 128, "tokens": 128, "moe_intermediate": 64}


def run(spec: GenerateSpec, console: Console, *, kinds: tuple[str, ...] = KINDS, json_path: Path | None = None,
        verbose: bool = False) -> dict:
    """What every batch size took, as written to ``json_path``."""
    spec.check()
    progress, batches = Progress(console), []

    def hear(rank: int, event: dict) -> None:
        if rank != 0:
            return
        if event["event"] == "say":
            progress.say(event["text"])
        elif event["event"] == "result":
            batches.append(event["result"])
            console.print(table_of(event["result"]))

    with open_link(kinds) as link, tempfile.TemporaryDirectory(prefix="farskip-") as folder:
        console.print(f"link: {link.describe()}", highlight=False)
        spec_path = Path(folder) / "spec.json"
        spec.write(spec_path)
        progress.say("starting 2 ranks: importing torch and transformers")
        run_ranks(link, WORKER, spec_path, hear, silence_s=spec.silence_s, idle=progress.idle, verbose=verbose)
        result = {"batches": batches, "shape": spec.shape.__dict__, "link": link.as_dict(), "machine": machine(link.ranks),
                  "versions": versions()}
    if json_path is not None:
        json_path.parent.mkdir(parents=True, exist_ok=True)
        json_path.write_text(json.dumps(result, indent=1) + "\n")
        console.print(f"written to {json_path}", highlight=False)
    return result


def table_of(result: dict) -> RenderableType:
    """One batch size; milliseconds, medians."""
    table = Table(title_justify="left", title=(
        f"batch {result['batch']}, prompts of {result['prompt']} tokens, {result['new_tokens']} new ones, comm/compute "
        f"{result['ratio']:g} in prefill: ms, median of {result['rounds']}"))
    for heading in ("variant", "first token, fast", "slow", "over stock", "each further token, fast", "slow", "over stock",
                    "max diff"):
        table.add_column(heading, justify="left" if heading == "variant" else "right")
    stock = result["variants"][0]
    for one in result["variants"]:
        cells = []
        for what in ("first", "next"):
            cells += [f"{one[f'{what}_fast_ms']:.1f}", f"{one[f'{what}_slow_ms']:.1f}",
                      f"[bold]{stock[f'{what}_slow_ms'] / one[f'{what}_slow_ms']:.2f}x[/]"]
        good = one["max_diff"] <= TOLERANCE
        table.add_row(one["name"], *cells, f"{one['max_diff']:.1e}" if good else f"[bold red]{one['max_diff']:.1e}[/]")
    return Group(table, Text(f"all-reduces alone, slow link: {result['prefill_comm_ms']:.1f} ms of a prefill, "
                             f"{result['decode_comm_ms']:.1f} ms of a token"))


def main(arguments: list[str] | None = None) -> int:
    shape = Shape()
    parser = argparse.ArgumentParser(prog="python -m farskip_fx.bench.generate", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("layers", "hidden", "experts", "moe_intermediate", "top_k"):
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, metavar="N", help=f"({getattr(shape, name)})")
    parser.add_argument("--tokens", type=int, metavar="N", help=f"of all prompts of a batch together ({shape.tokens})")
    parser.add_argument("--family", choices=FAMILIES, default=shape.family, help=f"see farskip bench ({shape.family})")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16], metavar="B", help="sequences (1 16)")
    parser.add_argument("--new-tokens", type=int, default=8, metavar="N", help="that are generated (8)")
    parser.add_argument("--comm-ratio", type=float, default=0.5, metavar="R", help="of a prefill, on the slow link (0.5)")
    parser.add_argument("--rounds", type=int, metavar="N", help="each times everything once (6; quick 2)")
    parser.add_argument("--budget", type=float, default=40.0, metavar="S", help="seconds for the rounds of a batch size (40)")
    parser.add_argument("--quick", action="store_true", help="a small model where no size is given: its times mean nothing")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write everything measured there")
    parser.add_argument("--no-netns", action="store_true", help="loopback, no emulated link")
    parser.add_argument("--verbose", action="store_true", help="show what rank 0's libraries print")
    args = parser.parse_args(arguments)
    given = {name: getattr(args, name) for name in ("layers", "hidden", "experts", "moe_intermediate", "top_k", "tokens")
             if getattr(args, name) is not None}
    usual = {"family": args.family, **({"top_k": 1} if args.family == "llama4" else {})}
    spec = GenerateSpec(shape=replace(shape, **{**usual, **(QUICK if args.quick else {}), **given}), batches=tuple(args.batch),
                        new_tokens=args.new_tokens, ratio=args.comm_ratio, budget_s=args.budget,
                        rounds=args.rounds if args.rounds is not None else (2 if args.quick else 6))
    try:
        result = run(spec, Console(width=None if sys.stdout.isatty() else 140), json_path=args.json, verbose=args.verbose,
                     kinds=("loopback",) if args.no_netns else KINDS)
    except SpecError as error:
        parser.error(str(error))
    wrong = [one for batch in result["batches"] for one in batch["variants"] if not one["max_diff"] <= TOLERANCE]
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
