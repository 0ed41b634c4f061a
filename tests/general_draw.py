"""Which programs are drawn, and which of them must be exact.

``draw(choose)`` builds a ``ProgramSpec``; ``choose(options)`` picks one option (hypothesis or ``random.Random``), and
the first option is the plainest. ``may_be_refused`` says why a refusal is a right answer, or None where it is not.
"""
import dataclasses

from general_blocks import COMBINE, DENSE, EXPERTS, MIXERS
from general_definition import layers_of
from general_programs import BlockSpec, ProgramSpec
from general_updates import ADDS, INPLACE, OPERATIONS, SCALES, STREAMS

STRUCTURES = ("sequential", "parallel", "two_norms", "two_mixers", "cross", "third", "dense_first", "dense_beside",
              "moe_first", "shortcut", "mixers_only")
_SCALAR = ("plain", "skip_scale", "layer_scalar", "post", "post_final", "after_norm")      # parallel blocks can have
_RARE = ("unet", "concat", "times", "mixed_map")       # may be refused
_MIXED_IN = ("x0", "x0_later", "unet")
_COPIES = ("static_streams", "dynamic_streams")


def draw(choose) -> ProgramSpec:
    """One program."""
    often = lambda usual, others, n=3: choose([usual] * n + list(others))  # noqa: E731
    stream = choose(["plain"] * 5 + [s for s in STREAMS if s not in _RARE] * 2 + list(_RARE))
    structure = often("sequential", STRUCTURES)
    plain = stream in _SCALAR
    if structure in ("parallel", "two_norms") and not plain:
        structure = "sequential"
    if stream in (*_COPIES, "skip_scale", "lerp", "highway_convex", "concat") and structure in (
            "dense_beside", "shortcut"):
        structure = "sequential"        # with whose scales would a block read a state that no other block reads?
    count = choose([2, 3, 3, 4, 2, 3, 2, 3] + [1] * (choose(range(4)) == 3) + [12] * (choose(range(12)) == 11))
    hidden, writes = choose([False] * 5 + [True]), choose([False] * 15 + [True])
    extra = choose([""] * 20 + ["contribution", "state"][:1 if stream in _COPIES else 2])
    # Something else reads earlier states, which are not to be overwritten.
    keeps = hidden or extra != "" or stream in _MIXED_IN or structure in ("shortcut", "dense_beside")
    writes = writes and not keeps
    layout = "btd" if keeps or stream in _COPIES else often("btd", ("flat", "tbd", "flat_layer", "tbd_layer"), 5)
    program = ProgramSpec(
        layers=(), stream=stream, norm=choose(["pre"] * 6 + ["none"] * (stream in ("plain", "skip_scale", *_COPIES))),
        dtype=choose(["same"] * 5 + (["low", "high"] if stream not in _COPIES else ["low"])), layout=layout,
        share=often("", ("kv", "value", "topk") + ("router",) * (not layout.startswith("tbd")), 5),
        join=choose(["chain", "sum", "sum_reversed"]),
        hidden=hidden, writes=writes, tied=choose([False] * 11 + [True]), seed=choose(range(100)))
    unusual = choose([False] * 15 + [True])
    adds = [a for a in ADDS if (unusual or a not in ("stack_sum", "out")) and not (
        (keeps or writes) and a in INPLACE)]
    style = dict(add=often("plain", adds, 2), scale=often("one", SCALES, 3), cast_back=choose([True, False]),
                 input_gate=program.norm == "pre" and choose([False] * 9 + [True]),
                 sandwich=choose([False] * 9 + [True]))
    dense_first = choose([0, 0, 0, 1])
    layers = []
    for k in range(count):
        kind = structure if choose([True, True, True, False]) or not plain else choose(["sequential", structure])
        layers.append(_layer(choose, kind, style, dense=k < dense_first, extra=extra, adds=adds, layout=layout,
                             share=program.share))
    return dataclasses.replace(program, layers=tuple(layers))


