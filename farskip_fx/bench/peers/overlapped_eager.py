"""Peer: farskip's connectivity by hand, in the order of the FarSkip authors (arXiv 2511.11505; section "When communication
can be hidden" of its summary):

    q, k, v | wait combine k-1 | router | launch dispatch | attention core | wait dispatch | experts | launch combine | shared

So the dispatch travels behind the core of attention, the combine behind the shared experts and the next layer's projections.
A dense layer reads the stream before its attention, as an MoE does, and has nothing to launch.
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
    return {"compiled pieces": Overlapped(model, spec.inner)}


class Overlapped:
    def __init__(self, model: nn.Module, backend: str) -> None:
        self.model, self.parts, self.exchange = attention.install(twin(model)), Compiled(backend), Exchange()

    def __call__(self, ids: Tensor, use_cache: bool = False) -> SimpleNamespace:
        parts, decoder = self.parts, self.model.model
        full = early = decoder.embed_tokens(ids)            # early: without the routed experts that are still under way
        rotary = decoder.rotary_emb(full, torch.arange(ids.size(1), device=ids.device)[None])
        arriving: Callable[[], Tensor] | None = None
        for layer in decoder.layers:
            projected = parts.project(layer, early, rotary)
            if is_moe(layer):
                full = arriving() if arriving else full
                x, rows, order, counts, weights = parts.route(layer, full)
                sent = self.exchange.dispatch(rows, counts)
                attended = parts.core(layer, *projected)
                back = sent.send_back(parts.experts(layer.mlp, sent.land(), sent.counts))
                between, early, shared = parts.beside(layer.mlp, x, full, attended)
                arriving = Arriving(parts.join, back, order, weights, between, shared)
            else:
                attended = parts.core(layer, *projected)    # the last combine travels behind this, too
                full = arriving() if arriving else full
                full = early = parts.dense(layer, full, attended)
                arriving = None
        full = arriving() if arriving else full
        return SimpleNamespace(logits=parts.head(self.model, full))


class Arriving:
    """Called: waits for a combine and gives the stream with it."""

    def __init__(self, join: Callable, back, *rest) -> None:
        self.join, self.back, self.rest = join, back, rest

    def __call__(self) -> Tensor:
        return self.join(self.back.land(), *self.rest)
