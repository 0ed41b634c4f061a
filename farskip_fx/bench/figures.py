"""From measured times to the figures that are reported. Pure functions; seconds in, seconds or ratios out.

The bound of the connectivity (farskip and ladder; DESIGN.md 6.12)
    The forward and the backward graph cannot overlap each other: the loss stands between. For each of them two things
    take at least their time, and the larger one counts:

        compute   all compute, and the exchanges that nothing may run beside (``alone``)
        chain     dispatch, routed experts, combine and router of every layer in turn, then what needs the last of them

    ``alone`` is the last combine in forward: only the final norm and the head are left, and both need it. The first
    dispatch is not in it, because the attention of layer 0 can run beside it. In backward nothing is in it: beside the
    first backward exchange the last layer's attention can go backward, and the weight gradients of the head.
    The chain in backward has only the input gradients of the experts (as many operations as their forward): their
    weight gradients need not be ready when the exchange leaves.

    Compute is the whole graph on the fast link, so it holds what an exchange costs the core. Routed experts, routers
    and the head are measured by themselves, at their best. Where a choice was open the smaller value was taken: no
    schedule of this connectivity should come out below the bound, apart from noise.

With means of gradients (mode step)
    The all-reduces of the buckets belong to the backward, and share the link with the exchanges of the experts. A third
    thing takes its time then, and the other two change:

        link      the exchanges and all means, one after the other
        compute   ``alone`` is the mean that leaves last. With dp 1 the experts' weight gradients (as many operations as
                  their forward) need no mean and can run beside it; with more replicas every gradient needs one, so
                  nothing can. Which bucket leaves last is open: the smallest mean was taken.
        chain     ends with the mean of the embedding's bucket, because the embedding's gradient is the last of all

    Every mean but the last can hide: a bucket is full long before the backward ends, and nothing waits for it. A bucket
    that holds the embedding and the first layers is the last one of any order that follows the backward; it counts among
    the ends (``beyond_reach``), beside the last forward and the first backward exchange.

    Clipping needs the whole norm and so every mean, and the optimizer needs the norm: this third phase overlaps nothing.
    Its bound is its time on the fast link; the norm's all-reduce is a few bytes.
"""
from __future__ import annotations

from dataclasses import dataclass
from statistics import median


@dataclass(frozen=True)
class Phase:
    """What was measured apart for one graph, forward or backward."""

    compute: float                          # the graph on the fast link
    exchanges: tuple[float, ...]            # each exchange alone on the slow link, in order
    serial: float                           # routed experts and routers: between exchanges of the chain
    alone: float                            # exchanges that nothing may run beside
    tail: float                             # compute that needs the last exchange (backward: that the first one needs)
    means: tuple[float, ...] = ()           # each mean of gradients alone on the slow link
    last: float = 0.0                       # the one of the embedding's bucket

    @property
    def bound(self) -> float:
        chain = sum(self.exchanges) + self.serial + self.tail + self.last
        return max(self.compute + self.alone, chain, sum(self.exchanges) + sum(self.means))


def bound(phases: list[Phase]) -> float:
    return sum(phase.bound for phase in phases)


def limit(compute: float, comm: float) -> float:
    """What no schedule of any connectivity can beat without sending less or computing less."""
    return max(compute, comm)


def hidden(stock: tuple[float, float], ours: tuple[float, float], beyond_reach: float = 0.0) -> float | None:
    """The part of what the slow link costs stock that it does not cost ours; each is (fast link, slow link), so that compute
    that ours saves does not count as hidden.

    ``beyond_reach`` is taken off first: the exchanges at the ends and the last mean, which no order hides; or all that the
    bound of the connectivity has above the fast link. None when the slow link costs stock nothing, as on loopback: then
    there is nothing to hide, and a ratio of noise would say nothing.
    """
    cost = stock[1] - stock[0]
    if cost - beyond_reach <= 0.05 * stock[0]:
        return None
    return (cost - (ours[1] - ours[0])) / (cost - beyond_reach)


@dataclass(frozen=True)
class Spread:
    """Repeated timings of one thing. Each sample is a list of phases, whose sum is the time."""

    samples: tuple[tuple[float, ...], ...]

    @property
    def median(self) -> float:
        return median(sum(sample) for sample in self.samples)

    @property
    def best(self) -> float:
        return min(sum(sample) for sample in self.samples)

    def phase(self, index: int) -> float:
        return median(sample[index] for sample in self.samples)

    def phases(self) -> tuple[float, ...]:
        return tuple(self.phase(index) for index in range(len(self.samples[0])))


def fit_rounds(asked: int, first_s: float, budget_s: float) -> int:
    """How many rounds fit the budget, given what the first one took: at least two, at most what was asked."""
    return max(min(asked, 2), min(asked, int(budget_s / max(first_s, 1e-9))))
