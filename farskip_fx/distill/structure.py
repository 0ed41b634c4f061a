"""What each decoder layer computes and sends, from the traced graph: the input of ``exposed``.

Contract: ``Blocks`` of a Dynamo graph in, one ``LayerStructure`` for each layer out. Matrix products and attention are counted
by the shapes that they were traced with; norms, activations and other loops are not, so compute is rather too small.
"""
from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.fx import Node

from ..passes.dataflow import Dataflow, op_name, tensors_of, value_of
from ..passes.detect import Block, Blocks, Layer
from ..passes.operations import EXPERT_MAPS, LINEAR_MAPS, PRODUCTS
from ..passes.routing import is_weight

_CORES = {"scaled_dot_product_attention", "flex_attention"}
_MAPS = (LINEAR_MAPS | PRODUCTS | EXPERT_MAPS | {"scaled_grouped_mm"}) - {"getitem", "index_select", "embedding"}


@dataclass(frozen=True, kw_only=True)
class LayerStructure:
    """One decoder layer. Floating-point operations are those of one token.

    Attributes:
        label: module path, for messages.
        kind: "moe" or "mlp".
        stream: which residual stream it is on (an encoder and a decoder have two).
        has_attention: False where an MoE begins the model.
        shared: whether an MoE has a part that is not routed.
        attention_flops: linear maps of all blocks before the MLP or MoE.
        core_flops: of attention proper, for one token of context.
        router_flops, shared_flops, expert_flops: of an MoE; a dense MLP is all ``shared_flops``.
        rows: that one token sends to experts, and gets back.
        row_bytes: of one of them.
    """
    label: str
    kind: str
    stream: int = 0
    has_attention: bool = True
    shared: bool = False
    attention_flops: float
    core_flops: float = 0.0
    router_flops: float = 0.0
    shared_flops: float = 0.0
    expert_flops: float = 0.0
    rows: float = 0.0
    row_bytes: float = 0.0


def structure_of(blocks: Blocks, *, tokens: int, length: int) -> tuple[LayerStructure, ...]:
    """
    Args:
        tokens: in the traced batch; length: of one sequence of it.
    """
    return tuple(_of_layer(blocks, layer, tokens, length) for layer in blocks.layers)


def _of_layer(blocks: Blocks, layer: Layer, tokens: int, length: int) -> LayerStructure:
    flow, mlp = blocks.flow, layer.mlp
    maps = core = 0.0
    for block in layer.blocks[:-1]:
        for node in flow.members(block.contribution.branch):
            if op_name(node) in _CORES or op_name(node) in PRODUCTS and not any(map(is_weight, node.all_input_nodes)):
                core += flops(node) / tokens / length
            else:
                maps += flops(node) / tokens
    parts = {"router": 0.0, "shared": 0.0, "expert": 0.0}
    for node in flow.members(mlp.contribution.branch):
        bit = flow.bit(node)
        parts["router" if bit & mlp.routers else "expert" if bit & mlp.routed else "shared"] += flops(node) / tokens
    state = next(tensors_of(mlp.stream.states[mlp.contribution.origin]))
    moe = mlp.kind == "moe"
    return LayerStructure(
        label=mlp.label or mlp.node.name, kind="moe" if moe else "mlp", stream=blocks.streams.index(mlp.stream),
        has_attention=layer.attention is not None, shared=mlp.shared, attention_flops=maps, core_flops=core,
        router_flops=parts["router"], shared_flops=parts["shared"], expert_flops=parts["expert"],
        rows=_experts_a_token(flow, mlp) if moe else 0.0,
        row_bytes=float(state.shape[-1] * state.element_size()) if moe else 0.0)


def _experts_a_token(flow: Dataflow, block: Block) -> float:
    """As many as the last choice of the router picks; where all experts get all tokens (a soft MoE) that is not known: 1."""
    picked = 1
    for node in flow.members(block.routed):
        if op_name(node) == "topk":
            picked = next(tensors_of(node)).shape[-1]
    return float(picked)


def flops(node: Node) -> float:
    """Of a matrix product or an attention; 0 for everything else."""
    inputs = [value for a in _arguments(node) if isinstance(value := value_of(a), torch.Tensor)]
    out = next(tensors_of(node), None)
    name = op_name(node)
    if out is None or len(inputs) < 2:
        return 0.0
    if name in _CORES and len(inputs) > 2:
        q, k, v = (tensor.shape for tensor in inputs[:3])
        causal = node.kwargs.get("is_causal", node.args[5] if len(node.args) > 5 else False) is True
        return 2.0 * math.prod(q[:-1]) * k[-2] * (q[-1] + v[-1]) * (0.5 if causal else 1.0)
    if name not in _MAPS:
        return 0.0
    if name == "einsum" and isinstance(node.args[0], str) and "->" in node.args[0] and "." not in node.args[0]:
        return 2.0 * out.numel() * _contracted(node.args[0].replace(" ", ""), inputs)
    first = inputs[1] if name in ("addmm", "baddbmm", "addbmm") and len(inputs) > 2 else inputs[0]
    return 2.0 * out.numel() * first.shape[-1]


def _contracted(equation: str, inputs: Sequence[torch.Tensor]) -> int:
    given, result = equation.split("->")
    sizes = {letter: size for term, tensor in zip(given.split(","), inputs) for letter, size in zip(term, tensor.shape)}
    return math.prod(size for letter, size in sizes.items() if letter not in result)


def _arguments(node: Node) -> list[Node]:
    """Its tensor arguments, in order, one that is given twice both times."""
    found: list[Node] = []
    for value in (*node.args, *node.kwargs.values()):
        found += [a for a in (value if isinstance(value, (tuple, list)) else (value,)) if isinstance(a, Node)]
    return found
