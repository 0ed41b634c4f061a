"""``verify``: agrees with a right model, and finds the layer where a wrong one begins to differ."""
import dataclasses
from unittest import mock

import pytest
import torch

import families
import farskip_fx as fs
import farskip_fx.passes.rewire as rewire_pass


def converted(family, **options):
    torch._dynamo.reset()
    return fs.apply(families.tiny(family, jitter=0.1), **{"inner": "aot_eager", **options}), families.inputs(family)


@pytest.mark.parametrize("family", ["deepseek_v3", "doge", *(pytest.param(f, marks=pytest.mark.slow) for f in ("cohere2_moe", "flex_olmo"))])
@pytest.mark.parametrize("connectivity", ["farskip", pytest.param("ladder", marks=pytest.mark.slow)])
def test_a_right_model_agrees(family, connectivity):
    model, inputs = converted(family, connectivity=connectivity)
    found = fs.verify(model, **inputs)
    assert found and found.output <= 1e-6 and max(layer.difference for layer in found.layers) <= 1e-6
    assert "all 3 layers agree" in str(found)


def test_the_original_is_bit_for_bit():
    model, inputs = converted("deepseek_v3", connectivity="none", overlap=False)
    found = fs.verify(model, **inputs)
    assert found.output == 0 and all(layer.difference == 0 for layer in found.layers)


def test_caches_are_not_filled_twice():
    model, inputs = converted("qwen3_moe", connectivity="ladder")
    from transformers import DynamicCache
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        assert fs.verify(model, input_ids=inputs["input_ids"], past_key_values=cache, use_cache=True)
    assert cache.get_seq_length() == inputs["input_ids"].shape[1]


def test_names_the_first_layer_that_differs():
    model, inputs = converted("deepseek_v3", connectivity="farskip")
    builds = rewire_pass._redirect

    def wrong(builder, blocks, redirect, *rest):
        """The read of layer 2's attention is built from the state before."""
        block = redirect.reader.block
        if block is blocks.layers[2].leading[0]:
            state = block.stream.states[block.contribution.origin - 1]
            redirect = dataclasses.replace(redirect, value=state, reader=dataclasses.replace(redirect.reader, hidden=()))
        return builds(builder, blocks, redirect, *rest)

    with mock.patch.object(rewire_pass, "_redirect", wrong):
        found = fs.verify(model, **inputs)
    assert not found and found.first.index == 2 and "layers.2" in found.first.label
    assert "first layer that differs is 2" in str(found)


def test_tells_the_schedule_from_the_rewiring():
    model, inputs = converted("qwen3_moe", connectivity="farskip")
    forward = model.model.forward
    compiled = forward._compiled

    def late(*args, **kwargs):
        out = compiled(*args, **kwargs)
        out.last_hidden_state = out.last_hidden_state + 1
        return out

    with mock.patch.object(forward, "_compiled", late):
        found = fs.verify(model, **inputs)
    assert not found and found.first is None and "overlap=False" in str(found)


def test_needs_a_converted_model():
    with pytest.raises(fs.ConfigError, match="farskip_fx.apply"):
        fs.verify(families.tiny("qwen3_moe"), **families.inputs("qwen3_moe"))
