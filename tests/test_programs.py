"""Property: a random residual program is rewired exactly as the connectivity's definition says, or refused.

CI runs 500 general programs times six connectivities (hypothesis), and each feature by itself. For more:
    python tests/test_programs.py --programs 20000 --workers 2 --seed 0
prints a table of exact, refused (by reason) and wrong, and a one-line reproducer for each wrong program:
    python tests/test_programs.py --spec "ProgramSpec(...)"
Add ``--dynamo`` to trace with Dynamo and not with ``recorder`` (five times slower).
"""
import argparse
import collections
import functools
import multiprocessing
import os
import random
import sys
import time

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, seed, settings, strategies as st

import farskip_fx as fs
from compiled import _attempt, _copy
from general_check import CONNECTIVITIES, check, reason_of, shrink
from general_definition import layers_of
from general_draw import draw, short
from general_features import BREAKERS, FEATURES, WAITING
from general_programs import BlockSpec, GeneralProgram, ProgramSpec
from programs import ADDS, MIXERS, MLPS, SHARED, TOKENS, VOCABULARY, LayerSpec, Program, Undefined, interpret
from recorder import record, shape_of

PROGRAMS = int(os.environ.get("FARSKIP_PROGRAMS", "120"))
PARTS = 5
STRICT = bool(os.environ.get("FARSKIP_MUST_BE_EXACT"))      # random programs that must be exact may not be refused

_settings = dict(deadline=None, database=None, phases=[Phase.explicit, Phase.generate],
                 suppress_health_check=list(HealthCheck))


@functools.lru_cache(None, typed=True)
def _one_of(*options):
    """Making a strategy costs more than drawing from it."""
    return st.sampled_from(options)


def converted_of(choose, spec):
    """Layers to convert: mostly all."""
    count = len(layers_of(spec.blocks))
    if not count or choose([True, True, False]):
        return tuple(range(count))
    return tuple(k for k in range(count) if choose([True, False])) or (count - 1,)


@pytest.mark.parametrize("part", [0, *(pytest.param(i, marks=pytest.mark.slow if i % 2 else ()) for i in range(1, PARTS))])
def test_general_programs(part):
    @seed(part)
    @settings(max_examples=PROGRAMS // PARTS, **_settings)
    @given(data=st.data())
    def each(data):
        choose = lambda options: data.draw(_one_of(*options))  # noqa: E731
        spec = draw(choose)
        for connectivity, verdict in check(spec, converted_of(choose, spec)).items():
            assert not verdict.bad, (connectivity, verdict, short(spec))
            assert not (STRICT and verdict.too_careful), (connectivity, verdict, short(spec))
    each()


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.xfail(
    strict=False, reason="refused today")) if name in WAITING else name for name in FEATURES])
def test_each_feature_must_be_exact(name):
    """A feature by itself: not refused, and exact; and the connectivity changes the numbers, or the test is blind."""
    verdicts = check(FEATURES[name])
    assert {c: v.kind for c, v in verdicts.items()} == dict.fromkeys(CONNECTIVITIES, "exact"), verdicts
    assert verdicts["farskip"].changes and verdicts["ladder"].changes


@pytest.mark.parametrize("name", [*WAITING, *BREAKERS])
def test_exact_or_refused(name):
    verdicts = check({**FEATURES, **BREAKERS}[name])
    assert not [v for v in verdicts.values() if v.bad], verdicts


@pytest.mark.parametrize("number", [*range(3), *(pytest.param(n, marks=pytest.mark.slow) for n in range(3, 8))])
def test_recorder_gives_dynamos_graph(number):
    """And what Dynamo gives is rewired as well."""
    spec = draw(random.Random(number).choice)
    program, caught = GeneralProgram(spec).eval(), []
    ids = torch.randint(0, VOCABULARY, (2, TOKENS))
    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(program, backend=lambda gm, _: caught.append(gm) or gm, fullgraph=True)(ids)
        gm, _ = record(program, ids)
    assert shape_of(gm.graph) == shape_of(caught[0].graph)
    verdicts = check(spec, dynamo=True)
    assert not [v for v in verdicts.values() if v.bad], verdicts


# --- plain pre-norm layers through Dynamo -------------------------------------------------------------------------

