"""``farskip profile``: a model from a configuration or a script, compiled, run and measured on every rank."""
from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import torch
import torch.distributed as dist
from rich.console import Console
from rich.text import Text

from .convert import apply
from .planned import planned, ranks_for
from .profiling import Profile, profile
from .view.terminal import megabytes, milliseconds, table
from .view.text import plain


def run(source: Path, console: Console, *, ep: int, tokens: int, batch: int, training: bool, steps: int, options: dict,
        trace: Path | None) -> None:
    with ranks_for(ep, real=True), ExitStack() as scoped:
        # A graph out of a cache has no schedule to compare with.
        scoped.enter_context(torch._inductor.config.patch(fx_graph_cache=False))
        scoped.enter_context(torch._functorch.config.patch(enable_autograd_cache=False))
        if torch.cuda.is_available():
            torch.set_default_device(torch.device("cuda", int(dist.get_rank() if dist.is_initialized() else 0)))
        model, inputs = planned(source, tokens=tokens, batch=batch, training=training, ep=ep, weights=True)
        apply(model, **options)
        first = not dist.is_initialized() or dist.get_rank() == 0
        if first:
            console.print("compiling ...", highlight=False)

        def step() -> None:
            with torch.set_grad_enabled(training):
                logits = model(**inputs).logits
                if training:
                    logits.float().logsumexp(-1).mean().backward()

        found = profile(step, model, steps=steps, warmup=2)
        if not first:
            return
        show(found, console)
        if trace is not None:
            console.print(f"written: {found.to_trace(trace)}", highlight=False)


def show(found: Profile, console: Console) -> None:
    console.print(f"{milliseconds(found.step_s)} a step (median of {found.steps})", highlight=False)
    drawn = table("exposed communication of each collective", "phase", "collective", "bytes", "predicted", "measured", right=3)
    for row in found.exposures:
        drawn.add_row(row.phase, Text(plain(row.place)), megabytes(row.bytes), milliseconds(row.predicted_s),
                      milliseconds(row.measured_s))
    drawn.add_row("all", "", "", milliseconds(found.predicted_s), milliseconds(found.measured_s))
    console.print(drawn)
    drawn = table("costs", "kind", "rate", "predicted", "measured", right=2)
    for cost in found.costs:
        drawn.add_row(cost.kind, cost.rate, milliseconds(cost.predicted_s), milliseconds(cost.measured_s))
    console.print(drawn)
    console.print(Text(found.advice()))
