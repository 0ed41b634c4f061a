"""The tables and plots of docs/performance.md, measured and written by one command.

    python -m farskip_fx.bench.performance --list                        what there is
    python -m farskip_fx.bench.performance                               everything that has no result yet: two hours
    python -m farskip_fx.bench.performance --only forward llama4         these, again
    python -m farskip_fx.bench.performance --only                        nothing measured, only the document

Each run is a command of its own (``RUNS``), and its result a file in ``--folder`` with command, date, machine and versions. A
result of another command is measured again. In the document everything between ``<!-- measured: NAME -->`` and
``<!-- end -->`` is written; the rest of it is left alone. Nothing else may run on the cores meanwhile.
"""
from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path

from ..view.plot import bars, lines
from .figures import hidden
from .run import machine, versions
from .spec import EP, OTHERS

BENCH = "farskip_fx.cli bench"
PEERS = "--variants stock transformers_ep two_batches overlapped_eager exact_chunks farskip farskip_chunks"
CHUNKS = "--variants stock two_batches exact_chunks farskip farskip_chunks"
ALL = "--variants stock two_batches overlapped_eager exact_chunks farskip farskip_chunks"
FOUR = "--chunks 4 --variants stock two_batches exact_chunks farskip_chunks --rounds 16 --budget 150"
LLAMA4 = f"{BENCH} --mode forward --family llama4 --top-k 1 --layers 8 --tokens 1024"     # as many MoE layers as the others have
OURS = ("farskip", "farskip_chunks")
EXACT = ("stock", "inductor_overlap", "transformers_ep", "two_batches", "exact_chunks")


@dataclass(frozen=True)
class Run:
    """One measurement: ``command`` is what comes after ``python -m``; ``what`` names it in the tables."""
    name: str
    what: str
    command: str


RUNS = (
    Run("forward", "4 layers, 2048 tokens", f"{BENCH} --mode forward --comm-ratio 0.25 0.5 1.0 2.0 {ALL} --budget 100"),
    Run("forward_4", "4 layers, 2048 tokens", f"{BENCH} --mode forward --comm-ratio 0.5 1.0 {FOUR}"),
    Run("skewed", "skewed routing", f"{BENCH} --mode forward --routing skewed --comm-ratio 1.0 {PEERS} --budget 80"),
    Run("tokens_256", "256 tokens", f"{BENCH} --mode forward --tokens 256 --comm-ratio 1.0 {CHUNKS} --budget 30"),
    Run("tokens_4096", "4096 tokens", f"{BENCH} --mode forward --tokens 4096 --layers 2 --comm-ratio 1.0 {CHUNKS} --budget 60"),
    Run("deepseek", "DeepSeek-V2-like", f"{BENCH} --mode forward --family deepseek --comm-ratio 0.5 1.0 {PEERS} --budget 90"),
    Run("deepseek_4", "DeepSeek-V2-like", f"{BENCH} --mode forward --family deepseek --comm-ratio 0.5 1.0 {FOUR}"),
    Run("llama4", "Llama-4-like, 8 layers", f"{LLAMA4} --comm-ratio 1.0 {ALL} --budget 60"),
    Run("llama4_4", "Llama-4-like, 8 layers", f"{LLAMA4} --comm-ratio 0.5 1.0 {FOUR}"),
    Run("train", "3 layers, 1024 tokens", f"{BENCH} --mode train --layers 3 --tokens 1024 --comm-ratio 1.0 {PEERS} --budget 50"),
    Run("train_ratios", "3 layers, 1024 tokens", f"{BENCH} --mode train --layers 3 --tokens 1024 --comm-ratio 0.5 1.0 2.0 "
                                    "--variants stock farskip farskip_chunks --rounds 12 --budget 150"),
    Run("train_4", "3 layers, 1024 tokens", f"{BENCH} --mode train --layers 3 --tokens 1024 --comm-ratio 0.5 1.0 --chunks 4 "
                               "--variants stock exact_chunks farskip_chunks --budget 60"),
    Run("step_dp2", "a step, dp 2 x ep 2", f"{BENCH} --mode step --layers 3 --tokens 1024 --dp 2 --comm-ratio 1.0 "
                                           "--variants stock farskip farskip_chunks --budget 60"),
    Run("growth", "passes over depth", "farskip_fx.bench.growth --layers 4 16 64"),
)
SPEED = tuple(run for run in RUNS if run.command.startswith(BENCH))


# --- measuring ------------------------------------------------------------------------------------------------------
def result_of(run: Run, folder: Path) -> dict | None:
    """What an earlier run of the same command found, or None."""
    path = folder / f"{run.name}.json"
    found = json.loads(path.read_text()) if path.exists() else None
    return found if found and found["command"] == run.command else None


def measure(run: Run, folder: Path) -> None:
    print(f"--- {run.name}: python -m {run.command}", flush=True)
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="farskip-") as temporary:
        path = Path(temporary) / "found.json"
        subprocess.run([sys.executable, "-m", *run.command.split(), "--json", str(path)], check=True)
        found = json.loads(path.read_text())
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{run.name}.json").write_text(json.dumps(
        {"command": run.command, "date": date.today().isoformat(), "seconds": round(time.monotonic() - began),
         "machine": machine(EP), "versions": versions(), "found": found}, indent=1) + "\n")


