"""A rank of the bench: ``python -m farskip_fx.bench.worker SPEC`` with the environment that launch.py gives it."""
from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path
from typing import Any

from ..caches import graph_caches_off
from .parent import Parent, settle
from .spec import Spec


def main() -> None:
    run_rank(Spec.read, measure_all)


def run_rank(read: Callable[[Path], Any], measure: Callable[[Any, Parent], None]) -> None:
    """Settle, do ``measure(read(path of the spec), parent)``, end; a failure is told to the parent."""
    settle()
    parent = Parent()
    spec = read(Path(sys.argv[1]))
    try:
        measure(spec, parent)
    except Exception:
        parent.tell("failed", traceback=traceback.format_exc())
        os._exit(1)                         # an orderly exit would wait for a peer that may never answer
    parent.tell("done")
    os._exit(0)                             # gloo's threads have nothing more to do; do not wait for them


def join(parent: Parent, world: int, timeout_s: float) -> None:
    """Meet the other ranks."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{os.environ['FARSKIP_BENCH_MEET']}", rank=parent.rank,
                            world_size=world, timeout=timedelta(seconds=timeout_s))


def measure_all(spec: Spec, parent: Parent) -> None:
    import torch

    from .measure import Measurement

    join(parent, spec.world, spec.silence_s)
    for mode in spec.modes:
        with scoped_settings():
            result = Measurement(mode, spec, parent).run()
        torch.compiler.reset()              # the next mode's graphs share nothing with these
        if parent.rank == 0:
            parent.tell("result", mode=mode, result=result)


def scoped_settings() -> ExitStack:
    """What all variants are compiled under; as it was afterwards. The figures are of this code: no graph comes from a cache."""
    import torch._dynamo.config as dynamo

    settings = ExitStack()
    settings.enter_context(dynamo.patch(
        recompile_limit=64, accumulated_recompile_limit=1024,    # every variant is one more entry on one code object
        capture_scalar_outputs=True,                             # split sizes are data
        automatic_dynamic_local_pgo=False, automatic_dynamic_remote_pgo=False))
    settings.enter_context(graph_caches_off())
    return settings


if __name__ == "__main__":
    main()
