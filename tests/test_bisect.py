"""``bisect``: names the stage, layer and half that a fault was put into, and writes a script that shows it."""
import dataclasses
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch._inductor.custom_graph_pass import CustomGraphPass

import families
import farskip_fx as fs
import farskip_fx.overlap as overlap
import farskip_fx.passes.rewire as rewire_pass
from farskip_fx import cli
from farskip_fx.diagnose.bisect import _outputs, _slower, first, half_of
from farskip_fx.diagnose.runs import Runs, Timing, Trial, stages_of, words
from ranks import run_ranks

NONE = ("none",)


# --- faults ------------------------------------------------------------------------------------------------------

_builds = rewire_pass._redirect


def reads_the_wrong_state(builder, blocks, redirect, *rest):
    """The MoE of layer 2 reads the stream as it was before layer 1's MoE."""
    if redirect.block is blocks.layers[2].mlp:
        early = redirect.block.stream.states[redirect.block.contribution.origin - 2]
        redirect = rewire_pass._Redirect(block=redirect.block, state=redirect.state, value=early, hidden=(), clones=())
    return _builds(builder, blocks, redirect, *rest)


def wrong_rewiring():
    return mock.patch.object(rewire_pass, "_redirect", reads_the_wrong_state)


def scale(graph):
    """The last matrix product gives one and a half times what it should."""
    product = [n for n in graph.nodes if "mm" in str(n.target)][-1]
    with graph.inserting_after(product):
        more = graph.call_function(torch.ops.aten.mul.Tensor, (product, 1.5))
    more.meta.update(product.meta)
    product.replace_all_uses_with(more, delete_user_cb=lambda user: user is not more)


class Scales(CustomGraphPass):
    """Somebody's pass of Inductor. Its ``uuid`` does not say whether it is on, so it leads to a stale cache."""

    def __init__(self):
        self.on = True

    def __call__(self, graph):
        if self.on:
            scale(graph)

    def uuid(self):
        return "scales"


def wrong_schedule():
    schedule = overlap.schedule

    def scheduled(graph, **kwargs):
        done = schedule(graph, **kwargs)
        scale(graph)
        return done

    return mock.patch.object(overlap, "schedule", scheduled)


# --- the search, with runs that are made up ------------------------------------------------------------------------

class MadeUp:
    """Runs whose outcome is a rule: ``rule(stage, names, layers, caches)`` is true where the run is wrong."""

    def __init__(self, rule, *, count=16, **options):
        self.config, self.rule, self.count, self.decoder_layers = fs.FarskipConfig(**options), rule, count, count
        self.trials = []

    def kind(self, layer):
        return "moe"

    def label(self, layer):
        return f"layers.{layer}.mlp"

    def traced(self):
        return self.said("trace", None, None, self.rule("trace", self.all_none(), self.count, False))

    def trial(self, names, stage, *, layers=None, caches=False, label=""):
        names = tuple(names) if names is not None else self.all_none()
        return self.said(label or stage.name, names, layers, self.rule(stage.name, names, layers or self.count, caches))

    def all_none(self):
        return NONE * self.count

    def said(self, stage, names, layers, wrong):
        done = Trial(stage=stage, converted=words(names), layers=layers, difference=1.0 if wrong else 0.0, tolerance=1e-5)
        self.trials.append(done)
        return done


ORDER = ["trace", "rewire", "causal", "aot", "inductor", "schedule", "fence", "split"]


def from_stage(stage):
    return lambda s: ORDER.index(s) >= ORDER.index(stage)


@pytest.mark.parametrize("stage", ORDER[1:])
@pytest.mark.parametrize("layer, half", [(0, "moe"), (7, "attention"), (15, "moe")])
def test_finds_stage_layer_and_half_by_halving(stage, layer, half):
    names = ("farskip", "mlp_only" if half == "moe" else "attn_only")
    runs = MadeUp(lambda s, converted, layers, caches: from_stage(stage)(s) and layer < layers and converted[layer] in names)
    found = _outputs(runs)
    assert (found.stage, found.layer, found.half, found.independent) == (stage, layer, half, False)
    assert dict(found.conversion) == {str(layer): names[1]}
    assert found.layers == (layer + 1 if layer < 15 else None)
    assert len(runs.trials) <= 17     # of 7 stages, 16 layers and 2 halves


def test_a_fault_that_takes_several_layers():
    runs = MadeUp(lambda s, names, layers, caches: s != "trace" and layers > 9 and {names[4], names[9]} == {"farskip"})
    found = _outputs(runs)
    assert found.layer == 9 and found.half is None
    assert list(found.conversion) == [str(i) for i in range(4, 10)]


def test_a_fault_that_takes_the_layer_before():
    runs = MadeUp(lambda s, names, layers, caches: s != "trace" and layers > 9 and names[8] != "none"
                  and names[9] in ("farskip", "attn_only"))
    found = _outputs(runs)
    assert found.layer == 9 and found.half == "attention" and dict(found.conversion) == {"8": "farskip", "9": "attn_only"}


