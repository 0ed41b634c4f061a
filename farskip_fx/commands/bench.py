"""``farskip bench``: variants of a model on ranks over an emulated slow link."""
from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ..bench.link import KINDS
from ..bench.run import run, wrong
from ..bench.spec import BOTH, FAMILIES, MODES, ORDER, PEERS, REWIRED, ROUTINGS, VARIANTS, Shape, Spec
from .common import ONE_GROUP, screen

TEXT = """\
Time a Mixture-of-Experts model on two ranks over an emulated slow link.

Two processes, one core each, stand in two network namespaces joined by a shaped link. A Hugging Face model is built from
the sizes below and its experts are split over both. Every variant is compiled in one process, checked against an eager
reference, and timed in turn with the others, on the fast link (not shaped) and on the slow one. The slow link's rate is
found by measuring: it is the one at which the model's exchanges alone take --comm-ratio of its compute alone.

modes:
  forward           no gradients
  train             forward + backward; gradients are not averaged
  step              forward + backward with the means of gradients in its graph (they count among the exchanges), clipping,
                    AdamW; the same in every variant. --dp N has N replicas of the two ranks.

variants:
  stock             standard connectivity, stock Inductor (always measured)
  inductor_overlap  standard connectivity, Inductor's own overlap passes
  rewired_stock     rewired, stock Inductor
  farskip           rewired, scheduled and fenced

peers (--peers, or by name; forward and train): what a user could pick instead, checked and timed like the others
  transformers_ep   transformers' own expert parallelism, all_to_all; compiled or eager, whichever is faster
  two_batches       exact overlap by hand: the tokens in two halves, one's exchanges behind the other's compute
  overlapped_eager  farskip by hand: a loop over layers with asynchronous handles, compiled between

others (by name): ours, with other exchanges
  exact_chunks      standard connectivity, exchanges in --chunks, scheduled and fenced: the same numbers as stock
  farskip_chunks    as farskip, exchanges in --chunks
  farskip_int8      as farskip, rows and their gradients travel in int8: near the reference, not equal

families:
  qwen3_moe         every layer an MoE, no shared expert
  deepseek          MLA, shared experts, the first layer dense (DeepSeek-V2-Lite, scaled down)
  llama4            top-1, a shared expert, every second layer dense (the shape of Llama 4, in Qwen2-MoE's code)"""

END = """\
examples:
  farskip bench --quick                               a small model, forward only: does it work here?
  farskip bench --mode train --layers 3 --tokens 1024
  farskip bench --comm-ratio 0.25 0.5 1.0 --json build/curve.json
  farskip bench --peers --family deepseek --routing skewed --comm-ratio 1.0
  farskip bench --mode step --layers 3 --tokens 1024 --comm-ratio 1.0            a whole training step
  farskip bench --mode step --dp 2 --layers 3 --tokens 1024 --comm-ratio 1.0     the same, dp 2 x ep 2: four ranks

The link needs root, or a user namespace (`unshare -Urn true` tells whether they are allowed here). Without either all
ranks use loopback; that is said, and slow then equals fast. Nothing else should run on the cores. With more ranks than
cores only ratios mean something: ranks that share a core slow each other down."""

SIZES = {
    "layers": "decoder layers",
    "hidden": "width of the residual stream",
    "tokens": "tokens a rank, one sequence",
    "experts": "routed experts, split over two ranks",
    "top_k": "experts a token",
    "moe_intermediate": "width of an expert",
}

QUICK = {"layers": 2, "hidden": 128, "tokens": 256, "moe_intermediate": 64}


