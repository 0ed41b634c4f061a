"""Formats that people already open: Chrome trace, tlparse's artifacts, Model Explorer, dumps that run."""
import copy
import gzip
import importlib.util
import json
import logging
import operator
import re
import threading

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from torch import fx, nn
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from farskip_fx import artifacts
from farskip_fx.artifacts import Shown
from farskip_fx.config import FarskipConfig
from farskip_fx.dumps import dump_graphs
from farskip_fx.passes._torch import lowered
from farskip_fx.report import Report
from farskip_fx.view import model_explorer
from farskip_fx.view.trace import trace
from programs import LayerSpec, Program

HOSTILE = 'a"b\'c</script><img src=x>\x1b[31m\n\\ {0} %s "rank": 7 \u202e\u00e9\U0001f600 """ MySyncMemcpy ' + "long/" * 400


# --- Chrome trace ------------------------------------------------------------------------------------------------

def event(start, seconds, lane="compute", name="mm", layer=0, part="all"):
    return {"lane": lane, "start": start, "seconds": seconds, "names": [name], "layer": layer, "block": "moe", "part": part}


def timeline(end, *events):
    exchanges = [{"name": e["names"][0], "op": "all_to_all_single", "kind": "all_to_all_single", "group": e["lane"], "bytes": 8,
                  "seconds": e["seconds"], "hidden_s": 0.0, "exposed_s": 0.0, "behind": ["mm"], "needed_by": "mm",
                  "layer": e["layer"]} for e in events if e["lane"] != "compute"]
    return {"seconds": end, "exposed_s": 0.0, "peak_bytes": 1 << 20, "events": list(events), "collectives": exchanges}


def report(name="mm", rank=3):
    """The exchange takes 4 ms: none of it hidden before, 3 ms after; backward: none of 4 either way."""
    alone = timeline(10e-3, event(0, 6e-3, name=name), event(6e-3, 4e-3, "link 0", "exchange", part="dispatch"))
    hidden = timeline(7e-3, event(0, 6e-3, name=name), event(3e-3, 4e-3, "link 0", "exchange", part="dispatch"))
    return {"rank": rank, "summary": f"{name}: rewired", "model": name, "graph": name, "phases": [
        {"name": "forward", "before": alone, "after": hidden, "bound_s": 0.0, "reason": ""},
        {"name": "backward", "before": alone, "after": alone, "bound_s": 0.0, "reason": ""}]}


def hidden_percent(events):
    """What Holistic Trace Analysis 0.5 computes, rewritten from its rules."""
    kernels = [e for e in events if e.get("ph") == "X" and "dur" in e and e.get("args", {}).get("stream", -1) != -1]
    compute, links = [], []
    for e in kernels:
        if re.match(r"^nccl.*Kernel", e["name"]):
            links.append((e["ts"], e["ts"] + e["dur"]))
        elif not re.match(r"(^Memcpy)|(^Memset)|(^dma)", e["name"]) and \
                not re.match(r"(^nccl.*Kernel)|(.*(Memcpy)|(Memset))|(.*Sync)", e["name"]):
            compute.append((e["ts"], e["ts"] + e["dur"]))
    both = sum(max(0, min(b, d) - max(a, c)) for a, b in compute for c, d in links)
    return round(100 * both / sum(b - a for a, b in links), 2)


@pytest.mark.parametrize("counted, percent", [("before", 0.0), ("after", 37.5), (None, 37.5)])
def test_holistic_trace_analysis_finds_what_is_hidden(counted, percent):
    made = trace(report(), counted=counted)
    assert hidden_percent(made["traceEvents"]) == percent
    # It takes the rank from the first match in the file.
    assert re.search(r'"rank":\s+(\d+)', json.dumps(made))[1] == "3"


