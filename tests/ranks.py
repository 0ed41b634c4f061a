"""Run a test function in several real processes joined by gloo over loopback.

    def add_one(rank, *, start):                     # at module level: the children import it
        t = torch.full((1,), float(start))
        dist.all_reduce(t)
        return t.item()

    assert run_ranks(add_one, world_size=2, start=1) == [2.0, 2.0]

Each rank is a process forked from one that has imported torch, transformers and the tests' models and run nothing, with one
OpenMP thread and no visible accelerator, inside an initialised default process group. Its result, or its traceback, comes back
as a file; nothing is shared with the parent, so that a rank which dies takes nothing with it. The first rank to fail ends the run: the others would wait for it in a collective.

`run_each_rank` is for tests of failures: it returns what became of each rank and waits for what the others make of it.
"""
from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

POLL_SECONDS = 0.05
GRACE_SECONDS = 3.0  # after the first failure: lets the other ranks report theirs
CHILD_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "TORCHINDUCTOR_COMPILE_THREADS": "1",  # a pool of compile workers per rank would swamp two cores
    "CUDA_VISIBLE_DEVICES": "",
    "GLOO_SOCKET_IFNAME": "lo",
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_VERBOSITY": "error",
}
PRELOADED = ["families", "oracle", "compiled"]     # with them torch, transformers and farskip_fx


class RankFailure(AssertionError):
    """One or more ranks raised, died or did not finish; the message has each one's traceback."""


def run_ranks(fn: Callable[..., Any], world_size: int = 2, *, timeout: float = 240.0, **kwargs: Any) -> list[Any]:
    """Calls `fn(rank, **kwargs)` on each rank and returns the results, by rank.

    Args:
        fn: importable at module level (the children import it by name).
        world_size: number of processes.
        timeout: seconds until every rank must have finished; also the timeout of the collectives.
        kwargs: picklable arguments of `fn`.

    Raises:
        RankFailure: with the traceback of each rank that raised, the exit code of one that died, or the names of those
            that did not finish.
    """
    outcomes = _run(fn, world_size, timeout, timeout, GRACE_SECONDS, True, kwargs)
    failures = sorted((o.when, o.text(rank, timeout)) for rank, o in enumerate(outcomes) if o.status != "returned")
    if failures:  # the first in time first: the others are often its echo ("connection closed")
        raise RankFailure("\n\n".join(text for _, text in failures))
    return [o.value for o in outcomes]


@dataclass(frozen=True)
class Outcome:
    """What became of a rank.

    Attributes:
        status: "returned", "raised", "died" (without a word) or "unfinished" (stopped by us).
        value: the result, the traceback, the exit code, or None.
        when: when it was written, for those that wrote something; unfinished ones come last.
    """

    status: str
    value: Any
    when: float

    def text(self, rank: int, timeout: float) -> str:
        return {
            "returned": f"rank {rank} returned {self.value!r}",
            "raised": f"rank {rank} raised:\n{self.value}",
            "died": f"rank {rank} died with exit code {self.value}",
            "unfinished": f"rank {rank} did not finish (stopped after another rank failed, or after {timeout:.0f} s)",
        }[self.status]


def run_each_rank(
    fn: Callable[..., Any],
    world_size: int = 2,
    *,
    timeout: float = 120.0,
    collective_timeout: float = 6.0,
    grace: float = 30.0,
    **kwargs: Any,
) -> list[Outcome]:
    """Like `run_ranks`, for functions that fail on purpose: nothing is raised, and no barrier stands at the end.

    Args:
        timeout: seconds until every rank must have ended; those that have not are killed.
        collective_timeout: of the process group.
        grace: seconds that the other ranks have after the first one failed.
    """
    return _run(fn, world_size, timeout, collective_timeout, grace, False, kwargs)


def _run(
    fn: Callable[..., Any],
    world_size: int,
    timeout: float,
    collective_timeout: float,
    grace: float,
    leave_together: bool,
    kwargs: dict,
) -> list[Outcome]:
    context = multiprocessing.get_context("forkserver")
    with tempfile.TemporaryDirectory(prefix="farskip_ranks_") as folder:
        # For the server, which starts with its first child (and up to Python 3.11 does not get our sys.path).
        with _environment({**CHILD_ENVIRONMENT, "PYTHONPATH": os.pathsep.join(sys.path)}):
            context.set_forkserver_preload(PRELOADED)
            children = [
                context.Process(
                    target=_child,
                    args=(fn, rank, world_size, folder, collective_timeout, leave_together, kwargs, dict(os.environ)),
                    daemon=True,
                )
                for rank in range(world_size)
            ]
            for child in children:
                child.start()
        try:
            _wait(children, time.monotonic() + timeout, grace)
        finally:
            unfinished = [rank for rank, child in enumerate(children) if child.is_alive()]
            for child in children:
                child.kill()
                child.join()
        return [_outcome(folder, rank, child, rank in unfinished) for rank, child in enumerate(children)]


def _child(
    fn: Callable[..., Any],
    rank: int,
    world_size: int,
    folder: str,
    collective_timeout: float,
    leave_together: bool,
    kwargs: dict,
    environment: dict[str, str],
) -> None:
    os.environ.update(environment)      # the server has that of its own start
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    try:
        import torch
        import torch.distributed as dist

        torch.set_num_threads(1)
        _wait_for_all(rank, world_size, folder)
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder}/rendezvous",  # no port to collide with another test run
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=collective_timeout),
        )
        outcome = ("returned", fn(rank, **kwargs))
        if leave_together:
            dist.barrier()  # a rank that leaves early closes connections that others may still read from
            dist.destroy_process_group()
    except BaseException:  # re-raised below: this is the only place where the child can still report
        _write(folder, rank, ("raised", traceback.format_exc()))
        raise SystemExit(1) from None
    _write(folder, rank, outcome)


def _wait_for_all(rank: int, world_size: int, folder: str) -> None:
    """Importing torch takes its time on a busy machine: longer than the timeout of a group may be."""
    Path(folder, f"here{rank}").touch()
    while not all(Path(folder, f"here{r}").exists() for r in range(world_size)):
        time.sleep(POLL_SECONDS)


def _write(folder: str, rank: int, outcome: tuple[str, Any]) -> None:
    """Writes under a temporary name first: the parent must never see half a file."""
    path = Path(folder, f"rank{rank}.pkl")
    partial = path.with_suffix(".partial")
    partial.write_bytes(pickle.dumps(outcome))
    partial.rename(path)


def _wait(children: list, deadline: float, grace: float) -> None:
    failed = False
    while any(child.is_alive() for child in children):
        now = time.monotonic()
        if now > deadline:
            return
        if not failed and any(child.exitcode not in (None, 0) for child in children):
            failed, deadline = True, min(deadline, now + grace)
        time.sleep(POLL_SECONDS)


def _outcome(folder: str, rank: int, child: Any, unfinished: bool) -> Outcome:
    path = Path(folder, f"rank{rank}.pkl")
    if path.exists():
        return Outcome(*pickle.loads(path.read_bytes()), path.stat().st_mtime)
    return Outcome("unfinished", None, float("inf")) if unfinished else Outcome("died", child.exitcode, 0.0)


@contextlib.contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    before = {key: os.environ.get(key) for key in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for key, value in before.items():
            if value is None:
                del os.environ[key]
            else:
                os.environ[key] = value
