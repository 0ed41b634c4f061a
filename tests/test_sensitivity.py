"""Which layers: the scan against models that were converted for it, the prediction by hand, the choice against all there are."""
import dataclasses
import itertools
import json
import random
import xml.etree.ElementTree as ElementTree

import pytest
import torch
from rich.console import Console

import families
import farskip_fx as fs
from farskip_fx.connectivity import CONNECTIVITIES, Missing, Reads, register_connectivity
from farskip_fx.distill import (Deployment, DistillConfig, HiddenTime, Sensitivity, choose, distill, evaluate, front_svg,
                                hidden_time, make_teacher, sensitivity)
from farskip_fx.distill.choice import kl_of, per_layer
from farskip_fx.distill.exposed import CHOICES, LayerSeconds, seconds_of
from farskip_fx.distill.front import front_table, layers_table, refusals
from farskip_fx.distill.calibration import some_batches
from farskip_fx.distill.layers import FILE, PLOT
from farskip_fx.distill.sensitivity import LayerSensitivity
from farskip_fx.distill.structure import LayerStructure
from farskip_fx.distill.trainer import RUN
from farskip_fx.errors import ConfigError

from distill_cases import LENGTH, Texts, arguments, model_of, save_model_and_text

ROWS = torch.stack([Texts(rows=8, seed=3)[i]["input_ids"] for i in range(8)])
BATCHES = [{"input_ids": ROWS[:4], "labels": ROWS[:4]},
           {"input_ids": ROWS[4:], "labels": ROWS[4:].masked_fill(torch.arange(LENGTH) > 11, -100)}]


@pytest.fixture(scope="module")
def scanned():
    model = model_of().train()
    found = sensitivity(model, BATCHES, progress=False)
    assert model.training and all(torch.equal(a, b) for a, b in zip(model.parameters(), model_of().parameters()))
    return found


# --- the scan -------------------------------------------------------------------------------------------------------------

def converted(model, batches, connectivity):
    """KL of ``model``, converted in the usual way, to the original."""
    teacher = make_teacher("copy", model, inner="eager")
    fs.apply(model, connectivity=connectivity, inner="eager")
    try:
        return evaluate(model, batches, teacher=teacher).kl
    finally:
        fs.remove(model)


@pytest.mark.parametrize("layer, name, connectivity", [
    pytest.param(0, "farskip", {0: "farskip"}, marks=pytest.mark.slow),
    pytest.param(1, "mlp_only", {1: "mlp_only"}, marks=pytest.mark.slow),
    # Layer 0 counts as converted, and its own attention has nothing that could be missing.
    (1, "attn_only", {0: "attn_only", 1: "attn_only"}),
    pytest.param(1, "farskip", {0: "attn_only", 1: "farskip"}, marks=pytest.mark.slow)])
def test_the_kl_of_one_layer(scanned, layer, name, connectivity):
    want = converted(model_of().eval(), BATCHES, connectivity)
    assert scanned.kl(layer, name) == pytest.approx(want, rel=1e-4) and want > 0.01


def test_what_changes_nothing(scanned):
    assert scanned.kl(0, "attn_only") == 0 and scanned.kl(0, "mlp_only") == scanned.kl(0, "farskip")
    assert scanned.tokens == 4 * (LENGTH - 1) + 4 * 11 and scanned.refused == frozenset() and scanned.kl(1, "none") == 0
    first = scanned.layers[0].structure
    assert first == LayerStructure(label="model.layers.0.mlp.experts", kind="moe", attention_flops=2 * 32 * (32 + 16 + 16 + 32),
                                   core_flops=first.core_flops, router_flops=2 * 32 * 4, expert_flops=2 * 3 * 2 * 32 * 16, rows=2.0,
                                   row_bytes=128.0)
    assert first.core_flops in (128.0, 256.0)     # 4 heads, q k^T and p v of 8 each; half of it where the mask is implicit


FASTER = {"deepseek_v3"}


