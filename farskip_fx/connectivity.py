"""The connectivities: which contributions a block may not see. One small function each.

A connectivity is called once for every layer and says what its attention and its MLP or MoE read: the residual stream
of the model *without* some contributions. ``previous`` is the layer before, None for the first.

    attention k reads            MLP/MoE k reads              source
    none       as the model      as the model
    farskip    R - routed(k-1)   R, before attention k        FarSkip-Collective, arXiv 2511.11505, section 3
    attn_only  R - routed(k-1)   as the model                 the authors' switch for bisecting
    mlp_only   R                 R, before attention k        the authors' switch for bisecting
    ladder     R - MLP(k-1)      R, before attention k        Ladder-Residual, arXiv 2501.06589

To add one: write a function below and put it into ``CONNECTIVITIES``. The rewiring pass does the rest, and never leaves
out a contribution of a layer that is not converted.
"""
from __future__ import annotations

from collections.abc import Callable

from .passes.detect import Layer
from .passes.rewire import Missing, Reads

Connectivity = Callable[[Layer, "Layer | None"], Reads]


def none(layer: Layer, previous: Layer | None) -> Reads:
    return Reads()


def farskip(layer: Layer, previous: Layer | None) -> Reads:
    return Reads(attention=_without_routed(previous), mlp=_without_attention(layer))


def attn_only(layer: Layer, previous: Layer | None) -> Reads:
    return Reads(attention=_without_routed(previous))


def mlp_only(layer: Layer, previous: Layer | None) -> Reads:
    return Reads(mlp=_without_attention(layer))


def ladder(layer: Layer, previous: Layer | None) -> Reads:
    whole = (Missing(layer=previous.index, block="mlp", part="all"),) if previous else ()
    return Reads(attention=whole, mlp=_without_attention(layer))


def _without_routed(layer: Layer | None) -> tuple[Missing, ...]:
    return (Missing(layer=layer.index, block="mlp", part="routed"),) if layer and layer.mlp.kind == "moe" else ()


def _without_attention(layer: Layer) -> tuple[Missing, ...]:
    return (Missing(layer=layer.index, block="attention", part="all"),)


CONNECTIVITIES: dict[str, Connectivity] = {
    "none": none, "farskip": farskip, "attn_only": attn_only, "mlp_only": mlp_only, "ladder": ladder,
}
