"""Step 4: order compute, launches and waits so that collectives run behind compute.

Contract: a post-grad ATen graph with functional collectives in; the same nodes in another order out, and ``Schedule``.
Nothing is added, removed or recomputed, so the numbers are the same to the last bit. The new order is never slower than
the old one in the simulation; if nothing better is found, the old order stays. Better is what also bears links that take longer
than predicted (``simulate.judged``). Kept as they were, whatever the costs:
  - the order of all launches, over all groups (ranks with other size hints must still launch in the same order);
  - communication that we cannot read (c10d, symm_mem, custom ops of unknown namespaces, subgraphs with collectives)
    against every launch and every wait;
  - reads from the host (``.item()``, copies to the CPU) among themselves; random draws likewise; effects likewise;
  - readers and writers of one memory; the inputs of a collective are read until its wait.

Terms
  launch, wait  a functional collective and its ``wait_tensor``; in between it is *in flight*
  item          a few nodes that move as one: a kernel with the views and small loops that only it needs or feeds
  order         a permutation of items; a program
  simulation    one compute stream runs the order; the link (or each group's own, ``Rates.one_link`` and ``links``) runs collectives
                first in, first out: one starts at max(link free, now), and a wait idles until it is done. While a link
                is busy the compute stream runs at (1 - link_compute_share); behind another one a collective may take less
                (``link_queued``)
  tail, head    longest path, through compute and links, from an item to the end, and from the start to an item
  bound         no order can be faster; see ``simulate.lower_bound``

Steps
  1. Dependencies: data, and the rules above.
  2. Contract nodes to items, so that the search is about kernels.
  3. Search (``simulate.py``) for an order of items; judge it by a simulation of the nodes.
  4. Write it back, unless it is no better than what came in, or takes more than ``max_memory``.
"""
from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch.fx import Graph, GraphModule, Node

from . import costs
from ._torch import draws_random, has_effect, writes_memory
from .costs import Rates, is_launch, is_wait, launch_of
from .dataflow import storages_of, written_arguments
from .simulate import COMPUTE, LAUNCH, WAIT, Problem, Run, free_seconds, lower_bound, run, search, topological
from .timeline import Collective, Drawn, Timeline

COMPUTE_NAMESPACES = frozenset({
    "aten", "prims", "prim", "inductor", "transformers", "quantized", "quantized_decomposed", "mkldnn", "mkl", "onednn",
    "mkldnn_prepacked", "torchvision", "torchao", "_quantized", "rngprims", "debugprims", "farskip_fx",
    "flash_attn", "xformers", "mamba_ssm", "causal_conv1d", "liger",
})
"""Namespaces of custom ops that do not communicate."""
_GRAIN = 1 / 4000       # of all compute: smaller nodes move with their neighbours
_GAIN = 1e-4            # a smaller improvement is not worth another order
_ENDS = ("placeholder", "get_attr", "output")


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """What ``schedule`` did; ``before`` and ``after`` are the two orders, simulated."""
    order: tuple[str, ...]
    before: Timeline
    after: Timeline
    compute_s: float
    link_s: float
    bound_s: float
    moved: int
    items: int = 0
    barriers: int = 0
    reason: str = ""        # why the order stayed, if it did
    operations: dict[str, float] = field(default_factory=dict)      # seconds of compute by kernel, "loops" for fused ones

    @property
    def collectives(self) -> tuple[Collective, ...]:
        """Of the new order."""
        return self.after.collectives

    @property
    def before_s(self) -> float:
        return self.before.seconds

    @property
    def after_s(self) -> float:
        return self.after.seconds

    @property
    def exposed_before_s(self) -> float:
        return self.before.exposed_s

    @property
    def exposed_after_s(self) -> float:
        return self.after.exposed_s

    @property
    def peak_bytes_before(self) -> int:
        return self.before.peak_bytes

    @property
    def peak_bytes_after(self) -> int:
        return self.after.peak_bytes