def compare(family, choices=CHOICES, only=None):
    """Every layer and choice against a conversion in which the layers before count as converted and change nothing."""
    if "as_it_is" not in CONNECTIVITIES:
        register_connectivity("as_it_is", _as_it_is)
    model = families.tiny(family, jitter=0.1)
    if family in FASTER:
        model.set_experts_implementation("grouped_mm")      # traces faster than the loop over experts
    drawn = torch.Generator().manual_seed(1)
    batches = [{**families.inputs(family), "input_ids": torch.randint(3, 100, (2, 16), generator=drawn)}]
    found = sensitivity(model, batches, choices, progress=False)
    measured = 0
    for i, name in itertools.product(range(len(found.layers)), choices):
        if (only is None or (i, name) in only) and (i, name) not in found.refused and found.kl(i, name):
            want = converted(model, batches, {**{k: "as_it_is" for k in range(i)}, i: name})
            assert found.kl(i, name) == pytest.approx(want, rel=1e-3, abs=1e-7), (family, i, name)
            measured += 1
    assert measured
    return found


def _as_it_is(layer, earlier):
    return Reads()


@pytest.mark.slow
def test_a_dense_layer_and_shared_experts():
    """deepseek_v3: layer 0 is dense; farskip keeps the shared expert of the layer before, ladder does not."""
    found = compare("deepseek_v3", ("farskip", "attn_only", "mlp_only", "ladder"), {(2, "farskip")})
    assert [layer.structure.kind for layer in found.layers] == ["mlp", "moe", "moe"]
    assert found.kl(1, "attn_only") == 0 and found.kl(2, "ladder") != found.kl(2, "farskip")      # after a dense layer
    moe = found.layers[1].structure
    assert moe.shared and moe.rows == 2 and moe.shared_flops == 2 * 3 * 64 * 32 and moe.expert_flops == 2 * 2 * 3 * 64 * 32


def test_a_shared_expert_that_reads_by_itself():
    """granitemoeshared: routed experts and shared one read two states, and each half is computed from its own."""
    found = compare("granitemoeshared", ("farskip_shared", "mlp_only", "shared_alone"), {(1, "farskip_shared"), (1, "shared_alone")})
    assert 0 < found.kl(1, "shared_alone") and found.kl(1, "farskip_shared") != found.kl(1, "mlp_only")


@pytest.fixture(autouse=True, scope="module")
def shared_alone():
    register_connectivity("shared_alone", lambda layer, earlier: Reads(
        shared=(Missing(layer=layer.index, block="attention", part="all"),)))
    yield
    del CONNECTIVITIES["shared_alone"]


@pytest.mark.slow
def test_refused_layers():
    """afmoe has a norm over routed and shared experts: attention behind it cannot read without the routed part."""
    found = sensitivity(families.tiny("afmoe", jitter=0.1), [torch.arange(3, 19)[None]], ("farskip", "mlp_only"), progress=False)
    assert found.refused and {name for _, name in found.refused} == {"farskip"}
    layer = min(found.refused)[0]
    with pytest.raises(ConfigError, match=rf"cannot be applied to layer {layer} \(model"):
        found.kl(layer, "farskip")
    assert found.kl(layer, "mlp_only") > 0 and hidden_time(found).uniform("farskip")[layer] == "none"
    assert Sensitivity.from_dict(json.loads(json.dumps(found.to_dict()))) == found


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gpt_oss", "granitemoeshared"])
def test_families(family):
    compare(family)


