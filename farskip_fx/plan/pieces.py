"""What each layer computes and sends, in seconds and bytes, from the graph that Inductor would get.

Contract: a lowered graph whose nodes know their place (``passes/places.py``) in, ``Piece`` by layer out. Each node is in
one piece, and its seconds are those of ``passes/costs.py``, so loops, gathers and weights that are read count.

Terms, of an MoE in one graph (forward: first = dispatch, second = combine; backward: the other way round)
    before      what the first exchange needs: router, sorting, gathering
    inner       what the second exchange needs beyond that: experts; backward: gradients of their inputs
    weights     needs the first exchange, and nobody needs it: weight gradients of experts
    after       needs the second exchange
    side        none of these: the shared expert
    half        the same for half of the tokens: weights are read as often, and kernels are as many
"""
from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch.fx import Graph, Node

from ..passes import costs
from ..passes.costs import Rates
from ..passes.places import place_of

PARTS = ("attention", "before", "inner", "weights", "after", "side")


@dataclass(frozen=True, kw_only=True)
class Piece:
    """One layer in one graph. Seconds of compute, and what its exchanges carry.

    Args:
        kind: "moe", "mlp", or "" where the graph has no MLP of this layer.
        first, second: bytes that leave a rank; launches: of both, with the counts.
        kept: bytes of intermediate results that the backward needs.
    """
    kind: str = ""
    attention: float = 0.0
    before: float = 0.0
    inner: float = 0.0
    weights: float = 0.0
    after: float = 0.0
    side: float = 0.0
    first: float = 0.0
    second: float = 0.0
    first_launches: int = 0
    second_launches: int = 0
    kept: float = 0.0

    @property
    def compute(self) -> float:
        return sum(getattr(self, part) for part in PARTS)


def pieces_of(graph: Graph, rates: Rates, *, backward: bool, half: bool = False) -> tuple[dict[int, Piece], float]:
    """By layer, and the seconds of what belongs to no layer (embedding, the stream's additions, masks)."""
    seconds = costs.graph_seconds(graph, rates)
    if half:
        seconds = {node: _half(node, own, rates) for node, own in seconds.items()}
    by_layer: dict[int, list[Node]] = {}
    unplaced: set[Node] = set()
    alone = 0
    counts: dict[int, int] = {}
    for node in graph.nodes:
        place = place_of(node)
        # With known splits nothing reads the counts exchange, so it has no place: it stands in front of its dispatch.
        if costs.is_launch(node) and place is None:
            alone += 1
        elif costs.is_launch(node):
            counts[place.layer] = counts.get(place.layer, 0) + alone
            alone = 0
        if place is not None and node.op == "call_function":
            by_layer.setdefault(place.layer, []).append(node)
        elif node.op == "call_function":
            unplaced.add(node)
    claimed = {layer: _between_exchanges(nodes, unplaced, backward) for layer, nodes in by_layer.items()}
    outside = sum(seconds.get(n, 0.0) for n in unplaced.difference(*claimed.values()))
    kept = {} if backward else _kept(graph)
    pieces = {layer: _piece(nodes, claimed[layer], seconds, backward) for layer, nodes in by_layer.items()}
    return {layer: dataclasses.replace(piece, kept=kept.get(layer, 0.0),
                                       first_launches=piece.first_launches + counts.get(layer, 0))
            for layer, piece in pieces.items()}, outside


def _piece(nodes: Sequence[Node], claimed: set[Node], seconds: dict[Node, float], backward: bool) -> Piece:
    attention = sum(seconds[n] for n in nodes if place_of(n).block == "attention")
    placed = [n for n in nodes if place_of(n).block != "attention"]
    block = [*placed, *claimed]
    kind = "moe" if any(place_of(n).block == "moe" for n in placed) else "mlp" if block else ""
    launches = [n for n in placed if costs.is_launch(n)]
    if not launches:
        return Piece(kind=kind, attention=attention, side=sum(seconds[n] for n in block))
    first, second = _exchanges(placed, backward)
    counts = [n for n in launches if n not in first and n not in second]
    inside = set(block)
    before = _reach([*first, *counts], inside, lambda n: n.all_input_nodes)
    after = _reach(second, inside, lambda n: n.users)
    inner = _reach(second, inside, lambda n: n.all_input_nodes) - before - after
    weights = _reach(first, inside, lambda n: n.users) - inner - after
    parts = {"before": before, "after": after - before, "inner": inner, "weights": weights - before}
    parts["side"] = inside.difference(*parts.values())
    return Piece(kind=kind, attention=attention, first=float(sum(map(costs.payload, first))),
                 second=float(sum(map(costs.payload, second))), first_launches=len(first) + len(counts),
                 second_launches=len(second), **{name: sum(seconds[n] for n in part) for name, part in parts.items()})


def _exchanges(nodes: Sequence[Node], backward: bool) -> tuple[list[Node], list[Node]]:
    order = ("combine", "dispatch") if backward else ("dispatch", "combine")
    first, second = ([n for n in nodes if costs.is_launch(n) and place_of(n).part == part] for part in order)
    return first, second


def _between_exchanges(nodes: Sequence[Node], unplaced: set[Node], backward: bool) -> set[Node]:
    """Nodes without a place that the second exchange needs and that need the first: autograd's functions lose it."""
    first, second = _exchanges(nodes, backward)
    inside = {n for n in nodes if place_of(n).block != "attention"} | unplaced
    down = _reach(first, inside, lambda n: n.users)
    return down & _reach(second, inside, lambda n: n.all_input_nodes) & unplaced


def _reach(start: Iterable[Node], inside: set[Node], step) -> set[Node]:
    """What is reached from ``start`` within ``inside``, with it."""
    seen, stack = set(start), list(start)
    while stack:
        for node in step(stack.pop()):
            if node in inside and node not in seen:
                seen.add(node)
                stack.append(node)
    return seen


def _half(node: Node, own: float, rates: Rates) -> float:
    """Of half of the rows. AOTAutograd calls a graph's arguments primals or args; saved results have other names."""
    if not own:
        return 0.0
    if costs.is_light(node):
        return own / 2
    roots = {costs.through_views(source) for source in node.all_input_nodes}
    weights = sum(costs.bytes_out(root) for root in roots
                  if root.op == "placeholder" and root.name.startswith(("primals", "arg")))
    overhead = min(own, rates.kernel_overhead)
    return max((own - overhead) / 2, weights / rates.memory_bytes) + overhead


def _kept(graph: Graph) -> dict[int, float]:
    """Bytes of a forward graph's results that are computed in a layer: saved for the backward."""
    kept: dict[int, float] = {}
    roots = {costs.through_views(source) for out in graph.nodes if out.op == "output" for source in out.all_input_nodes}
    for root in roots:
        place = place_of(root)
        if place is not None and root.op == "call_function":
            kept[place.layer] = kept.get(place.layer, 0.0) + costs.bytes_out(root)
    return kept