def schedule(graph: Graph, *, rates: Rates, max_memory: int | None = None,
             compute_namespaces: Collection[str] = COMPUTE_NAMESPACES) -> Schedule:
    """Reorder ``graph`` in place.

    Args:
        rates: figures of device and link, equal on all ranks.
        max_memory: bytes that intermediate results may take at their peak; an order that takes more, and more than the
            incoming order, is not used.
        compute_namespaces: custom ops in any other namespace may communicate, so nothing is moved across them.
    """
    nodes = list(graph.nodes)
    seconds = costs.graph_seconds(graph, rates)
    links = {n: costs.link_seconds(n, rates) for n in nodes if is_launch(n)}
    rules = _Rules(nodes, compute_namespaces)
    program = _Program(nodes, rules, seconds, links, rates)
    memory = _Memory(nodes)
    before, peak_before = program.simulate(nodes), memory.peak(nodes)
    best, after, peak, reason = nodes, before, peak_before, "no collectives"
    if links:
        reason = "no faster order found"
        limit = max_memory if max_memory is None else max(max_memory, peak_before)
        judged_before = before.end + program.slower_end(nodes)
        for order in program.orders():
            result = program.simulate(order)
            if not result.end + program.slower_end(order) < judged_before * (1 - _GAIN):
                break
            if result.end > before.end:
                continue
            peak = memory.peak(order)
            if limit is None or peak <= limit:
                best, after, reason = order, result, ""
                break
            peak, reason = peak_before, f"faster orders take more than {limit} bytes"
    moved = _write_back(graph, nodes, best)
    return Schedule(
        order=tuple(n.name for n in best), before=program.timeline(nodes, before, peak_before),
        after=program.timeline(best, after, peak), moved=moved, compute_s=sum(seconds.values()), link_s=sum(links.values()),
        bound_s=min(program.bound(), after.end), items=len(program.items.seconds), barriers=rules.barriers, reason=reason,
        operations=_operations(seconds))


def _operations(seconds: dict[Node, float]) -> dict[str, float]:
    sums: dict[str, float] = {}
    for node, own in seconds.items():
        if own:
            name = "loops" if costs.is_light(node) else costs.op_name(node)
            sums[name] = sums.get(name, 0.0) + own
    return sums


# --- 1. dependencies ---------------------------------------------------------------------------------------------
class _Rules:
    """Edges between nodes beyond data flow, so that what must keep its order does."""

    def __init__(self, nodes: Sequence[Node], compute_namespaces: Collection[str]) -> None:
        self.sources: dict[Node, list[Node]] = {n: list(n.all_input_nodes) for n in nodes}
        self.pinned: set[Node] = set()      # nodes of a chain: items of their own
        self.barriers = 0
        self._compute_namespaces = compute_namespaces
        self._chains(nodes)
        self._memory(nodes)

    def _after(self, node: Node, earlier: Node | None) -> None:
        if earlier is not None and earlier is not node:
            self.sources[node].append(earlier)

    def _chains(self, nodes: Sequence[Node]) -> None:
        last: dict[str, Node] = {}
        waits: list[Node] = []              # since the last opaque communication
        for node in nodes:
            if node.op != "call_function":
                continue
            opaque = self._is_opaque(node)
            chains = [name for name, member in (
                ("launch", is_launch(node) or opaque), ("host", _reads_from_host(node) or opaque),
                ("random", draws_random(node.target)), ("effect", has_effect(node.target) or opaque)) if member]
            for name in chains:
                self._after(node, last.get(name))
                last[name] = node
            if chains:
                self.pinned.add(node)
                self.barriers += not is_launch(node)
            if is_wait(node):
                self._after(node, last.get("opaque"))
                waits.append(node)
            if opaque:
                for wait in waits:
                    self._after(node, wait)
                waits, last["opaque"] = [], node

    def _is_opaque(self, node: Node) -> bool:
        """May communicate in a way that we cannot follow."""
        if is_launch(node) or is_wait(node):
            return False
        if isinstance(node.target, torch._ops.OpOverload):
            return costs.namespace_of(node) not in self._compute_namespaces and (
                costs.op_name(node) != "_wrap_tensor_autograd")
        return any(_holds_communication(m, self._is_opaque) for m in _subgraphs(node))

    def _memory(self, nodes: Sequence[Node]) -> None:
        """Readers of a memory stay between its writers. A wait writes what the launch returned, and reads what the launch
        was given: until it returns, that is still being sent."""
        writes = {n: _written(n) for n in nodes if n.op == "call_function"}
        reads = {n: [*n.all_input_nodes, *(n.args[0].all_input_nodes if is_wait(n) and _is_node(n.args[0]) else ())]
                 for n in nodes}
        storages = {n: storages_of(n) for n in nodes}
        written = {s for targets in writes.values() for t in targets for s in storages[t]}
        if not written:
            return
        last_write: dict[int, Node] = {}
        readers: dict[int, list[Node]] = {}
        for node in nodes:
            touched = {s for source in reads[node] for s in storages[source]} & written
            targets = {s for t in writes.get(node, ()) for s in storages[t]}
            for storage in touched | targets:
                self._after(node, last_write.get(storage))
            for storage in targets:
                for reader in readers.pop(storage, ()):
                    self._after(node, reader)
                last_write[storage] = node
            for storage in touched - targets:
                readers.setdefault(storage, []).append(node)


def _is_node(value) -> bool:
    return isinstance(value, Node)


