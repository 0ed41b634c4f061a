"""Activation checkpointing: the same gradients as without it, less memory, and no exchange runs twice.

What is compared against is the same model, compiled with the same options and without checkpointing, and once the
oracle (tests/oracle.py) with gradients from plain autograd. Memory is counted where AOTAutograd hands it over: what its
forward graph gives to its backward graph.
"""
import copy
import operator
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch.utils.checkpoint import CheckpointPolicy, checkpoint

import families
import farskip_fx as fs
from compiled import logits_of
from farskip_fx.passes._torch import compile_fx, optimization_hint
from farskip_fx.passes.checkpointing import inline_checkpoints, is_exchange
from oracle import oracle
from ranks import run_ranks

FAMILY, SMALL = "qwen2_moe", {"num_hidden_layers": 2}
INPUTS = families.inputs(FAMILY)
KEPT, AGAIN = CheckpointPolicy.MUST_SAVE, CheckpointPolicy.PREFER_RECOMPUTE


class Graphs:
    """The graphs that AOTAutograd made of one model, for ``inner="aot_eager"``."""

    def __init__(self):
        self.forward = self.backward = None

    def compile(self, gm, example_inputs):
        def keep(which):
            def compiler(graph, inputs):
                setattr(self, which, graph.graph)
                return make_boxed_func(graph.forward)
            return compiler
        return aot_autograd(fw_compiler=keep("forward"), bw_compiler=keep("backward"),
                            partition_fn=min_cut_rematerialization_partition)(gm, example_inputs)

    @property
    def saved(self):
        """Bytes that the forward computes and keeps for the backward."""
        taken = {n.name for n in self.backward.nodes if n.op == "placeholder"}
        values = [n.meta["val"] for n in self.forward.output_node().args[0]
                  if isinstance(n, torch.fx.Node) and n.op != "placeholder" and n.name in taken]
        return sum(optimization_hint(v.numel(), 0) * v.element_size() for v in values if isinstance(v, torch.Tensor))

    def exchanges(self, which):
        return sum(is_exchange(n) for n in getattr(self, which).nodes)

    def count(self, which, name):
        return sum(name in str(n.target) for n in getattr(self, which).nodes if n.op == "call_function")


def loss_of(logits):
    return (logits.float() * torch.linspace(-1, 1, logits.shape[-1])).square().mean()


def train(model, inputs, *, checkpointing, **options):
    """(gradients by name, graphs) of one step of a copy of ``model``."""
    torch._dynamo.reset()
    twin, graphs = copy.deepcopy(model).train(), Graphs()
    if checkpointing:
        twin.activation_checkpointing_enable()
    torch.manual_seed(0)
    with patch("farskip_fx.inner.aot_eager", graphs.compile):
        compiled = torch.compile(twin, backend="farskip", options={"inner": "aot_eager", **options})
        loss_of(logits_of(compiled(**inputs))).backward()
    return {n: p.grad for n, p in twin.named_parameters() if p.grad is not None}, graphs


def same(got, want, tolerance=1e-5):
    assert got.keys() == want.keys()
    for name, gradient in got.items():
        torch.testing.assert_close(gradient, want[name], rtol=0, atol=tolerance, msg=lambda text: f"{name}: {text}")


@pytest.fixture(scope="module")
def model():
    return families.tiny(FAMILY, jitter=0.1, **SMALL)


# --- gradients and memory -----------------------------------------------------------------------------------------

@pytest.mark.parametrize("connectivity", ["farskip", *(pytest.param(name, marks=pytest.mark.slow) for name in ("none", "ladder"))])
def test_same_gradients_in_less_memory(model, connectivity):
    want, plain = train(model, INPUTS, checkpointing=False, connectivity=connectivity)
    got, graphs = train(model, INPUTS, checkpointing=True, connectivity=connectivity)
    same(got, want)
    assert fs.last_reports()[-1].checkpoints.regions == 2
    assert graphs.saved < plain.saved / 10, (graphs.saved, plain.saved)
    assert graphs.count("backward", "mm") > 1.2 * plain.count("backward", "mm")     # computed again
    assert graphs.count("backward", "topk") == 0                                    # the routing is not
    if connectivity == "farskip":
        reference = copy.deepcopy(model).train()
        loss_of(oracle(FAMILY, reference, INPUTS, connectivity)).backward()
        same(got, {n: p.grad for n, p in reference.named_parameters() if p.grad is not None})


class Dropping(nn.Module):
    """A block behind which a dropout stands: over the routed and the shared experts, for one."""

    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, *args, **kwargs):
        result = self.block(*args, **kwargs)
        first = result[0] if isinstance(result, tuple) else result
        first = F.dropout(first, 0.3, self.training)
        return (first, *result[1:]) if isinstance(result, tuple) else first


def test_dropout_draws_the_same_masks_again():
    model = families.tiny(FAMILY, jitter=0.1, attn_implementation="eager", attention_dropout=0.2, **SMALL)
    for layer in model.model.layers:
        layer.mlp, layer.self_attn = Dropping(layer.mlp), Dropping(layer.self_attn)
    want, _ = train(model, INPUTS, checkpointing=False)
    got, graphs = train(model, INPUTS, checkpointing=True)
    same(got, want)
    assert graphs.count("backward", "run_with_rng_state") == 3 * len(model.model.layers)


def test_router_logits_of_checkpointed_layers(model):
    """transformers collects them by a hook inside the layer; the auxiliary loss is made of them."""
    found = []
    for checkpointing in (False, True):
        torch._dynamo.reset()
        twin = fs.apply(copy.deepcopy(model).train(), inner="aot_eager")
        if checkpointing:
            twin.gradient_checkpointing_enable()
        twin(**INPUTS, labels=INPUTS["input_ids"], output_router_logits=True).loss.backward()
        found.append({n: p.grad for n, p in twin.named_parameters()})
    same(*found)


