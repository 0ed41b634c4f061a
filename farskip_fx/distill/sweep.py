"""``farskip sweep CONFIG.yaml``: short runs of one file, to choose batch and learning rate.

    farskip sweep run.yaml --batch 64 128 256 --learning-rate 2e-5 4e-5 8e-5 --steps 2000

As in the paper (FarSkip-Collective, arXiv 2511.11505): first the batches, at the learning rate of the file, then the learning
rates, at the best batch. With ``grid`` every pair.

A trial is the file's run with ``max_steps``, in a folder of its own under OUTPUT_DIR/sweep. It saves no model and always runs to
its end; ``result.json`` in that folder is what it found. Run the same command again after an interruption: trials that have a
result are kept, the others begin anew. Works under torchrun, on a file system that all ranks see.
"""
from __future__ import annotations

import gc
import json
import math
import os
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from ..errors import ConfigError
from . import command
from .config import read, write

METRICS = {"kl": min, "cross_entropy": min, "bits_per_byte": min, "agree": max, "correct": max}
"""What a sweep can choose by, of the rows that are held out, and which one is the best."""

STEPS = 2000
_RESULT = "result.json"

# Checkpoints, evaluation in between and early stopping are for a run that is kept.
_SHORT = {"save_strategy": "no", "eval_strategy": "no", "load_best_model_at_end": False, "metric_for_best_model": None,
          "num_train_epochs": None}


def sweep(path: str | Path, *, batches: Sequence[int] = (), learning_rates: Sequence[float] = (), steps: int = STEPS,
          grid: bool = False, metric: str = "kl", output: str | Path | None = None, console: Console | None = None) -> dict:
    """Run the trials that have no result yet, and choose.

    Args:
        path: the file of a run, as for ``farskip distill``.
        batches: sequences a step, over all ranks and micro-batches. None: the file's own.
        learning_rates: None: the file's own.
        steps: of a trial. A longer warm-up is cut to half of them (the paper: 1000 of 2000).
        grid: every pair, instead of the learning rates at the best batch only.
        metric: one of METRICS.
        output: folder of the trials; None: OUTPUT_DIR/sweep.

    Returns:
        What is written to OUTPUT/sweep.json: "metric", "best", and "trials", each with its batch, learning_rate, steps, seconds
        and metrics.

    Raises:
        ConfigError: nothing to sweep; a batch that the ranks cannot share; a folder with trials of another run.
    """
    console = console or Console()
    data = read(path)
    _, text, _, training = command.checked(data, path)
    if metric not in METRICS:
        raise ConfigError(f"metric={metric!r} is not known; choose one of {', '.join(METRICS)}")
    if not batches and not learning_rates:
        raise ConfigError("nothing to sweep: give batches, learning rates, or both")
    if steps < 1 or any(rate <= 0 for rate in learning_rates):
        raise ConfigError(f"steps={steps} and learning_rates={list(learning_rates)} must be above 0")
    for needed in ("output_dir", "learning_rate"):
        if needed not in training:
            raise ConfigError(f"{path}: training needs {needed}" + (", the rate at which batches are compared" * (needed[0] == "l")))
    folder = Path(output) if output is not None else Path(training["output_dir"]) / "sweep"
    batches = list(dict.fromkeys(batches)) or [_batch_of(training)]
    rate, rates = float(training["learning_rate"]), list(dict.fromkeys(learning_rates))
    for batch in batches:       # all of them, before the first one runs
        _shares(batch, training)

    def results(pairs: list[tuple[int, float]]) -> list[dict]:
        return [_trial(data, folder, *pair, steps, text["length"], console) for pair in pairs]

    if grid or not rates or len(batches) == 1:
        found = results([(batch, each) for batch in batches for each in rates or [rate]])
    else:
        found = results([(batch, rate) for batch in batches])
        best = _best(found, metric)["batch"]
        found += results([(best, other) for other in rates if other != rate])
    chosen = {"metric": metric, "best": _best(found, metric), "trials": found}
    if _first_rank():
        write(folder / "sweep.json", chosen)
        console.print(table(chosen))
        console.print(f"put these into {path}: {_arguments(chosen['best'], training)}", highlight=False,
                      soft_wrap=True)
    return chosen


