"""One general program through the backend: exact, refused, or wrong.

``check(spec)`` gives a ``Verdict`` for each connectivity. The graph comes from ``recorder`` (or from Dynamo, ten times
slower) and is handed to the backend once for each connectivity.
"""
import re
from dataclasses import dataclass
from unittest import mock

import torch

import farskip_fx as fs
from farskip_fx import frame
from farskip_fx.connectivity import BUILT_IN as CONNECTIVITIES
from general_definition import interpret, layers_of
from general_draw import may_be_refused, short, simpler
from general_programs import GeneralProgram, ProgramSpec
from general_updates import WITH_ENTRY
from programs import TOKENS, VOCABULARY, Undefined
from recorder import copy_of, record

TOLERANCE = 1e-5
READINGS = ("block", "state", "split", "joint")      # see general_definition


@dataclass(frozen=True)
class Verdict:
    kind: str               # "exact", "refused", "wrong" or "crash"
    why: str = ""           # the refusal, or how far off
    excused: str | None = None      # why a refusal is a right answer here
    changes: bool = True    # whether this connectivity changes the numbers of this program

    @property
    def bad(self) -> bool:
        return self.kind in ("wrong", "crash")

    @property
    def too_careful(self) -> bool:
        return self.kind == "refused" and self.excused is None


def check(spec: ProgramSpec, converted=None, *, dynamo: bool = False,
          connectivities=CONNECTIVITIES) -> dict[str, Verdict]:
    """The verdicts on one program; ``converted`` are layers, by default all."""
    program = GeneralProgram(spec).eval()
    count = len(layers_of(spec.blocks))
    converted = tuple(range(count)) if converted is None else converted
    ids = torch.randint(0, VOCABULARY, (2, TOKENS), generator=torch.Generator().manual_seed(spec.seed))
    with torch.no_grad():
        native = program(ids)
        if not spec.writes:
            meant = interpret(program, ids, "none", ())
            assert _distance(native, meant) <= TOLERANCE, ("the definition is not this program", short(spec))
        gm, inputs = _with_dynamo(program, ids) if dynamo else record(program, ids)
        verdicts = {}
        for connectivity in connectivities:
            verdicts[connectivity] = _verdict(program, ids, native, connectivity, converted, gm, inputs)
    return verdicts


def _with_dynamo(program, ids):
    torch._dynamo.reset()
    caught = []

    def backend(gm, example_inputs):
        caught.append(copy_of(gm))
        return lambda *args: caught.append(list(args)) or gm(*args)
    torch.compile(program, backend=backend, fullgraph=True)(ids)
    return caught[0], caught[1]


def _build(program, gm, inputs, options):
    """The backend on a copy of ``gm``, told that Dynamo compiles ``program``."""
    where = frame.Frame(name="forward", module=program, resumed=False)
    with mock.patch.object(frame, "compiling", lambda: where):
        return fs.farskip_backend(copy_of(gm), inputs, options=options)


def _verdict(program, ids, native, connectivity, converted, gm, inputs) -> Verdict:
    spec = program.spec
    excused = may_be_refused(spec, connectivity)
    wanted = []
    if connectivity != "none":
        for entry in READINGS if spec.stream in (*WITH_ENTRY, "layer_scalar") else READINGS[:1]:
            try:
                wanted.append(interpret(program, ids, connectivity, converted, entry))
            except Undefined as why:
                excused = excused or str(why)
                wanted = None
                break
    else:
        wanted.append(native)
    everything = connectivity == "none" or len(converted) == len(layers_of(spec.blocks))
    try:
        run = _build(program, gm, inputs, {"connectivity": connectivity, "inner": "eager",
                                           "layers": "all" if everything else converted})
        got = run(*inputs)
    except fs.FarskipError as refusal:
        return Verdict("refused", f"{type(refusal).__name__}: {refusal}", excused)
    except Exception as error:      # noqa: BLE001 - a crash is a verdict
        return Verdict("crash", f"{type(error).__name__}: {error}")
    if wanted is None:
        return Verdict("wrong", f"rewired where {excused} makes it undefined")
    compared = slice(0, 1) if spec.writes else slice(None)      # a state that is overwritten is an output no more
    off = [_distance(got[compared], want[compared]) for want in wanted]
    changes = _distance(native[compared], wanted[0][compared]) > 1e-3
    if (min(off) <= TOLERANCE) if connectivity != "none" else off[0] == 0:
        readings = "" if max(off) <= TOLERANCE else ", ".join(r for r, o in zip(READINGS, off) if o <= TOLERANCE)
        return Verdict("exact", readings, changes=changes)
    return Verdict("wrong", f"off by {min(off):.1e}", changes=changes)


def _distance(got, want) -> float:
    """Largest difference of any output, relative to its size."""
    if len(got) != len(want):
        return float("inf")
    return max(float(((g - w).abs().max() / w.abs().max().clamp(min=1)).nan_to_num(nan=float("inf")))
               if g.shape == w.shape else float("inf") for g, w in zip(got, want))


def shrink(spec: ProgramSpec, fails, limit: int = 150) -> ProgramSpec:
    """A plainer program that ``fails`` too."""
    tries, smaller = 0, True
    while smaller and tries < limit:
        smaller = False
        for candidate in simpler(spec):
            tries += 1
            try:
                if fails(candidate):
                    spec, smaller = candidate, True
                    break
            except Exception:   # noqa: BLE001 - not a program
                continue
            if tries >= limit:
                break
    return spec


def reason_of(verdict: Verdict) -> str:
    """A refusal without names and numbers, for counting."""
    text = verdict.why.split("Use connectivity=")[0].split("Choose other")[0].split("Compile a model")[0]
    text = re.sub(r"connectivity '\w+'|as '\w+'|connectivity \w+", "", text)
    text = re.sub(r"\b(add|mul|linear|view|to|dropout|contiguous|[a-z]+_\w+|layers\.\w+|[\w.]*\d[\w.]*)\b", "*", text)
    return re.sub(r"(\*[ .,()]*)+", "* ", text)[:150]
