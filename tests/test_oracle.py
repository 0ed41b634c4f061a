"""The oracle against the models themselves, against the paper's own equations, and against what it must not be."""
import functools

import families
import oracle as O
import pytest
import torch

POST_NORMED = {"afmoe", "diffusion_gemma", "gemma4", "kolibri1"}  # a norm over routed + shared: no partial state
SCALED_STREAM = {"doge", "deepseek_v4", "glm5_next"}  # the update changes the stream even where it adds nothing
TOLERANCE = 1e-5


@functools.lru_cache(maxsize=1)  # tests are grouped by family
def tiny(family):
    return families.tiny(family, jitter=0.1)


@functools.lru_cache(maxsize=1)
def original(family):
    with torch.no_grad():
        return tiny(family)(**families.inputs(family))["logits"]


@torch.no_grad()
def run(family, connectivity, layers=None):
    return O.oracle(family, tiny(family), families.inputs(family), connectivity, layers)


def undefined(family, connectivity):
    return family in POST_NORMED and O.READS[connectivity][0] == "partial"


def difference(a, b):
    """Largest difference relative to the scale of the logits."""
    return ((a - b).abs().max() / b.abs().max()).item()



def test_every_family_is_classified():
    assert set(O.PLAIN) | set(O.NOT_PLAIN) == set(families.FAMILIES)
    assert not set(O.PLAIN) & set(O.NOT_PLAIN)
    assert set(O.DEFINED) - set(O.PLAIN) <= set(O.NOT_PLAIN)


@pytest.mark.parametrize("family", [*O.DEFINED, *O.MORE_SHAPES])
def test_none_is_the_model(family):
    assert difference(run(family, "none"), original(family)) <= TOLERANCE
    for connectivity in O.READS:
        assert torch.equal(run(family, connectivity, layers=()), run(family, "none"))


@pytest.mark.parametrize("family", O.DEFINED)
def test_connectivities_differ_where_they_must(family):
    kinds = O.layer_kinds(family, tiny(family))
    in_front = kinds[:-1]  # layers that have an attention behind them
    partial_is_outdated = all(not kind["dense"] and not kind["shared"] for kind in in_front)
    outcomes = {}
    for connectivity in O.READS:
        try:
            outcomes[connectivity] = run(family, connectivity)
        except O.Undefined:
            assert undefined(family, connectivity)
    for connectivity, logits in outcomes.items():
        assert torch.isfinite(logits).all()
        same_as_model = connectivity == "none" or (connectivity == "mlp_only" and family in O.PARALLEL)
        assert torch.equal(logits, outcomes["none"]) == same_as_model, connectivity
        if not same_as_model:
            assert difference(logits, outcomes["none"]) > 1e-3, connectivity
    if "farskip" in outcomes:
        assert torch.equal(outcomes["farskip"], outcomes["ladder"]) == partial_is_outdated


def some(families):
    """Every fourth in CI: what is tested here is the oracle, whose code is common to all."""
    return [family if i % 4 == 0 else pytest.param(family, marks=pytest.mark.slow) for i, family in enumerate(sorted(families))]


@pytest.mark.parametrize("family", some(O.DEFINED))
def test_first_converted_layer_keeps_its_attention(family):
    """With one converted layer nothing lies in front of it: attention reads R, only the MLP reads differently."""
    last = len(O.layer_kinds(family, tiny(family))) - 1
    assert torch.equal(run(family, "attn_only", [last]), run(family, "none"))
    assert torch.equal(run(family, "ladder", [last]), run(family, "mlp_only", [last]))


def test_undefined_says_why():
    for family in POST_NORMED:
        with pytest.raises(O.Undefined, match="norm stands over the sum"):
            run(family, "farskip")
    with pytest.raises(O.Undefined, match="no oracle was written"):
        O.oracle("bert", None, {}, "farskip")


