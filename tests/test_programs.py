"""Property: a random residual program is rewired exactly as the connectivity's definition says, or refused.

CI runs 60 programs times five connectivities. For more:
    FARSKIP_PROGRAMS=20000 python -m pytest tests/test_programs.py -q
"""
import os

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings, strategies as st

import farskip_fx as fs
from compiled import _attempt, _copy
from programs import ADDS, MIXERS, MLPS, SHARED, TOKENS, VOCABULARY, LayerSpec, Program, Undefined, interpret

CONNECTIVITIES = ("none", "farskip", "attn_only", "mlp_only", "ladder")
PROGRAMS = int(os.environ.get("FARSKIP_PROGRAMS", "60"))

layer_specs = st.builds(
    LayerSpec, mixer=st.sampled_from(MIXERS), mlp=st.sampled_from(MLPS), shared=st.sampled_from(SHARED),
    add=st.sampled_from(ADDS), scale=st.sampled_from([1.0, 1.0, 0.5]), view=st.booleans(), half=st.booleans(),
    inplace_sum=st.booleans(), post_norm=st.sampled_from([False, False, False, True]))


def compare(specs, seed, converted=None):
    """connectivity -> "exact" or a refusal; raises where the numbers differ from the definition."""
    torch._dynamo.reset()
    program = Program(specs, seed).eval()
    converted = tuple(range(len(specs))) if converted is None else converted
    ids = torch.randint(0, VOCABULARY, (2, TOKENS), generator=torch.Generator().manual_seed(seed))
    built = []

    def fan_out(gm, example_inputs):
        built.append({c: _attempt(_copy(gm), example_inputs, {"connectivity": c, "inner": "eager",
                                                              "layers": converted}) for c in CONNECTIVITIES})
        return lambda *args: built[0][chosen](*args)

    outcome = {}
    with torch.no_grad():
        compiled = torch.compile(program, backend=fan_out, fullgraph=True)
        chosen = "none"
        assert torch.equal(compiled(ids), program(ids))
        for chosen in CONNECTIVITIES[1:]:
            made = built[0][chosen]
            try:
                want = interpret(program, ids, chosen, converted)
            except Undefined as why:
                assert isinstance(made, fs.RefusedError), f"{chosen} was rewired where {why} makes it undefined"
            if isinstance(made, Exception):
                outcome[chosen] = f"{type(made).__name__}: {made}"
                continue
            got = compiled(ids)
            assert (got - want).abs().max() <= 1e-5 * max(1.0, want.abs().max()), chosen
            outcome[chosen] = "exact"
    return outcome


@settings(max_examples=PROGRAMS, deadline=None, derandomize=True, phases=[Phase.explicit, Phase.generate],
          suppress_health_check=list(HealthCheck))
@given(specs=st.lists(layer_specs, min_size=2, max_size=4), seed=st.integers(0, 99), data=st.data())
def test_random_programs(specs, seed, data):
    converted = data.draw(st.sets(st.integers(0, len(specs) - 1), min_size=1))
    outcome = compare(tuple(specs), seed, tuple(sorted(converted)))
    moe = any(s.is_moe for s in specs)
    plain = not any(s.post_norm for s in specs)
    if moe and plain:
        assert set(outcome.values()) == {"exact"}, outcome


@pytest.mark.parametrize("mlp", [m for m in MLPS if "dense" not in m])
@pytest.mark.parametrize("shared", SHARED)
def test_each_kind_of_experts(mlp, shared):
    specs = tuple(LayerSpec("sdpa", mlp, shared) for _ in range(3))
    assert set(compare(specs, 0).values()) == {"exact"}


@pytest.mark.parametrize("mixer", MIXERS)
def test_each_mixer(mixer):
    specs = tuple(LayerSpec(mixer, "gather", "plain") for _ in range(3))
    assert set(compare(specs, 0).values()) == {"exact"}


@pytest.mark.parametrize("add", ADDS)
def test_each_way_to_add(add):
    specs = tuple(LayerSpec("sdpa", "gather", "plain", add=add, inplace_sum=True) for _ in range(3))
    assert set(compare(specs, 0).values()) == {"exact"}
