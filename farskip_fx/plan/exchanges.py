"""What an exchange carries and how long it takes, for any number of ranks.

Contract: numbers in, numbers out; routing is balanced. A *row* is what a token sends once; ``legs`` says how many of them leave
a rank for each of its tokens, one way (``farskip_fx/exchanges.py``, ``hierarchical.py``):

    all_to_all         to each rank once, however many of its experts live there
    all_to_all_pairs   once for each of its experts
    hierarchical       to each node once, then on to that node's ranks: two legs, one after the other
    all_gather         to every rank
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..routes import share_of_tokens
from .devices import Link

USUAL = "all_to_all"


@dataclass(frozen=True)
class Leg:
    """Rows that leave a rank for each of its tokens: to ranks of its node, and to others."""
    near: float
    far: float


def legs(exchange: str, *, experts: int, top_k: int, ep: int, node: int) -> tuple[Leg, ...]:
    """``node`` ranks are neighbours."""
    node = min(node, ep)
    if exchange == "hierarchical":
        nodes = ep // node
        arrived = ep * share_of_tokens(experts, experts // ep, top_k)     # ranks that a token has to come to
        return (Leg(0.0, (nodes - 1) * share_of_tokens(experts, experts // nodes, top_k)), Leg(arrived * (node - 1) / node, 0.0))
    each = {"all_to_all_pairs": top_k / ep, "all_gather": 1.0}.get(exchange)
    if each is None:
        each = share_of_tokens(experts, experts // ep, top_k)
    return (Leg(each * (node - 1), each * (ep - node)),)


def exchanges_for(ep: int, node: int) -> tuple[str, ...]:
    """Those that are worth a comparison."""
    return (USUAL, "all_to_all_pairs", "all_gather", *(("hierarchical",) if ep > node and ep % node == 0 else ()))


def copies(experts: int, top_k: int, ep: int, *, exchange: str = USUAL) -> float:
    """Rows that a token becomes on the other ranks, its own left out."""
    return sum(leg.near + leg.far for leg in legs(exchange, experts=experts, top_k=top_k, ep=ep, node=ep))


@dataclass(frozen=True)
class Network:
    """Nodes of ``node`` devices with a fast link inside, and a link between them for each device. Both work at once."""
    inside: Link
    between: Link
    node: int = 8

    def seconds(self, row: float, way: Sequence[Leg], launches: int = 1) -> float:
        """Of an exchange that has the network to itself.

        Args:
            row: bytes of one row of each of a rank's tokens.
            way: its legs; each waits for the one before.
            launches: of each leg, counts and the like included.
        """
        return sum(max(row * leg.near / self.inside.rate, row * leg.far / self.between.rate)
                   + launches * (self.between if leg.far else self.inside).latency
                   for leg in way if launches and (leg.near or leg.far))

    def mean_seconds(self, payload: float, ranks: int, spread: int) -> float:
        """A mean of gradients over ``ranks`` of ``spread`` devices, as a ring."""
        if ranks < 2:
            return 0.0
        link = self.between if spread > self.node else self.inside
        return 2 * payload * (ranks - 1) / ranks / link.rate + link.latency
