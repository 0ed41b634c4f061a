"""Costs are formulas: each is checked against a number worked out by hand."""
import dataclasses
import json
import math

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from farskip_fx.passes import costs
from farskip_fx.passes.costs import PRESETS, Rates

RATES = Rates(matmul_flops=1e9, attention_flops=5e8, memory_bytes=1e9, link_bytes=1e6, link_latency=1e-3,
              kernel_overhead=0.0)


def test_rates_as_json():
    rates = dataclasses.replace(RATES, kernels={"mm a b": 1e-3}, links={"8x1": (2e9, 1e-5), "4x8": (1e9, 0.0)})
    assert Rates(**json.loads(json.dumps(rates.to_dict()))) == rates == Rates(**dataclasses.asdict(rates))
    assert rates.link_of_shape["4x8"] == (1e9, 0.0) and not {"links", "kernels"} & set(RATES.to_dict())
    for wrong in ((0, 1e-5), (1e9, -1)):
        with pytest.raises(ValueError, match="links"):
            Rates(links={"8x1": wrong})


def nodes_of(fn, *args, mode="fake"):
    gm = make_fx(fn, tracing_mode=mode)(*args)
    return {costs.op_name(n): n for n in gm.graph.nodes if n.op == "call_function"}, gm.graph


@pytest.mark.parametrize("fn, shapes, flops", [
    (torch.mm, [(8, 16), (16, 32)], 2 * 8 * 16 * 32),
    (torch.addmm, [(32,), (8, 16), (16, 32)], 2 * 8 * 16 * 32),
    (torch.bmm, [(4, 8, 16), (4, 16, 32)], 2 * 4 * 8 * 16 * 32),
    (torch.baddbmm, [(4, 8, 32), (4, 8, 16), (4, 16, 32)], 2 * 4 * 8 * 16 * 32),
    (lambda x, w: torch.conv2d(x, w), [(1, 3, 8, 8), (5, 3, 3, 3)], 2 * 5 * 6 * 6 * 3 * 9),
])
def test_matrix_products(fn, shapes, flops):
    nodes, graph = nodes_of(fn, *(torch.empty(s) for s in shapes))
    assert sum(costs.flops(n) for n in graph.nodes) == flops
    heavy = max(graph.nodes, key=costs.flops)
    assert costs.compute_seconds(heavy, RATES) == pytest.approx(max(flops / 1e9, costs.bytes_moved(heavy) / 1e9))


def test_same_factor_twice():
    nodes, _ = nodes_of(lambda x: x @ x, torch.empty(8, 8))
    assert costs.flops(nodes["mm"]) == 2 * 8 ** 3


def test_grouped_mm_splits_rows():
    """Each row meets one group's matrix: the number of groups does not matter."""
    offsets = torch.tensor([16, 32], dtype=torch.int32)
    nodes, _ = nodes_of(lambda a, b, o: torch._grouped_mm(a, b, offs=o), torch.empty(32, 16, dtype=torch.bfloat16),
                        torch.empty(2, 16, 64, dtype=torch.bfloat16), offsets)
    assert costs.flops(nodes["_grouped_mm"]) == 2 * 32 * 16 * 64


def test_transformers_fallback_forward_and_backward():
    pytest.importorskip("transformers.integrations.moe")
    offsets = torch.tensor([16, 32], dtype=torch.int32)
    op = torch.ops.transformers
    a, w, g = torch.empty(32, 16), torch.empty(2, 16, 64), torch.empty(32, 64)
    nodes, _ = nodes_of(lambda a, w, g, o: (op.grouped_mm_fallback(a, w, o),
                                            op.grouped_mm_fallback_backward(a, w, o, g)), a, w, g, offsets)
    assert costs.flops(nodes["grouped_mm_fallback"]) == 2 * 32 * 16 * 64
    assert costs.flops(nodes["grouped_mm_fallback_backward"]) == 2 * 2 * 32 * 16 * 64


@pytest.mark.parametrize("causal", [False, True])
def test_attention_on_cpu(causal):
    op = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    nodes, _ = nodes_of(lambda q, k, v: op(q, k, v, 0.0, causal), *(torch.empty(1, 4, 32, 8) for _ in range(3)))
    full = 2 * 4 * 32 * 32 * (8 + 8)
    node = nodes["_scaled_dot_product_flash_attention_for_cpu"]
    assert costs.flops(node) == full * (0.5 if causal else 1)
    assert costs.compute_seconds(node, RATES) == pytest.approx(costs.flops(node) / 5e8)


