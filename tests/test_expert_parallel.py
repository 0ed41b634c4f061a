"""Expert parallelism over two real processes: equal to the single process, one graph, the way back, transformers' own door.

Rank functions stand at module level (tests/ranks.py starts them in fresh interpreters). Comparing gradients, with L_r the
loss of rank r: an expert's must be that of sum_r L_r, a dense parameter's that of L_r alone (expert_parallel.py, Gradients).
"""
from __future__ import annotations

import copy
import tempfile

import pytest
import torch
import torch.distributed as dist
from families import FAMILIES, inputs, tiny
from ranks import run_ranks
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

import farskip_fx as fs
from farskip_fx.exchanges import EXCHANGES
from farskip_fx.expert_parallel import (
    expert_parallel,
    expert_parameters,
    full_state_dict,
    gather_experts,
    load_full_state_dict,
)
from farskip_fx.passes._torch import fake_ranks

NO_INTERFACE = {"dbrx", "doge", "llama4", "nllb_moe", "step3p7", "switch_transformers"}
"""Families whose experts do not use transformers' experts interface (5.23): refused, with the reason."""
INTERFACE = [family for family in FAMILIES if family not in NO_INTERFACE]
# gated; shared expert and groups; transposed, biased and interleaved; transposed; biased; not gated; hashed routing
VARIED = ["qwen3_moe", "deepseek_v3", "gpt_oss", "aria", "openai_privacy_filter", "nemotron_h", "deepseek_v4"]
AMPLIFY_ROUNDING = {"qwen4_exp", "qwen3_next"}
"""Families whose fp32 gradients move by more than TOLERANCE when anything is summed in another order: compared in fp64,
where the difference must vanish."""
TOLERANCE = 1e-5


# ---------------------------------------------------------------------------------------------------------------------
# Helpers
# ---------------------------------------------------------------------------------------------------------------------


def twins(family: str, **changes) -> tuple[nn.Module, nn.Module]:
    """Two equal models, equal on all ranks too (a few families leave parameters uninitialised)."""
    model = tiny(family, jitter=0.1, **changes)
    if family in AMPLIFY_ROUNDING:
        model.double().set_experts_implementation("batched_mm")  # grouped_mm has no fp64
    for tensor in [*model.parameters(), *model.buffers()]:
        dist.broadcast(tensor.detach(), 0)
    return model, copy.deepcopy(model)


def logits(output) -> Tensor:
    return output["logits"] if isinstance(output, dict) else output.logits


def loss(output: Tensor) -> Tensor:
    """A sum with different weights: a plain mean would hide permuted tokens."""
    return (output * torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)).sum()


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def difference(actual: Tensor, expected: Tensor) -> float:
    """Largest deviation, relative to the largest entry where that is above one."""
    return ((actual - expected).abs().max() / max(1.0, expected.abs().max())).item()


def compare(model: nn.Module, reference: nn.Module, ours: dict, others: list[dict], forward=None) -> dict[str, float]:
    """Runs the sharded `model` on this rank's inputs and the reference on them and on the other ranks'; returns the
    differences above TOLERANCE, by "forward" or parameter name."""
    output = logits((model if forward is None else forward)(**ours))
    loss(output).backward()
    actual = gradients(model)

    expected_output = logits(reference(**ours))
    loss(expected_output).backward()
    dense = gradients(reference)
    for other in others:
        loss(logits(reference(**other))).backward()
    summed = gradients(reference)

    wrong = {"forward": difference(output, expected_output)}
    for name, parameter in model.named_parameters():
        shard = getattr(parameter, "_farskip_expert_group", None)
        expected = dense.get(name) if shard is None else shard.take(summed[name]) if name in summed else None
        if expected is None or name not in actual:
            # an expert that no token of any rank reaches may have a zero gradient or none
            wrong[name] = 0.0 if expected is None and (name not in actual or not actual[name].any()) else float("inf")
        else:
            wrong[name] = difference(actual[name], expected)
    return {name: value for name, value in wrong.items() if not value <= TOLERANCE}


