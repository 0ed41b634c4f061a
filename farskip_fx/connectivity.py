"""The connectivities: which contributions a block may not see. One small function each.

A connectivity is called once for every layer and says what its attention and its MLP or MoE read: the residual stream
of the model *without* some contributions. ``earlier`` are the layers before it, in order.

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

from collections.abc import Callable, Sequence

from .passes.detect import Layer
from .passes.rewire import Missing, Reads

Connectivity = Callable[[Layer, Sequence[Layer]], Reads]


def none(layer: Layer, earlier: Sequence[Layer]) -> Reads:
    return Reads()


def farskip(layer: Layer, earlier: Sequence[Layer]) -> Reads:
    return Reads(attention=_without_routed(earlier), mlp=_without_attention(layer))


def attn_only(layer: Layer, earlier: Sequence[Layer]) -> Reads:
    return Reads(attention=_without_routed(earlier))


def mlp_only(layer: Layer, earlier: Sequence[Layer]) -> Reads:
    return Reads(mlp=_without_attention(layer))


def ladder(layer: Layer, earlier: Sequence[Layer]) -> Reads:
    whole = (Missing(layer=earlier[-1].index, block="mlp", part="all"),) if earlier else ()
    return Reads(attention=whole, mlp=_without_attention(layer))


def _without_routed(earlier: Sequence[Layer]) -> tuple[Missing, ...]:
    moe = earlier and earlier[-1].mlp.kind == "moe"
    return (Missing(layer=earlier[-1].index, block="mlp", part="routed"),) if moe else ()


def _without_attention(layer: Layer) -> tuple[Missing, ...]:
    return (Missing(layer=layer.index, block="attention", part="all"),)


CONNECTIVITIES: dict[str, Connectivity] = {
    "none": none, "farskip": farskip, "attn_only": attn_only, "mlp_only": mlp_only, "ladder": ladder,
}