def test_what_is_no_scan_of_this_model(scanned, tmp_path):
    with pytest.raises(ConfigError, match="did not try connectivity 'ladder'"):
        scanned.kl(0, "ladder")
    for wrong, text in ((dict(choices=("nothing",)), "connectivity 'nothing' is not known"), (dict(choices="farskip"), "must be a list")):
        with pytest.raises(ConfigError, match=text):
            sensitivity(model_of(), BATCHES, **wrong)
    with pytest.raises(ConfigError, match="this model is converted"):
        sensitivity(fs.apply(model_of(), inner="eager"), BATCHES)
    path = tmp_path / "scan.json"
    scanned.save(path)
    assert Sensitivity.load(path, model_of()) == scanned
    with pytest.raises(ConfigError, match=r"is of another model than Qwen3MoeForCausalLM"):
        Sensitivity.load(path, model_of(seed=1))
    data = json.loads(path.read_text())
    for change, text in (({"version": 2}, "version 2; this release reads version 1"), ({"layers": []}, "has no layers"),
                         ({"color": 1}, "unknown 'color'"), ({"layers": [{"kl": {}}]}, "is damaged"),
                         ({"layers": [{**data["layers"][0], "kl": {"farskip": -1.0}}]}, "is damaged")):
        path.write_text(json.dumps({**data, **change}))
        with pytest.raises(ConfigError, match=text):
            Sensitivity.load(path)
    path.write_text("{")
    with pytest.raises(ConfigError, match="cannot read the sensitivity scan"):
        Sensitivity.load(path)


# --- the prediction -------------------------------------------------------------------------------------------------------

def chain(*seconds, kinds=None, choices=CHOICES):
    """A prediction with times of our own."""
    kinds = kinds or ["moe"] * len(seconds)
    layers = [LayerStructure(label=f"layer {i}", kind=kind, attention_flops=1.0, shared=kind == "moe" and one["shared"] > 0)
              for i, (kind, one) in enumerate(zip(kinds, seconds))]
    rates = dict(link_compute_share=0.0)
    hidden = HiddenTime(layers, Deployment(rates=rates), choices=choices)
    hidden.seconds = [LayerSeconds(**one) for one in seconds]
    hidden._alike = list(range(len(seconds)))
    return hidden


ONE = dict(attention=4.0, router=0.0, shared=0.0, experts=1.0, dispatch=3.0, combine=2.0)


@pytest.mark.parametrize("names, want", [
    (("none", "none"), 10.0),                   # two dispatches and two combines, nothing beside them
    (("mlp_only", "none"), 6.0),                # attention 0 runs behind the exchanges of layer 0: 3 + 1 of its 4 s
    (("attn_only", "none"), 10.0),              # layer 0 has nothing before it
    (("none", "attn_only"), 10.0),              # nor has layer 1, if layer 0 is not converted
    (("attn_only", "attn_only"), 6.0),          # attention 1 runs behind the exchanges of layer 0
    (("mlp_only", "attn_only"), 5.0),           # both do, and those of layer 0 last 5 s
    (("farskip", "farskip"), 2.0),              # what is left of 8 s of attention hides all but the last combine
])
def test_exposed_by_hand(names, want):
    assert chain(ONE, ONE).exposed(names) == pytest.approx(want)


def test_shared_experts_and_dense_layers_by_hand():
    shared = dict(ONE, shared=2.0)
    assert chain(shared).exposed(("none",)) == pytest.approx(3.0)               # the shared expert is beside the exchanges anyway
    dense = dict(attention=4.0, shared=5.0)
    after = chain(ONE, dense, kinds=["moe", "mlp"])
    assert after.exposed(("none", "none")) == pytest.approx(5.0)
    assert after.exposed(("attn_only", "attn_only")) == pytest.approx(1.0)      # a dense layer's attention hides them, too
    assert after.share(("farskip", "farskip")) == 1.0 and after.uniform("farskip") == ("farskip", "farskip")


def test_seconds_of_a_layer():
    layer = LayerStructure(label="", kind="moe", attention_flops=1e6, core_flops=1e3, expert_flops=2e6, rows=8.0, row_bytes=1e3)
    rates = fs.Rates(matmul_flops=1e9, attention_flops=1e9, link_bytes=1e6, link_latency=0.5, kernel_overhead=0.0)
    got = seconds_of(layer, Deployment(ep=4, tokens=1000, context=100, rates=rates))
    assert got == LayerSeconds(attention=1.0 + 0.1, experts=2.0, dispatch=0.5 + 6.0, combine=0.5 + 6.0)
    assert Deployment.of({"rates": "h100-nvlink"}).rates.link_bytes == 300e9
    for wrong, text in ((dict(ep=1), "ep must be a whole number of at least 2"), (dict(rates="a100"), "or one of 'cpu'"),
                        (dict(rates={"speed": 1}), "unknown 'speed'"), (dict(rates={"link_bytes": -1}), "must be positive"),
                        (dict(gpus=8), "unknown 'gpus'")):
        with pytest.raises(ConfigError, match=text):
            Deployment.of(wrong)


