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

import torch
from torch.fx import Node

from .dataflow import Dataflow, op_name, value_of
from .reasons import Reason
from .residual import Stream, Update, is_plain_add

_SELECTORS = {"topk", "argmax", "max", "sort", "argsort", "kthvalue"}
_EXCHANGES = {"all_to_all_single", "all_to_all", "all_gather_into_tensor", "all_gather_tensor",
              "reduce_scatter_tensor", "all_reduce", "all_to_all_single_autograd"}
_ATTENTION = {"scaled_dot_product_attention", "flex_attention", "conv1d", "causal_conv1d", "scan", "associative_scan"}
_PRODUCTS = {"matmul", "bmm", "baddbmm", "einsum", "__matmul__", "__rmatmul__", "mm"}
_LINEAR_MAPS = {"linear", "matmul", "mm", "addmm", "bmm", "einsum", "__matmul__", "baddbmm", "addbmm"}
_VIEWS = {"view", "reshape", "contiguous", "flatten", "unflatten", "squeeze", "unsqueeze", "_unsafe_view", "clone",
          "alias", "expand", "expand_as", "transpose", "permute", "chunk", "split", "getitem", "detach"}
_CASTS = {"to", "type", "float", "type_as", "half", "bfloat16", "double", "_to_copy"}
_ELEMENTWISE = {"add", "sub", "mul", "div", "truediv", "neg", "exp", "log", "sqrt", "rsqrt", "pow", "softmax",
                "log_softmax", "sigmoid", "relu", "relu_", "tanh", "silu", "gelu", "softplus", "logsigmoid", "where",
                "masked_fill", "clamp", "clip", "dropout", "iadd", "imul", "isub", "itruediv", "square", "abs",
                "sum", "mean", "rms_norm", "layer_norm", "clamp_min", "clamp_max", "minimum", "maximum", "mish",
                "hardtanh", "elu", "leaky_relu", "reciprocal", "float_power", "var", "norm", "rsub", "eq", "ge", "gt",
                "le", "lt", "relu6", "normalize", "amax", "sinh", "cosh", "asinh", "arcsinh"}
_EXPERT_MAPS = _LINEAR_MAPS | {"_grouped_mm", "grouped_mm", "grouped_mm_fallback", "scaled_grouped_mm", "getitem",
                               "index_select"}
_TOKEN_WISE = _VIEWS | _CASTS | _ELEMENTWISE | _LINEAR_MAPS | {"cat", "stack"}
# Where tokens may enter the experts: as a factor, or by being picked with indices that the router chose.
_TAKES_TOKENS = _LINEAR_MAPS | _EXPERT_MAPS | {"mul", "imul", "index_select", "gather", "take_along_dim", "embedding",
                                               "topk", "sort", "argsort", "repeat_interleave"} | _EXCHANGES
_TAKES_A_LIKENESS = {"type_as", "to", "expand_as", "view_as", "reshape_as"}    # of the second argument, not its value
_MAKES_MEMORY = {"zeros", "zeros_like", "new_zeros", "empty", "empty_like", "new_empty", "ones_like", "full_like",
                 "new_full", "full", "ones", "new_ones"}


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
    if name in _ATTENTION or (name in _EXCHANGES and node.op == "call_function"):
        return True
    if name in _PRODUCTS and sum(_is_activation(flow, a) for a in node.all_input_nodes) > 1:
        return True
    return name in _SELECTORS and _scores(flow, node, None) is not None


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
    attention = next((n for n in nodes if op_name(n) in _ATTENTION), None)
    exchange = next((n for n in nodes if n.op == "call_function" and op_name(n) in _EXCHANGES), None)
    routers = {n: linear for n in nodes if op_name(n) in _SELECTORS and _chooses(n)
               and (linear := _scores(flow, n, before)) is not None}
    experts = {n: found for n, linear in routers.items()
               if (found := _experts(flow, nodes, n, linear, update.branch)) is not None}
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
    mixer = attention or next((n for n in nodes if _mixes_tokens(flow, n, before)), None)
    if mixer is not None:
        return Block(kind="mixer", update=update, label=label, evidence=f"{mixer.name} mixes tokens")
    if _looks_like_experts(nodes):
        return Block(kind="unknown", update=update, label=label)
    return Block(kind="mlp", update=update, label=label, evidence=f"{len(nodes)} token-wise operations")


def _scores(flow: Dataflow, selector: Node, before: Node | None) -> Node | None:
    """The linear map whose outputs ``selector`` ranks, if there is one: scores = linear(tokens, router weight).

    An attention indexer ranks products of two activations over a sequence; it has no such map.
    """
    ranked = value_of(selector.args[0]) if selector.args and isinstance(selector.args[0], Node) else None
    if not isinstance(ranked, torch.Tensor) or not ranked.is_floating_point() or ranked.dim() < 1:
        return None
    todo, seen = [selector.args[0]], set()
    while todo:
        node = todo.pop()
        if node in seen or (before is not None and not flow.depends(node, before)):
            continue
        seen.add(node)
        name = op_name(node)
        if name in _LINEAR_MAPS:
            weights = [a for a in node.all_input_nodes if _is_weight(a)]
            if weights and _ranks_outputs_of(ranked, node):
                return node
        elif name in _ELEMENTWISE | _VIEWS | _CASTS:
            todo += node.all_input_nodes
    return None


