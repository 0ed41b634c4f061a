"""``farskip plan``: the published models, what an exchange carries, the simulated step, and what is written out."""
import dataclasses
import itertools
import json
import math

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import farskip_fx as fs
from farskip_fx.cli import main
from farskip_fx.connectivity import Reads
from farskip_fx.passes.costs import PRESETS, graph_seconds
from farskip_fx.plan import devices
from farskip_fx.plan.chain import Step, reads_of
from farskip_fx.plan.devices import Link, device_of, link_of
from farskip_fx.plan.exchanges import Leg, Network, copies, exchanges_for, legs
from farskip_fx.plan.models import CONFIGS, experts_of, source_of
from farskip_fx.plan.page import page
from farskip_fx.plan.pieces import PARTS, Piece
from farskip_fx.plan.planner import Planner, make
from farskip_fx.plan.stand_ins import ATTENTION, stand_ins
from farskip_fx.plan.traced import trace
from farskip_fx.plan.validate import rows_of
from farskip_fx.report import Folded

CONFIG = {"model_type": "deepseek_v3", "vocab_size": 256, "hidden_size": 64, "intermediate_size": 128, "dtype": "bfloat16",
          "moe_intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4,
          "n_routed_experts": 8, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1,
          "q_lora_rank": 32, "kv_lora_rank": 32, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16}
PARAMETERS = {"deepseek-v2-lite": 15.7, "qwen3-30b-a3b": 30.5, "llama-4-scout": 107.8, "deepseek-v3": 671.0,
              "qwen3-235b-a22b": 235.1, "gpt-oss-120b": 116.8, "deepseek-v3-6-layers": 71.0}       # billions, as published
LINK = Link(40e9, 1.0, 30e-6, "test")


# --- models and figures -------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", PARAMETERS)
def test_sizes_are_those_published(name):
    with source_of(name) as path, stand_ins(), torch.device("meta"):
        config = AutoConfig.from_pretrained(path)
        model = AutoModelForCausalLM.from_config(config, attn_implementation=ATTENTION)
    assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(PARAMETERS[name], rel=0.02)
    assert experts_of(config) == max(CONFIGS[name].get(k, 0) for k in ("n_routed_experts", "num_experts", "num_local_experts"))


def test_links_and_devices_are_named_or_refused():
    assert link_of("50GB/s").rate == 50e9 and link_of("400 Gbit/s").rate == 50e9 and link_of("31MB/s").rate == 31e6
    assert link_of("infiniband-400g").rate == 40e9
    for text in ("", "fast", "0GB/s", "-1GB/s", "1.2.3GB/s", "50"):
        with pytest.raises(fs.ConfigError, match="neither one of"):
            link_of(text)
    with pytest.raises(fs.ConfigError, match="not in the table: a100"):
        device_of("h1000")
    for device in devices.DEVICES.values():
        assert device.inside in devices.LINKS and device.source
    with pytest.raises(fs.ConfigError, match="neither a known model"), source_of("gpt-7"):
        pass


