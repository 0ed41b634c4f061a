"""What is routing: scores for experts, told from other top-k's, softmaxes and gates by dataflow.

Contract: nodes of a branch in, evidence out; nothing is changed, and module paths are not looked at.

Terms
  scores      the outputs of one linear map of the tokens that has one output (or one a slot) for each expert
  choice      top-k, argmax, sort, ... over the scores, whose indices are used
  gate        softmax, sigmoid or relu of the scores: a router that chooses nothing (soft MoE, a mixture of all experts)
  pure        made of the scores alone: all that it takes from the tokens comes through them
  meeting     where a pure value meets another value of the tokens: tokens are picked, outputs are weighted
  experts     stacked weights, or equal linear maps side by side, as many as there are scores; or an exchange

A router is scores + a choice or gates + experts. What separates it from its look-alikes:
  attention indexer, block selection   ranks products of two activations, not a linear map of one
  sampler, beam search, vocabulary     nothing behind the choice is an expert; experts before the logits are not theirs
  top-k activation (k winners)         what was ranked is the data itself: it goes through the next linear map
  memory of keys and values            rows are picked and added up; an expert's row is multiplied with the token (PEER)
  top-k over tokens (depth)            one score a token, not one for each of several experts
  gated linear unit, gated heads       as many scores as features; or tokens mix by products that no gate takes part in
"""
from __future__ import annotations

import functools
from dataclasses import dataclass
from functools import cached_property

import torch
from torch.fx import Node

from .dataflow import Dataflow, op_name, value_of
from .operations import (
    ALONG_AN_AXIS, ATTENTION, CASTS, ELEMENTWISE, EXCHANGES, EXPERT_MAPS, GATES, LINEAR_MAPS, PICKS, PRODUCTS, TO_WHOLE_NUMBERS,
    TOKEN_WISE, VIEWS)


# --- scores -------------------------------------------------------------------------------------------------------

def scores_of(flow: Dataflow, selector: Node, before: Node | None) -> Node | None:
    """The linear map whose outputs ``selector`` ranks or turns into gates: scores = linear(tokens, router weight).

    Without a state ``before`` the question is about the whole graph, where nothing says that this is a block of the
    stream: then it is answered only if there are experts behind the selection (a sampler over logits has none).
    """
    linear = _scores_of(flow, selector, before)
    if linear is None or before is not None:
        return linear
    return linear if chooses(selector) and _experts_anywhere(flow, selector, linear) else None


def _experts_anywhere(flow: Dataflow, selector: Node, linear: Node) -> bool:
    """Whether there are experts behind ``selector``: looked for around it first, which keeps the time linear in layers."""
    count, gates = len(flow.nodes), op_name(selector) in GATES
    for distance in (_NEAR, count):
        first, end = max(flow.position[linear] - distance, 0), min(flow.position[selector] + distance, count)
        if end - first > count - _NEAR:
            first, end = 0, count
        nodes, branch = flow.nodes[first:end], (1 << end) - (1 << first)
        is_choice = functools.partial(_is_choice_of_experts, flow, nodes=nodes, branch=branch)
        if gates and (flow.marked("choice", is_choice) if len(nodes) == count else any(map(is_choice, nodes))):
            return False        # as in experts_of
        if _evidence(flow, nodes, selector, linear, branch) is not None:
            return True
        if len(nodes) == count:
            return False
    return False


def _scores_of(flow: Dataflow, selector: Node, before: Node | None) -> Node | None:
    ranked = value_of(selector.args[0]) if selector.args and isinstance(selector.args[0], Node) else None
    if not isinstance(ranked, torch.Tensor) or not ranked.is_floating_point() or ranked.dim() < 1:
        return None
    found, todo, seen = None, [selector.args[0]], set()
    while todo:
        node = todo.pop()
        if node in seen or (before is not None and not flow.depends(node, before)):
            continue
        seen.add(node)
        name = op_name(node)
        if name in LINEAR_MAPS:
            if _weight_of(node) is None:
                return None         # an attention indexer ranks products of two activations
            found = found or node
        elif name in ELEMENTWISE | VIEWS | CASTS | GATES:
            todo += node.all_input_nodes
    return found


def chooses(selector: Node) -> bool:
    """Whether the choice itself is used, and not only the chosen value (a maximum for a scale); gates always are."""
    name = op_name(selector)
    if name in ("argmax", "argsort", "multinomial") or name in GATES:
        return True
    return any(op_name(u) == "getitem" and u.args[1] == 1 and u.users for u in selector.users)


