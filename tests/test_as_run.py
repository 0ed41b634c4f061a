"""As people run models: shapes, masks, outputs, dtypes and modes of a converted model, each exact or refused.

What is compared against: the oracle (tests/oracle.py) in the same dtype and with the same arguments, or, for
``connectivity="none"``, the model itself, bit for bit. Generation and caches are in test_generate.py.
"""
import warnings

import pytest
import torch
from torch._dynamo.exc import BackendCompilerFailed
from torch._dynamo.utils import counters

import families
import farskip_fx as fs
from compiled import cause, logits_of, run
from oracle import oracle

FAMILY = "deepseek_v3"
IDS = torch.randint(3, 100, (2, 12), generator=torch.Generator().manual_seed(5))


def fresh(family=FAMILY, **config):
    torch._dynamo.reset()
    return families.tiny(family, jitter=0.1, **config)


def applied(family=FAMILY, *, dynamic=None, connectivity="farskip", inner="eager", **config):
    """A model and its converted twin."""
    options = {"connectivity": connectivity, "inner": inner}
    return fresh(family, **config), fs.apply(fresh(family, **config), dynamic=dynamic, **options)


def graphs():
    return counters["stats"]["unique_graphs"]


def close(got, want, tolerance=2e-5):
    torch.testing.assert_close(got, want, rtol=0, atol=tolerance)


def expected(plain, connectivity="farskip", family=FAMILY, **inputs):
    return oracle(family, plain, {"use_cache": False, **inputs}, connectivity)


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


# --- shapes -------------------------------------------------------------------------------------------------------

SIZES = [(2, 12), (3, 7), (1, 16), (2, 5), (4, 9)]


def ids_of(size):
    return torch.randint(3, 100, size, generator=torch.Generator().manual_seed(size[0] * 100 + size[1]))


@pytest.mark.parametrize("way", ["apply", pytest.param("compile", marks=pytest.mark.slow)])
def test_dynamic_shapes_compile_once(way):
    plain = fresh()
    if way == "apply":
        fast = fs.apply(fresh(), dynamic=True, inner="eager")
    else:
        fast = torch.compile(fresh(), backend="farskip", dynamic=True, options={"inner": "eager"})
    before = graphs()
    for size in SIZES[:2]:
        close(fast(ids_of(size), use_cache=False).logits, expected(plain, input_ids=ids_of(size)))
    assert graphs() - before == 1
    for size in SIZES[2:]:      # a batch of one is a size that Dynamo always compiles for itself
        close(fast(ids_of(size), use_cache=False).logits, expected(plain, input_ids=ids_of(size)))
    assert graphs() - before <= 2


def test_automatic_dynamic_settles():
    plain, fast = applied()
    before = graphs()
    for length in (12, 7):
        close(fast(ids_of((2, length)), use_cache=False).logits, expected(plain, input_ids=ids_of((2, length))))
    settled = graphs()
    assert settled - before == 2
    for length in (5, 9, 16):
        close(fast(ids_of((2, length)), use_cache=False).logits, expected(plain, input_ids=ids_of((2, length))))
    assert graphs() == settled


def test_sizes_of_tokens_become_symbolic_beside_those_of_the_router():
    """Jamba's router works on tokens in one row: batch x length, a symbol from the second shape on."""
    plain, fast = fresh("jamba"), fs.apply(fresh("jamba"), inner="eager")
    for size in ((2, 3), (3, 4)):
        close(fast(ids_of(size), use_cache=False).logits, expected(plain, family="jamba", input_ids=ids_of(size)))


# --- masks --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("connectivity", ["farskip", "ladder"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding(side, connectivity):
    plain, fast = applied(connectivity=connectivity)
    mask = torch.ones_like(IDS)
    (mask[1, :4] if side == "left" else mask[1, 8:]).zero_()
    got = logits_of(fast(IDS, attention_mask=mask, use_cache=False))
    close(got[mask.bool()], expected(plain, connectivity, input_ids=IDS, attention_mask=mask)[mask.bool()])


