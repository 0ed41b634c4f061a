"""Connectivities of your own, and one for each layer: the rewired model is what a plain loop over its layers computes.

docs/connectivity.md is run by this file, and its two examples are what is tested. The loops below share nothing with
the passes: on random programs the stream is a sum of contributions, and of transformers' models the submodules are
called one by one.
"""
import json
import os
import pickle
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings, strategies as st
from torch._dynamo.exc import BackendCompilerFailed

import families
import farskip_fx as fs
import oracle as reference
from compiled import _attempt, _copy, cause, logits_of, run, run_each
from farskip_fx.backend import agree
from farskip_fx.connectivity import BUILT_IN, CONNECTIVITIES, DENSE, Missing, Reads, ask
from farskip_fx.per_layer import PerLayer
from programs import ADDS, MIXERS, MLPS, SHARED, TOKENS, VOCABULARY, LayerSpec, Program

ROOT = Path(__file__).parents[1]
MOE = LayerSpec("sdpa", "gather", "plain")
BARE = LayerSpec("products", "einsum", "none", view=True)
DENSE_LAYER = LayerSpec("conv", "gated_dense")
MIXED = (DENSE_LAYER, MOE, BARE, LayerSpec("decay", "loop", "gated", scale=0.5), MOE)


@pytest.fixture(scope="module", autouse=True)
def document():
    """Runs the document; its connectivities are registered while this file runs."""
    before = dict(CONNECTIVITIES)
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs/connectivity.md").read_text(), re.S | re.M)
    assert len(blocks) == 4
    names = {}
    torch._dynamo.reset()
    for block in blocks:
        exec(compile(block, "docs/connectivity.md", "exec"), names)
    assert set(CONNECTIVITIES) - set(before) == {"skip_two", "shortcut"}
    yield names
    _restore(before)


@pytest.fixture
def registry():
    before = dict(CONNECTIVITIES)
    yield
    _restore(before)


def _restore(before):
    torch._dynamo.reset()       # what was compiled under a name must not outlive it
    CONNECTIVITIES.clear()
    CONNECTIVITIES.update(before)
    DENSE.intersection_update(before)


# --- definitions ------------------------------------------------------------------------------------------------

class Stream:
    """A program's stream as a sum: the embedding and, for each layer, what its blocks added, already scaled."""

    def __init__(self, program, ids):
        self.program, self.embedded = program, program.embed(ids)
        self.attention, self.routed, self.ready = [], [], []    # ready: shared expert, or all of a dense MLP

    def whole(self, k):
        """Before layer k."""
        return self.embedded + sum(a + r + s for a, r, s in zip(self.attention[:k], self.routed[:k], self.ready[:k]))

    def attend(self, state):
        layer = self.program.layers[len(self.attention)]
        self.attention.append(layer.spec.scale * layer.attention(state))

    def feed(self, state, of_shared=None):
        layer = self.program.layers[len(self.routed)]
        routed, ready = self._parts(layer, state)
        if of_shared is not None and layer.spec.is_moe:
            ready = self._parts(layer, of_shared)[1]
        self.routed.append(routed)
        self.ready.append(ready)

    def _parts(self, layer, state):
        x = layer.ffn_input(state)
        return [0 if part is None else layer.spec.scale * part.view(x.shape) for part in layer.mlp.parts(x)]

    def logits(self):
        program = self.program
        x = self.whole(len(program.layers))
        return program.head(x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * program.final)


def skip_two(program, ids):
    s = Stream(program, ids)
    for k in range(len(program.layers)):
        R = s.whole(k)
        s.attend(R - sum(s.routed[max(0, k - 2):k]))
        s.feed(R)
    return s.logits()


def shortcut(program, ids):
    s = Stream(program, ids)
    for k, layer in enumerate(program.layers):
        s.attend(s.whole(k))
        late = s.whole(k) + s.attention[k]
        if layer.spec.is_moe and k:
            s.feed(s.whole(k - 1) + s.attention[k - 1], late)
        else:
            s.feed(late)
    return s.logits()


def per_layer(program, ids, names):
    """Every layer by its own name; only contributions of layers that are not "none" may be missing."""
    s = Stream(program, ids)
    for k, name in enumerate(names):
        state = s.whole(k)
        if k and names[k - 1] != "none":
            if name in ("farskip", "farskip_shared", "attn_only"):
                state = state - s.routed[k - 1]
            if name == "ladder":
                state = state - s.routed[k - 1] - s.ready[k - 1]
        R = s.whole(k)
        s.attend(state)
        late = R + s.attention[k]
        s.feed(R if name in ("farskip", "farskip_shared", "mlp_only", "ladder") else late, late if name == "farskip_shared" else None)
    return s.logits()


def by_hand(program, ids, hidden):
    """``hidden[k][side]`` = {(layer, block): part}: any choice at all."""
    s = Stream(program, ids)

    def without(state, parts):
        for (i, block), part in parts.items():
            if block == "attention":
                state = state - s.attention[i]
            else:
                state = state - s.routed[i] - (s.ready[i] if part == "all" else 0)
        return state

    for k, sides in enumerate(hidden):
        s.attend(without(s.whole(k), sides["attention"]))
        late = s.whole(k) + s.attention[k]
        s.feed(without(late, sides["mlp"]), without(late, sides["shared"]) if "shared" in sides else None)
    return s.logits()