_LOOKS_AT = VIEWS | CASTS | {"t", "mT", "T", "getattr", "_add_batch_dim"}       # at its first operand
_COMBINES = ELEMENTWISE | LINEAR_MAPS | {"cat", "stack", "unshard"}
_MANY = 64
_NEAR = 500             # nodes


def is_weight(node: Node) -> bool:
    """A parameter or buffer, or what is made of parameters and buffers alone: cast, transposed, indexed, gathered from
    slices, or with an adapter added to it. A derivation of more than a few steps is taken for something else."""
    todo, seen = [node], set()
    while todo:
        current = todo.pop()
        if current in seen:
            continue
        seen.add(current)
        if _is_parameter(current):
            continue
        inputs, name = current.all_input_nodes, op_name(current)
        if name not in _LOOKS_AT | _COMBINES or not inputs or len(seen) > _MANY:
            return False
        todo += inputs[:1] if name in _LOOKS_AT else inputs
    return True


def _is_parameter(node: Node) -> bool:
    if node.op == "get_attr":
        return True
    if node.op != "placeholder":
        return False
    source = getattr(node, "_dynamo_source", None)
    return isinstance(value_of(node), torch.nn.Parameter) or "_parameters" in str(node.target) \
        or "_buffers" in str(node.target) or "_parameters" in str(source)


def _weight_of(node: Node) -> Node | None:
    return next((a for a in node.all_input_nodes if is_weight(a) and _is_matrix(a)), None)


def _is_matrix(node: Node) -> bool:
    value = value_of(node)
    return isinstance(value, torch.Tensor) and value.dim() > 1


# --- experts ------------------------------------------------------------------------------------------------------

def experts_of(flow: Dataflow, nodes: list[Node], selector: Node, linear: Node, branch: int) -> Node | None:
    """The node that shows that the choice or gate ``selector`` over the outputs of ``linear`` is among experts."""
    found = _evidence(flow, nodes, selector, linear, branch)
    if found is None or op_name(selector) not in GATES:
        return found
    # Scores that are also gates: what is routed begins at the choice.
    return None if any(_is_choice_of_experts(flow, n, nodes, branch) for n in nodes) else found


def _evidence(flow: Dataflow, nodes: list[Node], selector: Node, linear: Node, branch: int) -> Node | None:
    router = _Router(flow=flow, linear=linear, chosen=flow.descendants(flow.bit(selector), branch), branch=branch)
    return (_gated_experts if op_name(selector) in GATES else _chosen_experts)(router, nodes)


def looks_like_experts(nodes: list[Node]) -> bool:
    """Stacked weights, or three and more equal linear maps side by side (a gated MLP has two)."""
    shapes: dict[tuple, list[Node]] = {}
    for node in nodes:
        for weight, shape in _expert_weights(node):
            if len(shape) >= 3:
                return True
            shapes.setdefault(shape, []).append(node)
    return any(len(_side_by_side(maps, set(nodes))) >= 3 for maps in shapes.values() if len(maps) >= 3)


def unexplained_choice(flow: Dataflow, nodes: list[Node], before: Node, branch: int) -> Node | None:
    """What may be a router, without scores and experts that are both understood: a block with one may be an MoE and
    must not be taken for a dense or a mixing one.

      - a choice over several scores that picks or weights tokens (a top-k activation and a memory do not);
      - a choice among as many as there are stacked or equal weights, however its scores are made (attention that
        selects blocks chooses among tokens);
      - numbers made of tokens in another way (a hash, the nearest centroid), where weights look like experts.
    """
    counts = _experts_seen(nodes)
    for node in nodes:
        name = op_name(node)
        if name in PICKS and chooses(node) and flow.depends(node, before):
            ranked = value_of(node.args[0])
            if _ranked_size(node, ranked) in counts and not _is_activation_choice(flow, node, before, branch):
                return node
            linear = _choice_scores(flow, node, before)
            if linear is None or value_of(linear).shape[-1] == 1:
                continue
            router = _Router(flow=flow, linear=linear, chosen=flow.descendants(flow.bit(node), branch), branch=branch)
            if router.meetings and _chosen_experts(router, nodes) is None:
                return node
        elif counts and name in _NUMBERS and flow.depends(node, before) and _is_whole_numbers(node) \
                and not any(map(_is_whole_numbers, node.all_input_nodes)):
            return node
    return None


