"""Every family of tests/families.py, every connectivity: exact against the independent oracle, or refused.

A family is never a third thing: if the backend rewires a graph, the numbers are the oracle's; if it does not, it raises
a typed error that says why. ``inner="eager"``, so that what is compared is the rewiring alone.
"""
import pytest
import torch

import families
import farskip_fx as fs
import oracle as reference
from compiled import logits_of, run, run_each

CONNECTIVITIES = ("none", "farskip", "attn_only", "mlp_only", "ladder")
TOLERANCE = 1e-5

# Plain, but Dynamo cannot trace them in one graph: a Python loop over the experts that were hit (`nonzero`). Through
# expert_parallel, which replaces that loop, they trace; see test_expert_parallel.py.
BREAKS = ("dbrx", "openai_privacy_filter", "step3p7")


def check(family: str, layers=None) -> dict[str, str]:
    """connectivity -> "exact", or the reason of the refusal; anything else fails."""
    model, inputs = families.tiny(family, jitter=0.1), families.inputs(family)
    settings = [{"connectivity": name, "inner": "eager", "layers": "all" if layers is None else tuple(layers)}
                for name in CONNECTIVITIES]
    found = {}
    with torch.no_grad():
        for connectivity, got in zip(CONNECTIVITIES, run_each(model, inputs, settings)):
            if isinstance(got, fs.FarskipError):
                found[connectivity] = f"{type(got).__name__}: {got}"
                continue
            if connectivity == "none":
                expected = logits_of(model(**inputs))
            else:
                expected = reference.oracle(family, model, inputs, connectivity, layers)
            scale = max(1.0, expected.abs().max().item())
            difference = (got - expected).abs().max().item() / scale
            assert difference <= TOLERANCE, f"{family} {connectivity}: differs from the oracle by {difference:.2e}"
            found[connectivity] = "exact"
    return found


@pytest.mark.parametrize("family", [f for f in reference.PLAIN if f not in BREAKS])
def test_plain_families_are_exact(family):
    assert check(family) == {name: "exact" for name in CONNECTIVITIES}


@pytest.mark.parametrize("family", [f for f in families.FAMILIES if f not in reference.PLAIN])
def test_other_families_are_exact_or_refused(family, record_property):
    for connectivity, outcome in check(family).items():
        record_property(connectivity, outcome)


@pytest.mark.parametrize("family", BREAKS)
def test_models_that_break_are_refused(family):
    outcome = check(family)
    assert all("SplitModelError" in outcome[name] for name in CONNECTIVITIES[1:]), outcome


@pytest.mark.parametrize("layers", [(1, 2), (0, 2), (2,)])
@pytest.mark.parametrize("family", ["deepseek_v3", "qwen2_moe", "qwen3_moe"])
def test_some_layers(family, layers):
    assert check(family, layers) == {name: "exact" for name in CONNECTIVITIES}


def test_no_layers_is_the_model():
    model, inputs = families.tiny("deepseek_v3", jitter=0.1), families.inputs("deepseek_v3")
    with torch.no_grad():
        assert torch.equal(run(model, inputs, layers=(), inner="eager"), logits_of(model(**inputs)))