def _layer(choose, structure, style, *, dense, extra, adds, layout, share):
    def block(kind, how, **fields):
        given = dict(style)
        if choose([False] * 5 + [True]):
            given["add"] = choose(adds)
        operation = lambda: choose([""] * 12 + list(OPERATIONS))  # noqa: E731
        if choose([True, False]):
            given["state_op"], given["branch_op"] = operation(), operation()
        if layout == "btd" and choose([False] * 7 + [True]):
            given["flat"] = True
        return BlockSpec(kind, how, **{**given, **fields})

    def mixer(**fields):
        kinds = ("indexed",) if share == "topk" else ("sdpa", "products") if share in ("kv", "value") else MIXERS
        return block("mixer", choose(kinds), **fields)

    def mlp(**fields):
        if dense or choose([False] * 7 + [True]):
            return block("dense", choose(["gated_dense"] * 6 + list(DENSE)), **fields)
        return moe(**fields)

    def moe(**fields):
        shared = choose(["plain", "none", "gated", "plain", "beside"])
        how, combine = choose(EXPERTS), choose(COMBINE)
        return block("moe", how, shared=shared, combine=combine, view=choose([False, True]), **fields)

    joined = dict(back=1, joined=True, flat=False)
    if structure == "parallel":
        return mixer(flat=False), mlp(norm_of=1, **joined)
    if structure == "two_norms":
        return mixer(flat=False), mlp(**joined)
    if structure == "two_mixers":
        return mixer(), mixer(), mlp()
    if structure == "cross":
        return mixer(), block("mixer", "cross"), mlp()
    if structure == "third":
        return mixer(), mlp(), block("ple", "ple")
    if structure == "dense_first":
        return mixer(), block("dense", choose(DENSE[:2])), moe()
    if structure == "dense_beside":
        return mixer(), block("dense", choose(DENSE[:2])), moe(back=1)
    if structure == "moe_first":
        return moe(), mixer()
    if structure == "shortcut":
        return mixer(), block("dense", "dense"), mixer(), block("dense", choose(DENSE[:2])), moe(back=3)
    if structure == "mixers_only" and choose([True, False]):
        return (mixer(),)
    return mixer(), mlp(extra=extra)


def _until_mixer(kinds):
    return kinds[:kinds.index("mixer")] if "mixer" in kinds else kinds


def may_be_refused(spec: ProgramSpec, connectivity: str) -> str | None:
    """Why a refusal is a right answer."""
    blocks = spec.blocks
    layers = layers_of(blocks)
    if len(layers) < 2:
        return "a model of one layer"
    if not any(blocks[mlp].kind == "moe" for _, mlp in layers) and connectivity != "ladder":
        return "no MoE"
    kinds = [b.kind for b in blocks]
    if any(kind == "moe" and "moe" in _until_mixer(kinds[i + 1:]) for i, kind in enumerate(kinds)):
        return "two MoEs without a mixer between"
    if spec.stream in ("unet", "concat", "times", "mixed_map"):
        return f"stream {spec.stream}"
    if spec.stream in _MIXED_IN and any(layer[-1].kind == "mixer" for layer in spec.layers[:-1]):
        return "an earlier value is mixed in behind a mixer"
    if spec.writes or any(b.extra or b.how == "refine" for b in blocks) or spec.tied:
        return "a breaker"
    if any(b.add in ("stack_sum", "out") for b in blocks):
        return "spelled with stack or out"
    if any(b.add in INPLACE and (b.state_op or b.branch_op or b.flat) or b.joined and b.add in INPLACE for b in blocks):
        return "in place through a view"
    if spec.norm == "none" and any(b.add in INPLACE for b in blocks):
        return "in place on what a block reads"
    if any(b.norm_of and b.back and not b.joined for b in blocks):
        return "a norm of another layer"
    return None


FIELDS = [f.name for f in dataclasses.fields(BlockSpec)]


def simpler(spec: ProgramSpec):
    """Specs that are a little plainer, for shrinking."""
    if len(spec.layers) > 1:
        for k in range(len(spec.layers)):
            yield dataclasses.replace(spec, layers=spec.layers[:k] + spec.layers[k + 1:])
    plain = ProgramSpec(())
    for field in dataclasses.fields(spec):
        if field.name not in ("layers", "seed") and getattr(spec, field.name) != getattr(plain, field.name):
            yield dataclasses.replace(spec, **{field.name: getattr(plain, field.name)})
    for k, layer in enumerate(spec.layers):
        for i, block in enumerate(layer):
            usual = BlockSpec(kind=block.kind, how={"mixer": "sdpa", "moe": "gather", "dense": "gated_dense"}.get(
                block.kind, block.how))
            for name in FIELDS:
                if name not in ("kind", "back", "joined", "norm_of") and getattr(block, name) != getattr(usual, name):
                    new = dataclasses.replace(block, **{name: getattr(usual, name)})
                    changed = layer[:i] + (new,) + layer[i + 1:]
                    yield dataclasses.replace(spec, layers=spec.layers[:k] + (changed,) + spec.layers[k + 1:])


def short(spec) -> str:
    """A one-line reproducer: the spec without its defaults."""
    if isinstance(spec, tuple):
        return "(" + "".join(short(s) + ", " for s in spec) + ")"
    if not dataclasses.is_dataclass(spec):
        return repr(spec)
    parts = [f"{f.name}={short(getattr(spec, f.name))}" for f in dataclasses.fields(spec)
             if f.default is dataclasses.MISSING or getattr(spec, f.name) != f.default]
    return f"{type(spec).__name__}({', '.join(parts)})"