def _ranks_outputs_of(ranked: torch.Tensor, linear: Node) -> bool:
    """The selection runs over (groups of) the linear map's output features, not over tokens."""
    scores, last = value_of(linear), ranked.shape[-1]
    if not isinstance(scores, torch.Tensor) or not isinstance(last, int):
        return False
    return any(isinstance(d, int) and d > 1 and d % last == 0 for d in (scores.shape[-1], scores.shape[0]))


def _is_weight(node: Node) -> bool:
    """A parameter or buffer, possibly cast, transposed or indexed."""
    while op_name(node) in _VIEWS | _CASTS | {"t", "mT", "T", "getattr"} and node.all_input_nodes:
        node = node.all_input_nodes[0]
    if node.op == "get_attr":
        return True
    if node.op != "placeholder":
        return False
    source = getattr(node, "_dynamo_source", None)
    return isinstance(value_of(node), torch.nn.Parameter) or "_parameters" in str(node.target) \
        or "_buffers" in str(node.target) or "_parameters" in str(source)


def _chooses(selector: Node) -> bool:
    """Whether the choice itself is used, and not only the chosen value (a maximum for a scale, say)."""
    if op_name(selector) in ("argmax", "argsort"):
        return True
    return any(op_name(u) == "getitem" and u.args[1] == 1 and u.users for u in selector.users)


def _experts(flow: Dataflow, nodes: list[Node], selector: Node, linear: Node, branch: int) -> Node | None:
    """The node that shows that ``selector`` picks one of the experts, not features (a top-k activation) or keys: there
    are as many experts as the router has outputs."""
    chosen = flow.descendants(flow.bit(selector), branch)
    count = value_of(linear).shape[-1]
    same_shape: dict[tuple, list[Node]] = {}
    for node in nodes:
        name = op_name(node)
        routed = bool(chosen >> flow.position[node] & 1)
        if routed and name in _EXCHANGES and node.op == "call_function":
            return node
        weights = [a for a in node.all_input_nodes if _is_weight(a)] if name in _EXPERT_MAPS | {"embedding"} else []
        for weight in weights:
            shape = tuple(value_of(weight).shape)
            if len(shape) >= 3 and shape[0] == count:
                return node                                 # stacked expert weights
            if routed and name in ("embedding", "index_select"):
                return node                                 # weights picked by the selection
            if name in _LINEAR_MAPS and len(shape) == 2:
                same_shape.setdefault(shape, []).append(node)
    # One linear map an expert; a shared expert may have the same shape.
    return next((maps[0] for maps in same_shape.values() if len(maps) >= count > 1), None)


def _looks_like_experts(nodes: list[Node]) -> bool:
    shapes: dict[tuple, int] = {}
    for node in nodes:
        for weight in (a for a in node.all_input_nodes if op_name(node) in _EXPERT_MAPS and _is_weight(a)):
            shape = tuple(value_of(weight).shape)
            if len(shape) >= 3:
                return True
            shapes[shape] = shapes.get(shape, 0) + 1
    return max(shapes.values(), default=0) >= 4


def _mixes_tokens(flow: Dataflow, node: Node, before: Node) -> bool:
    name = op_name(node)
    if name in _PRODUCTS:
        operands = [a for a in node.all_input_nodes if flow.depends(a, before)]
        return len(operands) > 1
    return name not in _TOKEN_WISE and node.op in ("call_function", "call_method")


# --- routed and shared parts ------------------------------------------------------------------------------------

def _split(flow: Dataflow, update: Update, routed: int, routers: int) -> tuple[bool, Reason | None]:
    """(has a shared part, why the routed part cannot be left out)."""
    terms = Terms(flow=flow, routed=routed, routers=routers)
    try:
        kept = terms.kept(update.contribution)
    except Inseparable as stop:
        return True, stop.reason
    return kept is not None, None


class Inseparable(Exception):
    def __init__(self, reason: Reason) -> None:
        super().__init__(str(reason))
        self.reason = reason


