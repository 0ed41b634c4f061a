"""The direct interpretation of a connectivity: a traced graph, evaluated block by block as the definition says.

The graph is not changed. Each block that may not see something is computed from a state that is evaluated for it: the
update with the hidden terms set to *zero* (the rewiring pass, in contrast, leaves them out of the graph). Slow, eager and
simple; ``verify`` compares with it.
"""
from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.fx import GraphModule, Interpreter, Node
from torch.fx.node import map_arg

from .passes.dataflow import op_name, value_inputs
from .passes.detect import Block, Blocks
from .passes.rewire import Reader
from .passes.sums import sum_of


class Direct:
    """Evaluates ``gm``, whose ``readers`` read the stream without what is hidden from them."""

    def __init__(self, gm: GraphModule, blocks: Blocks, readers: Sequence[Reader]) -> None:
        self.gm, self.blocks, self.readers = gm, blocks, readers
        self.interpreter = Interpreter(gm)
        self.owner = {node: i for i, reader in enumerate(readers) for node in blocks.flow.members(reader.nodes)}

    def run(self, *args) -> object:
        """What the graph returns; ``values`` then holds what each node was."""
        self.values: dict[Node, object] = {}
        self.seen_by: dict[int, dict[Node, object]] = {}
        inputs = iter(args)
        for node in self.gm.graph.nodes:
            if node.op == "placeholder":
                self.values[node] = next(inputs)
            elif node.op == "output":
                return map_arg(node.args[0], self.values.__getitem__)
            else:
                owner = self.owner.get(node)
                self.values[node] = self._call(node, self.values if owner is None else self._seen_by(owner))
        raise ValueError("the graph has no output")

    def _call(self, node: Node, values) -> object:
        args, kwargs = (map_arg(a, values.__getitem__) for a in (node.args, node.kwargs))
        return getattr(self.interpreter, node.op)(node.target, args, kwargs)

    def _seen_by(self, number: int) -> dict[Node, object]:
        """The values as a reader sees them: its state without what is hidden, and what is computed from that."""
        if number not in self.seen_by:
            reader = self.readers[number]
            position = reader.block.contribution.origin
            mine = _Over(self.values)
            mine[reader.block.stream.states[position]] = self._without(reader, position)
            for node in reader.clones:
                mine[node] = self._call(node, mine)
            self.seen_by[number] = mine
        return self.seen_by[number]

    def _without(self, reader: Reader, position: int) -> torch.Tensor:
        stream, hidden = reader.block.stream, reader.hidden
        if not any(other.update < position for other, _ in hidden):
            return self.values[stream.states[position]]
        update = stream.updates[position - 1]
        base = self._without(reader, position - 1)
        here = {other.node: (other, part) for other, part in hidden if other.update == position - 1}
        whole = len(here) == len(update.contributions) and all(part == "all" for _, part in here.values())
        after = self.values[update.after]
        if whole and base.shape == after.shape and base.dtype == after.dtype:
            return base
        replaced = {update.before: base, **{c.node: self.values[c.node] for c in update.contributions}}
        for node, (other, part) in here.items():
            replaced[node] = torch.zeros_like(self.values[node]) if part == "all" else self._shared_part(other, node)
        return self._again(update.after, replaced)

    def _again(self, node: Node, replaced: dict[Node, object]) -> object:
        """``node`` evaluated with other values in some places; gates made from the stream stay, as they are U's."""
        changed = {n for n, value in replaced.items() if value is not self.values[n]}
        known: dict[Node, object] = dict(replaced)

        def value(n: Node) -> object:
            if n not in known:
                if not any(self.blocks.flow.depends(n, old) for old in changed):
                    known[n] = self.values[n]
                else:
                    inputs = _Over(self.values)
                    inputs.update({a: value(a) for a in value_inputs(n)})
                    known[n] = self._call(n, inputs)
            return known[n]

        return value(node)

    def _shared_part(self, block: Block, node: Node) -> torch.Tensor:
        """A contribution with its routed terms set to zero: down the sum to the terms that are not routed."""
        flow = self.blocks.flow
        if not block.routed >> flow.position[node] & 1:
            return self.values[node]
        if op_name(node) in ("index_add", "scatter_add") and not block.routed >> flow.position[node.args[0]] & 1:
            return self.values[node.args[0]]
        total = sum_of(node)
        routed = [a for a in value_inputs(node) if block.routed >> flow.position[a] & 1]
        seen = _Over(self.values)
        if total is not None and total.two_terms:
            for operand in (total.first, total.rest[0]):
                seen[operand] = self._shared_part(block, operand)
            return self._call(node, seen)
        if len(routed) == 1 and self._reaches_shared(block, routed[0]):
            seen[routed[0]] = self._shared_part(block, routed[0])
            return self._call(node, seen)
        return torch.zeros_like(self.values[node])

    def _reaches_shared(self, block: Block, node: Node) -> bool:
        """Whether there is a sum with a term that is not routed at or below ``node``."""
        flow = self.blocks.flow
        while block.routed >> flow.position[node] & 1:
            if sum_of(node) is not None and sum_of(node).two_terms:
                return True
            routed = [a for a in value_inputs(node) if block.routed >> flow.position[a] & 1]
            if len(routed) != 1:
                return False
            node = routed[0]
        return True


class _Over(dict):
    """A few values over many."""

    def __init__(self, below: dict) -> None:
        super().__init__()
        self.below = below

    def __missing__(self, key):
        return self.below[key]
