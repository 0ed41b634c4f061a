"""A model at full size, traced once: the figures that plans are made of.

Contract: a configuration in, ``Traced`` out. The model is built without weights, split over at most ``TRACED_EP`` ranks of
which only one exists, and lowered with its original connectivity; of many equal layers a few are traced, and stand for all.
"""
from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch.fx import Graph
from transformers import AutoConfig

from ..diagnose.explain import graphs_of
from ..diagnose.planned import planned, ranks_for
from ..errors import ConfigError
from ..passes.costs import Rates
from ..report import Folded
from .models import experts_of, source_of
from .pieces import Piece, pieces_of
from .stand_ins import ATTENTION, stand_ins

TRACED_EP = 8


@dataclass(frozen=True, kw_only=True)
class Traced:
    """
    Args:
        graphs: forward, and backward in training.
        ep: ranks that it was traced with; exchanges at others follow from routing (``exchanges.py``).
        dense, expert: parameters of the whole model.
        weight_bytes: of one parameter.
    """
    name: str
    graphs: tuple[Graph, ...]
    folded: Folded | None
    tokens: int
    context: int
    ep: int
    layers: int
    experts: int
    top_k: int
    hidden: int
    vocab: int
    dense: int
    expert: int
    weight_bytes: int

    @property
    def training(self) -> bool:
        return len(self.graphs) > 1

    def pieces(self, rates: Rates, *, half: bool = False) -> tuple[list[list[Piece]], list[float]]:
        """For each graph: its layers, in the order of the model; and the seconds of what belongs to none of them."""
        rows, outside = [], []
        for number, graph in enumerate(self.graphs):
            found, rest = pieces_of(graph, rates, backward=number == 1, half=half)
            rows.append([found.get(i, Piece()) for i in self._stand_ins])
            traced = self.layers if self.folded is None else self.folded.traced
            outside.append(rest * self.layers / traced)     # most of it are the stream's additions
        return rows, outside

    @cached_property
    def _stand_ins(self) -> list[int]:
        """The traced layer of each layer."""
        how = self.folded
        if how is None:
            return list(range(self.layers))
        last = how.traced - how.period
        first, end = last - how.period, how.layers - how.period
        return [i if i < last else i - end + last if i >= end else first + (i - first) % how.period for i in range(how.layers)]


def trace(source: str | Path, *, tokens: int, context: int | None = None, training: bool, ep: int = TRACED_EP,
          attention: str | None = ATTENTION, causal: bool = False) -> Traced:
    """
    Args:
        tokens: of a rank in one step, sequences of ``context``.
        ep: ranks to trace with, at most.
        attention: the kernel; None: the one of this CPU.
        causal: without masks that are causal whatever the inputs, as our backend compiles it.

    Raises:
        ConfigError: ``source`` is unknown, has no experts, or more ranks than experts.
    """
    context = tokens if context is None else context
    if tokens % context:
        raise ConfigError(f"--tokens {tokens} is no multiple of --context {context}; tokens are whole sequences")
    torch._dynamo.reset()
    with source_of(source) as path, stand_ins():
        ep = math.gcd(ep, experts_of(AutoConfig.from_pretrained(str(path), local_files_only=True)))
        if ep < 2:
            raise ConfigError(f"{source} has no experts that two ranks could share, so there is nothing to plan")
        with ranks_for(ep):
            model, inputs = planned(path, tokens=context, batch=tokens // context, training=training, ep=ep,
                                    attention=attention)
            graphs, folded = graphs_of(model, gradients=training, causal=causal, **inputs)
    config = model.config.get_text_config()
    split = [m for m in model.modules() if getattr(m, "_farskip_experts", None) is not None]
    expert = sum(getattr(m, name).numel() for m in split for name in m._farskip_experts.parameters) * ep
    return Traced(
        name=str(source), graphs=tuple(g.graph for g in graphs), folded=folded, tokens=tokens, context=context, ep=ep,
        layers=config.num_hidden_layers, experts=experts_of(config), top_k=config.num_experts_per_tok,
        hidden=config.hidden_size, vocab=config.vocab_size, expert=expert,
        dense=sum(p.numel() for p in model.parameters()) - expert // ep, weight_bytes=_bytes(model))


def _bytes(model: torch.nn.Module) -> int:
    return next(p.element_size() for p in model.parameters() if p.is_floating_point())


def sizes(experts: int, gpus: int) -> Sequence[int]:
    """Numbers of ranks that a layer's experts and the devices can be split by; 1, without exchanges, is none of them."""
    return [n for n in range(2, gpus + 1) if gpus % n == 0 and experts % n == 0]
