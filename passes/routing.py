"""What is routing: a selection among experts, told from other top-k's by dataflow.

Contract: nodes of a branch in, evidence out; nothing is changed, and module paths are not looked at.

Terms
  selection   top-k, argmax or sort over the scores that one linear map computes per token
  experts     stacked weights, or equal linear maps, as many as the router has outputs; or an exchange between ranks
"""
from __future__ import annotations

import torch
from torch.fx import Node

from .dataflow import Dataflow, op_name, value_of
from .operations import CASTS, ELEMENTWISE, EXCHANGES, EXPERT_MAPS, LINEAR_MAPS, VIEWS


def scores_of(flow: Dataflow, selector: Node, before: Node | None) -> Node | None:
    """The linear map whose outputs ``selector`` ranks, if there is one: scores = linear(tokens, router weight).

    An attention indexer ranks products of two activations over a sequence; it has no such map.
    """
    ranked = value_of(selector.args[0]) if selector.args and isinstance(selector.args[0], Node) else None
    if not isinstance(ranked, torch.Tensor) or not ranked.is_floating_point() or ranked.dim() < 1:
        return None
    todo, seen = [selector.args[0]], set()
    while todo:
        node = todo.pop()
        if node in seen or (before is not None and not flow.depends(node, before)):
            continue
        seen.add(node)
        name = op_name(node)
        if name in LINEAR_MAPS:
            weights = [a for a in node.all_input_nodes if is_weight(a)]
            if weights and _ranks_outputs_of(ranked, node):
                return node
        elif name in ELEMENTWISE | VIEWS | CASTS:
            todo += node.all_input_nodes
    return None


def _ranks_outputs_of(ranked: torch.Tensor, linear: Node) -> bool:
    """The selection runs over (groups of) the linear map's output features, not over tokens."""
    scores, last = value_of(linear), ranked.shape[-1]
    if not isinstance(scores, torch.Tensor) or not isinstance(last, int):
        return False
    return any(isinstance(d, int) and d > 1 and d % last == 0 for d in (scores.shape[-1], scores.shape[0]))


_LOOKS_AT = VIEWS | CASTS | {"t", "mT", "T", "getattr"}       # at its first operand
_COMBINES = ELEMENTWISE | LINEAR_MAPS | {"cat", "stack"}
_MANY = 64


def is_weight(node: Node) -> bool:
    """A parameter or buffer, or what is made of parameters and buffers alone: cast, transposed, indexed, or with an
    adapter added to it. A derivation of more than a few steps is taken for something else."""
    todo, seen = [node], set()
    while todo:
        current = todo.pop()
        if current in seen:
            continue
        seen.add(current)
        if _is_parameter(current):
            continue
        inputs, name = current.all_input_nodes, op_name(current)
        if name not in _LOOKS_AT | _COMBINES or not inputs or len(seen) > _MANY:
            return False
        todo += inputs[:1] if name in _LOOKS_AT else inputs
    return True


def _is_parameter(node: Node) -> bool:
    if node.op == "get_attr":
        return True
    if node.op != "placeholder":
        return False
    source = getattr(node, "_dynamo_source", None)
    return isinstance(value_of(node), torch.nn.Parameter) or "_parameters" in str(node.target) \
        or "_buffers" in str(node.target) or "_parameters" in str(source)


def chooses(selector: Node) -> bool:
    """Whether the choice itself is used, and not only the chosen value (a maximum for a scale, say)."""
    if op_name(selector) in ("argmax", "argsort"):
        return True
    return any(op_name(u) == "getitem" and u.args[1] == 1 and u.users for u in selector.users)


def experts_of(flow: Dataflow, nodes: list[Node], selector: Node, linear: Node, branch: int) -> Node | None:
    """The node that shows that ``selector`` picks one of the experts, not features (a top-k activation) or keys: there
    are as many experts as the router has outputs."""
    chosen = flow.descendants(flow.bit(selector), branch)
    count = value_of(linear).shape[-1]
    same_shape: dict[tuple, list[Node]] = {}
    for node in nodes:
        name = op_name(node)
        routed = bool(chosen >> flow.position[node] & 1)
        if routed and name in EXCHANGES and node.op == "call_function":
            return node
        weights = [a for a in node.all_input_nodes if is_weight(a)] if name in EXPERT_MAPS | {"embedding"} else []
        for weight in weights:
            shape = tuple(value_of(weight).shape)
            if len(shape) >= 3 and shape[0] == count:
                return node                                 # stacked expert weights
            if routed and name in ("embedding", "index_select"):
                return node                                 # weights picked by the selection
            if name in LINEAR_MAPS and len(shape) == 2:
                same_shape.setdefault(shape, []).append(node)
    # One linear map an expert; a shared expert may have the same shape.
    return next((maps[0] for maps in same_shape.values() if len(maps) >= count > 1), None)


def looks_like_experts(nodes: list[Node]) -> bool:
    shapes: dict[tuple, int] = {}
    for node in nodes:
        for weight in (a for a in node.all_input_nodes if op_name(node) in EXPERT_MAPS and is_weight(a)):
            shape = tuple(value_of(weight).shape)
            if len(shape) >= 3:
                return True
            shapes[shape] = shapes.get(shape, 0) + 1
    return max(shapes.values(), default=0) >= 4
