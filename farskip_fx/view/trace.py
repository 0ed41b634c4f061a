"""A report as a Chrome trace, for Perfetto and Holistic Trace Analysis; beside a trace that ``torch.profiler`` made, if wanted.

    process  "farskip_fx predicted: forward, after"      one for each phase, before and after
    thread   "compute", or a link between ranks          one for each lane

Before and after begin together, and in each the backward follows the forward.

What Holistic Trace Analysis 0.5 needs for ``get_comm_comp_overlap`` (hta/utils/utils.py, analyzers/communication_analysis.py):

    rank         the first ``"rank": <number>`` in the file, hence ``distributedInfo`` before the events
    an event     ``ts``, ``dur`` and ``cat``; it is a kernel if ``args.stream`` is a number other than -1
    exchange     a kernel whose name matches ``^nccl.*Kernel`` (older versions: contains "ncclKernel")
    compute      a kernel whose name has neither "Memcpy" nor "Sync" in it and begins with neither "Memset" nor "dma"
    steps        where several names have "ProfilerStep" in them, only kernels that were launched in one

It takes all kernels of a file as one device, whatever their process. So only one of before, after and measured gets streams.
"""
from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from pathlib import Path

ORDERS = ("before", "after")
_MOST = 200             # characters of a name
_KERNEL = "kernel"


def trace(report: dict, measured: dict | str | Path | None = None, *, counted: str | None = None) -> dict:
    """The Chrome trace of a report, to be written with ``json.dump``.

    Args:
        report: what ``Report.to_dict`` returns.
        measured: a trace of ``torch.profiler`` (or a file of it, gzipped or not), of the same rank; its events stay as they
            are where it is what is counted, and ours begin with its first kernel (on a CPU, with its first operation).
        counted: what Holistic Trace Analysis sees: "before", "after" or "measured"; None: what was measured on a device, or
            else "after".
    """
    theirs = {} if measured is None else measured if isinstance(measured, dict) else _load(Path(measured))
    events = theirs.get("traceEvents", [])
    counted = counted or ("measured" if any(_is_kernel(e) for e in events) else "after")
    if counted not in (*ORDERS, "measured"):
        raise ValueError(f"counted={counted!r} is not one of 'before', 'after', 'measured'")
    if counted != "measured":
        events = [_uncounted(e) for e in events]
    return {"distributedInfo": {"rank": report["rank"]}, "schemaVersion": 1, **_about(theirs),
            "farskip_fx": {"summary": report["summary"], "model": report["model"], "graph": report["graph"]},
            "traceEvents": [*events, *_predicted(report, counted, pid=_first_free_pid(events), origin=_origin(events))]}


# --- predicted ---------------------------------------------------------------------------------------------------

def _predicted(report: dict, counted: str, *, pid: int, origin: float) -> Iterator[dict]:
    begins = dict.fromkeys(ORDERS, origin)
    for phase in report["phases"]:
        for order in ORDERS:
            yield from _process(f"farskip_fx predicted: {_short(phase['name'])}, {order}", phase[order], pid=pid,
                                origin=begins[order], counted=order == counted)
            pid += 1
            begins[order] += _microseconds(phase[order]["seconds"])


def _process(name: str, timeline: dict, *, pid: int, origin: float, counted: bool) -> Iterator[dict]:
    yield _named("process_name", pid, origin, name=name)
    yield _named("process_labels", pid, origin, labels=f"{timeline['seconds'] * 1e3:.3f} ms, {timeline['exposed_s'] * 1e3:.3f} "
                 f"ms exposed, peak {timeline['peak_bytes'] / 2 ** 20:.1f} MiB")
    yield _named("process_sort_index", pid, origin, sort_index=pid)
    lanes = sorted({e["lane"] for e in timeline["events"]} | {"compute"}, key=lambda lane: (lane != "compute", lane))
    threads = {lane: number for number, lane in enumerate(lanes, 1)}
    for lane, thread in threads.items():
        yield _named("thread_name", pid, origin, thread, name=lane if lane == "compute" else _short(f"link {lane}"))
        yield _named("thread_sort_index", pid, origin, thread, sort_index=thread)
    exchanges = {(c["name"], c["layer"]): c for c in timeline["collectives"]}
    for event in timeline["events"]:
        # Whole microseconds: Holistic Trace Analysis rounds fractions inwards, and short kernels would end before they start.
        start, end = _microseconds(event["start"]), _microseconds(event["start"] + event["seconds"])
        stream = {"stream": threads[event["lane"]]} if counted else {}
        name, about = _compute(event) if event["lane"] == "compute" else _exchange(event, exchanges)
        yield {"ph": "X", "cat": _KERNEL, "name": name, "pid": pid, "tid": threads[event["lane"]], "ts": origin + start,
               "dur": end - start, "args": {**stream, **_place(event), "milliseconds": event["seconds"] * 1e3, **about}}


def _compute(event: dict) -> tuple[str, dict]:
    # Lower case: an operation called "MySync" would be no computation, see above.
    return _short(f"{_where(event)}: {', '.join(event['names']).lower()}"), {"operations": ", ".join(event["names"])}


def _exchange(event: dict, known: dict[tuple, dict]) -> tuple[str, dict]:
    one = known.get((event["names"][0], event["layer"]))
    name = f"ncclKernel_{one['op'] if one else event['names'][0]} {_where(event)}"
    return _short(name), {} if one is None else {
        "node": one["name"], "kind": one["kind"], "group": one["group"], "bytes": one["bytes"],
        "exposed milliseconds": one["exposed_s"] * 1e3, "hidden milliseconds": one["hidden_s"] * 1e3,
        "behind": ", ".join(one["behind"]), "needed by": one["needed_by"]}


def _where(event: dict) -> str:
    if event["layer"] is None:
        return "other"
    part = f" {event['part']}" if event["part"] not in ("", "all") else ""
    return f"layer {event['layer']} {event['block']}{part}"


def _place(event: dict) -> dict:
    return {} if event["layer"] is None else {key: event[key] for key in ("layer", "block", "part")}


def _named(what: str, pid: int, origin: float, thread: int = 0, **args) -> dict:
    return {"ph": "M", "name": what, "pid": pid, "tid": thread, "ts": origin, "args": args}


def _microseconds(seconds: float) -> int:
    return round(seconds * 1e6)


def _short(text: str) -> str:
    return text if len(text) <= _MOST else f"{text[:_MOST - 3]}..."


# --- measured ----------------------------------------------------------------------------------------------------

def _load(path: Path) -> dict:
    data = path.read_bytes()
    return json.loads(gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data)


def _is_kernel(event: dict) -> bool:
    return event.get("cat") == _KERNEL and "stream" in event.get("args", {})


def _uncounted(event: dict) -> dict:
    args = {("measured stream" if key == "stream" else key): value for key, value in event.get("args", {}).items()}
    return {**event, "args": args, "name": event["name"].replace("ProfilerStep", "Profiler step ")}


def _about(theirs: dict) -> dict:
    return {key: value for key, value in theirs.items() if key != "traceEvents"}


def _first_free_pid(events: list[dict]) -> int:
    """Some of torch.profiler's are no numbers ("Spans")."""
    return 1 + max((e["pid"] for e in events if isinstance(e.get("pid"), int)), default=0)


def _origin(events: list[dict]) -> float:
    """Where the first kernel starts; on a CPU, the first operation."""
    for cat in (_KERNEL, "cpu_op"):
        starts = [e["ts"] for e in events if e.get("cat") == cat]
        if starts:
            return min(starts)
    return min((e["ts"] for e in events if e.get("ph") == "X"), default=0)
