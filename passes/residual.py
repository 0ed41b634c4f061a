"""Step 1: find the residual stream.

Contract: a normalized Dynamo graph in; a ``Stream`` out, or ``NoStream`` with a typed reason. Nothing is changed, and
only dataflow decides: module paths are not looked at.

Terms
  state         s0, s1, ...: a value of the residual stream
  update        s_{i+1} = U(s_i, b): an addition, with whatever scales, casts, views, mixes or norms the stream around it
  light         an operation that leaves the stream a stream: a view, a cast, a scale, a norm, a mix of parallel streams
  trail         the light operations and updates that a value of the stream came through
  contribution  what one block adds; its *branch* is what it computes from the state that it reads (its *origin*)
  head          what follows the last state: final norm, language-model head

Steps
  1. Every addition of a value and something computed from it is a possible update; light operations carry a trail on.
     The longest trail is the stream.
  2. A state is the last value between two updates that everything later passes through.
  3. What U does to a contribution (scale, cast, gate made from the stream) is peeled off, so that the block is left.
  4. The stream must be whole: it starts at an embedding (or at an argument of the model), ends in a head and not at the
     edge of the graph, no state is overwritten, and nothing that mixes tokens or routes happens outside its branches.
"""
from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, reduce
from operator import or_

from torch.fx import Graph, Node

from .dataflow import Dataflow, op_name, value_of
from .operations import ATTENTION, CASTS, HARMLESS_OUTSIDE, LINEAR_MAPS, SCALES, TOKEN_WISE, VIEWS
from .peel import parallel_parts, peel, trailing_convolution, unclear
from .reasons import Reason
from .routing import is_weight
from .sums import is_float, sum_of
from .trail import Step, longest_trail

Busy = Callable[[Dataflow, Node], str]


@dataclass(frozen=True, kw_only=True)
class Contribution:
    """What one block adds."""
    node: Node
    origin: int              # index of the state that the block reads
    branch: int              # bit set: what it computes from that state, ``node`` included (see Dataflow)
    unclear: Reason | None = None   # why it is not known where the block ends and the update begins
    nested: bool = False     # whether there are further updates of the state inside


@dataclass(frozen=True, kw_only=True)
class Update:
    """One step of the stream: ``after`` = U(``before``, contributions)."""
    before: Node             # state s_i
    add: Node
    after: Node              # state s_{i+1}
    contributions: tuple[Contribution, ...]     # one, or several that are added up first (parallel blocks)
    nodes: int               # bit set: what of U depends on ``before``; branches included


@dataclass(frozen=True, kw_only=True)
class Stream:
    updates: tuple[Update, ...]
    flow: Dataflow = field(repr=False)

    @property
    def states(self) -> tuple[Node, ...]:
        return (self.updates[0].before, *(u.after for u in self.updates))

    @cached_property
    def covered(self) -> int:
        """Bit set: the states, what lies between them, and the branches."""
        return reduce(or_, (u.nodes for u in self.updates)) | self.flow.mask(self.states)


@dataclass(frozen=True, kw_only=True)
class NoStream:
    reason: Reason
    length: int              # updates in the longest trail, 0 where there is none: a graph of the loss, say


