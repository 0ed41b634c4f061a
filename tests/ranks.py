"""Run a test function in several real processes joined by gloo over loopback.

    def add_one(rank, *, start):                     # at module level: the children import it
        t = torch.full((1,), float(start))
        dist.all_reduce(t)
        return t.item()

    assert run_ranks(add_one, world_size=2, start=1) == [2.0, 2.0]

Each rank is a fresh interpreter (spawn) with one OpenMP thread and no visible accelerator, inside an initialised default
process group. Its result, or its traceback, comes back as a file; nothing is shared with the parent, so that a rank which
dies takes nothing with it. The first rank to fail ends the run: the others would wait for it in a collective.
"""
from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
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
    spawn = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory(prefix="farskip_ranks_") as folder:
        with _environment(CHILD_ENVIRONMENT):  # a spawned child takes the environment over when it starts
            children = [
                spawn.Process(target=_child, args=(fn, rank, world_size, folder, timeout, kwargs), daemon=True)
                for rank in range(world_size)
            ]
            for child in children:
                child.start()
        try:
            _wait(children, time.monotonic() + timeout)
        finally:
            unfinished = [rank for rank, child in enumerate(children) if child.is_alive()]
            for child in children:
                child.kill()
                child.join()
        return _collect(folder, children, unfinished, timeout)


def _child(fn: Callable[..., Any], rank: int, world_size: int, folder: str, timeout: float, kwargs: dict) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    try:
        import torch
        import torch.distributed as dist

        torch.set_num_threads(1)
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder}/rendezvous",  # no port to collide with another test run
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=timeout),
        )
        outcome = ("returned", fn(rank, **kwargs))
        dist.barrier()  # a rank that leaves early closes connections that others may still read from
        dist.destroy_process_group()
    except BaseException:  # re-raised below: this is the only place where the child can still report
        _write(folder, rank, ("raised", traceback.format_exc()))
        raise SystemExit(1) from None
    _write(folder, rank, outcome)


def _write(folder: str, rank: int, outcome: tuple[str, Any]) -> None:
    """Writes under a temporary name first: the parent must never see half a file."""
    path = Path(folder, f"rank{rank}.pkl")
    partial = path.with_suffix(".partial")
    partial.write_bytes(pickle.dumps(outcome))
    partial.rename(path)


def _wait(children: list, deadline: float) -> None:
    while any(child.is_alive() for child in children):
        now = time.monotonic()
        if now > deadline:
            return
        if any(child.exitcode not in (None, 0) for child in children):
            deadline = min(deadline, now + GRACE_SECONDS)
        time.sleep(POLL_SECONDS)


def _collect(folder: str, children: list, unfinished: list[int], timeout: float) -> list[Any]:
    """The results, or every failure, the first in time first: the others are often its echo ("connection closed")."""
    results, failures = [], []
    for rank, child in enumerate(children):
        path = Path(folder, f"rank{rank}.pkl")
        status, value = pickle.loads(path.read_bytes()) if path.exists() else ("died", child.exitcode)
        if status == "returned":
            results.append(value)
        elif status == "raised":
            failures.append((path.stat().st_mtime, f"rank {rank} raised:\n{value}"))
        elif rank in unfinished:
            message = f"rank {rank} did not finish (stopped after another rank failed, or after {timeout:.0f} s)"
            failures.append((float("inf"), message))
        else:
            failures.append((0.0, f"rank {rank} died with exit code {value}"))
    if failures:
        raise RankFailure("\n\n".join(message for _, message in sorted(failures)))
    return results


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
