"""What must be exact and not refused: one small program for each feature, all else plain.

``WAITING`` are features that the passes refuse today.
"""
from general_blocks import COMBINE, DENSE, EXPERTS, MIXERS
from general_programs import BlockSpec, ProgramSpec
from general_updates import ADDS, OPERATIONS, SCALES, STREAMS

_MAY = ("unet", "concat", "times", "mixed_map")
MOE = dict(kind="moe", how="gather", shared="plain")


def _layer(mixer=(), mlp=(), **both):
    return BlockSpec(**{**both, **dict(mixer)}), BlockSpec(**{**MOE, **both, **dict(mlp)})


def _program(layer=None, n=3, first=None, **fields):
    layers = ([first] if first else []) + [layer or _layer()] * (n - bool(first))
    return ProgramSpec(tuple(layers), **fields)


def _parallel(**mlp):
    return _layer(mlp=dict(back=1, joined=True, **mlp))


DENSE_BLOCK = BlockSpec("dense", "gated_dense")
MIXER, EXPERT = BlockSpec(), BlockSpec(**MOE)

FEATURES: dict[str, ProgramSpec] = {"plain": _program()}
FEATURES |= {f"stream {s}": _program(stream=s) for s in STREAMS if s not in _MAY and s != "plain"}
FEATURES |= {f"stream {s} without shared experts": _program(_layer(mlp=dict(shared="none")), stream=s)
             for s in STREAMS if s not in _MAY}
FEATURES |= {f"scale {s}": _program(_layer(scale=s)) for s in SCALES}
FEATURES |= {
    "no norm": _program(norm="none"),
    "no norm, skip scale": _program(norm="none", stream="skip_scale"),
    "no norm, dynamic streams": _program(norm="none", stream="dynamic_streams"),
    "sandwich without shared experts": _program(_layer(mlp=dict(shared="none"), sandwich=True)),
    "gate from the normed input": _program(_layer(input_gate=True)),
    "lerp written out": _program(_layer(add="method"), stream="lerp"),
    "branches in float32": _program(dtype="low"),
    "branches in float32, promoted": _program(_layer(cast_back=False), dtype="low"),
    "branches in float64": _program(dtype="high"),
    "the new state is cast": _program(_layer(cast_back=False), dtype="high"),
    "flat blocks": _program(_layer(flat=True)),
}
FEATURES |= {f"layout {x}": _program(layout=x) for x in ("flat", "tbd", "flat_layer", "tbd_layer")}
FEATURES |= {f"{x} on the stream": _program(_layer(state_op=x)) for x in OPERATIONS}
FEATURES |= {f"{x} on the branch": _program(_layer(branch_op=x)) for x in OPERATIONS}
FEATURES |= {f"added as {a}": _program(_layer(add=a, scale="half" if a == "alpha" else
                                              "layerscale" if a == "addcmul" else "one"))
             for a in ADDS if a not in ("stack_sum", "out")}
FEATURES |= {
    "addmm in a dense model's layers": _program(first=(BlockSpec(add="addmm"), BlockSpec("dense", add="addmm"))),
    "addmm scaled": _program(_layer(mixer=dict(add="addmm"), scale="half")),
    "addmm, flat": _program(_layer(mixer=dict(add="addmm")), layout="flat"),
}
for _join in ("chain", "sum", "sum_reversed"):
    FEATURES |= {
        f"parallel, one norm, {_join}": _program(_parallel(norm_of=1), join=_join),
        f"parallel, two norms, {_join}": _program(_parallel(), join=_join),
        f"parallel, no norm, {_join}": _program(_parallel(), join=_join, norm="none"),
        f"parallel in the first layer, {_join}": _program(first=_parallel(norm_of=1), join=_join),
    }
FEATURES |= {f"parallel, stream {s}": _program(_parallel(norm_of=1), stream=s)
             for s in ("skip_scale", "layer_scalar", "post", "after_norm")}
