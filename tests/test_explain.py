"""``explain``, its words and its figures; reports that are compared; measured beside predicted."""
import contextlib
import copy
import io
import json

import families
import pytest
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, given, settings, strategies
from ranks import run_ranks
from rich.console import Console
from torch import nn

import farskip_fx as fs
from farskip_fx.cli import main
from farskip_fx.commands.explain import explain_source
from farskip_fx.diagnose.fold import fold_of
from farskip_fx.passes.costs import PRESETS
from farskip_fx.passes.timeline import Collective, Timeline
from farskip_fx.diagnose.profiling import compare as beside
from farskip_fx.report import Folded, Phase, Report
from farskip_fx.view import compare, terminal
from farskip_fx.view.html import page
from farskip_fx.view.text import plain

FAMILY = "deepseek_v3"
CONFIG = {"model_type": "deepseek_v3", "vocab_size": 256, "hidden_size": 64, "intermediate_size": 128, "torch_dtype": "float32",
          "moe_intermediate_size": 32, "num_hidden_layers": 7, "num_attention_heads": 4, "num_key_value_heads": 4,
          "n_routed_experts": 8, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1,
          "q_lora_rank": 32, "kv_lora_rank": 32, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16}


def explained(**options):
    torch._dynamo.reset()
    model = families.tiny(FAMILY, jitter=0.1)
    return fs.explain(model, config=options, predict=False, **families.inputs(FAMILY))


def drawn(report: dict, **how) -> str:
    out = io.StringIO()
    terminal.show(report, Console(file=out, width=140), **how)
    return out.getvalue()


@pytest.fixture
def config_file(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(CONFIG))
    return path


# --- what would be done is what is done ---------------------------------------------------------------------------

@pytest.mark.parametrize("options", [{}, *(pytest.param(options, marks=pytest.mark.slow) for options in (
    {"connectivity": "attn_only", "layers": (1, 2)}, {"connectivity": "ladder"}))])
def test_explained_is_what_a_compile_does(options):
    torch._dynamo.reset()
    model = families.tiny(FAMILY, jitter=0.1)
    before = {n: p.clone() for n, p in model.named_parameters()}
    report = fs.explain(model, config=options, predict=False, **families.inputs(FAMILY))
    assert model.forward.__func__ is type(model).forward and "forward" not in model.model.__dict__
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    torch._dynamo.reset()
    fs.apply(model, inner="eager", **options)
    with torch.no_grad():
        model(**families.inputs(FAMILY))
    done = fs.last_reports(model)[-1]
    assert report.layers == done.layers and report.changes == done.changes and len(report.changes) == report.rewired.edges > 0
    assert [(b.layer, b.block, b.evidence) for b in report.found] == [(b.layer, b.block, b.evidence) for b in done.found]
    assert fs.explain(model, predict=False, **families.inputs(FAMILY)).changes == report.changes     # converted: as it is


def test_every_block_has_its_evidence_and_source():
    report = explained()
    assert [(b.layer, b.block) for b in report.found] == [
        (0, "attention"), (0, "mlp"), (1, "attention"), (1, "moe"), (2, "attention"), (2, "moe")]
    assert all(b.certain and b.evidence and b.source.startswith("modeling_deepseek_v3.py:") for b in report.found)
    assert [b.shared for b in report.found] == [False, False, False, True, False, True]
    assert all(c.source.startswith("modeling_deepseek_v3.py:") and c.was != c.now for c in report.changes)


def test_golden_summary():
    assert str(explained()).splitlines() == [
        "DeepseekV3Model.forward: connectivity farskip, 3 of 3 layers rewired, 0 refused, 4 reads changed",
        "  layer 0 attention: reads the embedding",
        "  layer 0 mlp: reads the embedding (before attention)  (was: layer 0 attention output)",
        "  layer 1 attention: reads layer 0 output",
        "  layer 1 moe: reads layer 0 output (before attention)  (was: layer 1 attention output)",
        "  layer 2 attention: reads layer 1 output without the routed experts of layer 1  (was: layer 1 output)",
        "  layer 2 moe: reads layer 1 output (before attention)  (was: layer 2 attention output)",
    ]
    assert str(explained(connectivity="none")).startswith("DeepseekV3Model.forward: unchanged")


