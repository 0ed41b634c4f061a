"""Step 5: make Inductor keep the order that ``schedule`` planned, and check that it did.

Contract: hooks for Inductor's scheduler, before and after fusion. The planned order is the order in which the scheduler
receives its nodes: post-grad order, lowered. Nodes are never added or removed; only dependencies without data are.
Fusions that would break the order become impossible, all others stay. Whatever Inductor's own passes do afterwards
(the reorder for peak memory may stay on), the fence raises rather than let a received buffer be read before its wait.

Terms
  hard node   an extern kernel or a template: what does not fuse away. Dependencies go on these alone: on a loop that
              reads the received buffer, "after the launch" would be renamed to "after the wait"
  received    a buffer that a collective in flight writes; reading it is wrong until its wait
  version     Inductor renames a buffer each time something writes to it: launch -> buf1, its wait -> buf2. A read names
              the version that it needs, and so who must run first

Steps
  order    before fusion: a wait comes after each hard node planned before it, and a hard node after each launch planned
           before it, so that compute stays between the two. Only the skeleton: a node hangs on the waits and launches
           next to it, and the rest follows; what is an ancestor already gets nothing
  repair   Inductor up to 2.13 loses renames on the CPU (``SchedulerNode.recompute_size_and_body``) where a loop has no
           fake dependency: the loop then reads version buf1, and may run before the wait. Before fusion each reader is
           given one, on the wait that it follows anyway, so that nothing is lost; what is lost all the same is put
           back after fusion
  verify   after fusion, and again after the last reordering
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from . import _torch as inductor


class ScheduleBroken(RuntimeError):
    """Inductor's final order would read a buffer that is still being received, or launch out of order."""


@dataclass(frozen=True, kw_only=True)
class Fenced:
    """What the fence did to one graph."""
    hard: int = 0
    waits: int = 0
    dependencies: int = 0       # added between hard nodes
    guarded: int = 0            # readers that were given a fake dependency on their wait
    repaired: int = 0           # readers that had lost it all the same


def order(snodes: list) -> tuple[list, Fenced]:
    """Before fusion: add the dependencies. Returns the nodes, in an order that satisfies them, and what was done."""
    scheduler = inductor.scheduler_of(snodes)
    hard = [n for n in snodes if inductor.is_extern(n) or inductor.is_template(n)]
    waits = [n for n in hard if inductor.is_wait(n)]
    if not waits:
        return snodes, Fenced(hard=len(hard))
    dependencies = _skeleton(snodes, hard)
    guarded = _guard(scheduler, snodes) if inductor.RENAMES_MAY_BE_LOST else 0
    return inductor.resort(scheduler, snodes), Fenced(
        hard=len(hard), waits=len(waits), dependencies=dependencies, guarded=guarded)


def repair(snodes: list) -> tuple[list, int]:
    """After fusion: readers that lost the version they need get it back. Returns nodes in a valid order; how many."""
    scheduler = inductor.scheduler_of(snodes)
    if scheduler is None or not inductor.RENAMES_MAY_BE_LOST:
        return snodes, 0
    versions = _Versions(scheduler)
    repaired = 0
    for snode in snodes:
        lost = sum(inductor.rename_reads(part, renames) for part, renames in _stale(versions, snode))
        if lost:
            inductor.refresh_group(snode)
        repaired += lost
    return (scheduler.topological_sort_schedule(snodes) if repaired else snodes), repaired


def verify(snodes: Sequence, *, launches: bool = True) -> None:
    """Raise unless every read comes after the write that it needs, and launches are in the planned order.

    Args:
        launches: False where another pass is asked to reorder launches, and answers for it.

    Raises:
        ScheduleBroken: names the node and the buffer.
    """
    scheduler = inductor.scheduler_of(snodes)
    if scheduler is None or not any(inductor.is_wait(part) for n in snodes for part in n.get_nodes()):
        return
    versions = _Versions(scheduler)
    place = {part.get_name(): at for at, n in enumerate(snodes) for part in n.get_nodes()}
    launched = -1
    for at, snode in enumerate(snodes):
        for part in snode.get_nodes():
            if inductor.is_launch(part):
                number = inductor.operation_number(part.get_name())
                if number < launched and launches:
                    raise ScheduleBroken(f"{part.get_name()} ({_what(part)}) would launch after a collective that is "
                                         "planned after it; ranks that do not agree on the order hang. " + _ADVICE)
                launched = number
            for buffer, needed in versions.needed_by(part):
                writer = versions.writer[needed]
                if place.get(writer, -1) > at:
                    raise ScheduleBroken(f"{part.get_name()} ({_what(part)}) would read {buffer} before {writer} has "
                                         f"received it. " + _ADVICE)


