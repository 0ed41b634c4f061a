"""Every family of tests/families.py, every connectivity: exact against the independent oracle, or refused.

A family is never a third thing: if the backend rewires a graph, the numbers are the oracle's; if it does not, it raises
a typed error that says why. ``inner="eager"``, so that what is compared is the rewiring alone. docs/families.md says
which it is for each family: where these tests find something else, run `make families`.
"""
import pytest
import torch

import families
import families_table as table
import farskip_fx as fs
import oracle as reference
from compiled import logits_of, run, run_each
from farskip_fx.capture import one_graph, way_to_one_graph

ALL_EXACT = dict.fromkeys(table.CONNECTIVITIES, table.EXACT)


def codes(outcomes: dict[str, table.Outcome]) -> dict[str, str]:
    return {connectivity: outcome.code for connectivity, outcome in outcomes.items()}


# Its update weighs the contribution by a gate made from the stream: now of the state that is read, but it should be the
# one that is updated.


# Every fifth one in CI; `make families` and `make test-all` look at all.
@pytest.mark.parametrize("family", [pytest.param(f, marks=pytest.mark.slow) if i % 5 else f
                                    for i, f in enumerate(table.EVERY_FAMILY)])
def test_exact_or_refused_as_documented(family):
    outcomes = table.measure(family)
    assert not [outcome.text for outcome in outcomes.values() if outcome.code == "wrong"]
    if family in reference.PLAIN:
        assert codes(outcomes) == ALL_EXACT, outcomes
    assert table.row(family, outcomes) == table.committed()[family], outcomes


def test_the_document_is_generated():
    assert table.DOCUMENT.read_text() == table.document(list(table.committed().values()))
    assert list(table.committed()) == table.EVERY_FAMILY


@pytest.mark.parametrize("layers", [(1, 2), (0, 2), (2,)])
@pytest.mark.parametrize("family", ["deepseek_v3", "qwen2_moe", "qwen3_moe"])
def test_some_layers(family, layers):
    assert codes(table.measure(family, layers)) == ALL_EXACT


def test_no_layers_is_the_model():
    model, inputs = families.tiny("deepseek_v3", jitter=0.1), families.inputs("deepseek_v3")
    with torch.no_grad():
        assert torch.equal(run(model, inputs, layers=(), inner="eager"), logits_of(model(**inputs)))


LOOPS = ("dbrx", "openai_privacy_filter", "step3p7")     # a Python loop over the experts that were hit


@pytest.mark.parametrize("family", LOOPS)
def test_a_loop_over_experts_is_refused_outside_of_the_scope(family):
    model, inputs = families.tiny(family, jitter=0.1), families.inputs(family)
    with torch.no_grad():
        farskip, = run_each(model, inputs, [{"inner": "eager"}])
    assert isinstance(farskip, fs.SplitModelError)
    assert "farskip_fx.apply" in way_to_one_graph(model)


@pytest.mark.parametrize("family", [*LOOPS, "nllb_moe", "switch_transformers"])
def test_every_expert_computes_what_those_that_were_hit_compute(family):
    model, inputs = families.tiny(family, jitter=0.1), families.inputs(family)
    with torch.no_grad():
        expected = logits_of(model(**inputs))
        with one_graph(model):
            assert torch.equal(logits_of(model(**inputs)), expected)
        assert torch.equal(logits_of(model(**inputs)), expected)


def test_the_scope_leaves_nothing_behind():
    model = families.tiny("dbrx")
    kind = type(model.transformer.blocks[0].ffn.experts)
    forward, setting = kind.forward, torch._dynamo.config.capture_dynamic_output_shape_ops
    with one_graph(model):
        assert kind.forward is not forward and torch._dynamo.config.capture_dynamic_output_shape_ops
        with one_graph(model):       # inside another scope of the same model
            pass
        assert kind.forward is not forward
    assert kind.forward is forward and torch._dynamo.config.capture_dynamic_output_shape_ops is setting


def test_transformers_switch_takes_the_loop_out():
    model, inputs = families.tiny("openai_privacy_filter", jitter=0.1), families.inputs("openai_privacy_filter")
    assert 'set_experts_implementation("grouped_mm")' in way_to_one_graph(model)
    model.model.set_experts_implementation("grouped_mm")
    assert way_to_one_graph(model) is None
    with torch.no_grad():
        expected = reference.oracle("openai_privacy_filter", model, inputs, "farskip")
        torch.testing.assert_close(run(model, inputs, inner="eager"), expected, rtol=0, atol=1e-5)