def _written(node: Node) -> list[Node]:
    if is_wait(node):
        return [a for a in node.args[:1] if _is_node(a)]
    return written_arguments(node) if writes_memory(node.target) or "mutation" in str(node.target) else []


def _reads_from_host(node: Node) -> bool:
    """``.item()``, or a copy from a device to the CPU: it blocks the host until the device is there."""
    if costs.op_name(node) == "_local_scalar_dense":
        return True
    out = {t.device.type for t in costs.tensors_of(node)}
    into = {t.device.type for source in node.all_input_nodes for t in costs.tensors_of(source)
            if t.dim() or t.device.type != "cpu"}
    return "cpu" in out and bool(into - {"cpu"})


def _subgraphs(node: Node) -> list[GraphModule]:
    owner = node.graph.owning_module
    found = []
    for source in node.all_input_nodes:
        module = getattr(owner, str(source.target), None) if source.op == "get_attr" and owner is not None else None
        if isinstance(module, GraphModule):
            found.append(module)
    return found


def _holds_communication(module: GraphModule, is_opaque: Callable[[Node], bool]) -> bool:
    return any(is_launch(n) or is_wait(n) or (n.op == "call_function" and is_opaque(n)) for n in module.graph.nodes)


# --- 2. items ----------------------------------------------------------------------------------------------------
class _Program:
    """The graph as items for the search, and orders of items as orders of nodes."""

    def __init__(self, nodes: Sequence[Node], rules: _Rules, seconds: dict[Node, float], links: dict[Node, float],
                 rates: Rates) -> None:
        self._seconds = seconds
        self._links = links
        self._lanes = rates.lanes
        self._first = [n for n in nodes if n.op in _ENDS[:2]]
        self._last = [n for n in nodes if n.op == _ENDS[2]]
        inner = [n for n in nodes if n.op not in _ENDS]
        self._number = {n: i for i, n in enumerate(n for n in inner if n in links)}
        groups: dict[str, int] = {}
        self._group = {n: groups.setdefault(costs.lane_of(n, rates), len(groups)) for n in self._number}
        head_of = _merge(inner, rules, seconds)
        members: dict[Node, list[Node]] = {}
        for node in inner:
            members.setdefault(head_of(node), []).append(node)
        self._members = list(members.values())
        self._sources = rules.sources
        self._position = {n: i for i, n in enumerate(inner)}
        self.items = self._problem(self._members)

    def _problem(self, members: Sequence[Sequence[Node]]) -> Problem:
        item_of = {n: i for i, group in enumerate(members) for n in group}
        before = [sorted({item_of[s] for n in group for s in self._sources[n] if s in item_of} - {i})
                  for i, group in enumerate(members)]
        link = [self._link(group[0]) for group in members]      # launches and waits are alone in their items
        return Problem(
            seconds=[sum(self._seconds[n] for n in group) for group in members],
            role=[COMPUTE if l < 0 else LAUNCH if is_launch(group[0]) else WAIT for l, group in zip(link, members)],
            link=link, before=before, link_seconds=[self._links[n] for n in self._number],
            link_group=list(self._group.values()), **self._lanes)

    def _link(self, node: Node) -> int:
        return self._number.get(launch_of(node) if is_wait(node) else node, -1)

    def simulate(self, order: Sequence[Node]) -> Run:
        """An order of nodes; the run counts them without placeholders and output."""
        alone = self._alone(order)
        return run(alone, range(len(alone.seconds)))

    def slower_end(self, order: Sequence[Node]) -> float:
        """What ``simulate.judged`` adds to the end of ``simulate``."""
        alone = self._alone(order).slower()
        return run(alone, range(len(alone.seconds))).end

    def _alone(self, order: Sequence[Node]) -> Problem:
        """The nodes as items that need nothing: their order is given."""
        inner = [n for n in order if n in self._position]
        link = [self._link(n) for n in inner]
        return Problem(seconds=[self._seconds[n] for n in inner], link=link, before=[[] for _ in inner],
                        role=[COMPUTE if l < 0 else LAUNCH if is_launch(n) else WAIT for l, n in zip(link, inner)],
                        link_seconds=[self._links[n] for n in self._number], link_group=list(self._group.values()),
                        **self._lanes)

    def orders(self) -> Iterator[list[Node]]:
        """Of nodes, best first."""
        incoming = topological(self.items, lambda i: self._position[self._members[i][-1]])
        yield from map(self._nodes_in, search(self.items, incoming))

    def bound(self) -> float:
        return lower_bound(self.items)

    def _nodes_in(self, order: Sequence[int]) -> list[Node]:
        """The program of an order of items. An item that costs nothing stands before the first one that needs it."""
        out, done = list(self._first), set()
        costly = [i for i in order if self.items.seconds[i] or self.items.role[i] != COMPUTE]
        for item in [*costly, *order]:
            stack = [item]
            while stack:
                missing = [b for b in self.items.before[stack[-1]] if b not in done]
                stack += missing
                if not missing:
                    top = stack.pop()
                    out += self._members[top] if top not in done else ()
                    done.add(top)
        return out + self._last

    def timeline(self, order: Sequence[Node], result: Run, peak: int) -> Timeline:
        drawn = Drawn(inner=[n for n in order if n in self._position], problem=self._alone(order), run=result,
                      launches=list(self._number), free=self._free)
        return Timeline(seconds=result.end, exposed_s=result.idle, peak_bytes=peak, events=drawn.events(),
                        collectives=drawn.collectives(first=len(self._first)))

    @cached_property
    def _free(self) -> list[float]:
        return free_seconds(self.items)


