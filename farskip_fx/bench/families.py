"""The measured families, scaled down from a ``Shape``; weights are random, nothing is downloaded.

qwen3_moe   Qwen3-MoE: every layer an MoE, no shared expert
deepseek    DeepSeek-V3's code in the proportions of DeepSeek-V2-Lite: MLA, two shared experts, the first layer dense. Heads of
            queries, keys and values are equally wide, so that the fused attention of the CPU takes them
llama4      Qwen2-MoE in the shape of Llama 4: top-1, a shared expert as wide as a routed one, every second layer dense. Not
            Llama 4 itself: in transformers each of its experts computes every token, so there is nothing to exchange

Routing is balanced as far as random routers are. ``skewed`` gives all embeddings a common direction and each router a
preference along it, falling from the first expert to the last; the first half of them is on rank 0.
"""
from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .spec import Shape

SKEW = 1.5                                  # logits of the most (and minus the least) wanted expert, in router deviations


def config_of(shape: Shape):
    """The transformers configuration of a shape."""
    import transformers

    common = dict(vocab_size=shape.vocab, hidden_size=shape.hidden, num_hidden_layers=shape.layers,
                  moe_intermediate_size=shape.moe_intermediate, num_attention_heads=shape.heads,
                  num_experts_per_tok=shape.top_k, max_position_embeddings=max(2048, shape.tokens))
    if shape.family == "deepseek":
        return transformers.DeepseekV3Config(
            **common, intermediate_size=shape.moe_intermediate * (shape.top_k + 2), num_key_value_heads=shape.heads,
            q_lora_rank=None, kv_lora_rank=shape.hidden // 4, qk_nope_head_dim=shape.head_dim // 2,
            qk_rope_head_dim=shape.head_dim // 2, v_head_dim=shape.head_dim, n_routed_experts=shape.experts,
            n_shared_experts=2, first_k_dense_replace=1, n_group=1, topk_group=1, routed_scaling_factor=1.0)
    common |= dict(num_key_value_heads=shape.kv_heads, head_dim=shape.head_dim, num_experts=shape.experts)
    if shape.family == "llama4":
        return transformers.Qwen2MoeConfig(
            **common, intermediate_size=2 * shape.moe_intermediate, decoder_sparse_step=2, norm_topk_prob=False,
            shared_expert_intermediate_size=shape.moe_intermediate, use_sliding_window=False)
    return transformers.Qwen3MoeConfig(**common, intermediate_size=shape.moe_intermediate)


def skew(model: nn.Module) -> None:
    """Make routing skewed, in place."""
    with torch.no_grad():
        embedding = model.get_input_embeddings().weight
        embedding += embedding.std()
        for layer in moe_layers(model):
            router = layer.mlp.gate.weight
            wanted = torch.linspace(SKEW, -SKEW, router.size(0))
            router -= router.mean(1, keepdim=True)      # what chance prefers along that direction
            router += router.std() * router.size(1) ** -0.5 * wanted[:, None]


def moe_layers(model: nn.Module) -> list[nn.Module]:
    return [layer for layer in model.model.layers if is_moe(layer)]


def is_moe(layer: nn.Module) -> bool:
    return hasattr(layer.mlp, "experts")


def routing_of(mlp: nn.Module, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """[n, hidden] -> weights [n, top_k], expert ids [n, top_k]."""
    return mlp.gate(tokens)[-2:]


def shared_of(mlp: nn.Module, x: Tensor) -> Tensor | None:
    """The shared experts' part of an MoE's output, where there are any."""
    if hasattr(mlp, "shared_experts"):
        return mlp.shared_experts(x)
    if hasattr(mlp, "shared_expert"):
        return F.sigmoid(mlp.shared_expert_gate(x)) * mlp.shared_expert(x)
    return None
