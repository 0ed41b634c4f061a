"""One mode on one rank, from building the model to the figures.

Modes
    forward   no gradients
    train     forward and backward; dense gradients stay those of this rank's tokens
    step      forward, backward with the means of gradients in its graph, then clipping and AdamW. The learning rate is 0:
              the work is the same, and every variant finds the same weights, so the same routing and exchanges.

Steps
    1 build   the unsharded model; from it the reference results and the pieces of the bound; then the sharded model
    2 rewire  without compiling: the rewiring report, the model's exchanges
    3 rates   compile stock, time it on the fast link, find the link rate for every comm/compute ratio
    4 compile the other variants, each checked against the reference; of a peer that can run in several ways the fastest is kept
    5 time    all variants and the exchanges alone, round robin; then farskip under torch.profiler
    6 figures
"""
from __future__ import annotations

import statistics
import time
from typing import Any

import torch
import torch.distributed as dist

from ..calibrate import LATE_S, queued_share
from . import product
from .calibrate import Calibrated, compute_rates, find_rate, link_rates
from .exchanges import Exchange, Recorder, replay, slowest
from .figures import Phase, Spread, bound, hidden, limit
from .model import MAX_NORM, Reference, build, logits_of, relative_difference, tokens
from .parent import Parent
from .pieces import Pieces, rows_per_expert, time_pieces
from .spec import EP, Spec
from .timing import Condition, Step, interleave
from .variants import compile_for_report, connectivity_of, is_ours, is_scheduled, settings_of, ways_of

COMM = "comm_only"
FAST = "fast"


