"""Never silently the wrong model: each way to run the original connectivity by mistake ends in an error that helps."""
import copy
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch._dynamo.exc import BackendCompilerFailed
from torch.utils.checkpoint import create_selective_checkpoint_contexts
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import families
import farskip_fx as fs
from compiled import Breaks, cause, logits_of, run
from oracle import oracle

FAMILY = "deepseek_v3"
INPUTS = families.inputs(FAMILY)


@pytest.fixture
def model():
    torch._dynamo.reset()
    return families.tiny(FAMILY, jitter=0.1)


def dense():
    return LlamaForCausalLM(LlamaConfig(vocab_size=128, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                                        num_attention_heads=2, num_key_value_heads=2)).eval()


def refusal(model, inputs=INPUTS, **options):
    with pytest.raises(BackendCompilerFailed) as caught, torch.no_grad():
        run(model, inputs, inner="eager", **options)
    return cause(caught.value)


def expected(model, connectivity="farskip", inputs=INPUTS):
    with torch.no_grad():
        return oracle(FAMILY, model, inputs, connectivity)


# --- the backend ------------------------------------------------------------------------------------------------

def test_unknown_option(model):
    error = refusal(model, connectivty="farskip")
    assert isinstance(error, fs.ConfigError) and "'connectivty'" in str(error) and "connectivity" in str(error)


@pytest.mark.parametrize("options", [
    {"connectivity": "farskop"}, {"layers": "first:0.5"}, {"layers": [-1]}, {"layers": "last:0"}, {"layers": 3},
    {"strict": "yes"}, {"costs": "guess"}, {"inner": "tvm"}, {"rates": {"speed": 1}}, {"version": 99},
])
def test_bad_value_names_the_field(options):
    with pytest.raises(fs.ConfigError, match=next(iter(options)).rstrip("s")):
        fs.FarskipConfig.from_dict(options)


def test_layer_that_does_not_exist(model):
    assert "the model has 3 decoder layers" in str(refusal(model, layers=[7]))


def test_no_moe_found():
    error = refusal(dense())
    assert isinstance(error, fs.NoMoEError) and "router" in str(error) and "ladder" in str(error)


def test_no_stream_found():
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    with pytest.raises(BackendCompilerFailed) as caught:
        torch.compile(net, backend="farskip", options={"inner": "eager"})(torch.randn(2, 4))
    assert isinstance(cause(caught.value), fs.NoMoEError)


def test_function_without_a_model_passes():
    loss = torch.compile(lambda a, b: (a - b).square().mean(), backend="farskip", options={"inner": "eager"})
    assert loss(torch.ones(3), torch.zeros(3)) == 1


def test_refused_layer_names_layer_and_reason():
    family = "afmoe"
    error = refusal(families.tiny(family, jitter=0.1), families.inputs(family))
    assert isinstance(error, fs.RefusedError)
    assert "layer 2" in str(error) and "routed and shared parts together" in str(error)


def test_refused_layer_not_strict_is_one_warning():
    family = "afmoe"
    model, inputs = families.tiny(family, jitter=0.1), families.inputs(family)
    with warnings.catch_warnings(record=True) as caught, torch.no_grad():
        warnings.simplefilter("always", fs.FarskipWarning)
        got = run(model, inputs, inner="eager", strict=False)
    texts = [str(w.message) for w in caught if issubclass(w.category, fs.FarskipWarning)]
    assert len(texts) == 1 and "layer 2" in texts[0]
    report = fs.last_reports()[-1]
    assert [layer.index for layer in report.rewired.refused] == [2]
    # Layer 2 stays as it is: layers 0 and 1 alone give the same numbers.
    with torch.no_grad():
        assert torch.equal(got, run(model, inputs, inner="eager", layers=(0, 1)))


@pytest.mark.parametrize("layer", [1, *(pytest.param(layer, marks=pytest.mark.slow) for layer in (0, 2))])
def test_split_model(model, layer):
    model.model.layers[layer].mlp = Breaks(model.model.layers[layer].mlp)
    error = refusal(model)
    assert isinstance(error, fs.SplitModelError) and "graph_breaks" in str(error)


