"""``profile``: what a compiled model really spends, beside what its schedule predicted.

    report = fs.profile(lambda: model(**batch).loss.backward(), model)
    print(report)

A few steps run under torch.profiler. On a CPU a collective is exposed while its ``wait_tensor`` blocks; on a GPU while its
kernel runs and no other does. Waits and launches stand in the order of the schedule (the fence sees to it), so the n-th in
a step is the n-th of the report.
"""
from __future__ import annotations

import json
import statistics
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from ..convert import converted_of
from ..errors import ConfigError
from ..passes.costs import Rates
from ..report import Phase, Report, last_reports

_STEP = "farskip_step"
_MATMULS = ("mm", "addmm", "bmm", "baddbmm", "linear", "grouped_mm")


@dataclass(frozen=True, kw_only=True)
class Exposure:
    """One collective, seconds a step: median of the steps measured."""
    phase: str
    name: str
    place: str              # "dispatch of layer 3"
    bytes: int
    predicted_s: float      # exposed
    measured_s: float


@dataclass(frozen=True, kw_only=True)
class Cost:
    """One kind of cost, seconds a step. ``rate`` is the field of ``Rates`` behind it."""
    kind: str
    rate: str
    predicted_s: float
    measured_s: float

    @property
    def off(self) -> float:
        """How many times too high or too low, at least 1."""
        low, high = sorted((max(self.predicted_s, 1e-9), max(self.measured_s, 1e-9)))
        return high / low


@dataclass(frozen=True, kw_only=True)
class Profile:
    """What ``profile`` measured. ``trace`` is torch.profiler's own, as JSON."""
    steps: int
    step_s: float
    exposures: tuple[Exposure, ...]
    costs: tuple[Cost, ...]
    rates: Rates            # with which the predicted costs would have been the measured ones
    report: Report
    trace: dict

    @property
    def predicted_s(self) -> float:
        return sum(row.predicted_s for row in self.exposures)

    @property
    def measured_s(self) -> float:
        return sum(row.measured_s for row in self.exposures)

    @property
    def worst(self) -> Cost:
        """The cost whose error is the most seconds."""
        return max(self.costs, key=lambda c: abs(c.predicted_s - c.measured_s))

    def advice(self) -> str:
        """Which cost was most wrong, and how to mend it."""
        if self.worst.off < 1.25:
            return "all costs are predicted within 25 %"
        changed = {c.rate: getattr(self.rates, c.rate) for c in self.costs}
        return (f"most wrong: {self.worst.kind}, predicted {self.worst.predicted_s * 1e3:.3g} ms and measured "
                f"{self.worst.measured_s * 1e3:.3g} ms a step. Schedule with the measured rates, the same on all ranks: rates={{"
                + ", ".join(f'"{name}": {value:.3g}' for name, value in changed.items()) + "}")

    def __str__(self) -> str:
        rows = [f"{self.step_s * 1e3:.4g} ms a step; exposed: predicted {self.predicted_s * 1e3:.3g} ms, measured "
                f"{self.measured_s * 1e3:.3g} ms"]
        rows += [f"  {r.phase} {r.place}: predicted {r.predicted_s * 1e3:.3g} ms, measured {r.measured_s * 1e3:.3g} ms"
                 for r in self.exposures]
        rows += [f"  {c.kind}: predicted {c.predicted_s * 1e3:.3g} ms, measured {c.measured_s * 1e3:.3g} ms" for c in self.costs]
        return "\n".join([*rows, self.advice()])

    def to_trace(self, path: str | Path) -> Path:
        """Write one Chrome trace with torch.profiler's events and the predicted lanes."""
        return self.report.to_trace(path, self.trace)


def profile(step: Callable[[], object], model: nn.Module | None = None, *, steps: int = 3, warmup: int = 1,
            report: Report | None = None) -> Profile:
    """Run ``step`` under torch.profiler, on every rank.

    Args:
        step: one step: a forward, or a forward and the backward.
        model: whose report is compared; None: the last one of this process.
        report: compare this one; what ``explain`` returns (with ``fold=False``), where the compile came out of a cache.

    Raises:
        ConfigError: the model was not compiled with a schedule in this process, or ran other collectives than those.
    """
    from torch.profiler import ProfilerActivity, record_function
    from torch.profiler import profile as torch_profile
    for _ in range(warmup):
        step()
    report = report or _report(model)
    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
    with torch_profile(activities=kinds) as profiler:
        for _ in range(steps):
            with record_function(_STEP):
                step()
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        measured = json.loads(path.read_text(encoding="utf-8"))
    return compare(report, measured)


def compare(report: Report, trace: dict) -> Profile:
    """A report beside a Chrome trace of steps, each inside of a ``farskip_step``."""
    events = [e for e in trace.get("traceEvents", []) if e.get("ph") == "X" and "dur" in e]
    spans = [_span(e) for e in events if e["name"] == _STEP and e.get("cat") != "gpu_user_annotation"]
    if not spans:
        raise ConfigError("this trace has no farskip_step: farskip_fx.profile writes them")
    steps = [[e for e in events if begin <= e["ts"] < end and e["name"] != _STEP] for begin, end in spans]
    on_gpu = any(e.get("cat") == "kernel" for e in events)
    exposed = [(_exposed_kernels if on_gpu else _exposed_waits)(step) for step in steps]
    planned = _planned(report.phases, by="launch_index" if on_gpu else "wait_index")
    if any(len(found) != len(planned) for found in exposed):
        raise ConfigError(f"a step ran {len(exposed[0])} collectives, and the report of {report.graph!r} has {len(planned)}: the "
                          "step must be one forward, or one forward and its backward, of this model and nothing else")
    rows = tuple(Exposure(phase=phase, name=c.name, place=_place(c), bytes=c.bytes, predicted_s=c.exposed_s,
                          measured_s=statistics.median(found[i] for found in exposed))
                 for i, (phase, c) in enumerate(planned))
    step_s = statistics.median(end - begin for begin, end in spans) * 1e-6
    costs = _costs(report.phases, steps, step_s, sum(row.measured_s for row in rows), on_gpu)
    rates = report.config.rates or Rates()
    better = replace(rates, **{c.rate: getattr(rates, c.rate) * c.predicted_s / c.measured_s for c in costs
                               if c.measured_s > 0 and c.predicted_s > 0})
    return Profile(steps=len(steps), step_s=step_s, exposures=rows, costs=costs, rates=better, report=report, trace=trace)


