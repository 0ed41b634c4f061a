"""Step 2: say what each block of the stream is, split MoE contributions, and group blocks into layers.

Contract: a ``Stream`` in, ``Blocks`` out (or ``NoBlocks`` with a typed reason). Nothing is changed; dataflow decides.

Terms
  mixer         attention, linear attention, state space, convolution: mixes tokens
  routed part   what depends on a selection (see ``routing``) or on an exchange between ranks; it is in flight while its
                combine runs
  shared part   additive terms of an MoE contribution that do not depend on the selection (a shared expert)
  layer         one or more mixers, then the MLP or MoE that they lead to; a token-wise block that follows an MLP (an input
                per layer, say) leads the next layer
  block in front   of the MLP: the one whose contribution its outdated read lacks; normally the attention

Steps
  1. Classify each contribution: ``moe`` (has a selection), ``mixer`` (mixes tokens), ``mlp`` (only token-wise maps).
  2. Split each MoE contribution into routed and shared parts (see ``terms``).
  3. Group: an MoE, or the first MLP after a mixer where there is no MoE, ends a layer.
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property, reduce
from operator import or_

from torch.fx import Node

from .dataflow import Dataflow, clean_path, op_name
from .operations import ATTENTION, CASTS, EXCHANGES, LINEAR_MAPS, PRODUCTS, SCALES, SELECTORS, VIEWS
from .reasons import Reason
from .residual import Contribution, Stream
from .routing import chooses, experts_of, is_hidden_states, looks_like_experts, scores_of, unexplained_choice
from .sums import sum_of
from .terms import Terms
from .tokens import factors, mixes
from .update import Undefined


@dataclass(frozen=True, kw_only=True)
class Block:
    """One block of the stream: what adds one contribution."""
    kind: str                 # "mixer", "mlp", "moe", or "unknown": experts without a router that is understood
    stream: Stream = field(repr=False)
    contribution: Contribution
    update: int               # index of the update that adds it
    routed: int = 0           # bit set of nodes that depend on the selection; 0 where kind is not "moe"
    routers: int = 0          # bit set of the linear maps whose outputs are ranked
    shared: bool = False      # whether the contribution has a part that is not routed
    partial: Reason | None = None   # why the routed part cannot be left out, where it cannot
    label: str = ""           # module path, for messages only
    evidence: str = ""
    certain: bool = True      # False for a mixer that may be an MLP: an operation in it is not known
    exchange: str = ""        # name of an exchange between ranks in this branch

    @property
    def node(self) -> Node:
        return self.contribution.node


@dataclass(frozen=True, kw_only=True)
class Layer:
    """A decoder layer: its blocks in the order of the stream, the MLP or MoE last."""
    index: int
    blocks: tuple[Block, ...]

    @property
    def mlp(self) -> Block:
        return self.blocks[-1]

    @property
    def attention(self) -> Block | None:
        """The block in front of the MLP; None where an MoE begins the model."""
        return self.blocks[-2] if len(self.blocks) > 1 else None

    @property
    def doubt(self) -> Reason | None:
        """Why this layer must stay as it is, where one of its blocks is not understood."""
        return next((_doubt(b) for b in self.blocks if b.kind == "unknown"), None)

    @property
    def leading(self) -> tuple[Block, ...]:
        """The blocks that read the stream while what the layer before adds may be in flight: up to the first mixer."""
        first = next((i for i, b in enumerate(self.blocks[:-1]) if b.kind == "mixer"), -1)
        return self.blocks[:first + 1]


@dataclass(frozen=True, kw_only=True)
class Blocks:
    layers: tuple[Layer, ...]
    streams: tuple[Stream, ...]
    tail: tuple[Block, ...] = ()     # after the last layer; they read as the model has it
    idle: tuple[Stream, ...] = ()    # streams without layers: no experts in them, but in others

    @property
    def flow(self) -> Dataflow:
        return self.streams[0].flow

    @cached_property
    def branches(self) -> int:
        """Bit set: all branches of all streams."""
        return reduce(or_, (c.branch for s in self.streams for u in s.updates for c in u.contributions))

    @property
    def moe_layers(self) -> int:
        return sum(layer.mlp.kind == "moe" for layer in self.layers)


@dataclass(frozen=True, kw_only=True)
class NoBlocks:
    reason: Reason


def is_busy(flow: Dataflow, node: Node) -> str:
    """What must lie in a branch: "mixes" (attention, convolution), "routes" (a selection, an exchange), else ""."""
    name = op_name(node)
    if name in ATTENTION:
        return "mixes"
    if name in EXCHANGES and node.op == "call_function":
        return "routes"
    if name in PRODUCTS and sum(_is_activation(flow, a) for a in factors(node)) > 1:
        return "mixes"
    return "routes" if name in SELECTORS and scores_of(flow, node, None) is not None else ""


def _is_activation(flow: Dataflow, node: Node) -> bool:
    """Computed from tokens: from an embedding or from hidden states that are an argument."""
    return bool((flow.ancestors(node) | flow.bit(node)) & flow.marked(
        "activation", lambda n: op_name(n) == "embedding" or is_hidden_states(n)))


def detect(streams: Sequence[Stream]) -> Blocks | NoBlocks:
    """Classify the blocks and group them into layers, stream after stream.

    A stream without experts beside one with experts (a vision tower) has no layers of its own here.
    """
    classified = [[_classify(stream, i, contribution) for i, update in enumerate(stream.updates)
                   for contribution in update.contributions] for stream in streams]
    for block in (b for blocks in classified for b in blocks):
        if block.kind == "both":
            return NoBlocks(reason=Reason(
                "parallel_block", f"{_where(block)} computes attention and routed experts in one branch (a parallel "
                "block); there is no attention output that the experts could skip", node=block.node.name))
        if block.kind == "nested":
            return NoBlocks(reason=Reason(
                "nested", f"{_where(block)} mixes tokens and has residual additions of its own: one block of the residual "
                "stream, or several of which only the last addition was found; which of the two is not known",
                node=block.node.name))
    for blocks in classified:
        for before, block, after in zip([None, *blocks], blocks, [*blocks[1:], None]):
            # Where its place is plain, only its layer is in doubt.
            if block.kind == "unknown" and not (before and before.kind == "mixer" and (not after or after.kind == "mixer")):
                return NoBlocks(reason=_doubt(block))
    doubtful = next((b for blocks in classified for b in blocks if b.kind == "unknown"), None)
    if doubtful is not None and not any(b.kind == "moe" for blocks in classified for b in blocks):
        return NoBlocks(reason=_doubt(doubtful))
    chosen = [blocks for blocks in classified if any(b.kind in ("moe", "unknown") for b in blocks)] or [max(classified, key=len)]
    idle = tuple(blocks[0].stream for blocks in classified if blocks not in chosen)
    classified, layers, tail = chosen, [], []
    for blocks in classified:
        for block, beside in (*zip(blocks, blocks[1:]), *zip(blocks[1:], blocks)):
            if not block.certain and beside.kind == "mixer":
                return NoBlocks(reason=Reason(
                    "unclear_block", f"{_where(block)} stands beside another token mixer, and it is not clear whether "
                    f"it is one, too, or an MLP: {block.evidence}", node=block.node.name))
    for blocks in classified:
        found = _group(_mixer_first(blocks), len(layers))
        if isinstance(found, NoBlocks):
            return found
        layers += found[0]
        tail += found[1]
    return Blocks(layers=tuple(layers), streams=tuple(streams), tail=tuple(tail), idle=idle)


def _mixer_first(blocks: list[Block]) -> list[Block]:
    """Parallel blocks that read one state in the order mixer, MLP, however the sum was written."""
    ordered = list(blocks)
    for i, (first, second) in enumerate(zip(ordered, ordered[1:])):
        if first.kind != "mixer" and second.kind == "mixer" and first.contribution.origin == second.contribution.origin:
            ordered[i:i + 2] = [second, first]
    return ordered


def _group(blocks: list[Block], start: int) -> tuple[list[Layer], list[Block]] | NoBlocks:
    """(layers, blocks after the last one); ``start`` is the index of the first layer."""
    layers, waiting, i = [], [], 0
    if not any(b.kind == "mixer" for b in blocks):
        return NoBlocks(reason=Reason(
            "not_alternating", f"none of the {len(blocks)} blocks mixes tokens, so there is no attention that exchanges "
            "could hide behind"))
    while i < len(blocks):
        mixers = [b for b in _while(blocks[i:], True)]
        others = [b for b in _while(blocks[i + len(mixers):], False)]
        i += len(mixers) + len(others)
        routed = [k for k, b in enumerate(others) if b.kind in ("moe", "unknown")]
        if len(routed) > 1:
            first, second = (others[k] for k in routed[:2])
            return NoBlocks(reason=Reason(
                "not_alternating", f"{_where(second)} is an MoE, and so is {_where(first)}: there is no attention between "
                "the two", node=second.node.name))
        end = routed[0] if routed else 0 if mixers else -1
        if end < 0 or not others:
            waiting += mixers + others
            continue
        mixed_in = next((b for b in others[:end + 1] if _is_mixed_in(b)), None)
        if mixed_in is not None:
            return NoBlocks(reason=Reason(
                "mixed_in", f"{_where(mixed_in)} adds an earlier value to the residual stream, and computes nothing, between "
                "a token mixer and an MLP: which of the blocks around it the MLP could skip is not defined",
                node=mixed_in.node.name))
        layers.append(Layer(index=start + len(layers), blocks=(*waiting, *mixers, *others[:end + 1])))
        waiting = others[end + 1:]
    if not layers:
        return NoBlocks(reason=Reason(
            "not_alternating", f"no MLP or MoE follows the {len(blocks)} token mixers of this model"))
    return layers, waiting


def _is_mixed_in(block: Block) -> bool:
    nodes = block.stream.flow.members(block.contribution.branch)
    return block.kind == "mlp" and all(op_name(n) in SCALES | VIEWS | CASTS for n in nodes)


def _while(blocks: list[Block], mixer: bool):
    for block in blocks:
        if (block.kind == "mixer") is not mixer:
            return
        yield block


# --- classification ---------------------------------------------------------------------------------------------

def _classify(stream: Stream, index: int, contribution: Contribution) -> Block:
    flow, branch = stream.flow, contribution.branch
    before = stream.states[contribution.origin]
    nodes = flow.members(branch)
    common = dict(stream=stream, contribution=contribution, update=index, label=_label(contribution.node))
    attention = next((n for n in nodes if op_name(n) in ATTENTION), None)
    exchange = next((n for n in nodes if n.op == "call_function" and op_name(n) in EXCHANGES), None)
    routers = {n: linear for n in nodes if op_name(n) in SELECTORS and chooses(n)
               and (linear := scores_of(flow, n, before)) is not None}
    experts = {n: found for n, linear in routers.items()
               if (found := experts_of(flow, nodes, n, linear, branch)) is not None}
    if experts:
        selected = flow.descendants(flow.mask(experts), branch)
        if attention is not None or any(mixes(flow, n, before) == "yes" for n in nodes if not flow.bit(n) & selected):
            return Block(kind="both", **common)
        ranked = flow.mask(routers[n] for n in experts)
        shared, partial = _split(flow, contribution.node, selected, ranked)
        selection, found = list(experts.items())[-1]
        evidence = f"{selection.name} selects, {found.name} computes"
        return Block(kind="moe", routed=selected, routers=ranked, shared=shared, partial=partial,
                     exchange=exchange.name if exchange is not None else "",
                     evidence=evidence + (f", {exchange.name} exchanges" if exchange is not None else ""), **common)
    choice = unexplained_choice(flow, nodes, before, branch) if attention is None else None
    if choice is not None:
        return Block(kind="unknown", evidence=f"chooses ({choice.name}) what computes on a token, but no router with "
                     "as many scores as there are experts was found in this branch", **common)
    answers = {n: mixes(flow, n, before) for n in nodes}
    mixer = attention or next((n for n, answer in answers.items() if answer == "yes"), None)
    if mixer is not None and _adds_an_mlp(flow, contribution, answers):
        return Block(kind="both", **common)
    if contribution.nested and (mixer is not None or "maybe" in answers.values()):
        return Block(kind="nested", **common)
    if mixer is not None:
        return Block(kind="mixer", evidence=f"{mixer.name} mixes tokens", **common)
    if looks_like_experts(nodes):
        return Block(kind="unknown", evidence="has stacked or repeated expert weights, but no router that chooses "
                     "among them was found in this branch", **common)
    mixer = next((n for n, answer in answers.items() if answer == "maybe"), None)
    if mixer is not None:
        return Block(kind="mixer", certain=False, evidence=f"{mixer.name} ({op_name(mixer)}) may mix tokens", **common)
    return Block(kind="mlp", evidence=f"{len(nodes)} token-wise operations", **common)


def _adds_an_mlp(flow: Dataflow, contribution: Contribution, answers: dict[Node, str]) -> bool:
    """Whether a mixer is added up with token-wise maps that it does not need: a parallel block that was not taken apart."""
    total = sum_of(contribution.node)
    if total is None or not total.two_terms:
        return False
    mixing = flow.mask(n for n, answer in answers.items() if answer != "no")
    cones = [(flow.ancestors(t) | flow.bit(t)) & contribution.branch for t in (total.first, total.rest[0])]
    return any(not mine & mixing and any(op_name(n) in LINEAR_MAPS for n in flow.members(mine & ~other))
               and other & mixing for mine, other in (cones, cones[::-1]))


def _split(flow: Dataflow, node: Node, routed: int, routers: int) -> tuple[bool, Reason | None]:
    """(has a shared part, why the routed part cannot be left out)."""
    try:
        kept = Terms(flow=flow, routed=routed, routers=routers).kept(node)
    except Undefined as stop:
        return True, stop.reason
    return kept is not None, None


# --- words ------------------------------------------------------------------------------------------------------

def _label(node: Node) -> str:
    """Module path of the layer part that made the contribution, from ``nn_module_stack``: for messages only."""
    stack = node.meta.get("nn_module_stack") or {}
    paths = [path for path, _ in stack.values()]
    return clean_path(paths[-1]) if paths else ""


def _doubt(block: Block) -> Reason:
    return Reason("no_router", f"{_where(block)} {block.evidence}", node=block.node.name)


def _where(block: Block) -> str:
    return f"{block.label} ({block.node.name})" if block.label else block.node.name
