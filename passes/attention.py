"""Fused attention in a Dynamo graph: its arguments by name."""
from __future__ import annotations

import torch.nn.functional as F
from torch.fx import Graph, Node

_NAMES = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")


def attention_calls(graph: Graph) -> list[Node]:
    return [node for node in graph.nodes if node.target is F.scaled_dot_product_attention]


def attention_arguments(node: Node) -> dict[str, object]:
    """What a call of ``scaled_dot_product_attention`` was given, by the names of its parameters."""
    return {**dict(zip(_NAMES, node.args)), **node.kwargs}
