"""The command line: ``farskip explain`` says what would happen to a model, ``farskip diff`` compares two reports, ``farskip
profile`` sets measured beside predicted, ``farskip bisect`` finds what is wrong, ``farskip bench`` measures, ``farskip demo`` shows, ``farskip distill`` trains, ``farskip sweep`` tries, ``farskip sensitivity`` chooses layers.

A verb is a function that adds its options and one that runs; VERBS lists them.
"""
from __future__ import annotations

import argparse
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Sequence

from rich.console import Console

from .bench.launch import RankFailed
from .bench.link import KINDS, LinkRefused
from .bench.run import run, wrong
from .bench.spec import BOTH, MODES, REWIRED, VARIANTS, Shape, Spec, SpecError
from .errors import FarskipError
from .passes.costs import PRESETS

BENCH_TEXT = """\
Time a Mixture-of-Experts model on two ranks over an emulated slow link.

Two processes, one core each, stand in two network namespaces joined by a shaped link. HF Qwen3-MoE is built from the
sizes below and its experts are split over both. Every variant is compiled in one process, checked against an eager
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
  farskip           rewired, scheduled and fenced"""

BENCH_END = """\
examples:
  farskip bench --quick                               a small model, forward only: does it work here?
  farskip bench --mode train --layers 3 --tokens 1024
  farskip bench --comm-ratio 0.25 0.5 1.0 --json build/curve.json
  farskip bench --mode step --layers 3 --tokens 1024 --comm-ratio 1.0            a whole training step
  farskip bench --mode step --dp 2 --layers 3 --tokens 1024 --comm-ratio 1.0     the same, dp 2 x ep 2: four ranks

The link needs root, or a user namespace (`unshare -Urn true` tells whether they are allowed here). Without either all
ranks use loopback; that is said, and slow then equals fast. Nothing else should run on the cores. With more ranks than
cores only ratios mean something: ranks that share a core slow each other down."""

DEMO_TEXT = """\
The main job: HF Qwen3-MoE (hidden 512, 4 layers, 8 experts, top-2, 2048 tokens a rank) over two ranks: what is rewired,
which exchange hides behind what, and the times of four variants, forward and forward+backward. About ten minutes on two
cores; with --quick two layers, forward only, in under three."""

DISTILL_TEXT = """\
Convert a model and train it to agree with what it was. One file says all; run it under torchrun for several ranks, and
again after an interruption. In it:

  model: path/to/checkpoint
  data: {files: ["corpus/*.txt"], length: 1024, held_out: 0.02}
  distill: {connectivity: farskip, teacher: copy}
  training: {output_dir: run, learning_rate: 2.0e-5, max_steps: 2000, bf16: true}

distill holds the fields of farskip_fx.distill.DistillConfig, training those of transformers.TrainingArguments, and lora
(optional) those of peft.LoraConfig, for teacher: shared."""

SWEEP_TEXT = """\
Short runs of one file, to choose batch and learning rate. As in the paper: first the batches, at the learning rate of the
file, then the learning rates, at the best batch; with --grid every pair. Each trial has a folder under OUTPUT_DIR/sweep. Run it
again after an interruption: finished trials are kept. Works under torchrun."""

SWEEP_END = """\
example, with the paper's values for sequences of 1024 tokens:
  farskip sweep run.yaml --batch 64 128 256 --learning-rate 2e-5 4e-5 8e-5 --steps 2000"""

SENSITIVITY_TEXT = """\
Which layers to convert: the KL of converting each layer, or one half of it, alone; the communication that each choice hides, by
prediction; and the least KL for a wanted share of that. Reads the file of farskip distill and trains nothing. Of its part
distill count choices, deployment (ep, tokens, context, rates: where the model will run), scan_batches, and layers: auto:SHARE."""

EXPLAIN_TEXT = """\
What a conversion would do to a model: which blocks were found, what each reads before and after, what is refused and why, which
exchanges there are, what hides behind what, what stays exposed. Nothing is run or compiled, and no weight is made.

MODEL is a Hugging Face config.json or the folder with it, or a Python file with build(), which returns the model, or
(model, inputs) with a dict of what it is called with. Of many equal layers a few are traced (--no-fold: all)."""

