"""``profile_kernels``: seconds of each matrix product and attention of a model, measured on this device at its own shape.

    rates = fs.profile_kernels(model, input_ids=ids)        # of device and link, and of each kernel
    fs.apply(model, rates=rates)

One rate for all products is wrong for some of them: experts' are small, those of weight gradients are tall. The graphs come
from ``explain``, so nothing of the model runs; equal kernels are measured once.
"""
from __future__ import annotations

import dataclasses
import itertools
import statistics
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.fx import Node
from torch.fx.node import map_aggregate

from .calibrate import calibrate_for, gathered, ranks_of, typical
from .diagnose.explain import predicted_graphs
from .passes._torch import size_hint
from .passes.costs import Rates, kernel_key

_FAILS = (RuntimeError, TypeError, ValueError, IndexError)      # NotImplementedError is a RuntimeError
_SECONDS = 0.15                 # for each kernel
_COLD_BYTES = 64 << 20          # a step's weights do not come from the cache: go round over so many
_MOST_COPIES = 16


def profile_kernels(model: nn.Module, *args, rates: Rates | None = None, config=None, gradients: bool | None = None,
                    **inputs) -> Rates:
    """``Rates`` with ``kernels``: each is the median of all ranks. Collective over the ranks that share the experts, never
    inside of a compile.

    Args:
        model, args, inputs, config, gradients: as for ``explain``; shapes are those of this call.
        rates: of everything that is not a kernel with flops; None: ``calibrate`` measures them.

    A kernel that cannot run alone keeps its formula.
    """
    base = calibrate_for(model) if rates is None else rates
    nodes = kernels_of(model, *args, config=config, gradients=gradients, **inputs)
    return dataclasses.replace(base, kernels=measured(nodes, ranks_of(model)))


def kernels_of(model: nn.Module, *args, config=None, gradients: bool | None = None, **inputs) -> dict[str, Node]:
    """One node for each kernel of ``model``, converted or not, by its key."""
    graphs = predicted_graphs(model, *args, config=config, gradients=gradients, **inputs)
    found: dict[str, Node] = {}
    for node in itertools.chain.from_iterable(graph.graph.nodes for graph in graphs):
        if isinstance(node.target, torch._ops.OpOverload) and (key := kernel_key(node)):
            found.setdefault(key, node)
    return found


def measured(nodes: dict[str, Node], group: dist.ProcessGroup | None) -> dict[str, float]:
    """Seconds by key, the same on all ranks of ``group``; None: this rank alone."""
    ranks = 1 if group is None else dist.get_world_size(group)
    everyone = gathered(sorted(nodes), group, ranks)
    shared = [key for key in everyone[0] if all(key in one for one in everyone)]        # in one order
    together = None if group is None else lambda: dist.barrier(group)
    own = {key: _seconds(nodes[key], together) for key in shared}
    found = gathered(own, group, ranks)
    return {key: statistics.median(one[key] for one in found) for key in shared if all(one[key] for one in found)}


def _seconds(node: Node, together: Callable[[], None] | None) -> float | None:
    """None: it does not run alone, here at least."""
    with torch.no_grad():
        run = _runnable(node)
        if together is not None:            # all at once; a rank that cannot run it comes here, too
            together()
        return None if run is None else typical(run, _first(node).device, None, seconds=_SECONDS)


def _runnable(node: Node) -> Callable[[], object] | None:
    try:
        first = _inputs(node)
        node.target(*first[0], **first[1])
        size = sum(t.numel() * t.element_size() for t in (*first[0], *first[1].values()) if isinstance(t, Tensor))
        copies = [first, *(_inputs(node) for _ in range(min(_MOST_COPIES, _COLD_BYTES // max(size, 1))))]
    except _FAILS:
        return None
    turn = itertools.cycle(copies)

    def run():
        args, kwargs = next(turn)
        return node.target(*args, **kwargs)
    return run


def _inputs(node: Node) -> tuple[tuple, dict]:
    """Arguments of the shapes, strides and types that the graph has; rows are even over groups."""
    def real(value):
        value = value.meta["val"] if isinstance(value, Node) else value
        if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
            return size_hint(value)
        return _like(value, rows) if isinstance(value, Tensor) else value

    rows = size_hint(_first(node).shape[0])
    return map_aggregate(node.args, real), map_aggregate(node.kwargs, real)


def _like(fake: Tensor, rows: int) -> Tensor:
    sizes, strides = ([size_hint(n) for n in given] for given in (fake.shape, fake.stride()))
    out = torch.empty_strided(sizes, strides, dtype=fake.dtype, device=fake.device)
    if fake.dtype.is_floating_point:
        return out.normal_()
    if fake.dtype == torch.bool:
        return out.fill_(True)
    if out.dim() == 1 and out.numel():      # where each group of a grouped product ends
        return out.copy_(torch.arange(1, out.numel() + 1) * rows // out.numel())
    return out.zero_()


def _first(node: Node) -> Tensor:
    return node.all_input_nodes[0].meta["val"]
