"""The helper that runs ranks: results come back in order, and a failure says which rank and why."""
from __future__ import annotations

import os
import time

import pytest
import torch
import torch.distributed as dist
from ranks import RankFailure, run_ranks


def total(rank: int, start: int) -> tuple[int, float, int]:
    value = torch.tensor(float(start + rank))
    dist.all_reduce(value)
    return rank, value.item(), torch.get_num_threads()


def fail_on_one(rank: int) -> None:
    if rank == 1:
        raise LookupError("the reason")
    dist.barrier()


def die_on_one(rank: int) -> None:
    if rank == 1:
        os._exit(7)
    dist.barrier()


def sleep(rank: int) -> None:
    time.sleep(60)


def test_results_by_rank():
    assert run_ranks(total, start=1) == [(0, 3.0, 1), (1, 3.0, 1)]


def test_failure_has_the_traceback_of_the_rank():
    with pytest.raises(RankFailure, match=r"(?s)rank 1 raised:.*in fail_on_one.*LookupError: the reason"):
        run_ranks(fail_on_one)


def test_death_has_the_exit_code():
    with pytest.raises(RankFailure, match="rank 1 died with exit code 7"):
        run_ranks(die_on_one)


def test_timeout():
    with pytest.raises(RankFailure, match=r"rank 0 did not finish.*\n\nrank 1 did not finish"):
        run_ranks(sleep, timeout=8)
