"""The model's own exchanges, recorded once and repeated alone.

A ``Recorder`` notes every functional collective with its sizes and splits; ``replay`` repeats them with nothing between,
which is what "comm-only" means.

The recorder stands inside what a backend returns, never around compiled code: Dynamo skips a frame that it meets under a
dispatch mode, and skips it from then on, so every later compile of the same model would silently run eagerly (measured,
torch 2.13).
"""
from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any, Callable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ..passes._torch import process_group

SMALL_BYTES = 4096                         # below it an exchange is latency, above it bandwidth


@dataclass(frozen=True)
class Stub:
    """A tensor argument without its values."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        size = self.dtype.itemsize
        for extent in self.shape:
            size *= extent
        return size


@dataclass(frozen=True)
class Exchange:
    op: Any
    args: tuple
    rank: int                               # of this rank in the exchange's group, and the group's size
    size: int

    @property
    def kind(self) -> str:
        return self.op._schema.name.split("::")[-1]

    @property
    def payload(self) -> Stub:
        return next(arg for arg in self.args if isinstance(arg, Stub))

    @property
    def group(self) -> str:
        return self.args[-1]

    @property
    def leaving(self) -> float:
        """Bytes that this rank puts on the link."""
        whole, rank, world = self.payload.bytes, self.rank, self.size
        if self.kind == "all_to_all_single":
            splits = self.args[2]
            rows = sum(splits)
            if rows:
                return whole * (rows - splits[rank]) / rows
            return whole * (world - 1) / world if not splits else 0.0
        if self.kind == "all_gather_into_tensor":
            return whole * (world - 1)
        if self.kind == "reduce_scatter_tensor":
            return whole * (world - 1) / world
        if self.kind.startswith("all_reduce"):
            return 2 * whole * (world - 1) / world
        raise ValueError(f"the lab does not know how many bytes {self.kind} sends; add it to Exchange.leaving")

    @property
    def small(self) -> bool:
        return self.payload.bytes <= SMALL_BYTES

    def run(self) -> None:
        args = [torch.zeros(arg.shape, dtype=arg.dtype) if isinstance(arg, Stub) else arg for arg in self.args]
        torch.ops._c10d_functional.wait_tensor(self.op(*args))


class Recorder(TorchDispatchMode):
    """Notes exchanges wherever it is entered (``with recorder:``)."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Exchange] = []

    def inside(self, backend: Callable[..., Callable]) -> Callable[..., Callable]:
        """``backend``, whose forward is recorded; the backward runs outside of Dynamo and is recorded by ``with``."""
        def recorded_backend(gm: Any, example_inputs: list, **options: Any) -> Callable:
            compiled = backend(gm, example_inputs, **options)

            def run(*args: Any) -> Any:
                with self:
                    return compiled(*args)
            return run
        return recorded_backend

    def take(self) -> list[Exchange]:
        """What was recorded since the last time."""
        seen, self.seen = self.seen, []
        return seen

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        name = func._schema.name
        if name.startswith("_c10d_functional::") and not name.endswith("wait_tensor"):
            group = process_group(args[-1])
            self.seen.append(Exchange(func, tuple(_stub(arg) for arg in args), group.rank(), group.size()))
        return func(*args, **(kwargs or {}))


def _stub(arg: Any) -> Any:
    if isinstance(arg, Tensor):
        return Stub(tuple(arg.shape), arg.dtype)
    return list(arg) if isinstance(arg, (list, tuple)) else arg


def replay(exchanges: list[Exchange], *, late: float = 0.0) -> list[float]:
    """Seconds of each exchange, the slowest rank's. All ranks begin each one together: a lag that one exchange leaves
    behind would otherwise be counted again in the next.

    Args:
        late: as in a step: one rank, in turn, begins so many seconds later, not counted, but for an exchange right behind its
            counts. Of ranks that do not begin within a tenth of a millisecond of each other, gloo lets the later one send all that it
            has before the other begins.
    """
    times, behind_counts = [], False
    for number, exchange in enumerate(exchanges):
        waits = 0.0 if behind_counts else late
        if not (late and behind_counts):
            dist.barrier()
        start = time.perf_counter()
        if waits and number % dist.get_world_size() == dist.get_rank():
            time.sleep(waits)
        exchange.run()
        times.append(max(time.perf_counter() - start - waits, 1e-6))
        behind_counts = exchange.small
    return slowest(times)


def slowest(times: list[float]) -> list[float]:
    """Element by element the largest over the ranks, so that every rank goes on with the same figures."""
    told = torch.tensor(times, dtype=torch.float64)
    dist.all_reduce(told, dist.ReduceOp.MAX)
    return told.tolist()