EXPLAIN_END = """\
examples:
  farskip explain config.json --ep 8 --tokens 4096 --rates h100-infiniband
  farskip explain config.json --ep 8 --html build/report.html --trace build/timeline.json
  farskip explain my_model.py --layer 7
  farskip explain config.json --json > a.json; farskip explain config.json --connectivity mlp_only --json > b.json
  farskip diff a.json b.json"""

CALIBRATE_TEXT = """\
Measure this device, and the link between ranks under torchrun; the median over ranks is for all of them.

  torchrun --nproc-per-node 8 -m farskip_fx.cli calibrate --dtype bfloat16 --json rates.json

In Python: farskip_fx.apply(model, rates=farskip_fx.calibrate(group))."""

PROFILE_TEXT = """\
Compile a model with random weights, run a few steps under torch.profiler, and set what each collective leaves exposed beside
what the schedule predicted; then say which cost was most wrong, and the rates to schedule with. Every rank runs it:

  torchrun --nproc-per-node 2 -m farskip_fx.cli profile config.json --ep 2 --train --trace build/measured.json

MODEL is as for farskip explain. For a model of your own with its weights: farskip_fx.profile(step, model)."""

BISECT_TEXT = """\
Find by halving what makes a converted model compute something else than its connectivity says, or run slower than stock: the
stage (rewire, AOTAutograd, Inductor, schedule, fence, attention in parts, or a cache), the layer, and the half of it; and write
the smallest reproducer as a script, which exits with 1 as long as it is wrong. Exit status: 0 if nothing is wrong, else 1.

MODEL is as for farskip explain. Weights are drawn at random, in float32, unless its build() makes others. Every rank runs it:

  torchrun --nproc-per-node 2 -m farskip_fx.cli bisect config.json --ep 2 --train

For a model of your own in Python: farskip_fx.bisect(model, **inputs)."""

