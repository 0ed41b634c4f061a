"""``refit``: the closed form against plain least squares on what hooks recorded while the oracle ran, and what it leaves."""
import copy
from functools import cache

import pytest
import torch

import families
import farskip_fx as fs
import oracle as reference
from farskip_fx.distill.gram import Gram, Missed
from farskip_fx.distill.importance import logits_of, token_weights
from farskip_fx.distill.pair import trace_pair
from farskip_fx.distill.refit import refit
from farskip_fx.distill.side import Side, stages_of

RIDGE = 1e-3


def batches(family, count=2, sequences=24):
    drawn = torch.Generator().manual_seed(1)
    return [{**families.inputs(family), "input_ids": torch.randint(3, 100, (sequences, 32), generator=drawn)}
            for _ in range(count)]


@cache
def refitted(family):
    """(original, refitted, report)"""
    torch._dynamo.reset()
    original = families.tiny(family, jitter=0.1)
    model = copy.deepcopy(original)
    return original, model, refit(model, batches(family), ridge=RIDGE, importance=False, progress=False)


def recorded(family, model, names, *, connectivity=None):
    """What enters the named modules, over all batches, as rows.

    The oracle runs the model once as it is, to record masks and the like, then the blocks one by one: the second call.
    """
    seen = {name: [] for name in names}
    for inputs in batches(family):
        calls = {name: [] for name in names}
        hooks = [model.get_submodule(name).register_forward_pre_hook(
            lambda _, args, kwargs, name=name: calls[name].append([*args, *kwargs.values()]), with_kwargs=True)
            for name in names]
        with torch.no_grad():
            model(**inputs) if connectivity is None else reference.oracle(family, model, inputs, connectivity)
        for hook in hooks:
            hook.remove()
        for name in names:
            call = calls[name][connectivity is not None]
            seen[name].append([a.detach().double().flatten(0, -2) for a in call[:2] if isinstance(a, torch.Tensor)])
    return {name: [torch.cat(parts) for parts in zip(*calls)] for name, calls in seen.items()}


def least_squares(x, target, weight, scale=1.0):
    """argmin |x W^T - target|^2 + lambda |W - weight|^2, by stacking the ridge under the rows; weight [out, in], float64.
    scale [rows, 1]: multiplies both x and target."""
    x, target = x * scale, target * scale
    strength = RIDGE * x.square().sum(0).mean()
    rows = torch.cat([x, strength.sqrt() * torch.eye(x.shape[1], dtype=x.dtype)])
    return torch.linalg.lstsq(rows, torch.cat([target, strength.sqrt() * weight.T])).solution.T


def assert_close(got, expected, before):
    assert (got - expected).norm() <= 1e-3 * (expected - before).norm() + 1e-5 * expected.norm()


MATCHED = {
    "qwen3_moe": ["model.layers.0.mlp.gate", *(f"model.layers.{k}.self_attn.{p}_proj" for k in (1, 2) for p in "qkv"),
                  "model.layers.2.mlp.gate"],
    "deepseek_v3": ["model.layers.0.mlp.gate_proj", "model.layers.1.self_attn.q_a_proj", "model.layers.1.self_attn.q_b_proj",
                    "model.layers.2.self_attn.kv_a_proj_with_mqa", "model.layers.2.self_attn.kv_b_proj",
                    "model.layers.2.mlp.gate", "model.layers.1.mlp.shared_experts.up_proj"],
}


@pytest.mark.parametrize("family", MATCHED)
def test_projections_solve_the_least_squares_problem(family):
    original, model, report = refitted(family)
    names = MATCHED[family]
    theirs, ours = recorded(family, original, names), recorded(family, model, names, connectivity="farskip")
    for name in names:
        before, after = (m.get_parameter(f"{name}.weight").detach().double() for m in (original, model))
        expected = least_squares(ours[name][0], theirs[name][0] @ before.T, before)
        assert_close(after, expected, before)
    kinds = {one.parameter: one for one in report.refitted}
    assert all(kinds[f"{name}.weight"].kind == "matched" and kinds[f"{name}.weight"].after < kinds[f"{name}.weight"].before
               for name in names)


@pytest.mark.parametrize("family", MATCHED)
def test_each_expert_is_fitted_on_the_tokens_that_the_student_routes_to_it(family):
    original, model, report = refitted(family)
    name = "model.layers.1.mlp.experts"
    theirs, ours = recorded(family, original, [name])[name], recorded(family, model, [name], connectivity="farskip")[name]
    left, fitted = {one.parameter for one in report.left}, 0
    for expert in range(8):
        before, after = (m.get_parameter(f"{name}.gate_up_proj")[expert].detach().double() for m in (original, model))
        here = (ours[1] == expert).any(-1)
        if f"{name}.gate_up_proj[{expert}]" in left:
            assert torch.equal(before, after) and here.sum() < before.shape[1]
            continue
        fitted += 1
        assert_close(after, least_squares(ours[0][here], theirs[0][here] @ before.T, before), before)
    assert fitted >= 4


