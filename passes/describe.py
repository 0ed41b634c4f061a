"""What was found, as data for people: each block, from what evidence, and where in the model's source.

Contract: ``Blocks`` in, a tuple of ``Found`` out. Nothing is changed.
"""
from __future__ import annotations

import re
from dataclasses import dataclass

from torch.fx import Node

from .detect import Blocks
from .places import name_of

_FRAME = re.compile(r'File "(?P<file>[^"]*)", line (?P<line>\d+), in (?P<function>[^\n]*)\n\s*(?P<code>[^\n]*)')


@dataclass(frozen=True, kw_only=True)
class Found:
    """One block of the residual stream.

    Args:
        block: "attention" (anything that mixes tokens), "moe" or "mlp".
        evidence: from which operations that is known; ``certain`` is False where one of them is not known.
        shared: an MoE that adds something beside its routed experts.
        exchange: the node of an exchange between ranks in it, or "".
        reads, adds: the state that it reads and the contribution that it adds, as named in the Dynamo graph.
        operations: nodes between the two.
        source: where the model's source computes the contribution.
    """
    layer: int
    block: str
    label: str
    evidence: str
    certain: bool
    shared: bool
    exchange: str
    reads: str
    adds: str
    operations: int
    source: str


def describe(blocks: Blocks) -> tuple[Found, ...]:
    return tuple(
        Found(layer=layer.index, block=name_of(block), label=block.label, evidence=block.evidence, certain=block.certain,
              shared=block.shared, exchange=block.exchange, reads=block.stream.states[block.contribution.origin].name,
              adds=block.node.name, operations=block.contribution.branch.bit_count(), source=source_of(block.node))
        for layer in blocks.layers for block in layer.blocks)


def source_of(node: Node) -> str:
    """``modeling.py:312 in forward: hidden_states = residual + hidden_states``; "" where Dynamo noted nothing."""
    last = None
    for last in _FRAME.finditer(node.meta.get("stack_trace") or ""):
        pass
    if last is None:
        return ""
    file = last["file"].replace("\\", "/").rpartition("/")[2]
    return f"{file}:{last['line']} in {last['function'].strip()}: {last['code'].strip()}"