def same(got, want):
    difference = (got - want).abs().max().item() / max(1.0, want.abs().max().item())
    assert difference <= 1e-5, f"differs from the definition by {difference:.2e}"


def ids_of(seed):
    return torch.randint(0, VOCABULARY, (2, TOKENS), generator=torch.Generator().manual_seed(seed))


def compare(program, ids, expected, **options):
    """``expected``: what to compute for each connectivity. The program is traced once."""
    torch._dynamo.reset()
    built, chosen = [], 0
    choices = list(expected)

    def fan_out(gm, example_inputs):
        built.append([_attempt(_copy(gm), example_inputs, {"inner": "eager", "connectivity": _thaw(c), **options})
                      for c in choices])
        return lambda *args: built[0][chosen](*args)

    with torch.no_grad():
        compiled = torch.compile(program, backend=fan_out, fullgraph=True)
        for chosen, choice in enumerate(choices):
            got = compiled(ids)
            same(got, expected[choice])


def _thaw(choice):
    return dict(choice) if isinstance(choice, tuple) else choice


# --- the examples of the document -------------------------------------------------------------------------------

@pytest.mark.parametrize("specs", [MIXED, (MOE,) * 4, (BARE,) * 4, (MOE, DENSE_LAYER, DENSE_LAYER, BARE, MOE)],
                         ids=["mixed", "shared", "bare", "dense between"])
def test_examples_on_programs(specs):
    program, ids = Program(specs, 1).eval(), ids_of(1)
    with torch.no_grad():
        wanted = {"skip_two": skip_two(program, ids), "shortcut": shortcut(program, ids)}
        known = per_layer(program, ids, ["farskip"] * len(specs)), program(ids)
        for want in wanted.values():        # the test can tell them apart
            assert all((want - other).abs().max() > 1e-3 for other in known)
        compare(program, ids, wanted)


class Parts:
    """Submodules of DeepSeek-V3 and Qwen3-MoE, called one by one; masks and rotary tables come from one plain run."""

    def __init__(self, model, inputs):
        self.model, self.layers, self.calls = model, model.model.layers, {}
        handles = [layer.self_attn.register_forward_pre_hook(self._keep, with_kwargs=True) for layer in self.layers]
        self.plain = logits_of(model(**inputs))
        for handle in handles:
            handle.remove()
        self.embedded = model.model.embed_tokens(inputs["input_ids"])

    def _keep(self, module, args, kwargs):
        assert not args
        self.calls[module] = kwargs

    def attend(self, layer, state):
        return layer.self_attn(**{**self.calls[layer.self_attn], "hidden_states": layer.input_layernorm(state)})[0]

    def feed(self, layer, state):
        """(routed, shared or dense), 0 for what the layer does not have."""
        x = layer.post_attention_layernorm(state)
        if not self.is_moe(layer):
            return 0, layer.mlp(x)
        flat = x.view(-1, x.shape[-1])
        _, weights, indices = layer.mlp.gate(flat)
        routed = layer.mlp.experts(flat, indices, weights).view(x.shape)
        return routed, layer.mlp.shared_experts(x) if hasattr(layer.mlp, "shared_experts") else 0

    @staticmethod
    def is_moe(layer):
        return hasattr(layer.mlp, "experts")

    def logits(self, R):
        return self.model.lm_head(self.model.model.norm(R))


def hf_skip_two(parts):
    R, routed = parts.embedded, []
    for k, layer in enumerate(parts.layers):
        mixed = parts.attend(layer, R - sum(routed[max(0, k - 2):k]))
        experts, ready = parts.feed(layer, R)
        R = R + mixed + (experts + ready)
        routed.append(experts)
    return parts.logits(R)


def hf_shortcut(parts):
    R, after_attention = parts.embedded, None       # of the layer in front
    for k, layer in enumerate(parts.layers):
        mixed = parts.attend(layer, R)
        source = after_attention if k and parts.is_moe(layer) else R + mixed
        after_attention = R + mixed
        R = after_attention + parts.feed(layer, source)[0] + parts.feed(layer, after_attention)[1]
    return parts.logits(R)


def hf_per_layer(parts, names):
    R, before_mlp, ready = parts.embedded, None, None       # of the layer in front
    for k, (layer, name) in enumerate(zip(parts.layers, names)):
        state = R
        if k and names[k - 1] != "none":
            state = {"ladder": before_mlp, **dict.fromkeys(("farskip", "farskip_shared", "attn_only"), before_mlp + ready)}.get(name, R)
        mixed = parts.attend(layer, state)
        before_mlp = R + mixed
        experts, ready = parts.feed(layer, R if name in ("farskip", "farskip_shared", "mlp_only", "ladder") else before_mlp)
        if name == "farskip_shared" and parts.is_moe(layer):
            ready = parts.feed(layer, before_mlp)[1]
        R = before_mlp + (experts + ready)
    return parts.logits(R)