def test_refused_layers_are_in_the_report_and_strict_does_not_matter():
    """A norm over routed + shared experts: farskip is not defined there."""
    torch._dynamo.reset()
    family = "axk1"
    report = fs.explain(families.tiny(family, jitter=0.1), predict=False, **families.inputs(family))
    refused = [layer for layer in report.layers if layer.reason is not None]
    assert refused and all(layer.reason.text for layer in refused)
    text = drawn(report.to_dict())
    assert f"layer {refused[0].index}" in text and "refused" in text


def test_a_broken_graph_says_where():
    class Breaks(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))

        def forward(self, x):
            for layer in self.layers:
                x = x + layer(x)
                torch._dynamo.graph_break()
            return x

    torch._dynamo.reset()
    report = fs.explain(Breaks(), torch.ones(1, 4, 8))
    assert report.unchanged.code == "graph_break" and "test_explain.py" in report.unchanged.text


def test_a_call_that_reaches_no_decoder():
    model = families.tiny(FAMILY)
    model.forward = lambda **inputs: None
    with pytest.raises(fs.NoMoEError, match="did not reach the decoder"):
        fs.explain(model, **families.inputs(FAMILY))


# --- ranks and predictions ----------------------------------------------------------------------------------------

@pytest.mark.parametrize("folds", [(True,), pytest.param((True, False), marks=pytest.mark.slow)])
def test_planned_for_ranks_that_are_not_there(config_file, folds):
    """A model of seven layers over two ranks, folded and whole. One test: each of the two takes some seconds."""
    if dist.is_initialized():
        pytest.skip("this process has ranks already")
    reports = [explain_source(config_file, ep=2, tokens=256, batch=1, training=False, rates=None, options={}, fold=fold,
                              predict=True) for fold in folds]
    if len(reports) > 1:
        folded_is_the_whole(*reports)
    what_is_predicted_adds_up(reports)
    views_show_the_reports_figures(reports[0].to_dict())


@pytest.mark.slow
def test_exchanges_in_chunks_hide_without_rewiring(tmp_path):
    """Connectivity "none": the experts of one half run while the other half travels."""
    if dist.is_initialized():
        pytest.skip("this process has ranks already")
    path = tmp_path / "config.json"
    path.write_text(json.dumps(CONFIG | {"num_hidden_layers": 2, "hidden_size": 128, "moe_intermediate_size": 512}))
    whole, halves = (explain_source(
        path, ep=2, tokens=1024, batch=1, training=False, rates=None, options={"connectivity": "none"}, fold=False, predict=True,
        exchange=how) for how in ({}, {"chunks": 2}))
    (one,), (other,) = whole.phases, halves.phases
    assert [len(report.collectives) for report in (whole, halves)] == [3, 5]
    assert other.after.exposed_s < 0.8 * one.after.exposed_s
    assert other.after.seconds < one.after.seconds
    sent = [sum(c.bytes for c in phase.after.collectives) for phase in (one, other)]
    assert sent[1] == pytest.approx(sent[0], rel=0.01)


def folded_is_the_whole(folded, whole):
    assert folded.folded == Folded(layers=7, traced=5, period=1) and whole.folded is None
    assert folded.layers == whole.layers
    assert [(c.layer, c.block, c.op) for c in folded.changes] == [(c.layer, c.block, c.op) for c in whole.changes]
    assert folded.collectives == whole.collectives and len(whole.collectives) == 3 * 6
    for one, other in zip(folded.phases, whole.phases, strict=True):
        for a, b in ((one.before, other.before), (one.after, other.after)):
            assert a.seconds == pytest.approx(b.seconds, rel=0.02) and a.exposed_s == pytest.approx(b.exposed_s, rel=0.02)
            places = [sorted((c.layer, c.part) for c in line.collectives) for line in (a, b)]
            assert places[0] == places[1]
            busy = [sum(e.seconds for e in line.events if e.lane == "compute") for line in (a, b)]
            assert busy[0] == pytest.approx(busy[1], rel=0.02)
        assert one.bound_s == pytest.approx(other.bound_s, rel=0.02)


