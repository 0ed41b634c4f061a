"""What an exchange carries and how long it takes, for any number of ranks.

Contract: numbers in, numbers out; routing is balanced. ``all_to_all`` sends a token to each rank once, however many of its
experts live there; ``all_to_all_pairs`` once for each of its experts (``farskip_fx/exchanges.py``).
"""
from __future__ import annotations

from dataclasses import dataclass

from ..routes import share_of_tokens
from .devices import Link


def copies(experts: int, top_k: int, ep: int, *, exchange: str = "all_to_all") -> float:
    """Rows that a token becomes on the other ranks, its own left out."""
    if exchange == "all_to_all_pairs":
        return top_k * (ep - 1) / ep
    return (ep - 1) * share_of_tokens(experts, experts // ep, top_k)


@dataclass(frozen=True)
class Network:
    """Nodes of ``node`` devices with a fast link inside, and a link between them for each device. Both work at once."""
    inside: Link
    between: Link
    node: int = 8

    def seconds(self, payload: float, ranks: int, launches: int = 1) -> float:
        """Of an exchange that has the network to itself; ``payload`` leaves each rank, as much to each of the others."""
        if ranks < 2 or not launches:
            return 0.0
        near = min(ranks, self.node) - 1
        far = ranks - 1 - near
        took = max(payload * near / (ranks - 1) / self.inside.rate, payload * far / (ranks - 1) / self.between.rate)
        return took + launches * (self.between if far else self.inside).latency

    def mean_seconds(self, payload: float, ranks: int, spread: int) -> float:
        """A mean of gradients over ``ranks`` of ``spread`` devices, as a ring."""
        if ranks < 2:
            return 0.0
        link = self.between if spread > self.node else self.inside
        return 2 * payload * (ranks - 1) / ranks / link.rate + link.latency
