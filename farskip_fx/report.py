"""What one compile did, as data: the rewiring, the schedules, the time our own passes took. Views only draw it."""
from __future__ import annotations

import collections
import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .agreement import Collective
    from .config import FarskipConfig
    from .passes.checkpointing import Inlined
    from .passes.reasons import Reason
    from .passes.rewire import Rewired
    from .passes.schedule import Schedule

_KEPT = 64
_recent: collections.deque[Report] = collections.deque(maxlen=_KEPT)
_lock = threading.Lock()


@dataclass(kw_only=True)
class Report:
    """One graph that went through the backend.

    ``schedules`` grows as Inductor compiles: forward first, backward when it is compiled. A graph that comes out of
    Inductor's cache has none. ``errors`` holds what went wrong in a pass that AOTAutograd ran and swallowed.
    """
    graph: str
    config: FarskipConfig
    marked: bool = False            # came with the marker of ``apply`` or of the decorator
    rewired: Rewired | None = None
    unchanged: Reason | None = None
    checkpoints: Inlined | None = None
    functionalized: int = 0
    split: int = 0                  # attention calls that run in parts
    buckets: int = 0                # of gradients that are averaged
    collectives: tuple[Collective, ...] = ()        # of the Dynamo graph, see agreement.py
    nodes: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    schedules: list[Schedule] = field(default_factory=list)
    errors: list[Exception] = field(default_factory=list)

    @property
    def layers(self):
        return self.rewired.layers if self.rewired else ()

    def summary(self) -> str:
        """One line, as the README shows it."""
        if self.rewired is None:
            return f"{self.graph}: unchanged ({self.unchanged or 'no residual stream'})"
        found, done = len(self.layers), self.rewired.rewired
        return (f"{self.graph}: connectivity {self.config.connectivity}, {done} of {found} layers rewired, "
                f"{len(self.rewired.refused)} refused, {self.rewired.edges} reads changed")

    def __str__(self) -> str:
        lines = [self.summary()]
        # One name for all stands in the first line already.
        each = () if isinstance(self.config.connectivity, str) else self.config.of_layers(len(self.layers))
        for layer in self.layers:
            if each:
                lines.append(f"  layer {layer.index}: connectivity {each[layer.index]}")
            if layer.reason is not None:
                lines.append(f"  layer {layer.index} {layer.kind}: refused: {layer.reason}")
                continue
            for name, now, was in (("attention", layer.attention_reads, layer.attention_read_before),
                                   (layer.kind, layer.mlp_reads, layer.mlp_read_before)):
                change = f"  (was: {was})" if now != was else ""
                lines.append(f"  layer {layer.index} {name}: reads {now}{change}")
        return "\n".join(lines)


def record(report: Report) -> None:
    with _lock:
        _recent.append(report)


def last_reports() -> list[Report]:
    """Reports of the most recent compiles of this process, oldest first (at most 64)."""
    with _lock:
        return list(_recent)
