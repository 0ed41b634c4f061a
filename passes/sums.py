"""Additions in all their spellings: ``a + b``, ``torch.add(a, b, alpha=2)``, ``sub``, ``addcmul``, ``addmm``, ``lerp``.

Contract: nothing is changed. ``sum_of`` reads a node as ``scale * skip + something linear in the contribution``;
``left_over`` is what remains of it without one side.
"""
from __future__ import annotations

import operator
from dataclasses import dataclass

import torch
from torch.fx import Node

from .dataflow import op_name
from .recipe import Call, Recipe

_TWO_TERMS = {"add": 1, "sub": -1, "subtract": -1}
_FUSED = {"addcmul", "addcdiv", "addmm", "baddbmm", "addmv"}     # first operand + product of the other two


@dataclass(frozen=True)
class Sum:
    """``node`` adds: ``first`` with factor 1 (or beta), the ``rest`` with ``factor``."""
    node: Node
    first: Node
    rest: tuple[Node, ...]
    factor: float = 1        # of the second term of a plain sum
    beta: float = 1          # of the first term (addmm)

    @property
    def two_terms(self) -> bool:
        """A plain sum: either operand may be the stream."""
        return len(self.rest) == 1 and op_name(self.node) != "lerp"


def argument(node: Node, position: int, *names: str):
    """An argument by position or by one of its names, None where it is not given."""
    if position < len(node.args):
        return node.args[position]
    return next((node.kwargs[n] for n in names if n in node.kwargs), None)


def sum_of(node: Node) -> Sum | None:
    """``node`` as a sum of tensors out of place, or None."""
    if node.op not in ("call_function", "call_method") or "out" in node.kwargs:
        return None
    name = op_name(node)
    first = argument(node, 0, "input", "self")
    if name in _TWO_TERMS:
        second = argument(node, 1, "other")
        alpha = argument(node, 2, "alpha")
        alpha = 1 if alpha is None else alpha
        if not isinstance(first, Node) or not isinstance(second, Node) or not isinstance(alpha, (int, float)):
            return None
        return Sum(node, first, (second,), factor=alpha * _TWO_TERMS[name])
    if name in _FUSED:
        rest = (argument(node, 1, "tensor1", "mat1", "batch1", "mat"), argument(node, 2, "tensor2", "mat2", "batch2", "vec"))
        beta = node.kwargs.get("beta", 1)
        if not all(isinstance(r, Node) for r in (first, *rest)) or not isinstance(beta, (int, float)):
            return None
        return Sum(node, first, rest, beta=beta)
    if name == "lerp":
        end = argument(node, 1, "end")
        if isinstance(first, Node) and isinstance(end, Node):
            return Sum(node, first, (end,))
    return None


def left_over(total: Sum, *, first: Recipe, rest: Recipe) -> Recipe:
    """The sum with ``first`` or ``rest`` (one of them None) left out."""
    if first is None and rest is None:
        return None
    if first is None:
        return None if len(total.rest) > 1 or op_name(total.node) == "lerp" else _scaled(rest, total.factor, total.node)
    if op_name(total.node) == "lerp":
        weight = argument(total.node, 2, "weight")
        return Call(operator.mul, (first, Call(operator.sub, (1, weight), total.node)), total.node)
    return _scaled(first, total.beta, total.node)


def _scaled(value: Recipe, factor: float, like: Node) -> Recipe:
    return value if factor == 1 else Call(operator.mul, (value, factor), like)


def is_float(value) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point()
