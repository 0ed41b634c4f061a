"""Step 3: change what each block reads.

Contract: ``Blocks`` and a connectivity in; the graph of the stream changed in place, ``Rewired`` out. Only reads change:
every contribution still reaches the stream, so the final norm reads all of it. A layer is rewired as a whole or not at
all. After the change no branch depends on a contribution that it may not see; a violation raises.

Terms
  read of (i, missing)   the stream before update i, built without the missing contributions:
                           nothing missing before i        -> state s_i as it is
                           update i-1 missing as a whole   -> read of (i-1)
                           update i-1 missing in part      -> read of (i-1) + what is kept of the contribution
                           otherwise                       -> read of (i-1) + contribution
  (PAPER: outdated and partial activations, FarSkip-Collective section 3.)

Steps
  1. For each requested layer ask the connectivity what is missing; contributions of layers that are not converted are
     never missing. A read that cannot be built refuses the layer, with the reason.
  2. A refused layer is an unconverted one: repeat until nothing changes.
  3. Build the reads, redirect the branches' edges, check.
"""
from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from torch.fx import Graph, Node

from .dataflow import Dataflow
from .detect import Block, Blocks, Layer
from .reasons import Reason
from .terms import Terms


@dataclass(frozen=True, kw_only=True)
class Missing:
    """A contribution that a block may not see: ``part`` is "all" or "routed"."""
    layer: int
    block: str      # "attention" or "mlp"
    part: str


@dataclass(frozen=True, kw_only=True)
class Reads:
    """What one layer's two blocks may not see."""
    attention: tuple[Missing, ...] = ()
    mlp: tuple[Missing, ...] = ()


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
class Rewired:
    layers: tuple[LayerReport, ...]
    edges: int                   # reads that were redirected
    nodes_added: int

    @property
    def rewired(self) -> int:
        return sum(layer.rewired for layer in self.layers)

    @property
    def refused(self) -> tuple[LayerReport, ...]:
        return tuple(layer for layer in self.layers if layer.reason is not None)


class ContractBroken(RuntimeError):
    """A pass left a graph that is not what it promised: a bug of farskip_fx, never of the model."""


def rewire(graph: Graph, blocks: Blocks, *, connectivity: Callable[[Layer, Sequence[Layer]], Reads],
           layers: Collection[int]) -> Rewired:
    """Apply ``connectivity`` to ``layers`` (indices of decoder layers)."""
    refused: dict[int, Reason] = {}
    while True:
        converted = {layer.index for layer in blocks.layers if layer.index in layers} - set(refused)
        plan = {i: _plan(blocks, i, connectivity, converted) for i in converted}
        bad = {i: reason for i, reads in plan.items() if (reason := _cannot(blocks, reads)) is not None}
        if not bad:
            break
        # Only the first is certain: refusing it may make the next one's read plain.
        first = min(bad)
        refused[first] = bad[first]
    builder = _Builder(graph, blocks)
    edges = 0
    for index, reads in sorted(plan.items()):
        layer = blocks.layers[index]
        edges += builder.redirect(2 * index, layer.attention, reads.attention)
        edges += builder.redirect(2 * index + 1, layer.mlp, reads.mlp)
    graph.lint()
    _check(blocks, plan)
    reports = tuple(_report(layer, plan.get(layer.index), layers, refused.get(layer.index)) for layer in blocks.layers)
    return Rewired(layers=reports, edges=edges, nodes_added=builder.added)


def _plan(blocks: Blocks, index: int, connectivity, converted: set[int]) -> Reads:
    reads = connectivity(blocks.layers[index], blocks.layers[:index])
    seen = [tuple(m for m in side if m.layer in converted) for side in (reads.attention, reads.mlp)]
    return Reads(attention=seen[0], mlp=seen[1])


def _cannot(blocks: Blocks, reads: Reads) -> Reason | None:
    for missing in (*reads.attention, *reads.mlp):
        block = _block(blocks, missing)
        if missing.part == "routed" and block.partial is not None:
            return block.partial
    return None


def _block(blocks: Blocks, missing: Missing) -> Block:
    layer = blocks.layers[missing.layer]
    return layer.mlp if missing.block == "mlp" else layer.attention