def test_a_fault_without_any_conversion_shortens_the_model():
    found = _outputs(MadeUp(lambda s, names, layers, caches: from_stage("inductor")(s) and layers >= 6))
    assert found.stage == "inductor" and found.independent and found.layers == 6 and found.layer == 5 and not found.conversion
    assert "Inductor" in found.verdict and "with nothing converted too; shown by 6 decoder layers" in found.verdict


@pytest.mark.parametrize("which, said", [(True, "AOTAutograd's cache"), ("inductor", "Inductor's cache")])
def test_tells_which_cache(which, said):
    caches_wrong = {True: (True,), "inductor": (True, "inductor")}[which]
    found = _outputs(MadeUp(lambda s, names, layers, caches: caches in caches_wrong))
    assert found.stage == "cache" and said in found.verdict


def test_a_wrong_trace_is_no_fault_of_the_passes():
    assert _outputs(MadeUp(lambda s, names, layers, caches: True)).stage == "trace"


def test_nothing_wrong_takes_three_runs():
    runs = MadeUp(lambda s, names, layers, caches: False)
    assert _outputs(runs) and [t.stage for t in runs.trials] == ["trace", "as it runs", "as it runs, again"]


class MadeUpTimes(MadeUp):
    def __init__(self, seconds, **more):
        super().__init__(lambda *anything: False, **more)
        self.seconds = seconds

    def times(self, pipelines, *, rounds):
        return [Timing(stage=label, converted="", step_s=self.seconds(stage.name, names or self.all_none()))
                for names, stage, label in pipelines]


def test_slower_finds_stage_and_layer():
    def seconds(stage, names):
        return 1 + (stage in ("schedule", "fence", "split")) * 0.5 * (names[11] != "none")
    found = _slower(MadeUpTimes(seconds), 0.05)
    assert (found.stage, found.layer) == ("schedule", 11) and "makes it slower than stock, by 50.0%" in found.verdict
    found = _slower(MadeUpTimes(lambda stage, names: 1 + 0.1 * sum(n != "none" for n in names)), 0.05)
    assert found.stage == "rewire" and found.layer is None and "No single layer: layers 0-15" in found.verdict
    found = _slower(MadeUpTimes(lambda stage, names: 1 + 0.5 * (stage == "split" and names[3] != "none")), 0.05)
    assert (found.stage, found.layer) == ("split", 3)
    assert _slower(MadeUpTimes(lambda stage, names: 1.0), 0.05)


def test_pieces():
    assert [first(0, 9, lambda n, k=k: n >= k) for k in range(1, 10)] == list(range(1, 10))
    assert half_of("farskip", "attention") == "attn_only" and half_of("ladder", "mlp") == "mlp_only"
    assert half_of("ladder", "attention") == half_of("ladder", "attention") == "ladder_attention_half"
    names = {options: [s.name for s in stages_of(fs.FarskipConfig(**dict(options)))] for options in [
        (("inner", "eager"),), (("inner", "aot_eager"),), (), (("overlap", False),),
        (("connectivity", "none"), ("causal_attention", False))]}
    assert list(names.values()) == [["rewire", "causal"], ["rewire", "causal", "aot", "split"], ORDER[1:], ORDER[1:5],
                                    ["rewire", "aot", "inductor", "schedule", "fence"]]
    assert words(("farskip", "farskip", "none", "ladder")) == "layers 0-1 farskip, layer 3 ladder"


# --- real models -------------------------------------------------------------------------------------------------

@pytest.mark.slow
def test_a_rewiring_fault_and_its_script(tmp_path):
    model, inputs = families.tiny("qwen3_moe", jitter=0.1), families.inputs("qwen3_moe")
    with wrong_rewiring():
        found = fs.bisect(model, config={"inner": "eager"}, **inputs)
    assert (found.stage, found.layer, found.half) == ("rewire", 2, "moe") and not found
    assert found.verdict.startswith("the rewiring at moe of layer 2 (layers.2.mlp") and found.verdict in str(found)
    assert json.loads(json.dumps(found.to_dict()))["conversion"] == {"2": "mlp_only"}
    script = found.write(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["reproduce.py"]      # it shows with new weights and new ids
    (status, said), (good_status, good) = runs_script(script)
    assert status == 1 and said.startswith("reproduced: rewire, layer 2 mlp_only: differs by"), said
    assert good_status == 0 and good.startswith("not reproduced: rewire, layer 2 mlp_only: differs by 0.0e+00"), good


@pytest.mark.slow
def test_nothing_wrong():
    """Gradients too; a converted model is asked about as it was converted, and stays so."""
    model, inputs = families.tiny("deepseek_v3", jitter=0.1), families.inputs("deepseek_v3")
    fs.apply(model, connectivity="ladder", inner="aot_eager")
    forward = model.model.forward
    found = fs.bisect(model, gradients=True, **inputs)
    assert found and found.connectivity == "ladder" and found.amount <= found.tolerance == 1e-4
    assert model.model.forward is forward and all(p.grad is None for p in model.parameters())
    with pytest.raises(fs.ConfigError, match="nothing wrong was found"):
        found.write("anywhere")


def test_what_cannot_be_asked():
    model, inputs = families.tiny("qwen3_moe"), families.inputs("qwen3_moe")
    with pytest.raises(fs.ConfigError, match="inner='eager' has none"):
        fs.bisect(model, config={"inner": "eager"}, slower=True, **inputs)
    with pytest.raises(fs.NoMoEError, match="did not reach the decoder"):
        with mock.patch.object(type(model), "forward", lambda self, **inputs: None):
            fs.bisect(model, config={"inner": "eager"}, **inputs)


def runs_script(script: Path):
    """(exit status, what it said) with the fault, and then without it; in a process of its own."""
    here = Path(__file__).parent
    program = textwrap.dedent(f"""
        import contextlib, runpy, sys
        sys.path.insert(0, {str(here)!r})
        import test_bisect
        for fault in (test_bisect.wrong_rewiring(), contextlib.nullcontext()):
            with fault:
                try:
                    runpy.run_path({str(script)!r}, run_name="__main__")
                except SystemExit as end:
                    print("status", end.code)
    """)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300,
                          env={**os.environ, "PYTHONPATH": str(here.parent)})
    assert done.returncode == 0, done.stderr
    first, one, second, other, _ = done.stdout.split("\n")
    return (int(one.split()[1]), first), (int(other.split()[1]), second)