def test_split_model_not_strict_is_the_original(model):
    with torch.no_grad():
        reference = logits_of(model(**INPUTS))
        model.model.layers[1].mlp = Breaks(model.model.layers[1].mlp)
        with pytest.warns(fs.FarskipWarning, match="only a part of the model"):
            assert torch.equal(run(model, INPUTS, inner="eager", strict=False), reference)


def test_compiling_one_layer(model):
    model.model.layers[1].compile(backend=fs.farskip_backend, options={"inner": "eager"})
    with pytest.raises(BackendCompilerFailed) as caught, torch.no_grad():
        model(**INPUTS)
    assert isinstance(cause(caught.value), fs.SplitModelError)


def test_checkpointing_with_a_policy_of_its_own_is_refused(model):
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": False, "context_fn": keep_products})
    with pytest.raises(BackendCompilerFailed) as caught:        # with gradients: without, nothing is checkpointed
        run(model, INPUTS, inner="eager")
    error = cause(caught.value)
    assert isinstance(error, fs.RefusedError) and "context_fn" in str(error)


def keep_products():
    return create_selective_checkpoint_contexts([torch.ops.aten.mm.default])


def test_break_outside_the_layers_is_no_split(model):
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, **kwargs):
            out = self.model(**kwargs)
            torch._dynamo.graph_break()
            return out.logits * 1

    with torch.no_grad():
        outer = Outer()
        torch._dynamo.reset()
        got = torch.compile(outer, backend=fs.farskip_backend, options={"inner": "eager"})(**INPUTS)
    torch.testing.assert_close(got, expected(model), rtol=0, atol=2e-5)


def test_options_against_the_checkpoint(model):
    model.config.farskip = {"version": 1, "connectivity": "ladder", "layers": "all"}
    error = refusal(model, connectivity="farskip")
    assert isinstance(error, fs.ConfigError) and "ladder" in str(error)
    with torch.no_grad():
        torch.testing.assert_close(run(model, INPUTS, inner="eager"), expected(model, "ladder"), rtol=0, atol=2e-5)


# --- apply ------------------------------------------------------------------------------------------------------

def test_apply_serves_every_caller(model):
    plain = copy.deepcopy(model)
    fs.apply(model, connectivity="farskip", inner="eager")
    with torch.no_grad():
        torch.testing.assert_close(logits_of(model(**INPUTS)), expected(plain), rtol=0, atol=2e-5)
        hidden = model.model(**INPUTS).last_hidden_state
        torch.testing.assert_close(model.lm_head(hidden), expected(plain), rtol=0, atol=2e-5)