class _Builder:
    """Builds stream values without some contributions; equal values are built once."""

    def __init__(self, graph: Graph, blocks: Blocks) -> None:
        self.graph, self.blocks, self.flow = graph, blocks, blocks.stream.flow
        self.updates = blocks.stream.updates
        self.built: dict[tuple, Node] = {}
        self.added = 0

    def redirect(self, position: int, block: Block, missing: tuple[Missing, ...]) -> int:
        if not missing:
            return 0
        # Everything a read is made of lies before the state that it replaces; and gradients are on there if anywhere.
        anchor = block.update.before.next
        parts = {2 * m.layer + (m.block == "mlp"): m.part for m in missing}
        value = self.read(position, parts, anchor)
        state = block.update.before
        if value is state:
            return 0
        for user in block.update.reads:
            user.replace_input_with(state, value)
            user.meta["farskip"] = f"reads {value.name}, was {state.name}"
        return len(block.update.reads)

    def read(self, position: int, parts: dict[int, str], anchor: Node) -> Node:
        state = self.blocks.stream.states[position]
        parts = {i: part for i, part in parts.items() if i < position}
        if not parts:
            return state
        key = (position, tuple(sorted(parts.items())))
        if key in self.built:
            return self.built[key]
        update, block = self.updates[position - 1], self._block_of(position - 1)
        base = self.read(position - 1, parts, anchor)
        part = parts.get(position - 1)
        if part == "all":
            value = base
        elif part == "routed":
            terms = Terms(flow=self.flow, routed=block.routed, routers=block.routers)
            kept = self._realize(terms.kept(update.contribution), anchor)
            value = base if kept is None else self._update(update, base, kept, anchor)
        else:
            value = self._update(update, base, update.contribution, anchor)
        self.built[key] = value
        return value

    def _block_of(self, i: int) -> Block:
        layer = self.blocks.layers[i // 2]
        return layer.mlp if i % 2 else layer.attention

    def _update(self, update, state: Node, contribution: Node, anchor: Node) -> Node:
        swap = update.add.args[0] is not update.before and update.add.args[1] is update.before
        args = (contribution, state) if swap else (state, contribution)
        return self._call(operator.add, args, like=update.add, anchor=anchor)

    def _realize(self, recipe, anchor: Node) -> Node | None:
        if recipe is None or isinstance(recipe, Node):
            return recipe
        if recipe[0] == "add":
            _, left, right, like = recipe
            args = (self._realize(left, anchor), self._realize(right, anchor))
            return self._call(operator.add, args, like=like, anchor=anchor)
        _, node, carrier, kept = recipe
        source = self._realize(kept, anchor)
        with self.graph.inserting_before(anchor):
            copy = self.graph.node_copy(node, lambda n: source if n is carrier else n)
        copy.meta = dict(node.meta)
        self.added += 1
        return copy

    def _call(self, target, args, *, like: Node, anchor: Node) -> Node:
        with self.graph.inserting_before(anchor):
            node = self.graph.call_function(target, args)
        node.meta = {k: v for k, v in like.meta.items() if k in ("example_value", "val", "nn_module_stack",
                                                                 "stack_trace", "source_fn_stack")}
        node.meta["farskip"] = f"{like.name} without what is in flight"
        self.added += 1
        return node


def _check(blocks: Blocks, plan: dict[int, Reads]) -> None:
    """No branch takes in a contribution that it may not see, by way of the stream.

    What another branch made of it (a shared expert that read it, indices that layers share) is that branch's own output.
    """
    flow = blocks.stream.flow
    branches = 0
    for update in blocks.stream.updates:
        branches |= update.branch
    for index, reads in plan.items():
        layer = blocks.layers[index]
        for block, missing in ((layer.attention, reads.attention), (layer.mlp, reads.mlp)):
            if not missing:
                continue
            others = branches & ~block.update.branch
            seen = _upstream(block.update.contribution, flow, stop=others)
            for m in missing:
                hidden = _block(blocks, m).update
                if hidden.add in seen or m.part == "all" and hidden.contribution in seen:
                    raise ContractBroken(
                        f"layer {index}: {block.label or block.update.contribution.name} still reads "
                        f"{hidden.contribution.name}, which it may not see; please report this model")


def _upstream(node: Node, flow: Dataflow, *, stop: int) -> set[Node]:
    """What ``node`` is computed from; nodes of ``stop`` are reached, but not passed."""
    seen, todo = set(), [node]
    while todo:
        current = todo.pop()
        if current in seen:
            continue
        seen.add(current)
        position = flow.position.get(current)       # None: a node that the rewiring added
        if position is None or not stop >> position & 1:
            todo += current.all_input_nodes
    return seen


# --- words ------------------------------------------------------------------------------------------------------

def _report(layer: Layer, reads: Reads | None, layers, reason: Reason | None) -> LayerReport:
    k = layer.index
    before = ("the embedding" if k == 0 else f"layer {k - 1} output", f"layer {k} attention output")
    reads = reads or Reads()
    return LayerReport(
        index=k, kind=layer.mlp.kind, requested=k in layers, reason=reason, label=layer.mlp.label,
        rewired=bool(reads.attention or reads.mlp),
        attention_read_before=before[0], mlp_read_before=before[1],
        attention_reads=_describe(before[0], reads.attention), mlp_reads=_describe(before[1], reads.mlp, before[0]))


def _describe(before: str, missing: tuple[Missing, ...], earlier: str = "") -> str:
    if not missing:
        return before
    if earlier and len(missing) == 1 and missing[0].block == "attention":
        return f"{earlier} (before attention)"
    return f"{before} without " + " and ".join(
        f"{'the routed experts' if m.part == 'routed' else 'the ' + ('MLP' if m.block == 'mlp' else 'attention')} "
        f"of layer {m.layer}" for m in missing)