def axis_of(node: Node):
    """The axis that an operation of ``ALONG_AN_AXIS`` works along, as it is given or by default."""
    position, default = ALONG_AN_AXIS.get(op_name(node), (1, -1))
    return node.args[position] if len(node.args) > position else node.kwargs.get("dim", default)


def _ranked_size(node: Node, ranked) -> int | None:
    """How many values there are to choose from; None where that is not known."""
    axis = axis_of(node)
    size = ranked.shape[axis if isinstance(axis, int) else -1] if isinstance(ranked, torch.Tensor) and ranked.dim() else None
    return size if isinstance(size, int) else None


_NUMBERS = CASTS | TO_WHOLE_NUMBERS | {"argmin", "bucketize", "searchsorted"}


def _is_activation_choice(flow: Dataflow, node: Node, before: Node, branch: int) -> bool:
    linear = _choice_scores(flow, node, before)
    return linear is not None and _Router(
        flow=flow, linear=linear, chosen=flow.descendants(flow.bit(node), branch), branch=branch).is_data


def _is_whole_numbers(node: Node) -> bool:
    value = value_of(node)
    return isinstance(value, torch.Tensor) and value.dtype in (torch.int64, torch.int32)


def _experts_seen(nodes: list[Node]) -> set[int]:
    """How many stacked weights, or equal linear maps side by side, there are."""
    counts, shapes = set(), {}
    for node in nodes:
        for weight, shape in _expert_weights(node):
            if len(shape) >= 3:
                counts.add(shape[0])
            elif op_name(node) in LINEAR_MAPS:
                shapes.setdefault(shape, {})[weight] = node
    return counts | {len(_side_by_side(list(maps.values()), set(nodes))) for maps in shapes.values() if len(maps) >= 3}


def _is_choice_of_experts(flow: Dataflow, node: Node, nodes: list[Node], branch: int) -> bool:
    linear = _choice_scores(flow, node, None)
    if linear is None or not flow.bit(linear) & branch:
        return False
    return _evidence(flow, nodes, node, linear, branch) is not None


def _choice_scores(flow: Dataflow, node: Node, before: Node | None) -> Node | None:
    if op_name(node) not in PICKS or not chooses(node):
        return None
    return _scores_of(flow, node, before)


def _chosen_experts(router: _Router, nodes: list[Node]) -> Node | None:
    flow, equal = router.flow, {}
    reach = router.reach
    for node in nodes:
        here, name = flow.bit(node), op_name(node)
        if not reach & here:
            continue
        routed = bool(router.chosen & here)
        if routed and name in EXCHANGES and node.op == "call_function":
            if "all_to_all" in name or router.owns_some_of(nodes):
                return node
        for weight, shape in _expert_weights(node):
            if len(shape) >= 3 and router.counts & set(shape):
                return node                                 # stacked expert weights
            if routed and name in ("embedding", "index_select") and router.multiplies_tokens(node):
                return node                                 # weights picked by the choice
            if name in LINEAR_MAPS and len(shape) == 2:
                equal.setdefault(shape, {})[weight] = node
    return _one_map_each(router, equal) or router.wide_map()


def _gated_experts(router: _Router, nodes: list[Node]) -> Node | None:
    """Experts whose outputs the gates weight; no tokens mix but through gates (heads of attention have gates, too)."""
    flow, weighted = router.flow, 0
    if not router.counts:
        return None
    for node, gate, other in router.meetings:
        weighted |= flow.ancestors(other) | flow.bit(other)
    weighted &= ~flow.ancestors(router.linear) & router.branch
    found, equal = None, {}
    for node in nodes:
        if not weighted & flow.bit(node):
            continue
        for weight, shape in _expert_weights(node):
            if len(shape) >= 3 and router.counts & set(shape):
                found = found or node
            if op_name(node) in LINEAR_MAPS and len(shape) == 2:
                equal.setdefault(shape, {})[weight] = node
    found = found or _one_map_each(router, equal)
    if found is None or any(router.mixes(node) for node in nodes if flow.bit(node) & weighted):
        return None
    return found


def _one_map_each(router: _Router, equal: dict[tuple, dict[Node, Node]]) -> Node | None:
    """One linear map an expert, side by side; a shared expert may have the same shape."""
    for maps in equal.values():
        if any(len(maps) >= count > 1 for count in router.counts):
            beside = _side_by_side(list(maps.values()), router.flow)
            if any(len(beside) >= count > 1 for count in router.counts):
                return beside[0]
    return None


