"""The connectivities: which contributions a block may not see. One small function each.

A connectivity is called once for every layer and says what its attention and its MLP or MoE read: the residual stream
of the model *without* some contributions. ``earlier`` are all layers before it on the same stream, in order.

    attention k reads            MLP/MoE k reads              source
    none       as the model      as the model
    farskip    R - routed(k-1)   R, before attention k        FarSkip-Collective, arXiv 2511.11505, section 3
    farskip_shared  as farskip   as farskip; its shared       the shared expert as in ScMoE, arXiv 2404.05019: behind
                                 expert as the model          attention k it hides the combine all the same
    attn_only  R - routed(k-1)   as the model                 the authors' switch for bisecting
    mlp_only   R                 R, before attention k        the authors' switch for bisecting
    ladder     R - MLP(k-1)      R, before attention k        Ladder-Residual, arXiv 2501.06589

Your own: ``register_connectivity``; docs/connectivity.md has two worked examples. What a function answers is checked
here (``ask``), and the rewiring pass does the rest: it never leaves out a contribution of a layer that is not
converted.

Contract of a function: pure. Every rank calls it for itself, and it is called again whenever Dynamo compiles again, so
it must give the same answer for the same layers: no randomness, no clock, no rank, no global that changes.
"""
from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

from .errors import ConfigError
from .passes.detect import Block, Layer
from .passes.rewire import Missing, Reads

__all__ = ["Block", "CONNECTIVITIES", "Connectivity", "Layer", "Missing", "Reads", "ask", "known_names",
           "register_connectivity"]

Connectivity = Callable[[Layer, Sequence[Layer]], Reads]


def none(layer: Layer, earlier: Sequence[Layer]) -> Reads:
    return Reads()


def farskip(layer: Layer, earlier: Sequence[Layer]) -> Reads:
    return Reads(attention=_without_routed(earlier), mlp=_without_attention(layer))


def farskip_shared(layer: Layer, earlier: Sequence[Layer]) -> Reads:
    return Reads(attention=_without_routed(earlier), mlp=_without_attention(layer), shared=())


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
    "none": none, "farskip": farskip, "farskip_shared": farskip_shared, "attn_only": attn_only, "mlp_only": mlp_only, "ladder": ladder,
}
BUILT_IN = tuple(CONNECTIVITIES)
# Those that have something to do in a model without MoE layers.
DENSE = {"ladder"}


# --- registering ------------------------------------------------------------------------------------------------

def register_connectivity(name: str, fn: Connectivity | None = None, *, dense: bool = False):
    """Make ``fn`` available as ``connectivity=name``; also a decorator, ``@register_connectivity("name")``.

    A checkpoint keeps the name and not the function: register it before a model that was converted with it runs, and
    give a changed function a new name.

    Args:
        name: a Python identifier that no other function has. Registering the same function again does nothing.
        fn: ``fn(layer, earlier) -> Reads``, pure; see the module's docstring and docs/connectivity.md.
        dense: also meant for models without any MoE layer, which are refused otherwise.

    Returns:
        ``fn``, or the decorator.

    Raises:
        ConfigError: the name is no identifier or belongs to another function, or ``fn`` is not callable.
    """
    if not isinstance(name, str) or not name.isidentifier():
        raise ConfigError(f"a connectivity's name must be a Python identifier such as \"skip_two\", got {name!r}; as a "
                          "decorator: @register_connectivity(\"skip_two\")")
    if fn is None:
        return lambda decorated: register_connectivity(name, _callable(name, decorated), dense=dense)
    known = CONNECTIVITIES.get(name, _callable(name, fn))
    if known is not fn:
        # Dynamo keeps compiled code by the options, that is by the name: a new function would get the old one's code.
        what = "built in" if name in BUILT_IN else f"registered already, by {_origin(known)}"
        raise ConfigError(f"connectivity {name!r} is {what}; {_origin(fn)} needs another name (a checkpoint keeps only "
                          "the name, so a changed function needs a new one; in a notebook, restart or rename)")
    CONNECTIVITIES[name] = fn
    if dense:
        DENSE.add(name)
    return fn


