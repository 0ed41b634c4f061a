"""The whole pipeline over two real gloo processes: rewired, scheduled, fenced, built by Inductor, forward and backward.

Each rank has its own tokens; the oracle is the unsharded model in this process (tests/oracle.py), with gradients from
plain autograd. Every case runs once more with one rank late, since a buffer that is read before its wait is usually
right when the other rank is early (DESIGN.md 6.2).
"""
import copy
import time

import pytest
import torch
import torch.distributed as dist
import torch._functorch.config
import torch._inductor.config

import families
import farskip_fx as fs
from compiled import logits_of, run_each
from farskip_fx.exchanges import EXCHANGES
from oracle import oracle
from ranks import run_ranks

TOLERANCE = 2e-5


def loss_of(logits):
    return (logits.float() * torch.linspace(-1, 1, logits.shape[-1])).square().mean()


def twins(family, **changes):
    """(model to shard, untouched copy), equal on all ranks: some families leave parameters uninitialised."""
    model = families.tiny(family, jitter=0.1, **changes)
    for tensor in [*model.parameters(), *model.buffers()]:
        dist.broadcast(tensor.detach(), 0)
    return model, copy.deepcopy(model)


def relative(got, want):
    return ((got - want).abs().max() / max(1.0, want.abs().max())).item()


def whole(rank, *, family, connectivity, overlap, exchange, train, changes):
    """Differences from the oracle on this rank: logits and gradients, over rounds in which rank 1, then 0, is late."""
    # Kernels may come from the cache, whole graphs may not: a cached one reports no schedule.
    torch._inductor.config.fx_graph_cache = torch._functorch.config.enable_autograd_cache = False
    model, plain = twins(family, **changes)
    tokens = families.inputs(family, seed=0 if exchange == "all_reduce" else rank)
    others = families.inputs(family, seed=1 - rank)
    fs.expert_parallel(model, dist.group.WORLD, exchange=exchange)
    compiled = torch.compile(model, backend="farskip", options={"connectivity": connectivity, "overlap": overlap})
    with torch.set_grad_enabled(train):
        want = oracle(family, plain, tokens, connectivity)
        if train:
            loss_of(want).backward()
            dense = {n: p.grad.clone() for n, p in plain.named_parameters() if p.grad is not None}
            # Experts see every rank's tokens.
            loss_of(oracle(family, plain, others, connectivity)).backward()
            both = {n: p.grad.clone() for n, p in plain.named_parameters() if p.grad is not None}
    worst = {"logits": 0.0, "gradients": 0.0}
    experts = fs.expert_parameters(model)
    for late in (None, 1, 0):
        dist.barrier()
        if rank == late:
            time.sleep(0.3)
        model.zero_grad()
        with torch.set_grad_enabled(train):
            got = logits_of(compiled(**tokens))
        worst["logits"] = max(worst["logits"], relative(got.detach(), want.detach()))
        if train:
            loss_of(got).backward()
            for name, parameter in model.named_parameters():
                if parameter.grad is None:
                    continue
                if name in experts:
                    expected = parameter._farskip_expert_group.take(both[name])
                else:
                    expected = dense[name]
                worst["gradients"] = max(worst["gradients"], relative(parameter.grad, expected))
    report = next(r for r in reversed(fs.last_reports()) if r.layers or connectivity == "none")
    return worst, len(report.schedules), [str(e) for e in report.errors]


SHORT = {"num_hidden_layers": 2}


@pytest.mark.parametrize("family, connectivity, overlap, exchange, train, changes", [
    ("qwen3_moe", "farskip", True, "all_to_all", True, SHORT),
    pytest.param("deepseek_v3", "farskip", True, "all_to_all", True, {}, marks=pytest.mark.slow),
    pytest.param("deepseek_v3", "farskip_shared", True, "all_to_all", True, {}, marks=pytest.mark.slow),
    pytest.param("qwen3_moe", "none", True, "all_to_all", False, SHORT, marks=pytest.mark.slow),
    pytest.param("qwen3_moe", "ladder", False, "all_to_all", False, SHORT, marks=pytest.mark.slow),
    pytest.param("qwen2_moe", "farskip", True, "all_reduce", False, SHORT, marks=pytest.mark.slow),
])
def test_inductor(family, connectivity, overlap, exchange, train, changes):
    for worst, schedules, errors in run_ranks(whole, timeout=500, family=family, connectivity=connectivity,
                                              overlap=overlap, exchange=exchange, train=train, changes=changes):
        assert max(worst.values()) <= TOLERANCE, worst
        assert errors == []
        assert schedules == (0 if not overlap else 2 if train else 1)


def every_connectivity(rank, *, families_, exchange):
    failures = []
    for family in families_:
        model, plain = twins(family)
        tokens = families.inputs(family, seed=0 if exchange == "all_reduce" else rank)
        fs.expert_parallel(model, dist.group.WORLD, exchange=exchange)
        names = ("none", "farskip", "farskip_shared", "attn_only", "mlp_only", "ladder")
        with torch.no_grad():
            results = run_each(model, tokens, [{"connectivity": n, "inner": "eager"} for n in names])
            for name, got in zip(names, results):
                want = oracle(family, plain, tokens, name)
                if isinstance(got, Exception) or relative(got, want) > TOLERANCE:
                    failures.append((family, name, got if isinstance(got, Exception) else relative(got, want)))
    return failures


@pytest.mark.parametrize("exchange", [pytest.param(name, marks=pytest.mark.slow) for name in EXCHANGES if name != "hierarchical"])
def test_every_connectivity_with_exchanges(exchange):
    """Rewiring alone, with the exchanges in the graph; openai_privacy_filter breaks without expert parallelism."""
    chosen = ["deepseek_v3", "gpt_oss", "openai_privacy_filter"]
    for failures in run_ranks(every_connectivity, timeout=500, families_=chosen, exchange=exchange):
        assert failures == []