def test_trace_lanes_and_times():
    events = trace(report())["traceEvents"]
    names = {e["pid"]: e["args"]["name"] for e in events if e["name"] == "process_name"}
    assert list(names.values()) == [f"farskip_fx predicted: {phase}, {order}" for phase in ("forward", "backward")
                                    for order in ("before", "after")]
    assert {e["args"]["name"] for e in events if e["name"] == "thread_name"} == {"compute", "link link 0"}
    runs = [e for e in events if e["ph"] == "X"]
    assert all(isinstance(e[key], int) and e[key] >= 0 for e in runs for key in ("pid", "tid", "ts", "dur"))
    first = {names[e["pid"]].partition(": ")[2]: e["ts"] for e in reversed(runs)}
    assert first == {"forward, before": 0, "forward, after": 0, "backward, before": 10_000, "backward, after": 7_000}
    assert {e["name"] for e in runs} == {"layer 0 moe: mm", "ncclKernel_all_to_all_single layer 0 moe dispatch"}
    with pytest.raises(ValueError, match="counted='both'"):
        trace(report(), counted="both")


def measured():
    """A step on a device, as torch.profiler writes it; half of the exchange is hidden."""
    kernel = {"ph": "X", "cat": "kernel", "pid": 0}
    return {"schemaVersion": 1, "distributedInfo": {"rank": 5}, "traceEvents": [
        {"ph": "M", "name": "process_name", "pid": "Spans", "tid": 0, "args": {"name": "Spans"}},
        {"ph": "X", "cat": "user_annotation", "name": "ProfilerStep#1", "pid": 4000, "tid": 1, "ts": 90.5, "dur": 50.0},
        {**kernel, "name": "gemm", "tid": 7, "ts": 100.25, "dur": 10.0, "args": {"stream": 7}},
        {**kernel, "name": "ncclDevKernel_SendRecv", "tid": 20, "ts": 105.25, "dur": 10.0, "args": {"stream": 20}}]}


@pytest.mark.parametrize("packed", [False, True])
def test_trace_with_a_measured_one(tmp_path, packed):
    path = tmp_path / ("trace.json.gz" if packed else "trace.json")
    data = json.dumps(measured()).encode()
    path.write_bytes(gzip.compress(data) if packed else data)
    both = trace(report(), path)
    theirs, ours = both["traceEvents"][:4], both["traceEvents"][4:]
    assert theirs == measured()["traceEvents"] and both["distributedInfo"] == {"rank": 5}
    assert {e["pid"] for e in ours} == {4001, 4002, 4003, 4004}
    assert min(e["ts"] for e in ours if e["ph"] == "X") == 100.25
    assert hidden_percent(both["traceEvents"]) == 50
    predicted = trace(report(), measured(), counted="after")["traceEvents"]
    assert hidden_percent(predicted) == 37.5 and not any("ProfilerStep" in e["name"] for e in predicted)


def test_trace_with_a_profile_of_a_cpu(tmp_path):
    with torch.profiler.profile() as profile, torch.profiler.record_function("ProfilerStep#0"):
        torch.ones(8) + 1
    profile.export_chrome_trace(str(tmp_path / "trace.json"))
    assert hidden_percent(trace(report(), tmp_path / "trace.json")["traceEvents"]) == 37.5


def test_trace_of_hostile_names_and_of_nothing():
    text = json.dumps(trace(report(HOSTILE)))
    made = json.loads(text)
    assert hidden_percent(made["traceEvents"]) == 37.5 and re.search(r'"rank":\s+(\d+)', text)[1] == "3"
    assert max(len(e["name"]) for e in made["traceEvents"]) <= 200
    assert trace({**report(), "phases": []})["traceEvents"] == []


# --- a compile that shows its graphs -----------------------------------------------------------------------------

@pytest.fixture
def program():
    torch._dynamo.reset()
    model = Program((LayerSpec("sdpa", "gather", shared="plain"),) * 3, seed=0)
    return model, torch.arange(12).view(2, 6)


def converted(model, ids):
    with torch.no_grad():
        return torch.compile(model, backend="farskip", options={"inner": "eager"})(ids)


class Listener(logging.Handler):
    """What ``TORCH_TRACE=folder`` writes, for tlparse."""

    def __init__(self):
        super().__init__()
        self.found = {}

    def emit(self, record):
        if "artifact" in record.metadata:
            self.found[record.metadata["artifact"]["name"]] = record.metadata["artifact"]["encoding"], record.payload


@pytest.fixture
def listener(monkeypatch):
    listener = Listener()
    monkeypatch.setattr(logging.getLogger("torch.__trace"), "handlers", [listener])
    return listener


