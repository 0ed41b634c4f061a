"""Step 3b: attention by heads gives the same numbers, forward and backward, or is left whole."""
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from farskip_fx.passes.split import split_attention
from test_rewire import traced


class Attention(nn.Module):
    def __init__(self, **arguments):
        super().__init__()
        self.arguments = arguments

    def forward(self, query, key, value, mask=None):
        y = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, **self.arguments)
        return y.transpose(1, 2).reshape(y.shape[0], y.shape[2], -1)


def split(module, *inputs, parts=2):
    gm = traced(module, *inputs)
    calls = [n for n in gm.graph.nodes if n.target is F.scaled_dot_product_attention]
    result = split_attention(gm.graph, calls, parts=parts)
    gm.recompile()
    return gm, result.calls


def heads(count, tokens=6, seed=0):
    return torch.randn(2, count, tokens, 4, generator=torch.Generator().manual_seed(seed), requires_grad=True)


@pytest.mark.parametrize("arguments, key_heads, mask_heads", [
    ({"is_causal": True}, 4, None), ({"scale": 0.3}, 4, 1), ({}, 4, 4), ({"is_causal": True, "enable_gqa": True}, 2, None)])
@pytest.mark.parametrize("parts", [2, 4])
def test_same_numbers(arguments, key_heads, mask_heads, parts):
    if key_heads % parts:
        pytest.skip("refused, see below")
    inputs = [heads(4), heads(key_heads, seed=1), heads(key_heads, seed=2)]
    if mask_heads is not None:
        inputs.append(torch.randn(1, mask_heads, 6, 6).tril() > -0.5)
    gm, done = split(Attention(**arguments), *inputs, parts=parts)
    assert done == 1
    assert sum(n.target is F.scaled_dot_product_attention for n in gm.graph.nodes) == parts
    got, want = gm(*inputs), Attention(**arguments)(*inputs)
    got = got[0] if isinstance(got, tuple) else got
    assert torch.equal(got, want)
    weights = torch.randn_like(want)
    for a, b in zip(torch.autograd.grad((got * weights).sum(), inputs[:3]),
                    torch.autograd.grad((want * weights).sum(), inputs[:3])):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


@pytest.mark.parametrize("arguments, query_heads, key_heads, parts", [
    ({"dropout_p": 0.1}, 4, 4, 2), ({}, 3, 3, 2), ({"enable_gqa": True}, 4, 2, 4), ({}, 4, 4, 1)])
def test_left_whole(arguments, query_heads, key_heads, parts):
    _, done = split(Attention(**arguments), heads(query_heads), heads(key_heads), heads(key_heads), parts=parts)
    assert done == 0