def _expert_weights(node: Node):
    """(weight, its shape) of the parameters that ``node`` applies, picks from or maps over."""
    if op_name(node) in EXPERT_MAPS:
        for weight in node.all_input_nodes:
            if is_weight(weight) and isinstance(value_of(weight), torch.Tensor):
                yield weight, _with_vmapped(weight)


def _with_vmapped(weight: Node) -> tuple:
    """Shape of ``weight``, the sizes that vmap hides in front."""
    hidden, node = (), weight
    while op_name(node) in _LOOKS_AT:
        if op_name(node) == "_add_batch_dim":
            hidden = (value_of(node.args[0]).shape[node.args[1]], *hidden)
        node = node.all_input_nodes[0]
    return (*hidden, *value_of(weight).shape)


def _side_by_side(maps: list[Node], within) -> list[Node]:
    """Those of ``maps`` that do not depend on each other: the first maps of experts, not the layers of one MLP."""
    beside: list[Node] = []
    for node in maps:
        above = within.ancestors(node) if isinstance(within, Dataflow) else _above(node, within)
        if not any(above >> within.position[m] & 1 if isinstance(within, Dataflow) else m in above for m in beside):
            beside.append(node)
    return beside


def _above(node: Node, within: set[Node]) -> set[Node]:
    seen, todo = set(), list(node.all_input_nodes)
    while todo:
        current = todo.pop()
        if current in within and current not in seen:
            seen.add(current)
            todo += current.all_input_nodes
    return seen


# --- what becomes of the scores -----------------------------------------------------------------------------------

