"""An exchange that takes as long as over a slow link, on one GPU: a process group of one rank, on a stream of its own.

`init()` makes the default group one of a single rank whose collectives copy (what arrives is what was sent), on a side
stream, after an idle kernel of bytes / `LINK.rate` seconds. Launches and waits are those of any process group: the functional
collectives in a compiled graph go through PyTorch's own registry of work, and a wait makes the compute stream wait for the
side stream. So order and overlap on the device are real; numbers are those of one process; only the link is not.
"""
from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

BACKEND = "farskip_emulated"


class Link:
    """How fast, in bytes/s; None: no delay. Counts the bytes that it carried."""

    def __init__(self) -> None:
        self.rate: float | None = None
        self.carried = 0
        self.cycles_a_second = 1.0

    def delay(self, payload: int) -> int:
        """Clock cycles to idle."""
        self.carried += payload
        return int(payload / self.rate * self.cycles_a_second) if self.rate is not None else 0


LINK = Link()


@contextmanager
def slow(rate: float) -> Iterator[None]:
    """Within it the link takes bytes / ``rate`` seconds for an exchange."""
    LINK.rate = rate
    try:
        yield
    finally:
        LINK.rate = None


class _Work(dist.Work):
    """Done when the side stream has come to ``event``; keeps the tensors until somebody has waited."""

    def __init__(self, result: list[Tensor], event: torch.cuda.Event | None, held: list[Tensor]) -> None:
        super().__init__()
        self._event, self._held = event, held
        self._future = torch.futures.Future()
        self._future.set_result(result)

    def wait(self, timeout=None) -> bool:
        if self._event is not None:
            torch.cuda.current_stream().wait_event(self._event)
        self._held = []
        return True

    def is_completed(self) -> bool:
        return self._event is None or self._event.query()

    def get_future(self):
        return self._future


class EmulatedGroup(dist.ProcessGroup):
    """One rank."""

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        super().__init__(rank, size)
        self._name = ""
        self._stream = torch.cuda.Stream() if torch.cuda.is_available() else None

    def getBackendName(self) -> str:
        return BACKEND

    def _set_group_name(self, name: str) -> None:
        self._name = name

    def getGroupName(self) -> str:
        return self._name

    @property
    def group_name(self) -> str:
        return self._name

    def _copy(self, out: Tensor, source: Tensor) -> _Work:
        payload = source.numel() * source.element_size()
        if self._stream is None or not source.is_cuda:
            out.copy_(source.reshape(out.shape))
            return _Work([out], None, [])
        self._stream.wait_stream(torch.cuda.current_stream())       # what is sent must be there
        with torch.cuda.stream(self._stream):
            cycles = LINK.delay(payload)
            if cycles:
                torch.cuda._sleep(cycles)
            out.copy_(source.reshape(out.shape))
            event = torch.cuda.Event()
            event.record()
        return _Work([out], event, [out, source])

    # Names and signatures are those that c10d calls (torch/csrc/distributed/c10d/PyProcessGroup.hpp).
    def alltoall_base(self, output, source, output_splits, input_splits, options=None):
        return self._copy(output, source)

    def allreduce(self, tensors, options=None):
        return self._copy(tensors[0], tensors[0])

    def barrier(self, options=None):
        return _Work([], None, [])


def init(device: str = "cuda") -> None:
    """Make the default group one of a single emulated rank."""
    if not hasattr(dist.Backend, BACKEND.upper()):
        dist.Backend.register_backend(BACKEND, lambda store, rank, size, timeout: EmulatedGroup(rank, size),
                                      devices=[device])
    dist.init_process_group(BACKEND, rank=0, world_size=1, store=dist.HashStore())
    if device == "cuda":
        LINK.cycles_a_second = _clock()


def _clock() -> float:
    """Cycles of an idle kernel in a second."""
    cycles = 200_000_000
    torch.cuda._sleep(cycles)
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    torch.cuda._sleep(cycles)
    end.record()
    torch.cuda.synchronize()
    return cycles / (begin.elapsed_time(end) / 1e3)
