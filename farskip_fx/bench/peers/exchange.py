"""Asynchronous exchanges with a backward: a launch and a wait as two autograd functions, c10d handles between them.

    sent = exchange.dispatch(rows, counts)      launched; compute that does not need it may follow
    received = sent.land()                      waited for
    back = sent.send_back(outputs)              launched
    outputs = back.land()                       waited for

In backward the wait launches the gradient's exchange, and the launch waits for it.
"""
from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


class Exchange:
    """Of the ranks of the default group. Counts have a process group of their own: gloo runs one group as one queue, in which
    a few bytes would stand behind a whole dispatch."""

    def __init__(self) -> None:
        self.rows, self.counts = dist.new_group(), dist.new_group()
        self.size = dist.get_world_size()

    def dispatch(self, rows: Tensor, counts: Tensor) -> Dispatched:
        """``rows`` sorted by expert, ``counts`` of them for each expert."""
        received = torch.empty_like(counts)
        dist.all_to_all_single(received, counts, group=self.counts)
        send, receive = torch.stack([counts.view(self.size, -1).sum(1), received.view(self.size, -1).sum(1)]).tolist()
        return Dispatched(_Flight(self.rows, send, receive), rows, received)


class Dispatched:
    def __init__(self, flight: _Flight, rows: Tensor, counts: Tensor) -> None:
        self.flight, self.counts = flight, counts
        self.mark = _Launch.apply(rows, flight)

    def land(self) -> Tensor:
        """Rows by sender, and of each sender by expert: ``counts`` are in that order."""
        return _Wait.apply(self.mark, self.flight)

    def send_back(self, outputs: Tensor) -> Returning:
        return Returning(_Flight(self.flight.group, self.flight.receive, self.flight.send), outputs)


class Returning:
    def __init__(self, flight: _Flight, outputs: Tensor) -> None:
        self.flight = flight
        self.mark = _Launch.apply(outputs, flight)

    def land(self) -> Tensor:
        return _Wait.apply(self.mark, self.flight)


class _Flight:
    """One exchange, under way or landed, either way round."""

    def __init__(self, group: dist.ProcessGroup, send: list[int], receive: list[int]) -> None:
        self.group, self.send, self.receive = group, send, receive

    def start(self, source: Tensor, send: list[int], receive: list[int]) -> None:
        self.source = source.contiguous()                   # held until it has left
        self.result = source.new_empty(sum(receive), source.size(1))
        self.work = dist.all_to_all_single(self.result, self.source, receive, send, group=self.group, async_op=True)

    def land(self) -> Tensor:
        self.work.wait()
        result, self.result, self.source, self.work = self.result, None, None, None
        return result


# Between the two stands an empty mark: autograd compares shapes, and what travels has another one on each side.
class _Launch(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows: Tensor, flight: _Flight) -> Tensor:
        ctx.flight = flight
        flight.start(rows, flight.send, flight.receive)
        return rows.new_empty(0)

    @staticmethod
    def backward(ctx, mark: Tensor):
        return ctx.flight.land(), None


class _Wait(torch.autograd.Function):
    @staticmethod
    def forward(ctx, mark: Tensor, flight: _Flight) -> Tensor:
        ctx.flight = flight
        return flight.land()

    @staticmethod
    def backward(ctx, gradient: Tensor):
        ctx.flight.start(gradient, ctx.flight.receive, ctx.flight.send)
        return gradient.new_empty(0), None
