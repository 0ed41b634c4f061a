"""Sharded dense parameters: the training of the replicated ones, half the memory on two ranks, gathers in the schedule."""
import copy

import pytest
import torch
import torch._functorch.config
import torch._inductor.config
from torch import nn

import farskip_fx as fs
from farskip_fx.passes.prefetch import prefetch
from farskip_fx.sharding import MARK, dense_shards
from ranks import run_ranks
from test_data_parallel import batch, mesh_of, model_of, own_rows, reference, step

UNEVEN = 65         # rows of the embedding: two ranks pad it


def sharded(model, mesh, *, shard=True, **options):
    ours = fs.expert_parallel(copy.deepcopy(model), mesh["ep"])
    parallel = fs.data_parallel(ours, mesh["dp"], bucket_mb=0.005, shard=shard)     # several buckets
    return fs.apply(ours, **{"inner": "eager", "data_parallel": parallel, **options})


def slice_of(p, full):
    """The part of a whole tensor that this rank has of parameter ``p``."""
    found = getattr(p, MARK, None) or getattr(p, "_farskip_expert_group", None)
    return found.take(full) if found is not None else full


def difference(model, want):
    return max(((p.grad - slice_of(p, want[name])).abs().max() / want[name].abs().max().clamp(min=1e-6)).item()
               for name, p in model.named_parameters())


def train(model, optimizer, steps, rank):
    """[(loss, norm)] of clipped steps."""
    found = []
    for i in steps:
        ids = own_rows(batch(i), rank, 2)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        found.append((loss.item(), fs.clip_grad_norm_(model, 0.5).item()))
        optimizer.step()
        optimizer.zero_grad()
    return found


def everything(rank, *, folder):
    model, mesh = model_of(tie_word_embeddings=True, vocab_size=UNEVEN), mesh_of(1, 2)
    want, found = reference(model, batch(), "farskip"), {}

    torch._dynamo.reset()
    ours = sharded(model, mesh, inner="aot_eager")
    ours.gradient_checkpointing_enable()
    ours.train()
    found["share"] = sum(p.numel() for p in ours.parameters()) / sum(p.numel() for p in model.parameters())
    found["names"] = {n for n, _ in ours.named_parameters()} == {n for n, _ in model.named_parameters()}
    step(ours, own_rows(batch(), rank, 2))
    found["checkpointed"] = difference(ours, want)
    fs.check_agreement(ours)

    torch._dynamo.reset()
    ours = sharded(model, mesh)
    with fs.no_sync(ours):
        step(ours, own_rows(batch(), rank, 2))
    fs.reduce_gradients(ours)
    found["accumulated"] = difference(ours, want)

    torch._dynamo.reset()
    pairs = {}
    for shard in (True, False):
        one = sharded(model, mesh, shard=shard)
        pairs[shard] = (one, torch.optim.AdamW(one.parameters(), lr=1e-2))
        found[f"losses {shard}"] = train(*pairs[shard], range(3), rank)
    ours, optimizer = pairs[True]
    states = [fs.full_state_dict(one) for one, _ in pairs.values()]
    found["state"] = max((states[0][k] - states[1][k]).abs().max().item() for k in states[0])
    found["verified"] = bool(fs.verify(ours, input_ids=batch()[:2]))

    fs.save_checkpoint(f"{folder}/run", ours, optimizer, step=3)
    found["go on"] = train(ours, optimizer, range(3, 5), rank)
    torch._dynamo.reset()       # resumed with whole parameters, in another grid
    other = sharded(model_of(seed=1, tie_word_embeddings=True, vocab_size=UNEVEN), mesh_of(2, 1), shard=False)
    optimizer = torch.optim.AdamW(other.parameters(), lr=1e-2)
    fs.load_checkpoint(f"{folder}/run", other, optimizer)
    found["resumed"] = train(other, optimizer, range(3, 5), rank)
    fs.load_full_state_dict(ours, states[0])
    found["put back"] = max((fs.full_state_dict(ours)[k] - states[0][k]).abs().max().item() for k in states[0])
    return found


@pytest.mark.slow
def test_like_replicated(tmp_path):
    for found in run_ranks(everything, 2, folder=tmp_path):
        assert 0.5 <= found["share"] < 0.53 and found["names"] and found["verified"]
        for key in ("accumulated", "checkpointed", "state", "put back"):
            assert found[key] <= 1e-5, (key, found[key])
        for a, b in (("losses True", "losses False"), ("go on", "resumed")):
            torch.testing.assert_close(torch.tensor(found[a]), torch.tensor(found[b]), rtol=1e-5, atol=1e-5)


# --- without ranks ----------------------------------------------------------------------------------------------

@pytest.mark.slow
def test_gathered_again_and_asked_for_early(fake_group):
    """Inductor: each bucket is gathered in the forward and again in the backward, one bucket before it is needed, and no whole
    parameter is kept in between."""
    torch._dynamo.reset()
    model = fs.expert_parallel(model_of(), None)
    parallel = fs.data_parallel(model, None, bucket_mb=0.01, shard=True)
    fs.apply(model, data_parallel=parallel)
    with torch._inductor.config.patch(fx_graph_cache=False), torch._functorch.config.patch(enable_autograd_cache=False):
        step(model, batch()[:2])
        report = fs.last_reports()[-1]
        orders = report.schedules
    buckets = report.buckets
    assert buckets > 3 and len(orders) == 2
    for schedule in orders:
        gathers = [c for c in schedule.collectives if "all_gather" in c.op]
        assert len(gathers) == buckets - len(single_means(report))
        for early, late in zip(gathers, gathers[1:]):
            assert late.launch_index < early.wait_index, "the next bucket is in flight when this one is awaited"
        for first, _, third in zip(gathers, gathers[1:], gathers[2:]):
            assert third.launch_index > first.launch_index
    scatters = [c for c in orders[1].collectives if "reduce_scatter" in c.op]
    assert len(scatters) == len(gathers)


def single_means(report):
    return [c for c in report.collectives if c.op == "all_reduce of gradients"]


def test_prefetch_moves_only_what_is_made_of_arguments():
    """x0 -> gather 0 -> wait; a gather of something computed stays where it is."""
    graph = torch.fx.Graph()
    one, two, x = (graph.placeholder(name) for name in ("one", "two", "x"))
    ops = torch.ops._c10d_functional

    def gather(source):
        launched = graph.call_function(ops.all_gather_into_tensor.default, (source, 2, "group"))
        return launched, graph.call_function(ops.wait_tensor.default, (launched,))

    first, wait_first = gather(one)
    used = graph.call_function(torch.ops.aten.mul.Tensor, (x, wait_first))
    computed, wait_computed = gather(used)
    flat = graph.call_function(torch.ops.aten.view.default, (two, [-1]))
    second, wait_second = gather(flat)
    graph.output((wait_computed, wait_second))
    for node in graph.nodes:
        node.meta["val"] = torch.empty(4)
    assert prefetch(graph) == 1
    assert list(graph.nodes)[3:] == [first, flat, second, wait_first, used, computed, wait_computed, wait_second,
                                     graph.output_node()]


def test_replaced_parameter_is_refused(fake_group):
    model = model_of()
    fs.data_parallel(fs.expert_parallel(model, None), None, shard=True)
    with pytest.raises(fs.ConfigError, match="change the model before that"):
        model.model.norm.weight = nn.Parameter(torch.ones(16))
        model.model.norm.weight
    assert {name for name, *_ in dense_shards(model)} >= {"lm_head.weight", "model.embed_tokens.weight"}
