"""Which block of the model a node belongs to, and what part of it: noted on the Dynamo graph, by identity.

Contract: ``Blocks`` in; nodes of the blocks' branches get a note, and nothing else changes. AOTAutograd carries the note
(``node.meta["custom"]``) to the forward and backward graphs: what is computed for a block's gradient belongs to the block.

Terms
  place   layer, block ("attention", "moe", "mlp") and part
  part    of an MoE: "counts", "dispatch", "combine" for its exchanges, "routed" for what depends on the selection, else
          "shared" (router, shared expert); of other blocks: "all"
"""
from __future__ import annotations

from typing import NamedTuple

import torch
from torch.fx import Node

from .dataflow import op_name, tensors_of
from .detect import Block, Blocks
from .operations import EXCHANGES

_KEY = "farskip"


class Place(NamedTuple):
    layer: int
    block: str
    part: str


def mark(blocks: Blocks) -> None:
    """Note the place of every node of every branch. A node that several blocks compute with belongs to the last."""
    for layer in blocks.layers:
        for block in layer.blocks:
            _mark(block, layer.index)


def place_of(node: Node) -> Place | None:
    """Where ``node``, of a Dynamo graph or of one that was made of it, comes from."""
    note = (node.meta.get("custom") or {}).get(_KEY)
    return Place(*note) if note else None


def name_of(block: Block) -> str:
    return "attention" if block.kind == "mixer" else block.kind


def _mark(block: Block, layer: int) -> None:
    flow, name = block.stream.flow, name_of(block)
    parts = dict(_exchanges(block)) if block.kind == "moe" else {}
    for node in flow.members(block.contribution.branch):
        part = parts.get(node) or ("all" if block.kind != "moe" else "routed" if flow.bit(node) & block.routed else "shared")
        # A new dictionary: nodes that Dynamo annotated together share one.
        node.meta["custom"] = {**(node.meta.get("custom") or {}), _KEY: (layer, name, part)}


def _exchanges(block: Block):
    """Each exchange and its part: of those that carry activations the last returns results."""
    flow = block.stream.flow
    found = [n for n in flow.members(block.contribution.branch) if n.op == "call_function" and op_name(n) in EXCHANGES]
    carry = [n for n in found if any(t.is_floating_point() and t.dim() > 1 for t in tensors_of(n))]
    for node in found:
        whole = isinstance(node.meta.get("example_value", node.meta.get("val")), torch.Tensor)
        yield node, ("combine" if carry and node is carry[-1] else "dispatch" if node in carry or not whole else "counts")
