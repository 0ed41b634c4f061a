"""Whether a node mixes tokens: reads values of other tokens than the one it computes for.

Contract: nothing is changed. Three answers, because a block that is taken for the wrong kind becomes another model:
"yes" and "no" where the operation shows it, "maybe" where it is not known.

Terms
  layout   the last axis holds features of one token, all others tokens (or groups of one token's features); a transpose
           gives it up
"""
from __future__ import annotations

import math

import torch
from torch.fx import Node

from .dataflow import Dataflow, op_name, value_of
from .operations import ALONG_AN_AXIS, ATTENTION, MAKES_MEMORY, PRODUCTS, TOKEN_WISE, TRANSPOSES
from .routing import axis_of, is_weight, of_tokens


def mixes(flow: Dataflow, node: Node, before: Node) -> str:
    """"yes", "no" or "maybe"; ``before`` is the state that the block reads."""
    name = op_name(node)
    if node.op not in ("call_function", "call_method") or not flow.depends(node, before):
        return "no"
    if name in ATTENTION:
        return "yes"
    if name in PRODUCTS:
        own = sum(a is before or flow.depends(a, before) for a in factors(node))
        any_tokens = flow.mask(factors(node)) & of_tokens(flow)
        return "yes" if own > 1 or own and any_tokens.bit_count() > 1 else "no"
    if name in TOKEN_WISE | MAKES_MEMORY | {"one_hot"}:
        return "no"
    if name == "embedding":
        return "no" if is_weight(node.args[1]) else "maybe"
    if name in ALONG_AN_AXIS:
        along = _axis(node)
        if along == "features" and _has_layout(flow, node, before):
            return "no"
        if along == "other" and name in ("cumsum", "cumprod", "logcumsumexp", "cummax"):
            return "yes"
    return "maybe"


def factors(node: Node) -> list[Node]:
    """What a product multiplies: without the term that ``baddbmm`` adds."""
    if op_name(node) == "baddbmm":
        return [a for a in dict.fromkeys(node.args[1:]) if isinstance(a, Node)]
    return node.all_input_nodes


def _axis(node: Node) -> str:
    """Which axis ``node`` works along: "features" (the last), "other", or "" where it does not say."""
    axis = axis_of(node)
    value = value_of(node.args[0]) if node.args and isinstance(node.args[0], Node) else None
    if not isinstance(axis, int) or not isinstance(value, torch.Tensor):
        return ""
    return "features" if axis in (-1, value.dim() - 1) else "other"


def _has_layout(flow: Dataflow, node: Node, before: Node) -> bool:
    """The last axis of what ``node`` reads holds features of one token."""
    state, value = value_of(before), value_of(node.args[0])
    if not isinstance(state, torch.Tensor) or not isinstance(value.shape[-1], int):
        return False
    shapes = [*state.shape, *value.shape]
    if all(isinstance(d, int) for d in shapes) and math.prod(value.shape[:-1]) % max(1, math.prod(state.shape[:-1])):
        return False
    above = flow.members(flow.ancestors(node) & ~flow.ancestors(before))
    return not any(op_name(n) in TRANSPOSES and flow.depends(n, before) for n in above)
