"""The config shell around ``passes/schedule.py`` and ``passes/fence.py``: what Inductor is told for one compile.

``inductor_patches`` goes to ``compile_fx(config_patches=...)``, which also covers the lazily compiled backward; nothing
is set globally. The passes run when Inductor compiles a graph, and not when it finds one in its cache: their ``uuid``
covers their source, the rates and ``uuid_extra``, so that two configurations never get each other's code. No pass
communicates: another rank may hit its cache.
"""
from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from torch.fx import GraphModule

from .passes import _torch, fence
from .passes.costs import Rates
from .passes.early_means import launch_means_early
from .passes.prefetch import prefetch
from .passes.schedule import Schedule, schedule

if TYPE_CHECKING:
    from .artifacts import Shown
    from .config import FarskipConfig
    from .report import Report

_GraphPass, _SchedulerPass = _torch.custom_pass_bases()
_SOURCES = ("_torch.py", "costs.py", "dataflow.py", "early_means.py", "fence.py", "moving.py", "prefetch.py",
            "schedule.py", "simulate.py")


def inductor_patches(config: FarskipConfig, report: Report, shown: Shown | None = None) -> dict[str, object]:
    """Inductor's settings for one compile with ``config``. What the passes find goes into ``report``; ``shown`` sees graphs.

    A pass raises where it fails. AOTAutograd swallows that while it compiles a backward during the forward, so the
    error is also kept in ``report.errors``, for the backend to raise under ``strict``.
    """
    if not config.overlap:
        # Without our schedule a received buffer can still be read before its wait (torch up to 2.13 on CPU).
        theirs = bool(_torch.inductor_setting("reorder_for_compute_comm_overlap"))
        check = FarskipVerify(json.dumps({"source": _source(), "launches": not theirs}), on_error=report.errors.append)
        return {"_post_fusion_custom_pass": after_users(_torch.inductor_setting("_post_fusion_custom_pass"), check)}
    return overlap_patches(config.rates or Rates(), on_schedule=report.schedules.append, on_error=report.errors.append,
                           on_graph=shown.schedule if shown else None, uuid_extra=shown.uuid if shown else "")


def overlap_patches(rates: Rates, *, max_memory: int | None = None, uuid_extra: str = "",
                    on_schedule: Callable[[Schedule], None] | None = None,
                    on_fence: Callable[[fence.Fenced], None] | None = None,
                    on_error: Callable[[Exception], None] | None = None,
                    on_graph: Callable[[str, GraphModule], None] | None = None) -> dict[str, object]:
    """Schedule and fence as Inductor settings, after the user's own passes, with all else off that moves collectives.

    Args:
        rates: equal on all ranks.
        max_memory: see ``schedule``.
        uuid_extra: whatever else the caller's graphs depend on that Inductor's cache does not see.
        on_schedule: called for each graph that is compiled, and not for one from the cache.
        on_fence: likewise, before fusion; and after it, if something had to be repaired.
        on_error: called with an exception of a pass, before the pass raises it.
        on_graph: called with "before" or "after" and a graph that is scheduled.
    """
    # Which link a group has depends on its ranks, and Inductor's key has only its name.
    shapes = _torch.group_shapes() if rates.links else {}
    spec = json.dumps({"rates": rates.to_dict(), "groups": shapes, "max_memory": max_memory, "extra": uuid_extra,
                       "source": _source()}, sort_keys=True)
    ours = {
        "post_grad_custom_post_pass": FarskipSchedule(spec, on_schedule, on_error, on_graph),
        "_pre_fusion_custom_pass": FarskipFence(spec, on_fence, on_error),
        "_post_fusion_custom_pass": FarskipVerify(spec, on_fence, on_error),
    }
    return {**_torch.settings_off(),
            **{name: after_users(_torch.inductor_setting(name), own) for name, own in ours.items()}}