def _callable(name: str, fn) -> Connectivity:
    if not callable(fn):
        raise ConfigError(f"connectivity {name!r} must be a function (layer, earlier) -> Reads, got {fn!r}")
    return fn


def _origin(fn) -> str:
    return f"{getattr(fn, '__module__', '?')}.{getattr(fn, '__qualname__', type(fn).__name__)}"


def known_names(name) -> str:
    """What to say about a name that is not registered."""
    own = [n for n in CONNECTIVITIES if n not in BUILT_IN]
    return (f"connectivity {name!r} is not known in this process; built in: {', '.join(BUILT_IN)}"
            + (f"; registered: {', '.join(own)}" if own else "")
            + ". If it is your own (the config.farskip of a checkpoint may name one), import the module that calls "
            "farskip_fx.register_connectivity for it before the model is compiled")


# --- asking -----------------------------------------------------------------------------------------------------

def ask(name: str, layer: Layer, earlier: Sequence[Layer]) -> Reads:
    """What connectivity ``name`` says about ``layer``, checked.

    In the answer each block occurs once (its whole contribution covers its routed part), the routed part of a dense MLP, which
    has none, not at all, and ``shared`` is None where nothing reads otherwise than the rest of its block.

    Raises:
        ConfigError: names the connectivity, the layer and what is wrong.
    """
    def wrong(what: str) -> ConfigError:
        return ConfigError(f"connectivity {name!r}, layer {layer.index}: {what}")

    try:
        reads = CONNECTIVITIES[name](layer, tuple(earlier))
    except Exception as error:
        raise wrong(f"its function raised {type(error).__name__}: {error}") from error
    if not isinstance(reads, Reads):
        raise wrong("its function must return farskip_fx.connectivity.Reads(attention=(Missing(...), ...), mlp=(...)), "
                    f"got {reads!r}")
    known = {before.index: before for before in (*earlier, layer)}
    answer = {}
    for side in ("attention", "mlp", "shared"):
        missing = getattr(reads, side)
        if side == "shared" and missing is None:
            continue
        if not isinstance(missing, (tuple, list)) or not all(isinstance(m, Missing) for m in missing):
            raise wrong(f"{side}= must be a tuple of farskip_fx.connectivity.Missing (one alone: (Missing(...),)), got "
                        f"{missing!r}")
        parts: dict[tuple[int, str], str] = {}
        for m in missing:
            problem = _problem(m, layer, side, known)
            if problem:
                raise wrong(f"{side} cannot be without {m}: {problem}")
            if m.part == "routed" and known[m.layer].mlp.kind != "moe":
                continue
            place = (m.layer, m.block)
            parts[place] = "all" if "all" in (m.part, parts.get(place)) else "routed"
        # "attention" sorts before "mlp": the order of the blocks in the model.
        answer[side] = tuple(Missing(layer=k, block=block, part=part) for (k, block), part in sorted(parts.items()))
    if "shared" in answer and (layer.mlp.kind != "moe" or not layer.mlp.shared or answer["shared"] == answer["mlp"]):
        del answer["shared"]
    return Reads(**answer)


def _problem(missing: Missing, layer: Layer, side: str, known: Collection[int]) -> str:
    if missing.block not in ("attention", "mlp"):
        return "block must be \"attention\" or \"mlp\""
    if missing.part not in ("all", "routed"):
        return "part must be \"all\" or \"routed\""
    if missing.part == "routed" and missing.block == "attention":
        return "attention has no routed part; use part=\"all\""
    index = missing.layer
    if not isinstance(index, int) or isinstance(index, bool):
        return "layer must be the index of a layer"
    if index not in known:
        return f"among this layer and those before it on its stream there is no layer {index}"
    if index == layer.index and (side == "attention" or missing.block == "mlp"):
        return "it is not computed yet at that point: only blocks that come earlier in the model can be left out"
    return ""
