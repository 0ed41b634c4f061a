"""The parts of a model that the bound needs, each timed by itself: routers, this rank's routed experts, what a last layer has
to do beside its last exchange (its shared experts), the head."""
from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..calibrate import best
from .exchanges import slowest
from .families import moe_layers, shared_of

CPU = torch.device("cpu")
REPEAT_S = 0.1


@dataclass(frozen=True)
class Pieces:
    routers: float                          # all layers together, seconds
    routed: float
    head: float
    last_shared: float = 0.0                # shared experts of the last layer, if that one is an MoE


def rows_per_expert(model: nn.Module, ids: Tensor) -> list[list[int]]:
    """For every MoE layer of the unsharded model, how many rows each expert gets from this rank's tokens."""
    counts: list[list[int]] = []

    def note(module: nn.Module, args: tuple, output: tuple) -> None:
        counts.append(torch.bincount(output[-1].reshape(-1), minlength=module.num_experts).tolist())

    hooks = [layer.mlp.gate.register_forward_hook(note) for layer in moe_layers(model)]
    try:
        with torch.no_grad():
            model(ids, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return counts


def time_pieces(model: nn.Module, ids: Tensor, rows: list[list[int]], mine: range, sharing: int) -> Pieces:
    """``rows`` are the rows of every expert from the tokens of its expert group, ``mine`` the experts that this rank holds,
    ``sharing`` the ranks on this core.

    ``model`` is the unsharded one. The chain waits for the slower rank in every layer, so each layer's time is the
    largest over the ranks.
    """
    x = torch.randn(ids.numel(), model.config.hidden_size)
    core = model.model
    routers, routed = [], []
    with torch.no_grad():
        for layer, count in zip(moe_layers(model), rows):
            gate, experts = layer.mlp.gate, layer.mlp.experts
            routers.append(best(lambda: gate(x), CPU, REPEAT_S))
            inputs = [torch.randn(count[expert], x.shape[1]) for expert in mine]
            routed.append(best(lambda: _run_experts(experts, mine, inputs), CPU, REPEAT_S))
        head = best(lambda: model.lm_head(core.norm(x[None])), CPU, REPEAT_S)
        last, shared = core.layers[-1].mlp, 0.0
        if shared_of(last, x[:1]) is not None:
            shared = best(lambda: shared_of(last, x), CPU, REPEAT_S)
    head, shared = slowest([head, shared])
    return Pieces(sharing * sum(slowest(routers)), sharing * sum(slowest(routed)), sharing * head, sharing * shared)


def _run_experts(experts: nn.Module, mine: range, inputs: list[Tensor]) -> None:
    for expert, rows in zip(mine, inputs):
        gate, up = F.linear(rows, experts.gate_up_proj[expert]).chunk(2, dim=-1)
        F.linear(experts.act_fn(gate) * up, experts.down_proj[expert])
