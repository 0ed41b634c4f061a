"""The additive structure of an MoE contribution: routed and shared parts.

Contract: nothing is changed; ``Terms.kept`` gives a recipe for a contribution without its routed terms, or raises
``Undefined`` with the reason.
"""
from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.fx import Node

from .dataflow import Dataflow, op_name, value_inputs, value_of
from .operations import CASTS, FILLS_SLOTS, MAKES_MEMORY, TAKES_TOKENS
from .reasons import Reason
from .recipe import Copy, Recipe
from .routing import is_weight
from .sums import left_over, sum_of
from .update import Undefined, shaped


@dataclass(frozen=True, kw_only=True)
class Terms:
    """The additive structure of one MoE contribution.

    Conservative: whatever is not known to be a sum, linear, or an expert's own business, and takes in a value of the
    branch that is not routed, makes the parts inseparable.
    """
    flow: Dataflow
    routed: int
    routers: int

    def is_routed(self, node: Node) -> bool:
        return bool(self.routed >> self.flow.position[node] & 1)

    def kept(self, node: Node) -> Recipe:
        """Recipe for ``node`` without its routed terms, None where nothing is left.

        Raises:
            Undefined: the routed part went through something that is not linear together with another part.
        """
        if not self.is_routed(node):
            return None if self._is_zero(node) else self._readable(node)
        total = sum_of(node)
        if total is not None and total.two_terms:
            left, right = self.kept(total.first), self.kept(total.rest[0])
            if left is None or right is None:
                return shaped(left_over(total, first=left, rest=right), node)
            return Copy(node, tuple({total.first: left, total.rest[0]: right}.items()))
        if op_name(node) in ("index_add", "scatter_add") and node.args and not self.is_routed(node.args[0]):
            return self.kept(node.args[0])
        carrier = self._linear_in(node)
        if carrier is not None:
            kept = self.kept(carrier)
            if kept is None:
                return None
            for other in node.all_input_nodes:
                if other is not carrier:
                    self._readable(other)
            return Copy(node, ((carrier, kept),))
        mixed = self._mixed_below(node)
        if mixed is not None:
            raise Undefined(Reason(
                "post_norm_over_sum", f"{node.name} ({op_name(node)}) is not linear and takes routed and shared parts "
                f"together (they meet in {mixed.name}), so the stream without the routed part is not defined",
                node=node.name))
        return None

    def beside(self, node: Node) -> set[tuple[Node, Node]]:
        """(reader, term) of the terms of a contribution that are not routed, where ``kept`` is defined."""
        total = sum_of(node)
        if total is not None and total.two_terms:
            inputs = (total.first, total.rest[0])
        elif op_name(node) in ("index_add", "scatter_add") and node.args and not self.is_routed(node.args[0]):
            inputs = node.args[:1]
        else:
            inputs = [a for a in [self._linear_in(node)] if a is not None]
        found = {(node, a) for a in inputs if not self.is_routed(a) and not self._is_zero(a)}
        return found.union(*(self.beside(a) for a in inputs if self.is_routed(a)))

    def _readable(self, node: Node) -> Node:
        late = self.flow.late_writes(node)
        if late:
            raise Undefined(Reason(
                "overwritten", f"{late[0].name} writes into the memory of {node.name}, which the stream without the "
                "routed part is made of", node=node.name))
        return node

    def _is_zero(self, node: Node) -> bool:
        return op_name(node) in ("zeros", "zeros_like", "new_zeros") and not self.flow.writes_to(node)

    def _linear_in(self, node: Node) -> Node | None:
        """The one routed operand that ``node`` is linear in, if it is."""
        name = op_name(node)
        routed = [a for a in node.args if isinstance(a, Node) and self.is_routed(a)]
        if len(routed) != 1 or not isinstance(value_of(node), torch.Tensor):
            return None
        if name in {"view", "reshape", "contiguous", "flatten", "squeeze", "unsqueeze", "_unsafe_view", "clone",
                    "transpose", "permute", "detach"} | CASTS:
            return routed[0] if node.args[0] is routed[0] and self._same_size(node, routed[0]) else None
        if name == "dropout":       # one mask for both: see recipe.Builder
            return routed[0]
        if name in {"mul", "imul"} or (name in {"div", "truediv", "itruediv"} and node.args[0] is routed[0]):
            return routed[0] if self._same_size(node, routed[0]) else None
        return None

    def _same_size(self, a: Node, b: Node) -> bool:
        x, y = value_of(a), value_of(b)
        return isinstance(y, torch.Tensor) and y.is_floating_point() and \
            (x.numel() == y.numel() if _static(x) and _static(y) else x.dim() <= y.dim() + 1)

    def _mixed_below(self, node: Node) -> Node | None:
        """A place at or below ``node`` where a routed value meets another value of the branch as an equal.

        Tokens enter the experts through products and by being picked; anywhere else two values that meet may be terms
        of a sum. Scores of the router may meet what was chosen.
        """
        todo, seen = [node], set()
        while todo:
            current = todo.pop()
            if current in seen or not self.is_routed(current):
                continue
            seen.add(current)
            inputs = value_inputs(current)
            unseen = not any(map(self.is_routed, inputs)) and self.flow.ancestors(current) & self.routed
            if unseen:      # routed by way of memory that was written in place
                inputs = [*inputs, *(a for i in inputs for w in self.flow.writes_to(i)
                                     if self.flow.position[w] < self.flow.position[current]
                                     for a in (w.all_input_nodes if not self._fills_slots(w) else w.args[:1]))]
            if unseen or op_name(current) not in TAKES_TOKENS and not self._fills_slots(current):
                for other in inputs:
                    if not self.is_routed(other) and self._is_term(other):
                        return current
            todo += inputs
        return None

    def _fills_slots(self, node: Node) -> bool:
        """Tokens are put into empty memory at places that were chosen: they enter the experts there."""
        if op_name(node).rstrip("_") not in FILLS_SLOTS or not node.args or not isinstance(node.args[0], Node):
            return False
        base, *rest = node.all_input_nodes
        where = [a for a in rest if is_index(a)]
        return bool(where) and all(map(self.is_routed, where)) and not self._is_term(base) and \
            (op_name(base) in MAKES_MEMORY or self._is_zero(base))

    def _is_term(self, node: Node) -> bool:
        value = value_of(node)
        if not isinstance(value, torch.Tensor) or not value.is_floating_point() or is_weight(node):
            return False
        above = self.flow.ancestors(node) | self.flow.bit(node)
        if above & self.routers or self._is_zero(node) or op_name(node) in MAKES_MEMORY:
            return False
        return any(n.op == "placeholder" and not is_weight(n) or op_name(n) == "embedding"
                   for n in self.flow.members(self.flow.ancestors(node)))


def is_index(node: Node) -> bool:
    value = value_of(node)
    return isinstance(value, torch.Tensor) and value.dtype in (torch.int64, torch.int32, torch.bool)


def _static(tensor: torch.Tensor) -> bool:
    return all(isinstance(d, int) for d in tensor.shape)