@dataclass(frozen=True, kw_only=True)
class Terms:
    """The additive structure of one MoE contribution.

    Conservative: whatever is not known to be a sum, linear, or an expert's own business, and takes in a value of the
    branch that is not routed, makes the parts inseparable.
    """
    flow: Dataflow
    routed: int
    routers: int

    def is_routed(self, node: Node) -> bool:
        return bool(self.routed >> self.flow.position[node] & 1)

    def kept(self, node: Node):
        """Recipe for ``node`` without its routed terms: a Node, ``("add", a, b, like)``, ``("apply", node, a, kept)``
        or None where nothing is left.

        Raises:
            Inseparable: the routed part went through something that is not linear together with another part.
        """
        if not self.is_routed(node):
            return None if self._is_zero(node) else self._readable(node)
        if is_plain_add(node):
            left, right = (self.kept(a) for a in node.args)
            if left is None or right is None:
                return left if right is None else right
            return ("add", left, right, node)
        if op_name(node) in ("index_add", "scatter_add") and node.args and not self.is_routed(node.args[0]):
            return self.kept(node.args[0])
        carrier = self._linear_in(node)
        if carrier is not None:
            kept = self.kept(carrier)
            if kept is None:
                return None
            for other in node.all_input_nodes:
                if other is not carrier:
                    self._readable(other)
            return ("apply", node, carrier, kept)
        mixed = self._mixed_below(node)
        if mixed is not None:
            raise Inseparable(Reason(
                "post_norm_over_sum", f"{node.name} ({op_name(node)}) is not linear and takes routed and shared parts "
                f"together (they meet in {mixed.name}), so the stream without the routed part is not defined",
                node=node.name))
        return None

    def _readable(self, node: Node) -> Node:
        late = [w for w in self.flow.writes_to(node) if self.flow.position[w] > self.flow.position[node]]
        if late:
            raise Inseparable(Reason(
                "overwritten", f"{late[0].name} writes into the memory of {node.name}, which the stream without the "
                "routed part is made of", node=node.name))
        return node

    def _is_zero(self, node: Node) -> bool:
        return op_name(node) in ("zeros", "zeros_like", "new_zeros") and not self.flow.writes_to(node)

    def _linear_in(self, node: Node) -> Node | None:
        """The one routed operand that ``node`` is linear in, if it is."""
        name = op_name(node)
        routed = [a for a in node.args if isinstance(a, Node) and self.is_routed(a)]
        if len(routed) != 1 or not isinstance(value_of(node), torch.Tensor):
            return None
        if name in {"view", "reshape", "contiguous", "flatten", "squeeze", "unsqueeze", "_unsafe_view", "clone",
                    "transpose", "permute", "detach"} | _CASTS:
            return routed[0] if node.args[0] is routed[0] and self._same_size(node, routed[0]) else None
        if name == "dropout" and not self._drops(node):
            return routed[0]
        if name in {"mul", "imul"} or (name in {"div", "truediv", "itruediv"} and node.args[0] is routed[0]):
            return routed[0] if self._same_size(node, routed[0]) else None
        return None

    def _same_size(self, a: Node, b: Node) -> bool:
        x, y = value_of(a), value_of(b)
        return isinstance(y, torch.Tensor) and y.is_floating_point() and \
            (x.numel() == y.numel() if _static(x) and _static(y) else x.dim() <= y.dim() + 1)

    @staticmethod
    def _drops(node: Node) -> bool:
        p = node.args[1] if len(node.args) > 1 else node.kwargs.get("p", 0.5)
        training = node.args[2] if len(node.args) > 2 else node.kwargs.get("training", True)
        return bool(p) and bool(training)

    def _mixed_below(self, node: Node) -> Node | None:
        """A place at or below ``node`` where a routed value meets another value of the branch as an equal.

        Tokens enter the experts through products and by being picked; anywhere else two values that meet may be terms
        of a sum. Scores of the router may meet what was chosen.
        """
        todo, seen = [node], set()
        while todo:
            current = todo.pop()
            if current in seen or not self.is_routed(current):
                continue
            seen.add(current)
            inputs = current.all_input_nodes
            if op_name(current) in _TAKES_A_LIKENESS:
                inputs = inputs[:1]
            unseen = not any(map(self.is_routed, inputs)) and self.flow.ancestors(current) & self.routed
            if unseen:      # routed by way of memory that was written in place
                inputs = [*inputs, *(a for i in inputs for w in self.flow.writes_to(i)
                                     if self.flow.position[w] < self.flow.position[current]
                                     for a in w.all_input_nodes)]
            if unseen or op_name(current) not in _TAKES_TOKENS:
                for other in inputs:
                    if not self.is_routed(other) and self._is_term(other):
                        return current
            todo += inputs
        return None

    def _is_term(self, node: Node) -> bool:
        value = value_of(node)
        if not isinstance(value, torch.Tensor) or not value.is_floating_point() or _is_weight(node):
            return False
        above = self.flow.ancestors(node) | self.flow.bit(node)
        if above & self.routers or self._is_zero(node) or op_name(node) in _MAKES_MEMORY:
            return False
        return any(n.op == "placeholder" and not _is_weight(n) or op_name(n) == "embedding"
                   for n in self.flow.members(self.flow.ancestors(node)))


def _static(tensor: torch.Tensor) -> bool:
    return all(isinstance(d, int) for d in tensor.shape)


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