# --- the choice -----------------------------------------------------------------------------------------------------------

def invented(rng, count):
    """A scan of a model that is not there; layers differ in kind, sizes and sensitivity."""
    layers = []
    for i in range(count):
        kind = "mlp" if rng.random() < 0.15 else "moe"
        structure = LayerStructure(
            label=f"layer {i}", kind=kind, shared=rng.random() < 0.5, attention_flops=rng.uniform(0.1, 3) * 25e6, router_flops=1e5,
            shared_flops=rng.choice([0.0, 2e6, 2e7]) if kind == "moe" else 3e7,
            expert_flops=rng.uniform(1e6, 2e7) if kind == "moe" else 0.0, rows=rng.choice([1.0, 2.0, 4.0]), row_bytes=2000.0)
        one, other = rng.uniform(0, 0.1), rng.uniform(0, 0.1)
        layers.append(LayerSensitivity(structure=structure, refused={"attn_only": "a norm"} if i == 3 else {}, kl={
            "farskip": (one + other) * rng.uniform(0.9, 1.3), "mlp_only": other, **({"attn_only": one} if i != 3 else {})}))
    return Sensitivity(layers=tuple(layers), choices=CHOICES, tokens=1, model="")


@pytest.mark.parametrize("seed", range(6))
def test_the_choice_among_all(seed):
    """All assignments of four layers: none has a smaller KL at that share, by more than 5 %."""
    rng = random.Random(seed)
    found = invented(rng, 4)
    hidden = hidden_time(found, Deployment(tokens=1000, rates={"link_bytes": rng.choice([5e6, 31e6, 1e8])}))
    every = [(kl_of(found, hidden, names), hidden.share(names)) for names in itertools.product(("none", *CHOICES), repeat=4)
             if names[3] != "attn_only"]
    for share in (0.4, 0.7, 0.9):
        choice = choose(found, hidden, share)
        least = min(kl for kl, reached in every if reached >= share)
        assert choice.share >= share and choice.kl <= 1.05 * least
        assert choice.share == hidden.share(choice.names) and choice.kl == kl_of(found, hidden, choice.names)
        assert choose(found, hidden_time(found, hidden.where), share) == choice
    kls = [point.kl for point in choice.front]
    assert kls == sorted(kls) and [p.share for p in choice.front] == sorted(p.share for p in choice.front)


def test_many_layers():
    """94 layers of two kinds; the mapping is what apply takes, and farskip next to "none" counts by what it reads."""
    rng = random.Random(0)
    found = invented(rng, 94)
    found = dataclasses.replace(found, layers=tuple(
        dataclasses.replace(layer, structure=found.layers[4 + i % 2].structure) for i, layer in enumerate(found.layers)))
    hidden = hidden_time(found, Deployment(tokens=1000, rates={"link_bytes": 3e7}))
    choice = choose(found, hidden, 0.9)
    assert fs.FarskipConfig(connectivity=choice.connectivity).of_layers(94) == choice.names
    assert choice.share >= 0.9 and choice.kl < 0.7 * choice.uniform["farskip"].kl
    assert per_layer(("none", "farskip", "farskip", "none")) == {"0": "none", "1-2": "farskip", "3": "none"}
    names = ("none", "farskip", "attn_only", *["none"] * 91)
    assert kl_of(found, hidden, names) == found.kl(1, "mlp_only") + found.kl(2, "attn_only")
    with pytest.raises(ConfigError, match="share must be above 0"):
        choose(found, hidden, 1.5)
    dense = HiddenTime([LayerStructure(label="", kind="mlp", attention_flops=1.0)] * 2)
    with pytest.raises(ConfigError, match="hides communication"):
        dense.share(("farskip", "farskip"))


