"""What the update does to a contribution, peeled off: scale, cast, view, gate made from the stream.

Contract: nothing is changed. ``peel`` walks from the operand of an addition down to the block's own output. A gate that
is computed from the stream belongs to the update, one that is computed from the block's own (normed) input to the block.
"""
from __future__ import annotations

from torch.fx import Node

from .dataflow import Dataflow, op_name, value_of
from .operations import CASTS, LINEAR_MAPS
from .reasons import Reason
from .sums import argument, is_float, sum_of
from .trail import Step, is_per_token

_VIEWS = {"view", "reshape", "contiguous", "flatten", "unflatten", "squeeze", "unsqueeze", "_unsafe_view", "clone",
          "alias", "transpose", "permute", "movedim", "swapaxes", "expand", "expand_as", "dropout", "identity", "neg",
          "negative"} | CASTS
_CONVOLUTIONS = {"conv1d", "causal_conv1d", "convolution"}


def peel(flow: Dataflow, step: Step, state: Node, busy: int, *, convolutions: bool) -> Node:
    """The block's output below ``step.contribution``. ``convolutions``: every update of the stream convolves what it adds,
    so that is the update's doing and not a mixer's."""
    skip = flow.ancestors(step.skip) | flow.bit(step.skip)
    between = ~flow.ancestors(state) & ~flow.bit(state)
    node = step.contribution
    while True:
        below = _below(flow, node, state, skip, between, busy, convolutions)
        if below is None or not flow.depends(below, state) and flow.depends(node, state):
            return node
        node = below


def _below(flow, node: Node, state: Node, skip: int, between: int, busy: int, convolutions: bool) -> Node | None:
    name = op_name(node)
    first = argument(node, 0, "input", "self")
    if name in _VIEWS or (name == "getitem" and convolutions and isinstance(first, Node) and is_float(value_of(first))):
        return first if isinstance(first, Node) and is_float(value_of(first)) else None
    if convolutions and name in _CONVOLUTIONS and argument(node, 2, "bias") is None:
        return first
    if name in ("mul", "div", "truediv"):
        pairs = [tuple(node.args[:2])] + ([tuple(node.args[1::-1])] if name == "mul" else [])
        found = [(x, gate) for x, gate in pairs if isinstance(x, Node) and is_float(value_of(x)) and flow.depends(x, state)
                 and _gates(flow, gate, x, state, skip, between, busy)]
        if len(found) > 1:      # one value a token is the gate
            found = [(x, gate) for x, gate in found if is_per_token(gate)]
        return found[0][0] if len(found) == 1 else None
    total = sum_of(node)
    if total is not None and total.two_terms and convolutions and (below := _meet(total.first, total.rest[0])) is not None:
        return below
    if total is not None and total.two_terms:       # t * (b - s): the stream itself beside the contribution
        for x, other in ((total.first, total.rest[0]), (total.rest[0], total.first)):
            if other is state or flow.bit(other) & skip & between and flow.depends(other, state):
                return x
    return None


def _gates(flow, gate, x: Node, state: Node, skip: int, between: int, busy: int) -> bool:
    """Whether ``gate`` is a factor that the update puts on the contribution ``x``."""
    if not isinstance(gate, Node):
        return True
    cone = (flow.ancestors(gate) | flow.bit(gate)) & between
    if not flow.depends(gate, state) and gate is not state:
        return not cone & busy and (flow.depends(x, state) or not is_float(value_of(gate)))
    if cone & busy or gate is state:
        return False
    content = (flow.ancestors(x) | flow.bit(x)) & between
    if not is_per_token(gate) and not content & busy and _reads_plainly(flow, x, state, content):
        return False                                # two token-wise factors: a gated MLP, or a gate on one?
    shared = flow.descendants(flow.bit(state), cone & content)
    if not shared & ~skip:
        return True
    # Shared with the block, and yet a gate of the stream: the block reads a weighted sum of streams with it.
    return is_per_token(gate) and any(op_name(u) == "mul" and flow.bit(u) & content & ~shared and any(
        is_per_token(a) and flow.depends(a, state) for a in u.all_input_nodes) for u in state.users)


def _reads_plainly(flow: Dataflow, x: Node, state: Node, content: int) -> bool:
    """``x`` takes the state straight into a linear map: no norm begins a block there."""
    return any(op_name(u) in LINEAR_MAPS for u in state.users if flow.bit(u) & content)


def unclear(flow: Dataflow, core: Node, state: Node, step: Step) -> Reason | None:
    """Why the factors of a product cannot be told apart as block and gate."""
    if op_name(core) not in ("mul", "div", "truediv"):
        return None
    skip = (flow.ancestors(step.skip) | flow.bit(step.skip)) & ~flow.ancestors(state)
    factors = [a for a in core.all_input_nodes if is_float(value_of(a))]
    stream = next((f for f in factors if flow.bit(f) & skip), None)
    if stream is not None and len(factors) == 2:
        return Reason("multiplied", f"{core.name} multiplies the residual stream with what is added to it: whether that "
                      "factor belongs to the block or to the stream is not known", node=core.name)
    if len(factors) == 2 and all(flow.depends(f, state) for f in factors):
        cones = [flow.descendants(flow.bit(state), (flow.ancestors(f) | flow.bit(f)) & ~flow.ancestors(state)) for f in factors]
        if not cones[0] & cones[1] and all(_reads_plainly(flow, f, state, cone) for f, cone in zip(factors, cones)):
            return Reason("gate", f"{core.name} multiplies two values that are both computed from the residual stream as it "
                          "is, without a norm: which one is the block and which one a gate of the stream is not known",
                          node=core.name)
    return None


def trailing_convolution(node: Node) -> bool:
    """Whether a convolution is the last that happens to a contribution, possibly with a residual of its own."""
    while True:
        total = sum_of(node)
        if op_name(node) in _CONVOLUTIONS or total is not None and total.two_terms and _meet(total.first, total.rest[0]):
            return True
        if op_name(node) not in _VIEWS | {"getitem", "mul"} or not node.args or not isinstance(node.args[0], Node):
            return False
        node = node.args[0]


def _meet(left: Node, right: Node) -> Node | None:
    """The value x of ``x + convolution(x)``, views and casts in between."""
    chains, convolved = [], False
    for node in (left, right):
        chain = [node]
        while op_name(node) in _VIEWS | _CONVOLUTIONS | {"getitem"} and node.args and isinstance(node.args[0], Node):
            if op_name(node) in _CONVOLUTIONS and argument(node, 2, "bias") is not None:
                break
            convolved = convolved or op_name(node) in _CONVOLUTIONS
            node = node.args[0]
            chain.append(node)
        chains.append(chain)
    return next((n for n in chains[0] if n in chains[1]), None) if convolved else None


def parallel_parts(flow: Dataflow, core: Node, state: Node, mixing: int, routing: int) -> list[Node]:
    """``core`` as [attention, MLP] where it is their plain sum; otherwise [core]."""
    total = sum_of(core)
    if total is None or not total.two_terms:
        return [core]
    parts = [total.first, total.rest[0]]
    above = ~flow.ancestors(state) & ~flow.bit(state)
    cones = [(flow.ancestors(p) | flow.bit(p)) & above for p in parts]
    mixers = [p for p, cone in zip(parts, cones) if cone & mixing and not cone & routing]
    if len(mixers) == 1 and all(flow.depends(p, state) for p in parts):
        other = parts[1] if mixers[0] is parts[0] else parts[0]
        if not cones[parts.index(other)] & mixing or cones[parts.index(other)] & routing:
            return [mixers[0], other]
    return [core]
