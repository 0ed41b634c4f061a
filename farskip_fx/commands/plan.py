"""``farskip plan``: a model at full size on devices that are not here."""
from __future__ import annotations

import argparse
import json
from pathlib import Path

from ..connectivity import BUILT_IN
from ..plan import devices
from ..plan.devices import Link, device_of, link_of
from ..plan.exchanges import Network
from ..plan.models import PUBLISHED
from ..plan.page import page
from ..plan.planner import Plan, Planner, make
from ..plan.show import show
from ..plan.traced import sizes, trace
from .calibrate import rates_of
from .common import screen


def planned_step(source: str, *, gpus: int, ep: int | None, dp: int | None, device: str, link: str, inside: str | None,
                 node: int, tokens: int, context: int | None, training: bool, connectivity: str, shard: bool,
                 rates: str | None) -> Plan:
    if rates is None:
        there = device_of(device)
        network = Network(link_of(inside or there.inside), link_of(link), node)
        figures, capacity = devices.rates_of(there, network.between), there.capacity
    else:                                   # measured: one link, whatever the number of ranks
        figures, capacity, device = rates_of(rates), None, rates
        between = Link(figures.link_bytes, 1.0, figures.link_latency, rates)
        network, link = Network(between, between, node), f"of {rates}"
    traced = trace(source, tokens=tokens, context=context, training=training)
    ep = ep or (gpus // dp if dp else max((n for n in sizes(traced.experts, gpus)), default=gpus))
    planner = Planner(traced, figures, network, connectivity=connectivity, capacity=capacity, shard=shard)
    return make(planner, gpus=gpus, ep=ep, dp=dp or gpus // ep, device=device, link=link)


TEXT = f"""\
What a step would take on devices that are not here: step time, exposed communication and memory of a rank, with the original
connectivity, with another, and with two halves of the batch that overlap exactly; which split of the devices is best; on which
links and numbers of ranks the gain ends. A prediction from shapes and a table of devices: nothing is run, no weight is made.

MODEL is {', '.join(PUBLISHED)}, or a Hugging Face config.json or the folder with it."""

END = """\
examples:
  farskip plan deepseek-v3 --gpus 64 --ep 32 --dp 2 --link 50GB/s --device h100 --train
  farskip plan qwen3-235b-a22b --gpus 256 --link infiniband-400g --device h200 --train --shard --html build/plan.html
  farskip plan config.json --gpus 8 --rates rates.json        # of farskip calibrate"""


def add(verbs: argparse._SubParsersAction) -> None:
    verb = verbs.add_parser("plan", help="step time, memory and gain of a model at full size, predicted", description=TEXT,
                            epilog=END, formatter_class=argparse.RawTextHelpFormatter)
    verb.add_argument("model", metavar="MODEL")
    where = verb.add_argument_group("where it would run")
    where.add_argument("--gpus", type=int, default=8, metavar="N", help="devices in all (8)")
    where.add_argument("--ep", type=int, metavar="N", help="ranks that the experts are split over (as many as can be)")
    where.add_argument("--dp", type=int, metavar="N", help="replicas of the experts (gpus / ep)")
    where.add_argument("--device", default="h100", metavar="NAME", help=f"{', '.join(devices.DEVICES)} (h100)")
    where.add_argument("--link", default="infiniband-400g", metavar="LINK",
                       help=f"of each device to other nodes: {', '.join(devices.LINKS)},\n"
                            "or a rate such as 50GB/s (infiniband-400g)")
    where.add_argument("--inside", metavar="LINK", help="likewise, inside of a node (what the device has)")
    where.add_argument("--node", type=int, default=8, metavar="N", help="devices of a node (8)")
    where.add_argument("--rates", metavar="PATH", help="of farskip calibrate, instead of the table")
    what = verb.add_argument_group("what would run")
    what.add_argument("--tokens", type=int, default=4096, metavar="N", help="of a rank in a step (4096)")
    what.add_argument("--context", type=int, metavar="N", help="tokens of a sequence (as --tokens)")
    how = what.add_mutually_exclusive_group()
    how.add_argument("--train", action="store_true", help="forward, backward, means of gradients, AdamW")
    how.add_argument("--forward", action="store_true", help="the forward alone (usual)")
    what.add_argument("--shard", action="store_true", help="dense parameters in slices over all ranks (ZeRO-3)")
    what.add_argument("--connectivity", default="farskip", choices=[n for n in BUILT_IN if n != "none"], help="(farskip)")
    out = verb.add_argument_group("what is shown")
    out.add_argument("--json", action="store_true", help="the plan as JSON on stdout")
    out.add_argument("--html", type=Path, metavar="PATH", help="write a page")
    verb.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    plan = planned_step(args.model, gpus=args.gpus, ep=args.ep, dp=args.dp, device=args.device, link=args.link,
                        inside=args.inside, node=args.node, tokens=args.tokens, context=args.context, training=args.train,
                        connectivity=args.connectivity, shard=args.shard, rates=args.rates)
    console = screen()
    if args.json:
        print(json.dumps(plan.to_dict(), indent=1))
    else:
        show(plan, console)
    if args.html is not None:
        args.html.parent.mkdir(parents=True, exist_ok=True)
        args.html.write_text(page(plan), encoding="utf-8")
        if not args.json:
            console.print(f"written: {args.html}", highlight=False)
    return 0