def test_a_shared_expert_behind_attention_hides_as_much():
    """It has the combine in front of it in either case."""
    hidden = chain(*[{**ONE, "shared": 1.0}] * 4, choices=("farskip", "farskip_shared"))
    early, late = (hidden.hidden((name,) * 4) for name in hidden.choices)
    assert 0.95 * early <= late <= early * (1 + 1e-9)
    assert hidden.reads(1, ("farskip_shared",) * 4).shared == ()
    others = chain({**ONE, "shared": 1.0}, ONE, kinds=["mlp", "moe"], choices=("farskip_shared",))
    assert [others.reads(i, ("farskip_shared",) * 2).shared for i in (0, 1)] == [None, None]     # dense; without a shared expert


def test_a_registered_connectivity_that_reaches_further():
    if "two_back" not in CONNECTIVITIES:
        register_connectivity("two_back", _two_back)
    hidden = chain(ONE, ONE, ONE, choices=("two_back",))
    assert hidden.reach == 2 and hidden.reads(2, ("none", "two_back", "two_back")).attention == (
        Missing(layer=1, block="mlp", part="routed"),)
    assert hidden.exposed(("two_back",) * 3) <= hidden.exposed(("none",) * 3)


def _two_back(layer, earlier):
    return Reads(attention=tuple(Missing(layer=one.index, block="mlp", part="routed") for one in earlier[-2:]),
                 mlp=(Missing(layer=layer.index, block="attention", part="all"),))


# --- to look at -----------------------------------------------------------------------------------------------------------

def test_hostile_names_are_only_text():
    found = invented(random.Random(1), 4)
    evil = '</text><script>alert("x")</script>[red]&\x00\x1b[31m'
    found = dataclasses.replace(found, layers=tuple(
        dataclasses.replace(layer, structure=dataclasses.replace(layer.structure, label=evil),
                            refused={name: evil for name in layer.refused}) for layer in found.layers))
    choice = choose(found, hidden_time(found, Deployment(tokens=1000)), 0.5)
    choice = dataclasses.replace(choice, uniform={evil: choice.uniform["farskip"]})
    drawn = ElementTree.fromstring(front_svg(choice, evil))
    assert not [one for one in drawn.iter() if "script" in one.tag]
    text = [one.text for one in drawn.iter() if one.tag.endswith("text")]
    assert any(words and words.startswith("</text><script>") for words in text)
    assert len([one for one in drawn.iter() if one.tag.endswith("rect")]) == 4
    console = Console(width=200)
    with console.capture() as captured:
        console.print(layers_table(found, choice))
        console.print(front_table(choice))
    assert "[red]" in captured.get() and "\x1b[31m" not in captured.get() and "\x00" not in captured.get()
    assert all("\x1b" not in line and "refuses attn_only" in line for line in refusals(found)) and refusals(found)


# --- a run ----------------------------------------------------------------------------------------------------------------

WHERE = {"ep": 2, "tokens": 64, "context": 16, "rates": {"link_bytes": 1e5, "link_latency": 1e-3, "matmul_flops": 1e7}}


def test_the_config(tmp_path):
    config = DistillConfig(layers="auto:0.8", choices=["mlp_only", "farskip"], deployment=WHERE, scan_batches=2)
    assert config.share == 0.8 and DistillConfig(layers="auto").share == 0.9 and DistillConfig(layers="last:0.5").share is None
    config.save(tmp_path / "a.yaml")
    assert DistillConfig.load(tmp_path / "a.yaml") == config and config.deployment.ep == 2
    with pytest.raises(ConfigError, match="there is no conversion"):
        config.farskip()
    for wrong, text in ((dict(layers="auto:2"), "0 < SHARE <= 1"), (dict(layers="auto:x"), "0 < SHARE <= 1"),
                        (dict(layers="automatic"), "layers must be"), (dict(layers="auto", connectivity="ladder"), "leave connectivity"),
                        (dict(layers="auto", choices=["x"]), "choices: connectivity 'x'"),
                        (dict(layers="auto", deployment={"x": 1}), "deployment: unknown 'x'"),
                        (dict(layers="auto", scan_batches=0), "scan_batches must be")):
        with pytest.raises(ConfigError, match=text):
            DistillConfig(**wrong)


