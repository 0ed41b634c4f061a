"""``profile_kernels``: each kernel at its own shape, and the same seconds on every rank."""
import families
import pytest
import torch
from ranks import run_ranks

import farskip_fx as fs
from farskip_fx.kernels import kernels_of
from farskip_fx.passes import costs
from farskip_fx.passes.costs import Rates, kernel_key


def call(model):
    return dict(input_ids=torch.arange(64).view(2, 32) % model.config.vocab_size, use_cache=False)


@pytest.mark.parametrize("family, gradients", [("qwen3_moe", True), pytest.param("qwen3_moe", False, marks=pytest.mark.slow),
                                               pytest.param("deepseek_v3", True, marks=pytest.mark.slow)])
def test_every_kernel_of_a_model(family, gradients):
    model = families.tiny(family)
    nodes = kernels_of(model, gradients=gradients, **call(model))
    rates = fs.profile_kernels(model, rates=Rates(), gradients=gradients, **call(model))
    assert set(rates.measured) == set(nodes) and len(nodes) > 4
    kinds = {key.split()[0] for key in nodes}
    assert "mm" in kinds and any("grouped_mm" in kind for kind in kinds)
    assert any("backward" in kind for kind in kinds) == gradients
    for key, node in nodes.items():
        assert costs.compute_seconds(node, rates) == rates.measured[key] > 0


def test_their_seconds_are_in_the_prediction():
    model = families.tiny("qwen3_moe")
    kernels = {key: 1.0 for key in kernels_of(model, **call(model))}
    of = {name: fs.explain(model, config={"rates": rates}, gradients=False, fold=False, **call(model)).phases[0].after.seconds
          for name, rates in {"formulas": Rates(), "measured": Rates(kernels=kernels)}.items()}
    assert of["formulas"] < 1 < of["measured"]


def test_names():
    graph = torch.fx.Graph()
    a, b, bias = (graph.placeholder(name) for name in ("a", "b", "bias"))
    for node, shape in ((a, (4, 8)), (b, (8, 2)), (bias, (2,))):
        node.meta["val"] = torch.empty(shape, device="meta")
    plain = graph.call_function(torch.ops.aten.mm.default, (a, b))
    with_bias = graph.call_function(torch.ops.aten.addmm.default, (bias, a, b))
    added = graph.call_function(torch.ops.aten.add.Tensor, (plain, with_bias))
    for node in (plain, with_bias, added):
        node.meta["val"] = torch.empty(4, 2, device="meta")
    assert kernel_key(plain) == kernel_key(with_bias) == "mm float32[4, 8] float32[8, 2]"
    assert kernel_key(added) == ""


def test_round_trip():
    config = fs.FarskipConfig(rates={"kernels": {"mm float32[2, 2] float32[2, 2]": 0.5}})
    assert fs.FarskipConfig.from_json(config.to_json()) == config and hash(config.rates)
    with pytest.raises(fs.ConfigError, match="kernels must take more than 0 seconds"):
        fs.FarskipConfig(rates={"kernels": {"mm": 0.0}})
    with pytest.raises(fs.ConfigError, match="rates"):
        fs.FarskipConfig(rates={"kernels": 3})


def measured(rank):
    torch.manual_seed(0)
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (2,))
    model = fs.expert_parallel(families.tiny("qwen3_moe"), mesh)
    return fs.profile_kernels(model, rates=Rates(), gradients=False, **call(model))


def test_the_same_on_every_rank():
    one, other = run_ranks(measured, 2)
    assert one == other and any("grouped_mm" in key for key in one.measured)