@pytest.mark.parametrize("family", MATCHED)
def test_attention_is_aimed_at_the_teachers_stream(family):
    original, model, _ = refitted(family)
    out, norm = "model.layers.1.self_attn.o_proj", "model.layers.1.post_attention_layernorm"
    theirs = recorded(family, original, [norm])[norm][0]            # the teacher's stream behind its attention
    ours = recorded(family, model, [out, norm], connectivity="farskip")     # the MLP reads the stream before attention
    before, after = (m.get_parameter(f"{out}.weight").detach().double() for m in (original, model))
    size = theirs.square().mean(-1, keepdim=True).rsqrt()       # each token counts relative to the stream's size
    assert_close(after, least_squares(ours[out][0], theirs - ours[norm][0], before, size), before)


def test_tokens_count_by_the_gradient_of_what_the_teacher_predicts():
    torch._dynamo.reset()
    model, inputs = families.tiny("qwen3_moe", jitter=0.1), batches("qwen3_moe", sequences=4)
    pair = trace_pair(model, inputs, fs.FarskipConfig())
    stages = stages_of(pair.blocks)
    pair.teacher.set_stages([(end, members) for end, members, _, _ in stages])
    given = {**{node: p.detach() for node, p in pair.parameters.items()}, **pair.fixed}
    side = Side(pair.teacher, [stages[0][0]], given, [dict(call) for call in pair.calls])
    with torch.no_grad():
        weights = token_weights(side, stages, logits_of(pair.teacher, stages[-1][0]), 1)
    assert side.live[1] == {} and len(weights) == len(stages) - 1
    found = model(**inputs[1], output_hidden_states=True)
    likely = found.logits.log_softmax(-1).flatten(0, -2)
    drawn = torch.multinomial(likely.detach().exp(), 1, generator=torch.Generator().manual_seed(1))
    behind = dict(enumerate(found.hidden_states[1:-1]))         # the stream behind each layer; the last one is normalised
    for layer, gradient in zip(behind, torch.autograd.grad(likely.gather(-1, drawn).sum(), list(behind.values()))):
        size = gradient.square().mean(-1, keepdim=True).sqrt()
        torch.testing.assert_close(weights[stages[2 * layer + 2][0]], size.clamp(max=10 * size.mean()) / size.mean(),
                                   rtol=1e-4, atol=1e-5)


def test_with_importance_logits_come_nearer_too():
    torch._dynamo.reset()
    model, inputs = families.tiny("qwen3_moe", jitter=0.1), batches("qwen3_moe")
    other = {**inputs[0], "input_ids": torch.randint(3, 100, (8, 32), generator=torch.Generator().manual_seed(2))}
    with torch.no_grad():
        wanted, raw = model(**other).logits, reference.oracle("qwen3_moe", model, other, "farskip")
        refit(model, inputs, ridge=RIDGE, progress=False)
        assert (reference.oracle("qwen3_moe", model, other, "farskip") - wanted).norm() < 0.9 * (raw - wanted).norm()


@pytest.mark.parametrize("family", MATCHED)
def test_logits_come_nearer_and_nothing_else_changes(family):
    original, model, report = refitted(family)
    other = torch.Generator().manual_seed(2)
    drawn = {**families.inputs(family), "input_ids": torch.randint(3, 100, (8, 32), generator=other)}
    with torch.no_grad():
        wanted = original(**drawn).logits
        raw, better = (reference.oracle(family, m, drawn, "farskip") for m in (original, model))
    assert (better - wanted).norm() < (raw - wanted).norm()
    changed = {one.parameter for one in report.refitted}
    before, after = original.state_dict(), model.state_dict()
    assert before.keys() == after.keys()
    assert {name for name in before if not torch.equal(before[name], after[name])} == changed
    assert not any("norm" in name or "embed" in name for name in changed)
    assert all(a.training == b.training for a, b in zip(original.modules(), model.modules()))