def _trial(data: dict, folder: Path, batch: int, rate: float, steps: int, length: int, console: Console) -> dict:
    """One short run, or its result if it is there."""
    own = folder / f"batch-{batch}_lr-{rate:g}"
    training = {**data["training"], **_SHORT, "output_dir": str(own), "max_steps": steps, "learning_rate": rate,
                **_shares(batch, data["training"])}
    if isinstance(training.get("warmup_steps"), int):
        training["warmup_steps"] = min(training["warmup_steps"], steps // 2)
    run = {**data, "distill": {**data.get("distill", {}), "stop_metric": None},
           "training": {name: value for name, value in training.items() if value is not None}}
    if (own / _RESULT).exists():
        kept = json.loads((own / _RESULT).read_text())
        if kept["run"] != json.loads(json.dumps(run)):
            differing = sorted(f"{part}.{name}" for part in run for name in _differing(kept["run"].get(part), run[part]))
            raise ConfigError(f"{own} holds a trial of another run ({', '.join(differing) or 'other parts'} changed): give another "
                              "folder (output), or delete this one")
        return kept
    if _first_rank():
        own.mkdir(parents=True, exist_ok=True)
    console.print(f"batch {batch} ({batch * length} tokens), learning rate {rate:g}, {steps} steps", highlight=False)
    begin = time.perf_counter()
    trainer, _, metrics = command.trained(run, own, console)
    found = {"batch": batch, "tokens": batch * length, "learning_rate": rate, "steps": steps,
             "seconds": time.perf_counter() - begin, "metrics": {n.removeprefix("eval_"): v for n, v in metrics.items()}, "run": run}
    del trainer
    gc.collect()        # two models and an optimizer, in cycles
    if _first_rank():
        partial = own / f".{_RESULT}"
        partial.write_text(json.dumps(found, indent=1))
        partial.rename(own / _RESULT)
    return found


def _differing(old: object, new: object) -> list[str]:
    if not isinstance(old, dict) or not isinstance(new, dict):
        return [""] if old != new else []
    return [name for name in {*old, *new} if old.get(name) != json.loads(json.dumps(new.get(name)))]


def _ranks() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def _first_rank() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _batch_of(training: dict) -> int:
    """Sequences a step, as the file says."""
    return int(training.get("per_device_train_batch_size", 8)) * int(training.get("gradient_accumulation_steps", 1)) * _ranks()


def _shares(batch: int, training: dict) -> dict:
    """How ranks and micro-batches share a batch: micro-batches as large as the file's, or the next smaller that divide it."""
    each, rest = divmod(batch, _ranks())
    if batch < 1 or rest:
        raise ConfigError(f"a batch of {batch} sequences cannot be shared by {_ranks()} ranks")
    size = max(s for s in range(1, each + 1) if each % s == 0 and s <= int(training.get("per_device_train_batch_size", 8)))
    return {"per_device_train_batch_size": size, "gradient_accumulation_steps": each // size}


def _best(found: list[dict], metric: str) -> dict:
    better = METRICS[metric]
    worst = math.inf if better is min else -math.inf

    def value(trial: dict) -> float:
        got = trial["metrics"][metric]
        return worst if math.isnan(got) else got        # diverged

    return better(found, key=value)


def _arguments(best: dict, training: dict) -> str:
    chosen = {"learning_rate": best["learning_rate"], **_shares(best["batch"], training)}
    return ", ".join(f"{name}: {value}" for name, value in chosen.items())


def table(chosen: dict) -> Table:
    """One row for each trial, the best one marked."""
    drawn = Table(caption=f"{chosen['trials'][0]['steps']} steps each; best by {chosen['metric']}")
    for name in ("", "batch", "tokens a step", "learning rate", "KL", "same top-1", "bits/byte", "seconds"):
        drawn.add_column(name, justify="right")
    for trial in chosen["trials"]:
        got, best = trial["metrics"], trial is chosen["best"]
        drawn.add_row("best" if best else "", str(trial["batch"]), str(trial["tokens"]), f"{trial['learning_rate']:g}",
                      f"{got['kl']:.4f}", f"{got['agree']:.2%}", f"{got['bits_per_byte']:.4f}", f"{trial['seconds']:.0f}",
                      style="bold" if best else None)
    return drawn
