"""The distillation loss against its definition, written out in float64 with full logits."""
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from farskip_fx.distill.head import check_head, hidden_states
from farskip_fx.distill.loss import Dense, Head, Sums, TopK, distillation_loss
from farskip_fx.errors import ConfigError, RefusedError

from families import tiny


def full_logits(hidden, weight, bias, scale, cap):
    logits = (hidden @ weight.T + (0 if bias is None else bias)) * scale
    return logits if cap is None else cap * torch.tanh(logits / cap)


def by_definition(z, u, targets, temperature, kl, cross_entropy, items):
    """Rows of logits; targets of -100 count nowhere."""
    z, u, targets = z[targets != -100], u[targets != -100], targets[targets != -100]
    p, q = F.log_softmax(z / temperature, -1), F.log_softmax(u / temperature, -1)
    divergence = (q.exp() * (q - p)).sum(-1)
    entropy = F.nll_loss(F.log_softmax(z, -1), targets, reduction="sum")
    found = {"tokens": len(targets), "kl": divergence.sum(), "agree": (z.argmax(-1) == u.argmax(-1)).sum(),
             "cross_entropy": entropy, "teacher_cross_entropy": F.cross_entropy(u, targets, reduction="sum"),
             "correct": (z.argmax(-1) == targets).sum(), "teacher_correct": (u.argmax(-1) == targets).sum()}
    return (kl * temperature**2 * divergence.sum() + cross_entropy * entropy) / items, found


def case(seed, tokens, width, vocabulary, bias, masked):
    g = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    targets = torch.randint(vocabulary, (tokens,), generator=g)
    targets[torch.rand(tokens, generator=g) < masked] = -100
    leaves = [draw(tokens, width), draw(vocabulary, width), draw(vocabulary) if bias else None]
    other = [draw(tokens, width), draw(vocabulary, width), draw(vocabulary) if bias else None]
    return [t if t is None else t.requires_grad_() for t in leaves], other, targets


def compare(ours, leaves, definition, *, tolerance):
    got = torch.autograd.grad(ours, [t for t in leaves if t is not None])
    want = torch.autograd.grad(definition, [t for t in leaves if t is not None], allow_unused=True)
    torch.testing.assert_close(ours, definition.to(ours.dtype), rtol=tolerance, atol=tolerance)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, torch.zeros_like(a) if b is None else b.to(a.dtype), rtol=tolerance, atol=tolerance)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 12), st.integers(1, 6), st.integers(2, 20), st.booleans(),
       st.sampled_from([0.0, 0.4, 1.0]), st.sampled_from([0.5, 1.0, 3.0]), st.sampled_from([(1, 0), (0.7, 0.3), (0, 1)]),
       st.sampled_from([None, 2.0]), st.sampled_from([1.0, 0.25]), st.integers(1, 5), st.sampled_from([None, 7]))
def test_values_and_gradients(seed, tokens, width, vocabulary, bias, masked, temperature, weights, cap, scale, rows, items):
    leaves, other, targets = case(seed, tokens, width, vocabulary, bias, masked)
    loss, sums = distillation_loss(
        leaves[0], Head(weight=leaves[1], bias=leaves[2], scale=scale, softcap=cap),
        Dense(other[0], Head(weight=other[1], bias=other[2], scale=scale, softcap=cap)), targets, temperature=temperature,
        kl=weights[0], cross_entropy=weights[1], items=items, chunk_mb=rows * 4 * vocabulary / 2**20)
    count = max(1, int((targets != -100).sum())) if items is None else items
    want, found = by_definition(full_logits(*leaves, scale, cap), full_logits(*other, scale, cap), targets, temperature,
                                *weights, count)
    compare(loss, leaves, want, tolerance=1e-9)
    values = [float(torch.as_tensor(value).detach()) for value in found.values()]
    torch.testing.assert_close(sums.values, torch.tensor(values, dtype=torch.float64))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 8), st.integers(2, 12), st.integers(1, 12), st.sampled_from([0.5, 1.0, 2.0]))
