"""What a converted model is combined with: adapters, quantised weights, torch.compile's settings, other models.

Each combination computes what the oracle computes on the same submodules, or is refused by name.
"""
import copy
import functools
import threading

import pytest
import torch
from torch import nn
from torch._dynamo.exc import BackendCompilerFailed

import families
import farskip_fx as fs
from compiled import Breaks, cause, logits_of, run
from oracle import oracle

FAMILY = "qwen2_moe"                      # a gated shared expert, and attention with q_proj, v_proj, o_proj
INPUTS = families.inputs(FAMILY)
LAYERS = 2


def tiny(family=FAMILY):
    return families.tiny(family, jitter=0.1, num_hidden_layers=LAYERS)


@pytest.fixture
def model():
    torch._dynamo.reset()
    return tiny()


def expected(model, connectivity="farskip", layers=None, family=FAMILY, inputs=INPUTS):
    with torch.no_grad():
        return oracle(family, model, inputs, connectivity, layers)


def close(got, want, atol=2e-5):
    torch.testing.assert_close(got, want, rtol=0, atol=atol)


# --- LoRA -------------------------------------------------------------------------------------------------------------

EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
ADAPTERS = {
    "attention": dict(target_modules=["q_proj", "v_proj", "o_proj"]),
    "shared": dict(target_modules=r".*(shared_expert\.(gate_proj|up_proj|down_proj)|shared_expert_gate)"),
    "router": dict(target_modules=[], target_parameters=["mlp.gate.weight"]),
    "experts": dict(target_modules=[], target_parameters=EXPERTS),
    "all": dict(target_modules=["q_proj", "v_proj", "o_proj"], target_parameters=["mlp.gate.weight", *EXPERTS]),
}


def adapted(model, where="all", traceable=True, seed=0):
    """``model`` with random adapters; its own submodules are replaced in place."""
    peft = pytest.importorskip("peft", reason="LoRA tests need peft: pip install 'farskip_fx[test]'")
    torch.manual_seed(seed)
    config = peft.LoraConfig(r=4, lora_alpha=8, init_lora_weights=False, **ADAPTERS[where])
    wrapped = peft.get_peft_model(model, config).eval()
    if traceable:
        from farskip_fx.lora import traceable as prepare
        prepare(wrapped)
    return wrapped


def gradients(model):
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    return found


@pytest.mark.parametrize("where", [where for where in ADAPTERS if where != "all"])
def test_adapters_forward_and_gradients(model, where):
    plain = copy.deepcopy(model)
    wrapped = adapted(model, where)
    torch._dynamo.reset()
    got = logits_of(torch.compile(wrapped, backend="farskip", options={"inner": "aot_eager"})(**INPUTS))
    assert fs.last_reports()[-1].rewired.rewired == LAYERS
    (got.square().mean()).backward()
    ours = gradients(wrapped)
    want = oracle(FAMILY, model, INPUTS, "farskip")
    want.square().mean().backward()
    theirs = gradients(wrapped)
    close(got, want)
    assert (want - expected(plain)).abs().max() > 1e-2, "the adapters do something"
    assert ours.keys() == theirs.keys() and ours and all("lora_" in name for name in ours)
    for name, gradient in theirs.items():
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(ours[name], gradient, rtol=1e-4, atol=1e-5, msg=name)


def test_adapters_on_deepseek_with_expert_parameters():
    family = "deepseek_v3"
    model, inputs = tiny(family), families.inputs(family)
    peft = pytest.importorskip("peft", reason="LoRA tests need peft: pip install 'farskip_fx[test]'")
    from farskip_fx.lora import traceable
    wrapped = traceable(peft.get_peft_model(model, peft.LoraConfig(
        r=2, init_lora_weights=False, target_modules=["q_a_proj", "kv_b_proj"], target_parameters=EXPERTS)).eval())
    with torch.no_grad():
        close(run(wrapped, inputs, inner="eager"), expected(model, family=family, inputs=inputs))


def test_traceable_keeps_the_numbers(model):
    wrapped = adapted(model, "all", traceable=False)
    from farskip_fx.lora import traceable
    with torch.no_grad():
        before = logits_of(wrapped(**INPUTS))
        close(logits_of(traceable(wrapped)(**INPUTS)), before, atol=1e-6)