# What is found by structure alone: a weight of each kind that must be among the refitted.
KINDS = {
    "qwen3_next": ["layers.2.linear_attn.in_proj_qkvz.weight", "layers.1.self_attn.q_proj.weight",
                   "mlp.shared_expert_gate.weight"],
    "gpt_oss": ["layers.1.mlp.router.weight", "layers.1.mlp.experts.gate_up_proj", "layers.1.mlp.experts.down_proj"],
    "llama4": ["layers.1.feed_forward.experts.gate_up_proj", "layers.1.feed_forward.shared_expert.up_proj.weight"],
    "cohere2_moe": ["layers.2.self_attn.q_proj.weight", "layers.2.mlp.experts.down_proj"],
}


@pytest.mark.parametrize("family", [pytest.param(f, marks=pytest.mark.slow) if f != "qwen3_next" else f
                                    for f in KINDS])
def test_other_kinds_of_blocks(family):
    torch._dynamo.reset()
    original = families.tiny(family, jitter=0.1)
    model = copy.deepcopy(original)
    report = refit(model, batches(family), progress=False)
    names = [one.parameter for one in report.refitted]
    assert all(any(name.endswith(wanted) for name in names) for wanted in KINDS[family]), names
    inputs = batches(family)[0]     # that it solves for the right thing; how well it generalises, a random model cannot say
    with torch.no_grad():
        wanted = original(**inputs).logits
        raw, better = (reference.oracle(family, m, inputs, "farskip") for m in (original, model))
    assert (better - wanted).norm() < (raw - wanted).norm()


def test_only_what_reads_a_changed_stream():
    """With the last layer converted, nothing before it changes; with "none", nothing at all."""
    torch._dynamo.reset()
    model = families.tiny("qwen3_moe", jitter=0.1)
    report = refit(model, batches("qwen3_moe", 1), layers=[2], head=False, progress=False)
    assert report.refitted and all("layers.2" in one.parameter for one in report.refitted)
    assert not refit(model, batches("qwen3_moe", 1), "none", progress=False).refitted


def test_what_is_kept_between_layers_does_not_grow():
    """A state of each stream, and what one read of it lacks: not the activations, and not more with every layer."""
    torch._dynamo.reset()
    model = families.tiny("deepseek_v3", jitter=0.1, num_hidden_layers=5)
    pair = trace_pair(model, batches("deepseek_v3", 1), fs.FarskipConfig())
    stages = stages_of(pair.blocks)
    pair.student.set_stages([(pair.twin[end], {pair.twin[n] for n in members}) for end, members, _, _ in stages])
    state = stages[0][0].meta["example_value"].numel()
    count = [sum(n.meta["example_value"].numel() for n in pair.student.live(i) if pair.student.flow.depends(
        n, pair.twin[stages[0][0]])) for i in range(1, len(stages) - 1)]
    assert max(count) <= 3 * state and count[-1] <= count[-3]


def test_refusals_name_the_next_step():
    model = families.tiny("qwen3_moe")
    with pytest.raises(fs.ConfigError, match="at least one batch"):
        refit(model, [], progress=False)
    with pytest.raises(fs.ConfigError, match="one shape"):
        refit(model, [torch.randint(3, 99, (2, 8)), torch.randint(3, 99, (2, 16))], progress=False)
    with pytest.raises(fs.ConfigError, match="ridge"):
        refit(model, [torch.randint(3, 99, (2, 8))], ridge=0, progress=False)
    sharded = families.tiny("qwen3_moe")
    sharded.lm_head.weight._farskip_expert_group = object()       # as expert_parallel marks them
    with pytest.raises(fs.ConfigError, match="refit before that"):
        refit(sharded, [torch.randint(3, 99, (2, 8))], progress=False)
    fs.apply(model, inner="eager")
    with pytest.raises(fs.ConfigError, match="farskip_fx.remove"):
        refit(model, [torch.randint(3, 99, (2, 8))], progress=False)


def test_sums_over_parts_are_the_sum_over_all_rows():
    drawn = torch.Generator().manual_seed(0)
    x, target, weight = (torch.randn(*s, generator=drawn) for s in ((300, 16), (300, 5), (16, 5)))
    gram = Gram(16, x.device)
    sums = Missed(gram, 5)
    for rows, wanted in zip(x.split(100), target.split(100)):
        sums.add(rows, wanted - rows @ weight, wanted)
    change, missed = sums.solve(RIDGE)
    expected = least_squares(x.double(), target.double(), weight.double().T).T
    torch.testing.assert_close(weight + change, expected, rtol=1e-5, atol=1e-6)
    assert missed == pytest.approx((target - x.double() @ (weight + change)).square().sum().item(), rel=1e-5)
    same = Missed(gram, 5, first=False)
    same.add(x, torch.zeros_like(target), target)
    assert same.solve(RIDGE)[0].abs().max() == 0        # nothing is missed: nothing changes
