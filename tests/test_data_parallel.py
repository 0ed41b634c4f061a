"""Data parallelism x expert parallelism on a 2-D mesh: gradients of one process that sees the whole batch."""
import copy
from typing import NamedTuple

import pytest
import torch
import torch._functorch.config
import torch._inductor.config
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

import farskip_fx as fs
from ranks import run_ranks

ROWS, LENGTH, VOCABULARY = 8, 12, 64


def model_of(seed=0, **changes):
    torch.manual_seed(seed)
    sizes = dict(hidden_size=16, intermediate_size=32, moe_intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
                 num_key_value_heads=1, head_dim=8, num_experts=4, num_experts_per_tok=2, vocab_size=VOCABULARY)
    return AutoModelForCausalLM.from_config(Qwen3MoeConfig(**{**sizes, **changes}))


def batch(step=0):
    return torch.randint(0, VOCABULARY, (ROWS, LENGTH), generator=torch.Generator().manual_seed(step))


def own_rows(ids, rank, world):
    return ids.view(world, -1, LENGTH)[rank]


def starve(model, half=1):
    """No token ever chooses this half of the experts: with two ranks, those of rank ``half`` get none, and the others all."""
    for layer in model.model.layers:
        with torch.no_grad():
            router = layer.mlp.gate.weight.chunk(2)
            router[half].zero_()
            router[1 - half].abs_().mul_(50)
            layer.post_attention_layernorm.weight.abs_()


def reference(model, ids, connectivity):
    """Gradients of a single process that sees the whole batch; the compiled graph is checked against the oracle elsewhere."""
    torch._dynamo.reset()
    whole = fs.apply(copy.deepcopy(model), connectivity=connectivity, inner="eager")
    whole(input_ids=ids, labels=ids).loss.backward()
    return {name: p.grad for name, p in whole.named_parameters()}


def largest_difference(model, want):
    """Relative; an expert's shard is compared with its part."""
    worst = 0.0
    for name, p in model.named_parameters():
        shard, full = getattr(p, "_farskip_expert_group", None), want[name]
        full = shard.take(full) if shard is not None else full
        got = p.grad if p.grad is not None else torch.zeros_like(p)
        worst = max(worst, ((got - full).abs().max() / want[name].abs().max().clamp(min=1e-6)).item())
    return worst


def parallel_model(model, mesh, **options):
    sharded = fs.expert_parallel(copy.deepcopy(model), mesh["ep"])
    return fs.apply(sharded, **{"data_parallel": mesh["dp"], "inner": "eager", **options})


def mesh_of(dp, ep):
    return init_device_mesh("cpu", (dp, ep), mesh_dim_names=("dp", "ep"))


def step(model, ids):
    model(input_ids=ids, labels=ids).loss.backward()


def same_everywhere(model, mesh):
    """Whether the ranks that hold the same parameter hold the same bits of it."""
    for p in model.parameters():
        group = mesh["dp"].get_group() if hasattr(p, "_farskip_expert_group") else None
        every = [torch.empty_like(p) for _ in range(dist.get_world_size(group))]
        dist.all_gather(every, p.detach(), group=group)
        if not all(torch.equal(every[0], other) for other in every):
            return False
    return True


class Case(NamedTuple):
    dp: int
    ep: int
    connectivity: str = "farskip"
    inner: str = "eager"
    starved: int | None = None          # the rank whose experts get no token
    exchange: str = "all_to_all"
    rows: tuple[int, ...] | None = None     # of each rank; None: equal


