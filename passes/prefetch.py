"""Step 3b: parameters that are gathered from slices are asked for one bucket before they are needed.

Contract: a post-grad ATen graph in; the same nodes in another order out. What moves is decided by the graph alone, never by
sizes or costs, so the launches of all ranks stay in one order.

A gather of parameters depends on nothing that is computed: it could be launched at once. But whole parameters take memory
from their launch to their last use, and ``schedule`` launches as soon as the order of launches allows. So that order is what
bounds memory: the gather of bucket k stands in front of the wait for bucket k - 1, and two buckets exist at a time.
"""
from __future__ import annotations

from torch.fx import Graph, Node

from ._torch import draws_random, has_effect
from .costs import is_launch, is_wait, op_name
from .dataflow import storages_of, written_arguments


def prefetch(graph: Graph) -> int:
    """Move each gather of parameters in front of the wait for the one before it; how many were moved."""
    nodes = list(graph.nodes)
    position = {node: i for i, node in enumerate(nodes)}
    written = {s for n in nodes if n.op == "call_function" for w in written_arguments(n) if not is_wait(n) for s in storages_of(w)}
    moved, before = 0, None
    for node in nodes:
        made = _made_of_arguments(node, written) if is_launch(node) and "all_gather" in op_name(node) else None
        if made is None:
            continue
        wait = next((user for user in before.users if is_wait(user)), None) if before is not None else None
        if wait is not None and position[wait] < position[node]:
            for each in sorted(made, key=position.__getitem__):
                if position[each] > position[wait]:
                    wait.prepend(each)
            moved += 1
        before = node
    if moved:
        graph.lint()
    return moved


def _made_of_arguments(launch: Node, written: set[int]) -> set[Node] | None:
    """``launch`` and all that it is computed from but the graph's arguments; None if that is more than looking at them."""
    made, todo = set(), [launch]
    while todo:
        node = todo.pop()
        if node in made or node.op in ("placeholder", "get_attr"):
            continue
        if node is not launch and (is_launch(node) or is_wait(node) or draws_random(node.target) or has_effect(node.target)):
            return None
        if written & {s for source in node.all_input_nodes for s in storages_of(source)}:
            return None
        made.add(node)
        todo += node.all_input_nodes
    return made