@pytest.mark.parametrize("family", ["deepseek_v3", "qwen3_moe"])    # with and without shared experts
def test_examples_on_transformers(family):
    model, inputs = families.tiny(family, jitter=0.1, num_hidden_layers=5), families.inputs(family)
    names = ("skip_two", "shortcut")
    with torch.no_grad():
        parts = Parts(model, inputs)
        same(hf_per_layer(parts, ["none"] * 5), parts.plain)        # the loop is the model
        wanted = [hf_skip_two(parts), hf_shortcut(parts)]
        others = [parts.plain, hf_per_layer(parts, ["farskip"] * 5), hf_per_layer(parts, ["ladder"] * 5)]
        for got, want in zip(run_each(model, inputs, [{"connectivity": n, "inner": "eager"} for n in names]), wanted):
            assert not isinstance(got, Exception), got
            assert all((want - other).abs().max() > 1e-3 for other in others)
            same(got, want)


WITH_SHARED = ("deepseek_v3", "qwen2_moe", "glm4_moe", "llama4", "granitemoeshared", "ernie4_5_moe", "qwen3_next", "afmoe")


@pytest.mark.parametrize("family", WITH_SHARED)
def test_the_shared_expert_reads_its_own_layer(family):
    model, inputs = families.tiny(family, jitter=0.1), families.inputs(family)
    options = [{"connectivity": "farskip_shared", "layers": layers, "inner": "eager"} for layers in ("all", [1, 2])]
    with torch.no_grad():
        for got, layers in zip(run_each(model, inputs, options), (None, (1, 2))):
            try:
                want = reference.oracle(family, model, inputs, "farskip_shared", layers)
            except reference.Undefined:
                assert isinstance(got, fs.RefusedError), got
                continue
            assert not isinstance(got, Exception), got
            same(got, want)
            assert (want - reference.oracle(family, model, inputs, "farskip", layers)).abs().max() > 1e-3


def test_the_report_names_what_the_shared_expert_reads():
    model, inputs = families.tiny("deepseek_v3"), families.inputs("deepseek_v3")
    fs.apply(model, connectivity="farskip_shared", inner="eager")
    model(**inputs)
    layers = fs.last_reports()[-1].layers
    assert layers[1].mlp_reads == "layer 0 output (before attention); its shared expert: layer 1 attention output"
    assert layers[0].mlp_reads == "the embedding (before attention)"            # dense: as in farskip
    found = fs.verify(model, **inputs)
    assert found.ok, found


class Handed(torch.nn.Module):
    """An MoE that adds what it was given, as it is, and its experts read the same tensor: no part that could read otherwise."""

    def __init__(self, mlp):
        super().__init__()
        self.mlp = mlp

    def forward(self, x):
        return self.mlp.routed(x.reshape(-1, x.shape[-1])).view(x.shape) + x


def test_a_term_that_the_experts_read_is_refused():
    program = Program((MOE, BARE), 0).eval()
    program.layers[1].mlp = Handed(program.layers[1].mlp)
    torch._dynamo.reset()
    with pytest.raises(BackendCompilerFailed) as caught:
        torch.compile(program, backend="farskip", options={"connectivity": "farskip_shared", "inner": "eager"})(ids_of(0))
    error = cause(caught.value)
    assert isinstance(error, fs.RefusedError) and "layer 1" in str(error) and "two states" in str(error)


def test_gradients_follow_the_connectivity():
    program, ids = Program(MIXED, 2).eval(), ids_of(2)
    torch._dynamo.reset()
    fast = torch.compile(program, backend="farskip", options={"connectivity": "skip_two", "inner": "aot_eager"})
    fast(ids).square().sum().backward()
    got = {name: p.grad.clone() for name, p in program.named_parameters() if p.grad is not None}
    program.zero_grad()
    skip_two(program, ids).square().sum().backward()
    want = {name: p.grad for name, p in program.named_parameters() if p.grad is not None}
    assert got.keys() == want.keys()
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-4, atol=1e-4, msg=name)


def test_a_layer_whose_second_predecessor_cannot_be_split_is_refused():
    normed = LayerSpec("sdpa", "gather", "plain", post_norm=True)
    with pytest.raises(BackendCompilerFailed) as caught:
        torch._dynamo.reset()
        torch.compile(Program((normed, BARE, MOE), 0).eval(), backend="farskip",
                      options={"connectivity": "skip_two", "inner": "eager"})(ids_of(0))
    error = cause(caught.value)
    assert isinstance(error, fs.RefusedError) and "layer 1" in str(error) and "'skip_two'" in str(error)


# --- any function at all ----------------------------------------------------------------------------------------

layer_specs = st.builds(
    LayerSpec, mixer=st.sampled_from(MIXERS), mlp=st.sampled_from(MLPS), shared=st.sampled_from(SHARED),
    add=st.sampled_from(ADDS), scale=st.sampled_from([1.0, 0.5]), view=st.booleans(), inplace_sum=st.booleans())