def test_two_adapters_and_bfloat16(model):
    wrapped = adapted(model, "all")
    peft = pytest.importorskip("peft")
    wrapped.add_adapter("second", peft.LoraConfig(r=4, init_lora_weights=False, **ADAPTERS["all"]))
    from farskip_fx.lora import traceable
    traceable(wrapped).set_adapter("second")
    with torch.no_grad():
        close(run(wrapped, INPUTS, inner="eager"), expected(model))
        wrapped.to(torch.bfloat16)
        assert torch.equal(run(wrapped, INPUTS, inner="eager"), expected(model))


@pytest.mark.slow
def test_expert_adapters_without_traceable_are_refused_and_the_error_says_what_to_do(model):
    with pytest.raises(BackendCompilerFailed) as caught, torch.no_grad():
        run(adapted(model, "experts", traceable=False), INPUTS, inner="eager")
    assert isinstance(cause(caught.value), fs.SplitModelError)
    assert "farskip_fx.lora.traceable" in str(cause(caught.value))


def test_expert_adapters_merged_and_unloaded_need_nothing(model):
    wrapped = adapted(model, "all", traceable=False)
    want = expected(model)
    merged = wrapped.merge_and_unload()
    with torch.no_grad():
        close(run(merged, INPUTS, inner="eager"), want, atol=1e-4)


@pytest.mark.parametrize("first", ["apply", pytest.param("adapters", marks=pytest.mark.slow)])
def test_merged_disabled_and_back_always_run_converted(model, first):
    """``disable_adapter()`` and merging change what the modules compute, never what the blocks read."""
    plain = copy.deepcopy(model)
    if first == "apply":
        wrapped = adapted(fs.apply(model, connectivity="farskip", inner="eager"), "all")
    else:
        wrapped = adapted(model, "all")
        fs.apply(wrapped, connectivity="farskip", inner="eager")
    reference = adapted(copy.deepcopy(plain), "all")
    with torch.no_grad():
        with_adapters, without = expected(reference.get_base_model()), expected(plain)
        assert (with_adapters - without).abs().max() > 1e-2
        close(logits_of(wrapped(**INPUTS)), with_adapters)
        with wrapped.disable_adapter():
            close(logits_of(wrapped(**INPUTS)), without)
        close(logits_of(wrapped(**INPUTS)), with_adapters)
        wrapped.merge_adapter()
        close(logits_of(wrapped(**INPUTS)), with_adapters, atol=1e-4)
        wrapped.unmerge_adapter()
        close(logits_of(wrapped(**INPUTS)), with_adapters, atol=1e-4)
        with torch.compiler.set_stance("force_eager"), pytest.raises(fs.WrongConnectivityError):
            wrapped(**INPUTS)
        unloaded = wrapped.unload()
        close(logits_of(unloaded(**INPUTS)), without, atol=1e-4)


def test_adapters_saved_and_loaded(model, tmp_path):
    peft = pytest.importorskip("peft", reason="LoRA tests need peft: pip install 'farskip_fx[test]'")
    from farskip_fx.lora import traceable
    base = copy.deepcopy(model)
    wrapped = adapted(fs.apply(model, connectivity="ladder", inner="eager"), "all")
    with torch.no_grad():
        want = logits_of(wrapped(**INPUTS))
        wrapped.save_pretrained(tmp_path)
        loaded = traceable(peft.PeftModel.from_pretrained(base, tmp_path)).eval()
        fs.apply(loaded, connectivity="ladder", inner="eager")
        close(logits_of(loaded(**INPUTS)), want)
        close(want, expected(adapted(tiny(), "all").get_base_model(), "ladder"))


