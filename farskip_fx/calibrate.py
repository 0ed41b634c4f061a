"""``calibrate``: what this device and this link can do, measured, and the same on every rank.

    rates = fs.calibrate(mesh["ep"])                 # some seconds; from a file the next time
    rates = fs.calibrate(mesh["node"], also=[mesh["local"], mesh["dp"]])     # groups with links of their own
    fs.apply(model, rates=rates)

Matrix products, attention and a loop at one size each, then exchanges of two sizes. Every rank measures; each figure is the
median of all of them, so that all ranks schedule with the same numbers.
"""
from __future__ import annotations

import hashlib
import itertools
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn import functional as F

from .passes._torch import group_shape, process_group
from .passes.costs import Rates
from .routes import ExpertGroup

VERSION = 2
_STREAMED_BYTES = 256 << 20             # more than a cache holds
_SMALL, _LARGE = 1 << 10, 4 << 20       # bytes that leave a rank in an exchange
_REPEATS = 7
_FLIGHTS = 3
LATE_S = 1e-3             # one rank begins so much later, in turn, as in a step


def calibrate(group: dist.ProcessGroup | DeviceMesh | None = None, *, device: torch.device | str | None = None,
              dtype: torch.dtype = torch.float32, hidden: int = 1024, tokens: int = 2048, head_dim: int = 64,
              cache: str | Path | None = "",
              also: Sequence[dist.ProcessGroup | DeviceMesh] = ()) -> Rates:
    """Measure ``Rates``. Collective over ``group``, never inside of a compile.

    Args:
        group: the ranks that exchange tokens; None: the default group, and without one only the device is measured (then
            the link's figures are those of ``Rates()``).
        device: None: this rank's CUDA device if there is one, else the CPU.
        dtype, hidden, tokens, head_dim: of the model; rates depend on sizes.
        also: this rank's groups that have another link than ``group``: inside of a node, or between replicas. They go into
            ``Rates.links``; the call is collective over all ranks then, each with its own groups in the same order.
        cache: a folder; "": the user's cache folder; None: measure in any case. Rank 0's file counts.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    group, *others = (one.get_group() if isinstance(one, DeviceMesh) else one for one in (group, *also))
    ranks = dist.get_world_size(group) if dist.is_initialized() else 1
    links = {group_shape(one.group_name): one for one in others if dist.get_world_size(one) > 1}
    together = None if also else group          # the ranks that agree
    key = [device.type, _name(device), str(dtype), hidden, tokens, head_dim, ranks, torch.__version__]
    file = _file(cache, [*key, *links])
    kept = _shared(_read(file), together)
    if kept is not None:
        return Rates(**kept)
    found = compute_rates(device=device, dtype=dtype, hidden=hidden, tokens=tokens, heads=max(1, hidden // head_dim),
                          head_dim=head_dim, together=(lambda: dist.barrier(group)) if ranks > 1 else None)
    if ranks > 1:
        found |= link_rates(group, device)
    for shape, other in links.items():
        found |= {(shape, name): value for name, value in _link(other, device).items()}
    agreed = _agreed(found, together)
    rates = Rates(links={shape: (agreed.pop((shape, "link_bytes")), agreed.pop((shape, "link_latency"))) for shape in links}, **agreed)
    if file is not None and (not dist.is_initialized() or dist.get_rank(together) == 0):
        _write(file, rates)
    return rates


def calibrate_for(model: nn.Module) -> Rates:
    """``calibrate`` at the sizes of ``model``, over the ranks that its experts are split over, and over both legs of a
    hierarchical exchange."""
    experts = _expert_group(model)
    legs = () if experts is None else experts.levels
    return calibrate(ranks_of(model), also=[process_group(leg.name) for leg in legs], **sizes_of(model))


def ranks_of(model: nn.Module) -> dist.ProcessGroup | None:
    """Those that share its experts; None for a model that is not split."""
    experts = _expert_group(model)
    return None if experts is None else process_group(experts.name)


def _expert_group(model: nn.Module) -> ExpertGroup | None:
    marked = (getattr(p, "_farskip_expert_group", None) for p in model.parameters())
    return next((shard.group for shard in marked if shard is not None), None)


def sizes_of(model: nn.Module) -> dict:
    """What ``calibrate`` wants to know of a model."""
    weight = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    config = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    return {"dtype": weight.dtype, "device": None if weight.is_meta else weight.device,
            "hidden": getattr(config, "hidden_size", 1024), "head_dim": getattr(config, "head_dim", None) or 64}


# --- the device --------------------------------------------------------------------------------------------------

def compute_rates(*, device: torch.device, dtype: torch.dtype, hidden: int, tokens: int, heads: int, head_dim: int,
                  together: Callable[[], None] | None = None) -> dict[str, float]:
    """Fields of ``Rates``, at a model's own sizes: a few seconds.

    Args:
        together: returns on all ranks at once, so that they measure while the others compute, too: cores share caches,
            memory and often their arithmetic.
    """
    width = heads * head_dim
    x, weight = (torch.randn(n, hidden, device=device, dtype=dtype) for n in (tokens, width))
    # A step's values do not come from the cache: go round over enough of them.
    size = x.numel() * x.element_size()
    streams = itertools.cycle([torch.randn_like(x) for _ in range(max(2, _STREAMED_BYTES // size))])
    query = torch.randn(1, heads, tokens, head_dim, device=device, dtype=dtype)
    mask = torch.ones(tokens, tokens, dtype=torch.bool, device=device).tril()[None, None]   # as transformers hands it over
    tiny, rows = torch.ones(8, 8, device=device, dtype=dtype), torch.randperm(tokens, device=device)
    with torch.no_grad():
        overhead = best(lambda: F.linear(tiny, tiny), device)
        # Loops of an MoE mostly permute rows: that is slower than to stream.
        matmul, attention, memory = (max(typical(run, device, together) - overhead, 1e-9) for run in (
            lambda: F.linear(x, weight),
            lambda: F.scaled_dot_product_attention(query, query, query, attn_mask=mask),
            lambda: next(streams)[rows]))
    return {
        "matmul_flops": 2 * tokens * hidden * width / matmul,
        # Of the whole square: with a mask that is data the kernel skips nothing, and the cost model counts it all.
        "attention_flops": 4 * heads * tokens**2 * head_dim / attention,
        "memory_bytes": 2 * size / memory,
        "kernel_overhead": overhead,
    }


def typical(run: Callable[[], object], device: torch.device, together: Callable[[], None] | None, seconds: float = 0.6
            ) -> float:
    """The median time of several runs, with all ranks at work."""
    run()
    if together is not None:
        together()
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < 5 or time.perf_counter() < end:
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def best(run: Callable[[], object], device: torch.device, seconds: float = 0.3, least: int = 3) -> float:
    """The smallest time of several runs, after one that warms up. On a CPU time of this process: one that shares the core
    and runs between adds nothing."""
    on_gpu = device.type == "cuda"
    clock = time.perf_counter if on_gpu else time.process_time
    times: list[float] = []
    end = time.perf_counter() + seconds
    run()
    while len(times) < least or time.perf_counter() < end:
        if on_gpu:
            torch.cuda.synchronize(device)
        start = clock()
        run()
        if on_gpu:
            torch.cuda.synchronize(device)
        times.append(clock() - start)
    return min(times)


# --- the link ----------------------------------------------------------------------------------------------------

def link_rates(group: dist.ProcessGroup | None, device: torch.device) -> dict[str, float]:
    """Fields of ``Rates``: of the link, of several exchanges in flight, and of compute beside one."""
    link = _link(group, device)
    busy, wall = time.process_time(), time.perf_counter()
    alone = _exchange(group, device, _LARGE)
    # gloo's threads share the rank's core: a running exchange takes this part of it away from compute.
    share = 0.0 if device.type == "cuda" else (time.process_time() - busy) / (time.perf_counter() - wall)
    return {**link, "link_queued": queued_share(group, device, _LARGE, alone), "link_compute_share": min(share, 0.9)}


def _link(group: dist.ProcessGroup | None, device: torch.device) -> dict[str, float]:
    """Two sizes of exchanges, each repeated; what grows with the size is the link."""
    small, large = (_exchange(group, device, leaving) for leaving in (_SMALL, _LARGE))
    return {"link_bytes": (_LARGE - _SMALL) / max(large - small, 1e-9), "link_latency": small}


def queued_share(group: dist.ProcessGroup | None, device: torch.device, leaving: int, alone: float) -> float:
    """``Rates.link_queued``: what one more exchange takes where several are launched at once, of the seconds that it takes ``alone``."""
    one, several = (_exchange(group, device, leaving, flights=flights) for flights in (1, _FLIGHTS))
    return min(1.0, max(0.1, (several - one) / (_FLIGHTS - 1) / alone))


def _exchange(group: dist.ProcessGroup | None, device: torch.device, leaving: int, *, flights: int = 1) -> float:
    """Seconds of all-to-alls, each with so many bytes that leave each rank, launched at once; the median."""
    ranks = dist.get_world_size(group)
    each = max(1, leaving // (ranks - 1))
    given = torch.zeros(ranks * each, dtype=torch.uint8, device=device)
    taken = [torch.empty_like(given) for _ in range(flights)]
    times = []
    for number in range(_REPEATS + 1):
        dist.barrier(group)
        start = time.perf_counter()
        if dist.get_rank(group) == number % ranks:
            time.sleep(LATE_S)
        for one in [dist.all_to_all_single(into, given, group=group, async_op=True) for into in taken]:
            one.wait()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(max(time.perf_counter() - start - LATE_S, 1e-6))
    return statistics.median(times[1:])


# --- one answer for all ranks --------------------------------------------------------------------------------------

def _shared(kept: dict | None, group: dist.ProcessGroup | None) -> dict | None:
    """Rank 0's: another rank may have no file, or an older one."""
    if not dist.is_initialized() or dist.get_world_size(group) == 1:
        return kept
    told = [kept]
    dist.broadcast_object_list(told, group=group, group_src=0)
    return told[0]