few = settings(max_examples=10, deadline=None, derandomize=True, phases=[Phase.explicit, Phase.generate],
               suppress_health_check=list(HealthCheck))


@few
@given(specs=st.lists(layer_specs, min_size=2, max_size=4), seed=st.integers(0, 99), data=st.data())
def test_random_connectivities(specs, seed, data):
    """Whatever a function hides, block by block, is what is hidden."""
    if not any(s.is_moe for s in specs):
        specs[0] = MOE
    hidden = []
    for k in range(len(specs)):
        earlier = [(i, block) for i in range(k) for block in ("attention", "mlp")]
        part = st.sampled_from(["all", "routed"])
        sides = {"attention": st.dictionaries(st.sampled_from(earlier), part) if earlier else st.just({}),
                 "mlp": st.dictionaries(st.sampled_from([*earlier, (k, "attention")]), part)}
        if data.draw(st.booleans(), label=f"{k} shared expert by itself"):
            sides["shared"] = sides["mlp"]
        hidden.append({side: {place: "all" if place[1] == "attention" else how
                              for place, how in data.draw(each, label=f"{k} {side}").items()}
                       for side, each in sides.items()})

    def drawn(layer, earlier):
        return Reads(**{side: tuple(Missing(layer=i, block=block, part=part) for (i, block), part in parts.items())
                        for side, parts in hidden[layer.index].items()})

    before = dict(CONNECTIVITIES)
    fs.register_connectivity("drawn", drawn)
    try:
        program, ids = Program(tuple(specs), seed).eval(), ids_of(seed)
        with torch.no_grad():
            compare(program, ids, {"drawn": by_hand(program, ids, hidden)})
    finally:
        _restore(before)


# --- registering ------------------------------------------------------------------------------------------------

def nothing(layer, earlier):
    return Reads()


def test_register_as_function_and_as_decorator(registry):
    assert fs.register_connectivity("plain_one", nothing) is nothing
    assert fs.register_connectivity("plain_one", nothing) is nothing        # the same again
    assert fs.register_connectivity("other_one")(nothing) is nothing
    assert fs.FarskipConfig(connectivity="other_one").saved()["connectivity"] == "other_one"


@pytest.mark.parametrize("name", ["", "two words", "1st", "0-3", None, 3, nothing])
def test_a_name_is_an_identifier(registry, name):
    with pytest.raises(fs.ConfigError, match="identifier"):
        fs.register_connectivity(name, nothing)


@pytest.mark.parametrize("name, text", [
    ("farskip", "built in"), ("none", "built in"), ("skip_two", "registered already")])
def test_a_name_belongs_to_one_function(registry, name, text):
    before = CONNECTIVITIES[name]
    for register in (fs.register_connectivity, lambda name, fn: fs.register_connectivity(name)(fn)):
        with pytest.raises(fs.ConfigError, match=f"'{name}' is {text}.*nothing needs another name"):
            register(name, nothing)
    assert CONNECTIVITIES[name] is before


@pytest.mark.parametrize("fn", ["farskip", 3, Reads()])
def test_not_callable(registry, fn):
    with pytest.raises(fs.ConfigError, match="'mine' must be a function"):
        fs.register_connectivity("mine", fn)
    with pytest.raises(fs.ConfigError, match="'mine' must be a function"):
        fs.register_connectivity("mine")(fn)
    assert "mine" not in CONNECTIVITIES


def layers_like(*kinds):
    """As much of a layer as matters before the graph is touched."""
    return [SimpleNamespace(index=i, mlp=SimpleNamespace(kind=kind)) for i, kind in enumerate(kinds)]


def missing(layer, block="mlp", part="routed"):
    return Missing(layer=layer, block=block, part=part)


@pytest.mark.parametrize("answer, text", [
    (None, "must return .*Reads.*got None"),
    ((missing(0),), "must return .*Reads"),
    (Reads(attention=missing(0)), r"attention= must be a tuple of .*Missing \(one alone"),
    (Reads(mlp=("routed",)), "mlp= must be a tuple"),
    (Reads(attention=(missing(1),)), "not computed yet"),
    (Reads(attention=(missing(2),)), "there is no layer 2"),
    (Reads(attention=(missing(1, "attention", "all"),)), "not computed yet"),
    (Reads(mlp=(missing(1),)), "not computed yet"),
    (Reads(mlp=(missing(99),)), "there is no layer 99"),
    (Reads(attention=(missing(-1),)), "there is no layer -1"),
    (Reads(attention=(missing("0"),)), "must be the index of a layer"),
    (Reads(attention=(missing(True),)), "must be the index of a layer"),
    (Reads(attention=(missing(0, "moe"),)), "block must be"),
    (Reads(attention=(missing(0, "mlp", "shared"),)), "part must be"),
    (Reads(mlp=(missing(1, "attention", "routed"),)), "no routed part"),
    (Reads(shared=("routed",)), "shared= must be a tuple"),
    (Reads(shared=(missing(1),)), "not computed yet"),
    (ZeroDivisionError("by zero"), "raised ZeroDivisionError: by zero"),
])
def test_wrong_answers_name_connectivity_and_layer(registry, answer, text):
    @fs.register_connectivity("mine")
    def mine(layer, earlier):
        if isinstance(answer, Exception):
            raise answer
        return answer
    first, second = layers_like("moe", "moe")
    with pytest.raises(fs.ConfigError, match=f"connectivity 'mine', layer 1: .*{text}"):
        ask("mine", second, [first])


