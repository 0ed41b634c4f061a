"""Step 3: change what each block reads.

Contract: ``Blocks`` and a connectivity in; the graph of the stream changed in place, ``Rewired`` out. Only reads change:
every contribution still reaches the stream, so the final norm reads all of it. A layer is rewired as a whole or not at
all. After the change no block depends on a contribution that it may not see; a violation raises.

Terms
  read of (i, missing)   state s_i built without the missing contributions:
                           nothing missing before i        -> s_i as it is
                           update i-1 missing as a whole   -> read of (i-1): outdated
                           otherwise                       -> U_{i-1}(read of (i-1), what is kept of its contribution)
  (PAPER: outdated and partial activations, FarSkip-Collective section 3.)

Steps
  1. For each requested layer ask the connectivity what is missing; contributions of layers that are not converted are
     never missing. Plan every read as a recipe. A read that is not defined refuses the layer, with the reason.
  2. A refused layer is an unconverted one: repeat until nothing changes.
  3. Build the reads, redirect the blocks' edges, check.
"""
from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from torch.fx import Graph, Node

from .dataflow import Dataflow, op_name, same_sizes, value_inputs, value_of, written_arguments
from .describe import source_of
from .detect import Block, Blocks, Layer
from .operations import CASTS, VIEWS
from .places import name_of
from .reasons import Reason
from .recipe import Builder, ContractBroken, Copy, Recipe, drops, like
from .residual import Stream, Update
from .sums import sum_of
from .terms import Terms
from .update import Undefined, evaluate


@dataclass(frozen=True, kw_only=True)
class Missing:
    """A contribution that a block may not see: ``part`` is "all" or "routed"."""
    layer: int
    block: str      # "attention" or "mlp"
    part: str


@dataclass(frozen=True, kw_only=True)
class Reads:
    """What one layer's two blocks may not see. ``shared``: of an MoE with a shared expert, what that one may not see; None: as
    ``mlp``, like the router and the routed experts."""
    attention: tuple[Missing, ...] = ()
    mlp: tuple[Missing, ...] = ()
    shared: tuple[Missing, ...] | None = None

    @property
    def sides(self) -> tuple[tuple[Missing, ...] | None, ...]:
        return self.attention, self.mlp, self.shared

    def only(self, kept: Callable[[Missing], bool]) -> Reads:
        attention, mlp, shared = (None if side is None else tuple(filter(kept, side)) for side in self.sides)
        return Reads(attention=attention, mlp=mlp, shared=shared)


@dataclass(frozen=True, kw_only=True)
class LayerReport:
    """What happened to one layer. ``rewired`` is False with ``reason`` None where nothing was asked for."""
    index: int
    kind: str                    # "moe" or "mlp"
    requested: bool
    rewired: bool
    attention_reads: str
    mlp_reads: str
    attention_read_before: str
    mlp_read_before: str
    label: str = ""
    reason: Reason | None = None


@dataclass(frozen=True, kw_only=True)
class Change:
    """One edge of the graph that leads somewhere else now; nodes by their names in the Dynamo graph."""
    layer: int
    block: str                   # "attention", "moe" or "mlp"
    node: str                    # what reads
    op: str
    was: str
    now: str
    source: str                  # of the reading node, in the model's code


@dataclass(frozen=True, kw_only=True)
class Rewired:
    layers: tuple[LayerReport, ...]
    changes: tuple[Change, ...]  # reads that were redirected
    nodes_added: int

    @property
    def edges(self) -> int:
        return len(self.changes)

    @property
    def rewired(self) -> int:
        return sum(layer.rewired for layer in self.layers)

    @property
    def refused(self) -> tuple[LayerReport, ...]:
        return tuple(layer for layer in self.layers if layer.reason is not None)

    @property
    def refusals(self) -> str:
        """What was refused, and why, for an error message."""
        return "; ".join(f"layer {layer.index} ({layer.label}): {layer.reason}" for layer in self.refused)