@dataclass(frozen=True, kw_only=True)
class _Router:
    """Scores, a choice or gate over them, and what becomes of both in a branch."""
    flow: Dataflow
    linear: Node
    chosen: int             # bit set: the choice or gate and what depends on it
    branch: int

    @cached_property
    def reach(self) -> int:
        """What the choice picks or weights: it, and what meets it, but not what the scores are computed from."""
        mask = self.chosen
        for node in self.flow.members(self.chosen):
            mask |= self.flow.ancestors(node)
        return mask & ~self.flow.ancestors(self.linear) & self.branch

    @cached_property
    def pure(self) -> int:
        flow, tokens = self.flow, of_tokens(self.flow)
        above, pure = flow.ancestors(self.linear), flow.bit(self.linear)
        for node in flow.members(flow.descendants(flow.bit(self.linear), self.branch) & ~flow.bit(self.linear)):
            inputs = flow.mask(node.all_input_nodes)
            for source in node.all_input_nodes:
                inputs |= flow.ancestors(source) if not flow.bit(source) & pure else 0
            written = flow.ancestors(node) & ~inputs & ~pure & ~above        # by way of memory
            taken = flow.mask(node.all_input_nodes) | written
            if not taken & tokens & ~pure:
                pure |= flow.bit(node)
        return pure

    @cached_property
    def is_data(self) -> bool:
        """The scores themselves go through another linear map: they are features, a top-k over them an activation."""
        flow = self.flow
        return any(op_name(n) in LINEAR_MAPS and _weight_of(n) is not None and len(value_of(_weight_of(n)).shape) == 2
                   for n in flow.members(self.pure & ~flow.bit(self.linear)))

    @cached_property
    def counts(self) -> frozenset[int]:
        """How many experts there may be: scores, or scores that are viewed as (experts, slots) or (heads, experts)."""
        scores, weight = value_of(self.linear), _weight_of(self.linear)
        features = scores.shape[-1]
        counts = [features, *scores.shape[1 - value_of(weight).dim():]]
        if not self.is_data:
            views = self.flow.members((self.pure | self.chosen) & self.branch)
            for node in (n for n in views if op_name(n) in VIEWS):
                shape = getattr(value_of(node), "shape", ())
                counts += [d for pair in zip(shape, shape[1:]) if all(isinstance(d, int) for d in pair)
                           and _product(pair) == features for d in pair]
        return frozenset(d for d in counts if isinstance(d, int) and d > 1)     # a symbolic size is of tokens

    @cached_property
    def meetings(self) -> list[tuple[Node, Node, Node]]:
        """(node, pure operand, other operand): tokens or outputs are picked or weighted as whole vectors. A product of
        two equal shapes is no meeting: it gates features."""
        flow, tokens, found = self.flow, of_tokens(self.flow), []
        after = flow.descendants(flow.bit(self.linear), self.branch) & ~self.pure
        for node in flow.members(after):
            name = op_name(node)
            if name not in PRODUCTS | {"mul", "imul", "where", "masked_fill", "getitem", "index_select", "gather",
                                       "index_add", "index_add_", "scatter_add", "scatter_add_", "setitem",
                                       "take_along_dim", "addcmul", *EXCHANGES}:
                continue
            gates = [a for a in node.all_input_nodes if flow.bit(a) & self.pure]
            others = [a for a in node.all_input_nodes if flow.bit(a) & ~self.pure & tokens]
            for gate in gates:
                found += [(node, gate, other) for other in others
                          if name not in ("mul", "imul", "where", "masked_fill") or _is_broadcast(gate, other)]
        return found

    def mixes(self, node: Node) -> bool:
        """Tokens mix in ``node``, and no value that is pure takes part in it."""
        name, flow = op_name(node), self.flow
        if node.op not in ("call_function", "call_method") or flow.bit(node) & self.pure:
            return False
        if name in ATTENTION:
            return True
        operands = [a for a in node.all_input_nodes if flow.bit(a) & of_tokens(flow)]
        if name in PRODUCTS and len(operands) > 1:
            return not any(flow.bit(a) & self.pure for a in operands)
        return bool(operands) and name not in TOKEN_WISE

    def multiplies_tokens(self, picked: Node) -> bool:
        """Rows that were picked are multiplied with tokens: weights of an expert. Values of a memory are added up."""
        flow, tokens = self.flow, of_tokens(self.flow)
        rows, todo = {picked}, [picked]
        while todo:
            for user in todo.pop().users:
                if op_name(user) in VIEWS | CASTS and user not in rows:
                    rows.add(user)
                    todo.append(user)
        for node in {user for row in rows for user in row.users}:
            met = [a for a in node.all_input_nodes if a not in rows and flow.bit(a) & tokens & ~self.pure]
            contracts = op_name(node) in PRODUCTS or \
                op_name(node) == "mul" and any(op_name(u) == "sum" for u in node.users)
            if met and contracts:
                return True
        return False

    def owns_some_of(self, nodes: list[Node]) -> bool:
        """Experts of this rank: stacked weights, as many as divide the number of scores, before an exchange."""
        return any(len(shape) >= 3 and any(count % shape[0] == 0 for count in self.counts)
                   or len(shape) == 2 and not self.is_data and op_name(node) in LINEAR_MAPS
                   for node in nodes if self.reach & self.flow.bit(node) for _, shape in _expert_weights(node))

    def wide_map(self) -> Node | None:
        """All experts in one linear map of (experts * inner) outputs, viewed and weighted by expert."""
        for node, gate, other in self.meetings:
            shape = value_of(other).shape
            if op_name(node) not in ("mul", "imul") or len(shape) < 2 or shape[-2] not in self.counts:
                continue
            while op_name(other) in ELEMENTWISE | VIEWS | CASTS and len(_token_inputs(self.flow, other)) == 1:
                other = _token_inputs(self.flow, other)[0]
            if op_name(other) in LINEAR_MAPS and value_of(other).shape[-1] == shape[-2] * shape[-1] \
                    and _weight_of(other) is not None:
                return other
        return None


def of_tokens(flow: Dataflow) -> int:
    """Bit set: what is computed from the input's embedding, or from hidden states that are an argument."""
    embeddings = flow.marked("embedding", lambda n: op_name(n) == "embedding")
    sources = flow.marked("tokens enter", lambda n: is_hidden_states(n) or (
        op_name(n) == "embedding" and not flow.ancestors(n) & embeddings))
    return flow.marked("of tokens", lambda n: bool((flow.ancestors(n) | flow.bit(n)) & sources))


def is_hidden_states(node: Node) -> bool:
    value = value_of(node)
    return node.op == "placeholder" and isinstance(value, torch.Tensor) and value.is_floating_point() \
        and value.dim() > 2 and not _is_parameter(node)


def _token_inputs(flow: Dataflow, node: Node) -> list[Node]:
    return [a for a in node.all_input_nodes if flow.bit(a) & of_tokens(flow)]


def _is_broadcast(gate: Node, other: Node) -> bool:
    small, large = value_of(gate), value_of(other)
    if not isinstance(small, torch.Tensor) or not isinstance(large, torch.Tensor):
        return False
    return small.dim() < large.dim() or any(
        isinstance(a, int) and a == 1 and not (isinstance(b, int) and b == 1)
        for a, b in zip(reversed(small.shape), reversed(large.shape)))


def _product(pair) -> int:
    a, b = pair
    return a * b if isinstance(a, int) and isinstance(b, int) else 0
