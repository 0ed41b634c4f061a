"""Caches never return another configuration's graph: Inductor's FX graph cache and AOTAutograd's, in fresh processes.

A worker process compiles the same model under several configurations in one cache directory, and reports for each: the
error against the oracle, and whether the caches hit. The second process gets some of the first one's configurations and
some new ones.
"""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

SETTINGS = {
    "farskip": {"connectivity": "farskip"},
    "ladder": {"connectivity": "ladder"},
    "one_layer": {"connectivity": "farskip", "layers": [1]},
    "no_overlap": {"connectivity": "farskip", "overlap": False},
}
FAMILY, LAYERS = "qwen2_moe", 2


def worker(names):
    """In a process of its own: for each setting, a line of JSON."""
    import families
    from compiled import run
    from oracle import oracle
    from torch._dynamo.utils import counters

    model, inputs = families.tiny(FAMILY, jitter=0.1, num_hidden_layers=LAYERS), families.inputs(FAMILY)
    before = snapshot()
    with torch.no_grad():
        want = {name: oracle(FAMILY, model, inputs, setting["connectivity"], setting.get("layers"))
                for name, setting in SETTINGS.items()}
        for name in names:
            counters.clear()
            got = run(model, inputs, **SETTINGS[name])
            errors = {other: (got - expected).abs().max().item() for other, expected in want.items()}
            print(json.dumps({
                "name": name, "errors": errors, "settings_changed": snapshot() != before,
                "fx": [counters["inductor"][f"fxgraph_cache_{what}"] for what in ("hit", "miss")],
                "aot": [counters["aot_autograd"][f"autograd_cache_{what}"] for what in ("hit", "miss")],
            }), flush=True)


def snapshot():
    import torch._functorch.config
    import torch._inductor.config
    return [module.get_config_copy() for module in (torch._dynamo.config, torch._inductor.config,
                                                    torch._functorch.config)]


def start(names, cache):
    code = f"import conftest, test_caches; test_caches.worker({list(names)!r})"
    return subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parent, text=True, capture_output=True, timeout=900,
        env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(cache), "TORCHINDUCTOR_FX_GRAPH_CACHE": "1",
             "TORCHINDUCTOR_AUTOGRAD_CACHE": "1"})


def results(names, cache):
    done = start(names, cache)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


@pytest.mark.slow
def test_a_warm_cache_gives_each_configuration_its_own_graph(tmp_path):
    first = results(["farskip", "ladder"], tmp_path)
    second = results(["one_layer", "ladder", "no_overlap", "farskip"], tmp_path)
    for each in first + second:
        name, errors = each["name"], each["errors"]
        same = {"farskip", "no_overlap"} if name in ("farskip", "no_overlap") else {name}
        for other, error in errors.items():
            assert (error < 2e-4) if other in same else (error > 1e-2), (name, other, error)
        assert not each["settings_changed"]
    warm = {each["name"]: each for each in second}
    for each in (*first, warm["one_layer"], warm["no_overlap"]):
        assert each["fx"][0] == 0 and each["fx"][1] > 0 and each["aot"][0] == 0, f"a foreign graph for {each['name']}"
    for name in ("farskip", "ladder"):
        assert warm[name]["aot"][0] > 0 and warm[name]["fx"][1] == 0, f"{name} was compiled again"


def test_the_divisor_of_averaged_gradients_is_in_the_key(fake_group):
    """Graphs that differ in nothing but data parallelism, with one name for the group. AOTAutograd's cache does not take
    them (the means are autograd functions); Inductor's key, of the graphs that AOTAutograd makes, sees divisor and buckets."""
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch._aot_autograd.autograd_cache import BypassAOTAutogradCache, check_cacheable
    from torch._inductor.codecache import compiled_fx_graph_hash

    from farskip_fx.data_parallel import DataParallel, average_gradients

    model, x = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 4)), torch.ones(3, 8)
    name = dist.group.WORLD.group_name

    def gradients(run):
        model.zero_grad()
        run(x).square().sum().backward()
        return [p.grad.clone() for p in model.parameters()]

    def keys(size, bucket_mb):
        found = []
        parallel = DataParallel(dense_group=name, dense_size=size, expert_group=name, expert_size=size, bucket_mb=bucket_mb)

        def keep(gm, inputs):
            found.append(compiled_fx_graph_hash(gm, inputs, {}, [])[0])
            return make_boxed_func(gm.forward)

        def backend(gm, inputs):
            average_gradients(gm, inputs, parallel)
            gm.recompile()
            with pytest.raises(BypassAOTAutogradCache):
                check_cacheable(gm)
            return aot_autograd(fw_compiler=keep, bw_compiler=keep)(gm, inputs)

        torch._dynamo.reset()
        for mean, whole in zip(gradients(torch.compile(model, backend=backend)), plain):
            torch.testing.assert_close(mean * size, whole)      # the fake group adds nothing
        return found

    plain = gradients(model)
    forward, backward = zip(*(keys(*way) for way in [(2, 25), (4, 25), (4, 1e-4), (2, 25)]))
    assert len(set(forward)) == 1 and len(set(backward)) == 3 and backward[0] == backward[3]


@pytest.mark.parametrize("environment", [{"TORCH_COMPILE_DISABLE": "1"}, {"TORCHDYNAMO_DISABLE": "1"}],
                         ids=["TORCH_COMPILE_DISABLE", "TORCHDYNAMO_DISABLE"])
def test_dynamo_switched_off_by_the_environment_raises(environment):
    """Compilation off: a converted model raises, it does not run its original connectivity."""
    code = ("import conftest, families, farskip_fx as fs\n"
            f"model = fs.apply(families.tiny({FAMILY!r}, num_hidden_layers=2))\n"
            f"model(**families.inputs({FAMILY!r}))\n")
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent, env={**os.environ, **environment},
                          text=True, capture_output=True, timeout=600)
    assert done.returncode != 0 and "WrongConnectivityError" in done.stderr, done.stderr[-2000:]
    assert "farskip_fx.remove(model)" in done.stderr
