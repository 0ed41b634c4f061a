"""The lab: link, launcher, calibration, formulas, schema. Nothing here asserts a time of this machine."""
from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from farskip_fx.bench import link as links
from farskip_fx.bench.calibrate import CLOSE, find_rate, first_rate, link_rates, next_rate
from farskip_fx.bench.figures import Phase, Spread, bound, fit_rounds, hidden, limit
from farskip_fx.bench.launch import RankFailed, run_ranks
from farskip_fx.bench.link import LinkRefused, open_link
from farskip_fx.bench.spec import Shape, Spec, SpecError

ROOT = Path(__file__).resolve().parent.parent


# --- link -----------------------------------------------------------------------------------------
@pytest.fixture(params=["netns", "userns"])
def link(request):
    try:
        opened = open_link((request.param,))
        made = opened.__enter__()
    except LinkRefused as refused:
        pytest.skip(f"{request.param} not permitted here: {refused}")
    yield made
    opened.__exit__(None, None, None)


def inside(link, rank, *command):
    return subprocess.run(link.enter(rank) + list(command), capture_output=True, text=True, check=True).stdout


def test_a_word_crosses_the_link(link):
    listen = ("import socket, sys; s = socket.create_server((sys.argv[1], 7000)); print('up', flush=True); "
              "s.accept()[0].sendall(b'hello')")
    call = "import socket, sys; print(socket.create_connection((sys.argv[1], 7000), 10).recv(9).decode())"
    server = subprocess.Popen(link.enter(1) + [sys.executable, "-c", listen, links.address_of(1)],
                              stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout.readline() == "up\n"
        assert inside(link, 0, sys.executable, "-c", call, links.address_of(1)) == "hello\n"
        assert link.device(0) in inside(link, 0, "ip", "route", "get", links.address_of(1))
    finally:
        server.kill()
        server.wait()
        server.stdout.close()


def test_rate_is_set_on_both_ends_changed_and_taken_away(link):
    def shaping(rank):
        return inside(link, rank, "tc", "qdisc", "show", "dev", link.device(rank))

    for rate, shown in ((200_000_000, "200Mbit"), (50_000_000, "50Mbit")):
        link.set_rate(rate)
        assert all("tbf" in shaping(rank) and shown in shaping(rank) for rank in (0, 1))
    link.set_rate(None)
    assert not any("tbf" in shaping(rank) for rank in (0, 1))


def test_two_links_at_once_do_not_meet(link):
    with open_link((link.kind,)) as other:
        link.set_rate(10_000_000)
        assert "tbf" not in inside(other, 0, "tc", "qdisc", "show", "dev", other.device(0))


@pytest.mark.parametrize("kind", ["netns", "userns"])
def test_more_ranks_stand_around_a_bridge(kind):
    """Each has a namespace of its own, reaches every other, and is shaped both ways."""
    listen = ("import socket, sys; s = socket.create_server((sys.argv[1], 7000)); print('up', flush=True); "
              "[s.accept()[0].sendall(b'hello') for _ in range(2)]")
    call = "import socket, sys; print(socket.create_connection((sys.argv[1], 7000), 10).recv(9).decode())"
    try:
        with open_link((kind,), ranks=3) as link:
            server = subprocess.Popen(link.enter(2) + [sys.executable, "-c", listen, links.address_of(2)],
                                      stdout=subprocess.PIPE, text=True)
            try:
                assert server.stdout.readline() == "up\n"
                for rank in (0, 1):
                    assert inside(link, rank, sys.executable, "-c", call, links.address_of(2)) == "hello\n"
            finally:
                server.kill()
                server.wait()
                server.stdout.close()
            link.set_rate(50_000_000)
            sends = [inside(link, rank, "tc", "qdisc", "show", "dev", link.device(rank)) for rank in range(3)]
            receives = [inside(link, 3, "tc", "qdisc", "show", "dev", links.port_of(rank)) for rank in range(3)]
            assert all("tbf" in shown and "50Mbit" in shown for shown in sends + receives)
            assert "3 ranks" in link.describe()
    except LinkRefused as refused:
        pytest.skip(f"{kind} not permitted here: {refused}")


def test_nothing_is_left_after_the_block():
    try:
        with open_link(("netns", "userns")) as link:
            anchors = link.anchors
    except LinkRefused as refused:
        pytest.skip(f"no namespaces here: {refused}")
    assert not any(Path(f"/proc/{anchor}").exists() for anchor in anchors)


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_nothing_is_left_of_a_run_that_is_killed(how):
    code = """
import time
from farskip_fx.bench.link import LinkRefused, open_link
try:
    with open_link(("netns", "userns")) as link:
        print(*link.anchors, flush=True)
        time.sleep(60)
except LinkRefused as refused:
    print("refused", refused, flush=True)
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    said = process.stdout.readline().split()
    if said[0] == "refused":
        process.wait()
        pytest.skip(" ".join(said))
    process.send_signal(how)
    process.wait()
    process.stdout.close()
    assert gone([int(pid) for pid in said])


def gone(pids, within_s=10.0):
    end = time.monotonic() + within_s
    while time.monotonic() < end:
        if not any(Path(f"/proc/{pid}").exists() for pid in pids):
            return True
        time.sleep(0.05)
    return False


def test_falls_back_in_order_and_says_why(monkeypatch):
    made = []

    def make(kind, stack, ranks):
        made.append(kind)
        if kind != "loopback":
            raise LinkRefused(f"no {kind} today")
        return links.Link(kind)

    monkeypatch.setattr(links, "_make", make)
    with open_link() as link:
        assert made == ["netns", "userns", "loopback"]
        assert link.refused == {"netns": "no netns today", "userns": "no userns today"}
        assert "slow figures equal the fast ones" in link.describe() and "no userns today" in link.describe()
        assert link.enter(0) == [] and link.device(1) == "lo" and not link.as_dict()["emulated"]
        link.set_rate(1_000_000)            # nothing to shape, nothing to fail


def test_a_missing_tool_is_named(monkeypatch):
    monkeypatch.setattr(links.shutil, "which", lambda tool: None if tool == "tc" else f"/bin/{tool}")
    with pytest.raises(LinkRefused, match="tc not installed"):
        with open_link(("netns",)):
            pass


# --- launcher -------------------------------------------------------------------------------------
RANK = """
import sys, time
from farskip_fx.bench.parent import Parent, settle
settle()
parent = Parent()
"""


@pytest.fixture
def ranks(tmp_path, monkeypatch):
    """Runs a few lines as both ranks over loopback and gives what they told."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(ROOT)]))

    def run(lines, silence_s=60.0):
        (tmp_path / "some_rank.py").write_text(RANK + lines)
        told = []
        with open_link(("loopback",)) as link:
            run_ranks(link, "some_rank", tmp_path / "spec.json", lambda rank, event: told.append((rank, event)),
                      silence_s=silence_s)
        return told

    return run


def test_events_arrive_and_rate_requests_are_answered(ranks):
    told = ranks("""
if parent.rank == 0:
    parent.set_rate(1_000_000)
parent.tell("here", rank=parent.rank)
print("noise on standard output is no event")
""")
    assert sorted(rank for rank, event in told if event == {"event": "here", "rank": rank}) == [0, 1]


def test_the_traceback_of_a_failing_rank_ends_the_run(ranks):
    with pytest.raises(RankFailed, match="rank 1 failed:\nthe traceback"):
        ranks("""
if parent.rank == 1:
    parent.tell("failed", traceback="the traceback")
    sys.exit(1)
time.sleep(60)
""")


@pytest.mark.slow
def test_the_cause_is_shown_and_not_the_broken_connection(ranks):
    with pytest.raises(RankFailed) as failed:
        ranks("""
if parent.rank == 0:
    parent.tell("failed", traceback="Connection closed by peer")
else:
    time.sleep(0.3)
    parent.tell("failed", traceback="the cause")
time.sleep(60)
""")
    assert "the cause" in str(failed.value) and "Connection closed" not in str(failed.value)


@pytest.mark.slow
def test_a_rank_that_dies_silently_is_reported_with_what_it_printed(ranks):
    with pytest.raises(RankFailed, match="(?s)rank 1 ended with signal SIGABRT.*the last words"):
        ranks("""
import os
if parent.rank == 1:
    print("the last words", flush=True)
    os.abort()
time.sleep(60)
""")


def test_silence_ends_the_run(ranks, monkeypatch):
    monkeypatch.setattr("farskip_fx.bench.launch.POLL_S", 0.1)
    with pytest.raises(RankFailed, match="no rank said anything"):
        ranks("time.sleep(60)", silence_s=0.5)


# --- calibration ----------------------------------------------------------------------------------
def link_that_yields(share, floor_s=0.02, sent=50e6):
    """Seconds at a nominal rate, for a link that reaches only a share of it."""
    return lambda rate: floor_s + 8 * sent / (rate * share)


@pytest.mark.parametrize("share", [0.15, 0.5, 0.95])
def test_the_rate_is_found_whatever_the_link_yields(share):
    found = find_rate(link_that_yields(share), leaving_bytes=50e6, target_s=0.45, floor_s=0.02)
    assert found.close and abs(found.seconds / 0.45 - 1) <= CLOSE and found.tries <= 3


def test_a_target_below_the_floor_is_not_reached_and_says_so():
    found = find_rate(link_that_yields(0.7, floor_s=0.5), leaving_bytes=50e6, target_s=0.1, floor_s=0.5)
    assert not found.close and found.seconds >= 0.5


def test_one_correction_is_exact_where_the_model_holds_and_bounded_elsewhere():
    rate = first_rate(50e6, 0.45, 0.02)
    measured = link_that_yields(0.3)(rate)
    assert link_that_yields(0.3)(next_rate(rate, measured, 0.45, 0.02)) == pytest.approx(0.45, rel=1e-3)
    assert next_rate(rate, 100.0, 0.45, 0.02) == pytest.approx(4 * rate, rel=1e-6)


class Sent:
    def __init__(self, leaving, small=False):
        self.leaving, self.small = leaving, small


def test_link_rates_take_the_latency_off():
    exchanges = [Sent(64, small=True), Sent(1e6), Sent(2e6)]
    found = link_rates(exchanges, [0.001, 0.101, 0.201])
    assert found == {"link_bytes": pytest.approx(1e7), "link_latency": 0.001}
    with pytest.raises(SpecError, match="too small"):
        link_rates(exchanges[:1], [0.001])


def test_bytes_that_leave_a_rank():
    torch = pytest.importorskip("torch")
    from farskip_fx.bench.exchanges import Exchange, Stub

    def leaving(name, *rest, rank=0, size=2):
        op = getattr(torch.ops._c10d_functional, name).default
        return Exchange(op, (Stub((8, 4), torch.float32), *rest, "group"), rank, size).leaving

    assert leaving("all_to_all_single", [8], [6, 2]) == 32
    assert leaving("all_to_all_single", [8], [6, 2], rank=1) == 96
    assert leaving("all_to_all_single", [], []) == 64
    assert leaving("all_to_all_single", [0, 0], [0, 0]) == 0
    assert leaving("all_gather_into_tensor", 2) == 128
    assert leaving("reduce_scatter_tensor", "sum", 2) == 64
    assert leaving("all_reduce", "sum") == 128
    assert leaving("all_reduce", "sum", rank=3, size=4) == 192


# --- figures --------------------------------------------------------------------------------------
def test_bound_is_the_longer_of_compute_and_chain():
    #  compute |############|last combine|         chain |d|experts|c|router|d|experts|c|head|
    long_compute = Phase(compute=10.0, exchanges=(1.0, 1.0, 1.0, 1.0), serial=2.0, alone=1.0, tail=0.5)
    long_chain = Phase(compute=3.0, exchanges=(2.0, 2.0, 2.0, 2.0), serial=2.0, alone=2.0, tail=0.5)
    assert long_compute.bound == 11.0
    assert long_chain.bound == 10.5
    assert bound([long_compute, long_chain]) == 21.5    # forward and backward do not overlap
    assert limit(10.0, 4.0) == 10.0


def test_bound_with_means_of_gradients():
    """The last mean stands behind everything, the others only fill the link."""
    backward = Phase(compute=10.0, exchanges=(1.0, 1.0), serial=2.0, alone=0.5, tail=0.5, means=(1.0, 1.0, 1.5), last=1.5)
    assert backward.bound == 10.5                                       # compute
    assert replace(backward, compute=3.0).bound == 6.0                  # chain: exchanges, experts, head, the last mean
    assert replace(backward, compute=3.0, means=(3.0, 3.0, 1.5)).bound == 9.5       # link: exchanges and all means
    update = Phase(compute=2.0, exchanges=(), serial=0.0, alone=0.0, tail=0.0)
    assert bound([backward, update]) == 12.5                            # clipping waits for every mean


def test_the_design_documents_shape():
    """DESIGN.md 6.12: eight exchanges in 943 ms, experts 149 ms, compute 900 ms: a bound near 1,150."""
    phase = Phase(compute=900.0, exchanges=(943 / 8,) * 8, serial=149.0 + 40.0, alone=943 / 8, tail=15.0)
    assert phase.bound == pytest.approx(1150, rel=0.01)


def test_hidden():
    stock = 900.0, 1900.0
    assert hidden(stock, (900.0, 900.0)) == 1.0
    assert hidden(stock, (900.0, 1900.0)) == 0.0
    assert hidden(stock, (900.0, 1150.0)) == 0.75
    assert hidden(stock, (600.0, 850.0)) == 0.75        # compute that ours saves is not hidden communication
    assert hidden(stock, (900.0, 1150.0), beyond_reach=250.0) == 1.0
    assert hidden((900.0, 905.0), (880.0, 890.0)) is None           # loopback: nothing to hide


def test_exchanges_are_named_by_their_place():
    from farskip_fx.bench.table import exchange_names

    big = 1 << 20
    assert exchange_names([64, big, big, 64, big, big], backward=False) == [
        "counts 0", "dispatch 0", "combine 0", "counts 1", "dispatch 1", "combine 1"]
    assert exchange_names([big] * 4, backward=True) == ["combine' 1", "dispatch' 1", "combine' 0", "dispatch' 0"]
    assert exchange_names([big] * 4, backward=True, means=[False, True, False, True]) == [
        "combine' 0", "mean 0", "dispatch' 0", "mean 1"]


def test_spread_and_rounds():
    spread = Spread(((1.0, 2.0), (2.0, 2.0), (9.0, 2.0)))
    assert (spread.median, spread.best, spread.phase(0), spread.phases()) == (4.0, 3.0, 2.0, (2.0, 2.0))
    assert fit_rounds(8, 5.0, 90.0) == 8
    assert fit_rounds(8, 30.0, 90.0) == 3
    assert fit_rounds(8, 300.0, 90.0) == 2
    assert fit_rounds(1, 5.0, 90.0) == 1


# --- spec, command line ---------------------------------------------------------------------------
def test_spec_round_trip(tmp_path):
    spec = Spec(forward=Shape(layers=2), modes=("step",), ratios=(0.25, 0.5), seed=3, dp=2)
    spec.write(tmp_path / "spec.json")
    assert Spec.read(tmp_path / "spec.json") == spec
    assert spec.main_ratio == 0.5 and Spec(ratios=(0.25, 1.0)).main_ratio == 0.25


@pytest.mark.parametrize("spec, message", [
    (Spec(forward=Shape(experts=7)), "--experts 7 cannot be split"),
    (Spec(forward=Shape(top_k=9)), "--top-k 9"),
    (Spec(forward=Shape(layers=0)), "--layers must be at least 1"),
    (Spec(variants=("farskip",)), "must have stock"),
    (Spec(variants=("stock", "fast")), "unknown variant fast"),
    (Spec(ratios=(0.5, 0.0)), "above 0"),
    (Spec(rounds=0), "--rounds"),
    (Spec(dp=0), "--dp must be at least 1"),
    (Spec(dp=2, modes=("train",)), "--dp needs --mode step"),
    (Spec(bucket_mb=0.0), "--bucket-mb"),
])
def test_a_spec_that_cannot_be_measured_is_refused(spec, message):
    with pytest.raises(SpecError, match=message):
        spec.check()


def test_command_line(capsys):
    from farskip_fx.cli import main
    from farskip_fx.commands.bench import in_order

    with pytest.raises(SystemExit) as left:
        main(["bench", "--help"])
    assert left.value.code == 0
    said = capsys.readouterr().out
    assert all(word in said for word in ("--comm-ratio", "--mode", "--dp", "inductor_overlap", "examples:", "(512)"))
    assert main(["bench", "--experts", "7", "--no-netns"]) == 2
    assert "cannot be split" in capsys.readouterr().err
    assert in_order(["farskip"]) == ("stock", "farskip")


# --- end to end -----------------------------------------------------------------------------------
TINY = Shape(layers=2, hidden=64, tokens=64, experts=4, moe_intermediate=32, heads=2, kv_heads=1, head_dim=32, vocab=64)


@pytest.mark.slow
def test_end_to_end_without_inductor(tmp_path):
    """Every step of a run and the schema of its JSON; ``aot_eager`` takes seconds where Inductor takes minutes."""
    from rich.console import Console

    from farskip_fx.bench.run import run, wrong

    path, ratios = tmp_path / "out" / "bench.json", (0.5, 1.0)
    spec = Spec(forward=TINY, train=TINY, modes=("train",), variants=("stock", "farskip"),
                ratios=ratios, inner="aot_eager", rounds=2, silence_s=480.0)
    with open(os.devnull, "w") as nowhere:
        result = run(spec, Console(file=nowhere), json_path=path)
    assert json.loads(path.read_text()) == json.loads(json.dumps(result))
    assert not wrong(result)
    for mode in spec.modes:
        check_schema(result, mode, ["stock", "farskip"])
        assert [point["ratio"] for point in result[mode]["curve"]] == list(ratios)
        # Counts, dispatch and combine of each layer; backward has no counts.
        assert len(result[mode]["exchanges"]) == 3 * TINY.layers + (2 * TINY.layers if mode == "train" else 0)
        assert result[mode]["traffic"]["means_bytes"] == []
    assert [layer["rewired"] for layer in result["layers"]] == [True] * TINY.layers


@pytest.mark.slow
def test_a_whole_step_with_replicas(tmp_path):
    """dp 2 x ep 2: gradients of the whole batch's reference, the means among the exchanges, a third phase."""
    from rich.console import Console

    from farskip_fx.bench.run import run, wrong

    shape = replace(TINY, layers=1)
    spec = Spec(train=shape, modes=("step",), variants=("stock", "farskip"), ratios=(1.0,), inner="aot_eager", rounds=2,
                silence_s=480.0, dp=2, bucket_mb=0.02)
    screen = Console(record=True, file=open(os.devnull, "w"), width=200)
    result = run(spec, screen)
    assert not wrong(result)
    check_schema(result, "step", ["stock", "farskip"])
    figures = result["step"]
    for variant in figures["variants"]:
        assert variant["norm_diff"] < 1e-4
        assert len(variant["fast_phases_ms"]) == len(variant["slow_phases_ms"]) == len(figures["bound_parts"]) == 3
    kinds = [one["kind"] for one in figures["exchanges"]]
    means = len(figures["traffic"]["means_bytes"])
    assert means > 3 and kinds.count("all_to_all_single") == 5
    assert kinds.count("all_reduce") == means + 1               # and the norm's
    # Ring: 2 (n - 1) / n of every gradient. Dense ones travel among four ranks, shards of experts among two.
    dense, experts = parameters_of(shape)
    assert sum(figures["traffic"]["means_bytes"]) == 4 * (2 * 3 / 4 * dense + 2 * 1 / 2 * experts / 2)
    assert (figures["dp"], figures["ep"]) == (2, 2)
    assert ("Only ratios mean something" in screen.export_text()) == result["machine"]["cores_shared"]


def parameters_of(shape):
    """Numbers of them: dense, experts."""
    from farskip_fx.bench.model import build

    sizes = {name: parameter.numel() for name, parameter in build(shape, 0).named_parameters()}
    experts = sum(size for name, size in sizes.items() if ".experts." in name)
    return sum(sizes.values()) - experts, experts


def check_schema(result, mode, names):
    figures = result[mode]
    assert [variant["name"] for variant in figures["variants"]] == names
    for variant in figures["variants"]:
        assert variant["fast_ms"] >= variant["fast_min_ms"] > 0 and variant["slow_ms"] >= variant["slow_min_ms"] > 0
        assert variant["max_diff"] < 1e-4
        if mode != "forward":
            assert variant["loss_diff"] < 1e-4 and variant["grad_diff"] < 1e-3
    assert figures["limit_ms"] > 0 and figures["bound_ms"] > 0 and "hidden" in figures
    assert set(result["layers"][0]) >= {"index", "attention_reads", "mlp_reads", "rewired", "reason"}
    assert result["link"]["kind"] in links.KINDS
    assert {"cpu", "cores"} <= set(result["machine"]) and {"torch", "transformers", "python"} <= set(result["versions"])