def test_some_batches():
    stack = lambda rows: {"input_ids": torch.stack([row["input_ids"] for row in rows]), "name": "x"}      # noqa: E731
    got = some_batches(Texts(rows=10), stack, count=3, batch=4)
    assert [one["input_ids"].shape[0] for one in got] == [4, 4] and list(got[0]) == ["input_ids"]
    assert len(some_batches(iter([Texts(rows=10)[i] for i in range(10)]), stack, count=2, batch=4)) == 2


def test_a_run_chooses_once(tmp_path, monkeypatch):
    """The choice is in the run's files; a run that goes on takes it from there, and only for the same question and model."""
    import farskip_fx.distill.layers as layers
    options = dict(layers="auto:0.6", deployment=WHERE, scan_batches=2, inner="eager")
    args = lambda: arguments(tmp_path, max_steps=1, save_strategy="steps", save_steps=1)      # noqa: E731
    trainer = distill(model_of(), Texts(), options, args=args())
    saved = json.loads((tmp_path / FILE).read_text())
    run = DistillConfig.load(tmp_path / RUN)
    assert run.layers == "all" and run.connectivity == saved["connectivity"] and saved["share"] >= 0.6
    assert trainer.model.config.farskip["connectivity"] == saved["connectivity"]
    assert Sensitivity.from_dict(saved["scan"]).choices == CHOICES
    ElementTree.fromstring((tmp_path / PLOT).read_text())

    def never(*_, **__):
        raise AssertionError("scanned again")

    monkeypatch.setattr(layers, "sensitivity", never)
    again = layers.with_chosen_layers(DistillConfig(**options), model_of(), Texts(), None, folder=tmp_path, batch=4,
                                      device=torch.device("cpu"), resume=True)
    assert again == run
    with pytest.raises(ConfigError, match="were chosen with share=0.6, and now it is 0.7"):
        distill(model_of(), Texts(), {**options, "layers": "auto:0.7"}, args=args(), resume=True)
    with pytest.raises(ConfigError, match="were chosen for another model"):
        distill(model_of(seed=1), Texts(), options, args=args(), resume=True)
    with pytest.raises(ConfigError, match="with teacher_model="):
        distill(model_of(), Texts(), options, args=args(), teacher_model=model_of())
    with pytest.raises(AssertionError, match="scanned again"):
        distill(model_of(), Texts(), options, args=args())


def test_command(tmp_path, capsys):
    from farskip_fx.cli import main
    save_model_and_text(tmp_path)
    file = tmp_path / "run.yaml"
    file.write_text(f"""
        model: {tmp_path}/model
        data: {{files: ["{tmp_path}/*.txt"], length: 16, held_out: 0.2}}
        distill: {{layers: "auto:0.7", choices: [farskip, mlp_only], scan_batches: 1, deployment: {json.dumps(WHERE)}}}
        training: {{output_dir: {tmp_path}/run}}
    """)
    assert main(["sensitivity", str(file), "--json", str(tmp_path / "scan.json"), "--svg", str(tmp_path / "front.svg")]) == 0
    said = capsys.readouterr().out
    assert "KL of converting one layer" in said and "chosen for 70%" in said and "distill: {connectivity: {" in said
    assert Sensitivity.load(tmp_path / "scan.json", model_of()).choices == ("farskip", "mlp_only")
    ElementTree.fromstring((tmp_path / "front.svg").read_text())
    for wrong, text in ((["--share", "2"], "--share must be"), (["--svg", str(tmp_path / "no" / "a.svg")], "there is no folder")):
        assert main(["sensitivity", str(file), *wrong]) == 2 and text in capsys.readouterr().err