RATES_HELP = f"of device and link: {', '.join(PRESETS)}, or a file of farskip calibrate (one CPU core and a slow link)"
SIZES = {
    "layers": "decoder layers",
    "hidden": "width of the residual stream",
    "tokens": "tokens a rank, one sequence",
    "experts": "routed experts, split over two ranks",
    "top_k": "experts a token",
    "moe_intermediate": "width of an expert",
}
QUICK_BENCH = {"layers": 2, "hidden": 128, "tokens": 256, "moe_intermediate": 64}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="farskip", description="FarSkip connectivity for MoE models.")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for add in VERBS:
        add(verbs)
    args = parser.parse_args(argv)
    try:
        return args.run(args)
    except (SpecError, LinkRefused, RankFailed, FarskipError) as error:
        print(f"farskip {args.verb}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        done = "; ranks and link are gone" if args.verb in ("bench", "demo") else ""
        print(f"farskip {args.verb}: interrupted{done}", file=sys.stderr)
        return 130


def add_explain(verbs: argparse._SubParsersAction) -> None:
    verb = verbs.add_parser("explain", help="what a conversion would do to a model, without running it",
                            description=EXPLAIN_TEXT, epilog=EXPLAIN_END, formatter_class=argparse.RawTextHelpFormatter)
    verb.add_argument("model", type=Path, metavar="MODEL", help="config.json, a folder with one, or a Python file with build()")
    what = verb.add_argument_group("conversion")
    what.add_argument("--connectivity", default=None, metavar="NAME", help="farskip (usual), attn_only, mlp_only, ladder, none")
    what.add_argument("--layers", default=None, metavar="WHICH", help='"all" (usual) or "last:SHARE"')
    where = verb.add_argument_group("where it would run")
    where.add_argument("--ep", type=int, default=1, metavar="N", help="ranks that the experts are split over (1: no exchanges)")
    where.add_argument("--tokens", type=int, default=2048, metavar="N", help="of a sequence (2048)")
    where.add_argument("--batch", type=int, default=1, metavar="N", help="sequences on a rank (1)")
    where.add_argument("--train", action="store_true", help="forward and backward")
    where.add_argument("--rates", metavar="RATES", help=RATES_HELP)
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
    verb.set_defaults(run=run_explain)


def run_explain(args: argparse.Namespace) -> int:
    from .explain_command import explain_source, show
    options = {name: getattr(args, name) for name in ("connectivity", "layers") if getattr(args, name) is not None}
    report = explain_source(args.model, ep=args.ep, tokens=args.tokens, batch=args.batch, training=args.train, rates=args.rates,
                            options=options, fold=not args.no_fold, predict=not args.no_predict)
    sides = ("before",) if args.before else ("after",) if args.after else ("before", "after")
    show(report, screen(), layer=args.layer, sides=sides, as_json=args.json, html=args.html, trace=args.trace)
    return 0


def add_profile(verbs: argparse._SubParsersAction) -> None:
    verb = verbs.add_parser("profile", help="measured beside predicted: exposed communication, and which cost is wrong",
                            description=PROFILE_TEXT, formatter_class=argparse.RawTextHelpFormatter)
    verb.add_argument("model", type=Path, metavar="MODEL", help="config.json, a folder with one, or a Python file with build()")
    verb.add_argument("--connectivity", default="farskip", metavar="NAME", help="as in explain (farskip)")
    verb.add_argument("--ep", type=int, default=1, metavar="N", help="ranks that the experts are split over")
    verb.add_argument("--tokens", type=int, default=2048, metavar="N", help="of a sequence (2048)")
    verb.add_argument("--batch", type=int, default=1, metavar="N", help="sequences on a rank (1)")
    verb.add_argument("--train", action="store_true", help="forward and backward")
    verb.add_argument("--steps", type=int, default=3, metavar="N", help="under the profiler (3)")
    verb.add_argument("--rates", metavar="RATES", help=RATES_HELP)
    verb.add_argument("--trace", type=Path, metavar="PATH", help="write torch.profiler's trace with the predicted lanes")
    verb.set_defaults(run=run_profile)


def run_profile(args: argparse.Namespace) -> int:
    from .profile_command import run as run_it
    from .calibrate_command import rates_of
    run_it(args.model, screen(), ep=args.ep, tokens=args.tokens, batch=args.batch, training=args.train, steps=args.steps,
           options={"connectivity": args.connectivity, **({"rates": rates_of(args.rates)} if args.rates else {})}, trace=args.trace)
    return 0


def add_bisect(verbs: argparse._SubParsersAction) -> None:
    verb = verbs.add_parser("bisect", help="which stage, layer and half makes outputs wrong, or the model slower; a reproducer",
                            description=BISECT_TEXT, formatter_class=argparse.RawTextHelpFormatter)
    verb.add_argument("model", type=Path, metavar="MODEL", help="config.json, a folder with one, or a Python file with build()")
    verb.add_argument("--connectivity", default="farskip", metavar="NAME", help="as in explain (farskip)")
    verb.add_argument("--inner", default="inductor", metavar="NAME", help="inductor (usual), aot_eager or eager")
    verb.add_argument("--ep", type=int, default=1, metavar="N", help="ranks that the experts are split over")
    verb.add_argument("--tokens", type=int, default=128, metavar="N", help="of a sequence (128)")
    verb.add_argument("--batch", type=int, default=1, metavar="N", help="sequences on a rank (1)")
    verb.add_argument("--train", action="store_true", help="gradients too")
    verb.add_argument("--slower", action="store_true", help="ask for time instead of outputs")
    verb.add_argument("--output", type=Path, default=Path("bisect"), metavar="FOLDER", help="of the script (bisect)")
    verb.set_defaults(run=run_bisect)


def run_bisect(args: argparse.Namespace) -> int:
    from .bisect_command import run as run_it
    return run_it(args.model, screen(), ep=args.ep, tokens=args.tokens, batch=args.batch, training=args.train,
                  slower=args.slower, options={"connectivity": args.connectivity, "inner": args.inner},
                  output=args.output)


def add_calibrate(verbs: argparse._SubParsersAction) -> None:
    verb = verbs.add_parser("calibrate", help="measure what this device and link can do: rates for the schedule",
                            description=CALIBRATE_TEXT, formatter_class=argparse.RawTextHelpFormatter)
    verb.add_argument("--hidden", type=int, default=1024, metavar="N", help="width of the model (1024)")
    verb.add_argument("--tokens", type=int, default=2048, metavar="N", help="of a sequence (2048)")
    verb.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="of the model (float32)")
    verb.add_argument("--json", type=Path, metavar="PATH", help="write them there, for farskip explain --rates PATH")
    verb.set_defaults(run=run_calibrate)