class Measurement:
    def __init__(self, mode: str, spec: Spec, parent: Parent) -> None:
        self.mode, self.spec, self.parent = mode, spec, parent
        self.rank = parent.rank
        self.train, self.means_taken = mode != "forward", mode == "step"
        self.shape = spec.shape(mode)
        self.ids = tokens(self.shape, spec.seed, self.rank)
        self.ours = [name for name in spec.variants if is_ours(name)]
        self.steps: dict[str, Step] = {}
        self.facts: dict[str, dict[str, Any]] = {}          # by label: compile_s, max_diff, how, ...
        self.schedules: dict[str, list[dict]] = {}
        self.reports: dict[str, Any] = {}
        self.exposures: dict[str, dict] = {}

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
        self.references = {name: Reference.of(whole, self.ids, name, self.mode) for name in sorted(wanted)}
        own_rows = torch.tensor(rows_per_expert(whole, self.ids))
        rows = [torch.empty_like(own_rows) for _ in range(self.spec.world)]
        dist.all_gather(rows, own_rows)
        first = self.rank - self.rank % EP                  # of the ranks that share the experts
        local = self.shape.experts // EP
        self.mine = range(self.rank % EP * local, (self.rank % EP + 1) * local)
        self.rows_of_ranks = sum(rows).view(-1, EP, local).sum((0, 2)).tolist()     # over all MoE layers
        sharing = self.parent.sharing
        self.pieces: Pieces = time_pieces(whole, self.ids, sum(rows[first:first + EP]).tolist(), self.mine, sharing)
        self.compute_rates: dict[str, Any] = from_rank_0(compute_rates(self.shape))
        self.model = build(self.shape, self.spec.seed)
        self.parallel = product.shard(self.model, self.spec, means=self.means_taken)
        if self.means_taken:
            self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.0, fused=True)

    def step_of(self, compiled: Any) -> Step:
        return Step(lambda ids: logits_of(compiled, ids), self.model, self.ids, self.train,
                    self.update if self.means_taken else None)

    def update(self) -> None:
        self.norm = product.clip(self.model, MAX_NORM)
        self.optimizer.step()

    # 2 rewire
    def rewire(self) -> None:
        connectivity = self.spec.connectivity if self.ours else "none"
        recorder = Recorder()
        step = self.step_of(compile_for_report(self.model, connectivity, recorder, self.parallel))
        step()
        if self.ours:
            self.parent.tell("layers", mode=self.mode, layers=product.layers(), **self.differences(step, connectivity))
        self.record(step, recorder)
        if not self.flat():
            raise RuntimeError("the sharded model ran without one functional collective; is expert_parallel in effect?")
        step.reset()
        if self.ours and self.spec.inner == "inductor":
            self.say("measuring single kernels")
            self.compute_rates["kernels"] = product.kernels(self.model, self.ids, connectivity, gradients=self.train)

    def record(self, step: Step, recorder: Recorder) -> None:
        """The exchanges of each phase in the order in which they ran, the means of gradients apart."""
        embedding, filled = self.model.get_input_embeddings().weight, []
        hook = embedding.register_post_accumulate_grad_hook(lambda _: filled.append(len(recorder.seen)))
        step.reset()
        recorder.take()
        found = []
        for number, phase in enumerate(step.phases()):
            if number == 0:
                phase()                                     # its backend has the recorder inside
            else:
                with recorder:
                    phase()
            found.append(recorder.take())
        hook.remove()
        averaging = product.groups_of_means(self.parallel) if self.means_taken else set()
        self.exchanges: list[list[Exchange]] = [[e for e in phase if e.group not in averaging] for phase in found]
        self.means = [e for phase in found for e in phase if e.group in averaging]
        # The embedding's gradient is in `.grad` as soon as its bucket has arrived.
        self.last_mean = sum(e.group in averaging for e in found[1][:filled[0]]) - 1 if self.means else 0

    def flat(self) -> list[Exchange]:
        """Forward, backward, the means, clipping."""
        forward, backward, clipping = (self.exchanges + [[], []])[:3]
        return forward + backward + self.means + clipping

    def replay(self) -> list[float]:
        """The exchanges alone, each as long as it takes in a step."""
        return replay(self.flat(), late=LATE_S)

    # 3 rates
    def calibrate(self) -> None:
        self.set_rate(None)
        self.compile("stock", "stock", None)
        step = self.steps["stock"]
        compute = Spread(tuple(tuple(step()) for _ in range(4))).median
        floor = Spread(tuple(tuple(self.replay()) for _ in range(3))).median
        leaving = slowest([sum(exchange.leaving for exchange in self.flat())])[0]
        self.links: dict[float, Calibrated] = {}
        self.rates: dict[float, dict[str, float]] = {}
        for ratio in self.spec.ratios:
            self.parent.say(f"{self.mode}: finding the link rate for comm/compute {ratio:g}")
            self.links[ratio] = find_rate(self.replay_at, leaving_bytes=leaving, target_s=ratio * compute,
                                          floor_s=floor)
            self.set_rate(self.links[ratio].rate)
            wall, busy = time.perf_counter(), time.process_time()
            seconds = Spread(tuple(tuple(self.replay()) for _ in range(4))).phases()
            link = link_rates(self.flat(), list(seconds))
            # gloo's threads share the rank's core: a running exchange takes this part of it away from compute.
            share = (time.process_time() - busy) / (time.perf_counter() - wall)
            link = from_rank_0({**link, "link_compute_share": min(share, 0.9), "link_queued": self.queued(**link)})
            self.rates[ratio] = product.rates(**self.compute_rates, **link) if self.ours else link
        self.set_rate(None)

    def queued(self, link_bytes: float, link_latency: float) -> float:
        """Of a typical exchange of the model."""
        sizes = [exchange.leaving for exchange in self.flat() if not exchange.small]
        size = slowest([statistics.median(sizes)])[0]
        return queued_share(None, torch.device("cpu"), int(size), link_latency + size / link_bytes)

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
        """Labels and rates. Only our schedules depend on the link, so only they are built for every ratio."""
        if is_scheduled(name):
            return [(label_of(name, ratio), self.rates[ratio]) for ratio in self.spec.ratios]
        return [(name, None)]

    def compile(self, label: str, name: str, rates: dict[str, float] | None) -> None:
        if label in self.steps:
            return
        if self.rank == 0:
            self.parent.tell("compiling", mode=self.mode, label=label, expected_s=self.expected_s())
        dist.barrier()
        start, found = time.perf_counter(), []
        for how, run in ways_of(name, self.model, self.spec, rates, self.parallel).items():
            step = self.step_of(run)
            with settings_of(name):
                step()
            found.append((how, step, self.differences(step, connectivity_of(name, self.spec))))
        took = slowest([time.perf_counter() - start])[0]
        speeds = [min(sum(step()) for _ in range(2 if len(found) > 1 else 1)) for _, step, _ in found]      # and warm
        how, step, differences = found[speeds.index(min(speeds))]
        facts = {"compile_s": took, "how": how, **differences}
        step.reset()
        self.steps[label], self.facts[label] = step, facts
        if name == "farskip":
            self.schedules[label], self.reports[label] = product.schedules(), product.last_report()
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
            found["grad_diff"] = max(relative_difference(self.model.get_parameter(name).grad, self.own_part(name, gradient))
                                     for name, gradient in want.gradients.items())
        if self.means_taken:
            found["norm_diff"] = abs(self.norm.item() / want.norm - 1)
        whole = [value if value == value else float("inf") for value in found.values()]
        return dict(zip(found, slowest(whole)))

    def own_part(self, name: str, whole: torch.Tensor) -> torch.Tensor:
        return whole[self.mine.start:self.mine.stop] if ".experts." in name else whole

    # 5 time
    def time(self) -> dict[tuple[str, str], Spread]:
        everywhere = [name for name in self.spec.variants if not is_scheduled(name)] + [COMM]
        ours = [name for name in self.spec.variants if is_scheduled(name)]
        fast = everywhere + [label_of(name, self.spec.main_ratio) for name in ours]
        conditions = [Condition(FAST, None, tuple(fast))]
        for ratio in self.spec.ratios:
            labels = everywhere + [label_of(name, ratio) for name in ours]
            conditions.append(Condition(f"{ratio:g}", self.links[ratio].rate, tuple(labels)))
        timed = {**self.steps, COMM: self.replay}
        times = interleave(timed, conditions, self.set_rate, rounds=self.spec.rounds, budget_s=self.spec.budget_s,
                           say=lambda text: self.parent.say(f"{self.mode}: timing, {text}"))
        self.profile()
        return times

    def profile(self) -> None:
        """Where compute stands still, collective by collective, beside what the schedule predicted."""
        for ratio in self.spec.ratios:
            label = label_of("farskip", ratio)
            if not getattr(self.reports.get(label), "schedules", None):      # ``inner`` may have no schedule
                continue
            self.parent.say(f"{self.mode}: profiling farskip at comm/compute {ratio:g}")
            self.set_rate(self.links[ratio].rate)

            def step(one: Step = self.steps[label]) -> None:
                one.reset()
                for phase in one.phases()[:2]:              # the update is not in our graphs, and clipping communicates
                    phase()

            found = product.exposed(self.reports[label], step)
            measured = torch.tensor(found["measured_ms"])
            dist.all_reduce(measured)                       # a rank waits for the other's lateness, too
            self.exposures[label] = {**found, "measured_ms": measured.item() / self.spec.world}
        self.set_rate(None)

    # 6 figures
    def figures(self, times: dict[tuple[str, str], Spread]) -> dict[str, Any]:
        curve = [self.at_ratio(ratio, times) for ratio in self.spec.ratios]
        main = curve[self.spec.ratios.index(self.spec.main_ratio)]
        first = next(iter(times.values()))
        return {**main, "curve": curve, "rounds": len(first.samples),
                "pieces": {"routers_ms": ms(self.pieces.routers), "routed_experts_ms": ms(self.pieces.routed),
                           "head_ms": ms(self.pieces.head), "last_shared_ms": ms(self.pieces.last_shared)},
                "rows_of_ranks": self.rows_of_ranks,
                "exchanges": [{"kind": exchange.kind, "bytes_leaving": exchange.leaving} for exchange in self.flat()],
                "traffic": self.traffic(), "compute_rates": self.compute_rates, "shape": self.shape.__dict__,
                "dp": self.spec.dp, "ep": EP, "chunks": self.spec.chunks, "ranks_on_a_core": self.parent.sharing}

    def traffic(self) -> dict[str, Any]:
        """Bytes that rank 0 puts on the link in a step."""
        return {"experts_bytes": [sum(e.leaving for e in phase) for phase in self.exchanges],
                "means_bytes": [mean.leaving for mean in self.means],
                "last_mean_bytes": self.means[self.last_mean].leaving if self.means else 0.0}

    def at_ratio(self, ratio: float, times: dict[tuple[str, str], Spread]) -> dict[str, Any]:
        slow, main = f"{ratio:g}", self.spec.main_ratio
        variants = []
        for name in self.spec.variants:
            here = label_of(name, ratio) if is_scheduled(name) else name
            on_fast = times[FAST, label_of(name, main) if is_scheduled(name) else name]
            on_slow = times[slow, here]
            stock_fast, stock_slow = times[FAST, "stock"], times[slow, "stock"]
            variants.append({
                "name": name, "fast_ms": ms(on_fast.median), "slow_ms": ms(on_slow.median),
                "fast_min_ms": ms(on_fast.best), "slow_min_ms": ms(on_slow.best),
                "fast_phases_ms": [ms(phase) for phase in on_fast.phases()],
                "slow_phases_ms": [ms(phase) for phase in on_slow.phases()],
                "speedup_fast": stock_fast.median / on_fast.median,
                "speedup_slow": stock_slow.median / on_slow.median, **self.facts[here]})
        best = next((name for name in ("farskip", "rewired_stock", "stock") if name in self.spec.variants))
        graph = times[FAST, label_of(best, main) if best == "farskip" else best]
        comm = times[slow, COMM]
        phases = self.phases(graph, comm)
        ends = self.ends(comm)
        by_name = {variant["name"]: variant for variant in variants}
        exact = [one for one in variants if connectivity_of(one["name"], self.spec) == "none"]
        result = {
            "ratio": ratio, "variants": variants, "best_exact": min(exact, key=lambda one: one["slow_ms"])["name"],
            "compute_only_ms": ms(graph.median), "compute_only_of": best,
            "comm_only_ms": ms(comm.median), "comm_only_min_ms": ms(comm.best),
            "comm_only_fast_ms": ms(times[FAST, COMM].median),
            "limit_ms": ms(limit(graph.median, comm.median)), "bound_ms": ms(bound(phases)), "ends_ms": ms(ends),
            "bound_parts": [{"compute_ms": ms(p.compute), "alone_ms": ms(p.alone), "exchanges_ms": ms(sum(p.exchanges)),
                             "serial_ms": ms(p.serial), "tail_ms": ms(p.tail), "means_ms": ms(sum(p.means)),
                             "last_mean_ms": ms(p.last), "bound_ms": ms(p.bound)}
                            for p in phases],
            "link_rates": self.rates[ratio], "rate_bits": self.links[ratio].rate,
            "rate_is_close": self.links[ratio].close,
            "schedules": self.schedules.get(label_of("farskip", ratio), []), "hidden": None,
            "exposed": self.exposures.get(label_of("farskip", ratio)),
            "hidden_inner": None, "hidden_of_possible": None,
        }
        if "farskip" in by_name:
            stock, ours = by_name["stock"], by_name["farskip"]
            costs = tuple((one["fast_ms"], one["slow_ms"]) for one in (stock, ours))
            result["hidden"] = hidden(*costs)
            result["hidden_inner"] = hidden(*costs, beyond_reach=ms(ends))
            result["hidden_of_possible"] = hidden(*costs, beyond_reach=result["bound_ms"] - ours["fast_ms"])
            result["over_bound"] = ours["slow_ms"] / result["bound_ms"] - 1
        return result

    def phases(self, graph: Spread, comm: Spread) -> list[Phase]:
        """The measured pieces as figures.py takes them: forward; backward and update where there are any."""
        forward, backward, means = self.alone(comm)
        alone = max(0.0, forward[-1] - self.pieces.last_shared)     # the last combine, but for what a shared expert covers
        found = [Phase(graph.phase(0), forward, self.pieces.routed + self.pieces.routers, alone, self.pieces.head)]
        if self.train:
            beside = self.pieces.routed if self.spec.dp == 1 else 0.0       # experts' weight gradients need no mean
            found.append(Phase(graph.phase(1), backward, self.pieces.routed, max(0.0, min(means, default=0.0) - beside),
                               self.pieces.head, means, means[self.last_mean] if means else 0.0))
        if self.means_taken:
            found.append(Phase(graph.phase(2), (), 0.0, 0.0, 0.0))
        return found

    def ends(self, comm: Spread) -> float:
        """The last forward exchange and the first backward one, which the paper says cannot be hidden; and the last mean."""
        forward, backward, means = self.alone(comm)
        return forward[-1] + (backward[0] if self.train else 0.0) + (means[self.last_mean] if means else 0.0)

    def alone(self, comm: Spread) -> tuple[tuple[float, ...], ...]:
        """Seconds of each exchange alone: forward, backward, means."""
        seconds = comm.phases()
        forward = len(self.exchanges[0])
        backward = forward + (len(self.exchanges[1]) if self.train else 0)
        return seconds[:forward], seconds[forward:backward], seconds[backward:backward + len(self.means)]

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