def find_streams(graph: Graph, *, busy: Busy) -> tuple[Stream, ...] | NoStream:
    """Find the residual streams, in graph order: nearly always one; an encoder or a vision tower has one of its own.

    Args:
        busy: says which nodes belong into a branch: "mixes" tokens, "routes" them, or "".
    """
    flow = Dataflow(graph)
    output = flow.nodes[-1]
    kinds = {node: kind for node in flow.nodes if (kind := busy(flow, node))}
    streams, covered, states, longest = [], 0, 0, 0
    while True:
        steps = longest_trail(flow, flow.mask(kinds), taken=covered)
        longest = max(longest, len(steps))
        if len(steps) < 2:
            break
        stream = Stream(updates=tuple(_updates(flow, steps, _states(flow, steps, output), kinds)), flow=flow)
        reason = _unfit(stream, output)
        if reason is not None and not streams:
            return NoStream(reason=reason, length=longest)
        if reason is not None:
            break
        streams.append(stream)
        states |= flow.mask(stream.states)
        covered |= stream.covered
        if _stray(flow, covered, states, kinds, output) is None:
            break
    if not streams:
        return NoStream(reason=Reason("no_stream", "no chain of residual additions x + f(x) runs through this graph"),
                        length=longest)
    stray = _stray(flow, covered, states, kinds, output) or _unknown(flow, streams, covered, output)
    if stray is not None:
        return NoStream(length=longest, reason=Reason(
            "gap", f"{stray.name} mixes or routes tokens outside the branches of the residual stream; the "
            f"{sum(len(s.updates) for s in streams)} residual additions that were found are not the whole model",
            node=stray.name))
    streams.sort(key=lambda s: flow.position[s.states[0]])
    broken = _in_series(flow, streams, flow.mask(n for n, kind in kinds.items() if kind == "routes"))
    if broken is not None:
        return NoStream(reason=broken, length=longest)
    return tuple(streams)


def _unfit(stream: Stream, output: Node) -> Reason | None:
    early = next((c for u in stream.updates for c in u.contributions if not c.branch and _computes(stream, c.node)), None)
    if early is not None:
        return Reason("gap", f"{early.node.name} is added to the residual stream and computed from a value before its first "
                      f"state, {stream.states[0].name}", node=early.node.name)
    for reason in (_overwritten(stream.flow, stream.updates), _ends_in_head(stream.states[-1], output),
                   _goes_around(stream, output),
                   _begins_at_embedding(stream.flow, stream.states[0])):
        if reason is not None:
            return reason
    return None


def _computes(stream: Stream, node: Node) -> bool:
    """Whether ``node`` is more than a scaled value from before the first state."""
    flow = stream.flow
    own = (flow.ancestors(node) | flow.bit(node)) & ~flow.ancestors(stream.states[0]) & ~flow.bit(stream.states[0])
    return any(op_name(n) in LINEAR_MAPS | ATTENTION for n in flow.members(own))


def _in_series(flow: Dataflow, streams: list[Stream], routing: int) -> Reason | None:
    """A stream that only continues another one is the rest of a chain with a gap; so is one behind experts."""
    for i, later in enumerate(streams):
        first = later.states[0]
        for earlier in streams[:i]:
            last = earlier.states[-1]
            own = (flow.ancestors(first) | flow.bit(first)) & ~flow.ancestors(last)
            alone = own & flow.marked("begins", _begins) and not earlier.covered & routing
            if flow.depends(first, earlier.states[1]) and not alone:
                return Reason("gap", f"the residual stream is broken between {last.name} and {first.name}: what lies "
                              "between is no addition", node=first.name)
    return None


def _states(flow: Dataflow, steps: list[Step], output: Node) -> list[Node]:
    """s_0 .. s_n. Between two updates: the last node of the trail that everything later passes through."""
    live = flow.ancestors(output)
    states = []
    for index, step in enumerate(steps):
        # What else is made of the embedding (a memory, inputs of later layers) does not read the stream.
        counts = live if index else flow.ancestors(step.add) | flow.bit(step.add)
        state = step.path[0]
        for candidate in step.path[1:]:
            inner = flow.descendants(flow.bit(step.path[0]), flow.ancestors(candidate) & ~flow.ancestors(step.path[0]))
            members = {step.path[0], *flow.members(inner)}
            if all(user is candidate or user in members or user is output or not flow.bit(user) & counts
                   or _skips_far(user, candidate, flow) for node in members for user in node.users):
                state = candidate
        states.append(state)
    return [*states, steps[-1].add]


def _skips_far(user: Node, state: Node, flow: Dataflow) -> bool:
    """A scaled value of the stream that only comes back as a term of later additions."""
    return op_name(user) == "mul" and not flow.depends(user, state) and bool(user.users) \
        and all(sum_of(u) is not None for u in user.users)