def what_is_predicted_adds_up(reports):
    for report in reports:
        (phase,) = report.phases
        assert phase.before.exposed_s > phase.after.exposed_s > 0 and phase.bound_s <= phase.after.seconds < phase.before.seconds
        for line in (phase.before, phase.after):
            assert sum(c.exposed_s for c in line.collectives) == pytest.approx(line.exposed_s, rel=1e-6)
            lanes = {e.lane for e in line.events}
            assert "compute" in lanes and len(lanes) == 2
            for lane in lanes:
                events = sorted((e for e in line.events if e.lane == lane), key=lambda e: e.start)
                late = 1e-9 if report.folded is None else 0.01 * line.seconds / 7       # repetitions are a period apart
                assert all(a.end <= b.start + late for a, b in zip(events, events[1:])), lane
            assert {c.part for c in line.collectives} == {"counts", "dispatch", "combine"}
            assert all(c.layer is not None and c.needed_by for c in line.collectives)


def views_show_the_reports_figures(report):
    text = drawn(report)
    for phase in report["phases"]:
        for side in ("before", "after"):
            assert terminal.milliseconds(phase[side]["seconds"]) in text
            assert terminal.milliseconds(phase[side]["exposed_s"]) in text
    assert "5 of 7 layers were traced" in text and "18 collectives in this order" in text
    assert "before" not in drawn(report, sides=("after",)).split("predicted")[1].split("exposed, ")[0]
    one = drawn(report, layer=6)
    assert "layer 6: layers.6.mlp" in one and "dispatch of layer 6" in one and "layer 5 output without the routed" in one
    assert "there is no layer 70" in drawn(report, layer=70)
    assert json.loads(json.dumps(report)) == report


def test_equal_layers_are_found():
    dense, moe, full = "dense", "moe", "full"
    assert fold_of([moe] * 94) == Folded(layers=94, traced=4, period=1)
    assert fold_of([dense] * 3 + [moe] * 58) == Folded(layers=61, traced=7, period=1)
    assert fold_of([moe, full] * 18) == Folded(layers=36, traced=8, period=2)
    assert fold_of([moe, moe, moe, full] * 12 + [moe]) == Folded(layers=49, traced=17, period=4)
    assert fold_of([moe] * 4) is None and fold_of([]) is None and fold_of([dense, moe, full, "a", "b", "c"]) is None
    assert fold_of([moe] * 20 + [dense]) is None        # the last one is like no other


# --- the command --------------------------------------------------------------------------------------------------

def test_command_and_diff(config_file, tmp_path, capsys):
    for name, more in (("a", []), ("b", ["--connectivity", "mlp_only"])):
        torch._dynamo.reset()
        assert main(["explain", str(config_file), "--json", "--no-predict", "--tokens", "32", *more]) == 0
        (tmp_path / f"{name}.json").write_text(capsys.readouterr().out)
    a, b = tmp_path / "a.json", tmp_path / "b.json"
    assert main(["diff", str(a), str(a)]) == 0 and compare.NOTHING in capsys.readouterr().out
    assert main(["diff", str(a), str(b)]) == 1
    said = capsys.readouterr().out
    assert "option connectivity: mlp_only  (was: farskip)" in said
    assert "read layer 2 attention: layer 1 output  (was: layer 1 output without the routed experts of layer 1)" in said
    bad = tmp_path / "bad.json"
    for text in ("{", "[]", "{}", '{"layers": [], "options": {}, "version": 99}'):
        bad.write_text(text)
        assert main(["diff", str(a), str(bad)]) == 2
        assert str(bad) in capsys.readouterr().err
    assert main(["explain", str(tmp_path / "none.json")]) == 2 and "is not there" in capsys.readouterr().err
    assert main(["explain", str(bad)]) == 2 and "no configuration" in capsys.readouterr().err


def test_script(tmp_path, capsys):
    script = tmp_path / "mine.py"
    script.write_text("import families\n\ndef build():\n    return families.tiny('qwen3_moe'), families.inputs('qwen3_moe')\n")
    assert main(["explain", str(script), "--no-predict", "--layer", "1"]) == 0
    assert "layer 1: layers.1.mlp" in capsys.readouterr().out
    for body, words in (("x = 1", "no function build"), ("def build():\n    return 3", "returned int")):
        script.write_text(body)
        assert main(["explain", str(script)]) == 2 and words in capsys.readouterr().err


