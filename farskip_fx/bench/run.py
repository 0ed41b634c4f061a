"""A bench run as the parent sees it: open the link, run the ranks, show what they tell, write the JSON."""
from __future__ import annotations

import json
import os
import platform
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console

from . import table
from .launch import core_of, run_ranks, sharing
from .link import KINDS, Link, open_link
from .progress import Progress
from .spec import MODES, Spec
from .variants import is_scheduled

WORKER = "farskip_fx.bench.worker"


def run(spec: Spec, console: Console, *, kinds: tuple[str, ...] = KINDS, json_path: Path | None = None,
        verbose: bool = False) -> dict:
    """The whole result, as written to ``json_path``. Raises RankFailed, with its traceback, when a rank fails."""
    spec.check()
    with open_link(kinds, spec.world) as link, tempfile.TemporaryDirectory(prefix="farskip-") as folder:
        console.print(f"link: {link.describe()}", highlight=False)
        console.print(table.variants_table(spec.variants))
        spec_path = Path(folder) / "spec.json"
        spec.write(spec_path)
        screen = Screen(console, spec)
        screen.on_say(f"starting {spec.world} ranks: importing torch and transformers")
        run_ranks(link, WORKER, spec_path, screen.hear, silence_s=spec.silence_s, idle=screen.progress.idle,
                  verbose=verbose)
        result = assemble(screen, link)
    if json_path is not None:
        json_path.parent.mkdir(parents=True, exist_ok=True)
        json_path.write_text(json.dumps(result, indent=1) + "\n")
        console.print(f"written to {json_path}", highlight=False)
    return result


def wrong(result: dict) -> list[str]:
    """Variants that computed something else than the reference; their times mean nothing."""
    return [f"{mode} {one['name']}: differs by {table.worst_of(one):.1e}" for mode in MODES
            for one in result.get(mode, {}).get("variants", []) if not table.worst_of(one) <= table.tolerance_of(one["name"])]


class Screen:
    """Shows each event as it comes and keeps what the JSON needs."""

    def __init__(self, console: Console, spec: Spec) -> None:
        self.console, self.spec = console, spec
        self.progress = Progress(console)
        self.layers: list[dict] = []
        self.modes: dict[str, dict] = {}
        self.builds = 0

    def hear(self, rank: int, event: dict) -> None:
        if rank == 0:
            getattr(self, f"on_{event.pop('event')}")(**event)

    def on_say(self, text: str) -> None:
        self.progress.say(text)

    def on_layers(self, mode: str, layers: list[dict], max_diff: float, **rest: Any) -> None:
        self.progress.task = None
        if self.layers:
            return                          # the next mode's layers read the same
        self.layers = layers
        self.console.print(table.layers_table(layers, max_diff))

    def on_compiling(self, mode: str, label: str, expected_s: float) -> None:
        self.builds += 1
        self.progress.start(f"{mode}: compiling {label} ({self._place()})", expected_s)

    def _place(self) -> str:
        again = (len(self.spec.ratios) - 1) * sum(map(is_scheduled, self.spec.variants))
        total = len(self.spec.modes) * (len(self.spec.variants) + again)
        return f"{self.builds} of {total}"

    def on_compiled(self, mode: str, label: str, compile_s: float, schedules: list[dict] | None, **facts: Any) -> None:
        self.progress.say(f"{mode}: compiled {label} in {compile_s:.0f} s, max difference from the reference "
                          f"{table.worst_of(facts):.1e}")
        if schedules:
            self.console.print(table.schedule_table(label, schedules))

    def on_result(self, mode: str, result: dict) -> None:
        self.modes[mode] = result
        for point in result["curve"]:
            self.console.print(table.times_table(mode, point, result["rounds"]))
        self.console.print(table.conditions(result), highlight=False)
        if len(result["curve"]) > 1:
            self.console.print(table.curve_table(mode, result["curve"]))

    def on_done(self) -> None:
        self.progress.say("done")


def assemble(screen: Screen, link: Link) -> dict:
    rates = {mode: {f"{point['ratio']:g}": point["rate_bits"] for point in result["curve"]}
             for mode, result in screen.modes.items()}
    return {**screen.modes, "layers": screen.layers, "link": {**link.as_dict(), "rate_bits": rates},
            "machine": machine(link.ranks), "versions": versions(), "seed": screen.spec.seed}


def machine(ranks: int) -> dict:
    return {"system": platform.platform(), "cpu": _cpu(), "cores": os.cpu_count(),
            "core_of_rank": [core_of(rank) for rank in range(ranks)], "cores_shared": sharing(ranks) > 1}


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")


def versions() -> dict:
    return {"python": platform.python_version(),
            **{name: version(name) for name in ("torch", "transformers", "farskip_fx")}}
