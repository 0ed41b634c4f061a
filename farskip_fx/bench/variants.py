"""The variants: each a way to run the same sharded model. Their order (``spec.ORDER``) is the order of the tables.

In mode step all of them average gradients in the graph, in the same buckets: without that stock would reduce after the
whole backward, and lose by more.
"""
from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, Callable

import torch
from torch import nn

from . import peers, product
from .exchanges import Recorder
from .peers.twin import twin
from .spec import PEERS, Spec

# As recommended beside this option in torch/_inductor/config.py.
INDUCTOR_OVERLAP = {
    "reorder_for_compute_comm_overlap": True,
    "reorder_for_compute_comm_overlap_passes": [
        "reorder_communication_preserving_peak_memory",
        "sink_waits_iterative",
        "reorder_communication_preserving_peak_memory",
    ],
}
WHAT = {
    "stock": "standard connectivity, stock Inductor",
    "inductor_overlap": "standard connectivity, Inductor's overlap passes",
    "rewired_stock": "rewired, stock Inductor",
    "farskip": "rewired, scheduled and fenced",
    "exact_chunks": "standard connectivity, exchanges in chunks, scheduled and fenced",
    "farskip_chunks": "as farskip, exchanges in chunks",
    "farskip_int8": "as farskip, rows and their gradients travel in int8",
    **peers.WHAT,
}


def connectivity_of(name: str, spec: Spec) -> str:
    return spec.connectivity if is_ours(name) else peers.CONNECTIVITY.get(name, "none")


def is_ours(name: str) -> bool:
    """Rewired."""
    return name == "rewired_stock" or name.startswith("farskip")


def is_scheduled(name: str) -> bool:
    """By our passes, for one link: built for each of them."""
    return name.startswith("farskip") or name == "exact_chunks"


def sharding_of(name: str, spec: Spec) -> dict[str, Any]:
    """Options of ``expert_parallel`` in which a variant differs from the others."""
    if name.endswith("_chunks"):
        return {"chunks": spec.chunks}
    return {"payload": "int8", "backward_payload": "int8"} if name.endswith("_int8") else {}


def ways_of(name: str, model: nn.Module, spec: Spec, rates: dict[str, float] | None,
            parallel: Any = None) -> dict[str, Callable[..., Any]]:
    """Callables by what they are called; the fastest counts. A variant that is not a peer is one."""
    if name in PEERS:
        return peers.ways(name, model, spec)
    return {"compiled": compile_variant(name, model, spec, rates, parallel)}


def compile_variant(name: str, model: nn.Module, spec: Spec, rates: dict[str, float] | None,
                    parallel: Any = None) -> Callable[..., Any]:
    """A compiled callable of its own: Dynamo keeps graphs of different backends and options apart.

    Args:
        parallel: how gradients are averaged (``product.shard``); None, they are not.
    """
    if name == "inductor_overlap" and spec.inner != "inductor":
        raise ValueError(f"inductor_overlap needs inner='inductor', not {spec.inner!r}")
    if sharding := sharding_of(name, spec):
        model = product.reshard(twin(model), **sharding)
    if parallel is None and name == "stock":
        return torch.compile(model, backend=spec.inner, dynamic=False)
    if parallel is None and name == "inductor_overlap":
        return torch.compile(model, backend="inductor", dynamic=False, options=dict(INDUCTOR_OVERLAP))
    options: dict[str, Any] = {"connectivity": connectivity_of(name, spec), "overlap": is_scheduled(name),
                               "inner": spec.inner, "strict": True}
    if parallel is not None:
        options["data_parallel"] = parallel
    if is_scheduled(name) and rates is not None:
        options["rates"] = rates
    # A backend of its own: stock and inductor_overlap have equal options, and Dynamo would take one's graph for the other.
    return torch.compile(model, backend=lambda gm, inputs: product.backend()(gm, inputs, options=options), dynamic=False)


def settings_of(name: str) -> AbstractContextManager:
    """What a variant's first step, which compiles it, runs under: our backend has no options for Inductor."""
    if name != "inductor_overlap":
        return nullcontext()
    import torch._inductor.config as inductor
    return inductor.patch(INDUCTOR_OVERLAP)


def compile_for_report(model: nn.Module, connectivity: str, recorder: Recorder, parallel: Any = None) -> Callable[..., Any]:
    """Rewired and run as it stands: seconds, where a real build takes a minute. ``recorder`` notes its exchanges."""
    options: dict[str, Any] = {"connectivity": connectivity, "overlap": False, "inner": "eager", "strict": True}
    if parallel is not None:
        options["data_parallel"] = parallel
    backend = recorder.inside(product.backend())
    return torch.compile(model, backend=lambda gm, inputs: backend(gm, inputs, options=options), dynamic=False)