def test_artifacts_for_tlparse(program, listener):
    converted(*program)
    ours = {name: found for name, found in listener.found.items() if name.startswith("farskip_")}
    assert list(ours) == ["farskip_before_normalize", "farskip_after_normalize", "farskip_after_rewire", "farskip_report",
                          "farskip_report_data", "farskip_report.html"]
    assert {encoding for encoding, _ in ours.values()} == {"string", "json"}
    assert "# farskip: reads" in ours["farskip_after_rewire"][1] and "reads" not in ours["farskip_before_normalize"][1]
    assert "3 of 3 layers rewired" in ours["farskip_report"][1]
    assert json.loads(ours["farskip_report_data"][1])["changes"]


def test_artifacts_cost_nothing_without_a_reader(program, monkeypatch):
    monkeypatch.setattr(logging.getLogger("torch.__trace"), "handlers", [])
    monkeypatch.setattr(artifacts, "readable", lambda gm: pytest.fail("printed for nobody"))
    monkeypatch.setattr(Shown, "_page", lambda self: pytest.fail("drawn for nobody"))
    converted(*program)


# --- dumps -------------------------------------------------------------------------------------------------------

def load(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def results(path, like):
    return [t for t in tree_leaves(load(path).run()) if isinstance(t, torch.Tensor) and t.shape == like.shape]


def stages(files):
    return {re.sub(r".*?_((before|after)_\w+|inputs|model_explorer)$", r"\1", p.stem): p for p in files.paths}


def test_dumps_run_to_the_same_numbers(program, tmp_path):
    model, ids = program
    original = model(ids).detach()
    with dump_graphs(tmp_path, save_inputs=True) as files:
        now = converted(model, ids)
    found = stages(files)
    assert list(found) == ["inputs", "before_normalize", "after_normalize", "after_rewire", "model_explorer"]
    assert files.paths == sorted(tmp_path.iterdir())
    for stage, expected in (("before_normalize", original), ("after_normalize", original), ("after_rewire", now)):
        torch.testing.assert_close(results(found[stage], now)[0], expected, rtol=0, atol=0)
    assert not torch.equal(original, now)
    assert "import farskip_fx" not in found["after_rewire"].read_text()


def dump_something(title="graph", node=torch.relu, *args):
    """What a compile does, in no time."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    x.meta["example_value"] = torch.ones(2, 3).t()
    call = graph.call_function(node, (x,))
    graph.output(call)
    gm = fx.GraphModule({}, graph)
    call.args = (x, *args)
    Shown(Report(graph=title, config=FarskipConfig()), []).graph("before_normalize", gm)


def test_dumps_end_with_their_block(tmp_path):
    with dump_graphs(tmp_path / "outer") as outer:
        with dump_graphs(tmp_path / "inner") as inner:
            late = Shown(Report(graph="late", config=FarskipConfig()), [])
            dump_something()
        dump_something()
        late.graph("before_normalize", fx.symbolic_trace(nn.ReLU()))    # a backward that is compiled after its block
        other = threading.Thread(target=dump_something)
        other.start()
        other.join()
    dump_something()
    assert [p.name for p in inner.paths] == ["n000_graph_before_normalize.py"]
    assert [p.name for p in outer.paths] == [
        f"n00{i}_{name}_before_normalize.py" for i, name in enumerate(("graph", "graph", "late"))]
    with pytest.raises(ZeroDivisionError), dump_graphs(tmp_path / "inner"):
        dump_something()
        1 / 0
    dump_something()        # a block that failed leaves nothing behind
    assert sorted(p.name[:4] for p in (tmp_path / "inner").iterdir()) == ["n000", "n001"]


def test_dumps_without_saved_inputs_are_the_same_each_time(tmp_path):
    with dump_graphs(tmp_path) as files:
        dump_something()
    module = load(files.paths[0])
    (given,) = module.inputs()
    assert given.shape == (3, 2) and given.stride() == (1, 3) and given.abs().min() > 0
    assert torch.equal(module.run(), given.relu())


def shown(title="graph"):
    """A backend that dumps a Dynamo graph and what AOTAutograd makes of it, and runs the first."""
    def backend(gm, inputs):
        seen = Shown(Report(graph=title, config=FarskipConfig()), inputs)
        seen.graph("before_normalize", gm)
        for graph in lowered(copy.deepcopy(gm), inputs):
            seen.schedule("before", graph)
            seen.schedule("after", graph)
        return gm.forward
    return backend


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, grad):
        return 2 * grad * ctx.saved_tensors[0]


class Body(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.kind, self.linear = kind, nn.Linear(4, 4)

    def forward(self, x):
        if self.kind == "checkpoint":
            return checkpoint(lambda y: torch.relu(self.linear(y)), x, use_reentrant=False)
        if self.kind == "function":
            return Square.apply(self.linear(x))
        if self.kind == "sizes":
            return self.linear(x) * x.shape[0] + torch.arange(x.shape[0])[:, None]
        count = (x > 0).sum().item()
        torch._check(count >= 0)
        torch._check(count <= 32)
        return torch.ones(count, 4).cumsum(0) + self.linear(x).sum()


@pytest.mark.parametrize("kind", ["checkpoint", "function", "sizes", "data"])
def test_dumps_of_what_is_no_plain_graph(kind, tmp_path):
    torch._dynamo.reset()
    torch.manual_seed(0)
    model, x = Body(kind), torch.randn(8, 4)
    with dump_graphs(tmp_path, save_inputs=True) as files, torch._dynamo.config.patch(capture_scalar_outputs=True):
        expected = torch.compile(model, backend=shown(), dynamic=kind == "sizes", fullgraph=True)(x).detach()
    found = stages(files)
    for stage in ("before_normalize", "before_schedule_forward", "after_schedule_forward"):
        torch.testing.assert_close(results(found[stage], expected)[0], expected)
    if kind in ("sizes", "data"):       # a backward that AOTAutograd traces at once; its inputs are random
        assert tree_leaves(load(found["after_schedule_backward"]).run())


def test_dump_with_collectives_says_what_it_needs(fake_group, tmp_path):
    torch._dynamo.reset()
    linear = nn.Linear(4, 4)

    def exchange(x):
        return funcol.all_to_all_single_autograd(linear(x), None, None, dist.group.WORLD) * 2

    with dump_graphs(tmp_path) as files:
        torch.compile(exchange, backend=shown(), fullgraph=True)(torch.ones(8, 4))
    for stage, path in stages(files).items():
        module = load(path)
        assert "needs the process group" in " ".join(module.__doc__.split()), stage
        assert tree_leaves(module.run())


def test_dump_that_cannot_run_imports_and_says_why(tmp_path):
    def local(x):
        return x

    for number, (call, why) in enumerate([((local,), "local"), ((torch.add, object()), "no Python")]):
        with dump_graphs(tmp_path) as files:
            dump_something(HOSTILE, *call)
        module = load(files.paths[0])
        assert files.paths[0].name.startswith(f"n00{number}_a_b_c_script")
        assert "It cannot run" in module.__doc__ and why in module.OBSTACLE
        with pytest.raises(RuntimeError, match="cannot run from source"):
            module.run()


def test_dump_of_hostile_names_and_constants(tmp_path):
    graph = fx.Graph()
    x = graph.placeholder("x")
    x.meta["example_value"] = torch.ones(2, 2)
    graph.output(graph.call_function(torch.add, (x, graph.get_attr("inner.a constant"))))
    root = nn.Module()
    root.inner = nn.Module()
    root.inner.register_buffer("a constant", torch.full((2, 2), 5.0))
    with dump_graphs(tmp_path) as files:
        Shown(Report(graph=HOSTILE, config=FarskipConfig()), []).graph("before_normalize", fx.GraphModule(root, graph))
    module = load(files.paths[0])
    assert torch.equal(module.run(), module.inputs()[0] + 5)


@torch.library.custom_op("farskip_formats::twice", mutates_args=())
def twice(x: torch.Tensor) -> torch.Tensor:
    return 2 * x


@pytest.mark.parametrize("op", [torch.ops.farskip_formats.twice, torch.ops.farskip_formats.twice.default])
def test_dump_imports_what_registers_an_operation(op, tmp_path):
    with dump_graphs(tmp_path) as files:
        dump_something("graph", op)
    module = load(files.paths[0])
    assert f"\nimport {__name__}\n" in files.paths[0].read_text()
    assert torch.equal(module.run(), 2 * module.inputs()[0])


def test_report_comes_again_with_a_backward_that_is_compiled_later(listener):
    seen = Shown(Report(graph="graph", config=FarskipConfig()), [])
    gm = fx.symbolic_trace(nn.ReLU())
    seen.schedule("before", gm)
    seen.schedule("after", gm)
    assert "farskip_report" not in listener.found
    seen.report()
    listener.found.pop("farskip_report")
    seen.schedule("before", gm)
    seen.schedule("after", gm)
    assert {"farskip_after_schedule_forward", "farskip_before_schedule_backward", "farskip_report"} <= set(listener.found)


@pytest.mark.slow
def test_dumps_of_a_schedule(program, tmp_path):
    model, ids = program
    for name in ("first", "again"):         # the second time Inductor has it in its cache
        torch._dynamo.reset()
        with dump_graphs(tmp_path / name, save_inputs=True) as files, torch.no_grad():
            now = torch.compile(model, backend="farskip")(ids)
        for stage in ("before_schedule_forward", "after_schedule_forward"):
            torch.testing.assert_close(results(stages(files)[stage], now)[0], now)


# --- Model Explorer ----------------------------------------------------------------------------------------------

def test_model_explorer_has_both_graphs_and_the_changed_edges(program, tmp_path):
    model, ids = program
    with dump_graphs(tmp_path) as files:
        converted(model, ids)
    both = json.loads(stages(files)["model_explorer"].read_text())
    assert both["label"] and both["graphSorting"] == "name_asc"
    assert [graph["id"] for graph in both["graphs"]] == ["1 before", "2 after"]
    overlays = []
    for graph in both["graphs"]:
        nodes = {node["id"]: node for node in graph["nodes"]}
        assert len(nodes) == len(graph["nodes"])
        edges = {(e["sourceNodeId"], node["id"]) for node in graph["nodes"] for e in node["incomingEdges"]}
        assert {source for source, _ in edges} <= set(nodes)
        assert {"layers/0", "layers/2"} <= {"/".join(n["namespace"].split("/")[:2]) for n in graph["nodes"]}
        (overlay,) = graph["tasksData"]["edgeOverlaysDataListLeftPane"][0]["overlays"]
        assert overlay["edges"]
        for edge in overlay["edges"]:       # an overlay shows edges that are there
            assert (edge["sourceNodeId"], edge["targetNodeId"]) in edges
            attributes = {a["key"]: a["value"] for a in nodes[edge["targetNodeId"]]["attrs"]}
            assert " reads " in attributes["farskip_fx"] and nodes[edge["targetNodeId"]]["style"]["borderColor"]
        overlays.append({(e["sourceNodeId"], e["targetNodeId"]) for e in overlay["edges"]})
        assert all(isinstance(a["value"], (str, dict)) for n in graph["nodes"] for a in n["attrs"])
    assert not overlays[0] & overlays[1] and len(overlays[0]) == len(overlays[1])


def test_model_explorer_of_hostile_names():
    graph = fx.Graph()
    x = graph.placeholder("x")
    pair = graph.call_function(torch.max, (x, 1))
    pair.meta = {"nn_module_stack": {"1": (f"L['self'].layers.0.{HOSTILE}", nn.Module)},
                 "example_value": (torch.ones(2), torch.ones(2, dtype=torch.long))}
    item = graph.call_function(operator.getitem, (pair, 1))
    graph.output(item)
    gm = fx.GraphModule({}, graph)
    change = {"layer": 0, "block": "moe", "node": item.name, "op": "getitem", "was": pair.name, "now": "gone",
              "source": HOSTILE}
    made = json.loads(json.dumps(model_explorer.graphs(gm, gm, [change], label=HOSTILE)))
    before, after = made["graphs"]
    nodes = {node["id"]: node for node in before["nodes"]}
    assert nodes[item.name]["incomingEdges"] == [
        {"sourceNodeId": pair.name, "sourceNodeOutputId": "1", "targetNodeInputId": "0"}]
    assert [m["attrs"][0]["value"] for m in nodes[pair.name]["outputsMetadata"]] == ["float32[2]", "int64[2]"]
    parts = nodes[pair.name]["namespace"].split("/")
    assert parts[:2] == ["layers", "0"] and ";" not in nodes[pair.name]["namespace"] and max(map(len, parts)) <= 100
    assert not after["tasksData"]["edgeOverlaysDataListLeftPane"][0]["overlays"][0]["edges"]      # "gone" is not in it
