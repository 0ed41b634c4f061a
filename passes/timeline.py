"""What runs when, as data: the lanes of one simulated order.

Contract: nodes of one order and a ``Run`` of them in; numbers and names out. Nothing is changed.

Terms
  lane      "compute", or the group of a link
  event     what stands in a lane from ``start`` on: a collective, or neighbouring nodes of one place
"""
from __future__ import annotations

import bisect
import heapq
from collections.abc import Sequence
from dataclasses import dataclass

from torch.fx import Node

from . import costs
from .dataflow import clean_path
from .places import Place, place_of
from .simulate import COMPUTE, WAIT, Problem, Run

_NAMES = 3              # operations that an event is named after
_BEHIND = 3             # names a collective reports
_COUNTS_BYTES = 1 << 16
_APART = 1e-12          # seconds


@dataclass(frozen=True, kw_only=True)
class Event:
    """Times are simulated seconds. ``layer`` is None for what belongs to no block: embedding, final norm, head, loss.

    Args:
        names: operations, those that take longest first; of a collective its node.
        part: of the block, see ``places``.
    """
    lane: str
    start: float
    seconds: float
    names: tuple[str, ...]
    layer: int | None = None
    block: str = ""
    part: str = ""

    @property
    def end(self) -> float:
        return self.start + self.seconds


@dataclass(frozen=True, kw_only=True)
class Collective:
    """One collective of an order. Times are simulated seconds, indices are positions in the order.

    Args:
        kind: "counts" if its result is only read by the host, else the op's name.
        behind: the largest compute nodes that run while it is in flight.
        needed_by: what waits for it: the first kernel that its result goes into.
        free_s: seconds of compute that neither need its result nor are needed for its launch: what could run meanwhile at
            most. Less than ``seconds``: the data dependences alone leave some of it exposed.
        layer, block, part: see ``places``.
    """
    name: str
    op: str
    kind: str
    group: str
    bytes: int
    seconds: float
    launch_index: int
    wait_index: int
    hidden_s: float
    exposed_s: float
    behind: tuple[str, ...] = ()
    needed_by: str = ""
    free_s: float = 0.0
    layer: int | None = None
    block: str = ""
    part: str = ""

    @property
    def forced_s(self) -> float:
        """Seconds that no order can hide, because nothing else is free to run."""
        return max(0.0, self.seconds - self.free_s)


