"""``farskip bisect``: a model from a configuration or a script, run until it is known what is wrong; on every rank."""
from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
from rich.console import Console
from rich.text import Text

from .bisect import bisect
from .planned import planned, ranks_for


def run(source: Path, console: Console, *, ep: int, tokens: int, batch: int, training: bool, slower: bool, options: dict,
        output: Path) -> int:
    """Exit status: 0 where nothing is wrong, else 1."""
    with ranks_for(ep, real=True):
        rank = dist.get_rank() if dist.is_initialized() else 0
        if torch.cuda.is_available():
            torch.set_default_device(torch.device("cuda", rank % torch.cuda.device_count()))

        def say(line: object) -> None:
            if rank == 0:
                console.print(Text(str(line)))

        # Where a rank has ids of its own, they are the same in each run of this command.
        torch.manual_seed(rank)
        model, inputs = planned(source, tokens=tokens, batch=batch, training=training, ep=ep, weights=True)
        if source.suffix != ".py" and not slower:
            model.float()       # what a coarser dtype rounds would hide the fault
        found = bisect(model, config=options, gradients=training, slower=slower, told=say,
                       source=source if source.suffix == ".py" else None, **inputs)
        say(found.verdict)
        if not found.ok:
            path = found.write(output)
            say(f"written: {path}")
    return int(not found.ok)
