"""What stands between the exchanges of the peers that are written by hand, compiled piece by piece.

All layers of a kind share a compiled piece: Dynamo takes their parameters as inputs.
"""
from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from ..families import routing_of, shared_of
from . import attention


class Compiled:
    """The functions of this file as compiled pieces of one peer; with ``backend="eager"`` as they are."""

    def __init__(self, backend: str) -> None:
        def piece(function, dynamic: bool = False):
            return torch.compile(function, backend=backend, dynamic=dynamic, fullgraph=True, disable=backend == "eager")

        self.project, self.core, self.attend = piece(project), piece(core), piece(attend)
        self.route, self.beside, self.shared, self.dense = piece(route), piece(beside), piece(shared), piece(dense)
        self.experts = piece(experts, dynamic=True)         # as many rows as arrive
        self.join, self.head = piece(join), piece(head)


def project(layer: nn.Module, stream: Tensor, rotary: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    return attention.projections(layer.self_attn, layer.input_layernorm(stream), rotary)


def core(layer: nn.Module, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    return attention.core(layer.self_attn, queries, keys, values)


def attend(layer: nn.Module, stream: Tensor, rotary: tuple[Tensor, Tensor], front: attention.KeysValues | None):
    """The stream after attention; own keys and values."""
    attended, own = attention.attend(layer.self_attn, layer.input_layernorm(stream), rotary, front)
    return stream + attended, own


def route(layer: nn.Module, stream: Tensor) -> tuple[Tensor, ...]:
    """What the MoE reads; rows sorted by expert, their order, their number for each expert; the weights."""
    x = layer.post_attention_layernorm(stream)
    tokens = x.flatten(0, 1)
    weights, ids = routing_of(layer.mlp, tokens)
    flat = ids.flatten()
    order = torch.argsort(flat, stable=True)
    number = layer.mlp.gate.weight.size(0)
    counts = torch.zeros(number, dtype=torch.int64, device=flat.device).scatter_add(0, flat, torch.ones_like(flat))
    return x, tokens[order // ids.size(1)], order, counts, weights


def experts(mlp: nn.Module, rows: Tensor, counts: Tensor) -> Tensor:
    """This rank's experts on rows that stand by sender and expert: ``counts`` of them."""
    local = mlp.experts.num_experts
    ids = torch.arange(local, device=rows.device).repeat(counts.numel() // local)
    ids = ids.repeat_interleave(counts, output_size=rows.size(0)).unsqueeze(-1)
    return ALL_EXPERTS_FUNCTIONS["grouped_mm"](mlp.experts, rows, ids, torch.ones_like(ids, dtype=rows.dtype))


def shared(mlp: nn.Module, x: Tensor) -> Tensor | None:
    return shared_of(mlp, x)


def beside(mlp: nn.Module, x: Tensor, stream: Tensor, attended: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """farskip, while the combine is under way: the stream without the MoE, without its routed part; the shared part."""
    between, part = stream + attended, shared_of(mlp, x)
    return between, between if part is None else between + part, part


def join(returned: Tensor, order: Tensor, weights: Tensor, between: Tensor, part: Tensor | None) -> Tensor:
    """The stream with the routed experts' results, unsorted, weighted and summed."""
    unsorted = torch.empty_like(returned).index_copy(0, order, returned)
    routed = (unsorted.view(*weights.shape, -1) * weights.unsqueeze(-1)).sum(1).view_as(between)
    return between + (routed if part is None else routed + part)


def dense(layer: nn.Module, stream: Tensor, attended: Tensor | None = None) -> Tensor:
    """The stream after the MLP of a layer without experts. ``attended``: what the MLP does not read and the stream gets."""
    between = stream if attended is None else stream + attended
    return between + layer.mlp(layer.post_attention_layernorm(stream))


def head(model: nn.Module, stream: Tensor) -> Tensor:
    return model.lm_head(model.model.norm(stream))
