"""Step 1: find the residual stream.

Contract: a normalized Dynamo graph in; a ``Stream`` out, or ``NoStream`` with a typed reason. Nothing is changed, and
only dataflow decides: module paths are not looked at.

Terms
  state    s0, s1, ...: a value of the residual stream
  update   the addition s_{i+1} = s_i + b_i (either order of operands)
  branch   the nodes that b_i needs beyond s_i; its *reads* are the edges through which it takes in s_i
  head     what follows the last state: final norm, language-model head

Steps
  1. Every addition of two values of one shape, one of which is computed from the other, is a possible update.
  2. Updates chain through their skip operand. The longest chain is the stream.
  3. The chain must be whole: it starts at an embedding (or at an argument of the model), ends in a head and not at the
     edge of the graph, no state is overwritten, and nothing that mixes tokens or routes happens outside its branches.
"""
from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch.fx import Graph, Node

from .dataflow import Dataflow, op_name, value_of
from .reasons import Reason


@dataclass(frozen=True, kw_only=True)
class Update:
    """One step of the stream: ``add = before + contribution``."""
    before: Node            # state s_i
    contribution: Node      # b_i
    add: Node               # state s_{i+1}
    branch: int             # bit set: nodes of the branch (see Dataflow)
    reads: tuple[Node, ...]  # users of s_i inside the branch


@dataclass(frozen=True, kw_only=True)
class Stream:
    updates: tuple[Update, ...]
    flow: Dataflow = field(repr=False)
    outside: int             # bit set: nodes that feed the output and are in no branch

    @property
    def states(self) -> tuple[Node, ...]:
        return (self.updates[0].before, *(u.add for u in self.updates))


@dataclass(frozen=True, kw_only=True)
class NoStream:
    reason: Reason
    length: int              # updates in the longest chain, 0 where there is none: a graph of the loss, say


def find_stream(graph: Graph, *, busy: Callable[[Dataflow, Node], bool]) -> Stream | NoStream:
    """Find the stream. ``busy`` says which nodes belong into a branch (they mix tokens or route)."""
    flow = Dataflow(graph)
    chain = _longest_chain(flow)
    if len(chain) < 2:
        return NoStream(reason=Reason("no_stream", "no chain of residual additions x + f(x) runs through this graph"),
                        length=len(chain))
    output = flow.nodes[-1]
    for reason in (_overwritten(flow, chain), _ends_in_head(flow, chain, output), _begins_at_embedding(flow, chain)):
        if reason is not None:
            return NoStream(reason=reason, length=len(chain))

    updates, covered = [], 0
    for before, contribution, add in chain:
        branch = flow.ancestors(contribution) & ~flow.ancestors(before) & ~flow.bit(before) | flow.bit(contribution)
        reads = tuple(u for u in before.users if u is not add and flow.bit(u) & branch)
        if not reads:
            return NoStream(length=len(chain), reason=Reason(
                "parallel_block", f"the branch that ends in {contribution.name} reads an earlier state than the one "
                f"it is added to ({before.name}): parallel blocks are not rewired"))
        updates.append(Update(before=before, contribution=contribution, add=add, branch=branch, reads=reads))
        covered |= branch | flow.bit(add) | flow.bit(before)
    outside = flow.ancestors(output) & ~covered
    stray = next((n for n in flow.members(outside) if busy(flow, n)), None)
    if stray is not None:
        return NoStream(length=len(chain), reason=Reason(
            "gap", f"{stray.name} mixes or routes tokens outside the branches of the residual stream; the "
            f"{len(chain)} residual additions that were found are not the whole model", node=stray.name))
    return Stream(updates=tuple(updates), flow=flow, outside=outside)


def is_plain_add(node: Node) -> bool:
    """An addition of two nodes, without ``alpha`` or ``out``."""
    if node.op == "call_function":
        known = node.target in (operator.add, torch.add, torch.ops.aten.add.Tensor)
    else:
        known = node.op == "call_method" and node.target == "add"
    return known and not node.kwargs and len(node.args) == 2 and all(isinstance(a, Node) for a in node.args)


def _alike(a: Node, b: Node) -> bool:
    """Same rank, same (static) last size, floating point. Symbolic sizes are never compared."""
    x, y = value_of(a), value_of(b)
    if not isinstance(x, torch.Tensor) or not isinstance(y, torch.Tensor) or x.dim() != y.dim() or x.dim() < 2:
        return False
    if not (x.is_floating_point() and y.is_floating_point()):
        return False
    return all(p == q for p, q in zip(x.shape, y.shape) if isinstance(p, int) and isinstance(q, int))


def _longest_chain(flow: Dataflow) -> list[tuple[Node, Node, Node]]:
    """(before, contribution, add) along the longest chain of updates; of equally long ones the last."""
    length: dict[Node, int] = {}
    step: dict[Node, tuple[Node, Node, Node]] = {}
    best = None
    for node in flow.nodes:
        if not is_plain_add(node) or not _alike(*node.args):
            continue
        for before, branch in (node.args, node.args[::-1]):
            previous = step.get(before)
            # A branch that reads the state before (a parallel block) still updates this stream.
            if flow.depends(branch, before) or (previous is not None and flow.depends(branch, previous[0])):
                if length.get(before, 0) + 1 > length.get(node, 0):
                    length[node] = length.get(before, 0) + 1
                    step[node] = (before, branch, node)
        if node in length and (best is None or length[node] >= length[best]):
            best = node
    chain = []
    while best in step:
        chain.append(step[best])
        best = step[best][0]
    return chain[::-1]


def _overwritten(flow: Dataflow, chain) -> Reason | None:
    for node in (chain[0][0], *(n for _, b, add in chain for n in (b, add))):
        writes = flow.writes_to(node)
        late = [w for w in writes if flow.position[w] > flow.position[node]]
        if late:
            return Reason("overwritten", f"{late[0].name} writes into the memory of {node.name}, a value of the "
                          "residual stream, and other values share that memory", node=node.name)
    return None


def _ends_in_head(flow: Dataflow, chain, output: Node) -> Reason | None:
    last = chain[-1][2]
    if any(u is not output for u in last.users):
        return None
    return Reason("fragment", f"the residual stream leaves this graph at {last.name} before any final norm: "
                  "this graph holds only a part of the model", node=last.name)


def _begins_at_embedding(flow: Dataflow, chain) -> Reason | None:
    first = chain[0][0]
    above = [*flow.members(flow.ancestors(first)), first]
    names = {op_name(n) for n in above}
    arguments = [n for n in above if n.op == "placeholder" and _is_activation(n)]
    if "embedding" in names or arguments:
        return None
    return Reason("fragment", f"{first.name}, where the residual stream begins, comes neither from an embedding nor "
                  "from an argument of the model", node=first.name)


def _is_activation(node: Node) -> bool:
    value = value_of(node)
    return isinstance(value, torch.Tensor) and not isinstance(value, torch.nn.Parameter) and value.is_floating_point()
