"""Data parallelism inside the graph: gradients are averaged where parameters enter, slices are gathered there.

Contract: a Dynamo graph in, the same graph out with equal forward values. ``function`` of a bucket is an identity whose
backward averages, or gathers whole parameters and its backward averages and scatters. In the backward graph that
AOTAutograd makes, the gradients of a bucket travel in one collective, as soon as the last of them is there.

Terms
  entrance  where a parameter becomes usable: its placeholder, or the node that gathers it; several, where a parameter
            comes in twice (tied)
  bucket    parameters that travel together
"""
from __future__ import annotations

import operator
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

from torch.fx import Graph, Node
from torch.utils.checkpoint import CheckpointPolicy

from .dataflow import op_name

@dataclass(frozen=True, kw_only=True)
class Entrance:
    """Where one parameter enters the graph."""
    nodes: tuple[Node, ...]
    kind: Hashable              # only parameters of one kind share a bucket (group, dtype, device)
    size: int                   # bytes of its gradient
    length: int = 0             # rows of the whole parameter, where a slice enters


def gathers_of(entrance: Node) -> tuple[Node, ...]:
    """The nodes that make a whole parameter of the slice that enters here (``farskip_fx.sharding.unshard``)."""
    return tuple(user for user in entrance.users if op_name(user) == "unshard")


def in_buckets(graph: Graph, entrances: Sequence[Entrance], limit: int) -> list[list[Entrance]]:
    """Buckets of one kind and at most ``limit`` bytes, or of one parameter, in the order in which a backward fills them.

    A gradient is complete once the backward of the parameter's first use is done, and the backward runs from the end.
    """
    position = {node: i for i, node in enumerate(graph.nodes)}
    first_use = {e: min(position[u] for n in e.nodes for u in n.users) for e in entrances if any(n.users for n in e.nodes)}
    buckets: list[list[Entrance]] = []
    open_ones: dict[Hashable, list[Entrance]] = {}
    for entrance in sorted(first_use, key=first_use.get, reverse=True):
        bucket = open_ones.get(entrance.kind)
        if bucket is None or sum(e.size for e in bucket) + entrance.size > limit:
            bucket = open_ones[entrance.kind] = []
            buckets.append(bucket)
        bucket.append(entrance)
    return buckets


def insert_means(graph: Graph, buckets: Sequence[Sequence[Entrance]], function: Callable) -> None:
    """Send the parameters of each bucket through ``function(kind, *parameters)``, before their first use.

    Args:
        function: returns its parameters as a tuple.
    """
    last = [node for node in graph.nodes if node.op == "placeholder"][-1]
    with graph.inserting_after(last):
        for bucket in reversed(buckets):        # each goes in front of the one before
            _insert(graph, bucket, function)
    graph.lint()


def _insert(graph: Graph, bucket: Sequence[Entrance], function: Callable) -> None:
    users = [[u for n in e.nodes for u in n.users] for e in bucket]
    averaged = graph.call_function(function, (bucket[0].kind, *(e.nodes[0] for e in bucket)))
    for entrance, item, found in zip(bucket, _items(graph, averaged, bucket), users):
        for user in found:
            for node in entrance.nodes:
                user.replace_input_with(node, item)


def _items(graph: Graph, result: Node, bucket: Sequence[Entrance]) -> list[Node]:
    result.meta["example_value"] = tuple(e.nodes[0].meta.get("example_value") for e in bucket)
    with graph.inserting_after(result):
        items = [graph.call_function(operator.getitem, (result, i)) for i in range(len(bucket))]
    for entrance, item in zip(bucket, items):
        item.meta["example_value"] = entrance.nodes[0].meta.get("example_value")
    return items


def insert_gathers(graph: Graph, buckets: Sequence[Sequence[Entrance]], function: Callable) -> None:
    """Replace the gathers in each bucket by one ``function(kind, lengths, *slices)``, in front of the first of them.

    The whole parameters are not kept for the backward: gathered again there, so that two buckets at a time are all that
    exists of them. (Stands in the name, too: AOTAutograd's cache finds a graph by its code and not by its tags.)

    Args:
        function: returns the whole parameters as a tuple.
    """
    position = {node: i for i, node in enumerate(graph.nodes)}
    region = 1 + max((node.meta.get("ac_graph_id") or 0 for node in graph.nodes), default=0)
    for number, bucket in enumerate(buckets):
        first = min((n for e in bucket for n in e.nodes), key=position.__getitem__)
        slices = [e.nodes[0].args[0] for e in bucket]
        with graph.inserting_before(first):
            whole = graph.create_node("call_function", function, (bucket[0].kind, tuple(e.length for e in bucket), *slices),
                                      name=f"whole_parameters_again_{number}")
        for entrance, item in zip(bucket, _items(graph, whole, bucket)):
            for node in (whole, item):
                node.meta["recompute"], node.meta["ac_graph_id"] = CheckpointPolicy.MUST_RECOMPUTE, region + number
            for node in entrance.nodes:
                node.replace_all_uses_with(item)
                graph.erase_node(node)
    graph.lint()