FEATURES |= {
    "dense, then MoE": _program((MIXER, DENSE_BLOCK, EXPERT)),
    "dense beside the MoE, own addition": _program((MIXER, DENSE_BLOCK, BlockSpec(**MOE, back=1))),
    "dense beside the MoE, one addition": _program(_layer(mlp=dict(shared="beside"))),
    "two mixers": _program((BlockSpec(how="decay"), MIXER, EXPERT)),
    "self- and cross-attention": _program((MIXER, BlockSpec(how="cross"), EXPERT)),
    "a third block": _program((MIXER, EXPERT, BlockSpec("ple", "ple"))),
    "a third block, layer scalar": _program((MIXER, EXPERT, BlockSpec("ple", "ple")), stream="layer_scalar"),
    "a third block without shared experts": _program((MIXER, BlockSpec("moe", "gather"), BlockSpec("ple", "ple"))),
    "layers of one block": ProgramSpec(((MIXER,), (MIXER,), (EXPERT,), (MIXER,), (EXPERT,), (MIXER, EXPERT))),
    "native shortcut": _program((MIXER, DENSE_BLOCK, MIXER, DENSE_BLOCK, BlockSpec(**MOE, back=3)), n=2),
    "first layer dense": _program(first=(MIXER, DENSE_BLOCK)),
    "last layer dense": ProgramSpec((_layer(), _layer(), (MIXER, DENSE_BLOCK))),
    "ends with attention": ProgramSpec((_layer(), _layer(), (MIXER,))),
    "begins with an MoE": ProgramSpec(((EXPERT,), _layer(), _layer())),
    "router logits are an output": _program(share="router"),
    "indices of the layer before": _program(_layer(mixer=dict(how="indexed")), share="topk", n=4),
    "keys and values of the layer before": _program(share="kv", n=4),
    "values of the first layer": _program(share="value"),
    "all states are outputs": _program(hidden=True),
    "two layers": _program(n=2),
    "twelve layers": _program(n=12),
}
FEATURES |= {f"mixer {m}": _program(_layer(mixer=dict(how=m))) for m in MIXERS}
FEATURES |= {f"experts {e}": _program(_layer(mlp=dict(how=e, view=True))) for e in EXPERTS}
FEATURES |= {f"parts {c}": _program(_layer(mlp=dict(combine=c))) for c in COMBINE}
FEATURES |= {f"parts {c}, gated": _program(_layer(mlp=dict(combine=c, shared="gated", view=True))) for c in COMBINE}
FEATURES |= {f"dense {d}": _program(first=(MIXER, BlockSpec("dense", d))) for d in DENSE if d != "refine"}

FEATURES |= {
    "attention by products with the keys of the layer before": _program(_layer(mixer=dict(how="products")), n=4,
                                                                        share="kv"),
    "a third block, gates from the stream": _program((MIXER, EXPERT, BlockSpec("ple", "ple")), stream="highway"),
    "a third block, dynamic streams": _program((MIXER, EXPERT, BlockSpec("ple", "ple")), stream="dynamic_streams"),
    "dense layers with a gate from the stream": _program(first=(MIXER, DENSE_BLOCK), stream="highway"),
    "lerp written out, two mixers": _program((MIXER, BlockSpec(add="method"), EXPERT), stream="lerp"),
    "dynamic streams, subtracted": _program(_layer(add="sub"), stream="dynamic_streams"),
}

# Exact or refused, both are right; never wrong.
BREAKERS: dict[str, ProgramSpec] = {f"stream {s}": _program(stream=s) for s in _MAY}
BREAKERS |= {f"stream {s}, reversed": _program(_layer(add="reversed"), stream=s) for s in _MAY}
BREAKERS |= {
    "chain inside a block": _program(first=(MIXER, BlockSpec("dense", "refine"))),
    "chain inside the last block": ProgramSpec((_layer(), (MIXER, BlockSpec("dense", "refine")))),
    "chain inside all blocks": _program((MIXER, BlockSpec("dense", "refine"), EXPERT)),
    "an earlier state is overwritten": _program(writes=True),
    "an earlier state is overwritten, no norm": _program(writes=True, norm="none"),
    "a block reads two states": _program(_layer(mlp=dict(extra="state"))),
    "a block reads a contribution": _program(_layer(mlp=dict(extra="contribution"))),
    "a norm of the block before": _program(_layer(mlp=dict(back=1, norm_of=1))),
    "a norm of the layer before": _program((BlockSpec(back=2, norm_of=2), EXPERT), first=_layer(), n=2),
    "tied layers": _program(tied=True),
    "one layer": _program(n=1),
    "added by stack and sum": _program(_layer(add="stack_sum")),
    "added with out": _program(_layer(add="out")),
    "in place, no norm": _program(_layer(add="inplace"), norm="none"),
    "in place through expand_as": _program(_layer(add="inplace", state_op="expand_as")),
    "in place through a view": _program(_layer(add="inplace", flat=True)),
    "sandwich over shared experts": _program(_layer(sandwich=True)),
}

_SHORTCUT = (MIXER, DENSE_BLOCK, MIXER, DENSE_BLOCK)
FEATURES |= {
    "a parallel layer in one addition after a sequential one": ProgramSpec((_layer(), _parallel(norm_of=1)),
                                                                           join="sum"),
    "a dense parallel layer in one addition": ProgramSpec((_layer(), (MIXER, BlockSpec(
        "dense", "gated_dense", back=1, joined=True))), join="sum_reversed"),
    "a recurrence and an MLP in one addition": ProgramSpec(((BlockSpec(how="decay"), BlockSpec(
        "dense", "gated_dense", back=1, joined=True)), _parallel()), join="sum"),
    "in place, promoted": _program(_layer(add="inplace_method", cast_back=False), dtype="low"),
    "native shortcut on a gated stream": _program((*_SHORTCUT, BlockSpec(**MOE, back=3)), n=2, stream="highway"),
    "native shortcut, flat": _program((*_SHORTCUT, BlockSpec(**MOE, back=3, flat=True)), n=2),
}

BREAKERS["a long skip over a dense layer"] = ProgramSpec(((MIXER, DENSE_BLOCK),) * 2 + ((MIXER, EXPERT),) * 2, stream="unet")

WAITING = ("stream highway_convex", "stream highway_convex without shared experts", "slice on the branch",
           "a recurrence and an MLP in one addition", "in place, promoted", "native shortcut on a gated stream")