def gradients(rank, *, cases):
    """{case: largest relative difference from the whole batch}."""
    # A graph from the cache reports no schedule.
    torch._inductor.config.fx_graph_cache = torch._functorch.config.enable_autograd_cache = False
    found = {}
    for case in cases:
        torch._dynamo.reset()
        model, ids, mesh, world = model_of(tie_word_embeddings=True), batch(), mesh_of(case.dp, case.ep), case.dp * case.ep
        if case.starved is not None:
            starve(model, case.starved)
        want = reference(model, ids, case.connectivity)
        ours = fs.expert_parallel(copy.deepcopy(model), mesh["ep"], exchange=case.exchange)
        parallel = fs.data_parallel(ours, mesh["dp"], bucket_mb=0.005)      # several buckets
        fs.apply(ours, connectivity=case.connectivity, inner=case.inner, data_parallel=parallel)
        if case.rows:       # the mean over all ranks' labels, as HF Trainer asks for it
            own = ids.split(case.rows)[rank]
            ours(input_ids=own, labels=own, num_items_in_batch=ids[:, 1:].numel() / world).loss.backward()
        elif case.exchange == "all_reduce":     # the ranks of an expert group share a batch
            step(ours, own_rows(ids, rank // case.ep, case.dp))
        else:
            step(ours, own_rows(ids, rank, world))
        found[case] = largest_difference(ours, want)
        report = fs.last_reports()[-1]
        assert report.buckets > 2 and report.errors == []
        if case.inner == "inductor":        # the averages are in the schedule of the backward, beside the exchanges
            kinds = {c.kind for c in report.schedules[-1].collectives}
            assert kinds == {"all_reduce", "all_to_all_single"}, kinds
    return found


@pytest.mark.parametrize("cases", [
    pytest.param([Case(2, 2, inner="aot_eager"), Case(2, 2, starved=1)], marks=pytest.mark.slow),
    pytest.param([Case(1, 2, "none"), Case(1, 2, rows=(1, 7), starved=0)], marks=pytest.mark.slow),
    pytest.param([Case(1, 2, exchange="all_reduce", starved=0)], marks=pytest.mark.slow),
    pytest.param([Case(2, 1)], marks=pytest.mark.slow),
    pytest.param([Case(1, 2, inner="inductor", starved=1)], marks=pytest.mark.slow),
    [Case(1, 2, inner="aot_eager", starved=1)]])
def test_gradients_of_the_whole_batch(cases):
    for found in run_ranks(gradients, cases[0].dp * cases[0].ep, cases=cases):
        assert max(found.values()) <= 1e-5, found


def accumulation(rank):
    """Micro-steps that average each time, against no_sync and one average, against one process."""
    model, mesh = model_of(), mesh_of(2, 1)
    micro = [own_rows(batch(i), rank, 2) for i in range(3)]
    plain = copy.deepcopy(model)
    torch._dynamo.reset()
    whole = fs.apply(plain, inner="eager")
    for i in range(3):
        step(whole, batch(i))
    want = {name: p.grad for name, p in whole.named_parameters()}
    ours, found = parallel_model(model, mesh), {}
    for ids in micro:
        step(ours, ids)
    found["each"] = largest_difference(ours, want)
    ours.zero_grad()
    with fs.no_sync(ours):
        for ids in micro:
            step(ours, ids)
    found["before"] = largest_difference(ours, want)
    fs.reduce_gradients(ours)
    found["once"] = largest_difference(ours, want)
    found["verified"] = bool(fs.verify(ours, input_ids=micro[0]))
    with pytest.raises(fs.ConfigError, match="converted already"):
        fs.apply(ours, connectivity="farskip")
    return found


def training(rank):
    """50 clipped steps on dp 2 x ep 2, the norm of the whole model, and a parameter outside of the graph."""
    model, mesh = model_of(), mesh_of(2, 2)
    want = reference(model, batch(), "farskip")
    norm = torch.nn.utils.get_total_norm(want.values())
    torch._dynamo.reset()
    ours = parallel_model(model, mesh)
    step(ours, own_rows(batch(), rank, 4))
    got = fs.clip_grad_norm_(ours, 0.01)
    after = fs.clip_grad_norm_(ours, 1e9)
    largest = max(g.abs().max() for g in want.values())
    norms = (got.item(), norm.item(), after.item(), fs.clip_grad_norm_(ours, 1e9, float("inf")).item() * got.item() / 0.01,
             largest.item())
    optimizer = torch.optim.AdamW(ours.parameters(), lr=3e-3)
    losses = []
    for i in range(50):
        optimizer.zero_grad()
        ids = own_rows(batch(i % 4), rank, 4)
        loss = ours(input_ids=ids, labels=ids).loss
        loss.backward()
        fs.clip_grad_norm_(ours, 0.5)
        optimizer.step()
        losses.append(loss.item())
    outside = torch.nn.Linear(16, 2)
    ours.extra = outside        # not in any graph, but in the model that data_parallel looks at
    fs.data_parallel(ours, mesh["dp"])
    refused = ""
    try:
        outside(torch.ones(16)).sum().backward()
    except fs.GradientError as error:
        refused = str(error)
    del ours.extra
    return norms, same_everywhere(ours, mesh), losses, refused


@pytest.mark.slow
def test_accumulation():
    for found in run_ranks(accumulation, 2):
        assert found["each"] <= 1e-5 and found["once"] <= 1e-5 and found["before"] > 1e-2, found
        assert found["verified"]


@pytest.mark.slow
def test_replicas_stay_equal_and_a_parameter_outside_is_refused():
    results = run_ranks(training, 4)
    for norms, same, losses, refused in results:
        got, want, after, largest, want_largest = norms
        assert abs(got - want) <= 1e-5 * want and abs(after - 0.01) <= 1e-5 and abs(largest - want_largest) <= 1e-4 * want_largest
        assert same and ("extra.weight" in refused or "extra.bias" in refused)
        assert sum(losses[-4:]) < sum(losses[:4])
    assert len({norms[0] for norms, *_ in results}) == 1
