"""Data parallelism inside the graph: gradients are averaged where parameters enter.

Contract: a Dynamo graph in, the same graph out with equal forward values. ``function`` of a bucket is an identity whose
backward averages: in the backward graph that AOTAutograd makes, the gradients of a bucket travel in one collective, as
soon as the last of them is there.

Terms
  entrance  the placeholder of a parameter; several, where a parameter comes in twice (tied)
  bucket    parameters whose gradients travel together
"""
from __future__ import annotations

import operator
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

from torch.fx import Graph, Node


@dataclass(frozen=True, kw_only=True)
class Entrance:
    """Where one parameter enters the graph."""
    nodes: tuple[Node, ...]
    kind: Hashable              # only parameters of one kind share a bucket (group, dtype, device)
    size: int                   # bytes of its gradient


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
    averaged.meta["example_value"] = tuple(e.nodes[0].meta.get("example_value") for e in bucket)
    with graph.inserting_after(averaged):
        items = [graph.call_function(operator.getitem, (averaged, i)) for i in range(len(bucket))]
    for entrance, item, found in zip(bucket, items, users):
        item.meta["example_value"] = entrance.nodes[0].meta.get("example_value")
        for user in found:
            for node in entrance.nodes:
                user.replace_input_with(node, item)