def test_training_step_of_adapters_on_an_applied_model(model):
    """The optimiser's step is seen by the next forward: the compiled graph holds no copy of a weight."""
    plain = copy.deepcopy(model)
    wrapped = adapted(fs.apply(model, connectivity="farskip", inner="aot_eager"), "all")
    twin = adapted(plain, "all")
    losses = []
    for each, forward in ((wrapped, lambda: logits_of(wrapped(**INPUTS))),
                          (twin, lambda: oracle(FAMILY, twin.get_base_model(), INPUTS, "farskip"))):
        optimizer = torch.optim.SGD([p for p in each.parameters() if p.requires_grad], lr=0.05)
        losses.append([])
        for _ in range(3):
            loss = forward().square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[-1].append(loss.detach())
    torch.testing.assert_close(*map(torch.stack, losses), rtol=1e-4, atol=1e-5)
    assert losses[0][0] != losses[0][-1]


# --- quantised weights ------------------------------------------------------------------------------------------------

def quantised(model, kind, router=False):
    quantization = pytest.importorskip("torchao.quantization")
    config = {"int8_weight_only": lambda: quantization.Int8WeightOnlyConfig(version=2),
              "int8_dynamic": lambda: quantization.Int8DynamicActivationInt8WeightConfig(version=2),
              "float8_weight_only": lambda: quantization.Float8WeightOnlyConfig()}[kind]()
    quantization.quantize_(model, config, filter_fn=lambda module, name: isinstance(module, nn.Linear)
                           or router and name.endswith("mlp.gate"))
    return model


@pytest.mark.parametrize("router", [False, True], ids=["linears", "linears_and_router"])
@pytest.mark.parametrize("kind", ["int8_weight_only", "int8_dynamic", "float8_weight_only"])
def test_quantised_weights(model, kind, router):
    """Tensor subclasses: router and shared expert are found, and the numbers are those of the quantised modules."""
    plain = expected(model)
    quantised(model, kind, router)
    block = model.model.layers[1].mlp
    assert "torchao" in type(block.shared_expert.up_proj.weight).__module__
    assert ("torchao" in type(block.gate.weight).__module__) == router
    with torch.no_grad():
        got = run(model, INPUTS, inner="eager")
    close(got, expected(model))
    assert fs.last_reports()[-1].rewired.rewired == LAYERS
    assert (got - plain).abs().max() > 1e-2, "quantisation shows"


@pytest.mark.parametrize("family, connectivity", [("deepseek_v3", "attn_only"), ("qwen3_moe", "ladder")])
def test_quantised_before_apply_through_aot(family, connectivity):
    torch._dynamo.reset()
    model, inputs = tiny(family), families.inputs(family)
    quantised(model, "int8_weight_only", router=True)
    want = expected(model, connectivity, family=family, inputs=inputs)
    fs.apply(model, connectivity=connectivity, inner="aot_eager")
    with torch.no_grad():
        close(logits_of(model(**inputs)), want)


def test_quantised_after_apply_is_compiled_again(model):
    fs.apply(model, connectivity="farskip", inner="eager")
    twin = tiny()
    with torch.no_grad():
        close(logits_of(model(**INPUTS)), expected(twin))
        quantised(model, "int8_weight_only")
        close(logits_of(model(**INPUTS)), expected(quantised(twin, "int8_weight_only")))


def test_adapters_on_quantised_weights(model):
    wrapped = adapted(quantised(model, "int8_weight_only"), "attention")
    with torch.no_grad():
        close(run(wrapped, INPUTS, inner="eager"), expected(model))


# --- torch.compile's settings -----------------------------------------------------------------------------------------

MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")


@pytest.fixture
def inductor_settings(monkeypatch):
    """Instead of Inductor: run the graph as it is, and keep the settings that Inductor would have got."""
    given = []

    def compile_fx(gm, example_inputs, *, config_patches):
        given.append(config_patches)
        return gm.forward

    monkeypatch.setattr("farskip_fx.inner.compile_fx", compile_fx)
    return given


@pytest.mark.parametrize("mode", MODES)
def test_mode_reaches_inductor_and_the_graph_is_rewired(model, mode, inductor_settings):
    with torch.no_grad():
        close(logits_of(torch.compile(model, backend="farskip", mode=mode)(**INPUTS)), expected(model))
    wanted = torch._inductor.list_mode_options(mode) if mode != "default" else {}
    assert wanted.items() <= inductor_settings[-1].items()
    assert "post_grad_custom_post_pass" in inductor_settings[-1], "our schedule too"


