"""What a model is traced with where the CPU it is traced on would run something else than the device that is planned for.

Contract: inside ``stand_ins()`` models are built and traced for their shapes alone. Nothing that is made here may run.

    attention   one kernel, causal, that takes heads of unequal width and sinks, as on a GPU. PyTorch's CPU kernels take
                neither, and would write the whole square of scores to memory.
    splits      of an exchange: even, and known. A real run reads them from the router and has 3 x ep symbols a layer.
    Llama 4     runs every expert on every token, so its experts cannot be split over ranks. Here its MoE sends each token
                to the experts that it chose, with the same weights.
"""
from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama4 import modeling_llama4
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from .. import exchanges, hierarchical

ATTENTION = "farskip_planned"


@contextmanager
def stand_ins() -> Iterator[None]:
    with mock.patch.object(exchanges, "on_host", _even), mock.patch.object(hierarchical, "on_host", _even), \
            mock.patch.object(modeling_llama4, "Llama4TextMoe", _DispatchedMoe):
        yield


# --- attention ---------------------------------------------------------------------------------------------------

# The name begins as PyTorch's kernels do: passes/costs.py counts it as one of them.
@torch.library.custom_op("farskip_fx::scaled_dot_product_planned", mutates_args=())
def _planned(query: Tensor, key: Tensor, value: Tensor, is_causal: bool) -> Tensor:
    raise RuntimeError("this attention is only for plans; the model was traced for its shapes and cannot run")


@_planned.register_fake
def _(query, key, value, is_causal):
    return query.new_empty(*query.shape[:-1], value.shape[-1])


@torch.library.custom_op("farskip_fx::scaled_dot_product_planned_backward", mutates_args=())
def _planned_backward(gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, is_causal: bool
                      ) -> tuple[Tensor, Tensor, Tensor]:
    raise RuntimeError("this attention is only for plans; the model was traced for its shapes and cannot run")


@_planned_backward.register_fake
def _(gradient, query, key, value, is_causal):
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def _save(ctx, inputs, output):
    *tensors, ctx.is_causal = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, gradient):
    return (*_planned_backward(gradient, *ctx.saved_tensors, ctx.is_causal), None)


_planned.register_autograd(_backward, setup_context=_save)


def _attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, *,
               sliding_window: int | None = None, **_) -> tuple[Tensor, None]:
    if sliding_window is not None and sliding_window < key.shape[2]:
        # A query meets so many keys; which ones does not change the work.
        key, value, causal = key[:, :, :sliding_window], value[:, :, :sliding_window], False
    else:
        causal = True
    return torch.ops.farskip_fx.scaled_dot_product_planned(query, key, value, causal).transpose(1, 2), None


ALL_ATTENTION_FUNCTIONS.register(ATTENTION, _attention)


# --- exchanges and experts ---------------------------------------------------------------------------------------

def _even(table: Tensor, hints: list[int]) -> list[list[int]]:
    return [[hint] * table.shape[1] for hint in hints]


class _DispatchedMoe(nn.Module):
    """In the place of ``Llama4TextMoe``."""

    def __init__(self, config) -> None:
        super().__init__()
        config.num_experts, config.moe_intermediate_size = config.num_local_experts, config.intermediate_size
        self.top_k = config.num_experts_per_tok
        self.gate = nn.Linear(config.hidden_size, config.num_local_experts, bias=False)
        self.experts = Qwen3MoeExperts(config)
        self.shared_expert = modeling_llama4.Llama4TextMLP(config)

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        hidden_states = hidden_states.reshape(-1, hidden_states.shape[-1])
        logits = self.gate(hidden_states)
        weights, chosen = torch.topk(logits, self.top_k, dim=-1)
        routed = self.experts(hidden_states, chosen, torch.sigmoid(weights.float()).to(hidden_states.dtype))
        return self.shared_expert(hidden_states) + routed, logits