@pytest.mark.parametrize("use_cache", [False, True])
def test_generate_uses_one_connectivity_throughout(model, use_cache):
    plain = copy.deepcopy(model)
    fs.apply(model, connectivity="farskip", inner="eager")
    ids = INPUTS["input_ids"]
    got = model.generate(ids, max_new_tokens=6, do_sample=False, use_cache=use_cache)
    for _ in range(6):
        logits = expected(plain, inputs={"input_ids": ids, "use_cache": False})
        ids = torch.cat([ids, logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(got, ids)


def test_apply_raises_when_run_eagerly(model):
    fs.apply(model, inner="eager")
    with torch.compiler.set_stance("force_eager"), pytest.raises(fs.WrongConnectivityError, match="apply"):
        model(**INPUTS)


@pytest.mark.parametrize("backend", ["eager", "aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_apply_raises_under_another_backend(model, backend):
    fs.apply(model, inner="eager")
    torch._dynamo.reset()
    with pytest.raises(Exception, match="ORIGINAL connectivity"), torch.no_grad():
        torch.compile(model, backend=backend)(**INPUTS)


def test_our_backend_outside_takes_the_applied_configuration(model):
    plain = copy.deepcopy(model)
    fs.apply(model, connectivity="ladder", inner="eager")
    with torch.no_grad():
        torch._dynamo.reset()
        got = logits_of(torch.compile(model, backend="farskip")(**INPUTS))
        torch.testing.assert_close(got, expected(plain, "ladder"), rtol=0, atol=2e-5)
        with pytest.raises(BackendCompilerFailed, match="disagrees"):
            run(model, INPUTS, connectivity="farskip")


@pytest.mark.parametrize("travel", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_raises_until_applied_again(model, travel):
    plain = copy.deepcopy(model)
    twin = travel(fs.apply(model, connectivity="ladder", inner="eager"))
    with pytest.raises(fs.WrongConnectivityError, match="apply"):
        twin(**INPUTS)
    fs.apply(twin, inner="eager")
    with torch.no_grad():
        torch.testing.assert_close(logits_of(twin(**INPUTS)), expected(plain, "ladder"), rtol=0, atol=2e-5)


def test_apply_twice_and_remove(model):
    with torch.no_grad():
        reference = logits_of(model(**INPUTS))
        fs.apply(model, inner="eager")
        with pytest.raises(fs.ConfigError, match="already"):
            fs.apply(model, inner="eager")
        fs.remove(model)
        assert torch.equal(logits_of(model(**INPUTS)), reference)
    assert getattr(model.config, "farskip", None) is None
    with pytest.raises(fs.ConfigError, match="not converted"):
        fs.remove(model)


def test_checkpoint_remembers(model, tmp_path):
    plain = copy.deepcopy(model)
    fs.apply(model, connectivity="attn_only", layers=[1, 2], inner="eager").save_pretrained(tmp_path)
    loaded = type(plain).from_pretrained(tmp_path).eval()
    with pytest.raises(fs.ConfigError, match="disagrees"):
        fs.apply(loaded, connectivity="ladder")
    fs.apply(loaded, inner="eager")
    with torch.no_grad():
        want = oracle(FAMILY, plain, INPUTS, "attn_only", (1, 2))
        torch.testing.assert_close(logits_of(loaded(**INPUTS)), want, rtol=0, atol=2e-5)


def test_trainer_goes_through_the_converted_graph(model, tmp_path):
    fs.apply(model, connectivity="farskip", inner="aot_eager")
    before = len(fs.last_reports())
    data = [{"input_ids": torch.arange(3, 19), "labels": torch.arange(3, 19)} for _ in range(4)]
    arguments = TrainingArguments(output_dir=tmp_path, max_steps=2, per_device_train_batch_size=2, report_to=[],
                                  use_cpu=True, disable_tqdm=True, logging_steps=1)
    Trainer(model=model, args=arguments, train_dataset=data).train()
    reports = fs.last_reports()[before:] or fs.last_reports()[-1:]
    assert reports[-1].rewired.rewired == 3


# --- the decorator ----------------------------------------------------------------------------------------------

def test_decorator(model):
    plain = copy.deepcopy(model)

    class Mine(type(model)):
        @fs.farskip(connectivity="farskip", inner="eager")
        def forward(self, input_ids, **kwargs):
            return super(Mine, self).forward(input_ids=input_ids, **kwargs)

    mine = Mine(model.config).eval()
    mine.load_state_dict(model.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(logits_of(mine(**INPUTS)), expected(plain), rtol=0, atol=2e-5)
        with torch.compiler.set_stance("force_eager"), pytest.raises(fs.WrongConnectivityError):
            mine(**INPUTS)


def test_decorator_needs_parentheses():
    with pytest.raises(fs.ConfigError, match="parentheses"):
        fs.farskip(lambda self, x: x)


def test_nothing_global_changes(model):
    import torch._dynamo.config as dynamo_config
    import torch._inductor.config as inductor_config
    saved = dynamo_config.get_config_copy(), inductor_config.get_config_copy()
    with torch.no_grad():
        run(model, INPUTS, inner="eager")
    assert (dynamo_config.get_config_copy(), inductor_config.get_config_copy()) == saved