@pytest.mark.parametrize("family", ["qwen3_moe", "mellum"])
def test_packed_sequences(family):
    """Two sequences in one row, told apart by positions that restart: each is what it is alone."""
    plain, fast = applied(family)
    a, b = ids_of((1, 7)), ids_of((1, 9))
    positions = torch.cat([torch.arange(7), torch.arange(9)]).unsqueeze(0)
    got = logits_of(fast(torch.cat([a, b], 1), position_ids=positions, use_cache=False))
    for part, ids in zip(got.split([7, 9], dim=1), (a, b)):
        close(part, expected(plain, family=family, input_ids=ids))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_mask_of_four_dimensions(attention):
    plain, fast = applied("qwen3_moe", attn_implementation=attention)
    mask = torch.full((2, 1, 12, 12), torch.finfo(torch.float32).min).triu(1)
    mask[:, :, :, 3:5] = torch.finfo(torch.float32).min
    got = logits_of(fast(IDS, attention_mask=mask, use_cache=False))
    close(got, expected(plain, family="qwen3_moe", input_ids=IDS, attention_mask=mask))


@pytest.mark.parametrize("attention", ["eager", "flex_attention"])
def test_attention_implementation(attention):
    """Flex on a CPU runs through inner="eager"; building its mask warns, and that must not split the model."""
    family = "qwen3_moe"
    plain = fresh(family)
    fast = fs.apply(fresh(family, attn_implementation=attention), inner="eager")
    before = graphs()
    close(logits_of(fast(IDS, use_cache=False)), expected(plain, family=family, input_ids=IDS))
    assert graphs() - before == 1
    assert fs.last_reports()[-1].rewired.rewired == 3


def test_flex_attention_without_apply_says_what_helps():
    model, inputs = fresh("qwen3_moe", attn_implementation="flex_attention"), {"input_ids": IDS, "use_cache": False}
    with pytest.raises(BackendCompilerFailed) as caught:
        run(model, inputs, inner="eager")
    assert isinstance(cause(caught.value), fs.SplitModelError)
    assert "farskip_fx.apply(model)" in str(cause(caught.value)) and "warnings.warn" in str(cause(caught.value))
    with torch._dynamo.config.patch(ignore_logging_functions={warnings.warn}):
        close(run(model, inputs, inner="eager"), expected(fresh("qwen3_moe"), family="qwen3_moe", input_ids=IDS))


# --- what a forward returns ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("name,field,count", [
    ("output_router_logits", "router_logits", 2), ("output_hidden_states", "hidden_states", 4),
    ("output_attentions", "attentions", 3),
])
def test_captured_outputs_at_the_first_call(name, field, count):
    plain, fast = applied(attn_implementation="eager")
    before = graphs()
    out = fast(IDS, use_cache=False, **{name: True})
    close(out.logits, expected(plain, input_ids=IDS))
    assert len(getattr(out, field)) == count and graphs() - before == 1


def test_captured_outputs_are_those_of_the_converted_model():
    _, fast = applied(attn_implementation="eager")
    plain, twin = applied(connectivity="none", attn_implementation="eager")
    names = {"output_router_logits": True, "output_hidden_states": True, "output_attentions": True, "use_cache": False}
    got, same, original = fast(IDS, **names), twin(IDS, **names), plain(IDS, **names)
    for field in ("router_logits", "hidden_states", "attentions"):
        assert all(torch.equal(a, b) for a, b in zip(getattr(same, field), getattr(original, field), strict=True))
    # The router of a converted layer sees the stream before its attention, and so does what it reports.
    layer = fast.model.layers[1]
    state = got.hidden_states[1]
    routed = torch.nn.functional.linear(layer.post_attention_layernorm(state).view(-1, state.shape[-1]),
                                        layer.mlp.gate.weight)
    close(got.router_logits[0].view_as(routed), routed)
    close(fast.lm_head(got.hidden_states[-1]), got.logits)


