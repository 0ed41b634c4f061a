"""The exchange in two legs: nodes of several ranks, equal to the single process and to the exchange in one leg."""
import copy
import time

import families
import pytest
import test_expert_parallel as of_two
import torch
import torch.distributed as dist
from compiled import run_each
from oracle import oracle
from ranks import run_ranks
from torch.distributed.device_mesh import init_device_mesh

import farskip_fx as fs
from farskip_fx.connectivity import BUILT_IN as CONNECTIVITIES
from farskip_fx.passes._torch import fake_ranks


def mesh_of(nodes):
    return init_device_mesh("cpu", (nodes, dist.get_world_size() // nodes), mesh_dim_names=("node", "local"))


def equal_to_one_process(rank, nodes, cases):
    """By family and chunks: what differs, forward or in a gradient."""
    mesh, failures = mesh_of(nodes), {}
    for family, chunks in cases:
        model, reference = of_two.twins(family)
        fs.expert_parallel(model, mesh, exchange="hierarchical", chunks=chunks)
        failures[family, chunks] = of_two.compare(model, reference, *of_two.rank_inputs(family, rank, "hierarchical"))
    return failures


@pytest.mark.parametrize("world, nodes", [(4, 2), pytest.param(2, 1, marks=pytest.mark.slow),
                                          pytest.param(2, 2, marks=pytest.mark.slow),
                                          pytest.param(8, 2, marks=pytest.mark.slow)])
def test_equal_to_one_process(world, nodes):
    cases = [("deepseek_v3", 1)] if world == 8 else [("qwen3_moe", 2), ("deepseek_v3", 1)]
    found = run_ranks(equal_to_one_process, world, nodes=nodes, timeout=500, cases=cases)
    assert all(not wrong for failures in found for wrong in failures.values()), found


def rewired(rank, compiled):
    """Every connectivity as rewired graphs, then one through Inductor, forward and backward, in step and with a rank late."""
    mesh, failures = mesh_of(2), {}
    model, plain = of_two.twins("deepseek_v3")
    tokens = families.inputs("deepseek_v3", seed=rank)
    fs.expert_parallel(model, mesh, exchange="hierarchical")
    with torch.no_grad():
        options = [{"connectivity": name, "inner": "eager"} for name in CONNECTIVITIES]
        for name, got in zip(CONNECTIVITIES, run_each(model, tokens, options)):
            if isinstance(got, Exception):
                raise got
            failures[name] = of_two.difference(got, oracle("deepseek_v3", plain, tokens, name))
    if compiled:
        fs.apply(model)
        want = copy.deepcopy(plain)
        of_two.loss(oracle("deepseek_v3", want, tokens, "farskip")).backward()
        for late in (False, True):
            model.zero_grad(set_to_none=True)
            if late and rank == 3:
                time.sleep(0.3)
            of_two.loss(of_two.logits(model(**tokens))).backward()
            # Experts have gradients of the other ranks' tokens, too: test_equal_to_one_process.
            failures |= {f"compiled, {late=}, {name}": of_two.difference(p.grad, want.get_parameter(name).grad)
                         for name, p in model.named_parameters() if p.grad is not None and not hasattr(p, "_farskip_expert_group")}
        fs.check_agreement(model)
        assert len(failures) > 40
    return failures


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_rewired(compiled):
    for failures in run_ranks(rewired, 4, timeout=500, compiled=compiled):
        assert all(wrong <= 1e-5 for wrong in failures.values()), failures


def carried(rank):
    """Numbers that this rank sends to the other node for one layer: in two legs, and in one."""
    mesh, found = mesh_of(2), {}
    for exchange, group in (("hierarchical", mesh), ("all_to_all", None)):
        model = of_two.twins("qwen3_moe", num_experts=8, num_experts_per_tok=4, num_hidden_layers=1)[0]
        fs.expert_parallel(model, group, exchange=exchange)
        seen, launch = [], torch.ops._c10d_functional.all_to_all_single.default

        class Watch(torch.utils._python_dispatch.TorchDispatchMode):
            def __torch_dispatch__(self, op, types, args=(), kwargs=None):
                if op is launch:
                    ranks = dist.get_process_group_ranks(dist.distributed_c10d._resolve_process_group(args[3]))
                    away = sum(rows for rows, to in zip(args[2], ranks) if to // 2 != rank // 2)
                    seen.append(away * args[0][:1].numel() if args[0].dim() > 1 else 0)
                return op(*args, **(kwargs or {}))

        with torch.no_grad(), Watch():
            model(**families.inputs("qwen3_moe", seed=rank))
        found[exchange] = sum(seen)
    return found


@pytest.mark.slow
def test_a_token_crosses_once_for_each_node():
    for found in run_ranks(carried, 4):
        assert 0 < found["hierarchical"] < 0.9 * found["all_to_all"]


def test_what_it_refuses():
    fake_ranks(4)
    try:
        model = families.tiny("qwen3_moe")
        with pytest.raises(ValueError, match="needs a mesh of two dimensions, nodes and the ranks of a node"):
            fs.expert_parallel(model, exchange="hierarchical")
        with pytest.raises(ValueError, match="needs one mesh dimension"):
            fs.expert_parallel(model, mesh_of(2))
        fs.expert_parallel(model, mesh_of(2), exchange="hierarchical", payload="int8")
    finally:
        dist.destroy_process_group()
