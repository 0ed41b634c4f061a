"""One step of the stream, s_{i+1} = U(s_i, b_i), evaluated on other values: U with a part left out.

Contract: nothing is changed; the result is a recipe, or ``Undefined`` with the reason.

U is whatever lies between a state, a contribution and the next state: an addition, a scale on either side, a cast, a
view, a matrix that mixes several streams, a norm over their sum. What of U does not depend on a changed value is used as
it is. Weights that mix or gate are a part of U: they are made from the state that U is evaluated on, never from the one
that the block read.
"""
from __future__ import annotations

import torch
from torch.fx import Node

from .dataflow import Dataflow, op_name, same_sizes, value_inputs, value_of, written_arguments
from .operations import CASTS, LINEAR_MAPS, VIEWS
from .reasons import Reason
from .recipe import Call, Copy, Recipe, like
from .sums import argument, left_over, sum_of

# Nothing in, nothing out: linear in the operand that is left out.
_LINEAR = VIEWS | CASTS | LINEAR_MAPS | {"mul", "imul", "div", "truediv", "neg", "sum", "mean", "dropout", "conv1d",
                                         "cumsum", "to_copy", "repeat", "repeat_interleave", "movedim", "swapaxes"}


class Undefined(Exception):
    """A value without some contribution does not exist; ``reason`` says why."""

    def __init__(self, reason: Reason) -> None:
        super().__init__(str(reason))
        self.reason = reason


def evaluate(flow: Dataflow, after: Node, changed: dict[Node, Recipe]) -> Recipe:
    """``after`` computed again with the values of ``changed`` in place of its nodes; None leaves a term out.

    Raises:
        Undefined: a term that is left out goes through something that is not linear in it.
    """
    seeds = flow.mask(old for old, new in changed.items() if new is not old)
    known: dict[Node, Recipe] = dict(changed)

    def value(node: Node) -> Recipe:
        if node in known:
            return known[node]
        if not flow.ancestors(node) & seeds:
            return _readable(flow, node)
        inputs = {a: value(a) for a in value_inputs(node)}
        swaps = {a: v for a, v in inputs.items() if v is not a}
        if not swaps and not any(flow.writes_to(a) for a in inputs):
            known[node] = node          # depends on a change only through a contribution, which stays
        else:
            known[node] = _again(node, swaps)
        return known[node]

    return value(after)


def _again(node: Node, swaps: dict[Node, Recipe]) -> Recipe:
    missing = [a for a, v in swaps.items() if v is None]
    if not swaps:       # depends on a change through memory that was written in place
        raise Undefined(Reason("overwritten", f"{node.name} reads memory that is written in place", node=node.name))
    if written_arguments(node):
        raise Undefined(Reason("overwritten", f"{node.name} ({op_name(node)}) writes in place on the residual stream; "
                               "use an out-of-place operation there", node=node.name))
    if not missing:
        return Copy(node, tuple(swaps.items()))
    return shaped(_left_out(node, swaps, missing), node)


def _left_out(node: Node, swaps: dict[Node, Recipe], missing: list[Node]) -> Recipe:
    name, total = op_name(node), sum_of(node)
    if total is not None:
        rest = None if any(r in missing for r in total.rest) else swaps.get(total.rest[0], total.rest[0])
        first = swaps.get(total.first, total.first)
        if first is not None or (len(total.rest) == 1 and name != "lerp"):
            return left_over(total, first=first, rest=rest)
    elif name in _LINEAR and not _affine(node, name) and not (name in ("div", "truediv") and node.args[1] in missing):
        return None
    raise Undefined(Reason(
        "update_not_linear", f"{node.name} ({op_name(node)}), between a contribution and the residual stream, is not "
        f"linear in {missing[0].name}: the stream without that contribution is not defined", node=node.name))


def _affine(node: Node, name: str) -> bool:
    """Whether a linear map adds a bias of its own."""
    return name in ("linear", "conv1d") and argument(node, 2, "bias") is not None


def shaped(recipe: Recipe, node: Node) -> Recipe:
    """``recipe`` in the dtype of ``node``; promotion by the term that is gone must not be lost. None stays None."""
    if recipe is None:
        return None
    have, want = value_of(like(recipe)), value_of(node)
    if not isinstance(have, torch.Tensor) or not isinstance(want, torch.Tensor):
        return recipe
    if not same_sizes(have, want):
        raise Undefined(Reason("update_not_linear", f"{node.name} broadcasts the residual stream against the "
                               "contribution, so it has another shape without it", node=node.name))
    return recipe if have.dtype == want.dtype else Call("to", (recipe, want.dtype), node, method=True)


def _readable(flow: Dataflow, node: Node) -> Node:
    late = flow.late_writes(node)
    if late and node.op not in ("placeholder", "get_attr"):
        raise Undefined(Reason("overwritten", f"{late[0].name} writes into the memory of {node.name}, which the stream "
                               "without the missing part is made of", node=node.name))
    return node