def silence(model, *names):
    """Zero every parameter of the modules of these names: they contribute nothing."""
    for name, parameter in model.named_parameters():
        if set(name.split(".")[:-1]) & set(names):
            torch.nn.init.zeros_(parameter)


@pytest.mark.parametrize("family", sorted(set(O.DEFINED) - POST_NORMED))
@torch.no_grad()
def test_the_routed_part_is_the_experts(family):
    """Silent experts have nothing in flight, so attention reads R; this checks the split of each MoE block."""
    model, inputs = families.tiny(family, jitter=0.1), families.inputs(family)
    silence(model, "experts", "up_embed")
    for with_partial, without in ("attn_only", "none"), ("farskip", "mlp_only"):
        expected = O.oracle(family, model, inputs, without)
        assert difference(O.oracle(family, model, inputs, with_partial), expected) <= TOLERANCE


@pytest.mark.parametrize("family", sorted(set(O.DEFINED) - POST_NORMED - SCALED_STREAM))
@torch.no_grad()
def test_the_ready_part_is_all_but_the_experts(family):
    """With silent shared experts and dense MLPs the routed part is all there is: partial and outdated states agree."""
    model, inputs = families.tiny(family, jitter=0.1), families.inputs(family)
    silence(model, "shared_experts", "shared_expert", "shared_mlp")
    for layer, kind in zip(O.layers_of(O.shape_of(family), model), O.layer_kinds(family, model)):
        if kind["dense"]:
            silence(O.shape_of(family).mlp_of(layer), *"gate_proj up_proj down_proj fc1 fc2 wi wo".split())
    expected = O.oracle(family, model, inputs, "ladder")
    assert difference(O.oracle(family, model, inputs, "farskip"), expected) <= TOLERANCE


# An encoder refuses to be called with a cache.
@pytest.mark.parametrize("family", some(set(O.DEFINED) - {"switch_transformers"}))
@torch.no_grad()
def test_the_cache_of_the_recording_run_is_not_attended(family):
    inputs = dict(families.inputs(family), use_cache=True)
    assert difference(O.oracle(family, tiny(family), inputs, "none"), original(family)) <= TOLERANCE


@pytest.mark.parametrize("family", ["deepseek_v3", "flint", "qwen3_moe"])
def test_farskip_is_the_two_streams_of_the_paper(family):
    """PAPER.md: A carries all but the last routed output, R everything; dense layers collapse both streams.

    Written on whole modules and in place of the layers of the running model, so that nothing of the oracle is used.
    """
    model = tiny(family)
    streams = {}

    def two_streams(layer, R, *args, **kwargs):
        A = streams.get("A", R)
        h, _ = layer.self_attn(layer.input_layernorm(A), *args, **kwargs)
        x = layer.post_attention_layernorm(R)
        after, m = R + h, layer.mlp(x)
        shared = getattr(layer.mlp, "shared_experts", getattr(layer.mlp, "shared_expert", None))
        dense = not hasattr(layer.mlp, "experts")
        streams["A"] = after + m if dense else after if shared is None else after + shared(x)
        return after + m

    layers = model.model.layers
    try:
        for layer in layers:
            layer.forward = functools.partial(two_streams, layer)
        with torch.no_grad():
            expected = model(**families.inputs(family))["logits"]
    finally:
        for layer in layers:
            del layer.forward
    assert difference(run(family, "farskip"), expected) <= TOLERANCE


def test_gradients_flow_through_the_oracle():
    family = "deepseek_v3"
    model = families.tiny(family, jitter=0.1)
    gradients = []
    for logits in (lambda: model(**families.inputs(family))["logits"],
                   lambda: O.oracle(family, model, families.inputs(family), "none")):
        model.zero_grad()
        logits().square().mean().backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() and any("experts" in name for name in gradients[0])
    for name in gradients[0]:
        torch.testing.assert_close(gradients[1][name], gradients[0][name], rtol=1e-5, atol=1e-7)
