"""Step 0b: attention under a mask that is causal whatever the inputs runs as causal attention.

Contract: a Dynamo graph in; the same graph out with equal values. For a ``scaled_dot_product_attention`` whose mask is
made of constants alone (positions that were counted, compared and broadcast), the mask is computed here. If it hides
exactly what ``is_causal`` hides the call gets ``is_causal=True``, if it hides nothing it gets no mask. All else stays: a
mask that depends on an input (padding, packed rows, positions, a cache), a symbolic size, dropout, a sliding window that
is shorter than the rows.

Why: transformers leaves such a mask out by itself where it runs eagerly, and under torch.compile from torch 2.14 on.
Before, a compiled model computes both halves of the attention and throws one away.
"""
from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.fx import Graph, Node
from torch.fx.node import map_aggregate

from ._torch import real_tensors
from .attention import attention_arguments, attention_calls
from .dataflow import op_name, storages_of, value_of, written_arguments

# Deterministic, without side effects, and what a mask is made of.
_MAKES_MASKS = {
    "add", "sub", "mul", "neg", "floordiv", "arange", "ones", "zeros", "full", "new_ones", "new_zeros", "new_full", "ones_like",
    "zeros_like", "full_like", "tensor", "scalar_tensor", "tril", "triu", "diff", "cumsum", "cat", "stack", "where",
    "masked_fill", "eq", "ne", "le", "lt", "ge", "gt", "and_", "or_", "xor", "invert", "not_", "bitwise_and", "bitwise_or",
    "bitwise_not", "logical_and", "logical_or", "logical_not", "getitem", "getattr", "unsqueeze", "squeeze", "expand", "expand_as",
    "view", "reshape", "flatten", "permute", "transpose", "contiguous", "clone", "to", "bool", "float", "int", "long", "type",
    "type_as", "size", "dim"}
MOST_ELEMENTS = 1 << 28     # of a mask that is computed: 256 MB as bool


@dataclass(frozen=True, kw_only=True)
class Causal:
    calls: int      # attention calls that lost their mask


def skip_causal_masks(graph: Graph) -> Causal:
    """Take the mask from every attention call whose mask is known to be causal, or to hide nothing."""
    calls = attention_calls(graph)
    written = {s for node in graph.nodes for w in written_arguments(node) for s in storages_of(w)} if calls else set()
    kinds: dict[Node, bool | None] = {}     # of masks: is_causal, None for one that stays
    done = 0
    for node in calls:
        given = attention_arguments(node)
        mask = given.pop("attn_mask", None)
        if not isinstance(mask, Node) or given.get("is_causal", False) or given.get("dropout_p", 0.0):
            continue
        if mask not in kinds:
            kinds[mask] = _is_causal(mask, written)
        if (kind := kinds[mask]) is not None:
            node.args, node.kwargs = tuple(given.pop(name) for name in ("query", "key", "value")), {**given, "is_causal": kind}
            done += 1
    if done:
        for mask in kinds:
            _erase_unused(graph, mask)
        graph.lint()
    return Causal(calls=done)


def _is_causal(mask: Node, written: set[int]) -> bool | None:
    """True: what ``is_causal`` hides. False: nothing. None: something else, or not known."""
    nodes = _made_of_constants(mask, written)
    value = value_of(mask)
    if nodes is None or not isinstance(value, torch.Tensor) or value.dim() < 2 or value.numel() > MOST_ELEMENTS:
        return None
    try:
        with torch.no_grad(), real_tensors():
            found = _computed(nodes)[mask]
    except (TypeError, ValueError, RuntimeError, IndexError, AttributeError):   # an argument that is not what it is elsewhere
        return None
    if not isinstance(found, torch.Tensor) or found.device.type != "cpu" or found.shape != value.shape:
        return None
    seen = found if found.dtype == torch.bool else found == 0
    if found.dtype != torch.bool and not (found[~seen] <= torch.finfo(found.dtype).min).all():     # a bias, not a mask
        return None
    if seen.all():
        return False
    wanted = torch.ones(found.shape[-2:], dtype=torch.bool).tril()
    return True if (seen == wanted).all() else None


def _made_of_constants(mask: Node, written: set[int]) -> list[Node] | None:
    """The nodes that ``mask`` is computed from, itself the last; None if one of them is not a constant."""
    found: set[Node] = set()
    todo = [mask]
    while todo:
        node = todo.pop()
        if node in found:
            continue
        if node.op not in ("call_function", "call_method") or op_name(node) not in _MAKES_MASKS or _symbolic(node):
            return None
        if written.intersection(storages_of(node)):
            return None
        found.add(node)
        todo += node.all_input_nodes
    return [node for node in mask.graph.nodes if node in found]


def _symbolic(node: Node) -> bool:
    value = value_of(node)
    sizes = [*value.shape, *value.stride()] if isinstance(value, torch.Tensor) else [value]
    return any(isinstance(size, (torch.SymInt, torch.SymFloat, torch.SymBool)) for size in sizes)


def _computed(nodes: list[Node]) -> dict[Node, object]:
    """Values of ``nodes``, on the CPU wherever the graph has them."""
    values: dict[Node, object] = {}

    def real(argument):
        if isinstance(argument, torch.device):
            return torch.device("cpu")
        return values[argument] if isinstance(argument, Node) else argument

    for node in nodes:
        args, kwargs = map_aggregate(node.args, real), map_aggregate(node.kwargs, real)
        if node.op == "call_method":
            values[node] = getattr(args[0], node.target)(*args[1:], **kwargs)
        else:
            values[node] = node.target(*args, **kwargs)
    return values


def _erase_unused(graph: Graph, node: Node) -> None:
    """``node`` and what it alone was for."""
    todo, gone = [node], set()
    while todo:
        node = todo.pop()
        if node not in gone and not node.users and node.op in ("call_function", "call_method"):
            todo += node.all_input_nodes
            graph.erase_node(node)
            gone.add(node)
