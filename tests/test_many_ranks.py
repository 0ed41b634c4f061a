"""Eight and sixteen processes: the numbers of one, one order of collectives on all, no deadlock.

Random programs of collectives and compute run as they are and in our order, with ranks that come late; the order is right if
every rank finishes with the same values to the last bit.
"""
from __future__ import annotations

import os
import random
import tempfile
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from families import inputs, tiny
from ranks import run_ranks
from torch.fx.experimental.proxy_tensor import make_fx

import farskip_fx as fs
import test_expert_parallel as of_two
from farskip_fx.passes.costs import Rates
from farskip_fx.passes.schedule import schedule

C10D = torch.ops._c10d_functional


def program(seed: int, world: int, group: str):
    """A function of [4 * world, 8]: products, sums, and up to a dozen collectives, each awaited some steps later or at the end."""
    draw = random.Random(seed)
    plan = [(draw.choice(("product", "product", "sum", "launch", "launch", "wait")), draw.random(), draw.random(),
             draw.choice(("all_reduce", "all_to_all", "all_gather"))) for _ in range(draw.randint(12, 40))]

    def launched(kind: str, value: torch.Tensor) -> torch.Tensor:
        if kind == "all_reduce":
            return C10D.all_reduce(value, "sum", group)
        if kind == "all_gather":
            return C10D.all_gather_into_tensor(value[:4], world, group)
        return C10D.all_to_all_single(value, [4] * world, [4] * world, group)

    def run(x: torch.Tensor) -> torch.Tensor:
        values, flying = [x], []
        for kind, first, second, collective in plan:
            a, b = values[int(first * len(values))], values[int(second * len(values))]
            if kind == "product":
                values.append(torch.tanh(a @ (b.t() @ a)))
            elif kind == "sum":
                values.append(a + 0.5 * b)
            elif kind == "launch":
                flying.append(launched(collective, a.contiguous()))
            elif flying:
                values.append(torch.tanh(C10D.wait_tensor(flying.pop(int(first * len(flying))))))
        values += [torch.tanh(C10D.wait_tensor(one)) for one in flying]
        return torch.stack(values).sum(0)

    return run


def random_programs(rank: int, count: int) -> dict:
    world, group, moved = dist.get_world_size(), dist.group.WORLD.group_name, 0
    late = random.Random(rank)
    for seed in range(count):
        x = torch.randn(4 * world, 8, generator=torch.Generator().manual_seed(1000 * seed + rank))
        draw = random.Random(-seed)
        rates = Rates(matmul_flops=10 ** draw.uniform(5, 9), link_bytes=10 ** draw.uniform(4, 8), link_latency=10 ** draw.uniform(-6, -3))
        graph = make_fx(program(seed, world, group), tracing_mode="fake")(x)
        want = graph(x)
        moved += schedule(graph.graph, rates=rates).moved > 0
        graph.graph.lint()
        graph.recompile()
        if late.random() < 0.1:
            time.sleep(0.02)
        got = graph(x)
        assert torch.equal(got, want), f"program {seed} on rank {rank}: {(got - want).abs().max()}"
    return {"moved": moved}


@pytest.mark.parametrize("world, count", [(4, 3), pytest.param(8, 100, marks=pytest.mark.slow),
                                          pytest.param(16, 100, marks=pytest.mark.slow)])
def test_random_programs(world, count):
    found = run_ranks(random_programs, world_size=world, timeout=500, count=count)
    assert found == [found[0]] * world and found[0]["moved"] > count // 3


def equal_to_one_process(rank: int, exchange: str, experts: int) -> dict:
    model, reference = of_two.twins("qwen3_moe", num_experts=experts)
    fs.expert_parallel(model, exchange=exchange)
    return of_two.compare(model, reference, *of_two.rank_inputs("qwen3_moe", rank, exchange))


@pytest.mark.parametrize("world", [8, 16])
@pytest.mark.parametrize("exchange", ["all_to_all", "all_gather"])
def test_equal_to_one_process(world, exchange):
    """One expert on each of 16 ranks, two on each of 8."""
    assert run_ranks(equal_to_one_process, world_size=world, timeout=500, exchange=exchange, experts=16) == [{}] * world


def unlike_each_other(rank: int, folder: str, cold: bool) -> dict:
    """Started at different times, one with a warm cache and the others without, one with more threads."""
    own = Path(folder) / (f"cold-{rank}" if cold and rank else str(rank))
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(own)
    torch.set_num_threads(2 if rank == 1 else 1)
    time.sleep(0.7 * rank)
    model = tiny("qwen3_moe", num_hidden_layers=2)
    fs.expert_parallel(model)
    fs.apply(model)
    output = model(**inputs("qwen3_moe", seed=rank)).logits
    fs.check_agreement(model)
    return {"verified": output.isfinite().all().item() and fs.verify(model, **inputs("qwen3_moe", seed=rank)).ok}


@pytest.mark.slow
def test_ranks_that_are_unlike_each_other():
    with tempfile.TemporaryDirectory() as folder:
        for cold in (False, True):
            assert run_ranks(unlike_each_other, world_size=4, timeout=900, folder=folder, cold=cold) == [{"verified": True}] * 4