@pytest.mark.parametrize("strict", [True, False])
def test_wrong_answers_stop_the_compile(registry, strict):
    fs.register_connectivity("mine", lambda layer, earlier: None if layer.index == 1 else Reads())
    torch._dynamo.reset()
    with pytest.raises(BackendCompilerFailed) as caught:
        torch.compile(Program((MOE,) * 2, 0).eval(), backend="farskip",
                      options={"connectivity": "mine", "inner": "eager", "strict": strict})(ids_of(0))
    error = cause(caught.value)
    assert isinstance(error, fs.ConfigError) and "connectivity 'mine', layer 1: " in str(error)


def test_an_answer_is_put_in_order(registry):
    """Once for each block, "all" over "routed", nothing routed of a dense MLP; lists are fine."""
    layers = layers_like("moe", "mlp", "moe")
    twice = [missing(1), missing(0), missing(1, "attention", "all"), missing(0, part="all"), missing(0)]
    fs.register_connectivity("mine", lambda layer, earlier: Reads(attention=twice))
    once = (missing(0, part="all"), missing(1, "attention", "all"))
    assert ask("mine", layers[2], layers[:2]) == Reads(attention=once)


def test_only_layers_of_the_same_stream(registry):
    """Layers 0 and 2 of a stream, with layer 1 on another one."""
    layers = layers_like("mlp", "moe", "moe")
    both = (missing(0), missing(0, "attention", "all"))
    fs.register_connectivity("mine", lambda layer, earlier: Reads(attention=both))
    assert ask("mine", layers[2], [layers[0]]) == Reads(attention=(missing(0, "attention", "all"),))
    fs.register_connectivity("other", lambda layer, earlier: Reads(attention=(missing(1),)))
    with pytest.raises(fs.ConfigError, match="on its stream there is no layer 1"):
        ask("other", layers[2], [layers[0]])


def test_unknown_name_says_what_to_import():
    text = "'mine' is not known.*built in: none.*registered: .*skip_two.*import the module"
    with pytest.raises(fs.ConfigError, match=text):
        fs.FarskipConfig(connectivity="mine")
    with pytest.raises(fs.ConfigError, match="key '0-'.*'mine' is not known.*import the module"):
        fs.FarskipConfig(connectivity={"0-": "mine"})


def test_checkpoint_with_a_name_that_nobody_registered(registry, tmp_path):
    model = families.tiny("qwen3_moe", jitter=0.1)
    fs.register_connectivity("mine", nothing)
    fs.apply(model, connectivity={"1-": "mine"}, inner="eager").save_pretrained(tmp_path)
    del CONNECTIVITIES["mine"]      # another process
    loaded = type(model).from_pretrained(tmp_path).eval()
    with pytest.raises(fs.ConfigError, match="'mine' is not known in this process.*import the module"):
        fs.apply(loaded)
    with pytest.raises(BackendCompilerFailed) as caught, torch.no_grad():
        run(loaded, families.inputs("qwen3_moe"), inner="eager")
    assert isinstance(cause(caught.value), fs.ConfigError) and "import the module" in str(cause(caught.value))


def test_models_without_moe(registry):
    """Refused, unless the function is meant for them."""
    specs = (DENSE_LAYER, LayerSpec("sdpa", "dense"), DENSE_LAYER)
    program, ids = Program(specs, 3).eval(), ids_of(3)

    def two_rungs(layer, earlier):
        return Reads(attention=tuple(missing(e.index, part="all") for e in earlier[-2:]))
    fs.register_connectivity("two_rungs", two_rungs)
    with pytest.raises(BackendCompilerFailed) as caught:
        torch._dynamo.reset()
        torch.compile(program, backend="farskip", options={"connectivity": "two_rungs", "inner": "eager"})(ids)
    assert isinstance(cause(caught.value), fs.NoMoEError) and "dense=True" in str(cause(caught.value))
    fs.register_connectivity("two_rungs", two_rungs, dense=True)
    hidden = [{"attention": {(i, "mlp"): "all" for i in range(max(0, k - 2), k)}, "mlp": {}} for k in range(3)]
    names = ["ladder", "none", "ladder"]
    with torch.no_grad():
        compare(program, ids, {"two_rungs": by_hand(program, ids, hidden),
                               (("0", "ladder"), ("2", "ladder")): per_layer(program, ids, names)})
    with pytest.raises(BackendCompilerFailed, match="'farskip' hides"):
        torch._dynamo.reset()
        torch.compile(program, backend="farskip",
                      options={"connectivity": {"0-1": "ladder", "2-": "farskip"}, "inner": "eager"})(ids)


# --- Inductor's caches ------------------------------------------------------------------------------------------

