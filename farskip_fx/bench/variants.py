"""The variants: each a way to compile the same sharded model. Their order is the order of the tables."""
from __future__ import annotations

from typing import Any, Callable

import torch
from torch import nn

from . import product
from .spec import Spec

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
}


def connectivity_of(name: str, spec: Spec) -> str:
    return spec.connectivity if is_ours(name) else "none"


def is_ours(name: str) -> bool:
    return name in ("rewired_stock", "farskip")


def compile_variant(name: str, model: nn.Module, spec: Spec, rates: dict[str, float] | None) -> Callable[..., Any]:
    """A compiled callable of its own: Dynamo keeps graphs of different backends and options apart."""
    if name == "stock":
        return torch.compile(model, backend=spec.inner, dynamic=False)
    if name == "inductor_overlap":
        if spec.inner != "inductor":
            raise ValueError(f"inductor_overlap needs inner='inductor', not {spec.inner!r}")
        return torch.compile(model, backend="inductor", dynamic=False, options=dict(INDUCTOR_OVERLAP))
    options: dict[str, Any] = {"connectivity": spec.connectivity, "overlap": name == "farskip", "inner": spec.inner,
                               "strict": True}
    if name == "farskip" and rates is not None:
        options["rates"] = rates
    return torch.compile(model, backend=product.backend(), dynamic=False, options=options)


def compile_for_report(model: nn.Module, spec: Spec) -> Callable[..., Any]:
    """Rewired and run as it stands: seconds, where a real build takes a minute."""
    options = {"connectivity": spec.connectivity, "overlap": False, "inner": "eager", "strict": True}
    return torch.compile(model, backend=product.backend(), dynamic=False, options=options)
