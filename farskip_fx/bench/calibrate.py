"""Calibration: the rate that makes the exchanges take a given time, and this machine's rates for the scheduler.

A link's name is not its speed: at a nominal 400 Mbit/s TCP may reach 250. So the rate is found by measuring: set one,
time the model's exchanges on it, correct, again.
"""
from __future__ import annotations

import itertools
import time
from dataclasses import dataclass
from typing import Callable

import torch
from torch.nn import functional as F

from .exchanges import Exchange
from .spec import Shape, SpecError

CLOSE = 0.04                                # a calibrated time this near to its target is near enough
TRIES = 5
TYPICAL_YIELD = 0.7                         # of a nominal rate, for the first guess
STREAMED_BYTES = 256 << 20
SLOWEST_RATE, FASTEST_RATE = 1_000_000, 40_000_000_000


@dataclass(frozen=True)
class Calibrated:
    rate: int                               # nominal bits a second
    seconds: float                          # what the exchanges took at it
    target: float
    tries: int

    @property
    def close(self) -> bool:
        return abs(self.seconds / self.target - 1) <= 2 * CLOSE


def first_rate(leaving_bytes: float, target_s: float, floor_s: float) -> int:
    """A guess. ``floor_s`` is what the exchanges take on the unshaped link: that much no rate takes away."""
    return _within(8 * leaving_bytes / max(target_s - floor_s, 0.1 * target_s) / TYPICAL_YIELD)


def next_rate(rate: int, measured_s: float, target_s: float, floor_s: float) -> int:
    """Correct a rate. Only the part above the floor scales with it; a step is at most a factor of four."""
    wanted = max(target_s - floor_s, 0.05 * target_s)
    factor = max(measured_s - floor_s, 0.05 * target_s) / wanted
    return _within(rate * min(4.0, max(0.25, factor)))


def find_rate(time_at: Callable[[int], float], *, leaving_bytes: float, target_s: float, floor_s: float) -> Calibrated:
    """The rate at which ``time_at(rate)`` is ``target_s``, or the nearest that was tried."""
    rate = first_rate(leaving_bytes, target_s, floor_s)
    tried: list[Calibrated] = []
    for number in range(1, TRIES + 1):
        measured = time_at(rate)
        tried.append(Calibrated(rate, measured, target_s, number))
        if abs(measured / target_s - 1) <= CLOSE:
            break
        rate = next_rate(rate, measured, target_s, floor_s)
    return min(tried, key=lambda one: abs(one.seconds - target_s))


def _within(rate: float) -> int:
    return int(min(FASTEST_RATE, max(SLOWEST_RATE, rate)))


def link_rates(exchanges: list[Exchange], seconds: list[float]) -> dict[str, float]:
    """Latency from the small exchanges, bytes a second from the large ones with the latency taken off."""
    latency = min((took for exchange, took in zip(exchanges, seconds) if exchange.small), default=0.0)
    large = [(exchange.leaving, took) for exchange, took in zip(exchanges, seconds) if not exchange.small]
    if not large:
        raise SpecError("the model's exchanges are too small to measure a link with; take more --tokens or --hidden")
    # A small exchange may wait for the other rank longer than a large one takes; latency is then not to be trusted.
    carried, took = sum(sent for sent, _ in large), sum(max(took - latency, took / 4) for _, took in large)
    return {"link_bytes": carried / took, "link_latency": latency}


def compute_rates(shape: Shape, sharing: int) -> dict[str, float]:
    """A rank's speed at the model's own sizes: that of its core over the ranks that share it. A second or two."""
    width = shape.heads * shape.head_dim
    x, weight = torch.randn(shape.tokens, shape.hidden), torch.randn(width, shape.hidden)
    # A step's values do not come from the cache: go round over enough of them.
    streams = itertools.cycle([torch.randn_like(x) for _ in range(max(2, STREAMED_BYTES // (4 * x.numel())))])
    query = torch.randn(1, shape.heads, shape.tokens, shape.head_dim)
    mask = torch.ones(shape.tokens, shape.tokens, dtype=torch.bool).tril()[None, None]  # as transformers hands it over
    with torch.no_grad():
        matmul = sharing * best(lambda: F.linear(x, weight))
        attention = sharing * best(lambda: F.scaled_dot_product_attention(query, query, query, attn_mask=mask))
        memory = sharing * best(lambda: torch.mul(next(streams), 2.0))
    return {
        "matmul_flops": 2 * shape.tokens * shape.hidden * width / matmul,
        # Of the whole square: with a mask that is data the kernel skips nothing, and the cost model counts it all.
        "attention_flops": 4 * shape.heads * shape.tokens**2 * shape.head_dim / attention,
        "memory_bytes": 2 * x.numel() * x.element_size() / memory,
    }


def best(run: Callable[[], object], seconds: float = 0.3, least: int = 3) -> float:
    """The smallest time of several runs, after one that warms up. Time of this process: one that shares the core and runs
    between adds nothing."""
    run()
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < least or time.perf_counter() < end:
        start = time.process_time()
        run()
        times.append(time.process_time() - start)
    return min(times)