CACHED = """
import sys, torch
sys.path.insert(0, {tests!r})
import farskip_fx as fs
from farskip_fx.connectivity import Missing, Reads
from programs import LayerSpec, Program
from torch._dynamo.utils import counters

torch.set_num_threads(1)

def rungs(layer, earlier):
    return Reads(attention=tuple(Missing(layer=e.index, block="mlp", part="all") for e in earlier[-1:]))

def routed(layer, earlier):
    return Reads(attention=tuple(Missing(layer=e.index, block="mlp", part="routed") for e in earlier[-1:]))

program = Program((LayerSpec("decay", "top1", "plain"), LayerSpec("decay", "dense")), 0).eval()
ids = torch.arange(12).view(2, 6)
results = {{}}
for name, fn in ({pairs}):
    fs.register_connectivity(name, fn)
    torch._dynamo.reset()
    counters.clear()
    with torch.no_grad():
        logits = torch.compile(program, backend="farskip", options={{"connectivity": name}})(ids)
    hits = counters["inductor"]["fxgraph_cache_hit"] + counters["aot_autograd"]["autograd_cache_hit"]
    results[name] = (logits, hits)
torch.save(results, {out!r})
"""


@pytest.mark.slow
def test_a_warm_cache_never_gives_the_graph_of_another_function(tmp_path):
    """Two processes register different functions under one name; Inductor's caches on disk are shared and in use."""
    def process(pairs):
        out = str(tmp_path / "out.pt")
        code = CACHED.format(tests=str(ROOT / "tests"), pairs=pairs, out=out)
        subprocess.run([sys.executable, "-c", code], check=True, timeout=300, cwd=ROOT, env={
            **os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache"), "TORCHINDUCTOR_FX_GRAPH_CACHE": "1",
            "TORCHINDUCTOR_AUTOGRAD_CACHE": "1", "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "0",
            "TORCHINDUCTOR_COMPILE_THREADS": "1"})
        return torch.load(out)

    first = process('("mine", rungs),')
    second = process('("mine", routed), ("same_as_before", rungs)')
    program = Program((LayerSpec("decay", "top1", "plain"), LayerSpec("decay", "dense")), 0).eval()
    ids = torch.arange(12).view(2, 6)
    with torch.no_grad():
        hide = {part: by_hand(program, ids, [
            {"attention": {}, "mlp": {}}, {"attention": {(0, "mlp"): part}, "mlp": {}}]) for part in ("all", "routed")}
    assert (hide["all"] - hide["routed"]).abs().max() > 1e-3
    same(first["mine"][0], hide["all"])
    same(second["mine"][0], hide["routed"])
    same(second["same_as_before"][0], hide["all"])
    assert first["mine"][1] == 0 and second["mine"][1] == 0
    assert second["same_as_before"][1] > 0, "the cache was not in use, so this test shows nothing"


# --- one for each layer -----------------------------------------------------------------------------------------

LADDER_FIRST = {"0": "ladder", "1-": "farskip", "3": "attn_only"}


@pytest.mark.parametrize("specs", [MIXED, (MOE,) * 5, (MOE, DENSE_LAYER, DENSE_LAYER, BARE, MOE)],
                         ids=["mixed", "shared", "dense between"])
@pytest.mark.parametrize("choice, names", [
    (LADDER_FIRST, ["ladder", "farskip", "farskip", "attn_only", "farskip"]),
    ({"0-1": "none", "2-": "farskip"}, ["none", "none", "farskip", "farskip", "farskip"]),
    ({"1-3": "ladder", "2": "none"}, ["none", "ladder", "none", "ladder", "none"]),
    ({"4": "farskip", "3": "mlp_only"}, ["none", "none", "none", "mlp_only", "farskip"]),
])
def test_each_layer_reads_by_its_own_connectivity(specs, choice, names):
    program, ids = Program(specs, 4).eval(), ids_of(4)
    with torch.no_grad():
        compare(program, ids, {tuple(choice.items()): per_layer(program, ids, names)})
    report = fs.last_reports()[-1]
    assert list(report.config.of_layers(5)) == names
    assert [layer.requested for layer in report.layers] == [name != "none" for name in names]


@few
@given(specs=st.lists(layer_specs, min_size=5, max_size=5), seed=st.integers(0, 99),
       names=st.lists(st.sampled_from(BUILT_IN), min_size=5, max_size=5))
def test_random_choices(specs, seed, names):
    specs[seed % 5] = MOE
    program, ids = Program(tuple(specs), seed).eval(), ids_of(seed)
    with torch.no_grad():
        compare(program, ids, {tuple((str(i), name) for i, name in enumerate(names)): per_layer(program, ids, names)})


def test_own_connectivities_in_a_choice():
    """Layer 3 skips two; layer 1 is not converted, so nothing of it is missing, and of layer 2 the routed part is."""
    program, ids = Program((MOE,) * 4, 5).eval(), ids_of(5)
    hidden = [{"attention": {}, "mlp": {}} for _ in range(4)]
    # "shortcut" without the MLP of layer 1, which is not converted; its shared expert reads the stream of its own layer.
    hidden[2] |= {"mlp": {(2, "attention"): "all"}, "shared": {}}
    hidden[3] = {"attention": {(2, "mlp"): "routed"}, "mlp": {(3, "attention"): "all"}}
    with torch.no_grad():
        compare(program, ids, {(("2", "shortcut"), ("3", "skip_two")): by_hand(program, ids, hidden)})


