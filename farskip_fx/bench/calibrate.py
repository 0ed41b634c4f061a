"""Calibration: the rate that makes the exchanges take a given time, and this machine's rates for the scheduler.

A link's name is not its speed: at a nominal 400 Mbit/s TCP may reach 250. So the rate is found by measuring: set one,
time the model's exchanges on it, correct, again.
"""
from __future__ import annotations

from dataclasses import dataclass
from typing import Callable

import torch
import torch.distributed as dist

from ..calibrate import compute_rates as device_rates
from .exchanges import Exchange
from .spec import Shape, SpecError

CLOSE = 0.04                                # a calibrated time this near to its target is near enough
TRIES = 5
TYPICAL_YIELD = 0.7                         # of a nominal rate, for the first guess
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


def compute_rates(shape: Shape) -> dict[str, float]:
    """A rank's speed at the model's own sizes, while all ranks compute."""
    return device_rates(device=torch.device("cpu"), dtype=torch.float32, hidden=shape.hidden, tokens=shape.tokens,
                        heads=shape.heads, head_dim=shape.head_dim, together=dist.barrier)
