"""One mode (forward, or train: forward and backward) on one rank, from building the model to the figures.

Steps
    1 build   the unsharded model; from it the reference results and the pieces of the bound; then the sharded model
    2 rewire  without compiling: the rewiring report, the model's exchanges
    3 rates   compile stock, time it on the fast link, find the link rate for every comm/compute ratio
    4 compile the other variants, each checked against the reference
    5 time    all variants and the exchanges alone, round robin
    6 figures
"""
from __future__ import annotations

import time
from typing import Any

import torch
import torch.distributed as dist

from . import product
from .calibrate import Calibrated, compute_rates, find_rate, link_rates
from .exchanges import Exchange, record, replay, slowest
from .figures import Phase, Spread, bound, hidden, limit
from .model import Reference, build, logits_of, reference_logits, relative_difference, tokens
from .parent import Parent
from .pieces import Pieces, rows_per_expert, time_pieces
from .spec import WORLD, Spec
from .timing import Condition, Step, interleave
from .variants import compile_for_report, compile_variant, connectivity_of, is_ours

COMM = "comm_only"
FAST = "fast"


class Measurement:
    def __init__(self, mode: str, spec: Spec, parent: Parent) -> None:
        self.mode, self.spec, self.parent = mode, spec, parent
        self.rank = parent.rank
        self.train = mode == "train"
        self.shape = spec.shape(mode)
        self.ids = tokens(self.shape, spec.seed, self.rank)
        self.ours = [name for name in spec.variants if is_ours(name)]
        self.steps: dict[str, Step] = {}
        self.facts: dict[str, dict[str, float]] = {}        # by label: compile_s, max_diff, ...
        self.schedules: dict[str, list[dict]] = {}

    def run(self) -> dict[str, Any]:
        self.build()
        self.rewire()
        self.calibrate()
        for name in self.spec.variants:
            for label, rates in self.builds_of(name):
                self.compile(label, name, rates)
        return self.figures(self.time())

    # 1 build
    def build(self) -> None:
        self.say(f"building the model ({self.shape.layers} layers, {self.shape.tokens} tokens a rank), the reference")
        whole = build(self.shape, self.spec.seed)
        wanted = {connectivity_of(name, self.spec) for name in self.spec.variants}
        self.references = {name: Reference.of(whole, self.ids, name, self.train) for name in sorted(wanted)}
        rows = torch.tensor(rows_per_expert(whole, self.ids))
        dist.all_reduce(rows)
        local = self.shape.experts // WORLD
        mine = range(self.rank * local, (self.rank + 1) * local)
        self.pieces: Pieces = time_pieces(whole, self.ids, rows.tolist(), mine)
        self.compute_rates: dict[str, float] = from_rank_0(compute_rates(self.shape))
        self.model = build(self.shape, self.spec.seed)
        product.shard(self.model, self.spec.exchange)

    # 2 rewire
    def rewire(self) -> None:
        if self.ours:
            compiled = compile_for_report(self.model, self.spec)
            step = Step(lambda ids: logits_of(compiled, ids), self.model, self.ids, self.train)
            step()
            self.parent.tell("layers", mode=self.mode, layers=product.layers(),
                             **self.differences(step, self.spec.connectivity))
        # The exchanges come from the reference's own loop over the sharded model: same tokens, same routing.
        connectivity = self.spec.connectivity if self.ours else "none"
        step = Step(lambda ids: reference_logits(self.model, ids, connectivity), self.model, self.ids, self.train)
        self.exchanges: list[list[Exchange]] = record(*step.phases())
        if not self.flat():
            raise RuntimeError("the sharded model ran without one functional collective; is expert_parallel in effect?")
        step.reset()

    def flat(self) -> list[Exchange]:
        return [exchange for phase in self.exchanges for exchange in phase]

    def replay(self) -> list[float]:
        return replay(self.flat())

    # 3 rates
    def calibrate(self) -> None:
        self.set_rate(None)
        self.compile("stock", "stock", None)
        step = self.steps["stock"]
        compute = Spread(tuple(tuple(step()) for _ in range(4))).median
        floor = Spread(tuple(tuple(self.replay()) for _ in range(3))).median
        leaving = slowest([sum(exchange.leaving(self.rank, WORLD) for exchange in self.flat())])[0]
        self.links: dict[float, Calibrated] = {}
        self.rates: dict[float, dict[str, float]] = {}
        for ratio in self.spec.ratios:
            self.parent.say(f"{self.mode}: finding the link rate for comm/compute {ratio:g}")
            self.links[ratio] = find_rate(self.replay_at, leaving_bytes=leaving, target_s=ratio * compute,
                                          floor_s=floor)
            self.set_rate(self.links[ratio].rate)
            wall, busy = time.perf_counter(), time.process_time()
            seconds = Spread(tuple(tuple(self.replay()) for _ in range(3))).phases()
            link = link_rates(self.flat(), list(seconds), self.rank, WORLD)
            # gloo's threads share the rank's core: a running exchange takes this part of it away from compute.
            share = (time.process_time() - busy) / (time.perf_counter() - wall)
            link = from_rank_0({**link, "link_compute_share": min(share, 0.9)})
            self.rates[ratio] = product.rates(**self.compute_rates, **link) if self.ours else link
        self.set_rate(None)

    def replay_at(self, rate: int) -> float:
        self.set_rate(rate)
        self.replay()                                       # TCP finds the new rate
        return Spread(tuple(tuple(self.replay()) for _ in range(3))).median

    def set_rate(self, rate: int | None) -> None:
        dist.barrier()
        if self.rank == 0:
            self.parent.set_rate(rate)
        dist.barrier()

    # 4 compile
    def builds_of(self, name: str) -> list[tuple[str, dict[str, float] | None]]:
        """Labels and rates. Only farskip's schedule depends on the link, so only it is built for every ratio."""
        if name == "farskip":
            return [(label_of(name, ratio), self.rates[ratio]) for ratio in self.spec.ratios]
        return [(name, None)]

    def compile(self, label: str, name: str, rates: dict[str, float] | None) -> None:
        if label in self.steps:
            return
        if self.rank == 0:
            self.parent.tell("compiling", mode=self.mode, label=label, expected_s=self.expected_s())
        dist.barrier()
        start = time.perf_counter()
        compiled = compile_variant(name, self.model, self.spec, rates)
        step = Step(lambda ids: logits_of(compiled, ids), self.model, self.ids, self.train)
        step()
        took = slowest([time.perf_counter() - start])[0]
        facts = {"compile_s": took, **self.differences(step, connectivity_of(name, self.spec))}
        step()                                              # warm
        step.reset()
        self.steps[label], self.facts[label] = step, facts
        if name == "farskip":
            self.schedules[label] = product.schedules()
        if self.rank == 0:
            self.parent.tell("compiled", mode=self.mode, label=label, schedules=self.schedules.get(label), **facts)

    def expected_s(self) -> float:
        """A guess for the progress line: from the builds before, and for the first one from the size alone."""
        took = [facts["compile_s"] for facts in self.facts.values()]
        if not took:
            return (25 + 6 * self.shape.layers) * (2 if self.train else 1)
        return took[-1] if len(took) > 1 else 0.4 * took[0]     # later builds find most C++ kernels compiled

    def differences(self, step: Step, connectivity: str) -> dict[str, float]:
        """The step's last results against the reference, the worst rank's."""
        want = self.references[connectivity]
        found = {"max_diff": (step.logits.detach() - want.logits).abs().max().item()}
        if self.train:
            found["loss_diff"] = abs(step.loss.item() - want.loss)
            found["grad_diff"] = max(relative_difference(self.model.get_parameter(name).grad, gradient)
                                     for name, gradient in want.gradients.items())
        whole = [value if value == value else float("inf") for value in found.values()]
        return dict(zip(found, slowest(whole)))

    # 5 time
    def time(self) -> dict[tuple[str, str], Spread]:
        everywhere = [name for name in self.spec.variants if name != "farskip"] + [COMM]
        ours = ["farskip"] if "farskip" in self.spec.variants else []
        fast = everywhere + [label_of(name, self.spec.main_ratio) for name in ours]
        conditions = [Condition(FAST, None, tuple(fast))]
        for ratio in self.spec.ratios:
            labels = everywhere + [label_of(name, ratio) for name in ours]
            conditions.append(Condition(f"{ratio:g}", self.links[ratio].rate, tuple(labels)))
        timed = {**self.steps, COMM: self.replay}
        return interleave(timed, conditions, self.set_rate, rounds=self.spec.rounds, budget_s=self.spec.budget_s,
                          say=lambda text: self.parent.say(f"{self.mode}: timing, {text}"))

    # 6 figures
    def figures(self, times: dict[tuple[str, str], Spread]) -> dict[str, Any]:
        curve = [self.at_ratio(ratio, times) for ratio in self.spec.ratios]
        main = curve[self.spec.ratios.index(self.spec.main_ratio)]
        first = next(iter(times.values()))
        return {**main, "curve": curve, "rounds": len(first.samples),
                "pieces": {"routers_ms": ms(self.pieces.routers), "routed_experts_ms": ms(self.pieces.routed),
                           "head_ms": ms(self.pieces.head)},
                "exchanges": [{"kind": exchange.kind, "bytes_leaving": exchange.leaving(self.rank, WORLD)}
                              for exchange in self.flat()],
                "compute_rates": self.compute_rates, "shape": self.shape.__dict__}

    def at_ratio(self, ratio: float, times: dict[tuple[str, str], Spread]) -> dict[str, Any]:
        slow, main = f"{ratio:g}", self.spec.main_ratio
        variants = []
        for name in self.spec.variants:
            here = label_of(name, ratio) if name == "farskip" else name
            on_fast = times[FAST, label_of(name, main) if name == "farskip" else name]
            on_slow = times[slow, here]
            stock_fast, stock_slow = times[FAST, "stock"], times[slow, "stock"]
            variants.append({
                "name": name, "fast_ms": ms(on_fast.median), "slow_ms": ms(on_slow.median),
                "fast_min_ms": ms(on_fast.best), "slow_min_ms": ms(on_slow.best),
                "speedup_fast": stock_fast.median / on_fast.median,
                "speedup_slow": stock_slow.median / on_slow.median, **self.facts[here]})
        best = next((name for name in ("farskip", "rewired_stock", "stock") if name in self.spec.variants))
        graph = times[FAST, label_of(best, main) if best == "farskip" else best]
        comm = times[slow, COMM]
        phases = self.phases(graph, comm)
        ends = self.ends(comm)
        by_name = {variant["name"]: variant for variant in variants}
        result = {
            "ratio": ratio, "variants": variants,
            "compute_only_ms": ms(graph.median), "compute_only_of": best,
            "comm_only_ms": ms(comm.median), "comm_only_min_ms": ms(comm.best),
            "comm_only_fast_ms": ms(times[FAST, COMM].median),
            "limit_ms": ms(limit(graph.median, comm.median)), "bound_ms": ms(bound(phases)), "ends_ms": ms(ends),
            "bound_parts": [{"compute_ms": ms(p.compute), "alone_ms": ms(p.alone), "exchanges_ms": ms(sum(p.exchanges)),
                             "serial_ms": ms(p.serial), "tail_ms": ms(p.tail), "bound_ms": ms(p.bound)}
                            for p in phases],
            "link_rates": self.rates[ratio], "rate_bits": self.links[ratio].rate,
            "rate_is_close": self.links[ratio].close,
            "schedules": self.schedules.get(label_of("farskip", ratio), []), "hidden": None, "hidden_inner": None,
        }
        if "farskip" in by_name:
            stock, ours = by_name["stock"], by_name["farskip"]
            costs = (stock["fast_ms"], stock["slow_ms"], ours["slow_ms"])
            result["hidden"] = hidden(*costs)
            result["hidden_inner"] = hidden(*costs, beyond_reach=ms(ends))
            result["over_bound"] = ours["slow_ms"] / result["bound_ms"] - 1
        return result

    def phases(self, graph: Spread, comm: Spread) -> list[Phase]:
        """The measured pieces as figures.py takes them: forward, and backward where there is one."""
        alone = comm.phases()
        split = len(self.exchanges[0])
        forward = Phase(graph.phase(0), alone[:split], self.pieces.routed + self.pieces.routers, alone[split - 1],
                        self.pieces.head)
        if not self.train:
            return [forward]
        return [forward, Phase(graph.phase(1), alone[split:], self.pieces.routed, 0.0, self.pieces.head)]

    def ends(self, comm: Spread) -> float:
        """The last forward exchange and the first backward one: what the paper says cannot be hidden."""
        alone, split = comm.phases(), len(self.exchanges[0])
        return alone[split - 1] + (alone[split] if self.train else 0.0)

    def say(self, text: str) -> None:
        self.parent.say(f"{self.mode}: {text}")


def label_of(name: str, ratio: float) -> str:
    return f"{name}@{ratio:g}"


def from_rank_0(value: Any) -> Any:
    """The same value on every rank: a schedule made from figures that differ would hang the exchanges."""
    told = [value]
    dist.broadcast_object_list(told, src=0)
    return told[0]


def ms(seconds: float) -> float:
    return round(seconds * 1e3, 3)