def test_all_none_is_the_model():
    program, ids = Program(MIXED, 6).eval(), ids_of(6)
    with torch.no_grad():
        compare(program, ids, {(("0-2", "none"), ("4", "none")): program(ids)})


@pytest.mark.parametrize("choice, beyond", [
    ({"3": "farskip"}, "'3'"), ({"1-3": "ladder", "0": "none"}, "'1-3'"), ({"3-": "farskip", "0": "ladder"}, "'3-'"),
    ({"0-": "ladder", "7": "ladder"}, "'7'"), ({"0-1": "ladder", "2-9": "none"}, "'2-9'"),
])
def test_layers_beyond_the_model(choice, beyond):
    torch._dynamo.reset()
    with pytest.raises(BackendCompilerFailed) as caught:
        torch.compile(Program((MOE,) * 3, 0).eval(), backend="farskip",
                      options={"connectivity": choice, "inner": "eager"})(ids_of(0))
    error = cause(caught.value)
    assert isinstance(error, fs.ConfigError)
    assert f"layers {beyond}, but the model has 3 decoder layers (0 to 2)" in str(error)


@pytest.mark.parametrize("choice, text", [
    ({}, "names no layer"), ({"-3": "farskip"}, "'-3' is not understood"), ({-3: "farskip"}, "-3 is not understood"),
    ({"a": "farskip"}, "'a' is not understood"), ({"1-2-3": "farskip"}, "is not understood"),
    ({"0 - 3": "farskip"}, "is not understood"), ({True: "farskip"}, "True is not understood"),
    ({"3-1": "farskip"}, "'3-1' ends before it begins"), ({"0": "farskop"}, "key '0'.*'farskop' is not known"),
    ({"0": None}, "key '0'.*None is not known"), ({"0": {"1": "farskip"}}, "key '0'.*not known"),
    ({"0-3": "farskip", "2-5": "farskip"}, r"'0-3' \(farskip\) and '2-5' \(farskip\) name the same layer"),
    ({"4-": "none", "0-9": "ladder"}, r"'0-9' \(ladder\) and '4-' \(none\)"),
    ({"4-": "none", "9-": "ladder"}, "name the same layer"), ({"0-9": "none", "2-2": "ladder"}, "name the same layer"),
    ({"7": "none", 7: "ladder"}, "name the same layer"), ({"7": "none", "07": "ladder"}, "name the same layer"),
])
def test_keys_that_are_refused(choice, text):
    with pytest.raises(fs.ConfigError, match=text):
        fs.FarskipConfig(connectivity=choice)


@pytest.mark.parametrize("layers", [[0, 1], "last:0.5", ()])
def test_not_together_with_layers(layers):
    with pytest.raises(fs.ConfigError, match="layers=.* cannot be combined"):
        fs.FarskipConfig(connectivity={"0-": "farskip"}, layers=layers)


SAME = [
    ({"0-1": "ladder"}, {"0": "ladder", "1": "ladder"}),
    ({"2-3": "farskip", "0-1": "ladder"}, {0: "ladder", "1": "ladder", "2-3": "farskip", "9": "none"}),
    ({"0-": "farskip", "3": "farskip"}, {"0-5": "farskip", "6-": "farskip"}),
    ({"0-9": "farskip", "4": "none"}, {"0-3": "farskip", "5-9": "farskip"}),
    ({"0-9": "none"}, {"3": "none"}),
]
DIFFERENT = [({"0-1": "ladder"}, {"0-2": "ladder"}), ({"0-1": "ladder"}, {"0-": "ladder"}),
             ({"0-1": "ladder"}, {"0-1": "farskip"}), ({"0-3": "ladder", "2": "none"}, {"0-3": "ladder"})]


@pytest.mark.parametrize("one, other", SAME)
def test_what_means_the_same_is_equal(one, other):
    a, b = fs.FarskipConfig(connectivity=one), fs.FarskipConfig(connectivity=other)
    assert a == b and hash(a) == hash(b) and len({a, b}) == 1
    for given_, saved in ((one, b), (other, a), (one, a)):
        agree({"connectivity": given_}, json.loads(json.dumps(saved.saved())), "the checkpoint")


@pytest.mark.parametrize("one, other", DIFFERENT)
def test_what_differs_disagrees(one, other):
    a, b = fs.FarskipConfig(connectivity=one), fs.FarskipConfig(connectivity=other)
    assert a != b
    with pytest.raises(fs.ConfigError, match="connectivity=.*disagrees with the checkpoint, which says"):
        agree({"connectivity": one}, b.saved(), "the checkpoint")