# --- names from the model -----------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def small_report():
    report = explained()
    report.explained = report_of([1e-3, 2e-3, 0.0]).explained
    return report.to_dict()


HOSTILE = ["<script>alert(1)</script>", "\x1b[31mred\x1b[0m\x07", "[bold]markup[/bold] [link=http://x]y[/link]", "a" * 5000,
           "\u202egnp.exe", "line\nbreak\ttab", "\N{ZERO WIDTH JOINER}\N{SNAKE}", "'\"`$(rm)"]


@pytest.mark.parametrize("name", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_names(small_report, name):
    def poison(value):
        if isinstance(value, dict):
            return {k: name if k in ("label", "source", "needed_by", "model", "evidence", "adds") else poison(v)
                    for k, v in value.items()}
        return [poison(v) for v in value] if isinstance(value, list) else value

    report = poison(small_report)
    report["layers"][1]["refused"] = {"code": "x", "text": name}
    for text in (drawn(report), drawn(report, layer=2), "\n".join(compare.lines(compare.compare(small_report, report)))):
        assert all(c.isprintable() or c == "\n" for c in text) and "a" * 400 not in text.replace("\n", "")
    if name.startswith("[bold]"):
        assert "[bold]markup" in drawn(report, layer=2)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=strategies.text(max_size=400))
def test_any_name(small_report, name):
    """Every text of a report may come from a model: a line of a terminal stays one, and a page has no markup of it."""
    report = copy.deepcopy(small_report)
    for layer in report["layers"]:
        layer["label"] = name
        layer["refused"] = {"code": "x", "text": name}
        for block in layer["blocks"]:
            block.update(label=name, evidence=name, source=name, reads=name, adds=name)
    report.update(model=name, graph=name, summary=name, errors=[name])
    for text in (drawn(report), drawn(report, layer=1)):
        assert all(c.isprintable() or c == "\n" for c in text)
    html = page(report)
    shown = html.split('id="report">')[1].split("</script>")[0]
    assert "<" not in shown and ">" not in shown and len(html.split("<script")) == len(page(small_report).split("<script"))


def test_plain_is_short_and_printable():
    assert plain("x\x1b[0my") == "x?[0my" and len(plain("a" * 1000)) == 300 and plain("naïve 模型") == "naïve 模型"


# --- a report knows its model -------------------------------------------------------------------------------------

def test_reports_of_a_model():
    torch._dynamo.reset()
    one, other = families.tiny(FAMILY), families.tiny(FAMILY)
    for model in (one, other):
        fs.apply(model, inner="eager")
    with torch.no_grad():
        one(**families.inputs(FAMILY))
    assert len(fs.last_reports(one)) == 1 and fs.last_reports(other) == []
    assert fs.last_reports(one)[0].model == "DeepseekV3Model"


# --- measured beside predicted ------------------------------------------------------------------------------------

def collective(i, exposed):
    return Collective(name=f"c{i}", op="all_to_all_single", kind="", group="", bytes=8, seconds=2e-3, launch_index=2 * i,
                      wait_index=2 * i + 1, hidden_s=2e-3 - exposed, exposed_s=exposed, layer=i, block="moe", part="dispatch")


def report_of(exposed):
    line = Timeline(seconds=0.01, exposed_s=sum(exposed), peak_bytes=0, events=(),
                    collectives=tuple(collective(i, e) for i, e in enumerate(exposed)))
    phase = Phase(name="forward", before=line, after=line, bound_s=0.01, operations={"mm": 2e-3, "loops": 1e-3})
    return Report(graph="g", config=fs.FarskipConfig(rates=PRESETS["cpu"]), explained=(phase,))


def trace_of(steps):
    """Each step: (name, category, begin, duration) in microseconds."""
    events, at = [], 0.0
    for step in steps:
        events.append({"ph": "X", "name": "farskip_step", "cat": "user_annotation", "ts": at, "dur": 9000.0})
        events += [{"ph": "X", "name": n, "cat": cat, "ts": at + ts, "dur": dur} for n, cat, ts, dur in step]
        at += 10000.0
    return {"traceEvents": events}