def run_calibrate(args: argparse.Namespace) -> int:
    from .calibrate_command import run as run_it
    run_it(screen(), hidden=args.hidden, tokens=args.tokens, dtype=args.dtype, path=args.json)
    return 0


def add_diff(verbs: argparse._SubParsersAction) -> None:
    verb = verbs.add_parser("diff", help="what two reports differ in",
                            description="What two reports of farskip explain --json differ in. Status 0 if nothing, else 1.")
    verb.add_argument("first", type=Path, metavar="A.json")
    verb.add_argument("second", type=Path, metavar="B.json")
    verb.add_argument("--json", action="store_true", help="as JSON")
    verb.set_defaults(run=run_diff)


def run_diff(args: argparse.Namespace) -> int:
    from .explain_command import diff
    return diff(args.first, args.second, screen(), as_json=args.json)


def add_bench(verbs: argparse._SubParsersAction) -> None:
    bench = verbs.add_parser("bench", help="time a model on two ranks over an emulated slow link",
                             description=BENCH_TEXT, epilog=BENCH_END, formatter_class=argparse.RawTextHelpFormatter)
    shape = Shape()
    model = bench.add_argument_group("model")
    for name, what in SIZES.items():
        flag, usual = f"--{name.replace('_', '-')}", getattr(shape, name)
        model.add_argument(flag, type=int, metavar="N", help=f"{what} ({usual})")
    model.add_argument("--seed", type=int, default=0, metavar="N", help="of weights and tokens (0)")
    what = bench.add_argument_group("what is measured")
    what.add_argument("--mode", choices=(*MODES, "both"), default="forward",
                      help="see above; both is forward and train (forward)")
    what.add_argument("--dp", type=int, default=1, metavar="N", help="replicas, mode step only: 2 N ranks (1)")
    what.add_argument("--bucket-mb", type=float, default=Spec.bucket_mb, metavar="MB",
                      help=f"mode step: MiB of gradients that travel together ({Spec.bucket_mb:g})")
    what.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), metavar="NAME",
                      help="some of the above (all)")
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
    bench.set_defaults(run=run_bench)


def run_bench(args: argparse.Namespace) -> int:
    given = {name: getattr(args, name) for name in SIZES if getattr(args, name) is not None}
    shape = replace(Shape(), **({**QUICK_BENCH, **given} if args.quick else given))
    rounds = args.rounds if args.rounds is not None else (3 if args.quick else 8)
    spec = Spec(forward=shape, train=shape, modes=BOTH if args.mode == "both" else (args.mode,),
                variants=in_order(args.variants), ratios=tuple(args.comm_ratio), rounds=rounds, budget_s=args.budget,
                seed=args.seed, dp=args.dp, bucket_mb=args.bucket_mb, connectivity=args.connectivity)
    return report(run(spec, screen(), kinds=("loopback",) if args.no_netns else KINDS, json_path=args.json,
                      verbose=args.verbose))


def add_demo(verbs: argparse._SubParsersAction) -> None:
    demo = verbs.add_parser("demo", help="the main job, shown step by step", description=DEMO_TEXT,
                            formatter_class=argparse.RawTextHelpFormatter)
    demo.add_argument("--quick", action="store_true", default=os.environ.get("QUICK", "") not in ("", "0"),
                      help="two layers, forward only; the environment variable QUICK=1 does the same")
    demo.add_argument("--json", type=Path, default=Path("build/demo.json"), metavar="PATH",
                      help="where the figures go (build/demo.json)")
    demo.set_defaults(run=run_demo)