def _merge(inner: Sequence[Node], rules: _Rules, seconds: dict[Node, float]) -> Callable[[Node], Node]:
    """Which item a node is in, named by one of its nodes.

    Contracting a node into the only item that uses it, or an item into the only one that feeds it, closes no cycle.
    """
    inside = set(inner)
    users: dict[Node, list[Node]] = {n: [] for n in inner}
    for node in inner:
        for source in rules.sources[node]:
            if source in inside:
                users[source].append(node)
    grain = _GRAIN * sum(seconds.values())
    alone = {n for n in inner if is_launch(n) or is_wait(n)}
    fixed = alone | rules.pinned
    light = {n for n in inner if costs.is_light(n)}
    head: dict[Node, Node] = {}

    def head_of(node: Node) -> Node:
        while node in head:
            node = head[node]
        return node

    for node in reversed(inner):
        if node in fixed or (seconds[node] > grain and node not in light):
            continue
        takers = {head_of(user) for user in users[node]}
        if len(takers) == 1 and not takers & alone and (seconds[node] <= grain or takers <= light):
            head[node] = takers.pop()
    total: dict[Node, float] = {}
    sources: dict[Node, set[Node]] = {}
    for node in inner:
        mine = head_of(node)
        total[mine] = total.get(mine, 0.0) + seconds[node]
        sources.setdefault(mine, set()).update(s for s in rules.sources[node] if s in inside)
    for node in inner:
        if node in head or node in fixed or total[node] > grain:
            continue
        feeders = {head_of(s) for s in sources[node]} - {node}
        if len(feeders) == 1 and not feeders & alone:
            head[node] = feeders.pop()
    return head_of


# --- 4. write back, memory -------------------------------------------------------------------------------
def _write_back(graph: Graph, nodes: Sequence[Node], order: Sequence[Node]) -> int:
    """Reorder ``graph``; returns how many nodes have another node in front of them than before."""
    if order is nodes:
        return 0
    in_front = dict(zip(nodes[1:], nodes))
    output = graph.output_node()
    for node in order:
        if node is not output:
            output.prepend(node)
    graph.lint()
    return sum(in_front.get(node) is not before for before, node in zip(order, order[1:]))


class _Memory:
    """Live bytes of intermediate results over an order. Of loops only what Inductor is likely to store counts: what a
    kernel or several nodes read. Collectives hold their inputs until the wait."""

    def __init__(self, nodes: Sequence[Node]) -> None:
        self._holds: dict[Node, list[Node]] = {}
        self._size: dict[Node, int] = {}
        kept = {costs.through_views(n) for out in nodes if out.op == "output" for n in out.all_input_nodes}
        self._kept = kept
        for node in nodes:
            roots = [costs.through_views(s) for s in node.all_input_nodes]
            if is_wait(node) and (launch := launch_of(node)) is not None:
                roots += [costs.through_views(s) for s in launch.all_input_nodes]
            self._holds[node] = roots
        read_by_kernels = {r for n in nodes if not costs.is_light(n) and not costs.is_free(n) or is_launch(n)
                           for r in self._holds[n]}
        for node in nodes:
            real = node.op == "call_function" and costs.through_views(node) is node and not is_wait(node)
            if real and (not costs.is_light(node) or node in kept or node in read_by_kernels or len(node.users) > 1):
                self._size[node] = costs.bytes_out(node)

    def peak(self, order: Sequence[Node]) -> int:
        last = {root: node for node in order for root in self._holds[node]}
        live = peak = 0
        for node in order:
            live += self._size.get(node, 0)
            peak = max(peak, live)
            for root in set(self._holds[node]):
                if last[root] is node and root not in self._kept:
                    live -= self._size.get(root, 0)
        return peak