def test_mode_with_options_is_torchs_error_and_partial_is_the_way(model, inductor_settings):
    with pytest.raises(RuntimeError, match="Either mode or options"):
        torch.compile(model, backend="farskip", mode="max-autotune", options={"connectivity": "ladder"})
    ladder = functools.partial(fs.farskip_backend, options={"connectivity": "ladder"})
    with torch.no_grad():
        got = logits_of(torch.compile(model, backend=ladder, mode="max-autotune-no-cudagraphs")(**INPUTS))
    close(got, expected(model, "ladder"))
    assert inductor_settings[-1]["max_autotune"] is True


def test_mode_around_an_applied_model(model, inductor_settings):
    want = expected(model, "ladder")
    fs.apply(model, connectivity="ladder")
    with torch.no_grad():
        close(logits_of(torch.compile(model, backend="farskip", mode="reduce-overhead")(**INPUTS)), want)
    assert inductor_settings[-1]["triton.cudagraphs"] is True


@pytest.mark.parametrize("mode, options, text", [
    ("max-autotune", {"inner": "aot_eager"}, "Inductor's"),
    ("fastest", {}, "one of: default"),
])
def test_bad_mode(model, mode, options, text):
    backend = functools.partial(fs.farskip_backend, options=options)
    with pytest.raises(BackendCompilerFailed, match=text) as caught, torch.no_grad():
        torch.compile(model, backend=backend, mode=mode)(**INPUTS)
    assert isinstance(cause(caught.value), fs.ConfigError)


@pytest.mark.parametrize("dynamic", [True, None, False])
def test_dynamic_and_fullgraph(model, dynamic):
    """Other lengths and batch sizes; with ``dynamic=True`` they share one graph."""
    known = fs.last_reports()
    fast = torch.compile(model, backend="farskip", options={"inner": "eager"}, dynamic=dynamic, fullgraph=True)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for shape in ((2, 16), (3, 9), (4, 12)):
            inputs = {"input_ids": torch.randint(3, 128, shape, generator=generator), "use_cache": False}
            close(logits_of(fast(**inputs)), expected(model, inputs=inputs))
    new = [report for report in fs.last_reports() if not any(report is k for k in known)]
    assert len(new) == {True: 1, None: 2, False: 3}[dynamic]


@pytest.mark.slow
def test_dynamic_training_through_aot(model):
    fast = torch.compile(model, backend="farskip", options={"inner": "aot_eager"}, dynamic=True)
    for shape in ((2, 8), (3, 5)):
        ids = torch.arange(shape[0] * shape[1]).reshape(shape) % 100 + 3
        logits_of(fast(input_ids=ids, use_cache=False)).square().mean().backward()
        ours = {n: p.grad for n, p in model.named_parameters()}
        model.zero_grad()
        oracle(FAMILY, model, {"input_ids": ids, "use_cache": False}, "farskip").square().mean().backward()
        for name, p in model.named_parameters():
            if p.grad is not None:
                torch.testing.assert_close(ours[name], p.grad, rtol=1e-4, atol=1e-5, msg=name)
        model.zero_grad()


# --- several at once --------------------------------------------------------------------------------------------------

def test_models_and_connectivities_interleaved():
    """Two models of one class share every code object; each call runs its own connectivity, in any order."""
    torch._dynamo.reset()
    models = [tiny(), tiny()]
    with torch.no_grad():
        for p in models[1].parameters():
            p.mul_(0.9)
        fast = {(i, c): torch.compile(models[i], backend="farskip", options={"inner": "eager", "connectivity": c})
                for i in (0, 1) for c in ("farskip", "attn_only", "ladder")}
        fast[0, "last"] = torch.compile(models[0], backend="farskip", options={"inner": "eager", "layers": [1]})
        want = {(i, c): expected(models[i], *(("farskip", (1,)) if c == "last" else (c,))) for i, c in fast}
        for order in (sorted(fast), sorted(fast, reverse=True), sorted(fast)[::2] + sorted(fast)[1::2]):
            for key in order:
                close(logits_of(fast[key](**INPUTS)), want[key])
    for a in want:
        for b in want:
            assert a == b or not torch.allclose(want[a], want[b], atol=1e-3)