def run_demo(args: argparse.Namespace) -> int:
    spec = Spec(budget_s=75.0)
    if args.quick:
        spec = replace(spec, forward=replace(spec.forward, layers=2), modes=("forward",), rounds=5, budget_s=25.0)
    console = screen()
    console.print(f"the demo: {'two layers, forward only; about three' if args.quick else 'about ten'} minutes on two "
                  "cores that do nothing else", highlight=False)
    return report(run(spec, console, json_path=args.json))


def add_distill(verbs: argparse._SubParsersAction) -> None:
    distill = verbs.add_parser("distill", help="train a converted model to agree with the original", description=DISTILL_TEXT,
                               formatter_class=argparse.RawTextHelpFormatter)
    distill.add_argument("config", type=Path, metavar="CONFIG.yaml", help="the run: model, data, distill, training")
    distill.set_defaults(run=run_distill)


def run_distill(args: argparse.Namespace) -> int:
    from .distill import command
    command.run(args.config, screen())
    return 0


def add_sweep(verbs: argparse._SubParsersAction) -> None:
    sweep = verbs.add_parser("sweep", help="short distillation runs, to choose batch and learning rate", description=SWEEP_TEXT,
                             epilog=SWEEP_END, formatter_class=argparse.RawTextHelpFormatter)
    sweep.add_argument("config", type=Path, metavar="CONFIG.yaml", help="the run, as for farskip distill")
    sweep.add_argument("--batch", nargs="+", type=int, default=[], metavar="N", help="sequences a step, over all ranks (the file's)")
    sweep.add_argument("--learning-rate", nargs="+", type=float, default=[], metavar="R", help="learning rates (the file's)")
    sweep.add_argument("--steps", type=int, default=2000, metavar="N", help="of each trial (2000)")
    sweep.add_argument("--grid", action="store_true", help="every pair of batch and learning rate")
    sweep.add_argument("--metric", default="kl", metavar="NAME",
                       help="of the held-out rows: kl, cross_entropy, bits_per_byte, agree or correct (kl)")
    sweep.add_argument("--output", type=Path, metavar="FOLDER", help="of the trials (OUTPUT_DIR/sweep)")
    sweep.set_defaults(run=run_sweep)


def run_sweep(args: argparse.Namespace) -> int:
    from .distill.sweep import sweep
    sweep(args.config, batches=args.batch, learning_rates=args.learning_rate, steps=args.steps, grid=args.grid, metric=args.metric,
          output=args.output, console=screen())
    return 0


def add_sensitivity(verbs: argparse._SubParsersAction) -> None:
    scan = verbs.add_parser("sensitivity", help="which layers to convert: KL of each, and what it hides",
                            description=SENSITIVITY_TEXT, formatter_class=argparse.RawTextHelpFormatter)
    scan.add_argument("config", type=Path, metavar="CONFIG.yaml", help="the run, as for farskip distill")
    scan.add_argument("--share", type=float, metavar="S", help="of the hidden time that is kept (the file's auto:SHARE, or 0.9)")
    scan.add_argument("--json", type=Path, metavar="PATH", help="write the scan there")
    scan.add_argument("--svg", type=Path, metavar="PATH", help="draw the front there")
    scan.set_defaults(run=run_sensitivity)


def run_sensitivity(args: argparse.Namespace) -> int:
    from .distill.sensitivity_command import scan
    scan(args.config, screen(), share=args.share, json=args.json, svg=args.svg)
    return 0


def screen() -> Console:
    """The terminal; into a log, lines wide enough for the tables."""
    console = Console()
    if not console.is_terminal and "COLUMNS" not in os.environ:
        return Console(width=120)
    return console


def in_order(variants: Sequence[str]) -> tuple[str, ...]:
    return tuple(name for name in VARIANTS if name == "stock" or name in variants)


def report(result: dict) -> int:
    """The exit status: a run in which a variant computed something else has failed."""
    for line in wrong(result):
        print(f"not the reference's result: {line}", file=sys.stderr)
    return 1 if wrong(result) else 0


VERBS = (add_explain, add_diff, add_calibrate, add_profile, add_bisect, add_bench, add_demo, add_distill, add_sweep, add_sensitivity)

if __name__ == "__main__":
    sys.exit(main())