# --- tables ---------------------------------------------------------------------------------------------------------
def markdown(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    rule = ["---", *["---:"] * (len(headings) - 1)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (headings, rule, *rows))


def of_mode(results: dict[str, dict], *modes: str) -> Iterator[tuple[Run, str, dict]]:
    """Runs of ``farskip bench`` with a result in one of ``modes``, in their order: (run, mode, figures)."""
    for run in SPEED:
        for mode in modes:
            if figures := results.get(run.name, {}).get("found", {}).get(mode):
                yield run, mode, figures


def times(results: dict[str, dict], *modes: str) -> str:
    """ms a step: a row for the fast link and one for each slow one; the fastest is bold. What stands behind is of the faster of
    ours; compute of max(compute, comm) is the least of ours on the fast link."""
    runs = list(of_mode(results, *modes))
    names = [name for name in (*EXACT, "overlapped_eager", "rewired_stock", *OURS)
             if any(one["name"] == name for _, _, figures in runs for one in figures["variants"])]
    rows = []
    for run, _, figures in runs:
        what = run.what + (f", {figures['chunks']} chunks" if set(names) & set(OTHERS) else "")
        fast = {one["name"]: one["fast_ms"] for one in figures["variants"]}
        least = min(fast[name] for name in OURS if name in fast)
        rows.append([what, "fast", *_times(fast, names), *_gains(fast), "", "", ""])
        for point in figures["curve"]:
            slow = {one["name"]: one["slow_ms"] for one in point["variants"]}
            best = min((name for name in OURS if name in slow), key=slow.__getitem__)
            ends = point["ends_ms"] / (figures["chunks"] if best in OTHERS else 1)      # of the last chunk alone
            costs = (fast["stock"], slow["stock"]), (fast[best], slow[best])
            rows.append([what, f"{point['ratio']:g}", *_times(slow, names), *_gains(slow),
                         f"{slow[best] / max(least, point['comm_only_ms']):.2f}x",
                         *("" if part is None else f"{min(part, 1):.0%}" for part in (hidden(*costs), hidden(*costs, beyond_reach=ends)))])
    return markdown(["run", "ratio", *names, "over stock", "over the best exact", "of max(compute, comm)", "hidden", "of hideable"],
                    rows)


def _times(found: dict[str, float], names: Sequence[str]) -> list[str]:
    least = min(found.values())
    return [("" if name not in found else f"**{found[name]:.0f}**" if found[name] == least else f"{found[name]:.0f}")
            for name in names]


def _gains(found: dict[str, float]) -> list[str]:
    ours, exact = (min(found[name] for name in names if name in found) for names in (OURS, EXACT))
    return [f"{found['stock'] / ours:.2f}x", f"{exact / ours:.2f}x" if len(set(found) & set(EXACT)) > 1 else ""]


def commands(results: dict[str, dict]) -> str:
    """What was run, when, and over which link."""
    rows = []
    for run in RUNS:
        if (result := results.get(run.name)) is None:
            rows.append([run.name, "not measured", "", "", f"`{_typed(run.command)}`"])
            continue
        modes = [figures for one, _, figures in of_mode(results, "forward", "train", "step") if one is run]
        rounds = ", ".join(str(figures["rounds"]) for figures in modes)
        rates = ", ".join(f"{point['ratio']:g}: {point['rate_bits'] / 1e6:.0f}" for figures in modes for point in figures["curve"])
        rows.append([run.name, result["date"], rounds, rates, f"`{_typed(run.command)}`"])
    return markdown(["run", "date", "rounds", "Mbit/s found for each ratio", "command"], rows)


def _typed(command: str) -> str:
    return command.replace(BENCH, "farskip bench") if command.startswith(BENCH) else f"python -m {command}"


def where(results: dict[str, dict]) -> str:
    kinds = dict.fromkeys(f"{r['machine']['cores']} cores of {r['machine']['cpu']}, {r['machine']['system']}, torch "
                          f"{r['versions']['torch']}, transformers {r['versions']['transformers']}" for r in results.values())
    return "\n".join(f"- {kind}" for kind in kinds)


def growth(results: dict[str, dict]) -> str:
    if "growth" not in results:
        return "not measured"
    found = results["growth"]["found"]
    rows = [[f"{r['layers']:.0f}", f"{r['nodes']:.0f}", f"{r['aten nodes']:.0f}", f"{r['trace']:.1f}", f"{r['rewiring']:.2f}",
             f"{r['schedule']:.2f}", f"{(r['rewiring'] + r['schedule']) / r['trace']:.1%}",
             f"{r['peak_mb']:.0f}" if "peak_mb" in r else ""] for r in found["traced"]]
    compiled = [[name, f"{r['layers']:.0f}", f"{r['first']:.1f}", f"{r['rewire']:.2f}", f"{r['schedule']:.2f}", f"{r['fence']:.2f}",
                 f"{(r['rewire'] + r['schedule'] + r['fence']) / r['first']:.1%}", f"{r['recompiles']:.0f}", f"{r['hits']:.0f}"]
                for name, r in found["compiled"].items()]
    return "\n\n".join((
        markdown(["layers", "nodes", "aten nodes", "trace", "rewire", "schedule", "ours, of trace", "ours, MB"], rows),
        markdown(["process", "layers", "first step", "rewire", "schedule", "fence", "ours", "recompiles", "cache hits"], compiled)))


# --- plots ----------------------------------------------------------------------------------------------------------
def plot_ratios(results: dict[str, dict], run: str, mode: str, what: str) -> str | None:
    if run not in results:
        return None
    curve = results[run]["found"][mode]["curve"]
    names = [one["name"] for one in curve[0]["variants"]]
    return lines(f"Speed-up over stock Inductor, {what}", "exchanges alone over compute alone", "times",
                 {name: {point["ratio"]: one["speedup_slow"] for point in curve for one in point["variants"] if one["name"] == name}
                  for name in names})


def plot_exposed(results: dict[str, dict]) -> str | None:
    """Layer by layer: what exchanges take alone (all of it exposed in stock), and what of it ``farskip`` waits for."""
    if "forward" not in results:
        return None
    figures = results["forward"]["found"]["forward"]
    waits = [(int(one["place"].rsplit(" ", 1)[1]), one["predicted_ms"], one["measured_ms"])
             for one in figures["exposed"]["collectives"] if re.search(r" of layer \d+$", one["place"])]
    layers = sorted({layer for layer, *_ in waits})
    alone = [one["ms"] for one in figures["schedules"][0]["collectives"]]
    per = len(alone) // len(layers)
    return bars(f"Exposed communication of each layer, forward, ratio {figures['ratio']:g}", "ms", [f"layer {n}" for n in layers],
                {"exchanges alone": [sum(alone[n * per:(n + 1) * per]) for n in range(len(layers))],
                 "farskip, predicted": [sum(p for layer, p, _ in waits if layer == n) for n in layers],
                 "farskip, measured": [sum(m for layer, _, m in waits if layer == n) for n in layers]})


def plot_growth(results: dict[str, dict]) -> str | None:
    if "growth" not in results:
        return None
    rows = results["growth"]["found"]["traced"]
    return lines("CPU seconds of the passes over depth", "layers", "s",
                 {name: {r["layers"]: r[name] for r in rows} for name in ("rewiring", "schedule")})


TABLES: dict[str, Callable[[dict[str, dict]], str]] = {
    "machine": where, "forward": lambda found: times(found, "forward"), "training": lambda found: times(found, "train", "step"),
    "growth": growth, "commands": commands}
PLOTS: dict[str, Callable[[dict[str, dict]], str | None]] = {
    "speed-up": lambda found: plot_ratios(found, "forward", "forward", "forward"),
    "speed-up-training": lambda found: plot_ratios(found, "train_ratios", "train", "forward and backward"),
    "exposed": plot_exposed, "growth": plot_growth}
BELOW = {"forward": ("speed-up", "exposed"), "training": ("speed-up-training",), "growth": ("growth",)}     # of a table: its plots


def write(document: Path, results: dict[str, dict]) -> None:
    """The tables into ``document``, the plots of what there is beside it."""
    text = document.read_text()
    drawn = {name: svg for name, plot in PLOTS.items() if (svg := plot(results)) is not None}
    for name, table in TABLES.items():
        body = "\n\n".join((table(results), *(f"![{plot}](img/{plot}.svg)" for plot in BELOW.get(name, ()) if plot in drawn)))
        text, count = re.subn(rf"(<!-- measured: {name} -->\n).*?(<!-- end -->)",
                              lambda match: f"{match[1]}\n{body}\n\n{match[2]}", text, flags=re.DOTALL)
        if count != 1:
            raise SystemExit(f"{document} has {count} places for {name}: it needs one <!-- measured: {name} --> and <!-- end -->")
    for name, svg in drawn.items():
        (document.parent / "img").mkdir(exist_ok=True)
        (document.parent / "img" / f"{name}.svg").write_text(svg)
    document.write_text(text)


def main(given: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m farskip_fx.bench.performance", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=[run.name for run in RUNS], metavar="NAME",
                        help="measure these, whether or not they have a result; without a name: none")
    parser.add_argument("--folder", type=Path, default=Path("build/performance"), help="of the results (build/performance)")
    parser.add_argument("--write", type=Path, default=Path("docs/performance.md"), metavar="FILE", help="(docs/performance.md)")
    parser.add_argument("--list", action="store_true", help="the runs, and which have a result")
    args = parser.parse_args(given)
    results = {run.name: found for run in RUNS if (found := result_of(run, args.folder)) is not None}
    if args.list:
        for run in RUNS:
            print(f"{run.name:13s} {results[run.name]['date'] if run.name in results else 'not measured':13s} {_typed(run.command)}")
        return
    for run in RUNS:
        if run.name in args.only if args.only is not None else run.name not in results:
            measure(run, args.folder)
            results[run.name] = result_of(run, args.folder)
            write(args.write, results)
    write(args.write, results)


if __name__ == "__main__":
    main()
