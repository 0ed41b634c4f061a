"""Generation with a converted model: caches, padding, search and compilation by ``generate`` itself.

With a cache every token is computed once, from what the cache holds, so a cache that another connectivity filled gives
another text without an error. Reference: greedy decoding by the oracle, which has no cache and no compiler.
"""
import pytest
import torch
from torch._dynamo.exc import BackendCompilerFailed
from torch._dynamo.utils import counters
from transformers import CompileConfig, GenerationConfig

import families
import farskip_fx as fs
from compiled import cause
from oracle import oracle

FAMILY = "qwen3_moe"
# Sparse attention keeps 8 of the tokens by default: whom it keeps depends on roundings, cached or not.
CONFIG = {"glm_moe_dsa": {"index_topk": 64}}
IDS = torch.randint(3, 100, (2, 11), generator=torch.Generator().manual_seed(5))
GREEDY = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


def fresh(family=FAMILY):
    torch._dynamo.reset()
    return families.tiny(family, jitter=0.1, **CONFIG.get(family, {}))


def applied(connectivity="farskip", family=FAMILY, **options):
    return fs.apply(fresh(family), connectivity=connectivity, inner="eager", **options)


def greedy(plain, connectivity="farskip", family=FAMILY, ids=IDS, mask=None, steps=GREEDY["max_new_tokens"]):
    with torch.no_grad():
        for _ in range(steps):
            inputs = {"input_ids": ids, "use_cache": False}
            if mask is not None:
                mask = torch.nn.functional.pad(mask, (0, ids.shape[1] - mask.shape[1]), value=1)
                inputs |= {"attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}
            ids = torch.cat([ids, oracle(family, plain, inputs, connectivity)[:, -1:].argmax(-1)], dim=1)
    return ids


def compile_config(**options):
    """As on a GPU: ``generate`` compiles by itself only there."""
    config = CompileConfig(**options)
    config._compile_all_devices = True
    return config


# --- caches -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize("family,connectivity", [
    ("deepseek_v3", "farskip"),
    *(pytest.param("deepseek_v3", name, marks=pytest.mark.slow) for name in ("none", "attn_only", "mlp_only", "ladder")),
    *(pytest.param(family, name, marks=pytest.mark.slow) for family, name in (
        ("qwen3_moe", "farskip"), ("nemotron_h", "farskip"), ("gpt_oss", "ladder"), ("glm_moe_dsa", "attn_only"),
        ("qwen3_next", "farskip"))),
])
def test_cached_is_uncached(family, connectivity, cache):
    got = applied(connectivity, family).generate(IDS, cache_implementation=cache, **GREEDY)
    assert torch.equal(got, greedy(fresh(family), connectivity, family))


def test_one_graph_for_the_prompt_and_two_for_decoding():
    """The first length is compiled as it is, the second makes it dynamic, and then no step compiles."""
    model = applied()
    before = counters["stats"]["unique_graphs"]
    model.generate(IDS, **{**GREEDY, "max_new_tokens": 12})
    assert counters["stats"]["unique_graphs"] - before == 3


@pytest.mark.parametrize("options", [
    pytest.param({}, marks=pytest.mark.slow), {"use_cache": False}, {"cache_implementation": "static"}])
def test_left_padding(options):
    ids, mask = IDS.clone(), torch.ones_like(IDS)
    ids[1, :4], mask[1, :4] = 0, 0
    got = applied().generate(ids, attention_mask=mask, **options, **GREEDY)
    assert torch.equal(got, greedy(fresh(), ids=ids, mask=mask))
    assert torch.equal(got[1, 4:], greedy(fresh(), ids=IDS[1:, 4:])[0])


@pytest.mark.slow
def test_prefill_in_chunks():
    assert torch.equal(applied().generate(IDS, prefill_chunk_size=4, **GREEDY), greedy(fresh()))


# --- other ways to search: what comes out with a cache is what comes out without ----------------------------------

