"""The ranks, each pinned to a core, and the conversation with them.

Contract
    ``run_ranks(link, module, spec_path, hear)`` starts ``python -m module`` once for each rank on its side of the link
    and calls ``hear(rank, event)`` for everything that a rank tells. It returns when all have ended well. A rank that
    fails ends the run with that rank's traceback; one that hangs ends it after ``silence_s``. Either way no child is
    left.

Terms
    event    one JSON line from a rank, read from a pipe of its own: what a library prints cannot be taken for one.
    request  an event of kind "rate": the rank waits on its standard input until the link has that rate.
"""
from __future__ import annotations

import json
import math
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Callable, Iterator

from .link import Link

POLL_S = 5.0                                # how often `idle` is called while the ranks say nothing
GRACE_S = 2.0                               # what a rank gets to end after another one failed


class RankFailed(RuntimeError):
    """A rank ended badly. The message carries its traceback."""


def run_ranks(link: Link, module: str, spec_path: Path, hear: Callable[[int, dict], None], *, silence_s: float,
              idle: Callable[[], None] = lambda: None, verbose: bool = False) -> None:
    with tempfile.TemporaryDirectory(prefix="farskip-") as folder, _terminable():
        ranks = [_Rank(rank, link, module, spec_path, Path(folder), verbose and rank == 0) for rank in range(link.ranks)]
        try:
            _listen(ranks, link, hear, idle, silence_s)
        finally:
            for rank in ranks:
                rank.end()


class _Rank:
    """One process: its event pipe, its standard input for answers, and a file with what it printed."""

    def __init__(self, rank: int, link: Link, module: str, spec_path: Path, folder: Path, verbose: bool) -> None:
        self.rank = rank
        read_end, write_end = os.pipe()
        self.events = os.fdopen(read_end, "rb", buffering=0)
        self.unread = b""
        self.log_path = folder / f"rank{rank}.log"
        self.log = self.log_path.open("wb")
        environment = {
            **os.environ,
            "RANK": str(rank), "WORLD_SIZE": str(link.ranks), "LOCAL_RANK": str(rank),
            "GLOO_SOCKET_IFNAME": link.device(rank),
            "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1",
            # Ranks meet in a file: all namespaces see it, and no port can be taken.
            "FARSKIP_BENCH_MEET": str(folder / "meet"), "FARSKIP_BENCH_EVENTS": str(write_end),
            "FARSKIP_BENCH_CORE": str(core_of(rank)), "FARSKIP_BENCH_SHARING": str(sharing(link.ranks)),
        }
        # What libraries print goes into a file, shown when the rank fails; verbose, to our standard error instead.
        output = sys.stderr.fileno() if verbose and _has_descriptor(sys.stderr) else self.log
        try:
            self.process = subprocess.Popen(
                link.enter(rank) + [sys.executable, "-m", module, str(spec_path)], env=environment,
                pass_fds=(write_end,), stdin=subprocess.PIPE, stdout=output, stderr=output)
        finally:
            os.close(write_end)

    def read(self) -> list[dict] | None:
        """The events that have arrived; None at the end of the pipe."""
        chunk = os.read(self.events.fileno(), 1 << 16)
        if not chunk:
            return None
        *lines, self.unread = (self.unread + chunk).split(b"\n")
        return [json.loads(line) for line in lines]

    def answer(self) -> None:
        self.process.stdin.write(b"ok\n")
        self.process.stdin.flush()

    def printed(self) -> str:
        self.log.flush()
        return self.log_path.read_text(errors="replace")[-4000:]

    def end(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self.process.stdin.close()
        self.events.close()
        self.log.close()


def _listen(ranks: list[_Rank], link: Link, hear: Callable[[int, dict], None], idle: Callable[[], None],
            silence_s: float) -> None:
    with selectors.DefaultSelector() as selector:
        for rank in ranks:
            selector.register(rank.events, selectors.EVENT_READ, rank)
        heard = time.monotonic()
        while selector.get_map():
            ready = selector.select(timeout=POLL_S)
            if not ready:
                idle()
                if time.monotonic() - heard > silence_s:
                    raise RankFailed(f"no rank said anything for {silence_s:.0f} s; the run was ended. Rank 0 printed "
                                     f"last:\n{ranks[0].printed()}")
                continue
            for key, _ in ready:
                rank = key.data
                events = rank.read()
                heard = time.monotonic()
                if events is None:
                    selector.unregister(rank.events)
                    _must_have_ended_well(rank)
                    continue
                for event in events:
                    if event["event"] == "rate":
                        link.set_rate(event["bits"])
                        rank.answer()
                    elif event["event"] == "failed":
                        raise RankFailed(_blame(rank, ranks, event, selector))
                    else:
                        hear(rank.rank, event)


def _must_have_ended_well(rank: _Rank) -> None:
    status = rank.process.wait()
    if status:
        by = f"signal {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"
        raise RankFailed(f"rank {rank.rank} ended with {by} and no traceback. It printed last:\n{rank.printed()}")


def _blame(first: _Rank, ranks: list[_Rank], event: dict, selector: selectors.BaseSelector) -> str:
    """The failure to show. When one rank fails the other one's connection breaks: that is a symptom, not the cause."""
    failures = {first.rank: event}
    others = [rank for rank in ranks if rank is not first]
    deadline = time.monotonic() + GRACE_S
    while others and time.monotonic() < deadline and _is_symptom(event):
        for key, _ in selector.select(timeout=0.2):
            for later in (key.data.read() if key.data in others else None) or ():
                if later["event"] == "failed":
                    failures[key.data.rank] = later
                    others = []
    causes = {rank: told for rank, told in failures.items() if not _is_symptom(told)} or failures
    return "\n".join(f"rank {rank} failed:\n{told['traceback']}" for rank, told in sorted(causes.items()))


def _is_symptom(event: dict) -> bool:
    return "Connection closed by peer" in event["traceback"] or "Connection reset by peer" in event["traceback"]


def core_of(rank: int) -> int:
    """The core that a rank runs on. Where there are too few they are dealt out in turn, so that the ranks that share
    experts (neighbours) are on different cores and wait for each other no longer than they must."""
    cores = sorted(os.sched_getaffinity(0))
    return cores[rank % len(cores)]


def sharing(ranks: int) -> int:
    """The most ranks that any core has."""
    return math.ceil(ranks / len(os.sched_getaffinity(0)))


def _has_descriptor(stream: Any) -> bool:
    try:
        stream.fileno()
    except (OSError, ValueError, AttributeError):
        return False                        # a captured stream, in a notebook or a test
    return True


@contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM unwinds like Ctrl-C, so that ranks are ended and namespaces removed."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def unwind(number: int, frame: Any) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, unwind)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
