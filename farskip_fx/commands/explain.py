"""``farskip explain``: reports of models that nobody runs."""
from __future__ import annotations

import argparse
from pathlib import Path

import torch.distributed as dist
from rich.console import Console

from ..agreement import check_agreement
from ..config import FarskipConfig
from ..diagnose.explain import explain
from ..diagnose.planned import planned, ranks_for
from ..report import Report
from ..view import terminal
from .calibrate import rates_of
from .common import add_exchange, add_model, add_place, add_rates, exchange_of, screen


def explain_source(source: Path, *, ep: int, tokens: int, batch: int, training: bool, rates: str | None, options: dict,
                   fold: bool, predict: bool, exchange: dict | None = None) -> Report:
    """The report of what ``planned`` builds. Under torchrun every rank makes its own, and they are compared.

    Args:
        exchange: options of ``expert_parallel``.

    Raises:
        CollectiveError: a rank differs; names it, and the first difference.
    """
    config = FarskipConfig.from_dict({**options, **({"rates": rates_of(rates)} if rates else {})})
    with ranks_for(ep):
        model, inputs = planned(source, tokens=tokens, batch=batch, training=training, ep=ep, exchange=exchange)
        report = explain(model, config=config, gradients=training, fold=fold, predict=predict, **inputs)
        if dist.is_initialized() and dist.get_backend() != "fake":
            check_agreement(report)
    return report


def show(report: Report, console: Console, *, layer: int | None, sides: tuple[str, ...], as_json: bool,
         html: Path | None, trace: Path | None) -> None:
    if report.rank:
        return
    if as_json:
        print(report.to_json())
    else:
        terminal.show(report.to_dict(), console, layer=layer, sides=sides)
    for path, write in ((html, report.to_html), (trace, report.to_trace)):
        if path is not None:
            write(path)
            if not as_json:
                console.print(f"written: {path}", highlight=False)


TEXT = """\
What a conversion would do to a model: which blocks were found, what each reads before and after, what is refused and why, which
exchanges there are, what hides behind what, what stays exposed. Nothing is run or compiled, and no weight is made.

MODEL is a Hugging Face config.json or the folder with it, or a Python file with build(), which returns the model, or
(model, inputs) with a dict of what it is called with. Of many equal layers a few are traced (--no-fold: all)."""

END = """\
examples:
  farskip explain config.json --ep 8 --tokens 4096 --rates h100-infiniband
  farskip explain config.json --ep 8 --html build/report.html --trace build/timeline.json
  farskip explain my_model.py --layer 7
  farskip explain config.json --json > a.json; farskip explain config.json --connectivity mlp_only --json > b.json
  farskip diff a.json b.json"""


def add(verbs: argparse._SubParsersAction) -> None:
    verb = verbs.add_parser("explain", help="what a conversion would do to a model, without running it",
                            description=TEXT, epilog=END, formatter_class=argparse.RawTextHelpFormatter)
    add_model(verb)
    what = verb.add_argument_group("conversion")
    what.add_argument("--connectivity", default=None, metavar="NAME", help="farskip (usual), farskip_shared, attn_only, mlp_only, ladder, none")
    what.add_argument("--layers", default=None, metavar="WHICH", help='"all" (usual) or "last:SHARE"')
    where = verb.add_argument_group("where it would run")
    add_place(where, tokens=2048)
    add_exchange(where)
    add_rates(where)
    how = verb.add_argument_group("what is shown")
    how.add_argument("--layer", type=int, metavar="K", help="everything about one layer")
    sides = how.add_mutually_exclusive_group()
    sides.add_argument("--before", action="store_true", help="the original connectivity only")
    sides.add_argument("--after", action="store_true", help="the converted model only")
    how.add_argument("--no-fold", action="store_true", help="trace every layer")
    how.add_argument("--no-predict", action="store_true", help="the rewiring alone, no times")
    how.add_argument("--json", action="store_true", help="the whole report as JSON on stdout")
    how.add_argument("--html", type=Path, metavar="PATH", help="write a page")
    how.add_argument("--trace", type=Path, metavar="PATH", help="write the timelines for Perfetto")
    verb.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    options = {name: getattr(args, name) for name in ("connectivity", "layers") if getattr(args, name) is not None}
    report = explain_source(args.model, ep=args.ep, tokens=args.tokens, batch=args.batch, training=args.train, rates=args.rates,
                            options=options, fold=not args.no_fold, predict=not args.no_predict, exchange=exchange_of(args))
    sides = ("before",) if args.before else ("after",) if args.after else ("before", "after")
    show(report, screen(), layer=args.layer, sides=sides, as_json=args.json, html=args.html, trace=args.trace)
    return 0