def rewire(graph: Graph, blocks: Blocks, *, connectivity: Callable[[Layer, Sequence[Layer]], Reads],
           layers: Collection[int]) -> Rewired:
    """Apply ``connectivity`` to ``layers`` (indices of decoder layers)."""
    reads, plan, refused = _decide(blocks, connectivity, layers)
    builder = Builder(graph)
    # Where reads are built, one behind the other: two of one state may have parts in common.
    behind = {redirect.state: redirect.state.next for redirects in plan.values() for redirect in redirects}
    changes = [change for i in sorted(plan) for redirect in plan[i] for change in _redirect(builder, blocks, redirect, i, behind)]
    graph.lint()
    _check(blocks, [r for i in sorted(plan) for r in plan[i]])
    reports = tuple(_report(layer, reads.get(layer.index), plan.get(layer.index, ()), layers, refused.get(layer.index),
                            begins=not i or blocks.layers[i - 1].mlp.stream is not layer.mlp.stream)
                    for i, layer in enumerate(blocks.layers))
    return Rewired(layers=reports, changes=tuple(changes), nodes_added=builder.added)


def readers(blocks: Blocks, *, connectivity: Callable[[Layer, Sequence[Layer]], Reads],
            layers: Collection[int]) -> tuple[Reader, ...]:
    """What ``rewire`` would give another read, and what it would hide from it; for checks."""
    _, plan, _ = _decide(blocks, connectivity, layers)
    return tuple(redirect.reader for redirects in plan.values() for redirect in redirects)


@dataclass(frozen=True, kw_only=True)
class Read:
    """What ``reader`` would read: ``value`` in the place of ``state``."""
    reader: Reader
    state: Node
    value: Node


def build_reads(graph: Graph, blocks: Blocks, *, connectivities: Mapping[str, Callable[[Layer, Sequence[Layer]], Reads]]
                ) -> tuple[dict[tuple[int, str], tuple[Read, ...]], dict[tuple[int, str], Reason]]:
    """Build what the blocks of each layer would read, and redirect nothing: the model computes what it did.

    Each layer is taken by itself, and what it may not see is left out whether the other layers can be rewired or not.

    Args:
        connectivities: by name.

    Returns:
        By layer and name: the reads that change (none: nothing does), and why there are none where they are not defined. The
        values are new nodes behind the state that they replace, or earlier states; ``blocks.flow`` does not know new ones.
    """
    every = {layer.index for layer in blocks.layers}
    plans: dict[tuple[int, str], list[_Redirect]] = {}
    refused: dict[tuple[int, str], Reason] = {}
    for layer in blocks.layers:
        for name, connectivity in connectivities.items():
            try:
                if layer.doubt is not None:
                    raise Undefined(layer.doubt)
                plans[layer.index, name] = _plan(blocks, layer, _reads(blocks, layer.index, connectivity, every))
            except Undefined as stop:
                refused[layer.index, name] = stop.reason
    builder, position = Builder(graph), blocks.flow.position
    # In graph order, each at the place behind its state, so that a part which several have is built for the first of them.
    redirects = sorted((r for plan in plans.values() for r in plan), key=lambda r: position[r.state])
    behind = {r.state: r.state.next for r in redirects}
    values = [builder.realize(r.value, behind[r.state], f"{r.state.name} without what is in flight") for r in redirects]
    graph.lint()
    read = {id(r): Read(reader=r.reader, state=r.state, value=value) for r, value in zip(redirects, values)}
    return {key: tuple(read[id(r)] for r in plan) for key, plan in plans.items()}, refused


def _decide(blocks: Blocks, connectivity, layers: Collection[int]):
    """(what each converted layer may not see, the redirects that this takes, refusals), by layer index."""
    refused = {layer.index: layer.doubt for layer in blocks.layers if layer.index in layers and layer.doubt is not None}
    while True:
        converted = {layer.index for layer in blocks.layers if layer.index in layers} - set(refused)
        reads = {i: _reads(blocks, i, connectivity, converted) for i in converted}
        plan: dict[int, list[_Redirect]] = {}
        try:
            for i in sorted(reads):
                plan[i] = _plan(blocks, blocks.layers[i], reads[i])
            return reads, plan, refused
        except Undefined as stop:
            # Only the first is certain: refusing it may make the next one's read plain.
            refused[i] = stop.reason


def _reads(blocks: Blocks, index: int, connectivity, converted: set[int]) -> Reads:
    layer = blocks.layers[index]
    reads = connectivity(layer, [e for e in blocks.layers[:index] if e.mlp.stream is layer.mlp.stream])
    seen = reads.only(lambda m: m.layer in converted and _block(blocks, m) is not None)
    return seen if layer.mlp.shared and seen.shared != seen.mlp else replace(seen, shared=None)