def _updates(flow: Dataflow, steps: list[Step], states: list[Node], kinds: dict[Node, str]) -> list[Update]:
    mixing = flow.mask(n for n, kind in kinds.items() if kind == "mixes")
    all_convolved = all(trailing_convolution(s.contribution) for s in steps)
    cores = [peel(flow, step, states[i], flow.mask(kinds), convolutions=all_convolved) for i, step in enumerate(steps)]
    routing = flow.mask(kinds) & ~mixing
    updates = []
    for i, (step, core) in enumerate(zip(steps, cores)):
        # A sum of attention and MLP, added at once, is two parallel blocks: where layers are one update each.
        before = i == 0 or len(updates[-1].contributions) > 1 or bool(updates[-1].contributions[0].branch & routing) \
            or not updates[-1].contributions[0].branch & mixing
        alone = before and (i + 1 == len(steps) or bool(_branch(flow, cores[i + 1], states, i + 1)[1] & mixing))
        parts = parallel_parts(flow, core, states[i], mixing, routing) if alone else [core]
        contributions = []
        for part in parts:
            origin, branch = _branch(flow, part, states, i)
            contributions.append(Contribution(node=part, origin=origin, branch=branch,
                                              unclear=unclear(flow, part, states[i], step),
                                              nested=_nested(flow, step, states[origin], branch)))
        before, after = states[i], states[i + 1]
        changed = flow.bit(before) | flow.mask(parts)
        nodes = flow.descendants(changed, (flow.ancestors(after) | flow.bit(after)) & ~flow.ancestors(before))
        for c in contributions:
            nodes |= c.branch
        updates.append(Update(before=before, add=step.add, after=after, contributions=tuple(contributions), nodes=nodes))
    return updates


def _nested(flow: Dataflow, step: Step, state: Node, branch: int) -> bool:
    """Whether a branch holds what looks like blocks: the state as it is joined with what linear maps made of it, or two
    additions of that kind one after the other."""
    linear = flow.mask(n for n in flow.members(branch) if op_name(n) in LINEAR_MAPS)
    between = lambda node, of: (flow.ancestors(node) | flow.bit(node)) & ~flow.ancestors(of) & ~flow.bit(of)  # noqa: E731
    chained = {i.add for i in step.inner if flow.bit(i.add) & branch and between(i.contribution, i.skip) & linear}
    if any(i.start in chained for i in step.inner if i.add in chained):
        return True
    joins = (n for n in flow.members(branch) if op_name(n) not in _JOINS_NOTHING)
    return any(_is_raw(flow, raw, state) and any(between(o, state) & linear for o in node.all_input_nodes)
               for node in joins if len(node.all_input_nodes) > 1 for raw in node.all_input_nodes)


_JOINS_NOTHING = SCALES | LINEAR_MAPS | ATTENTION
_LEAVES_RAW = VIEWS | CASTS | SCALES


def _is_raw(flow: Dataflow, node: Node, state: Node) -> bool:
    """``state`` itself but for views, casts and constant factors: no norm."""
    while node is not state:
        operands = [a for a in node.all_input_nodes if a is state or flow.depends(a, state)]
        if op_name(node) not in _LEAVES_RAW or len(operands) != 1:
            return False
        node = operands[0]
    return True


def _branch(flow: Dataflow, core: Node, states: list[Node], index: int) -> tuple[int, int]:
    """(the latest state at or before ``index`` that ``core`` depends on, what lies between the two)."""
    origin = next((i for i in range(index, -1, -1) if flow.depends(core, states[i])), 0)
    above = (flow.ancestors(core) | flow.bit(core)) & ~flow.ancestors(states[origin]) & ~flow.bit(states[origin])
    return origin, flow.descendants(flow.bit(states[origin]), above)


def _overwritten(flow: Dataflow, updates: Sequence[Update]) -> Reason | None:
    for update in updates:
        for node in (update.before, *(c.node for c in update.contributions), update.add, update.after):
            late = flow.late_writes(node)
            if late:
                return Reason("overwritten", f"{late[0].name} writes into the memory of {node.name}, a value of the "
                              "residual stream, and other values share that memory", node=node.name)
    return None