layer_specs = st.builds(
    LayerSpec, mixer=st.sampled_from(MIXERS), mlp=st.sampled_from(MLPS), shared=st.sampled_from(SHARED),
    add=st.sampled_from(ADDS), scale=st.sampled_from([1.0, 1.0, 0.5]), view=st.booleans(), half=st.booleans(),
    inplace_sum=st.booleans(), post_norm=st.sampled_from([False, False, False, True]))


def compare(specs, seed, converted=None):
    """connectivity -> "exact" or a refusal; raises where the numbers differ from the definition."""
    torch._dynamo.reset()
    program = Program(specs, seed).eval()
    converted = tuple(range(len(specs))) if converted is None else converted
    ids = torch.randint(0, VOCABULARY, (2, TOKENS), generator=torch.Generator().manual_seed(seed))
    built = []

    def fan_out(gm, example_inputs):
        built.append({c: _attempt(_copy(gm), example_inputs, {"connectivity": c, "inner": "eager",
                                                              "layers": converted}) for c in CONNECTIVITIES})
        return lambda *args: built[0][chosen](*args)

    outcome = {}
    with torch.no_grad():
        compiled = torch.compile(program, backend=fan_out, fullgraph=True)
        chosen = "none"
        assert torch.equal(compiled(ids), program(ids))
        for chosen in CONNECTIVITIES[1:]:
            made = built[0][chosen]
            try:
                want = interpret(program, ids, chosen, converted)
            except Undefined as why:
                assert isinstance(made, fs.RefusedError), f"{chosen} was rewired where {why} makes it undefined"
            if isinstance(made, Exception):
                outcome[chosen] = f"{type(made).__name__}: {made}"
                continue
            got = compiled(ids)
            assert (got - want).abs().max() <= 1e-5 * max(1.0, want.abs().max()), chosen
            outcome[chosen] = "exact"
    return outcome


@settings(max_examples=10, derandomize=True, **{k: v for k, v in _settings.items() if k != "database"})
@given(specs=st.lists(layer_specs, min_size=2, max_size=4), seed=st.integers(0, 99), data=st.data())
def test_plain_programs_through_dynamo(specs, seed, data):
    converted = data.draw(st.sets(st.integers(0, len(specs) - 1), min_size=1))
    outcome = compare(tuple(specs), seed, tuple(sorted(converted)))
    if any(s.is_moe for s in specs) and not any(s.post_norm for s in specs):
        assert set(outcome.values()) == {"exact"}, outcome


@pytest.mark.parametrize("mlp", [m for m in MLPS if "dense" not in m])
@pytest.mark.parametrize("shared", SHARED)
def test_each_kind_of_experts(mlp, shared):
    specs = tuple(LayerSpec("sdpa", mlp, shared) for _ in range(3))
    assert set(compare(specs, 0).values()) == {"exact"}


@pytest.mark.parametrize("mixer", MIXERS)
def test_each_mixer(mixer):
    specs = tuple(LayerSpec(mixer, "gather", "plain") for _ in range(3))
    assert set(compare(specs, 0).values()) == {"exact"}


@pytest.mark.parametrize("add", ADDS)
def test_each_way_to_add(add):
    specs = tuple(LayerSpec("sdpa", "gather", "plain", add=add, inplace_sum=True) for _ in range(3))
    assert set(compare(specs, 0).values()) == {"exact"}


# --- thousands of programs from the command line ------------------------------------------------------------------

def survey(numbers, base: int, dynamo: bool, note) -> tuple[collections.Counter, list, dict]:
    """Counts of (kind, detail) over programs; (connectivity, verdict, shrunk spec, layers) of the bad ones; and an
    example for each refusal that should be exact."""
    counts, bad, seen, careful = collections.Counter(), [], collections.Counter(), {}
    for done, number in enumerate(numbers):
        choose = random.Random(base * 1_000_003 + number).choice
        spec = draw(choose)
        converted = converted_of(choose, spec)
        try:
            verdicts = check(spec, converted, dynamo=dynamo)
        except Exception as error:      # noqa: BLE001 - a mistake of these tests: say so, and go on
            note(f"no program {number}: {type(error).__name__}: {error} {short(spec)}")
            counts["no program"] += 1
            continue
        for connectivity, verdict in verdicts.items():
            if connectivity == "none":
                counts["none", verdict.kind] += 1
            elif verdict.kind == "refused":
                counts["refused", verdict.excused or "SHOULD BE EXACT", reason_of(verdict)] += 1
                if verdict.too_careful:
                    careful.setdefault(reason_of(verdict), (short(spec), converted))
            else:
                counts[verdict.kind, verdict.why if verdict.kind == "exact" else "", ""] += 1
                counts["changed" if verdict.changes else "not changed"] += 1
            if verdict.bad:
                fails = lambda s: check(s, connectivities=(connectivity,))[connectivity].bad  # noqa: E731, B023
                seen[spec.stream] += 1
                plain = spec
                if seen[spec.stream] <= 2 and fails(spec):      # of one kind of stream, a few are enough
                    plain, converted = shrink(spec, fails), None
                bad.append((connectivity, verdict, plain, converted))
                note(f"{connectivity} {verdict.kind} {verdict.why} program {number}: {short(plain)} {converted}")
                break
        if done % 100 == 99:
            note(None)
    return counts, bad, careful


