"""``plan``: what a step would take on devices that are not here, with the original and another connectivity.

Contract: ``Traced`` and figures of devices and links in, ``Plan`` out, as data. Nothing is measured; what is left out stands in
``UNKNOWN``, and every view shows it.
"""
from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field

from ..errors import ConfigError
from ..passes.costs import Rates
from . import devices
from .chain import Step, Times, reads_of
from .exchanges import USUAL, Network, copies, exchanges_for, legs
from .traced import Traced, sizes

VERSION = 2
STANDARD, HALVES = "none", "halves"
GAIN = 1.03             # less is no gain: the prediction is not better than that
_LINK_FACTORS = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0, 2.0, 4.0, 8.0, 16.0)
_OPTIMIZER_BYTES = 12   # a parameter: master copy and two moments of Adam in float32
UNKNOWN = (
    "Routing is taken to be balanced. Skewed routing makes the slowest rank set the pace, in every variant.",
    "Kernels reach one share of the peak at every size; small experts (many ranks, few tokens) reach less.",
    "Exchanges take no compute units. NCCL and DeepEP take some: the overlapped variants then gain less.",
    "Routing limited to some groups or nodes (DeepSeek-V3) sends less between nodes than is counted here.",
    "Exchanges reach the link's rate at once; congestion between nodes and slow ranks are not in it.",
    "Means of gradients share the link with the exchanges, and are hidden as far as it has time; that the last one is exposed "
    "is not counted.",
    "halves: two halves of the batch, forward with forward and backward with backward; DualPipe, which mixes them, hides more.",
    "Attention is data parallel: no tensor, context or pipeline parallelism. Activations are kept, not recomputed.",
    "The converted model computes something else than the original, and needs distillation; halves is exact.",
)