def _agreed(found: dict, group: dist.ProcessGroup | None) -> dict:
    everyone = gathered(found, group, dist.get_world_size(group) if dist.is_initialized() else 1)
    return {name: statistics.median(one[name] for one in everyone) for name in found}


def gathered(own: object, group: dist.ProcessGroup | None, ranks: int) -> list:
    """What each of the ranks has."""
    if ranks == 1:
        return [own]
    everyone: list = [None] * ranks
    dist.all_gather_object(everyone, own, group=group)
    return everyone


# --- kept --------------------------------------------------------------------------------------------------------

def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()} {platform.node()}"


def _file(cache: str | Path | None, key: list) -> Path | None:
    if cache is None:
        return None
    usual = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "farskip_fx"
    name = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]
    return (Path(cache) if cache else usual) / f"rates-v{VERSION}-{name}.json"


def _read(file: Path | None) -> dict | None:
    """None for what is not there or cannot be read: it is measured again."""
    if file is None:
        return None
    try:
        return Rates(**json.loads(file.read_text(encoding="utf-8"))).to_dict()
    except (OSError, ValueError, TypeError):
        return None


def _write(file: Path, rates: Rates) -> None:
    """Whole or not at all, and for this user only."""
    file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    part = file.with_suffix(f".{os.getpid()}.part")
    part.write_text(json.dumps(rates.to_dict(), indent=1), encoding="utf-8")
    os.replace(part, file)