def rank_inputs(family: str, rank: int, exchange: str) -> tuple[dict, list[dict]]:
    """This rank's inputs, and those of the others that the experts' gradients sum over."""
    if exchange == "all_reduce":  # replicated tokens: one loss
        return inputs(family, seed=0), []
    return inputs(family, seed=rank), [inputs(family, seed=other) for other in range(dist.get_world_size()) if other != rank]


class Recorder:
    """A Dynamo backend that keeps the Dynamo graphs and AOT's forward and backward graphs, and runs them as they are."""

    def __init__(self):
        self.dynamo, self.forward, self.backward = [], [], []

    def __call__(self, gm, example_inputs):
        from functorch.compile import make_boxed_func
        from torch._dynamo.backends.common import aot_autograd

        def keep(store):
            return lambda graph, _: store.append(graph) or make_boxed_func(graph.forward)

        self.dynamo.append(gm)
        return aot_autograd(fw_compiler=keep(self.forward), bw_compiler=keep(self.backward))(gm, example_inputs)


def communication(gm) -> dict[str, int]:
    """Name of each communication op in the graph -> how often."""
    found: dict[str, int] = {}
    for node in gm.graph.nodes:
        if "c10d" in str(node.target):
            found[str(node.target)] = found.get(str(node.target), 0) + 1
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Equal to the single process
# ---------------------------------------------------------------------------------------------------------------------


def families_equal(rank: int, families: list[str], exchange: str, chunks: int = 1) -> dict[str, dict[str, float]]:
    failures = {}
    for family in families:
        model, reference = twins(family)
        expert_parallel(model, exchange=exchange, chunks=chunks)
        ours, others = rank_inputs(family, rank, exchange)
        if wrong := compare(model, reference, ours, others):
            failures[family] = wrong
    return failures


def test_all_to_all_equals_single_process_on_every_family():
    assert run_ranks(families_equal, families=INTERFACE, exchange="all_to_all", timeout=420) == [{}, {}]


def test_all_reduce_equals_single_process():
    assert run_ranks(families_equal, families=VARIED, exchange="all_reduce") == [{}, {}]


def in_other_ways(rank: int) -> list[dict]:
    return [families_equal(rank, ["qwen3_moe", "gpt_oss"], "all_to_all", chunks=3),
            families_equal(rank, ["qwen3_moe", "deepseek_v3"], "all_to_all_pairs", chunks=2),
            families_equal(rank, ["qwen3_moe"], "all_to_all_pairs"), families_equal(rank, ["deepseek_v3"], "all_reduce", chunks=2),
            families_equal(rank, VARIED[:4], "all_gather"), families_equal(rank, ["qwen3_moe"], "all_gather", chunks=2)]


def test_chunks_and_pairs_equal_single_process():
    assert run_ranks(in_other_ways) == [[{}] * 6] * 2


def bytes_that_leave(rank: int) -> dict[str, list[int]]:
    """Rows of the dispatches, and bytes of a row, by exchange and payload: what the two kinds of exchange are for."""
    found = {}
    for exchange, payload in (("all_to_all", ""), ("all_to_all_pairs", ""), ("all_to_all", "int8"), ("all_to_all", "fp8")):
        model, _ = twins("qwen3_moe")
        expert_parallel(model, exchange=exchange, payload=payload)
        launched: list[list[int]] = []
        with Launches(launched), torch.no_grad():
            model(**inputs("qwen3_moe", seed=rank))
        found[f"{exchange} {payload}".strip()] = [launched[1][0], launched[1][1]]
    return found


class Launches(torch.utils._python_dispatch.TorchDispatchMode):
    """[rows, bytes a row] of each all-to-all."""

    def __init__(self, found: list) -> None:
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if "all_to_all_single" in str(function):
            rows = args[0]
            self.found.append([rows.size(0), rows.element_size() * rows[:1].numel()])
        return function(*args, **(kwargs or {}))


def test_a_token_goes_to_a_rank_once():
    for found in run_ranks(bytes_that_leave):
        pairs, hidden = found["all_to_all_pairs"][0], found["all_to_all_pairs"][1] // 4
        assert pairs == 2 * 16                                              # top 2 of 16 tokens
        assert 16 <= found["all_to_all"][0] < pairs                         # some tokens have both experts on one rank
        assert found["all_to_all"][1] == 4 * (hidden + 4)                   # two weights and two ids beside
        for payload in ("int8", "fp8"):
            assert found[f"all_to_all {payload}"] == [found["all_to_all"][0], hidden + 4 * (1 + 4)]   # and a scale


