"""The speed-ups that FarSkip-Collective reports, beside what the planner says from public figures of the same hardware.

    python -m farskip_fx.plan.published

Contract: nothing is fitted. Where the planner cannot build what was measured, the row says what it builds instead, and why the
two must differ.
"""
from __future__ import annotations

import sys
from dataclasses import dataclass

from . import devices
from .devices import DEVICES, LINKS
from .exchanges import Network
from .planner import Plan, Planner, make
from .traced import Traced, trace


@dataclass(frozen=True, kw_only=True)
class Case:
    """
    Args:
        reported: as published, a factor over standard connectivity; hidden: share of communication that is hidden.
        differs: what is not the same in the plan.
    """
    what: str
    model: str
    training: bool
    device: str
    gpus: int
    ep: int
    reported: str
    hidden: str = ""
    differs: str


# arXiv 2511.11505; figures as in its tables and abstract. Tokens of a rank are not all stated: 4096 is assumed.
CASES = (
    Case(what="train DeepSeek-V2-Lite, 8 x MI325X, EP8", model="deepseek-v2-lite", training=True, device="mi325x", gpus=8, ep=8,
         reported="1.11x", hidden="88.4 %",
         differs="tokens of a rank are assumed; kernels of small experts reach less than half of the peak, so compute was "
                 "longer and the exchanges a smaller part of it; RCCL takes compute units"),
    Case(what="train, 4 nodes, EP32", model="deepseek-v2-lite", training=True, device="mi325x", gpus=32, ep=32,
         reported="1.22x",
         differs="model and network are not in our notes of the paper: DeepSeek-V2-Lite and 400 Gbit/s a device are assumed"),
    Case(what="prefill Llama-4 Scout, 8 x MI300X, vLLM", model="llama-4-scout", training=False, device="mi300x", gpus=8, ep=8,
         reported="1.14x to 1.23x", hidden="95.3 %",
         differs="replicated activations and an all-reduce, fp8; top-1 in an all-to-all carries an eighth of an all-reduce"),
    Case(what="train DeepSeek-V3, 6 layers (71B), EP8", model="deepseek-v3-6-layers", training=True, device="mi325x",
         gpus=8, ep=8, reported="1.04x", hidden="88.9 %",
         differs="tokens of a rank are assumed; the optimizer's part of the step depends on how it is sharded"),
    Case(what="prefill DeepSeek-V3, TP8/EP8", model="deepseek-v3", training=False, device="mi300x", gpus=8, ep=8,
         reported="up to 1.34x", hidden="97.3 %",
         differs="replicated activations, an all-reduce for attention and one for experts, fp8: the planner has data-parallel "
                 "attention and one all-to-all each way, which carries less"),
)


def predicted(case: Case, traced: Traced) -> Plan:
    device = DEVICES[case.device]
    network = Network(LINKS[device.inside], LINKS["infiniband-400g"], 8)
    planner = Planner(traced, devices.rates_of(device, network.inside), network)
    return make(planner, gpus=case.gpus, ep=case.ep, dp=case.gpus // case.ep, device=case.device, link="infiniband-400g")


def row_of(case: Case, plan: Plan) -> list[str]:
    standard, ours = plan.asked.variants[:2]
    exposed, left = (sum(t.exposed for t in one.phases) for one in (standard, ours))
    hidden = 1 - left / exposed if exposed else 0.0
    return [case.what, case.reported, f"{plan.asked.gain:.2f}x", case.hidden or "-", f"{hidden:.0%}",
            f"{plan.asked.link_s / plan.asked.compute_s:.0%}", case.differs]


HEADINGS = ("setting", "reported", "predicted", "hidden, reported", "hidden, predicted", "link over compute", "what differs")


def main() -> int:
    print("| " + " | ".join(HEADINGS) + " |\n|" + "---|" * len(HEADINGS), flush=True)
    traces: dict[tuple[str, bool], Traced] = {}
    for case in CASES:
        key = case.model, case.training
        if key not in traces:
            traces[key] = trace(case.model, tokens=4096, training=case.training)
        print("| " + " | ".join(row_of(case, predicted(case, traces[key]))) + " |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