# --- our passes --------------------------------------------------------------------------------------------------
class _Pass:
    """Common to the three passes. Inductor hashes some settings by pickling them, so what is pickled is ``spec`` alone:
    the callbacks do not change the code."""

    def __init__(self, spec: str, on_result: Callable | None = None, on_error: Callable | None = None,
                 on_graph: Callable[[str, GraphModule], None] | None = None) -> None:
        self._spec, self._on_result, self._on_error, self._on_graph = spec, on_result, on_error, on_graph

    def uuid(self) -> str:
        return f"{type(self).__name__}:{hashlib.sha256(self._spec.encode()).hexdigest()}"

    def __reduce__(self):
        return type(self), (self._spec,)

    def _tell(self, result) -> None:
        if self._on_result is not None:
            self._on_result(result)

    def _show(self, when: str, graph) -> None:
        if self._on_graph is not None:
            self._on_graph(when, graph.owning_module)

    @contextmanager
    def _errors_told(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            if self._on_error is not None:
                self._on_error(error)
            raise


class FarskipSchedule(_Pass, _GraphPass):
    """Post-grad graph: asks early for sliced parameters, sends means of gradients early, orders compute and collectives."""

    def __call__(self, graph) -> None:
        spec = json.loads(self._spec)
        with self._errors_told():
            self._show("before", graph)
            prefetch(graph)
            launch_means_early(graph)
            self._tell(schedule(graph, rates=Rates(**spec["rates"]), max_memory=spec["max_memory"]))
            self._show("after", graph)


class FarskipFence(_Pass, _SchedulerPass):
    """Inductor's nodes before fusion: pins the order."""

    def __call__(self, snodes):
        with self._errors_told():
            snodes, done = fence.order(snodes)
            self._tell(done)
            return snodes


class FarskipVerify(_Pass, _SchedulerPass):
    """Inductor's nodes after fusion, and after the last reordering: repairs and checks."""

    def __call__(self, snodes):
        with self._errors_told():
            snodes, repaired = fence.repair(snodes)
            fence.verify(snodes, launches=self._launches)
            if repaired:
                self._tell(fence.Fenced(repaired=repaired))
        if snodes:
            _torch.when_order_is_final(_torch.scheduler_of(snodes), self._verify)
        return snodes

    def _verify(self, snodes) -> None:
        with self._errors_told():
            fence.verify(snodes, launches=self._launches)

    @property
    def _launches(self) -> bool:
        return json.loads(self._spec).get("launches", True)


@functools.cache
def _source() -> str:
    """Hash of the code that decides the order."""
    here = Path(__file__)
    files = [here, *(Path(_torch.__file__).with_name(name) for name in _SOURCES)]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


# --- with the user's passes --------------------------------------------------------------------------------------
def after_users(theirs, ours):
    """The setting that runs the user's passes and then ours.

    If one of theirs has no ``uuid``, Inductor does not cache what it changed; then it must not cache ours either.
    """
    passes = [p for p in (theirs if isinstance(theirs, (list, tuple)) else (theirs,)) if p is not None]
    if not passes:
        return ours
    if isinstance(ours, _GraphPass) and _torch.takes_several_passes():
        return (*passes, ours)
    if all(hasattr(p, "uuid") for p in passes):
        return (_GraphPasses if isinstance(ours, _GraphPass) else _SchedulerPasses)((*passes, ours))
    return functools.partial(_in_turn, (*passes, ours))


def _in_turn(passes, value):
    """Graph passes change their argument and return nothing; scheduler passes return nodes."""
    for each in passes:
        result = each(value)
        value = value if result is None else result
    return value


class _GraphPasses(_GraphPass):
    """Several graph passes as one, for an Inductor that takes only one."""

    def __init__(self, passes) -> None:
        self._passes = tuple(passes)

    def __call__(self, graph) -> None:
        for each in self._passes:
            each(graph)

    def uuid(self):
        return _joined(self._passes)


class _SchedulerPasses(_SchedulerPass):
    def __init__(self, passes) -> None:
        self._passes = tuple(passes)

    def __call__(self, snodes):
        return _in_turn(self._passes, snodes)

    def uuid(self):
        return _joined(self._passes)


def _joined(passes):
    """One identifier of all; None, which turns the caches off, if one has none."""
    uuids = [each.uuid() for each in passes]
    return None if None in uuids else tuple(uuids)