def _ends_in_head(last: Node, output: Node) -> Reason | None:
    if any(u is not output for u in last.users):
        return None
    return Reason("fragment", f"the residual stream leaves this graph at {last.name} before any final norm: "
                  "this graph holds only a part of the model", node=last.name)


def _goes_around(stream: Stream, output: Node) -> Reason | None:
    """An earlier state that meets the last one again after it: the updates that were found are not the whole stream."""
    flow, last = stream.flow, stream.states[-1]
    seeds = flow.mask(stream.states[:-1])
    after = [n for n in flow.members(flow.ancestors(output) & ~stream.covered) if flow.depends(n, last)]
    for node in after:
        value = value_of(node)
        if not is_float(value) or value.dim() < 2:
            continue
        if op_name(node) in ("stack", "cat", "where") or sum_of(node) is not None:
            beside = [a for a in node.all_input_nodes if a is not last and flow.depends(a, last) and any(
                op_name(n) in LINEAR_MAPS for n in flow.members(flow.ancestors(a) & ~flow.ancestors(last)))]
            if beside and any(a is last or _is_view_of(a, last) for a in node.all_input_nodes):
                return Reason("gap", f"{node.name} joins {last.name}, the last value of the residual stream that was found, "
                              f"with {beside[0].name}, which is computed from it: an addition in a form that is not "
                              "understood", node=node.name)
        for operand in node.all_input_nodes:
            around = operand is not last and not flow.depends(operand, last) and is_float(value_of(operand))
            if around and (flow.ancestors(operand) | flow.bit(operand)) & seeds and value_of(operand).dim() > 1:
                return Reason("gap", f"{node.name} takes in {operand.name}, an earlier value of the residual stream, after "
                              f"the last addition that was found ({last.name})", node=node.name)
    return None


def _is_view_of(node: Node, of: Node) -> bool:
    while op_name(node) in VIEWS | CASTS and node.all_input_nodes:
        node = node.all_input_nodes[0]
        if node is of:
            return True
    return False


def _begins_at_embedding(flow: Dataflow, first: Node) -> Reason | None:
    if (flow.ancestors(first) | flow.bit(first)) & flow.marked("begins", _begins):
        return None
    return Reason("fragment", f"{first.name}, where the residual stream begins, comes neither from an embedding nor "
                  "from an argument of the model", node=first.name)


def _begins(node: Node) -> bool:
    """An embedding, or hidden states that are an argument."""
    return op_name(node) == "embedding" or node.op == "placeholder" and is_float(value_of(node)) and not is_weight(node)


def _unknown(flow: Dataflow, streams: list[Stream], covered: int, output: Node) -> Node | None:
    """An operation before or after the streams that may mix tokens in a way that is not known here (a recurrence, say)."""
    first = last = 0
    for stream in streams:
        first |= flow.ancestors(stream.states[0])
        last |= flow.bit(stream.states[-1])
    begins = flow.marked("begins", _begins)
    live = flow.ancestors(output) & ~covered
    for node in flow.members(live):
        value = value_of(node)
        if not is_float(value) or value.dim() < 3 or op_name(node) in TOKEN_WISE | HARMLESS_OUTSIDE or is_weight(node):
            continue
        if node.op not in ("call_function", "call_method") or not any(is_float(value_of(a)) for a in node.all_input_nodes):
            continue
        before = flow.bit(node) & first and flow.ancestors(node) & begins
        if before or flow.ancestors(node) & last:
            return node
    return None


def _stray(flow: Dataflow, covered: int, states: int, kinds: dict[Node, str], output: Node) -> Node | None:
    outside = flow.ancestors(output) & ~covered
    return next((n for n in kinds if flow.bit(n) & outside and not _beside(flow, n, covered, states)), None)


def _beside(flow: Dataflow, node: Node, covered: int, states: int) -> bool:
    """Whether ``node`` only makes something more of what a branch has computed (the state of a recurrence, for a cache)."""
    own = (flow.ancestors(node) | flow.bit(node)) & ~covered
    return bool(flow.ancestors(node) & states) and not any(
        flow.bit(a) & states for n in flow.members(own) for a in n.all_input_nodes)