def rounded(rank: int) -> dict[str, float]:
    """What arrives against what the other rank sent, in units of the row's largest magnitude."""
    from farskip_fx.payload import travel

    worst, group = {}, dist.group.WORLD.group_name
    for payload, backward in (("int8", ""), ("fp8", "int8"), ("", "fp8")):
        for compiled in (False, True):
            of_rank = [torch.randn(6, 32, generator=torch.Generator().manual_seed(r)) for r in range(2)]
            weights = torch.linspace(-1, 1, 6 * 32).view(6, 32)
            rows, beside = of_rank[rank].clone().requires_grad_(), torch.full((6, 2), rank + 0.1).requires_grad_()
            call = torch.compile(travel, backend="aot_eager", fullgraph=True) if compiled else travel
            got, exact = call(rows, beside, [3, 3], [3, 3], group, payload=payload, backward_payload=backward)
            want = torch.cat([of_rank[0][3 * rank:][:3], of_rank[1][3 * rank:][:3]])
            (got * weights).sum().backward()
            # Rank r holds sent rows 0-2 in its rows 3 rank and so on: their gradients are the weights there.
            back = torch.cat([weights[3 * rank:][:3], weights[3 * rank:][:3]])
            name = f"{payload or 'exact'} {backward or 'exact'}"
            assert exact[:3].eq(torch.tensor(0.1)).all() and exact[3:].eq(torch.tensor(1.1)).all()
            worst[name] = max(worst.get(name, 0.0), ((got - want).abs().amax(1) / want.abs().amax(1)).max().item())
            name += " backward"
            worst[name] = max(worst.get(name, 0.0), ((rows.grad - back).abs().amax(1) / back.abs().amax(1)).max().item())
    return worst


def test_payloads_round_each_row_and_no_more():
    for worst in run_ranks(rounded):
        assert 0 < worst["int8 exact"] <= 0.5 / 127 + 1e-6 and worst["int8 exact backward"] == 0
        assert 0 < worst["fp8 int8"] <= 2 ** -4 and 0 < worst["fp8 int8 backward"] <= 0.5 / 127 + 1e-6
        assert worst["exact fp8"] == 0 and 0 < worst["exact fp8 backward"] <= 2 ** -4


def skewed_routing(rank: int) -> dict[str, list[dict]]:
    return {"eager": skewed_cases(rank, compiled=False), "compiled": skewed_cases(rank, compiled=True)}


def skewed_cases(rank: int, compiled: bool) -> list[dict]:
    """An experts module alone, with routing chosen by hand: (tokens per rank, experts they may choose)."""
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    cases = [
        ((16, 16), range(0, 4)),  # rank 1's experts receive no token at all
        ((16, 16), range(7, 8)),  # one expert receives every token
        ((5, 30), range(0, 8)),  # uneven batches
        ((0, 12), range(0, 8)),  # a rank without tokens
    ]
    config = MixtralConfig(hidden_size=16, intermediate_size=8, num_local_experts=8, experts_implementation="grouped_mm")
    results = []
    for counts, allowed in cases:
        torch.manual_seed(0)
        reference = MixtralExperts(config)
        for parameter in reference.parameters():
            nn.init.normal_(parameter)
        model = copy.deepcopy(reference)
        expert_parallel(model)
        torch._dynamo.reset()
        forward = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
        per_rank = [
            (torch.randn(n, 16), torch.randint(allowed.start, allowed.stop, (n, 2)), torch.rand(n, 2)) for n in counts
        ]

        tokens, ids, weights = (t.clone() for t in per_rank[rank])
        tokens.requires_grad_(), weights.requires_grad_()
        output = forward(tokens, ids, weights)
        loss(output).backward()
        # The reference takes all ranks' tokens; grouped_mm's backward refuses an empty batch, so it never sees one.
        all_tokens = torch.cat([t for t, _, _ in per_rank]).requires_grad_()
        all_weights = torch.cat([w for _, _, w in per_rank]).requires_grad_()
        mine = slice(sum(counts[:rank]), sum(counts[: rank + 1]))
        expected = reference(all_tokens, torch.cat([i for _, i, _ in per_rank]), all_weights)
        sum(loss(part) for part in expected.split(counts)).backward()
        pairs = {
            "forward": (output, expected[mine]),
            "tokens": (tokens.grad, all_tokens.grad[mine]),
            "weights": (weights.grad, all_weights.grad[mine]),
        }
        for name, parameter in expert_parameters(model).items():
            pairs[name] = (parameter.grad, parameter._farskip_expert_group.take(getattr(reference, name).grad))
        wrong = {name: difference(a, b) for name, (a, b) in pairs.items() if a.numel() and difference(a, b) > TOLERANCE}
        results.append(wrong)
    return results


