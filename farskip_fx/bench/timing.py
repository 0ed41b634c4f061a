"""Timing: one step of a model in phases, and the round robin over variants and link conditions.

The link and the machine drift, so nothing is measured in one block: every round runs every variant once under every
condition, in an order that turns from round to round.
"""
from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .exchanges import slowest
from .figures import Spread, fit_rounds
from .model import loss_of

Timed = Callable[[], list[float]]           # runs once, gives the seconds of its phases


class Step:
    """One step of a model: forward; or forward with loss, and backward; or these and ``update``. A phase each."""

    def __init__(self, logits_of: Callable[[Tensor], Tensor], model: nn.Module, ids: Tensor, train: bool,
                 update: Callable[[], None] | None = None) -> None:
        self.logits_of, self.model, self.ids, self.train, self.update = logits_of, model, ids, train, update
        self.logits: Tensor | None = None
        self.loss: Tensor | None = None

    def forward(self) -> None:
        with torch.set_grad_enabled(self.train):
            self.logits = self.logits_of(self.ids)
            self.loss = loss_of(self.logits, self.ids) if self.train else None

    def backward(self) -> None:
        self.loss.backward()

    def reset(self) -> None:
        """Drop what the last step left, so that the next one neither accumulates nor pays for freeing it."""
        self.model.zero_grad(set_to_none=True)
        self.logits = self.loss = None

    def phases(self) -> list[Callable[[], None]]:
        phases = [self.forward, self.backward] if self.train else [self.forward]
        return phases + [self.update] if self.update else phases

    def __call__(self) -> list[float]:
        self.reset()
        dist.barrier()
        marks = [time.perf_counter()]
        for phase in self.phases():
            phase()
            marks.append(time.perf_counter())
        return slowest([end - start for start, end in zip(marks, marks[1:])])


@dataclass(frozen=True)
class Condition:
    """A state of the link, and what is timed in it."""

    name: str
    rate: int | None
    runs: tuple[str, ...]


def interleave(timed: dict[str, Timed], conditions: list[Condition], set_rate: Callable[[int | None], None], *,
               rounds: int, budget_s: float, say: Callable[[str], None]) -> dict[tuple[str, str], Spread]:
    """Times by (condition, name)."""
    samples: dict[tuple[str, str], list[tuple[float, ...]]] = {}
    number = 0
    while number < rounds:
        start = time.perf_counter()
        for condition in conditions:
            set_rate(condition.rate)
            turn = number % len(condition.runs)
            for name in condition.runs[turn:] + condition.runs[:turn]:
                samples.setdefault((condition.name, name), []).append(tuple(timed[name]()))
        number += 1
        took = slowest([time.perf_counter() - start])[0]     # the same on every rank, so all do as many rounds
        if number == 1:
            rounds = fit_rounds(rounds, took, budget_s)
        say(f"round {number} of {rounds}, {took:.0f} s")
    set_rate(None)
    return {key: Spread(tuple(values)) for key, values in samples.items()}