def _block(blocks: Blocks, missing: Missing) -> Block | None:
    layer = blocks.layers[missing.layer]
    return layer.mlp if missing.block == "mlp" else layer.attention


# --- planning ---------------------------------------------------------------------------------------------------

@dataclass(frozen=True, kw_only=True)
class Reader:
    """What reads another state than in the model: a block, or one half of an MoE.

    ``nodes`` are those of its branch that are its own, as a bit set; ``clones`` are what it shares with others, in graph order.
    """
    block: Block
    hidden: tuple[tuple[Block, str], ...]
    nodes: int
    clones: tuple[Node, ...]
    ends: tuple[Node, ...]       # the last ones
    half: str = ""               # "routed" or "shared"; "": the whole block
    beside: tuple[Node, ...] = ()    # for "routed": the terms of the other half, which it is added to


@dataclass(frozen=True, kw_only=True)
class _Redirect:
    """``reader`` reads ``value`` instead of ``state``."""
    reader: Reader
    state: Node
    value: Recipe


def _plan(blocks: Blocks, layer: Layer, reads: Reads) -> list[_Redirect]:
    sides = [(block, reads.attention, "") for block in layer.leading]
    sides += [(layer.mlp, reads.mlp, "")] if reads.shared is None else \
        [(layer.mlp, reads.mlp, "routed"), (layer.mlp, reads.shared, "shared")]
    found = (_read(blocks, block, missing, half) for block, missing, half in sides if missing)
    return [redirect for redirect in found if redirect is not None]


def _read(blocks: Blocks, block: Block, missing: tuple[Missing, ...], half: str) -> _Redirect | None:
    stream = block.stream
    origin = block.contribution.origin
    hidden = tuple((b, m.part) for m in missing
                   if (b := _block(blocks, m)) is not block and b.update < origin and b.stream is stream)
    value = _without(stream, origin, hidden)
    state = stream.states[origin]
    if not hidden or value is state:
        return None
    if block.contribution.unclear is not None:
        raise Undefined(block.contribution.unclear)
    nodes, terms, common = _half(block, half) if half else (block.contribution.branch, (), 0)
    ends, beside = (terms, ()) if half == "shared" else ((block.node,), terms)
    _sees_no_other(block, hidden, _upstream(blocks, nodes, ends, stop=state) - {state})
    clones = tuple(stream.flow.members((_shared(block) | common) & nodes & ~stream.flow.bit(block.node)))
    reader = Reader(block=block, hidden=hidden, nodes=nodes & ~stream.flow.mask(clones), clones=clones, half=half, ends=ends,
                    beside=beside)
    return _Redirect(reader=reader, state=state, value=value)


def _without(stream: Stream, position: int, hidden: tuple[tuple[Block, str], ...]) -> Recipe:
    """State ``position`` without the hidden contributions."""
    state = stream.states[position]
    if not any(block.update < position for block, _ in hidden):
        return state
    flow, update = stream.flow, stream.updates[position - 1]
    base = _without(stream, position - 1, hidden)
    here = {block.node: (block, part) for block, part in hidden if block.update == position - 1}
    if len(here) == len(update.contributions) and all(part == "all" for _, part in here.values()) \
            and _same_layout(flow, update, base):
        return base
    changed: dict[Node, Recipe] = {update.before: base}
    for contribution in update.contributions:
        block, part = here.get(contribution.node, (None, None))
        changed[contribution.node] = contribution.node if block is None else None if part == "all" else _kept(flow, block)
    return evaluate(flow, update.after, changed)


def _same_layout(flow: Dataflow, update: Update, base: Recipe) -> bool:
    """Whether the state before an update can stand for the one after it. Where it is viewed or cast in between, U without
    the contribution does that and nothing else.

    Raises:
        Undefined: it also scales or mixes, so there is no earlier state of that layout.
    """
    have, want = value_of(like(base)), value_of(update.after)
    if have.dtype == want.dtype and same_sizes(have, want):
        return True
    more = next((n for n in flow.members(_of_update(flow, update)) if op_name(n) not in VIEWS | CASTS
                 and sum_of(n) is None), None)
    if more is not None:
        raise Undefined(Reason("layout", f"{update.before.name}, the residual stream before {update.add.name}, has another "
                               f"shape or dtype than after it, and {more.name} ({op_name(more)}) changes more than that, so "
                               "it cannot be read in its place", node=update.add.name))
    return False