@pytest.mark.slow
def test_skewed_routing():
    assert run_ranks(skewed_routing) == [{"eager": [{}] * 4, "compiled": [{}] * 4}] * 2


def sub_mesh(rank: int) -> dict[str, float]:
    """dp 2 x ep 2: ranks {0, 1} and {2, 3} each hold all experts once."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "ep"))
    model, reference = twins("mixtral")
    expert_parallel(model, mesh["ep"])
    neighbour = rank ^ 1
    return compare(model, reference, inputs("mixtral", seed=rank), [inputs("mixtral", seed=neighbour)])


@pytest.mark.slow
def test_one_dimension_of_a_mesh():
    assert run_ranks(sub_mesh, world_size=4) == [{}] * 4


# ---------------------------------------------------------------------------------------------------------------------
# One graph
# ---------------------------------------------------------------------------------------------------------------------


def compiled_families(rank: int, families: list[str], exchange: str) -> dict[str, dict]:
    """Without fullgraph, where a break would be silent; the last family once more with it."""
    results = {}
    for family, fullgraph in [*((family, False) for family in families), (families[-1], True)]:
        torch._dynamo.reset()
        model, reference = twins(family)
        expert_parallel(model, exchange=exchange)
        recorder = Recorder()
        wrong = compare(
            model,
            reference,
            *rank_inputs(family, rank, exchange),
            forward=torch.compile(model, backend=recorder, fullgraph=fullgraph),
        )
        splits = [n.meta["example_value"] for n in recorder.dynamo[0].graph.nodes if n.target == "item"]
        results[f"{family}{' fullgraph' * fullgraph}"] = {
            "wrong": wrong,
            "graphs": (len(recorder.dynamo), len(recorder.forward), len(recorder.backward)),
            "forward": communication(recorder.forward[0]),
            "backward": communication(recorder.backward[0]),
            "layers": len({id(p._farskip_expert_group) for p in expert_parameters(model).values()}),
            "hints": {torch.fx.experimental.symbolic_shapes.optimization_hint(split) for split in splits},
            "config leaked": torch._dynamo.config.capture_scalar_outputs,
        }
    return results


@pytest.mark.parametrize("families", [pytest.param(["deepseek_v3"], marks=pytest.mark.slow),
                                      pytest.param(["qwen3_moe", "gpt_oss", "nemotron_h"], marks=pytest.mark.slow)])
def test_all_to_all_is_one_graph(families):
    """Per layer, forward: counts, dispatch, combine; backward: the two big ones. All functional, one wait each."""
    for results in run_ranks(compiled_families, families=families, exchange="all_to_all"):
        for family, result in results.items():
            layers = result["layers"]
            assert result == {
                "wrong": {},
                "graphs": (1, 1, 1),
                "forward": {
                    "_c10d_functional.all_to_all_single.default": 3 * layers,
                    "_c10d_functional.wait_tensor.default": 3 * layers,
                },
                "backward": {
                    "_c10d_functional.all_to_all_single.default": 2 * layers,
                    "_c10d_functional.wait_tensor.default": 2 * layers,
                },
                "layers": layers,
                "hints": {16},  # 16 tokens x top 2, balanced over two ranks
                "config leaked": False,
            }, family


@pytest.mark.slow
def test_all_reduce_is_one_graph():
    """Per layer, forward: one sum; backward: the gradients of tokens and router weights."""
    for results in run_ranks(compiled_families, families=["qwen3_moe", "gpt_oss"], exchange="all_reduce"):
        for family, result in results.items():
            layers = result["layers"]
            assert (result["wrong"], result["graphs"]) == ({}, (1, 1, 1)), family
            assert result["forward"] == dict.fromkeys(
                ["_c10d_functional.all_reduce.default", "_c10d_functional.wait_tensor.default"], layers
            ), family
            assert result["backward"] == dict.fromkeys(
                ["_c10d_functional.all_reduce.default", "_c10d_functional.wait_tensor.default"], 2 * layers
            ), family


def changing_lengths(rank: int) -> tuple[list[float], set[int]]:
    model, reference = twins("qwen3_moe")
    expert_parallel(model)
    recorder = Recorder()
    compiled = torch.compile(model, backend=recorder, dynamic=True)
    wrong = []
    for length in (16, 12, 9, 20):
        sample = {"input_ids": inputs("qwen3_moe", seed=rank)["input_ids"].repeat(1, 2)[:, :length], "use_cache": False}
        with torch.no_grad():
            wrong.append(difference(compiled(**sample).logits, reference(**sample).logits))
    per_graph = {communication(gm)["_c10d_functional.all_to_all_single.default"] for gm in recorder.forward}
    return [value for value in wrong if value > TOLERANCE], per_graph


@pytest.mark.slow
def test_dynamic_shapes():
    """Whole graphs only (3 exchanges x 3 layers each), also where the number of tokens is a symbol."""
    assert run_ranks(changing_lengths) == [([], {9})] * 2


# ---------------------------------------------------------------------------------------------------------------------
# Sharded in place, and the way back
# ---------------------------------------------------------------------------------------------------------------------


def sharding(rank: int) -> None:
    model, reference = twins("gpt_oss")
    frozen = model.model.layers[0].mlp.experts.down_proj
    frozen.requires_grad_(False)
    assert expert_parallel(model) is model

    full = dict(reference.named_parameters())
    experts = expert_parameters(model)
    assert sorted(experts) == sorted(name for name in full if ".experts." in name) and len(experts) == 3 * 4
    for name, parameter in experts.items():
        assert torch.equal(parameter, full[name][4 * rank : 4 * rank + 4])
        assert parameter.untyped_storage().nbytes() == parameter.numel() * 4  # a copy, not a view that keeps the rest
        assert parameter._farskip_expert_group.group.rank == rank
        assert parameter.requires_grad == (name != "model.layers.0.mlp.experts.down_proj")
    assert {n for n, p in model.named_parameters() if hasattr(p, "_farskip_expert_group")} == set(experts)

    # DDP ignores them under both spellings
    compiled = torch.compile(model, backend="eager")
    for spelling in (model, compiled):
        ignored = set(spelling._ddp_params_and_buffers_to_ignore)
        assert ignored >= {n for n, p in spelling.named_parameters() if hasattr(p, "_farskip_expert_group")}

    # The exchange has a group of its own, one for all models; the model's config is not ours to change.
    group = experts["model.layers.0.mlp.experts.down_proj"]._farskip_expert_group.group
    assert group.name != dist.group.WORLD.group_name
    assert not model.config._experts_implementation.startswith("farskip")
    second = expert_parallel(reference)
    assert next(iter(expert_parameters(second).values()))._farskip_expert_group.group.name == group.name

    # A copy still exchanges
    with torch.no_grad():
        expected = model(**inputs("gpt_oss")).logits
        assert torch.equal(copy.deepcopy(model)(**inputs("gpt_oss")).logits, expected)

    with pytest.raises(ValueError, match=r"mlp\.experts \(GptOssExperts\) is sharded already: call gather_experts"):
        expert_parallel(model)


def test_sharded_in_place():
    run_ranks(sharding)


def way_back(rank: int, path: str) -> None:
    from transformers import AutoModelForCausalLM

    model, reference = twins("qwen3_moe")
    expected = reference.state_dict()
    expert_parallel(model)

    state = full_state_dict(model)
    assert list(state) == list(expected) and all(torch.equal(state[name], expected[name]) for name in expected)

    if rank == 0:  # an ordinary checkpoint
        model.save_pretrained(path, state_dict=state)
    dist.barrier()
    loaded = AutoModelForCausalLM.from_pretrained(path).state_dict()
    assert all(torch.equal(loaded[name], expected[name]) for name in expected)

    changed = {name: tensor + 1 for name, tensor in expected.items()}
    load_full_state_dict(model, changed)
    assert all(torch.equal(tensor, changed[name]) for name, tensor in full_state_dict(model).items())
    with pytest.raises(ValueError, match="has 4 experts in the state dict, the model 8: pass a full state dict"):
        load_full_state_dict(model, model.state_dict())

    load_full_state_dict(model, expected)
    gather_experts(model)
    assert expert_parameters(model) == {} and model._ddp_params_and_buffers_to_ignore == []
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())
    with torch.no_grad():
        assert torch.equal(model(**inputs("qwen3_moe")).logits, reference(**inputs("qwen3_moe")).logits)
    expert_parallel(model, exchange="all_reduce")  # and once more, differently


def test_way_back():
    with tempfile.TemporaryDirectory() as path:
        run_ranks(way_back, path=path)


# ---------------------------------------------------------------------------------------------------------------------
# Refusals
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def fake_world():
    """A default group of three ranks in this process: enough for errors, which come before any communication."""
    fake_ranks(3)
    yield
    dist.destroy_process_group()


@pytest.fixture
def two_fake_ranks():
    """For experts that really are sharded, where nothing has to arrive."""
    fake_ranks(2)
    yield
    dist.destroy_process_group()


def test_needs_torch_distributed():
    with pytest.raises(RuntimeError, match="call torch.distributed.init_process_group first"):
        expert_parallel(tiny("qwen3_moe"))


def test_group_must_divide_the_experts(fake_world):
    model = tiny("qwen3_moe")
    before = {name: tuple(p.shape) for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.experts \(Qwen3MoeExperts\) has 8 experts, which 3 ranks do"):
        expert_parallel(model)
    assert {name: tuple(p.shape) for name, p in model.named_parameters()} == before


@pytest.mark.parametrize("family", sorted(NO_INTERFACE))
def test_families_without_the_interface_are_refused(fake_world, family):
    with pytest.raises(ValueError, match="has no experts that expert_parallel can find.*use_experts_implementation"):
        expert_parallel(tiny(family))


def test_unknown_exchange(fake_world):
    with pytest.raises(ValueError, match="exchange='allgather' is unknown: use one of 'all_to_all', 'all_to_all_pairs', 'hierarchical', 'all_gather', 'all_reduce'"):
        expert_parallel(tiny("qwen3_moe"), exchange="allgather")


@pytest.mark.parametrize("options, reason", [
    ({"chunks": 0}, "chunks must be .auto. or a whole number of at least 1, got 0"),
    ({"payload": "int4"}, "payload='int4' is unknown: use one of '', 'int8', 'fp8'"),
    ({"payload": "int8", "exchange": "all_reduce"}, "exchange='all_reduce' sums on its way"),
])
def test_options_that_are_refused(fake_world, options, reason):
    with pytest.raises(ValueError, match=reason):
        expert_parallel(tiny("qwen3_moe"), **options)


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "deepseek_v3"])
@pytest.mark.parametrize("link_bytes, chunks", [(1e6, 4), (1e12, 1)])
def test_chunks_where_they_pay(two_fake_ranks, family, link_bytes, chunks):
    model = expert_parallel(tiny(family), chunks="auto", rates=fs.Rates(link_bytes=link_bytes))
    assert {p._farskip_expert_group.options.chunks for p in expert_parameters(model).values()} == {chunks}


def test_payload_is_part_of_the_conversion(two_fake_ranks):
    model = fs.apply(expert_parallel(tiny("qwen3_moe"), payload="int8"))
    assert model.config.farskip["payload"] == "int8" and "backward_payload" not in model.config.farskip
    loaded = tiny("qwen3_moe")
    loaded.config.farskip = model.config.farskip            # as its checkpoint has it
    with pytest.raises(ValueError, match="payload='fp8' disagrees with what the model was converted with, 'int8'"):
        expert_parallel(loaded, payload="fp8")
    expert_parallel(loaded)
    assert {p._farskip_expert_group.options.payload for p in expert_parameters(loaded).values()} == {"int8"}
    fs.apply(loaded)
    with pytest.raises(fs.ConfigError, match="payload='fp8', but the experts are sharded with ''"):
        fs.apply(expert_parallel(tiny("qwen3_moe")), payload="fp8")


def test_mesh_of_two_dimensions(fake_world):
    mesh = init_device_mesh("cpu", (3, 1), mesh_dim_names=("dp", "ep"))
    with pytest.raises(ValueError, match=r"needs one mesh dimension, got 2 \(\('dp', 'ep'\)\): pass e.g. mesh\['ep'\]"):
        expert_parallel(tiny("qwen3_moe"), mesh)


def test_way_back_needs_sharded_experts():
    for function in (gather_experts, full_state_dict, lambda model: load_full_state_dict(model, {})):
        with pytest.raises(ValueError, match="has no sharded experts: call expert_parallel"):
            function(tiny("qwen3_moe"))


@pytest.mark.parametrize("exchange", sorted(EXCHANGES))
def test_implementation_without_sharding(exchange):
    model = tiny("qwen3_moe")
    model.set_experts_implementation(f"farskip_{exchange}")
    with pytest.raises(RuntimeError, match="its experts are not sharded: call farskip_fx.expert_parallel"):
        model(**inputs("qwen3_moe"))


# ---------------------------------------------------------------------------------------------------------------------
# Transformers' own door
# ---------------------------------------------------------------------------------------------------------------------


def from_pretrained(rank: int, path: str, cases: list[tuple[str, bool]]) -> list[dict]:
    return [loaded(path, implementation, fullgraph) for implementation, fullgraph in cases]


def loaded(path: str, implementation: str, fullgraph: bool) -> dict:
    from transformers import AutoModelForCausalLM
    from transformers.distributed import DistributedConfig

    config = DistributedConfig(tp_size=2, ep_size=2, ep_implementation=implementation)
    model = AutoModelForCausalLM.from_pretrained(path, distributed_config=config)
    reference = AutoModelForCausalLM.from_pretrained(path)
    experts = model.model.layers[0].mlp.experts
    torch._dynamo.reset()
    recorder = Recorder()
    compiled = torch.compile(model, backend=recorder, fullgraph=fullgraph)

    sample = inputs("qwen3_moe")
    # 15 tokens: two ranks do not divide them. (Eagerly: this must not be a second graph.)
    odd = {**sample, "input_ids": sample["input_ids"][:, :15]}
    with torch.no_grad():
        wrong = {"odd": difference(model(**odd).logits, reference(**odd).logits)}
    output, expected = compiled(**sample).logits, reference(**sample).logits
    loss(output).backward(), loss(expected).backward()
    wrong["forward"] = difference(output, expected)
    for name, parameter in model.named_parameters():  # DTensors where transformers shards: compare them whole
        gradient = parameter.grad.full_tensor() if hasattr(parameter.grad, "full_tensor") else parameter.grad
        wrong[name] = difference(gradient, dict(reference.named_parameters())[name].grad)
    return {
        "wrong": {name: value for name, value in wrong.items() if value > TOLERANCE},
        "graphs": (len(recorder.dynamo), len(recorder.forward), len(recorder.backward)),
        "local experts": experts.gate_up_proj.to_local().size(0),
        "forward": communication(recorder.forward[0]),
    }


@pytest.mark.slow
def test_distributed_config(tmp_path):
    """from_pretrained with transformers' own DistributedConfig: our implementation, with and without fullgraph, and
    transformers' own all_reduce as it is."""
    tiny("qwen3_moe", jitter=0.1).save_pretrained(tmp_path)
    cases = [("farskip", False), ("farskip", True), ("all_reduce", True)]
    for results in run_ranks(from_pretrained, path=str(tmp_path), cases=cases):
        for result in results:
            assert (result["wrong"], result["graphs"], result["local experts"]) == ({}, (1, 1, 1), 4)
        for result in results[:2]:  # counts, dispatch, combine in each of three layers
            assert result["forward"]["_c10d_functional.all_to_all_single.default"] == 3 * 3
            assert not [op for op in result["forward"] if not op.startswith("_c10d_functional.")]
