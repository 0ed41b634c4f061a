"""The measured model, and an independent reference for what it must compute.

The reference is a plain loop over the *unsharded* model's own submodules, run eagerly in one process: it shares nothing
with the passes, the exchanges or the compiler that it checks.
"""
from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from .families import config_of, is_moe, shared_of, skew
from .spec import Shape

EARLY_ATTENTION = ("farskip", "farskip_shared", "ladder", "attn_only")   # attention reads R without the layer before's routed experts
EARLY_MLP = ("farskip", "farskip_shared", "ladder", "mlp_only")          # the MoE reads R before this layer's attention
LATE_SHARED = ("farskip_shared",)                        # but for its shared expert
MAX_NORM = 0.1                                           # low, so that clipping does something


def build(shape: Shape, seed: int) -> nn.Module:
    """A Hugging Face model from a config. The same seed gives the same weights in every process."""
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config_of(shape), dtype=torch.float32).eval()
    if shape.routing == "skewed":
        skew(model)
    return model


def tokens(shape: Shape, seed: int, rank: int) -> Tensor:
    """This rank's sequence, [1, tokens]."""
    generator = torch.Generator().manual_seed(seed + 1)
    return torch.randint(0, shape.vocab, (rank + 1, shape.tokens), generator=generator)[rank:]


def logits_of(model: nn.Module, ids: Tensor) -> Tensor:
    return model(ids, use_cache=False).logits


def loss_of(logits: Tensor, ids: Tensor) -> Tensor:
    return F.cross_entropy(logits[0, :-1], ids[0, 1:])


def reference_logits(model: nn.Module, ids: Tensor, connectivity: str) -> Tensor:
    """What ``model`` computes under ``connectivity``.

    full is the residual stream; early is the stream without the routed output of the layer before (``ladder``: without its
    whole MLP or MoE).
    """
    from transformers.masking_utils import create_causal_mask

    core = model.model
    early = full = core.embed_tokens(ids)
    positions = torch.arange(ids.shape[1], device=ids.device)[None]
    rotary = core.rotary_emb(full, positions)
    mask = create_causal_mask(config=model.config, inputs_embeds=full, attention_mask=None, past_key_values=None,
                              position_ids=positions)
    for layer in core.layers:
        attention_input = early if connectivity in EARLY_ATTENTION else full
        attended = layer.self_attn(layer.input_layernorm(attention_input), position_embeddings=rotary,
                                   attention_mask=mask)[0]
        between = full + attended
        mlp_input = full if connectivity in EARLY_MLP else between
        x = layer.post_attention_layernorm(mlp_input)
        full, shared = between + layer.mlp(x), shared_of(layer.mlp, x)
        if connectivity in LATE_SHARED and shared is not None:
            late = shared_of(layer.mlp, layer.post_attention_layernorm(between))
            full, shared = full - shared + late, late
        if connectivity == "ladder" or is_moe(layer) and shared is None:
            early = between
        else:
            early = between + shared if is_moe(layer) else full
    return model.lm_head(core.norm(full))


@dataclass
class Reference:
    """The reference's answer for one connectivity.

    Gradients are of the loss over this rank's tokens alone; in mode step of the mean over all ranks' tokens, the whole
    batch, clipped to ``MAX_NORM``.
    """

    logits: Tensor
    loss: float | None = None
    gradients: dict[str, Tensor] | None = None
    norm: float | None = None               # of all gradients, before clipping

    @staticmethod
    def of(model: nn.Module, ids: Tensor, connectivity: str, mode: str) -> "Reference":
        if mode == "forward":
            with torch.no_grad():
                return Reference(reference_logits(model, ids, connectivity))
        model.zero_grad(set_to_none=True)
        logits = reference_logits(model, ids, connectivity)
        loss = loss_of(logits, ids)
        loss.backward()
        norm = _mean_and_clip(model) if mode == "step" else None
        gradients = {name: model.get_parameter(name).grad.clone() for name in watched(model, mode)}
        model.zero_grad(set_to_none=True)
        return Reference(logits.detach(), loss.item(), gradients, norm)


def _mean_and_clip(model: nn.Module) -> float:
    """By c10d and torch.nn.utils alone. All ranks have as many tokens, so the mean of means is the whole batch's."""
    for parameter in model.parameters():
        parameter.grad /= dist.get_world_size()
        dist.all_reduce(parameter.grad)
    return nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM).item()


def watched(model: nn.Module, mode: str) -> list[str]:
    """Parameters whose gradients are compared: the first attention, the last router, the embedding, with the means also
    experts. Without means a shard's gradient is of all ranks' tokens, and no reference has that."""
    with_experts = [number for number, layer in enumerate(model.model.layers) if is_moe(layer)]
    replicated = ["model.layers.0.self_attn.q_proj.weight", f"model.layers.{with_experts[-1]}.mlp.gate.weight",
                  "model.embed_tokens.weight"]
    return replicated + [f"model.layers.{with_experts[0]}.mlp.experts.down_proj"] * (mode == "step")


def relative_difference(got: Tensor, want: Tensor) -> float:
    return ((got - want).norm() / want.norm().clamp_min(1e-30)).item()
