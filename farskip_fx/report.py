"""What one compile did, or would do, as data: the rewiring, the schedules, the time our own passes took.

Views only draw it: ``print(report)``, ``report.to_html(path)``, ``report.to_trace(path)``; ``report.to_json()`` has all of it.
"""
from __future__ import annotations

import collections
import dataclasses
import json
import threading
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch.distributed as dist

if TYPE_CHECKING:
    from torch import nn

    from .agreement import Collective
    from .config import FarskipConfig
    from .passes.checkpointing import Inlined
    from .passes.describe import Found
    from .passes.reasons import Reason
    from .passes.rewire import Change, Rewired
    from .passes.schedule import Schedule
    from .passes.timeline import Timeline

VERSION = 1
_KEPT = 64
_recent: collections.deque[Report] = collections.deque(maxlen=_KEPT)
_lock = threading.Lock()


@dataclass(frozen=True, kw_only=True)
class Phase:
    """Forward or backward, predicted. ``before`` is the original connectivity as stock Inductor runs it where ``explain``
    made the report, and the rewired graph in Inductor's order where a compile did."""
    name: str
    before: Timeline
    after: Timeline
    bound_s: float          # no order of the rewired graph is faster
    reason: str = ""        # why the order stayed, if it did
    operations: dict[str, float] = field(default_factory=dict)      # of ``after``: seconds of compute by kernel


@dataclass(frozen=True, kw_only=True)
class Folded:
    """``explain`` traced ``traced`` layers of ``layers``; the others repeat the last ``period`` of them."""
    layers: int
    traced: int
    period: int


@dataclass(kw_only=True)
class Report:
    """One graph that went through the backend, or that ``explain`` traced.

    ``schedules`` grows as Inductor compiles: forward first, backward when it is compiled. A graph that comes out of
    Inductor's cache has none. ``errors`` holds what went wrong in a pass that AOTAutograd ran and swallowed.
    """
    graph: str
    config: FarskipConfig
    marked: bool = False            # came with the marker of ``apply`` or of the decorator
    model: str = ""                 # the class, where it is known
    rank: int = 0
    found: tuple[Found, ...] = ()   # the blocks of the residual stream
    rewired: Rewired | None = None
    unchanged: Reason | None = None
    checkpoints: Inlined | None = None
    functionalized: int = 0
    causal: int = 0                 # attention calls that lost a causal mask
    split: int = 0                  # attention calls that run in parts
    buckets: int = 0                # of gradients that are averaged
    collectives: tuple[Collective, ...] = ()        # of the Dynamo graph, see agreement.py
    nodes: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    schedules: list[Schedule] = field(default_factory=list)
    explained: tuple[Phase, ...] = ()
    folded: Folded | None = None
    errors: list[Exception] = field(default_factory=list)
    module: weakref.ref[nn.Module] | None = field(default=None, repr=False)      # whose forward was traced

    @property
    def layers(self):
        return self.rewired.layers if self.rewired else ()

    @property
    def changes(self) -> tuple[Change, ...]:
        return self.rewired.changes if self.rewired else ()

    @property
    def phases(self) -> tuple[Phase, ...]:
        """What ``explain`` predicted, or what the schedules of a compile are."""
        return self.explained or tuple(
            Phase(name=("forward", "backward")[i] if i < 2 else f"graph {i}", before=s.before, after=s.after, bound_s=s.bound_s,
                  reason=s.reason, operations=s.operations) for i, s in enumerate(self.schedules))

    def summary(self) -> str:
        """One line, as the README shows it."""
        if self.rewired is None:
            return f"{self.graph}: unchanged ({self.unchanged or 'no residual stream'})"
        found, done = len(self.layers), self.rewired.rewired
        return (f"{self.graph}: connectivity {self.config.connectivity}, {done} of {found} layers rewired, "
                f"{len(self.rewired.refused)} refused, {self.rewired.edges} reads changed")

    def __str__(self) -> str:
        from .view.text import lines
        return "\n".join(lines(self.to_dict()))

    # --- as data -----------------------------------------------------------------------------------------------------

    def to_dict(self) -> dict:
        """Everything that a view draws, as JSON values. ``farskip_fx.view`` says what is in it."""
        each = self.config.of_layers(len(self.layers)) if self.layers else ()
        return _json({
            "version": VERSION, "model": self.model, "graph": self.graph, "rank": self.rank, "summary": self.summary(),
            "unchanged": None if self.unchanged is None else {"code": self.unchanged.code, "text": self.unchanged.text},
            "options": self._options(),
            "layers": [self._layer(layer, name) for layer, name in zip(self.layers, each)],
            "changes": [dataclasses.asdict(change) for change in self.changes],
            "collectives": [str(c) for c in self.collectives],
            "phases": [dataclasses.asdict(phase) for phase in self.phases],
            "folded": None if self.folded is None else dataclasses.asdict(self.folded),
            "counts": {"operations": self.nodes, "added": self.rewired.nodes_added if self.rewired else 0,
                       "functionalized": self.functionalized, "causal_attention": self.causal,
                       "attention_split": self.split, "buckets": self.buckets},
            "seconds": dict(self.seconds),
            "errors": [f"{type(e).__name__}: {e}" for e in self.errors],
        })

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=1)

    def to_html(self, path: str | Path) -> Path:
        """Write one page that needs no network: residual stream and timelines, before and after."""
        from .view.html import page
        return _write(path, page(self.to_dict()))

    def to_trace(self, path: str | Path, measured: dict | str | Path | None = None) -> Path:
        """Write the predicted timelines as a Chrome trace, for Perfetto and Holistic Trace Analysis.

        Args:
            measured: torch.profiler's trace (or its path) to draw them beside; ``farskip_fx.profile`` has one.
        """
        from .view.trace import trace
        return _write(path, json.dumps(trace(self.to_dict(), measured)))

    def _options(self) -> dict:
        return {**self.config.to_dict(), "data_parallel": self.config.data_parallel is not None}

    def _layer(self, layer, connectivity: str) -> dict:
        blocks = [dataclasses.asdict(b) for b in self.found if b.layer == layer.index]
        reads = [{"block": name, "now": now, "was": was} for name, now, was in (
            ("attention", layer.attention_reads, layer.attention_read_before),
            (layer.kind, layer.mlp_reads, layer.mlp_read_before))]
        return {"index": layer.index, "kind": layer.kind, "label": layer.label, "connectivity": connectivity,
                "requested": layer.requested, "rewired": layer.rewired, "refused": None if layer.reason is None else
                {"code": layer.reason.code, "text": layer.reason.text}, "reads": reads, "blocks": blocks}


def _json(value):
    """Tuples and mappings of our own as what JSON has."""
    if isinstance(value, Mapping):
        return {str(k): _json(v) for k, v in value.items()}
    return [_json(v) for v in value] if isinstance(value, (tuple, list)) else value


def _write(path: str | Path, text: str) -> Path:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def rank() -> int:
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def record(report: Report) -> None:
    with _lock:
        _recent.append(report)


def last_reports(model: nn.Module | None = None) -> list[Report]:
    """Reports of the most recent compiles of this process, oldest first (of at most 64).

    Args:
        model: only those of this model, or of a part of it (``apply`` compiles its decoder); None: all.
    """
    with _lock:
        reports = list(_recent)
    if model is None:
        return reports
    own = set(model.modules())
    return [r for r in reports if r.module is not None and r.module() in own]
