"""What moves together with a node: for passes that give launches another place."""
from __future__ import annotations

from collections.abc import Callable

from torch.fx import Graph, Node

from ._torch import draws_random, has_effect
from .costs import is_wait
from .dataflow import storages_of, written_arguments


def written_memory(graph: Graph) -> set[int]:
    """Identities of the memory that nodes change; that a wait writes what was received does not count."""
    return {memory for node in graph.nodes if node.op == "call_function" and not is_wait(node)
            for argument in written_arguments(node) for memory in storages_of(argument)}


def moved_with(node: Node, written: set[int], *, stays: Callable[[Node], bool],
               fixed: Callable[[Node], bool] = lambda _: False) -> list[Node] | None:
    """``node`` and what it is computed from, in graph order, up to nodes for which ``stays`` holds.

    None if one of them must keep its place: ``fixed`` holds, it draws random numbers, has an effect, or reads memory that
    is ``written``.
    """
    found, todo = set(), [node]
    while todo:
        current = todo.pop()
        if current in found or stays(current):
            continue
        if fixed(current) or draws_random(current.target) or has_effect(current.target) or written & {
                s for source in current.all_input_nodes for s in storages_of(source)}:
            return None
        found.add(current)
        todo += current.all_input_nodes
    return sorted(found)        # nodes of a graph compare by their place