def test_applied_models_side_by_side():
    torch._dynamo.reset()
    models = {c: tiny() for c in ("none", "farskip", "attn_only", "mlp_only")}
    want = {c: expected(m, c) for c, m in models.items()}
    for c, each in models.items():
        fs.apply(each, connectivity=c, inner="eager")
    with torch.no_grad():
        for _ in range(2):
            for c, each in models.items():
                close(logits_of(each(**INPUTS)), want[c])


def test_threads_compile_and_run_at_the_same_time():
    torch._dynamo.reset()
    models = {c: tiny() for c in ("farskip", "attn_only", "mlp_only", "ladder")}
    want = {c: expected(m, c) for c, m in models.items()}
    got, failed, start = {}, [], threading.Barrier(len(models))
    known = list(fs.last_reports())

    def work(connectivity):
        try:
            fast = torch.compile(models[connectivity], backend="farskip",
                                 options={"inner": "aot_eager", "connectivity": connectivity})
            start.wait(60)
            with torch.no_grad():
                got[connectivity] = [logits_of(fast(**INPUTS)) for _ in range(3)]
        except Exception as error:      # a thread's exception would be lost
            failed.append((connectivity, error))

    threads = [threading.Thread(target=work, args=(c,)) for c in models]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(300)
    assert not failed
    for connectivity, runs in got.items():
        for each in runs:
            close(each, want[connectivity])
    new = [r for r in fs.last_reports() if not any(r is k for k in known)]
    assert sorted(r.config.connectivity for r in new) == sorted(models)
    edges = {r.config.connectivity: r.rewired.edges for r in new}
    assert edges == {"farskip": 3, "ladder": 3, "mlp_only": 2, "attn_only": 1}, "no report has another's reads"


# --- stances and switches: the original connectivity never runs silently ----------------------------------------------

LONGER = {"input_ids": torch.arange(3, 30)[None].repeat(2, 1), "use_cache": False}


@pytest.fixture
def want(model):
    return expected(model, "ladder")


@pytest.fixture
def applied(model, want):
    return fs.apply(model, connectivity="ladder", inner="eager")


@pytest.fixture
def compiled(applied, want):
    with torch.no_grad():
        close(logits_of(applied(**INPUTS)), want)
    return applied


@pytest.mark.parametrize("when", ["applied", "compiled"])
def test_eager_stances_and_switches_raise(when, request):
    model = request.getfixturevalue(when)
    for switch in (torch.compiler.set_stance("force_eager"), torch._dynamo.config.patch(disable=True)):
        with switch, pytest.raises(fs.WrongConnectivityError, match="apply"):
            model(**INPUTS)


def test_inside_a_disabled_region_the_converted_forward_is_compiled_all_the_same(applied, want):
    with torch.no_grad():
        close(torch.compiler.disable(lambda: logits_of(applied(**INPUTS)))(), want)


@pytest.mark.parametrize("stance, error", [("eager_on_recompile", fs.WrongConnectivityError),
                                           ("fail_on_recompile", RuntimeError)])
def test_stances_on_a_recompile(compiled, want, stance, error):
    with torch.no_grad(), torch.compiler.set_stance(stance):
        close(logits_of(compiled(**INPUTS)), want)
        with pytest.raises(error):
            compiled(**LONGER)


def test_error_on_recompile_raises(compiled, want):
    with torch._dynamo.config.patch(error_on_recompile=True), torch.no_grad():
        close(logits_of(compiled(**INPUTS)), want)
        with pytest.raises(torch._dynamo.exc.RecompileError):
            compiled(**LONGER)


def test_recompile_limit_raises(compiled):
    """Dynamo gives up on a frame and would run it eagerly: the marker raises."""
    with torch._dynamo.config.patch(recompile_limit=1), torch.no_grad():
        with pytest.raises(fs.WrongConnectivityError):
            compiled(**LONGER)


