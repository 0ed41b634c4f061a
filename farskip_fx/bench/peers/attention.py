"""A decoder's attention in parts, whatever its family: through transformers' attention interface.

The interface is called with queries, keys and values as the family made them, and takes keyword arguments along. So one
forward gives the projections (the rest of it is dead code, which the compiler drops), or attends to tokens in front.
"""
from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

NAME = "farskip_bench_parts"
KeysValues = tuple[Tensor, Tensor]


def install(model: nn.Module) -> nn.Module:
    """Have ``model`` (a twin) go through this file."""
    ALL_ATTENTION_FUNCTIONS.register(NAME, _interface)
    model.config._attn_implementation = NAME
    return model


def projections(attention: nn.Module, x: Tensor, rotary: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values, rotated."""
    return attention(x, position_embeddings=rotary, attention_mask=None, part="projections")[1]


def core(attention: nn.Module, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """What is left after ``projections``: causal attention and the output projection."""
    out, _ = sdpa_attention_forward(attention, queries, keys, values, None, scaling=attention.scaling)
    return attention.o_proj(out.reshape(*out.shape[:2], -1))


def attend(attention: nn.Module, x: Tensor, rotary: tuple[Tensor, Tensor],
           front: KeysValues | None) -> tuple[Tensor, KeysValues]:
    """Attention of ``x`` to itself and to all of ``front``, the tokens before; and its own keys and values."""
    return attention(x, position_embeddings=rotary, attention_mask=None, part="whole", front=front)


def _interface(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, *, part: str,
               scaling: float, front: KeysValues | None = None, **ignored):
    if part == "projections":
        return query.transpose(1, 2)[..., :value.size(-1)], (query, key, value)
    if front is None:
        return sdpa_attention_forward(module, query, key, value, None, scaling=scaling)[0], (key, value)
    times = module.num_key_value_groups
    expanded = [repeat_kv(each, times) for each in (key, value, *front)]
    return _AfterFront.apply(query, *expanded, scaling).transpose(1, 2), (key, value)


class _AfterFront(torch.autograd.Function):
    """Causal attention to the own tokens and full attention to those in front, put together by their normalisers. One mask
    over both would compute the masked half as well. Each part's backward takes the normaliser of the whole."""

    @staticmethod
    def forward(ctx, query, key, value, front_key, front_value, scaling):
        fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        own, own_norm = fused(query, key, value, 0.0, True, scale=scaling)
        far, far_norm = fused(query, front_key, front_value, 0.0, False, scale=scaling)
        norm = torch.logaddexp(own_norm, far_norm)
        out = _weighted(own, own_norm, norm) + _weighted(far, far_norm, norm)
        ctx.save_for_backward(query, key, value, front_key, front_value, out, norm)
        ctx.scaling = scaling
        return out

    @staticmethod
    def backward(ctx, gradient):
        query, key, value, front_key, front_value, out, norm = ctx.saved_tensors
        fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        own = fused(gradient, query, key, value, out, norm, 0.0, True, scale=ctx.scaling)
        far = fused(gradient, query, front_key, front_value, out, norm, 0.0, False, scale=ctx.scaling)
        return own[0] + far[0], own[1], own[2], far[1], far[2], None


def _weighted(part: Tensor, norm: Tensor, whole: Tensor) -> Tensor:
    return part * (norm - whole).exp().unsqueeze(-1)