@dataclass(frozen=True, kw_only=True)
class Timeline:
    """One order, simulated: ``seconds`` in all, of which the compute lane stood still for ``exposed_s``."""
    seconds: float
    exposed_s: float
    peak_bytes: int
    events: tuple[Event, ...]
    collectives: tuple[Collective, ...]


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """One order as it ran: ``inner`` are its nodes without placeholders and output, the items of ``problem`` and ``run``.

    Args:
        launches: by the number of their collective.
        free: ``free_seconds`` of each collective.
    """
    inner: Sequence[Node]
    problem: Problem
    run: Run
    launches: Sequence[Node]
    free: Sequence[float]

    def events(self) -> tuple[Event, ...]:
        problem, run = self.problem, self.run
        events: list[Event] = []
        together: list[int] = []        # neighbours of one place, with nothing between them
        for i, node in enumerate(self.inner):
            if problem.role[i] != COMPUTE or not problem.seconds[i]:
                continue
            if together and (run.start[i] > run.finish[together[-1]] + _APART
                             or place_of(node) != place_of(self.inner[together[-1]])):
                events.append(self._compute(together))
                together = []
            together.append(i)
        if together:
            events.append(self._compute(together))
        for number, node in enumerate(self.launches):
            begin, end = run.link_start[number], run.link_finish[number]
            if end != float("inf"):
                events.append(_event(costs.group_of(node) or "link", begin, end, place_of(node), (node.name,)))
        return tuple(events)

    def _compute(self, together: Sequence[int]) -> Event:
        first, last = together[0], together[-1]
        longest = sorted(together, key=lambda i: (-self.problem.seconds[i], i))
        names = tuple(dict.fromkeys(costs.op_name(self.inner[i]) for i in longest))
        return _event("compute", self.run.start[first], self.run.finish[last], place_of(self.inner[first]), names)

    def collectives(self, first: int) -> tuple[Collective, ...]:
        """``first``: placeholders in front of ``inner``."""
        problem, run, inner = self.problem, self.run, self.inner
        at = {n: i for i, n in enumerate(inner)}
        waits: dict[Node, list[int]] = {}
        for i, node in enumerate(inner):
            if problem.role[i] == WAIT:
                waits.setdefault(self.launches[problem.link[i]], []).append(i)
        largest = sorted((i for i in range(len(inner)) if problem.seconds[i]), key=lambda i: run.start[i])
        found = []
        for number, node in enumerate(self.launches):
            own, seconds = waits.get(node, []), problem.link_seconds[number]
            exposed = min(sum(run.idle_at.get(i, 0.0) for i in own), seconds)
            found.append(Collective(
                name=node.name, op=costs.op_name(node), kind=_kind(node), group=costs.group_of(node),
                bytes=costs.payload(node), seconds=seconds, launch_index=first + at[node],
                wait_index=first + min(own, default=len(inner)), hidden_s=seconds - exposed, exposed_s=exposed,
                free_s=self.free[number], needed_by=self._needed_by(own),
                behind=_behind(inner, largest, run, run.link_start[number], run.link_finish[number]),
                **(place._asdict() if (place := place_of(node)) else {})))
        return tuple(found)

    def _needed_by(self, waits: Sequence[int]) -> str:
        """The first kernel in the order that the result goes into, through views and small loops."""
        reached = {self.inner[i] for i in waits}
        for i in range(min(waits, default=len(self.inner)), len(self.inner)):
            node = self.inner[i]
            if not reached.isdisjoint(node.all_input_nodes):
                if costs.is_launch(node) or self.problem.seconds[i] and not costs.is_light(node):
                    return _label(node)
                reached.add(node)
        return ""


def _event(lane: str, start: float, end: float, place: Place | None, names: Sequence[str]) -> Event:
    layer, block, part = place or (None, "", "")
    return Event(lane=lane, start=start, seconds=end - start, names=tuple(names)[:_NAMES], layer=layer, block=block, part=part)


def _kind(launch: Node) -> str:
    return "counts" if _only_read_by_host(launch) else costs.op_name(launch)


def _only_read_by_host(launch: Node) -> bool:
    """Sizes: a small integer result, some of it read by ``.item()``."""
    if any(t.dtype.is_floating_point or costs.bytes_of(t) > _COUNTS_BYTES for t in costs.tensors_of(launch)):
        return False
    seen, stack = set(), [launch]
    while stack:
        node = stack.pop()
        if costs.op_name(node) == "_local_scalar_dense":
            return True
        new = [u for u in node.users if u not in seen and (costs.is_free(u) or costs.is_light(u) or costs.is_wait(u))]
        seen.update(new)
        stack += new
    return False


def _behind(inner: Sequence[Node], starts: Sequence[int], result: Run, begin: float, end: float) -> tuple[str, ...]:
    """Names of the nodes that overlap most with [begin, end]; ``starts`` are their positions by start time."""
    at = bisect.bisect_left(starts, begin, key=lambda i: result.finish[i])
    overlap = []
    while at < len(starts) and result.start[starts[at]] < end:
        i = starts[at]
        overlap.append((min(result.finish[i], end) - max(result.start[i], begin), -i))
        at += 1
    return tuple(_label(inner[-i]) for _, i in heapq.nlargest(_BEHIND, overlap))


def _label(node: Node) -> str:
    """Where a node comes from, as the user wrote it: ``model.layers.3.self_attn: mm``."""
    stack = node.meta.get("nn_module_stack") or node.meta.get("fwd_nn_module_stack") or {}
    path = next((entry[0] for entry in reversed(list(stack.values())) if isinstance(entry, tuple) and entry[0]), "")
    path = clean_path(path)
    return f"{path}: {costs.op_name(node)}" if path else node.name