def _work(worker, workers, programs, base, dynamo, queue):
    torch.set_num_threads(1)
    counts, bad, careful = survey(range(worker, programs, workers), base, dynamo, queue.put)
    queue.put((counts, [(c, v, short(s), k) for c, v, s, k in bad], careful))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--programs", type=int, default=1000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dynamo", action="store_true", help="trace with Dynamo")
    parser.add_argument("--spec", help="check one program, given as its repr")
    parser.add_argument("--converted", help="layers to convert with --spec, as 0,2")
    given = parser.parse_args()
    if given.spec:
        spec = eval(given.spec, {"ProgramSpec": ProgramSpec, "BlockSpec": BlockSpec})
        converted = tuple(map(int, given.converted.split(","))) if given.converted else None
        verdicts = check(spec, converted, dynamo=given.dynamo)
        for connectivity, verdict in verdicts.items():
            print(f"{connectivity:10} {verdict.kind:8} {verdict.why}  {verdict.excused or ''}")
        return int(any(v.bad for v in verdicts.values()))
    context = multiprocessing.get_context("spawn")
    queue, begin = context.Queue(), time.time()
    workers = [context.Process(target=_work, args=(w, given.workers, given.programs, given.seed, given.dynamo, queue))
               for w in range(given.workers)]
    for worker in workers:
        worker.start()
    total, bad, careful, done, finished = collections.Counter(), [], {}, 0, 0
    while finished < len(workers):
        message = queue.get()
        if message is None:
            done += 100
            print(f"{done} programs, {time.time() - begin:.0f} s", flush=True)
        elif isinstance(message, str):
            print("BAD", message, flush=True)
        else:
            finished += 1
            total += message[0]
            bad += message[1]
            careful |= message[2]
    report(total, bad, careful, given.programs, time.time() - begin)
    return int(bool(bad))


def report(total, bad, careful, programs, seconds) -> None:
    cases = sum(n for k, n in total.items() if k[0] in ("exact", "refused", "wrong", "crash"))
    print(f"\n{programs} programs, {cases} rewirings in {seconds:.0f} s; 'none' bit-equal {total['none', 'exact']}, "
          f"not {sum(n for k, n in total.items() if k[0] == 'none' and k[1] != 'exact')}; "
          f"numbers change in {total['changed']} of the built ones; {total['no program']} specs gave no program")
    for kind in ("exact", "refused", "wrong", "crash"):
        n = sum(n for k, n in total.items() if k[0] == kind)
        print(f"  {kind:8} {n:7}  {100 * n / max(cases, 1):5.1f} %")
    print("refused, and why that is a right answer (SHOULD BE EXACT: it is not):")
    by = collections.Counter()
    for key, n in total.items():
        if key[0] == "refused":
            by[key[1]] += n
    for why, n in by.most_common():
        print(f"  {n:7}  {why}")
    print("refusals that should be exact, as the backend words them:")
    for key, n in sorted(total.items(), key=lambda kv: -kv[1]):
        if key[0] == "refused" and key[1] == "SHOULD BE EXACT":
            print(f"  {n:7}  {key[2]}\n           for example {careful.get(key[2])}")
    print("exact by one of two readings:", {k[1]: n for k, n in total.items() if k[0] == "exact" and k[1]})
    for connectivity, verdict, spec, converted in sorted(bad, key=lambda b: len(b[2])):
        layers = f" --converted {','.join(map(str, converted))}" if converted else ""
        print(f"{verdict.kind} {connectivity} {verdict.why}: python tests/test_programs.py{layers} --spec \"{spec}\"")


if __name__ == "__main__":
    sys.exit(main())
