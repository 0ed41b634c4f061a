"""Step 3b: parameters that are gathered from slices are asked for one bucket before they are needed.

Contract: a post-grad ATen graph in; the same nodes in another order out. What moves is decided by the graph alone, never by
sizes or costs, so the launches of all ranks stay in one order.

A gather of parameters depends on nothing that is computed: it could be launched at once. But whole parameters take memory
from their launch to their last use, and ``schedule`` launches as soon as the order of launches allows. So that order is what
bounds memory: the gather of bucket k stands in front of the wait for bucket k - 1, and two buckets exist at a time.
"""
from __future__ import annotations

from torch.fx import Graph, Node

from .costs import is_launch, is_wait, op_name
from .moving import moved_with, written_memory


def prefetch(graph: Graph) -> int:
    """Move each gather of parameters in front of the wait for the one before it; how many were moved."""
    gathers = [node for node in graph.nodes if is_launch(node) and "all_gather" in op_name(node)]
    if len(gathers) < 2:
        return 0
    written = written_memory(graph)
    moved, before = 0, None
    for node in gathers:
        made = _made_of_arguments(node, written)
        if made is None:
            continue
        wait = next((user for user in before.users if is_wait(user)), None) if before is not None else None
        if wait is not None and wait < node:
            for each in made:
                if each > wait:
                    wait.prepend(each)
            moved += 1
        before = node
    if moved:
        graph.lint()
    return moved


def _made_of_arguments(launch: Node, written: set[int]) -> list[Node] | None:
    """``launch`` and all that it is computed from but the graph's arguments; None if that is more than looking at them."""
    return moved_with(launch, written, stays=lambda n: n.op in ("placeholder", "get_attr"),
                      fixed=lambda n: is_wait(n) or is_launch(n) and n is not launch)
