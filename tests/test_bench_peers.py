"""The bench's peers compute what the eager reference computes, forward and backward, and its families are what they say."""
from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from farskip_fx.bench import families
from farskip_fx.bench.model import Reference, build, loss_of, relative_difference, tokens
from farskip_fx.bench.product import shard
from farskip_fx.bench.spec import FAMILIES, PEERS, Shape, Spec, SpecError
from farskip_fx.bench.variants import connectivity_of, ways_of
from ranks import run_ranks

TINY = Shape(layers=2, hidden=64, tokens=48, experts=8, moe_intermediate=32, heads=4, kv_heads=2, head_dim=16, vocab=64)


def shape_of(family, routing="balanced"):
    return replace(TINY, family=family, routing=routing, top_k=1 if family == "llama4" else 2)


def differences(rank, family, routing, names, inner):
    """{variant (how): (largest difference of logits, of a gradient)} on this rank, of its second step."""
    torch.set_num_threads(1)
    shape = shape_of(family, routing)
    ids, spec = tokens(shape, 0, rank), Spec(forward=shape, train=shape, modes=("train",), inner=inner)
    whole = build(shape, 0)
    wanted = {name: Reference.of(whole, ids, connectivity_of(name, spec), "train") for name in names}
    model = build(shape, 0)
    shard(model, spec, means=False)
    found = {}
    with torch._dynamo.config.patch(recompile_limit=64, capture_scalar_outputs=True):
        for name in names:
            for how, peer in ways_of(name, model, spec, None).items():
                for _ in range(2):
                    model.zero_grad(set_to_none=True)
                    logits = peer(ids, use_cache=False).logits
                    loss_of(logits, ids).backward()
                found[f"{name} ({how})"] = (
                    (logits - wanted[name].logits).abs().max().item(),
                    max(relative_difference(model.get_parameter(each).grad, gradient)
                        for each, gradient in wanted[name].gradients.items()))
                with torch.no_grad():
                    assert (peer(ids, use_cache=False).logits - wanted[name].logits).abs().max() < 1e-5
    dist.barrier()
    return found


@pytest.mark.parametrize("family,routing,names,inner", [
    ("deepseek", "balanced", PEERS, "eager"),
    pytest.param("llama4", "skewed", (*PEERS, "rewired_stock"), "eager", marks=pytest.mark.slow),
    pytest.param("qwen3_moe", "skewed", ("two_batches", "overlapped_eager"), "aot_eager", marks=pytest.mark.slow)])
def test_peers_agree_with_the_reference(family, routing, names, inner):
    for found in run_ranks(differences, family=family, routing=routing, names=names, inner=inner):
        assert len(found) == len(names)
        for name, (logits, gradients) in found.items():
            assert logits < 1e-5 and gradients < 1e-4, (name, logits, gradients)


@pytest.mark.parametrize("family", FAMILIES)
def test_families_are_what_they_say(family):
    model = build(shape_of(family), 0)
    kinds = [families.is_moe(layer) for layer in model.model.layers]
    assert kinds == ([False, True] if family in ("deepseek", "llama4") else [True, True])
    x = torch.randn(5, TINY.hidden)
    mlp = model.model.layers[-1].mlp
    weights, ids = families.routing_of(mlp, x)
    assert weights.shape == ids.shape == (5, 1 if family == "llama4" else 2)
    assert (families.shared_of(mlp, x) is None) == (family == "qwen3_moe")


@pytest.mark.parametrize("family", FAMILIES)
def test_skewed_routing_prefers_the_first_ranks_experts(family):
    def share_of_first_half(routing):
        from farskip_fx.bench.pieces import rows_per_expert

        shape = replace(shape_of(family, routing), tokens=256)
        rows = torch.tensor(rows_per_expert(build(shape, 0), tokens(shape, 0, 0))).float()
        return (rows[:, :TINY.experts // 2].sum() / rows.sum()).item()

    assert abs(share_of_first_half("balanced") - 0.5) < 0.15
    assert share_of_first_half("skewed") > 0.65


@pytest.mark.parametrize("spec, message", [
    (Spec(variants=("stock", *PEERS), modes=("step",)), "do not average"),
    (Spec(variants=("stock", *PEERS), connectivity="ladder"), "overlapped_eager is written for"),
    (Spec(forward=replace(TINY, family="llama4")), "top-1"),
    (Spec(forward=replace(TINY, family="gpt")), "--family gpt"),
    (Spec(forward=replace(TINY, routing="odd")), "--routing odd"),
])
def test_what_cannot_be_measured_is_refused(spec, message):
    with pytest.raises(SpecError, match=message):
        spec.check()