def _kept(flow: Dataflow, block: Block) -> Recipe:
    for reason in (block.partial, block.contribution.unclear):
        if reason is not None:
            raise Undefined(reason)
    return Terms(flow=flow, routed=block.routed, routers=block.routers).kept(block.node)


def _shared(block: Block) -> int:
    """What the block's branch has in common with the stream's own path and with parallel blocks: a norm, say."""
    stream, flow = block.stream, block.stream.flow
    others = 0
    for update in stream.updates[block.contribution.origin:block.update + 2]:
        others |= _of_update(flow, update)
        for contribution in update.contributions:
            if contribution.node is not block.node and contribution.origin == block.contribution.origin:
                others |= contribution.branch
    found = others & block.contribution.branch & ~flow.bit(block.node)
    outside = flow.ancestors(flow.nodes[-1]) & ~stream.covered
    for node in flow.members(found):
        aside = next((u for u in node.users if flow.bit(u) & outside), None)
        if aside is not None:
            raise Undefined(Reason(
                "shared_computation", f"{node.name} ({op_name(node)}) is used by this block and the residual stream, and by "
                f"{aside.name}, which is neither: what that should see is not known", node=node.name))
    _computed_twice(flow, found)
    return found


def _computed_twice(flow: Dataflow, nodes: int) -> None:
    for node in flow.members(nodes):
        if written_arguments(node) or drops(node) or op_name(node) in ("scaled_dot_product_attention", "topk"):
            raise Undefined(Reason(
                "shared_computation", f"{node.name} ({op_name(node)}) is used by this block and by the residual stream or "
                "another block beside it, and cannot be computed twice", node=node.name))


def _half(block: Block, half: str) -> tuple[int, tuple[Node, ...], int]:
    """Of the branch of an MoE: (what one half of it is computed from, and what is made of it; the terms beside the routed
    experts; what the halves have in common). "shared": those terms; "routed": all others, the sum of both with them.

    Raises:
        Undefined: the two cannot be told apart.
    """
    flow, branch = block.stream.flow, block.contribution.branch
    _kept(flow, block)
    beside = Terms(flow=flow, routed=block.routed, routers=block.routers).beside(block.node)
    routed, terms, feeding, shared = block.routed & branch, {term for _, term in beside}, 0, 0
    for node in flow.members(routed):
        for a in value_inputs(node):
            if not flow.bit(a) & routed and (node, a) not in beside:
                feeding |= flow.ancestors(a) | flow.bit(a)
    for term in terms:
        shared |= flow.ancestors(term) | flow.bit(term)
    feeding, shared = feeding & branch, shared & branch
    both = next((term for term in terms if flow.bit(term) & feeding), None)
    if both is not None:
        raise Undefined(Reason("shared_computation", f"{both.name} ({op_name(both)}) is a term beside the routed experts, and they "
                               "read it, too: two states for the two are not defined", node=both.name))
    common = feeding & shared
    _computed_twice(flow, common)
    return (routed | feeding) if half == "routed" else shared, tuple(sorted(terms, key=flow.position.__getitem__)), common


def _of_update(flow: Dataflow, update: Update) -> int:
    """Nodes of U itself: between the state and the next one without passing through a contribution."""
    cut, seen = {c.node for c in update.contributions}, 0
    todo = [update.after]
    while todo:
        node = todo.pop()
        bit = flow.bit(node)
        if seen & bit or node in cut or node is update.before or not flow.depends(node, update.before) \
                and not any(flow.depends(node, c) for c in cut):
            continue
        seen |= bit
        todo += value_inputs(node)
    return seen


def _sees_no_other(block: Block, hidden, upstream: set[Node]) -> None:
    """It takes in hidden contributions by no other way than the state that it reads."""
    other = _seen_of(hidden, upstream)
    if other is not None:
        raise Undefined(Reason(
            "reads_two_states", f"{block.label or block.node.name} reads the residual stream at two places, and one of "
            f"them has what {other.label or other.node.name} adds, which it may not see", node=block.node.name))


def _seen_of(hidden: tuple[tuple[Block, str], ...], seen: set[Node]) -> Block | None:
    """A hidden block whose contribution, or whose sum with the stream, is among ``seen``."""
    return next((other for other, part in hidden if other.stream.updates[other.update].add in seen
                 or part == "all" and other.node in seen), None)