def chunked(connectivity: str) -> str:
    """The variant with exchanges and experts in two chunks (``expert_parallel(chunks=2)``)."""
    return f"{connectivity}, 2 chunks"


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes of one rank."""
    weights: float
    gradients: float
    optimizer: float
    activations: float

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.optimizer + self.activations


@dataclass(frozen=True, kw_only=True)
class Predicted:
    """One variant. ``exposed_s``: compute stands still for an exchange or a mean of gradients."""
    name: str
    step_s: float
    exposed_s: float
    phases: tuple[Times, ...]


@dataclass(frozen=True, kw_only=True)
class Point:
    """One place: ``variants`` are the original connectivity, the chosen one, that with exchanges in two chunks, and two halves."""
    ep: int
    dp: int
    link_bytes: float
    compute_s: float
    link_s: float
    exchange_bytes: float       # that leave a rank in a step
    variants: tuple[Predicted, ...]
    memory: Memory
    fits: bool
    exchange: str = USUAL

    @property
    def gain(self) -> float:
        return self.variants[0].step_s / self.variants[1].step_s


@dataclass(frozen=True, kw_only=True)
class Plan:
    model: str
    connectivity: str
    training: bool
    gpus: int
    tokens: int
    context: int
    device: str
    link: str
    shard: bool
    rates: dict
    asked: Point
    by_ep: tuple[Point, ...]
    by_link: tuple[Point, ...]
    by_exchange: tuple[Point, ...]
    best: int | None            # ep of the fastest one that fits, with the chosen connectivity
    ends: dict = field(default_factory=dict)
    unknown: tuple[str, ...] = UNKNOWN
    version: int = VERSION
    table: int = devices.VERSION

    def to_dict(self) -> dict:
        def written(point: Point) -> dict:
            memory = {**dataclasses.asdict(point.memory), "total": point.memory.total}
            return {**dataclasses.asdict(point), "memory": memory, "gain": point.gain}

        return {**{f.name: getattr(self, f.name) for f in dataclasses.fields(self)}, "asked": written(self.asked),
                "by_ep": [written(p) for p in self.by_ep], "by_link": [written(p) for p in self.by_link],
                "by_exchange": [written(p) for p in self.by_exchange]}


class Planner:
    """
    Args:
        rates: of the device; its link's figures are not used, those of ``network`` are.
        capacity: bytes of the device; None: not known.
        shard: dense parameters, their gradients and optimizer states in slices over all ranks (``data_parallel(shard=True)``).
        updates: training has means of gradients and an optimizer.
    """

    def __init__(self, traced: Traced, rates: Rates, network: Network, *, connectivity: str = "farskip",
                 capacity: float | None = None, shard: bool = False, updates: bool = True) -> None:
        self.updates = updates
        self.traced, self.rates, self.network, self.shard, self.capacity = traced, rates, network, shard, capacity
        self.connectivity = connectivity
        self.whole, self.whole_rest = traced.pieces(rates)
        self.half, self.half_rest = traced.pieces(rates, half=True)
        self.reads = {name: reads_of(self.whole[0], name) for name in (STANDARD, connectivity)}

    def at(self, ep: int, dp: int, network: Network | None = None, exchange: str = USUAL) -> Point:
        """
        Raises:
            ConfigError: the experts cannot be split so.
        """
        if ep < 2 or self.traced.experts % ep:
            raise ConfigError(f"--ep {ep} does not divide the {self.traced.experts} experts of {self.traced.name}, or is "
                              f"below 2; take one of {', '.join(map(str, sizes(self.traced.experts, self.traced.experts)))}")
        network = network or self.network
        t = self.traced
        way = legs(exchange, experts=t.experts, top_k=t.top_k, ep=ep, node=network.node)
        a_row = 1 / copies(t.experts, t.top_k, t.ep)        # of what was traced

        def seconds(payload: float, launches: int) -> float:
            return network.seconds(payload * a_row, way, launches)

        names = (STANDARD, self.connectivity, chunked(self.connectivity), HALVES)
        variants = tuple(self._variant(name, ep, dp, seconds, network) for name in names)
        memory, first = self._memory(ep, dp), variants[0].phases
        link = network.between if ep > network.node else network.inside
        sent = sum(p.first + p.second for graph in self.whole for p in graph) * a_row * sum(leg.near + leg.far for leg in way)
        return Point(ep=ep, dp=dp, link_bytes=link.rate, compute_s=sum(t.compute for t in first),
                     link_s=sum(t.link for t in first), exchange_bytes=sent, variants=variants, memory=memory,
                     fits=self.capacity is None or memory.total <= self.capacity, exchange=exchange)

    def over_ep(self, gpus: int) -> tuple[Point, ...]:
        return tuple(self.at(ep, gpus // ep) for ep in sizes(self.traced.experts, gpus))

    def over_link(self, ep: int, dp: int) -> tuple[Point, ...]:
        """The link between nodes, faster and slower; where all ranks are in one node, the link inside."""
        points = []
        for factor in _LINK_FACTORS:
            which = "between" if ep > self.network.node else "inside"
            link = getattr(self.network, which)
            faster = dataclasses.replace(link, peak=link.peak * factor)
            point = self.at(ep, dp, dataclasses.replace(self.network, **{which: faster}))
            points.append(dataclasses.replace(point, link_bytes=faster.rate))
        return tuple(points)

    def over_exchanges(self, ep: int, dp: int) -> tuple[Point, ...]:
        return tuple(self.at(ep, dp, exchange=name) for name in exchanges_for(ep, self.network.node))

    def _variant(self, name: str, ep: int, dp: int, exchange, network: Network) -> Predicted:
        halves = name == HALVES
        pieces, rest = (self.half, self.half_rest) if halves else (self.whole, self.whole_rest)
        count = 2 if halves else 1
        # What belongs to no layer is the stream's additions; they stand between the layers, here in front.
        step = Step(layers=pieces, first=rest, head=[s / count for s in self._head()],
                    exchange=(lambda b, n: exchange(b / 2, n)) if halves else exchange,
                    chunk=self.half if name == chunked(self.connectivity) else None)
        reads = self.reads[STANDARD if name in (STANDARD, HALVES) else self.connectivity]
        phases = step.times(reads, copies=count, **self.rates.lanes)
        seconds = [t.seconds for t in phases]
        moved = self._parameters_moved(ep, dp, network)
        seconds = [max(own, t.link + more) for own, t, more in zip(seconds, phases, moved)]
        exposed = sum(s - t.seconds + t.exposed for s, t in zip(seconds, phases))
        return Predicted(name=name, step_s=sum(seconds) + self._update(ep, dp), exposed_s=exposed, phases=tuple(phases))

    def _head(self) -> list[float]:
        """Logits, and the loss in training: a product, and what goes through memory in float32."""
        t = self.traced
        product = 2.0 * t.hidden * t.vocab * t.tokens / self.rates.matmul_flops
        loops = t.tokens * t.vocab * 4.0 / self.rates.memory_bytes
        return [product + loops * (2 if t.training else 1), 2 * product + 2 * loops][:len(t.graphs)]

    def _parameters_moved(self, ep: int, dp: int, network: Network) -> list[float]:
        """Link seconds of what is no exchange: means of gradients; with ``shard`` parameters gathered in both phases."""
        t, ranks = self.traced, ep * dp
        if not self.updates:
            return [0.0, 0.0]
        dense, expert = t.dense * t.weight_bytes, t.expert / ep * t.weight_bytes
        one_way = network.mean_seconds(dense, ranks, ranks) / 2         # a gather, or a scatter of gradients
        forward = one_way if self.shard else 0.0
        if not t.training:
            return [forward]
        return [forward, 2 * one_way + network.mean_seconds(expert, dp, ranks)]     # gather and scatter, or a whole mean

    def _own(self, ep: int, dp: int) -> float:
        """Parameters that this rank updates."""
        return self.traced.dense / (ep * dp if self.shard else 1) + self.traced.expert / ep

    def _update(self, ep: int, dp: int) -> float:
        if not self.traced.training or not self.updates:
            return 0.0
        return self._own(ep, dp) * (2 * self.traced.weight_bytes + 2 * _OPTIMIZER_BYTES) / self.rates.memory_bytes

    def _memory(self, ep: int, dp: int) -> Memory:
        t, own = self.traced, self._own(ep, dp)
        kept = sum(p.kept for p in self.whole[0])
        logits = t.tokens * t.vocab * (4.0 + t.weight_bytes)
        if not t.training:
            widest = max((p.first + p.second for p in self.whole[0]), default=0.0)
            return Memory(weights=own * t.weight_bytes, gradients=0.0, optimizer=0.0, activations=2 * widest + logits)
        return Memory(weights=own * t.weight_bytes, gradients=own * t.weight_bytes, optimizer=own * _OPTIMIZER_BYTES,
                      activations=kept + 2 * logits)


def make(planner: Planner, *, gpus: int, ep: int, dp: int, device: str, link: str) -> Plan:
    """
    Raises:
        ConfigError: ``ep`` x ``dp`` are not the devices.
    """
    if ep * dp != gpus:
        raise ConfigError(f"--ep {ep} x --dp {dp} are {ep * dp} ranks, not the {gpus} of --gpus")
    asked, by_ep, by_link = planner.at(ep, dp), planner.over_ep(gpus), planner.over_link(ep, dp)
    fitting = [p for p in by_ep if p.fits]
    t = planner.traced
    return Plan(
        model=t.name, connectivity=planner.connectivity, training=t.training, gpus=gpus, tokens=t.tokens, context=t.context,
        device=device, link=link, shard=planner.shard, rates=planner.rates.to_dict(), asked=asked, by_ep=by_ep,
        by_link=by_link, by_exchange=planner.over_exchanges(ep, dp),
        best=min(fitting, key=lambda p: p.variants[1].step_s).ep if fitting else None,
        ends=where_it_ends(by_ep, by_link))


def where_it_ends(by_ep: Sequence[Point], by_link: Sequence[Point]) -> dict:
    """Link rates and numbers of ranks between which the chosen connectivity gains ``GAIN`` or more; the largest gain."""
    gaining = [p.link_bytes for p in by_link if p.gain >= GAIN]
    ranks = [p.ep for p in by_ep if p.gain >= GAIN]
    most = max(by_link, key=lambda p: p.gain)
    return {"gain": GAIN, "links": [min(gaining), max(gaining)] if gaining else None,
            "ep": [min(ranks), max(ranks)] if ranks else None, "most": most.gain, "most_at": most.link_bytes}