def add(verbs: argparse._SubParsersAction) -> None:
    bench = verbs.add_parser("bench", help="time a model on two ranks over an emulated slow link",
                             description=TEXT, epilog=END, formatter_class=argparse.RawTextHelpFormatter)
    shape = Shape()
    model = bench.add_argument_group("model")
    for name, what in SIZES.items():
        flag, usual = f"--{name.replace('_', '-')}", getattr(shape, name)
        model.add_argument(flag, type=int, metavar="N", help=f"{what} ({usual})")
    model.add_argument("--family", choices=FAMILIES, default=shape.family, help=f"see above ({shape.family})")
    model.add_argument("--routing", choices=ROUTINGS, default=shape.routing,
                       help="skewed: some experts get far more tokens, most of them on rank 0 (balanced)")
    model.add_argument("--seed", type=int, default=0, metavar="N", help="of weights and tokens (0)")
    what = bench.add_argument_group("what is measured")
    what.add_argument("--mode", choices=(*MODES, "both"), default="forward",
                      help="see above; both is forward and train (forward)")
    what.add_argument("--dp", type=int, default=1, metavar="N", help="replicas, mode step only: 2 N ranks (1)")
    what.add_argument("--bucket-mb", type=float, default=Spec.bucket_mb, metavar="MB",
                      help=f"mode step: MiB of gradients that travel together ({Spec.bucket_mb:g})")
    what.add_argument("--variants", nargs="+", choices=ORDER, default=list(VARIANTS), metavar="NAME",
                      help="some of the above, peers and others too (the first four)")
    what.add_argument("--peers", action="store_true", help="the peers as well")
    what.add_argument("--exchange", choices=[name for name in ONE_GROUP if name != "all_reduce"], default=Spec.exchange,
                      help=f"of expert_parallel, in all variants but transformers' ({Spec.exchange})")
    what.add_argument("--chunks", type=int, default=Spec.chunks, metavar="N",
                      help=f"of the exchanges of exact_chunks and farskip_chunks ({Spec.chunks})")
    what.add_argument("--connectivity", choices=REWIRED, default="farskip",
                      help="of the rewired variants (farskip); the bound that is reported is always that of farskip")
    what.add_argument("--comm-ratio", nargs="+", type=float, default=[0.5], metavar="R",
                      help="exchanges alone over compute alone, slow link; several give the curve (0.5)")
    what.add_argument("--rounds", type=int, metavar="N", help="each times everything once (8; quick 3)")
    what.add_argument("--budget", type=float, default=90.0, metavar="S",
                      help="seconds for the rounds of a mode: fewer rounds where they do not fit (90)")
    what.add_argument("--quick", action="store_true",
                      help="a small model where no size is given: its times mean nothing")
    where = bench.add_argument_group("where")
    where.add_argument("--json", type=Path, metavar="PATH", help="write everything measured there")
    where.add_argument("--no-netns", action="store_true", help="loopback, no emulated link")
    where.add_argument("--verbose", action="store_true", help="show what rank 0's libraries print")
    bench.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    return report(run(spec_of(args), screen(), kinds=("loopback",) if args.no_netns else KINDS, json_path=args.json,
                      verbose=args.verbose))


def spec_of(args: argparse.Namespace) -> Spec:
    usual = {"family": args.family, "routing": args.routing, **({"top_k": 1} if args.family == "llama4" else {})}
    given = {name: getattr(args, name) for name in SIZES if getattr(args, name) is not None}
    shape = replace(Shape(), **{**usual, **(QUICK if args.quick else {}), **given})
    rounds = args.rounds if args.rounds is not None else (3 if args.quick else 8)
    return Spec(forward=shape, train=shape, modes=BOTH if args.mode == "both" else (args.mode,),
                variants=in_order([*args.variants, *(PEERS if args.peers else ())]), ratios=tuple(args.comm_ratio),
                rounds=rounds, budget_s=args.budget, seed=args.seed, dp=args.dp, bucket_mb=args.bucket_mb,
                connectivity=args.connectivity, exchange=args.exchange, chunks=args.chunks)


def in_order(variants: Sequence[str]) -> tuple[str, ...]:
    return tuple(name for name in ORDER if name == "stock" or name in variants)


def report(result: dict) -> int:
    """The exit status: a run in which a variant computed something else has failed."""
    for line in wrong(result):
        print(f"not the reference's result: {line}", file=sys.stderr)
    return 1 if wrong(result) else 0