def test_the_tail_of_a_cached_teacher_is_one_more_class(seed, tokens, vocabulary, k, temperature):
    leaves, other, targets = case(seed, tokens, 3, vocabulary, False, 0.3)
    k = min(k, vocabulary)
    q = F.log_softmax(full_logits(*other, 1.0, None) / temperature, -1)
    values, indices = q.topk(k, -1)
    tail = (1 - values.exp().sum(-1)).clamp(min=0).log() if k < vocabulary else torch.full((tokens,), -math.inf)
    loss, _ = distillation_loss(leaves[0], Head(weight=leaves[1]), TopK(indices, values, tail.to(q.dtype)), targets,
                                temperature=temperature)
    kept = targets != -100
    p = F.log_softmax(full_logits(*leaves, 1.0, None) / temperature, -1)
    known = (values.exp() * (values - p.gather(1, indices))).sum(-1)
    p_tail = (1 - p.gather(1, indices).exp().sum(-1)).clamp(min=1e-300)
    rest = tail.exp() * (tail - p_tail.log()) if k < vocabulary else 0
    want = (known + rest)[kept].sum() * temperature**2 / max(1, int(kept.sum()))
    compare(loss, leaves, want, tolerance=1e-7)


def test_accumulation_is_the_whole_batch():
    leaves, other, targets = case(0, 30, 5, 11, True, 0.3)
    items = (targets != -100).sum()
    teacher_head = Head(weight=other[1], bias=other[2])
    parts = [distillation_loss(leaves[0][r], Head(weight=leaves[1], bias=leaves[2]), Dense(other[0][r], teacher_head),
                               targets[r], items=items) for r in (slice(0, 4), slice(4, 19), slice(19, 30))]
    whole, sums = distillation_loss(leaves[0], Head(weight=leaves[1], bias=leaves[2]), Dense(other[0], teacher_head),
                                    targets)
    compare(sum(loss for loss, _ in parts), leaves, whole, tolerance=1e-12)
    added = Sums(sum(found.values for _, found in parts))
    torch.testing.assert_close(added.values, sums.values)
    assert sums.means()["tokens"] == items


def test_sixteen_bits_under_autocast():
    """Logits come out in float32: only the inputs and the returned gradients are rounded."""
    leaves, other, targets = case(0, 40, 16, 50, True, 0.2)
    half = [t.detach().bfloat16().requires_grad_() for t in leaves]
    # A teacher so near that the gradient would drown in logits of bf16.
    near = [(t.detach() * (1 + 1e-2)).bfloat16() for t in leaves]
    with torch.autocast("cpu", torch.bfloat16):
        loss, sums = distillation_loss(half[0], Head(weight=half[1], bias=half[2]),
                                       Dense(near[0], Head(weight=near[1], bias=near[2])), targets, chunk_mb=0.002)
    exact = [t.detach().double().requires_grad_() for t in half]
    want, _ = by_definition(full_logits(*exact, 1.0, None), full_logits(*(t.double() for t in near), 1.0, None), targets,
                            1.0, 1.0, 0.0, (targets != -100).sum())
    assert loss.dtype is torch.float32
    torch.testing.assert_close(loss, want.float(), rtol=1e-4, atol=0)
    for ours, definition in zip(torch.autograd.grad(loss, half), torch.autograd.grad(want, exact), strict=True):
        assert ours.dtype is torch.bfloat16
        torch.testing.assert_close(ours.double(), definition, rtol=2**-8, atol=1e-4 * definition.abs().max().item())