@pytest.mark.slow
def test_weights_are_saved_where_it_takes_them(tmp_path):
    """A model that is not from transformers travels as a whole."""
    inner, inputs = families.tiny("qwen3_moe", jitter=0.1), families.inputs("qwen3_moe")
    model = families.TextLM(inner.model, inner.config).eval()
    with wrong_rewiring():
        found = fs.bisect(model, config={"inner": "eager"}, **inputs)
    script = found.write(tmp_path)
    assert (found.stage, found.layer) == ("rewire", 2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["inputs0.pt", "model0.pt", "reproduce.py"]
    assert [status for status, _ in runs_script(script)] == [1, 0]


@pytest.mark.slow
def test_the_command(tmp_path, capsys):
    config = families.tiny("qwen3_moe").config
    config.save_pretrained(tmp_path)
    asked = ["bisect", str(tmp_path), "--inner", "eager", "--tokens", "16", "--output", str(tmp_path / "out")]
    assert cli.main(asked) == 0
    assert "nothing wrong found" in capsys.readouterr().out
    with wrong_rewiring():
        assert cli.main([*asked, "--train"]) == 1
    said = " ".join(capsys.readouterr().out.split())
    assert "the rewiring at moe of layer 2" in said and "reproduce.py" in said
    assert [status for status, _ in runs_script(tmp_path / "out" / "reproduce.py")] == [1, 0]


def on_two_ranks(rank):
    """The fault is on rank 1 alone."""
    model = fs.expert_parallel(families.tiny("qwen3_moe", jitter=0.1))
    with wrong_rewiring() if rank == 1 else mock.MagicMock():
        found = fs.bisect(model, config={"inner": "eager"}, reproducer=False, input_ids=torch.arange(12)[None] + rank,
                          use_cache=False)
    return {**found.to_dict(), "trials": [dataclasses.replace(t, seconds=0.0) for t in found.trials]}


@pytest.mark.slow
def test_ranks_agree_on_what_one_of_them_sees():
    one, other = run_ranks(on_two_ranks, world_size=2)
    assert one == other and (one["stage"], one["layer"], one["half"]) == ("rewire", 2, "moe")


# --- Inductor ----------------------------------------------------------------------------------------------------

@pytest.fixture
def small(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    return families.tiny("qwen3_moe", jitter=0.1, num_hidden_layers=2), families.inputs("qwen3_moe")


@pytest.mark.slow
def test_a_fault_of_inductor(small):
    model, inputs = small
    with torch._inductor.config.patch(post_grad_custom_post_pass=Scales()):
        found = fs.bisect(model, **inputs)
    assert found.stage == "inductor" and found.independent and found.layers == 1
    assert "post_grad_custom_post_pass): without them it is right" in found.detail and "set them in build()" in found.script


@pytest.mark.slow
def test_a_fault_of_the_schedule(small):
    model, inputs = small
    with wrong_schedule():
        found = fs.bisect(model, reproducer=False, **inputs)
    assert found.stage == "schedule" and found.independent


@pytest.mark.slow
def test_a_stale_cache(small):
    model, inputs = small
    scales = Scales()
    with torch._inductor.config.patch(post_grad_custom_post_pass=scales):
        runs = Runs(model, (), inputs, fs.FarskipConfig())
        names = ("farskip", "farskip")
        assert runs.trial(names, stages_of(runs.config)[-1], caches=True).wrong     # this is what the cache keeps
        scales.on = False
        found = fs.bisect(model, **inputs)
    assert found.stage == "cache" and "whose uuid() does not change" in found.detail


@pytest.mark.slow
def test_time(small):
    """That the runs are made; what they say depends on the machine."""
    model, inputs = small
    found = fs.bisect(model, slower=True, tolerance=1e6, **inputs)
    timings = [t for t in found.trials if isinstance(t, Timing)]
    assert found and [t.stage for t in timings] == ["stock", "rewired, stock Inductor", "scheduled"]
    assert all(t.step_s > 0 for t in timings)
