"""A rank of ``bench.generate``: one batch size after the other, each from compiling to the figures."""
from __future__ import annotations

import time
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import StoppingCriteria, StoppingCriteriaList

from .calibrate import compute_rates, find_rate, link_rates
from .exchanges import Exchange, Stub, replay, slowest
from .families import moe_layers
from .figures import Spread
from .generate_spec import GenerateSpec
from .measure import FAST, from_rank_0, ms
from .model import build, reference_logits
from .parent import Parent
from .peers.twin import twin
from .product import rates as rates_of
from .timing import Condition, interleave
from .worker import join, run_rank, scoped_settings

SLOW = "slow"


class Clock(StoppingCriteria):
    """Notes when each token was there; stops nothing."""

    def __init__(self) -> None:
        self.marks: list[float] = []

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        self.marks.append(time.perf_counter())
        return torch.zeros(input_ids.size(0), dtype=torch.bool, device=input_ids.device)


def generate(model: nn.Module, ids: Tensor, new_tokens: int, **more: Any) -> Any:
    return model.generate(ids, max_new_tokens=new_tokens, do_sample=False, eos_token_id=None, pad_token_id=0, **more)


class Batch:
    """One batch size on this rank."""

    def __init__(self, spec: GenerateSpec, parent: Parent, batch: int) -> None:
        self.spec, self.parent, self.batch = spec, parent, batch
        self.prompt = spec.shape.tokens // batch
        generator = torch.Generator().manual_seed(spec.seed + 1)
        self.ids = torch.randint(1, spec.shape.vocab, (batch, self.prompt), generator=generator)
        self.differences: dict[str, float] = {}
        self.models: dict[str, nn.Module] = {}

    def run(self) -> dict[str, Any]:
        import farskip_fx as fs

        self.whole = build(self.spec.shape, self.spec.seed)
        self.sharded = fs.expert_parallel(build(self.spec.shape, self.spec.seed), dist.group.WORLD, exchange="all_reduce")
        self.set_rate(None)
        self.convert("stock", connectivity="none", overlap=False)
        prefill = Spread(tuple((self.timed("stock")[0],) for _ in range(2))).median
        self.find_link(prefill)
        self.convert("farskip", connectivity="farskip", rates=self.rates)
        conditions = [Condition(FAST, None, ("stock", "farskip")), Condition(SLOW, self.link.rate, ("stock", "farskip"))]
        times = interleave({name: lambda name=name: self.timed(name) for name in self.models}, conditions, self.set_rate,
                           rounds=self.spec.rounds, budget_s=self.spec.budget_s, say=lambda text: self.say(f"timing, {text}"))
        return self.figures(times)

    def convert(self, name: str, **options: Any) -> None:
        """Compile a twin in place, and compare every step's logits with a reference that has no cache."""
        import farskip_fx as fs

        self.say(f"compiling {name}")
        model = self.models[name] = fs.apply(twin(self.sharded), inner=self.spec.inner, **options)
        with torch.no_grad():
            out = generate(model, self.ids, self.spec.new_tokens, return_dict_in_generate=True, output_logits=True)
            want = reference_logits(self.whole, out.sequences, options["connectivity"])[:, self.prompt - 1:-1]
        self.differences[name] = slowest([(torch.stack(out.logits, 1) - want).abs().max().item()])[0]
        self.say(f"compiled {name}, max difference from the reference {self.differences[name]:.1e}")

    def timed(self, name: str) -> list[float]:
        """Seconds to the first token, and of each further one."""
        clock = Clock()
        dist.barrier()
        start = time.perf_counter()
        with torch.no_grad():
            generate(self.models[name], self.ids, self.spec.new_tokens, stopping_criteria=StoppingCriteriaList([clock]))
        first, last = clock.marks[0], clock.marks[-1]
        return slowest([first - start, (last - first) / (len(clock.marks) - 1)])

    def find_link(self, prefill_s: float) -> None:
        """The slow link's rate, and what the schedule is told about it."""
        self.say("finding the link rate")
        exchanges = self.all_reduces(self.batch * self.prompt)
        floor = Spread(tuple(tuple(replay(exchanges)) for _ in range(3))).median

        def time_at(rate: int) -> float:
            self.set_rate(rate)
            replay(exchanges)               # TCP finds the new rate
            return Spread(tuple(tuple(replay(exchanges)) for _ in range(3))).median

        self.link = find_rate(time_at, leaving_bytes=sum(one.leaving for one in exchanges), floor_s=floor,
                              target_s=self.spec.ratio * prefill_s)
        self.set_rate(self.link.rate)
        few = self.all_reduces(self.batch)
        self.decode_comm = Spread(tuple(tuple(replay(few)) for _ in range(5))).median
        wall, busy = time.perf_counter(), time.process_time()
        seconds = Spread(tuple(tuple(replay(exchanges)) for _ in range(3))).phases()
        share = (time.process_time() - busy) / (time.perf_counter() - wall)
        link = {**link_rates(exchanges, list(seconds)), "link_compute_share": min(share, 0.9)}
        if few[0].small:
            link["link_latency"] = self.decode_comm / len(few)
        self.rates = rates_of(**from_rank_0({**compute_rates(self.spec.shape), **link}))
        self.set_rate(None)

    def all_reduces(self, tokens: int) -> list[Exchange]:
        """Those of one forward."""
        group = moe_layers(self.sharded)[0].mlp.experts._farskip_experts.group
        payload = Stub((tokens, self.spec.shape.hidden), torch.float32)
        one = Exchange(torch.ops._c10d_functional.all_reduce.default, (payload, "sum", group.name), group.rank, group.size)
        return [one] * len(moe_layers(self.sharded))

    def figures(self, times: dict[tuple[str, str], Spread]) -> dict[str, Any]:
        variants = [{"name": name, "max_diff": self.differences[name],
                     **{f"{what}_{on}_ms": ms(times[on, name].phase(place))
                        for place, what in enumerate(("first", "next")) for on in (FAST, SLOW)}} for name in self.models]
        return {"batch": self.batch, "prompt": self.prompt, "new_tokens": self.spec.new_tokens, "ratio": self.spec.ratio,
                "rounds": len(times[FAST, "stock"].samples), "variants": variants, "rate_bits": self.link.rate,
                "rate_is_close": self.link.close, "prefill_comm_ms": ms(self.link.seconds),
                "decode_comm_ms": ms(self.decode_comm), "rates": self.rates}

    def set_rate(self, rate: int | None) -> None:
        dist.barrier()
        if self.parent.rank == 0:
            self.parent.set_rate(rate)
        dist.barrier()

    def say(self, text: str) -> None:
        self.parent.say(f"batch {self.batch}: {text}")


def measure(spec: GenerateSpec, parent: Parent) -> None:
    join(parent, 2, spec.silence_s)
    for batch in spec.batches:
        with scoped_settings():
            result = Batch(spec, parent, batch).run()
        torch.compiler.reset()
        if parent.rank == 0:
            parent.tell("result", result=result)


if __name__ == "__main__":
    run_rank(GenerateSpec.read, measure)