@pytest.mark.parametrize("options", [
    pytest.param({"do_sample": False, "num_beams": 3}, marks=pytest.mark.slow), pytest.param({"do_sample": True, "top_k": 20}, marks=pytest.mark.slow),
    pytest.param({"do_sample": True, "num_beams": 2}, marks=pytest.mark.slow),
], ids=["beams", "sampling", "beam sampling"])
def test_search(options):
    model, texts = applied(), []
    for use_cache in (True, False):
        torch.manual_seed(3)
        texts.append(model.generate(IDS, use_cache=use_cache, **{**GREEDY, **options}))
    assert torch.equal(*texts)


@pytest.mark.slow
def test_assisted():
    """The assistant proposes, the converted model decides: the text is its own greedy one, whoever assists."""
    ids = IDS[:1]
    for assistant in (fresh("olmoe"), applied("ladder")):
        got = applied().generate(ids, assistant_model=assistant, **GREEDY)
        assert torch.equal(got, greedy(fresh(), ids=ids))


# --- generate compiles ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize("options", [{}, pytest.param({"backend": "aot_eager", "mode": None}, marks=pytest.mark.slow),
                                     {"backend": "farskip", "mode": None}], ids=["default", "aot_eager", "farskip"])
@pytest.mark.parametrize("chunk", [None, pytest.param(4, marks=pytest.mark.slow)])
def test_a_converted_model_is_not_compiled_again(options, chunk):
    got = applied().generate(IDS, cache_implementation="static", compile_config=compile_config(**options),
                             prefill_chunk_size=chunk, **GREEDY)
    assert torch.equal(got, greedy(fresh()))


def test_a_generation_config_of_ones_own():
    """It does not say ``disable_compile``; what it leaves open comes from the model's."""
    config = GenerationConfig(**GREEDY, cache_implementation="static", compile_config=compile_config())
    assert torch.equal(applied().generate(IDS, generation_config=config), greedy(fresh()))


def test_compiled_again_against_advice_raises():
    with pytest.raises(fs.WrongConnectivityError, match="disable_compile=True"):
        applied().generate(IDS, cache_implementation="static", disable_compile=False,
                           compile_config=compile_config(backend="eager", mode=None), **GREEDY)


def test_remove_lets_generate_compile_again():
    model = fresh()
    model.generation_config.disable_compile = False
    fs.remove(fs.apply(model, inner="eager"))
    assert model.generation_config.disable_compile is False


def test_compiling_the_decoding_step_alone_is_refused():
    """The prefill runs the original model, and its cache would go into the converted decoding step."""
    options = {"cache_implementation": "static", **GREEDY}
    config = compile_config(backend="farskip", mode=None, options={"inner": "eager"})
    with pytest.raises(BackendCompilerFailed) as caught:
        fresh().generate(IDS, compile_config=config, **options)
    assert isinstance(cause(caught.value), fs.WrongConnectivityError) and "apply" in str(cause(caught.value))
    # With the prefill in chunks both are compiled.
    assert torch.equal(fresh().generate(IDS, compile_config=config, prefill_chunk_size=4, **options), greedy(fresh()))


def test_a_cache_that_the_original_filled_is_refused():
    model = fresh()
    fast = torch.compile(model, backend="farskip", options={"inner": "eager"})
    with torch.no_grad():
        cache = model(IDS, use_cache=True).past_key_values
        with pytest.raises(BackendCompilerFailed, match="WrongConnectivityError"):
            fast(IDS[:, :1], past_key_values=cache)
        cache = fast(IDS, use_cache=True).past_key_values
        got = fast(IDS[:, :1], past_key_values=cache).logits
        want = oracle(FAMILY, model, {"input_ids": torch.cat([IDS, IDS[:, :1]], 1), "use_cache": False}, "farskip")
    torch.testing.assert_close(got, want[:, -1:], rtol=0, atol=2e-5)


def test_compile_in_place_generates_converted():
    """``model.compile()`` replaces the call of the module itself, so ``generate`` goes through it."""
    model = fresh()
    model.compile(backend="farskip", options={"inner": "eager"})
    assert torch.equal(model.generate(IDS, **GREEDY), greedy(fresh()))
