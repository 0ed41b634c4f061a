"""Step 3b: split fused attention by heads, so that it can cover two exchanges.

Contract: a Dynamo graph and the attention calls in it; the same values in the same graph, with each call made in
``parts`` calls over as many groups of heads. Heads do not see each other, so each number is computed as before.

Why: in a rewired layer the attention core is the largest piece of compute that is free to run behind an exchange, and it
is one kernel: it covers the dispatch or the combine, not both, and the last combine finds nothing at all. In two halves
one half goes behind each. (``torch.chunk``, because its backward is one ``cat``; slices would make padded sums.)
"""
from __future__ import annotations

import operator
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.fx import Graph, Node

from .attention import attention_arguments
from .checkpointing import TAGS
from .dataflow import value_of

_KEPT_META = ("custom", "nn_module_stack", "stack_trace", "source_fn_stack", *TAGS)


@dataclass(frozen=True, kw_only=True)
class Split:
    calls: int      # attention calls that were split


def split_attention(graph: Graph, calls: Iterable[Node], *, parts: int) -> Split:
    """Split each of ``calls`` that can be split: ``scaled_dot_product_attention`` without dropout, heads divisible."""
    done = 0
    for node in calls:
        if parts > 1 and node.target is F.scaled_dot_product_attention and _divides(node, parts):
            _split(graph, node, parts)
            done += 1
    if done:
        graph.lint()
    return Split(calls=done)


def _heads(node) -> int | None:
    """Static number of heads of (batch, heads, tokens, width), else None."""
    value = value_of(node) if isinstance(node, Node) else None
    if not isinstance(value, torch.Tensor) or value.dim() != 4 or not isinstance(value.shape[1], int):
        return None
    return value.shape[1]


def _divides(node: Node, parts: int) -> bool:
    given = attention_arguments(node)
    if given.get("dropout_p", 0.0) != 0.0:       # other random numbers for the same mask
        return False
    heads = [_heads(given.get(name)) for name in ("query", "key", "value")]
    return all(h is not None and h % parts == 0 for h in heads)


def _split(graph: Graph, node: Node, parts: int) -> None:
    given = attention_arguments(node)
    mask = given.get("attn_mask")
    by_heads = ["query", "key", "value"] + (["attn_mask"] if (_heads(mask) or 1) > 1 else [])

    def call(target, *args, **kwargs) -> Node:
        new = graph.call_function(target, args, kwargs)
        new.meta = {k: v for k, v in node.meta.items() if k in _KEPT_META}
        new.meta["farskip"] = f"{node.name}, by heads"
        return new

    with graph.inserting_before(node):
        chunks = {name: call(torch.chunk, given[name], parts, dim=1) for name in by_heads}
        pieces = [call(F.scaled_dot_product_attention, **{
            **given, **{name: call(operator.getitem, chunks[name], i) for name in by_heads}}) for i in range(parts)]
        whole = call(torch.cat, pieces, dim=1)
    if "example_value" in node.meta:
        whole.meta["example_value"] = node.meta["example_value"]
    node.replace_all_uses_with(whole)
    graph.erase_node(node)