def test_suppressed_errors_never_fall_back(applied):
    """``suppress_errors`` turns a failed compile into an eager run; on a converted model that raises too."""
    applied.model.layers[1].mlp = Breaks(applied.model.layers[1].mlp)
    with torch._dynamo.config.patch(suppress_errors=True), torch.no_grad(), pytest.raises(fs.WrongConnectivityError):
        applied(**INPUTS)


# --- another connectivity on the same model object --------------------------------------------------------------------

def test_a_saved_connectivity_that_changes_is_compiled_again(model):
    fast = torch.compile(model, backend="farskip", options={"inner": "eager"})
    with torch.no_grad():
        close(logits_of(fast(**INPUTS)), expected(model, "farskip"))
        for connectivity in ("ladder", "attn_only"):
            model.config.farskip = {"version": 1, "connectivity": connectivity, "layers": "all"}
            close(logits_of(fast(**INPUTS)), expected(model, connectivity))
        model.config.farskip["layers"] = [1]                    # changed in place
        close(logits_of(fast(**INPUTS)), expected(model, "attn_only", (1,)))
        del model.config.farskip
        close(logits_of(fast(**INPUTS)), expected(model, "farskip"))


def test_a_changed_checkpoint_that_contradicts_options_raises(model):
    fast = torch.compile(model, backend="farskip", options={"inner": "eager", "connectivity": "farskip"})
    with torch.no_grad():
        fast(**INPUTS)
        model.config.farskip = {"version": 1, "connectivity": "ladder", "layers": "all"}
        with pytest.raises(BackendCompilerFailed, match="disagrees"):
            fast(**INPUTS)


def test_remove_and_apply_again(model):
    """Also through a wrapper that was compiled before, which takes what the model says now."""
    want = {c: expected(model, c) for c in ("none", "farskip", "ladder")}
    outer = torch.compile(model, backend="farskip", options={"inner": "eager"})
    with torch.no_grad():
        close(logits_of(outer(**INPUTS)), want["farskip"])
        fs.apply(model, connectivity="ladder", inner="eager")
        close(logits_of(model(**INPUTS)), want["ladder"])
        close(logits_of(outer(**INPUTS)), want["ladder"])
        fs.remove(model)
        close(logits_of(model(**INPUTS)), want["none"])
        close(logits_of(outer(**INPUTS)), want["farskip"])
        fs.apply(model, connectivity="farskip", inner="eager")
        close(logits_of(model(**INPUTS)), want["farskip"])


# --- types, files, accelerate -----------------------------------------------------------------------------------------

@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_another_dtype_after_apply(model, dtype):
    twin = copy.deepcopy(model).to(dtype)
    fs.apply(model, connectivity="ladder", inner="eager")
    with torch.no_grad():
        logits_of(model(**INPUTS))                              # a graph in fp32 is there already
        assert torch.equal(logits_of(model.to(dtype)(**INPUTS)), expected(twin, "ladder"))


def test_autocast(applied):
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        close(logits_of(applied(**INPUTS)), expected(tiny(), "ladder"), atol=0)


def test_a_whole_model_saved_and_loaded_raises_until_applied_again(compiled, want, tmp_path):
    torch.save(compiled, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    with pytest.raises(fs.WrongConnectivityError, match="apply"):
        loaded(**INPUTS)
    fs.apply(loaded, inner="eager")                             # config.farskip travelled with it
    with torch.no_grad():
        close(logits_of(loaded(**INPUTS)), want)


def test_a_state_dict_goes_in_and_out_of_a_converted_model(compiled):
    """The keys are the model's own, and the graph sees what was loaded."""
    other = tiny()
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(0.9)
        assert compiled.state_dict().keys() == other.state_dict().keys()
        compiled.load_state_dict(other.state_dict())
        close(logits_of(compiled(**INPUTS)), expected(other, "ladder"))


@pytest.mark.parametrize("mixed_precision", ["no", "bf16"])
def test_accelerate_prepares_a_converted_model(applied, mixed_precision):
    accelerate = pytest.importorskip("accelerate")
    accelerate.state.AcceleratorState._reset_state(True)
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision=mixed_precision)
    twin = tiny()
    try:
        prepared = accelerator.prepare(applied)
        with torch.no_grad():
            got = logits_of(prepared(**INPUTS))
            with torch.autocast("cpu", torch.bfloat16, enabled=mixed_precision == "bf16"):
                close(got, expected(twin, "ladder").float(), atol=1e-6)
            assert accelerator.unwrap_model(prepared) is applied
    finally:
        accelerate.state.AcceleratorState._reset_state(True)


