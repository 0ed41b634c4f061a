"""A traced graph, computed piece by piece: the values of one stage, from what is kept of the stages before it.

Contract: the graph is not changed. Every node belongs to a *stage*; what comes later is computed from the *live* values:
those of a stage, or of one before it, that a node of a later stage takes in. So no more than the live values of each
batch, and the activations of one stage of one batch, are in memory.

What is made of weights alone is never kept: it is computed again where it is wanted, because weights change in between.
"""
from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch.fx import GraphModule, Interpreter, Node
from torch.fx.node import map_arg

from ..errors import RefusedError
from ..passes.dataflow import Dataflow, op_name, storages_of, written_arguments

Values = dict[Node, object]


class Program:
    """Args:
        weights: the placeholders that are parameters; inputs: those that are another value in every batch.
    """

    def __init__(self, gm: GraphModule, *, weights: Iterable[Node] = (), inputs: Iterable[Node] = ()) -> None:
        self.gm = gm
        self.flow = Dataflow(gm.graph)
        self._weights, self._changing = self.flow.mask(weights), self.flow.mask(inputs)
        self.position = self.flow.position
        self._interpreter = Interpreter(gm)
        self._inputs = {node: self._direct(node) for node in self.flow.nodes}
        self._readers: dict[Node, list[Node]] = {}       # of a write: who reads that memory later
        for node, inputs in self._inputs.items():
            for write in inputs:
                if write not in node.all_input_nodes:
                    self._readers.setdefault(write, []).append(node)
        self._plans: dict[tuple, list[Node]] = {}
        self._vmapped = _regions(self.flow.nodes)
        self._owner: dict[int, Node] = {}       # of a memory: the first node that shows it
        for node in reversed(self.flow.nodes):
            self._owner.update(dict.fromkeys(storages_of(node), node))

    def inputs(self, node: Node) -> tuple[Node, ...]:
        """What ``node`` is computed from: its arguments, and the writes into their memory before it."""
        return self._inputs[node]

    def _direct(self, node: Node) -> tuple[Node, ...]:
        at = self.position[node]
        writes = [w for a in node.all_input_nodes for w in self.flow.writes_to(a) if self.position[w] < at]
        return tuple(dict.fromkeys([*node.all_input_nodes, *writes]))

    def is_made_of_weights(self, node: Node) -> bool:
        above = self.flow.ancestors(node)
        return bool(above & self._weights) and not above & self._changing

    def _is_blank(self, node: Node) -> bool:
        """Whether it is fresh memory that others fill: it is made again where it is wanted."""
        return bool(self.flow.writes_to(node)) and not self.flow.ancestors(node) & self._changing

    def _users(self, node: Node) -> Iterable[Node]:
        return (u for u in [*node.users, *self._readers.get(node, ())] if u.op != "output")

    def set_stages(self, stages: list[tuple[Node, set[Node]]]) -> None:
        """Stage i ends with a node and holds some others for certain; the rest belongs where it stands in the graph."""
        self.stage: dict[Node, int] = {}
        ends, now = [self.position[end] for end, _ in stages], 0
        for node in self.flow.nodes:
            while now < len(ends) and self.position[node] > ends[now]:
                now += 1
            self.stage[node] = now
        for i, (_, members) in enumerate(stages):
            self.stage.update(dict.fromkeys(members, i))
        self._live: dict[int, list[Node]] = {i: [] for i in range(len(stages))}
        for node in self.flow.nodes:
            if node.op == "placeholder" or self.is_made_of_weights(node) or self._is_blank(node):
                continue
            last = max((self.stage[u] for u in self._users(node)), default=-1)
            for i in range(self.stage[node], min(last, len(stages))):
                self._live[i].append(node)

    def live(self, stage: int) -> list[Node]:
        """The nodes up to ``stage`` that later ones take in; placeholders, and what is made of weights alone, left out."""
        return self._live[stage]

    def members(self, stage: int) -> list[Node]:
        return [n for n in self.flow.nodes if self.stage[n] == stage and n.op not in ("placeholder", "output")
                and not self.is_made_of_weights(n)]

    def beside(self, states: Iterable[Node]) -> tuple[list[Node], list[Node]]:
        """(what does not depend on ``states``: masks, positions, embeddings; those of it that something else takes in)."""
        first = self.flow.mask(states)
        depends = {n for n in self.flow.nodes if (self.flow.ancestors(n) | self.flow.bit(n)) & first}
        inside = {n for first, last in self._vmapped for n in self.flow.nodes[first:last + 1]
                  if any(m in depends for m in self.flow.nodes[first:last + 1])}
        nodes: dict[Node, None] = {}
        for n in self.flow.nodes:
            # Of a shape only (``empty_like``): its value does not depend on the states, but its argument does.
            by_shape = any(a not in nodes and a.op != "placeholder" and not self.is_made_of_weights(a)
                           for a in self._inputs[n])
            if not (n in depends or n in inside or by_shape or n.op in ("placeholder", "output")
                    or self.is_made_of_weights(n)):
                nodes[n] = None
        return list(nodes), [n for n in nodes if not self._is_blank(n)
                       and any(u in depends or self.is_made_of_weights(u) for u in self._users(n))]

    def run_all(self, nodes: Iterable[Node], known: Mapping[Node, object]) -> Values:
        """The values of ``nodes``, every one of them in order: a mask that is built under vmap needs it."""
        values: Values = {}

        def value(n: Node) -> object:
            if n not in values and n not in known:
                values.update(self.evaluate([n], known))
            return values[n] if n in values else known[n]

        for node in nodes:
            if node not in known:
                args, kwargs = (map_arg(a, value) for a in (node.args, node.kwargs))
                values[node] = getattr(self._interpreter, node.op)(node.target, args, kwargs)
        return values

    def evaluate(self, wanted: Iterable[Node], known: Mapping[Node, object]) -> Values:
        """The values of ``wanted``; ``known`` are given, and nothing above them is computed."""
        wanted = list(dict.fromkeys(wanted))
        key = (tuple(wanted), frozenset(known))
        if key not in self._plans:
            self._plans[key] = self._plan(wanted, known)
        plan = self._plans[key]
        uses: dict[Node, int] = {}
        for node in plan:
            for a in node.all_input_nodes:
                uses[a] = uses.get(a, 0) + 1
        keep, values = set(wanted), {}

        def value(n: Node) -> object:
            return values[n] if n in values else known[n]

        for node in plan:
            args, kwargs = (map_arg(a, value) for a in (node.args, node.kwargs))
            values[node] = getattr(self._interpreter, node.op)(node.target, args, kwargs)
            for a in node.all_input_nodes:
                uses[a] -= 1
                if not uses[a] and a not in keep:
                    values.pop(a, None)
        return {n: value(n) for n in wanted}

    def needs(self, wanted: Iterable[Node], known: Mapping[Node, object]) -> list[Node]:
        """Which of ``known`` the values of ``wanted`` are computed from."""
        given, found, seen, todo = known, [], set(), list(wanted)
        while todo:
            node = todo.pop()
            if node in seen:
                continue
            seen.add(node)
            if node in given:
                found.append(node)
            else:
                todo += self._inputs[node]
        return found

    def _plan(self, wanted: list[Node], known: Mapping[Node, object]) -> list[Node]:
        """The nodes to compute, in graph order."""
        found, todo = set(), [n for n in wanted if n not in known]
        while todo:
            node = todo.pop()
            if node in found:
                continue
            if node.op == "placeholder":
                raise RefusedError(f"{node.name}, an argument of the traced graph, has no value; please report this model")
            found.add(node)
            todo += [a for a in self._inputs[node] if a not in known]
        places = [self.position[n] for n in found]
        for first, last in self._vmapped:       # what is computed under vmap needs its beginning and its end around it
            if any(first < place < last for place in places):
                found |= {self.flow.nodes[first], self.flow.nodes[last]}
        plan = sorted(found, key=self.position.__getitem__)
        for node in plan:
            self._writes_nothing_known(node, found)
        return plan

    def _writes_nothing_known(self, node: Node, computed: set[Node]) -> None:
        """A piece is computed more than once, so it must not change what was there before it."""
        for argument in written_arguments(node):
            owner = next((self._owner[m] for m in storages_of(argument)), argument)
            if owner not in computed:
                raise RefusedError(f"{node.name} ({op_name(node)}) writes into {owner.name}, which lies outside of its "
                                   "block; that cannot be computed twice. Use an out-of-place operation there")


def _regions(nodes: list[Node]) -> list[tuple[int, int]]:
    """(beginning, end) of what is computed under ``torch.vmap``; inner ones too."""
    found, open_ = [], []
    for place, node in enumerate(nodes):
        if op_name(node) == "_vmap_increment_nesting":
            open_.append(place)
        elif op_name(node) == "_vmap_decrement_nesting" and open_:
            found.append((open_.pop(), place))
    return found
