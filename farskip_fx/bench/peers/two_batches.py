"""Peer: exact overlap by two micro-batches (DeepSeek's dual batch overlap, two-batch overlap), written by hand.

The rank's one sequence is cut in the middle: the second half attends to the keys of the first, which has them in time.

    first    attention, launch dispatch |                            | wait, experts, launch combine, shared |
    second                              | attention, launch dispatch |                                       | wait, ...

The first half's dispatch travels behind the second's attention, the second's dispatch behind the first's experts, the first's
combine behind the second's experts, and the second's combine behind the first's attention in the next layer.
"""
from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from ..families import is_moe
from ..spec import Spec
from . import attention
from .exchange import Exchange
from .parts import Compiled
from .twin import twin


def ways(model: nn.Module, spec: Spec) -> dict[str, Callable]:
    return {"compiled pieces": TwoBatches(model, spec.inner)}


class Half:
    """One half of the tokens: its stream, its rotary embeddings, and what is under way."""

    def __init__(self, stream: Tensor, rotary: tuple[Tensor, Tensor]) -> None:
        self.stream, self.rotary = stream, rotary
        self.back = None


class TwoBatches:
    def __init__(self, model: nn.Module, backend: str) -> None:
        self.model, self.parts, self.exchange = attention.install(twin(model)), Compiled(backend), Exchange()

    def __call__(self, ids: Tensor, use_cache: bool = False) -> SimpleNamespace:
        decoder = self.model.model
        stream = decoder.embed_tokens(ids)
        rotary = decoder.rotary_emb(stream, torch.arange(ids.size(1), device=ids.device)[None])
        halves = [Half(x, (cos, sin)) for x, cos, sin in zip(stream.chunk(2, 1), *(each.chunk(2, 1) for each in rotary))]
        for layer in decoder.layers:
            first_keys = None
            for half in halves:
                first_keys = self.before_experts(layer, half, first_keys)
            if is_moe(layer):
                for half in halves:
                    self.run_experts(layer, half)
        stream = torch.cat([self.arrived(half) for half in halves], 1)
        return SimpleNamespace(logits=self.parts.head(self.model, stream))

    def before_experts(self, layer: nn.Module, half: Half, front: attention.KeysValues | None) -> attention.KeysValues:
        """Attention, and the dispatch under way or the dense MLP; the half's keys and values."""
        half.stream, keys = self.parts.attend(layer, self.arrived(half), half.rotary, front)
        if is_moe(layer):
            half.x, rows, half.order, counts, half.weights = self.parts.route(layer, half.stream)
            half.sent = self.exchange.dispatch(rows, counts)
        else:
            half.stream = self.parts.dense(layer, half.stream)
        return keys

    def run_experts(self, layer: nn.Module, half: Half) -> None:
        half.back = half.sent.send_back(self.parts.experts(layer.mlp, half.sent.land(), half.sent.counts))
        half.shared = self.parts.shared(layer.mlp, half.x)

    def arrived(self, half: Half) -> Tensor:
        """The half's stream, with the combine that was under way."""
        if half.back is None:
            return half.stream
        back, half.back = half.back, None
        return self.parts.join(back.land(), half.order, half.weights, half.stream, half.shared)