def test_a_tied_head_and_a_frozen_one():
    leaves, other, targets = case(1, 6, 4, 9, False, 0.0)
    table, teacher = leaves[1], Dense(other[0], Head(weight=other[1]))
    ids = torch.tensor([0, 3, 3, 8, 1, 2])

    def both(function):
        return torch.autograd.grad(function(table[ids]), table)[0]

    ours = both(lambda hidden: distillation_loss(hidden, Head(weight=table), teacher, targets)[0])
    want = both(lambda hidden: by_definition(hidden @ table.T, other[0] @ other[1].T, targets, 1.0, 1.0, 0.0, 6)[0])
    torch.testing.assert_close(ours, want)
    frozen, _ = distillation_loss(leaves[0], Head(weight=table.detach()), teacher, targets)
    frozen.backward()
    assert table.grad is None and leaves[0].grad is not None


class Largest(TorchDispatchMode):
    """Bytes of the largest tensor that an operation makes, and of all that are alive at the worst moment."""

    def __init__(self):
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        sizes = [t.numel() * t.element_size() for t in tree_leaves(output) if isinstance(t, torch.Tensor)]
        self.largest = max([self.largest, *sizes])
        return output


def test_no_full_logits_with_a_vocabulary_of_128k():
    """512 tokens: 256 MiB of logits a model. The largest tensor is the head's gradient, then a chunk of 8 MiB."""
    tokens, width, vocabulary = 512, 4, 131072
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, width, generator=g).requires_grad_()
    weight = torch.randn(vocabulary, width, generator=g).requires_grad_()
    teacher = Dense(torch.randn(tokens, width, generator=g), Head(weight=weight.detach()))
    targets = torch.randint(vocabulary, (tokens,), generator=g)
    with Largest() as seen:
        distillation_loss(hidden, Head(weight=weight), teacher, targets, chunk_mb=8)[0].backward()
    chunk, head = 8 * 2**20, 4 * width * vocabulary
    assert seen.largest <= max(chunk, head) < tokens * vocabulary * 4 / 16


@pytest.mark.parametrize("family, options, what", [
    ("qwen3_moe", {}, (1.0, None)), ("qwen3_moe", {"tie_word_embeddings": True}, (1.0, None)),
    ("granitemoe", {}, (1 / 6, None)), ("cohere2_moe", {}, (0.0625, None)),
    ("gemma4", {"final_logit_softcapping": 3.0}, (1.0, 3.0)), ("llama4", {}, (1.0, None)),
    ("inkling", {}, (1 / 24, None)),
])
def test_heads_of_models(family, options, what):
    model = tiny(family, jitter=0.1, **options)
    head = check_head(model)
    assert (head.scale, head.softcap) == pytest.approx(what)
    ids = torch.arange(12)[None]
    hidden, output = hidden_states(model, input_ids=ids)
    assert output.logits.shape[1] == 1
    torch.testing.assert_close(head.logits(hidden[0]), model(input_ids=ids).logits[0].float(), rtol=1e-5, atol=1e-5)


def test_refused():
    model = tiny("qwen3_moe", jitter=0.1)
    model.config.logit_scale = 3.0      # which this model does not read
    with pytest.raises(RefusedError, match="does something to its hidden states or logits"):
        check_head(model)
    model.config.logits_scaling = 2.0
    with pytest.raises(RefusedError, match="their order is not known"):
        check_head(model)
    with pytest.raises(RefusedError, match="no logits_to_keep"):
        check_head(tiny("switch_transformers"))
    head, hidden = Head(weight=torch.ones(5, 4)), torch.ones(3, 4)
    targets = torch.tensor([0, 1, 2])
    with pytest.raises(ConfigError, match="vocabulary has 6"):
        distillation_loss(hidden, head, Dense(hidden, Head(weight=torch.ones(6, 4))), targets)
    with pytest.raises(ConfigError, match="2 targets for 3 positions"):
        distillation_loss(hidden, head, Dense(hidden, head), targets[:2])
    with pytest.raises(ConfigError, match="temperature"):
        distillation_loss(hidden, head, Dense(hidden, head), targets, temperature=0)
