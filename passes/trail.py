"""The longest trail of residual additions through a graph.

Contract: nothing is changed. Every tensor gets its trail: through how many updates it came, and by which operands; the
longest one is returned step by step. Ties between reading an addition as an update or as a light operation go to the
update.
"""
from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch.fx import Node

from .dataflow import Dataflow, op_name, same_sizes, value_of
from .operations import CASTS, SCALES
from .routing import is_weight
from .sums import argument, is_float, sum_of

_SAME_ELEMENTS = {"view", "reshape", "contiguous", "flatten", "unflatten", "squeeze", "unsqueeze", "_unsafe_view", "clone",
                  "alias", "transpose", "permute", "movedim", "swapaxes", "detach", "dropout", "identity", "layer_norm",
                  "rms_norm", "view_as", "reshape_as", "t"} | CASTS
_MIXES_STREAMS = {"matmul", "bmm", "einsum", "__matmul__"}


@dataclass(frozen=True)
class Inner:
    """An addition inside a contribution that carries the stream on, as an update would."""
    start: Node               # where it comes from: another such addition, or the stream
    skip: Node
    add: Node
    contribution: Node


@dataclass(frozen=True)
class Step:
    """One update of the stream."""
    path: tuple[Node, ...]    # from the update before (or the first value) to the operand of this one
    add: Node
    skip: Node                # the operand that is the stream
    contribution: Node        # the operand that is added to it
    inner: tuple[Inner, ...]  # residuals of its own


class _Trail(NamedTuple):
    length: int
    root: Node                # first value of the whole trail
    start: Node               # the update that it came through last, or the root
    previous: Node | None
    contribution: Node | None = None


def longest_trail(flow: Dataflow, busy: int, *, taken: int = 0) -> list[Step]:
    """``taken``: nodes that belong to another stream."""
    trails: dict[Node, _Trail] = {}
    best = None
    for node in flow.nodes:
        value = value_of(node)
        if not is_float(value) or value.dim() < 2 or flow.bit(node) & taken:
            continue
        trail = _update(flow, node, trails) or _light(flow, node, trails, busy) or _Trail(0, node, node, None)
        trails[node] = trail
        if trail.contribution is not None and (best is None or trail.length >= trails[best].length):
            best = node
    best = _outermost(flow, best, trails)
    steps = []
    while best is not None and trails[best].length:
        add, path, node = best, [], trails[best].previous
        while True:
            path.append(node)
            if node is trails[node].start:
                break
            node = trails[node].previous
        skip, content = trails[add].previous, trails[add].contribution
        steps.append(Step(path=tuple(path[::-1]), add=add, skip=skip, contribution=content,
                          inner=tuple(_inner(flow, content, trails[skip], trails))))
        best = path[-1]
    return steps[::-1]


def _inner(flow: Dataflow, content: Node, skip: _Trail, trails: dict[Node, _Trail]) -> Iterator[Inner]:
    later = flow.bit(skip.start) << 1       # weights stand at the beginning of a graph
    for node in flow.members((flow.ancestors(content) | flow.bit(content)) & -later):
        trail = trails.get(node)
        if trail is not None and trail.contribution is not None and trail.root is skip.root and trail.length > skip.length:
            yield Inner(start=trails[trail.previous].start, skip=trail.previous, add=node, contribution=trail.contribution)


def _outermost(flow: Dataflow, best: Node | None, trails: dict[Node, _Trail]) -> Node | None:
    """The longest trail may end inside the last block, where that has residuals of its own: the addition around it."""
    if best is None:
        return None
    for node in flow.nodes[flow.position[best] + 1:]:
        trail = trails.get(node)
        if trail is not None and trail.contribution is not None and trail.root is trails[best].root \
                and (trail.contribution is best or flow.depends(trail.contribution, best)):
            best = node
    return best


def _update(flow: Dataflow, node: Node, trails: dict[Node, _Trail]) -> _Trail | None:
    """``node`` as stream + contribution, whichever operand makes the longer trail."""
    total = sum_of(node)
    if total is None:
        return None
    readings = [(total.first, total.rest)]
    if total.two_terms:
        readings.append((total.rest[0], (total.first,)))
    best = None
    for skip, others in readings:
        trail = trails.get(skip)
        if trail is None or not _alike(value_of(skip), value_of(node)):
            continue
        if total.two_terms and not _alike(value_of(others[0]), value_of(node)):
            continue
        content = next((o for o in others if flow.depends(o, trail.root)), None)
        if content is None or not _adds(content, trail, trails):
            continue
        if best is None or trail.length + 1 > best.length:
            best = _Trail(trail.length + 1, trail.root, node, skip, content)
    return best


def _adds(content: Node, trail: _Trail, trails: dict[Node, _Trail]) -> bool:
    """Whether ``content`` is more than the stream itself once again (``x + 2 * x``, the ``- x`` of a lerp, the outer
    residual of a block that refines its output step by step). A scaled embedding that comes back later is."""
    other = trails.get(content)
    if other is None or other.root is not trail.root or other.length > trail.length:
        return True
    return other.length == 0 < trail.length and _is_scaled(content, trails)