def test_attention_backward_is_two_and_a_half_forwards():
    def fn(q, k, v):
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v).sum()
        return torch.autograd.grad(out, (q, k, v))

    nodes, _ = nodes_of(fn, *(torch.empty(1, 4, 32, 8, requires_grad=True) for _ in range(3)))
    forward = costs.flops(nodes["_scaled_dot_product_flash_attention_for_cpu"])
    assert costs.flops(nodes["_scaled_dot_product_flash_attention_for_cpu_backward"]) == 2.5 * forward


def test_fused_chain_reads_and_writes_once():
    """x -> cos -> * y -> relu -> mm: the loop reads x and y and writes what mm reads; in between nothing is stored."""
    nodes, graph = nodes_of(lambda x, y, w: torch.relu(x.cos() * y) @ w, *(torch.empty(64, 64) for _ in range(3)))
    seconds = costs.graph_seconds(graph, RATES)
    loops = sum(s for n, s in seconds.items() if costs.is_light(n))
    assert loops == pytest.approx(3 * 64 * 64 * 4 / 1e9)
    alone = sum(costs.compute_seconds(n, RATES) for n in seconds if costs.is_light(n))
    assert alone == pytest.approx(7 * 64 * 64 * 4 / 1e9)


def test_views_sizes_and_constants_are_free():
    _, graph = nodes_of(lambda x: (x.view(-1)[3:].unsqueeze(0), x.split(2)[0], torch.empty(3)), torch.empty(8, 8))
    assert not any(costs.graph_seconds(graph, RATES).values())


def test_overhead_is_per_kernel():
    _, graph = nodes_of(lambda x, w: torch.relu(x @ w).cos() @ w, torch.empty(4, 4), torch.empty(4, 4))
    plain = sum(costs.graph_seconds(graph, RATES).values())
    with_overhead = dataclasses.replace(RATES, kernel_overhead=1.0)
    assert sum(costs.graph_seconds(graph, with_overhead).values()) - plain == pytest.approx(3)      # mm, loop, mm


def exchange(op, *args):
    name = "group"
    return lambda x: getattr(torch.ops._c10d_functional, op)(x, *args, name)


@pytest.mark.parametrize("op, args, payload", [
    ("all_to_all_single", ([2, 2, 2, 2], [2, 2, 2, 2]), 8 * 4 * 4 * 3 / 4),     # a quarter stays at home
    ("all_gather_into_tensor", (4,), 4 * 8 * 4 * 4 * 3 / 4),
    ("reduce_scatter_tensor", ("sum", 4), 8 * 4 * 4 * 3 / 4),
    ("all_reduce", ("sum",), 8 * 4 * 4),                                        # unknown group: two ranks
])
def test_payload(op, args, payload):
    nodes, _ = nodes_of(exchange(op, *args), torch.empty(8, 4))
    assert costs.payload(nodes[op]) == payload
    assert costs.link_seconds(nodes[op], RATES) == pytest.approx(1e-3 + payload / 1e6)
    assert costs.compute_seconds(nodes[op], RATES) == 0
    assert costs.group_of(nodes[op]) == "group"


def test_unbacked_sizes_take_their_hint():
    def fn(n, x, w):
        rows = n.sum().item()
        torch._check(rows >= 0)
        if hint:
            torch._dynamo.override_optimization_hint(rows, 100)
        return torch.ops._c10d_functional.all_to_all_single(x, [rows, rows], [4, 4], "group") @ w

    found = {}
    for hint in (True, False):
        nodes, _ = nodes_of(fn, torch.tensor([1, 2]), torch.empty(8, 16), torch.empty(16, 4), mode="symbolic")
        found[hint] = costs.flops(nodes["mm"]), costs.payload(nodes["all_to_all_single"])
    assert found[True] == (2 * 200 * 16 * 4, 200 * 16 * 4 / 2)
    assert found[False][0] > 0 and math.isfinite(found[False][1])


def test_rates_travel_as_json_and_refuse_nonsense():
    for rates in PRESETS.values():
        assert Rates(**json.loads(json.dumps(dataclasses.asdict(rates)))) == rates
    with pytest.raises(ValueError, match="link_bytes"):
        Rates(link_bytes=0)
    with pytest.raises(ValueError, match="link_queued"):
        Rates(link_queued=0.0)
    with pytest.raises(ValueError, match="link_compute_share"):
        Rates(link_compute_share=1.0)
