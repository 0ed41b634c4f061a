"""Step 2: say what each branch of the stream is, and split MoE contributions into routed and shared parts.

Contract: a ``Stream`` in, ``Blocks`` out (or ``NoBlocks`` with a typed reason). Nothing is changed; dataflow decides.

Terms
  selection    the router's choice: top-k, argmax or sort over scores that one linear map computes per token, whose
               result picks expert weights, expert sub-networks or an exchange between ranks
  routed part  what depends on a selection or on an exchange between ranks; it is in flight while its combine runs
  shared part  additive terms of an MoE contribution that do not depend on the selection (a shared expert)
  mixer        attention, linear attention, state space, convolution: mixes tokens
  kept(b)      contribution b with the routed part left out, as a recipe: U must be linear in it

Steps
  1. Classify each branch: ``moe`` (has a selection), ``mixer`` (mixes tokens), ``mlp`` (only token-wise maps).
  2. Pair them into layers: mixer, then mlp or moe.
  3. For each MoE contribution walk from the update down through linear operations to the sum routed + shared.
"""
from __future__ import annotations

from dataclasses import dataclass

from torch.fx import Node

from .dataflow import Dataflow, op_name
from .operations import ATTENTION, EXCHANGES, PRODUCTS, SELECTORS, TOKEN_WISE
from .reasons import Reason
from .residual import Stream, Update
from .routing import chooses, experts_of, looks_like_experts, scores_of
from .terms import Inseparable, Terms


@dataclass(frozen=True, kw_only=True)
class Block:
    """One branch of the stream."""
    kind: str                 # "mixer", "mlp" or "moe"
    update: Update
    routed: int = 0           # bit set of nodes that depend on the selection; 0 where kind is not "moe"
    routers: int = 0          # bit set of the linear maps whose outputs are ranked
    shared: bool = False      # whether the contribution has a part that is not routed
    partial: Reason | None = None   # why the routed part cannot be left out, where it cannot
    label: str = ""           # module path, for messages only
    evidence: str = ""
    exchange: str = ""        # name of an exchange between ranks in this branch


@dataclass(frozen=True, kw_only=True)
class Layer:
    index: int
    attention: Block
    mlp: Block


@dataclass(frozen=True, kw_only=True)
class Blocks:
    layers: tuple[Layer, ...]
    stream: Stream

    @property
    def moe_layers(self) -> int:
        return sum(layer.mlp.kind == "moe" for layer in self.layers)


@dataclass(frozen=True, kw_only=True)
class NoBlocks:
    reason: Reason
    moe: int = 0              # branches with a router that were seen all the same


def is_busy(flow: Dataflow, node: Node) -> bool:
    """Nodes that must lie in a branch: attention, convolution, a router's selection, an exchange."""
    name = op_name(node)
    if name in ATTENTION or (name in EXCHANGES and node.op == "call_function"):
        return True
    if name in PRODUCTS and sum(_is_activation(flow, a) for a in node.all_input_nodes) > 1:
        return True
    return name in SELECTORS and scores_of(flow, node, None) is not None


def _is_activation(flow: Dataflow, node: Node) -> bool:
    """Computed from an embedding."""
    return any(op_name(n) == "embedding" for n in flow.members(flow.ancestors(node)))


def detect(stream: Stream) -> Blocks | NoBlocks:
    """Classify the branches and pair them into layers."""
    blocks = [_classify(stream, update) for update in stream.updates]
    moe = sum(b.kind == "moe" for b in blocks)
    for block in blocks:
        if block.kind == "both":
            return NoBlocks(moe=moe + 1, reason=Reason(
                "parallel_block", f"{_where(block)} computes attention and routed experts in one branch (a parallel "
                "block); there is no attention output that the experts could skip", node=block.update.add.name))
        if block.kind == "unknown":
            return NoBlocks(moe=moe + 1, reason=Reason(
                "no_router", f"{_where(block)} has stacked or repeated expert weights, but no router that chooses among "
                "them was found in this branch", node=block.update.add.name))
    layers = []
    for first, second in zip(blocks[::2], blocks[1::2]):
        if first.kind != "mixer" or second.kind == "mixer":
            return NoBlocks(moe=moe, reason=Reason(
                "not_alternating", f"{_where(first)} is {_a(first.kind)} and the next branch, {_where(second)}, is "
                f"{_a(second.kind)}: layers are not attention followed by one MLP or MoE",
                node=second.update.add.name))
        layers.append(Layer(index=len(layers), attention=first, mlp=second))
    if len(blocks) % 2:
        return NoBlocks(moe=moe, reason=Reason(
            "not_alternating", f"the stream has {len(blocks)} residual additions, which do not pair into layers of "
            f"attention and MLP; the last is {_where(blocks[-1])}", node=blocks[-1].update.add.name))
    return Blocks(layers=tuple(layers), stream=stream)