@pytest.mark.parametrize("training", [True, False])
def test_without_gradients(model, training):
    """While it is evaluated, transformers' hook on the embedding still asks for gradients of its output."""
    torch._dynamo.reset()
    twin = fs.apply(copy.deepcopy(model).train(training), inner="aot_eager")
    twin.activation_checkpointing_enable()
    with torch.no_grad():
        torch.testing.assert_close(twin(**INPUTS).logits, oracle(FAMILY, model, INPUTS, "farskip"), rtol=0, atol=1e-5)
    if training:
        assert fs.verify(twin, **INPUTS).ok


# --- the pass -----------------------------------------------------------------------------------------------------

class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, gradient):
        return 2 * ctx.saved_tensors[0] * gradient


def region(x, w, call):
    y = call(lambda t: Square.apply(torch.tanh(t @ w)), x)
    first, kept = y.topk(2, dim=-1)
    return F.dropout(torch.sigmoid(y @ w), 0.4) + first.sum(-1, keepdim=True) * kept[:, :1], y


def layers(x, w, reentrant=False, checkpointing=True):
    def call(function, *args):
        return checkpoint(function, *args, use_reentrant=reentrant) if checkpointing else function(*args)

    for _ in range(2):
        x, y = call(lambda t: region(t, w, call), x)
    return (x * y).sum()


def gradients(options, compiler=None):
    """Gradients of ``layers`` with regions inlined, and the graph that they were inlined into."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    x, w = torch.randn(5, 4, requires_grad=True), torch.randn(4, 4, requires_grad=True)
    graphs, seen = Graphs(), []

    def backend(gm, example_inputs):
        seen.append((inline_checkpoints(gm), gm))
        gm.recompile()
        return (compiler or graphs.compile)(gm, example_inputs)

    torch.compile(lambda x, w: layers(x, w, **options), backend=backend, fullgraph=True)(x, w).backward()
    return {"x": x.grad, "w": w.grad}, *seen[0]


def inductor(gm, example_inputs):
    return compile_fx(gm, example_inputs, config_patches={})


@pytest.mark.parametrize("compiler, reentrant", [
    (None, False), (None, True), pytest.param(inductor, False, marks=pytest.mark.slow)])
def test_regions_inside_of_regions(compiler, reentrant):
    want, plain, _ = gradients({"checkpointing": False}, compiler=compiler)
    got, inlined, gm = gradients({"reentrant": reentrant}, compiler=compiler)
    same(got, want)
    assert plain.regions == 0 and inlined.regions == 2 and inlined.refused is None
    nodes = [n for n in gm.graph.nodes if "recompute" in n.meta]
    assert {n.meta["ac_graph_id"] for n in nodes} == {1, 2}
    # AOTAutograd's cache finds graphs by their code: tags must show in it.
    assert all(f"_ac{n.meta['ac_graph_id']}" in n.name for n in nodes)
    kept = {n for n in nodes if n.meta["recompute"] is KEPT}
    assert {str(n.target) for n in kept} == {"topk", str(operator.getitem)} and all("_kept" in n.name for n in kept)
    assert all(n.meta["recompute"] is AGAIN for n in nodes if n not in kept)
    inside = [m for m in gm.modules() if isinstance(m, torch.fx.GraphModule) and m is not gm]
    tagged = [m for m in inside if any("recompute" in n.meta for n in m.graph.nodes)]
    assert len(inside) == 4 and len(tagged) == 2       # the forward of Square, not its backward


# --- exchanges ----------------------------------------------------------------------------------------------------

def step_of_a_rank(rank, exchanges):
    """What ``test_no_exchange_runs_twice`` looks at, for an exchange and a connectivity each."""
    found = {}
    for exchange, connectivity in exchanges:
        model = families.tiny(FAMILY, jitter=0.1, **SMALL)
        for tensor in [*model.parameters(), *model.buffers()]:
            dist.broadcast(tensor.detach(), 0)
        fs.expert_parallel(model, dist.group.WORLD, exchange=exchange)
        tokens = families.inputs(FAMILY, seed=rank if exchange == "all_to_all" else 0)
        got, graphs = train(model, tokens, checkpointing=True, connectivity=connectivity)
        result = found[exchange] = {
            "saved": graphs.saved, "exchanges": (graphs.exchanges("forward"), graphs.exchanges("backward")),
            "read on the host": graphs.count("backward", "_local_scalar_dense")}
        if exchange == "all_to_all":
            want, plain = train(model, tokens, checkpointing=False, connectivity=connectivity)
            result["saved without"] = plain.saved
        else:       # not compiled at all
            loss_of(model.train()(**tokens).logits).backward()
            want = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        result["worst"] = max((got[n] - want[n]).abs().max().item() for n in want)
        result["all"] = got.keys() == want.keys()
    return found


@pytest.mark.parametrize("exchange, connectivity, counts", [
    pytest.param("all_to_all", "farskip", (12, 8), marks=pytest.mark.slow), pytest.param("all_reduce", "none", (4, 8), marks=pytest.mark.slow)])
def test_no_exchange_runs_twice(exchange, connectivity, counts):
    """Launches and waits, of two layers. all_to_all: counts, dispatch, combine; combine and dispatch again for the
    gradients. all_reduce: one sum, of the results; two in the backward, for the tokens and for the weights."""
    for found in run_ranks(step_of_a_rank, timeout=400, exchanges=[(exchange, connectivity)]):
        result = found[exchange]
        assert result["exchanges"] == counts and result["read on the host"] == 0, result
        assert result["all"] and result["worst"] <= 1e-5, result
        assert exchange == "all_reduce" or result["saved"] < result["saved without"] / 2, result