# --- the change -------------------------------------------------------------------------------------------------

def _redirect(builder: Builder, blocks: Blocks, redirect: _Redirect, layer: int, behind: Mapping[Node, Node]) -> list[Change]:
    flow, state, reader = blocks.flow, redirect.state, redirect.reader
    # Everything a read is made of lies before the state that it replaces; and gradients are on there if anywhere.
    value = builder.realize(redirect.value, behind[state], f"{state.name} without what is in flight")
    swaps: dict[Node, Node] = {state: value}
    for node in reader.clones:
        mine = tuple((a, swaps[a]) for a in node.all_input_nodes if a in swaps)
        if mine:
            swaps[node] = builder.realize(Copy(node, mine), node.next, f"{node.name}, read from {value.name}")
    changes = []
    for node in flow.members(reader.nodes):
        for old in [a for a in node.all_input_nodes if a in swaps]:
            node.replace_input_with(old, swaps[old])
            node.meta["farskip"] = f"reads {value.name}, was {state.name}"
            changes.append(Change(layer=layer, block=name_of(reader.block), node=node.name, op=op_name(node), was=old.name,
                                  now=swaps[old].name, source=source_of(node)))
    return changes


def _check(blocks: Blocks, redirects: list[_Redirect]) -> None:
    """No block takes in a contribution that it may not see, by way of the stream.

    What another block made of it (a shared expert that read it, indices that layers share) is that block's own output.
    """
    for redirect in redirects:
        reader = redirect.reader
        nodes = reader.nodes | blocks.flow.mask(reader.clones)
        other = _seen_of(reader.hidden, _upstream(blocks, nodes, reader.ends, stop=None))
        if other is not None:
            raise ContractBroken(
                f"{reader.block.label or reader.block.node.name} still reads {other.node.name}, which it may not "
                "see; please report this model")


def _upstream(blocks: Blocks, nodes: int, ends: Sequence[Node], *, stop: Node | None) -> set[Node]:
    """What the values of ``ends`` are made of, by way of ``nodes`` of their branch; other nodes of branches and ``stop`` are reached,
    but not passed."""
    flow = blocks.flow
    others = blocks.branches & ~nodes
    seen, todo = set(), list(ends)
    while todo:
        current = todo.pop()
        if current in seen:
            continue
        seen.add(current)
        position = flow.position.get(current)       # None: a node that the rewiring added
        if current is not stop and (position is None or not others >> position & 1):
            todo += [a for a in value_inputs(current) if position is None or a not in flow.position or flow.depends(current, a)]
    return seen


# --- words ------------------------------------------------------------------------------------------------------

def _report(layer: Layer, reads: Reads | None, done, layers, reason: Reason | None, *, begins: bool) -> LayerReport:
    k = layer.index
    before = ("the embedding" if begins else f"layer {k - 1} output", f"layer {k} attention output")
    # By node: the hash of a block takes in its whole stream.
    changed = {(redirect.reader.block.node, redirect.reader.half) for redirect in done}
    halves = {half for node, half in changed if node is layer.mlp.node}
    reads = reads or Reads()
    reads = Reads(attention=reads.attention if any((b.node, "") in changed for b in layer.leading) else (),
                  mlp=reads.mlp if halves & {"", "routed"} else (),
                  shared=None if not halves & {"routed", "shared"} else reads.shared if "shared" in halves else ())
    return LayerReport(
        index=k, kind=layer.mlp.kind, requested=k in layers, reason=reason, label=layer.mlp.label,
        rewired=bool(done),
        attention_read_before=before[0], mlp_read_before=before[1],
        attention_reads=_describe(before[0], reads.attention),
        mlp_reads=_describe(before[1], reads.mlp, before[0])
        + ("" if reads.shared is None else f"; its shared expert: {_describe(before[1], reads.shared, before[0])}"))


def _describe(before: str, missing: tuple[Missing, ...], earlier: str = "") -> str:
    if not missing:
        return before
    if earlier and len(missing) == 1 and missing[0].block == "attention":
        return f"{earlier} (before attention)"
    return f"{before} without " + " and ".join(
        f"{'the routed experts' if m.part == 'routed' else 'the ' + ('MLP' if m.block == 'mlp' else 'attention')} "
        f"of layer {m.layer}" for m in missing)
