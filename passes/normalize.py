"""Step 0: turn in-place arithmetic on fresh values into plain arithmetic.

Contract: a Dynamo graph in, the same graph out with equal results. ``x += y``, ``x.add_(y)`` and the like become a new
value that every later reader of ``x`` uses, where that is provably the same: ``x`` is an intermediate whose memory
nothing else shows later. Other writes stay; ``dataflow`` follows them.

Why: ``residual += attention`` (and llama4's ``shared.add_(routed)``) hides a stream update behind a mutation, and an
earlier state that is overwritten in place cannot be read again.
"""
from __future__ import annotations

import operator
from dataclasses import dataclass

import torch
from torch.fx import Graph, Node

from .dataflow import storages_of, value_of, written_arguments

_PLAIN_OPERATOR = {operator.iadd: operator.add, operator.isub: operator.sub, operator.imul: operator.mul,
                   operator.itruediv: operator.truediv}
_PLAIN_METHOD = {"add_": "add", "sub_": "sub", "mul_": "mul", "div_": "div"}


@dataclass(frozen=True, kw_only=True)
class Normalized:
    functionalized: int   # in-place operations that became plain ones


def normalize(graph: Graph) -> Normalized:
    """Functionalize in-place add, sub, mul and div of intermediates that nothing else views."""
    nodes = list(graph.nodes)
    position = {node: i for i, node in enumerate(nodes)}
    aliases: dict[int, list[Node]] = {}
    for node in nodes:
        for storage in storages_of(node):
            aliases.setdefault(storage, []).append(node)
    count, gradients = 0, True
    for node in nodes:
        if node.target is torch._C._set_grad_enabled:
            gradients = node.args[0]
        if not gradients:       # in place, a value keeps its history under no_grad; a new value has none
            continue
        plain = _PLAIN_OPERATOR.get(node.target) if node.op == "call_function" else None
        if node.op == "call_method":
            plain = _PLAIN_METHOD.get(node.target)
        if plain is None or not _is_fresh(node, aliases, position):
            continue
        changed = node.args[0]
        for user in [u for u in changed.users if position[u] > position[node]]:
            user.replace_input_with(changed, node)
        node.target = plain
        # From here on the result is memory of its own.
        for storage in storages_of(node):
            aliases[storage] = [a for a in aliases[storage] if position[a] >= position[node]]
        count += 1
    if count:
        graph.lint()
    return Normalized(functionalized=count)


def _is_fresh(node: Node, aliases: dict[int, list[Node]], position: dict[Node, int]) -> bool:
    """Whether ``node`` changes an intermediate of its own dtype that no other earlier node shares memory with."""
    changed = node.args[0] if node.args and isinstance(node.args[0], Node) else None
    if changed is None or changed.op in ("placeholder", "get_attr") or not written_arguments(node):
        return False
    before, after = value_of(changed), value_of(node)
    if not isinstance(before, torch.Tensor) or not isinstance(after, torch.Tensor) or before.dtype != after.dtype:
        return False
    others = [value_of(a) for a in node.args[1:] if isinstance(a, Node)]
    promotes = any(isinstance(o, torch.Tensor) and o.dim() > 0 and o.dtype != before.dtype for o in others)
    shared = [a for s in storages_of(changed) for a in aliases.get(s, ())
              if a is not changed and position[a] < position[node] and _is_seen_after(a, node, position)]
    return not promotes and not shared and not set(node.kwargs)


def _is_seen_after(alias: Node, node: Node, position: dict[Node, int]) -> bool:
    """Whether the write by ``node`` shows through ``alias``: it lives outside the graph, or is read later."""
    return alias.op in ("placeholder", "get_attr") or any(position[u] > position[node] for u in alias.users)