def test_copies_of_a_token():
    """All choices of experts, counted: ranks other than the first that hold one of them, on average over all tokens' homes."""
    for experts, top_k, ep in ((8, 2, 4), (8, 3, 2), (6, 2, 6)):
        chosen = list(itertools.combinations(range(experts), top_k))
        there = sum(len({e // (experts // ep) for e in one}) for one in chosen) / len(chosen)
        assert copies(experts, top_k, ep) == pytest.approx(there * (ep - 1) / ep)
    assert copies(128, 8, 64) < copies(128, 8, 64, exchange="all_to_all_pairs")


def test_network_inside_and_between_nodes():
    fast, slow = Link(400e9, 1.0, 1e-6, ""), Link(40e9, 1.0, 2e-6, "")
    network = Network(fast, slow, 8)
    assert network.seconds(1e9, [Leg(8.0, 0.0)]) == pytest.approx(8 / 400 + 1e-6)
    assert network.seconds(1e9, [Leg(7.0, 8.0)], 2) == pytest.approx(8 / 40 + 4e-6)        # both links work at once
    assert network.seconds(1e9, [Leg(0.0, 4.0), Leg(8.0, 0.0)]) == pytest.approx(4 / 40 + 8 / 400 + 3e-6)     # legs do not
    assert network.seconds(1e9, [Leg(0.0, 0.0)]) == network.seconds(1e9, [Leg(1.0, 1.0)], 0) == 0.0


def test_legs_of_a_hierarchical_exchange():
    """All choices of experts, counted, from each home: nodes other than its own, and ranks other than the one that hands on."""
    experts, top_k, ep, node = 8, 3, 4, 2
    far = near = count = 0
    for chosen, home in itertools.product(itertools.combinations(range(experts), top_k), range(ep)):
        ranks = {e * ep // experts for e in chosen}
        far += len({r // node for r in ranks} - {home // node})
        near += sum(r % node != home % node for r in ranks)     # the token comes to the place of its home first
        count += 1
    across, within = legs("hierarchical", experts=experts, top_k=top_k, ep=ep, node=node)
    assert (across.near, across.far, within.near, within.far) == pytest.approx((0, far / count, near / count, 0))
    one, = legs("all_to_all", experts=experts, top_k=top_k, ep=ep, node=node)
    assert across.far < one.far and legs("all_gather", experts=8, top_k=3, ep=4, node=2) == (Leg(1.0, 2.0),)
    assert "hierarchical" in exchanges_for(64, 8) and "hierarchical" not in exchanges_for(8, 8)


# --- the step -----------------------------------------------------------------------------------------------------

def stack(layers=12, link=1.0, **more):
    forward = Piece(kind="moe", attention=2.0, before=0.1, inner=1.5, after=0.1, side=0.5, first=link, second=link,
                    first_launches=1, second_launches=1, **more)
    backward = dataclasses.replace(forward, attention=4.0, inner=1.5, weights=1.5, side=1.0)
    return Step(layers=[[forward] * layers, [backward] * layers], first=[0.0, 0.0], head=[0.2, 0.4],
                exchange=lambda payload, launches: payload)


def test_standard_hides_nothing_but_behind_what_is_free():
    step = stack()
    none, farskip = (step.times(reads_of(step.layers[0], name)) for name in ("none", "farskip"))
    for phase in none + farskip:
        assert phase.seconds == pytest.approx(phase.compute + phase.exposed) and phase.link == pytest.approx(24)
    # Forward: the shared expert stands beside one of the exchanges. Backward: weight gradients of the experts, too.
    assert none[0].exposed == pytest.approx(12 * (2 - 0.5)) and none[1].exposed < none[0].exposed
    assert farskip[0].exposed < 2.5 and farskip[1].exposed < 2.5
    for phase in farskip:
        assert phase.seconds >= max(phase.compute, phase.link)


def half_of(step, *names):
    return [[dataclasses.replace(p, **{n: getattr(p, n) / 2 for n in names}) for p in graph] for graph in step.layers]


def test_chunks_break_the_chain_of_exchanges_and_experts():
    step = stack(link=2.0)
    chunked = dataclasses.replace(step, chunk=half_of(step, *PARTS))
    for name in ("none", "farskip"):
        reads = reads_of(step.layers[0], name)
        for one, other in zip(step.times(reads), chunked.times(reads)):
            assert other.compute == pytest.approx(one.compute) and other.link == pytest.approx(one.link)
            assert max(other.compute, other.link) <= other.seconds < one.seconds


def test_two_halves_share_compute_and_link():
    step = stack()
    half = half_of(step, *PARTS, "first", "second")
    halves = dataclasses.replace(step, layers=half, head=[h / 2 for h in step.head])
    whole, both = (one.times([Reads()] * 12, copies=n) for one, n in ((step, 1), (halves, 2)))
    for one, other in zip(whole, both):
        assert other.compute == pytest.approx(one.compute) and other.link == pytest.approx(one.link)
        assert max(other.compute, other.link) <= other.seconds < one.seconds
    assert both[0].exposed < 2.5


def test_a_slow_link_is_the_limit_for_all():
    step = stack(link=10.0)
    for name in ("none", "farskip"):
        assert all(t.seconds >= 240 for t in step.times(reads_of(step.layers[0], name)))


# --- a traced model -----------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def traced(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return trace(folder, tokens=256, training=True)


def test_pieces_hold_all_of_the_graph(traced):
    assert traced.folded is None and len(traced.graphs) == 2
    rates = PRESETS["h100-infiniband"]
    rows, outside = traced.pieces(rates)
    for graph, layers, rest in zip(traced.graphs, rows, outside):
        assert sum(p.compute for p in layers) + rest == pytest.approx(sum(graph_seconds(graph, rates).values()))
        assert [p.kind for p in layers] == ["mlp", "moe"] and not layers[0].first
        assert layers[1].first and layers[1].second and layers[1].inner > 0
    assert [graph[1].first_launches for graph in rows] == [2, 1]        # forward, with the counts
    assert rows[0][1].weights == 0 < rows[1][1].weights         # gradients of the experts' weights, and of no input
    halves, _ = traced.pieces(rates, half=True)
    for whole, half in zip(itertools.chain(*rows), itertools.chain(*halves)):
        assert whole.compute / 2 <= half.compute <= whole.compute


def test_exchanges_carry_what_the_formula_says(traced):
    """Beside the rows travel weights and ids."""
    rows, _ = traced.pieces(PRESETS["h100-infiniband"])
    row = CONFIG["hidden_size"] * 2
    expected = 256 * copies(8, 2, traced.ep) * row
    assert rows[0][1].second == pytest.approx(expected, rel=0.02) and rows[0][1].first >= rows[0][1].second


def test_few_layers_stand_for_all(traced):
    """One dense layer, then equal ones, of which the last is what the end of a model is."""
    folded = dataclasses.replace(traced, layers=9, folded=Folded(layers=9, traced=5, period=1))
    assert folded._stand_ins == [0, 1, 2, 3, 3, 3, 3, 3, 4]
    alternating = dataclasses.replace(traced, layers=12, folded=Folded(layers=12, traced=8, period=2))
    assert alternating._stand_ins == [0, 1, 2, 3, 4, 5, 4, 5, 4, 5, 6, 7]


def test_parameters_are_split(traced):
    experts = 8 * 3 * 64 * 32
    assert traced.expert == experts
    planner = Planner(traced, PRESETS["h100-infiniband"], Network(LINK, LINK), capacity=1e6)
    two, eight = planner.at(2, 4), planner.at(8, 1)
    assert two.memory.weights - eight.memory.weights == pytest.approx(experts * 2 * (1 / 2 - 1 / 8))
    assert two.memory.optimizer == 6 * two.memory.weights and not two.fits
    sharded = Planner(traced, PRESETS["h100-infiniband"], Network(LINK, LINK), shard=True).at(8, 1)
    assert sharded.memory.weights == pytest.approx((traced.dense + experts) * 2 / 8)
    with pytest.raises(fs.ConfigError, match="does not divide the 8 experts"):
        planner.at(3, 1)


def test_a_plan_as_json_and_page(traced):
    hostile = dataclasses.replace(traced, name="<script>x</script>\x1b[31m")
    planner = Planner(hostile, PRESETS["h100-infiniband"], Network(LINK, LINK, 1))
    plan = make(planner, gpus=8, ep=4, dp=2, device="h100", link="40GB/s")
    data = json.loads(json.dumps(plan.to_dict()))
    assert [p["ep"] for p in data["by_ep"]] == [2, 4, 8] and data["best"] in (2, 4, 8) and data["unknown"]
    assert [p["exchange"] for p in data["by_exchange"]] == ["all_to_all", "all_to_all_pairs", "all_gather", "hierarchical"]
    assert data["by_exchange"][0] == data["asked"] and data["by_exchange"][1]["exchange_bytes"] > data["asked"]["exchange_bytes"]
    for point in [data["asked"], *data["by_ep"], *data["by_link"], *data["by_exchange"]]:
        none, farskip, chunks, halves = point["variants"]
        assert none["step_s"] >= farskip["step_s"] > 0 and none["exposed_s"] >= farskip["exposed_s"] >= 0
        assert math.isfinite(halves["step_s"] + chunks["step_s"]) and point["gain"] >= 1
    by_link = [p["variants"][0]["step_s"] for p in data["by_link"]]
    assert by_link == sorted(by_link, reverse=True)
    html = page(plan)
    assert "<script" not in html and "&lt;script" in html and "\x1b" not in html and html.count("<polyline") == 8
    with pytest.raises(fs.ConfigError, match="are 4 ranks, not the 8"):
        make(planner, gpus=8, ep=2, dp=2, device="h100", link="40GB/s")


@pytest.mark.slow
def test_command(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    assert main(["plan", str(tmp_path), "--gpus", "8", "--tokens", "64", "--html", str(tmp_path / "plan.html")]) == 0
    said = capsys.readouterr().out
    assert "ep 8 x dp 1" in said and "what it does not know" in said and (tmp_path / "plan.html").exists()


def test_mistakes_are_named(tmp_path, capsys):
    for arguments, words in ((["nowhere"], "neither a known model"), (["deepseek-v3", "--device", "z"], "not in the table"),
                             (["deepseek-v3", "--link", "z"], "neither one of"),
                             (["deepseek-v3", "--context", "1000"], "no multiple")):
        assert main(["plan", *arguments]) == 2 and words in capsys.readouterr().err
    bad = tmp_path / "bench.json"
    for text in ("{", "[]", "{}", '{"forward": {}}'):
        bad.write_text(text)
        with pytest.raises(fs.ConfigError, match=str(bad)):
            list(rows_of(bad))
