"""Values that do not exist in the graph yet, as data: planned first, built once everything is known to be defined.

Contract: recipes only refer to nodes of one graph; ``realize`` adds nodes and changes none.

Terms
  recipe     an existing Node; ``Copy``: a node again with some inputs replaced; ``Call``: a new operation; None: nothing,
             the value of a term that is left out
"""
from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Union

import torch
from torch.fx import Graph, Node

from .checkpointing import TAGS
from .dataflow import op_name


class ContractBroken(RuntimeError):
    """A pass left a graph that is not what it promised: a bug of farskip_fx, never of the model."""


@dataclass(frozen=True)
class Copy:
    """``node`` computed again with inputs replaced."""
    node: Node
    swaps: tuple[tuple[Node, "Recipe"], ...]


@dataclass(frozen=True)
class Call:
    """``target(*args, **kwargs)``, shaped like ``like``; ``method`` calls a method of the first argument."""
    target: Callable | str
    args: tuple
    like: Node
    method: bool = False


Recipe = Union[Node, Copy, Call, None]
_KEPT_META = ("example_value", "val", "nn_module_stack", "stack_trace", "source_fn_stack", *TAGS)


def like(recipe: Recipe) -> Node:
    """A node of the same shape and dtype."""
    return recipe if isinstance(recipe, Node) else recipe.node if isinstance(recipe, Copy) else recipe.like


class Builder:
    """Realizes recipes before ``anchor``; equal recipes become one node."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.built: dict[Recipe, Node] = {}
        self.masks: dict[Node, Node] = {}      # of dropouts
        self.added = 0

    def realize(self, recipe: Recipe, anchor: Node, why: str) -> Node:
        if isinstance(recipe, Node):
            return recipe
        if recipe in self.built:
            return self.built[recipe]
        if isinstance(recipe, Copy):
            lost = [old.name for old, _ in recipe.swaps if old not in recipe.node.all_input_nodes]
            if lost:
                raise ContractBroken(f"{recipe.node.name} no longer reads {lost[0]}, which a copy of it was to replace; "
                                     "please report this model")
            swaps = {old: self.realize(new, anchor, why) for old, new in recipe.swaps}
            mask = self._mask(recipe.node)
            with self.graph.inserting_before(anchor):
                node = self.graph.node_copy(recipe.node, lambda n: swaps.get(n, n)) if mask is None else \
                    self.graph.call_function(operator.mul, (swaps[recipe.node.args[0]], mask))
            node.meta = dict(recipe.node.meta)
        else:
            args = tuple(self.realize(a, anchor, why) if isinstance(a, (Node, Copy, Call)) else a for a in recipe.args)
            make = self.graph.call_method if recipe.method else self.graph.call_function
            with self.graph.inserting_before(anchor):
                node = make(recipe.target, args)
            node.meta = {k: v for k, v in recipe.like.meta.items() if k in _KEPT_META}
        node.meta["farskip"] = why
        self.built[recipe] = node
        self.added += 1
        return node

    def _mask(self, node: Node) -> Node | None:
        """The mask of an active dropout, taken out of it so that its copy drops the same elements."""
        if node in self.masks:
            return self.masks[node]
        if not drops(node):
            return None
        source = node.args[0]
        with self.graph.inserting_before(node):
            ones = self.graph.call_function(torch.ones_like, (source,))
            mask = self.graph.node_copy(node, lambda n: ones if n is source else n)
        tags = {k: v for k, v in node.meta.items() if k in TAGS}
        ones.meta, mask.meta = {**source.meta, **tags}, dict(node.meta)
        # The dropout itself becomes the product with its mask; the node stays what others know it by.
        node.op, node.target, node.args, node.kwargs = "call_function", operator.mul, (source, mask), {}
        self.added += 2
        self.masks[node] = mask
        return mask


def drops(node: Node) -> bool:
    """Whether ``node`` is a dropout that draws random numbers."""
    if not op_name(node).startswith(("dropout", "alpha_dropout", "feature_dropout")):
        return False
    p = node.args[1] if len(node.args) > 1 else node.kwargs.get("p", 0.5)
    training = node.args[2] if len(node.args) > 2 else node.kwargs.get("training", True)
    return p is not None and p != 0 and training is not False