def _report(model: nn.Module | None) -> Report:
    if model is not None and converted_of(model) is None and not last_reports(model):
        raise ConfigError("this model was not compiled by farskip_fx in this process: farskip_fx.apply(model), or "
                          "torch.compile(model, backend=\"farskip\")")
    report = next((r for r in reversed(last_reports(model)) if r.schedules), None)
    if report is None:
        raise ConfigError("no schedule to compare with: the model ran from Inductor's cache, or without overlap. Pass "
                          "report=farskip_fx.explain(model, fold=False, ...), or compile with torch's caches off")
    return report


def _planned(phases: Sequence[Phase], by: str) -> list:
    """(phase, collective) in the order in which a step meets them."""
    return [(phase.name, c) for phase in phases for c in sorted(phase.after.collectives, key=lambda c: getattr(c, by))]


def _place(collective) -> str:
    if collective.layer is None:
        return collective.name
    return f"{collective.part if collective.part != 'all' else collective.block} of layer {collective.layer}"


# --- a trace -----------------------------------------------------------------------------------------------------

def _span(event: dict) -> tuple[float, float]:
    return event["ts"], event["ts"] + event["dur"]


def _operation(event: dict) -> str:
    return event["name"].rpartition("::")[2]


def _exposed_waits(events: Iterable[dict]) -> list[float]:
    """CPU: seconds that each wait blocks, in order."""
    waits = sorted((e for e in events if _operation(e) == "wait_tensor"), key=lambda e: e["ts"])
    return [e["dur"] * 1e-6 for e in waits]


def _exposed_kernels(events: Iterable[dict]) -> list[float]:
    """GPU: seconds of each communication kernel in which no other kernel runs, in order."""
    kernels = sorted((e for e in events if e.get("cat") == "kernel"), key=lambda e: e["ts"])
    busy = _union(_span(e) for e in kernels if "nccl" not in e["name"].lower())
    out = []
    for event in kernels:
        if "nccl" in event["name"].lower():
            begin, end = _span(event)
            covered = sum(max(0.0, min(end, b) - max(begin, a)) for a, b in busy)
            out.append((end - begin - covered) * 1e-6)
    return out


def _union(spans: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    out: list[tuple[float, float]] = []
    for begin, end in sorted(spans):
        if out and begin <= out[-1][1]:
            out[-1] = (out[-1][0], max(out[-1][1], end))
        else:
            out.append((begin, end))
    return out


def _costs(phases: Sequence[Phase], steps: Sequence[Sequence[dict]], step_s: float, exposed_s: float, on_gpu: bool
           ) -> tuple[Cost, ...]:
    """Kernels by kind; what is left of a step is loops. The link as the collectives' own durations."""
    predicted: dict[str, float] = {}
    for phase in phases:
        for name, seconds in phase.operations.items():
            predicted[_kind(name)] = predicted.get(_kind(name), 0.0) + seconds
    names = {name for phase in phases for name in phase.operations}
    measured = {kind: 0.0 for kind in ("matrix products", "attention")}
    for step in steps:
        for event in _outermost(e for e in step if e.get("cat") == "cpu_op" and _operation(e) in names):
            if (kind := _kind(_operation(event))) in measured:
                measured[kind] += event["dur"] * 1e-6 / len(steps)
    rows = []
    if not on_gpu:      # a GPU's operators are launched, not run, when the CPU calls them
        measured["loops and others"] = max(0.0, step_s - exposed_s - sum(measured.values()))
        rows = [Cost(kind=kind, rate=rate, predicted_s=predicted.get(kind, 0.0), measured_s=measured[kind]) for kind, rate in (
            ("matrix products", "matmul_flops"), ("attention", "attention_flops"), ("loops and others", "memory_bytes"))]
    link = sum(c.seconds for phase in phases for c in phase.after.collectives)
    took = sum(_link_seconds(step, on_gpu) for step in steps) / len(steps)
    return tuple(row for row in (*rows, Cost(kind="link", rate="link_bytes", predicted_s=link, measured_s=took))
                 if row.predicted_s or row.measured_s)


def _kind(name: str) -> str:
    if "attention" in name:
        return "attention"
    return "matrix products" if any(word in name for word in _MATMULS) else "loops and others"


def _outermost(events: Iterable[dict]) -> list[dict]:
    """Without those inside another one: a grouped product calls plain ones."""
    out: list[dict] = []
    for event in sorted(events, key=lambda e: (e["ts"], -e["dur"])):
        if not out or event["ts"] >= _span(out[-1])[1]:
            out.append(event)
    return out


def _link_seconds(events: Iterable[dict], on_gpu: bool) -> float:
    """How long collectives ran, one behind the other."""
    runs = [e for e in events if (e.get("cat") == "kernel" and "nccl" in e["name"].lower() if on_gpu
                                  else e["name"].startswith("gloo:"))]
    return sum(b - a for a, b in _union(map(_span, runs))) * 1e-6
