"""Step 0b: a mask that is causal whatever the inputs goes, every other mask stays."""
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModelForCausalLM, MistralConfig, Qwen3MoeConfig

import farskip_fx as fs
from farskip_fx.passes.causal import skip_causal_masks
from test_rewire import traced

TOKENS = 6


class Masked(nn.Module):
    def __init__(self, mask):
        super().__init__()
        self.mask = mask

    def forward(self, x, *others):
        return F.scaled_dot_product_attention(x, x, x, self.mask(x, *others))


def positions(x):
    return torch.arange(x.shape[-2], device=x.device)


def causal(x):
    q = positions(x)
    return (q[None, :] <= q[:, None])[None, None].expand(x.shape[0], -1, -1, -1)


def bias(x):
    return torch.where(causal(x), 0.0, float("-inf"))


def window(size):
    return lambda x: causal(x) & (positions(x)[:, None] - positions(x)[None, :] < size)


def overwritten(x):
    mask = causal(x).clone()
    mask[..., 0] = True
    mask[..., 2, 0] = False
    return mask


def skipped(module, *inputs):
    gm = traced(module, *inputs)
    done = skip_causal_masks(gm.graph).calls
    gm.recompile()
    return gm, done


@pytest.mark.parametrize("mask", [causal, bias, window(TOKENS)])
def test_causal(mask):
    x = torch.randn(2, 4, TOKENS, 8, requires_grad=True)
    gm, done = skipped(Masked(mask), x)
    call, = (n for n in gm.graph.nodes if n.target is F.scaled_dot_product_attention)
    assert done == 1 and call.kwargs["is_causal"] and len(call.args) == 3
    assert not [n for n in gm.graph.nodes if n.target in (torch.arange, torch.where)]       # nothing is left of the mask
    got, want = gm(x), Masked(mask)(x)
    got = got[0] if isinstance(got, tuple) else got
    torch.testing.assert_close(got, want, rtol=0, atol=1e-6)
    a, b = (torch.autograd.grad(y.square().sum(), x)[0] for y in (got, want))
    torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


def test_hides_nothing():
    x = torch.randn(2, 4, TOKENS, 8)
    gm, done = skipped(Masked(lambda x: positions(x)[None, None, None] >= 0), x)
    call, = (n for n in gm.graph.nodes if n.target is F.scaled_dot_product_attention)
    assert done == 1 and not call.kwargs["is_causal"]


@pytest.mark.parametrize("mask, others", [
    (window(TOKENS - 1), ()),
    (overwritten, ()),
    (lambda x: 0.5 * bias(x).clamp(min=-1), ()),                                            # a bias, and an operation that is not listed
    (lambda x: torch.where(causal(x), 0.0, -1.0), ()),                                      # a bias that hides nothing
    (lambda x: causal(x).flip(-1), ()),
    (lambda x, kept: causal(x) & kept[:, None, None].bool(), (torch.ones(2, TOKENS),)),     # padding
    (lambda x, at: (at[:, None, None] <= at[:, None, :, None]), (torch.arange(TOKENS).expand(2, -1),)),
    (lambda x: torch.rand(TOKENS, TOKENS) < 2, ())])
def test_stays(mask, others):
    gm, done = skipped(Masked(mask), torch.randn(2, 4, TOKENS, 8), *others)
    assert done == 0


def counted(module, inputs, *, dynamic=None, **options):
    """For each graph that Dynamo makes of ``module``: calls that lost their mask."""
    found = []

    def backend(gm, _):
        found.append(skip_causal_masks(gm.graph).calls)
        return gm.forward

    torch.compile(module, backend=backend, dynamic=dynamic)(inputs, **options)
    return found


def test_symbolic_sizes_stay():
    assert counted(Masked(causal), torch.randn(2, 4, TOKENS, 8), dynamic=True) == [0]


TINY = dict(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, head_dim=8)


@pytest.mark.parametrize("padded", [False, True])
def test_of_transformers(padded):
    """The compiled model as the eager one: which leaves the mask out by itself, and keeps one that has padding."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(Qwen3MoeConfig(moe_intermediate_size=32, num_experts=4, num_experts_per_tok=2, **TINY))
    ids, mask = torch.randint(64, (2, 12)), torch.ones(2, 12, dtype=torch.long)
    mask[0, 8:] = 0
    given = {"attention_mask": mask} if padded else {}
    want = model(ids, use_cache=False, **given).logits
    options = {"connectivity": "none", "inner": "aot_eager"}
    got = torch.compile(model, backend="farskip", options=options)(ids, use_cache=False, **given).logits
    kept = mask.bool() if padded else torch.ones_like(mask).bool()
    torch.testing.assert_close(got[kept], want[kept], rtol=0, atol=1e-5)
    assert fs.last_reports()[-1].causal == (0 if padded else 2)


def test_off():
    model = AutoModelForCausalLM.from_config(Qwen3MoeConfig(moe_intermediate_size=32, num_experts=4, num_experts_per_tok=2, **TINY))
    fs.apply(model, connectivity="none", inner="eager", causal_attention=False)(torch.randint(64, (1, 8)))
    assert fs.last_reports()[-1].causal == 0


@pytest.mark.parametrize("window, calls", [(4, 0), (None, 2)])
def test_sliding_window(window, calls):
    model = AutoModelForCausalLM.from_config(MistralConfig(sliding_window=window, **TINY))
    assert counted(model, torch.randint(64, (1, 8)), use_cache=False) == [calls]