def _is_scaled(node: Node, trails: dict[Node, _Trail]) -> bool:
    while node is not None and op_name(node) not in SCALES:
        node = trails[node].previous
    return node is not None


def _light(flow: Dataflow, node: Node, trails: dict[Node, _Trail], busy: int) -> _Trail | None:
    """The longest trail that ``node`` carries on."""
    best = None
    for operand in _carried(flow, node, trails, busy):
        trail = trails.get(operand)
        if trail is not None and (best is None or trail.length > best.length):
            best = _Trail(trail.length, trail.root, trail.start, operand)
    return best


def _carried(flow: Dataflow, node: Node, trails: dict[Node, _Trail], busy: int) -> list[Node]:
    name = op_name(node)
    first = argument(node, 0, "input", "self")
    if name in _SAME_ELEMENTS:
        return [first] if isinstance(first, Node) and first in trails else []
    if name in ("expand", "expand_as", "broadcast_to"):
        return [first] if isinstance(first, Node) and first in trails and _alike(value_of(first), value_of(node)) else []
    if name == "getitem" and isinstance(first, Node) and first in trails:
        keys = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
        return [first] if all(k == slice(None) or k is Ellipsis for k in keys) else []
    operands = [a for a in node.args if isinstance(a, Node)]
    if name in SCALES:
        pairs = [(first, node.args[1])] if name not in ("mul", "imul") else [tuple(node.args[:2]), tuple(node.args[1::-1])]
        return [x for x, gate in pairs if isinstance(x, Node) and x in trails and _alike(value_of(x), value_of(node))
                and _is_gate(flow, gate, trails[x], busy)]
    total = sum_of(node)
    if total is not None and total.two_terms:
        return [x for x, other in ((total.first, total.rest[0]), (total.rest[0], total.first))
                if x in trails and _alike(value_of(x), value_of(node)) and _is_offset(flow, other, trails[x], trails, busy)]
    if name in _MIXES_STREAMS and len(operands) == 2:
        gate, x = operands
        return [x] if x in trails and value_of(x).dim() >= 4 and _keeps_features(node, x) \
            and _is_clean(flow, gate, trails[x], busy) else []
    return []


def _is_clean(flow: Dataflow, gate: Node, trail: _Trail, busy: int) -> bool:
    """Nothing between the stream and ``gate`` mixes tokens or routes them."""
    return not (flow.ancestors(gate) | flow.bit(gate)) & busy & ~flow.ancestors(trail.start)


def _is_gate(flow: Dataflow, gate, trail: _Trail, busy: int) -> bool:
    """A factor on the stream: a number, a weight, one value a token, or something that no linear map was needed for."""
    if not isinstance(gate, Node) or not flow.depends(gate, trail.start):
        return not isinstance(gate, Node) or _is_clean(flow, gate, trail, busy)
    if not _is_clean(flow, gate, trail, busy):
        return False
    if is_per_token(gate):
        return True
    between = flow.descendants(flow.bit(trail.start), flow.ancestors(gate) & ~flow.ancestors(trail.start))
    return not any(op_name(n) in ("linear", "matmul", "mm", "addmm", "einsum", "bmm") for n in flow.members(between))


def is_per_token(node: Node) -> bool:
    """One value a token: the last dimension has a single element."""
    value = value_of(node)
    return isinstance(value, torch.Tensor) and value.dim() > 0 and isinstance(value.shape[-1], int) and value.shape[-1] == 1


def _is_offset(flow: Dataflow, other: Node, trail: _Trail, trails: dict[Node, _Trail], busy: int) -> bool:
    """Something added to the stream that is no contribution: a mean that a norm subtracts, an embedding of positions,
    the stream itself once again."""
    known = trails.get(other)
    if known is not None and known.start is trail.start and known.root is trail.root:
        return True
    if is_weight(other):
        return True
    if flow.depends(other, trail.start):
        return _is_gate(flow, other, trail, busy) and not _alike(value_of(other), value_of(trail.start))
    return trail.length > 0 and not flow.depends(other, trail.root) and not flow.depends(trail.root, other) \
        and (known is None or not flow.depends(trail.root, known.root)) \
        and _is_clean(flow, other, trail, busy)


def _keeps_features(node: Node, x: Node) -> bool:
    """A product that mixes parallel streams and leaves their features alone: the last dimension is not contracted."""
    if not _alike(value_of(node), value_of(x)):
        return False
    if op_name(node) != "einsum":
        return node.args[1] is x
    equation = node.args[0]
    if not isinstance(equation, str) or "->" not in equation or node.args[-1] is not x:
        return False
    inputs, result = equation.replace(" ", "").split("->")
    term = inputs.split(",")[-1]
    return bool(result) and term[-1] == result[-1] and term[-1] not in inputs.split(",")[0]


def _alike(x, y) -> bool:
    """Floating point, two dimensions at least, same sizes."""
    return is_float(x) and is_float(y) and x.dim() > 1 and same_sizes(x, y)