_ADVICE = ("This is a bug of farskip_fx or of this PyTorch version: please report it, and compile with overlap=False "
           "until it is solved")


# --- order -------------------------------------------------------------------------------------------------------
def _skeleton(snodes: Sequence, hard: Sequence) -> int:
    """Dependencies between hard nodes, as few as give the planned order.

        launch A   mm 1   mm 2   wait A   mm 3   launch B   mm 4   wait B
        mm 1, mm 2 -> A     wait A -> mm 1, mm 2     mm 4 -> B     wait B -> wait A, mm 3, mm 4
    """
    reach = _Ancestors(snodes)
    added = 0
    last_launch = last_wait = None
    since: list = []            # hard nodes since the last wait

    def hang(snode, earlier) -> None:
        nonlocal added
        if earlier is not None and not reach.has(snode, earlier) and inductor.order_after(snode, earlier):
            reach.add(snode, earlier)
            added += 1

    fenced = set(hard)
    for snode in snodes:
        reach.enter(snode)
        if snode not in fenced:
            continue
        hang(snode, last_launch)
        if inductor.is_wait(snode):
            for earlier in (*reversed(since), last_wait):
                hang(snode, earlier)
            since, last_wait = [], snode
            continue
        since.append(snode)
        if inductor.is_launch(snode):
            last_launch = snode
    return added


class _Ancestors:
    """Ancestor sets as bit sets, up to date with the dependencies being added (Inductor's own are not)."""

    def __init__(self, snodes: Sequence) -> None:
        self._bit = {n: 1 << i for i, n in enumerate(snodes)}
        self._writer = {b: n for n in snodes for b in n.get_buffer_names()}
        self._above: dict = {}

    def enter(self, snode) -> None:
        mask = 0
        for dependency in snode.unmet_dependencies:
            source = self._writer.get(dependency.name)
            if source is not None and source is not snode:
                mask |= self._above.get(source, 0) | self._bit[source]
        self._above[snode] = mask

    def has(self, snode, earlier) -> bool:
        return bool(self._above[snode] & self._bit[earlier])

    def add(self, snode, earlier) -> None:
        self._above[snode] |= self._above[earlier] | self._bit[earlier]


# --- repair ------------------------------------------------------------------------------------------------------
class _Versions:
    """For each buffer that somebody writes to: its versions in planned order. A read needs the last one before it."""

    def __init__(self, scheduler) -> None:
        self.writer: dict[str, str] = {}                # version -> operation that writes it
        self._root = dict(scheduler.mutation_real_name)
        self._versions: dict[str, list[tuple[int, str]]] = {}
        for version, root in self._root.items():
            self.writer[version] = inductor.writer_of(scheduler, version)
            number = inductor.operation_number(self.writer[version])
            self._versions.setdefault(root, []).append((number, version))
        for versions in self._versions.values():
            versions.sort()

    def needed_by(self, part) -> list[tuple[str, str]]:
        """(what it reads, the version that it should read) for each read of a buffer that somebody writes to."""
        number, found = inductor.operation_number(part.get_name()), []
        for name in dict.fromkeys(inductor.data_reads(part)):
            root = self._root.get(name, name)
            earlier = [version for at, version in self._versions.get(root, ()) if at < number]
            if earlier:
                found.append((name, earlier[-1]))
        return found


def _stale(versions: _Versions, snode) -> list[tuple[object, dict[str, str]]]:
    """Loops inside ``snode`` that read an older version than they need, with the renames that put it right."""
    found = []
    for part in snode.get_nodes():
        if inductor.is_extern(part):
            continue
        renames = {name: needed for name, needed in versions.needed_by(part) if name != needed}
        if renames:
            found.append((part, renames))
    return found


def _guard(scheduler, snodes: Sequence) -> int:
    """Give each loop that reads a received buffer a fake dependency on the wait; the renames of such nodes survive."""
    versions = _Versions(scheduler)
    waits = {n.get_name() for n in snodes if inductor.is_wait(n)}
    guarded = 0
    for snode in snodes:
        if inductor.is_extern(snode) or not snode.get_buffer_names():
            continue
        needed = [version for name, version in versions.needed_by(snode)
                  if name == version and versions.writer[version] in waits]
        if needed:
            inductor.depend_on_buffer(snode, needed[0])
            guarded += 1
    return guarded


def _what(part) -> str:
    op = getattr(part.node, "op_overload", None)
    return str(op) if op is not None else type(part.node).__name__