# --- classification ---------------------------------------------------------------------------------------------

def _classify(stream: Stream, update: Update) -> Block:
    flow = stream.flow
    before = update.before
    branch = flow.descendants(flow.bit(before), update.branch)
    nodes = flow.members(branch)
    attention = next((n for n in nodes if op_name(n) in ATTENTION), None)
    exchange = next((n for n in nodes if n.op == "call_function" and op_name(n) in EXCHANGES), None)
    routers = {n: linear for n in nodes if op_name(n) in SELECTORS and chooses(n)
               and (linear := scores_of(flow, n, before)) is not None}
    experts = {n: found for n, linear in routers.items()
               if (found := experts_of(flow, nodes, n, linear, update.branch)) is not None}
    label = _label(update)
    if experts:
        if attention is not None:
            return Block(kind="both", update=update, label=label)
        selected = flow.descendants(flow.mask(experts), update.branch)
        ranked = flow.mask(routers[n] for n in experts)
        shared, partial = _split(flow, update, selected, ranked)
        selection, found = list(experts.items())[-1]
        evidence = f"{selection.name} selects, {found.name} computes"
        return Block(kind="moe", update=update, routed=selected, routers=ranked, shared=shared, partial=partial,
                     label=label, exchange=exchange.name if exchange is not None else "",
                     evidence=evidence + (f", {exchange.name} exchanges" if exchange is not None else ""))
    mixer = attention or next((n for n in nodes if mixes_tokens(flow, n, before)), None)
    if mixer is not None:
        return Block(kind="mixer", update=update, label=label, evidence=f"{mixer.name} mixes tokens")
    if looks_like_experts(nodes):
        return Block(kind="unknown", update=update, label=label)
    return Block(kind="mlp", update=update, label=label, evidence=f"{len(nodes)} token-wise operations")


def mixes_tokens(flow: Dataflow, node: Node, before: Node) -> bool:
    name = op_name(node)
    if name in PRODUCTS:
        operands = [a for a in node.all_input_nodes if flow.depends(a, before)]
        return len(operands) > 1
    return name not in TOKEN_WISE and node.op in ("call_function", "call_method")


# --- routed and shared parts ------------------------------------------------------------------------------------

def _split(flow: Dataflow, update: Update, routed: int, routers: int) -> tuple[bool, Reason | None]:
    """(has a shared part, why the routed part cannot be left out)."""
    terms = Terms(flow=flow, routed=routed, routers=routers)
    try:
        kept = terms.kept(update.contribution)
    except Inseparable as stop:
        return True, stop.reason
    return kept is not None, None


# --- words ------------------------------------------------------------------------------------------------------

def _label(update: Update) -> str:
    """Module path of the layer part that made the contribution, from ``nn_module_stack``: for messages only."""
    stack = update.contribution.meta.get("nn_module_stack") or {}
    paths = [path for path, _ in stack.values()]
    return clean_path(paths[-1]) if paths else ""


def clean_path(path: str) -> str:
    """``L['self']._modules['model'].layers.3.mlp`` -> ``model.layers.3.mlp``."""
    for prefix in ("L['self'].", "L['fn'].", "L['args'][0].", "L['self']"):
        path = path.removeprefix(prefix)
    return path.replace("_modules['", "").replace("']", "").replace("._orig_mod", "")


def _where(block: Block) -> str:
    return f"{block.label} ({block.update.add.name})" if block.label else block.update.add.name


def _a(kind: str) -> str:
    return {"mixer": "attention or another token mixer", "mlp": "a dense MLP", "moe": "an MoE"}[kind]