def test_a_choice_against_a_name_with_layers():
    flat = {"connectivity": "ladder", "layers": [0, 1]}
    agree({"connectivity": {"0-1": "ladder"}}, fs.FarskipConfig(**flat).saved(), "the checkpoint")
    agree(flat, fs.FarskipConfig(connectivity={"1": "ladder", "0": "ladder"}).saved(), "the checkpoint")
    agree({"connectivity": "farskip"}, fs.FarskipConfig(connectivity={"0-": "farskip"}).saved(), "the checkpoint")
    for options, saved in (({"connectivity": {"0-1": "ladder"}}, {"connectivity": "ladder", "layers": "last:0.5"}),
                           ({"connectivity": "ladder"}, {"connectivity": {"0-1": "ladder"}}),
                           ({"connectivity": "ladder", "layers": [0]}, {"connectivity": {"0-1": "ladder"}})):
        with pytest.raises(fs.ConfigError, match="disagrees"):
            agree(options, fs.FarskipConfig(**saved).saved(), "the checkpoint")
    with pytest.raises(fs.ConfigError, match="cannot be combined"):
        agree({"layers": [0]}, fs.FarskipConfig(connectivity={"0-1": "ladder"}).saved(), "the checkpoint")


@pytest.mark.parametrize("choice", [{"0-3": "none", "4-": "farskip", "12": "attn_only"}, {"0-1": "skip_two"}])
def test_round_trips(choice):
    config = fs.FarskipConfig(connectivity=choice, inner="eager")
    assert isinstance(config.connectivity, PerLayer) and isinstance(config.connectivity, Mapping)
    for back in (fs.FarskipConfig.from_json(config.to_json()), fs.FarskipConfig.from_dict(config.to_dict()),
                 fs.FarskipConfig.from_dict(json.loads(json.dumps(config.saved()))),
                 pickle.loads(pickle.dumps(config)), fs.FarskipConfig(connectivity=config.connectivity)):
        assert back.connectivity == config.connectivity and dict(back.connectivity) == choice
    assert config.saved() == {"version": 1, "connectivity": choice, "layers": "all"}
    assert type(config.saved()["connectivity"]) is dict
    assert hash(config) == hash(fs.FarskipConfig.from_json(config.to_json()))


def test_configurations_of_before_are_read():
    old = fs.FarskipConfig.from_json('{"version": 1, "connectivity": "attn_only", "layers": [1, 2]}')
    assert old.saved() == {"version": 1, "connectivity": "attn_only", "layers": [1, 2]}
    assert old.of_layers(4) == ("none", "attn_only", "attn_only", "none") and old.names == {"attn_only"}
    assert fs.FarskipConfig().of_layers(2) == ("farskip", "farskip")
    assert fs.FarskipConfig(layers="last:0.5").of_layers(4) == ("none", "none", "farskip", "farskip")
    assert fs.FarskipConfig(connectivity="none").names == frozenset()


def test_report_shows_each_layer():
    torch._dynamo.reset()
    torch.compile(Program(MIXED, 0).eval(), backend="farskip",
                  options={"connectivity": LADDER_FIRST, "inner": "eager"})(ids_of(0))
    text = str(fs.last_reports()[-1])
    assert text.splitlines()[0].startswith("forward: connectivity per layer (0: ladder, 1-: farskip, 3: attn_only), ")
    for k, name in enumerate(["ladder", "farskip", "farskip", "attn_only", "farskip"]):
        assert f"  layer {k}: connectivity {name}" in text


def test_refusal_shows_the_choice():
    normed = LayerSpec("sdpa", "gather", "plain", post_norm=True)
    torch._dynamo.reset()
    with pytest.raises(BackendCompilerFailed) as caught:
        torch.compile(Program((normed, MOE, MOE), 0).eval(), backend="farskip",
                      options={"connectivity": {"0": "ladder", "1-": "farskip"}, "inner": "eager"})(ids_of(0))
    assert re.search(r"\{'0': 'ladder', '1-': 'farskip'\} cannot be applied: layer 1 ", str(cause(caught.value)))


def test_apply_and_checkpoint(tmp_path):
    """In place, saved, loaded, run again: the same choice throughout, however it is spelled."""
    family, choice = "deepseek_v3", LADDER_FIRST
    model, inputs = families.tiny(family, jitter=0.1, num_hidden_layers=5), families.inputs(family)
    with torch.no_grad():
        parts = Parts(model, inputs)
        want = hf_per_layer(parts, ["ladder", "farskip", "farskip", "attn_only", "farskip"])
        assert (want - parts.plain).abs().max() > 1e-3
        fs.apply(model, connectivity=choice, inner="eager")
        same(logits_of(model(**inputs)), want)
        model.save_pretrained(tmp_path)
        loaded = type(model).from_pretrained(tmp_path).eval()
        assert loaded.config.farskip == {"version": 1, "connectivity": choice, "layers": "all"}
        same(run(loaded, inputs, inner="eager"), want)      # the backend reads it from the checkpoint
        with pytest.raises(fs.ConfigError, match="disagrees"):
            fs.apply(loaded, connectivity="farskip")
        spelled = {"0": "ladder", "3": "attn_only", "1-2": "farskip", "4-": "farskip"}
        fs.apply(loaded, connectivity=spelled, inner="eager")
        same(logits_of(loaded(**inputs)), want)