def test_accelerates_own_compile_of_a_converted_model_raises(applied):
    accelerate = pytest.importorskip("accelerate")
    accelerate.state.AcceleratorState._reset_state(True)
    try:
        prepared = accelerate.Accelerator(cpu=True, dynamo_backend="aot_eager").prepare(applied)
        with torch.no_grad(), pytest.raises(Exception, match="ORIGINAL connectivity"):
            prepared(**INPUTS)
    finally:
        accelerate.state.AcceleratorState._reset_state(True)


# --- torch.func -------------------------------------------------------------------------------------------------------

def test_functional_call_is_converted_and_transforms_raise(applied, want):
    """Dynamo does not compile inside a torch.func transform; eagerly the marker raises."""
    parameters = {name: p.detach() for name, p in applied.named_parameters()}

    def call(parameters, ids):
        inputs = {"input_ids": ids, "use_cache": False}
        return logits_of(torch.func.functional_call(applied, parameters, (), inputs))

    ids = INPUTS["input_ids"]
    with torch.no_grad():
        close(call(parameters, ids), want)
        doubled = {name: 0.9 * p for name, p in parameters.items()}
        twin = tiny()
        twin.load_state_dict(doubled)
        close(call(doubled, ids), expected(twin, "ladder"))
    for transformed in (lambda: torch.func.vmap(lambda i: call(parameters, i))(ids[None]),
                        lambda: torch.func.grad(lambda p: call(p, ids).square().mean())(parameters),
                        lambda: torch.func.jvp(lambda p: call(p, ids), (parameters,), (parameters,))):
        with pytest.raises(fs.WrongConnectivityError):
            transformed()


def test_vmap_inside_the_compiled_function(model):
    want = expected(model, "ladder")
    fast = torch.compile(torch.func.vmap(lambda i: logits_of(model(input_ids=i, use_cache=False))), backend="farskip",
                         options={"inner": "eager", "connectivity": "ladder"})
    with torch.no_grad():
        try:
            close(fast(INPUTS["input_ids"][None])[0], want)
        except BackendCompilerFailed as error:
            assert isinstance(cause(error), fs.FarskipError)


# --- nothing global stays changed -------------------------------------------------------------------------------------

def global_settings():
    import torch._functorch.config
    import torch._inductor.config
    return [module.get_config_copy() for module in (torch._dynamo.config, torch._inductor.config,
                                                    torch._functorch.config)]


def convert_and_run(connectivity="farskip"):
    model = fs.apply(tiny(), connectivity=connectivity, inner="aot_eager")
    logits_of(model(**INPUTS)).square().mean().backward()


def test_global_settings_after_a_compile_and_in_other_threads():
    torch._dynamo.reset()
    before, seen = global_settings(), []        # settings belong to a thread: torchao changes its caller's, for one
    convert_and_run()
    assert global_settings() == before

    def work():
        seen.append(global_settings())
        convert_and_run("ladder")
        seen.append(global_settings())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(300)
    assert len(seen) == 2 and seen[0] == seen[1] and global_settings() == before


@pytest.mark.parametrize("where", ["refused", "find_streams", "rewire", "inner"])
def test_global_settings_after_an_exception(model, where, monkeypatch):
    before = global_settings()

    def fail(*args, **kwargs):
        raise ValueError("in the middle")

    if where == "inner":
        monkeypatch.setattr("farskip_fx.inner.compile_fx", fail)
    elif where != "refused":
        monkeypatch.setattr(f"farskip_fx.backend.{where}", fail)
    with pytest.raises(BackendCompilerFailed), torch.no_grad():
        run(model, INPUTS, **({"layers": [7]} if where == "refused" else {}))
    assert global_settings() == before
    monkeypatch.undo()
    with torch.no_grad():                                       # and the next compile is as good as ever
        close(run(model, INPUTS, inner="eager"), expected(model))