def test_captured_outputs_without_apply_say_what_helps():
    model, plain = fresh(), fresh()
    fast = torch.compile(model, backend="farskip", options={"inner": "eager"})
    with pytest.raises(BackendCompilerFailed) as caught:
        fast(IDS, use_cache=False, output_hidden_states=True)
    assert "farskip_fx.apply" in str(cause(caught.value)) and "output_capturing.py" in str(cause(caught.value))
    torch._dynamo.reset()
    model(IDS, output_hidden_states=True)
    close(fast(IDS, use_cache=False, output_hidden_states=True).logits, expected(plain, input_ids=IDS))


def test_auxiliary_loss_and_labels():
    family = "qwen3_moe"
    plain, fast = applied(family)
    out = fast(IDS, labels=IDS, output_router_logits=True, use_cache=False)
    want = expected(plain, family=family, input_ids=IDS)
    loss = torch.nn.functional.cross_entropy(want[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())
    from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func
    balance = load_balancing_loss_func(out.router_logits, plain.num_experts, plain.num_experts_per_tok, None)
    close(out.aux_loss, balance)
    close(out.loss, loss + plain.router_aux_loss_coef * balance)


def test_other_arguments():
    plain, fast = applied()
    want = expected(plain, input_ids=IDS)
    close(fast(IDS, use_cache=False, logits_to_keep=1).logits, want[:, -1:])
    close(fast(IDS, use_cache=False, return_dict=False)[0], want)
    close(fast(inputs_embeds=fast.get_input_embeddings()(IDS), use_cache=False).logits, want)


# --- dtypes and modes ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize("connectivity", ["none", "farskip"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_parameters(dtype, connectivity):
    plain, fast = (model.to(dtype) for model in applied(connectivity=connectivity))
    got = logits_of(fast(IDS, use_cache=False))
    want = expected(plain, connectivity, input_ids=IDS)
    assert got.dtype == want.dtype == dtype
    if connectivity == "none":
        assert torch.equal(got, logits_of(plain(IDS, use_cache=False)))
    # The oracle adds in another order and a router may flip on a rounding: some tokens differ, most are the same.
    error = (got - want).float().abs().amax(-1) / want.float().abs().max()
    assert error.median() < 8 * torch.finfo(dtype).eps


@pytest.mark.parametrize("connectivity", ["none", "farskip"])
def test_autocast(connectivity):
    plain, fast = applied(connectivity=connectivity)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got, want = logits_of(fast(IDS, use_cache=False)), expected(plain, connectivity, input_ids=IDS)
        if connectivity == "none":
            assert torch.equal(got, logits_of(plain(IDS, use_cache=False)))
    error = (got - want).float().abs().amax(-1) / want.float().abs().max()
    assert error.median() < 8 * torch.finfo(torch.bfloat16).eps
    close(logits_of(fast(IDS, use_cache=False)), expected(plain, connectivity, input_ids=IDS))     # and without again


@pytest.mark.parametrize("mode", [torch.no_grad, pytest.param(torch.inference_mode, marks=pytest.mark.slow), torch.enable_grad])
def test_apply_under_a_gradient_mode(mode):
    plain = fresh()
    with mode():
        fast = fs.apply(fresh(), inner="aot_eager")
        got = logits_of(fast(IDS, use_cache=False))
    close(got, expected(plain, input_ids=IDS))
    close(logits_of(fast(IDS, use_cache=False)), expected(plain, input_ids=IDS))


def test_dropout():
    """Inert in eval mode; in train mode the masks are drawn in the model's own order."""
    plain, fast = applied("qwen3_moe", attn_implementation="eager", attention_dropout=0.1)
    close(logits_of(fast(IDS, use_cache=False)), expected(plain, family="qwen3_moe", input_ids=IDS))
    plain.train(), fast.train()
    torch.manual_seed(0)
    got = logits_of(fast(IDS, use_cache=False))
    torch.manual_seed(1)
    other = logits_of(fast(IDS, use_cache=False))
    assert (got - other).abs().max() > 1e-3
    plain, fast = applied("qwen3_moe", connectivity="none", attn_implementation="eager", attention_dropout=0.1)
    plain.train(), fast.train()
    torch.manual_seed(0)
    want = logits_of(plain(IDS, use_cache=False))
    torch.manual_seed(0)
    assert torch.equal(logits_of(fast(IDS, use_cache=False)), want)


# --- connectivity "none" ------------------------------------------------------------------------------------------

@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
@pytest.mark.parametrize("family", ["deepseek_v3", "qwen3_next", "gpt_oss", "afmoe", "granitemoe"])
def test_none_is_the_model_bit_for_bit(family, inner):
    plain = fresh(family)
    got = run(plain, {"input_ids": IDS, "use_cache": False}, connectivity="none", overlap=False, inner=inner)
    assert torch.equal(got, logits_of(plain(IDS, use_cache=False)))


@pytest.mark.slow
def test_none_is_what_inductor_makes_of_the_model():
    plain = fresh("qwen3_moe", num_hidden_layers=1)
    want = logits_of(torch.compile(plain, backend="inductor")(IDS, use_cache=False))
    got = run(plain, {"input_ids": IDS, "use_cache": False}, connectivity="none", overlap=False)
    assert torch.equal(got, want)


# --- around the model ---------------------------------------------------------------------------------------------

def exact_or_refused(function, want, model=None):
    """Compile ``function`` with the backend: the wanted value, or the text of a refusal."""
    torch._dynamo.reset()
    try:
        got = torch.compile(function, backend="farskip", options=None if model else {"inner": "eager"})(IDS)
    except BackendCompilerFailed as failed:
        assert isinstance(cause(failed), fs.FarskipError), failed
        return str(cause(failed))
    assert torch.equal(got, want) if not want.is_floating_point() else torch.allclose(got, want, rtol=0, atol=2e-5)
    return None


@pytest.mark.parametrize("step", ["argmax", "topk", "sample"])
def test_next_token_inside_the_compiled_function(step):
    model, plain = fresh(), fresh()
    choose = {"argmax": lambda x: x.argmax(-1), "topk": lambda x: x.topk(5, -1).indices,
              "sample": lambda x: torch.where(x < x.topk(5, -1).values[..., -1:], -1e9, x).softmax(-1)}[step]
    want = choose(expected(plain, input_ids=IDS)[:, -1])
    assert exact_or_refused(lambda ids: choose(model(ids, use_cache=False).logits[:, -1]), want) is None


@pytest.mark.parametrize("convert", [True, False])
def test_the_model_twice_in_one_graph(convert):
    model, plain = fresh(), fresh()
    if convert:
        fs.apply(model, inner="eager")
    want = expected(plain, input_ids=IDS) - expected(plain, input_ids=IDS.flip(1))

    def step(ids):
        return model(ids, use_cache=False).logits - model(ids.flip(1), use_cache=False).logits

    refusal = exact_or_refused(step, want, convert)
    assert refusal is None or "not the whole model" in refusal or "stream" in refusal, refusal


@pytest.mark.parametrize("strict", [False, True])
def test_export_is_refused(strict):
    _, fast = applied()
    with pytest.raises(Exception, match="ORIGINAL connectivity"):
        torch.export.export(fast, (IDS,), {"use_cache": False}, strict=strict)
    fs.remove(fast)
    torch.export.export(fast, (IDS,), {"use_cache": False})


def test_gradient_checkpointing():
    plain, fast = applied(inner="aot_eager")
    fast.train(), plain.train()
    fast.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    with torch.enable_grad():
        close(logits_of(fast(IDS)), expected(plain, input_ids=IDS), 1e-4)   # use_cache is switched off, with a warning