def test_waits_are_matched_in_order_and_costs_set_beside():
    wait = "_c10d_functional::wait_tensor"
    steps = [[("aten::mm", "cpu_op", 0, 4000), ("aten::addmm", "cpu_op", 10, 100), ("gloo:all_to_all", "cpu_op", 100, 1500),
              (wait, "cpu_op", 4500, 1000), (wait, "cpu_op", 6000, 500 + shift)] for shift in (0, 100, 5000)]
    found = beside(report_of([1e-3, 2e-3]), trace_of(steps))
    assert [round(r.measured_s, 9) for r in found.exposures] == [1e-3, 0.6e-3]
    assert [r.place for r in found.exposures] == ["dispatch of layer 0", "dispatch of layer 1"]
    costs = {c.kind: c for c in found.costs}
    assert costs["matrix products"].measured_s == pytest.approx(4e-3) and costs["matrix products"].off == pytest.approx(2)
    assert costs["link"].measured_s == pytest.approx(1.5e-3)
    assert found.rates.matmul_flops == pytest.approx(PRESETS["cpu"].matmul_flops / 2)
    assert "matmul_flops" in found.advice() and "rates={" in str(found)


def test_kernels_that_run_beside_others_are_hidden():
    step = [("ncclDevKernel_SendRecv", "kernel", 0, 3000), ("gemm", "kernel", 500, 1000), ("gemm", "kernel", 1000, 1000),
            ("ncclDevKernel_SendRecv", "kernel", 4000, 1000)]
    found = beside(report_of([1e-3, 1e-3]), trace_of([step]))
    assert [round(r.measured_s, 9) for r in found.exposures] == [1.5e-3, 1e-3]


def test_another_number_of_collectives_is_refused():
    with pytest.raises(fs.ConfigError, match="ran 0 collectives"):
        beside(report_of([1e-3]), trace_of([[]]))
    with pytest.raises(fs.ConfigError, match="no farskip_step"):
        beside(report_of([1e-3]), {"traceEvents": []})


# --- on two ranks -------------------------------------------------------------------------------------------------

def compared(rank):
    """Explained and compared on two ranks; then rank 1 explains something else."""
    model = families.tiny(FAMILY, jitter=0.1)
    fs.expert_parallel(model, dist.group.WORLD)
    report = fs.explain(model, predict=False, **families.inputs(FAMILY))
    fs.check_agreement(report)
    other = fs.explain(model, config={"layers": (1,)} if rank else None, predict=False, **families.inputs(FAMILY))
    with contextlib.suppress(KeyError):
        try:
            fs.check_agreement(other)
        except fs.CollectiveError as error:
            return report.rank, len(report.collectives), str(error)
    return report.rank, len(report.collectives), ""


@pytest.mark.slow
def test_ranks_agree_on_what_is_explained():
    for rank, (own, collectives, said) in enumerate(run_ranks(compared, 2)):
        assert own == rank and collectives == 6
        assert "layers rewired is [1] on rank 1, and [0, 1, 2] on rank 0" in said


def profiled(rank):
    """A step that is really compiled, run and measured; and one that is not this model's."""
    torch.manual_seed(0)
    model = families.tiny("qwen3_moe", num_hidden_layers=2)
    fs.expert_parallel(model, dist.group.WORLD)
    tokens = families.inputs("qwen3_moe")
    with torch._inductor.config.patch(fx_graph_cache=False), torch._functorch.config.patch(enable_autograd_cache=False):
        fs.apply(model)
        found = fs.profile(lambda: model(**tokens).logits.sum().backward(), model, steps=2)
    try:
        fs.profile(lambda: None, model)
    except fs.ConfigError as error:
        return found.measured_s, found.step_s, [r.place for r in found.exposures], str(error), found.trace["traceEvents"] != []
    return None


@pytest.mark.slow
def test_profile_of_a_compiled_step():
    places = [f"{part} of layer {k}" for k in (0, 1) for part in ("counts", "dispatch", "combine")]
    backward = [f"{part} of layer {k}" for k in (1, 0) for part in ("combine", "dispatch")]
    for measured, step, found, said, events in run_ranks(profiled, 2):
        assert 0 <= measured < step and events
        assert sorted(found[:6]) == sorted(places) and sorted(found[6:]) == sorted(backward)
        assert "ran 0 collectives" in said
