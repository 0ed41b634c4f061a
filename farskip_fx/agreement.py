"""Whether all ranks compiled the same program: checked at run time, on request, outside of any compile.

Ranks that run different graphs wait for each other until a timeout, or worse, exchange numbers that do not belong
together. Nothing is compared while a model is compiled: ranks compile at different times, and a collective there would
hang. Call `check_agreement()` after the first step, on every rank; it costs one small collective.

What must be equal in the latest compile of each graph: its connectivity and options, which layers were rewired and what
they read, and the sequence of its collectives: what they are, over which ranks, element type and sizes. A size that is not
known to the compiler matches any other, and so do the rows of an exchange between experts, which are as many as the router
says. Of schedules, where both ranks made one (a rank that found its graph in Inductor's cache has none), the order of launches.
"""
from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from typing import NamedTuple

import torch.distributed as dist
from torch import nn
from torch.fx import GraphModule, Node

from .data_parallel import averaged
from .errors import CollectiveError
from .passes._torch import process_group
from .passes.dataflow import op_name, value_of
from .passes.places import place_of
from .report import Report, last_reports
from .sharding import unshard_bucket

__all__ = ["check_agreement"]

_KINDS = ("all_to_all_single", "all_reduce", "all_gather_into_tensor", "reduce_scatter_tensor", "broadcast",
          "rounded_all_to_all",                     # with a payload
          "copy_to_group", "sum_over_group",        # of exchange="all_reduce": all-reduces, of the backward and the forward
          "unshard")                                # of one sharded parameter: an all-gather
_BUCKETS = {averaged: "all_reduce of gradients", unshard_bucket: "all_gather of parameters"}


class Collective(NamedTuple):
    """One collective of a Dynamo graph. `sizes` has None where the compiler does not know."""

    op: str
    ranks: tuple[int, ...]
    dtype: str
    sizes: tuple[int | None, ...]
    layer: int | None = None            # of the decoder, where it belongs to one

    def __str__(self) -> str:
        sizes = ", ".join("?" if s is None else str(s) for s in self.sizes)
        return f"{self.op} of {self.dtype} [{sizes}] over ranks {list(self.ranks)}"


def collectives_of(gm: GraphModule) -> tuple[Collective, ...]:
    """In the order of the graph, with those in its subgraphs; means of gradients as their all-reduce."""
    graphs = [m.graph for m in gm.modules() if isinstance(m, GraphModule)]
    return tuple(found for graph in graphs for node in graph.nodes if (found := _collective(node)) is not None)


def _collective(node: Node) -> Collective | None:
    if node.target in _BUCKETS:
        group, _, _, dtype, _ = node.args[0]
        numel = sum(p.numel() if (p := value_of(n)) is not None else 0 for n in node.all_input_nodes)
        return Collective(_BUCKETS[node.target], _ranks(group), dtype.removeprefix("torch."), (numel,))
    place = place_of(node)
    layer = place.layer if place is not None else None
    op = op_name(node)
    if op.rstrip("_").removesuffix("_coalesced") not in _KINDS:
        return None
    group = next((a for a in reversed([*node.args, *node.kwargs.values()]) if isinstance(a, str)), "")
    value = value_of(node)
    if not hasattr(value, "shape"):         # several tensors in one
        return Collective(op, _ranks(group), "several tensors", (), layer)
    sizes = [s if isinstance(s, int) else None for s in value.shape]
    if op.startswith("all_to_all_single") and any(isinstance(s, Node) for s in itertools.chain(*node.args[1:3])):
        sizes[0] = None                     # rows as the router says
    return Collective(op, _ranks(group), str(value.dtype).removeprefix("torch."), tuple(sizes), layer)


def _ranks(group: str) -> tuple[int, ...]:
    try:
        return tuple(dist.get_process_group_ranks(process_group(group)))
    except (KeyError, LookupError, RuntimeError, ValueError):      # no group of this process
        return ()


def check_agreement(what: Report | Sequence[Report] | nn.Module | None = None,
                    group: dist.ProcessGroup | None = None) -> None:
    """Raise on all ranks if one of them compiled something else. Collective over `group`.

    Args:
        what: reports, or a model that was converted by `apply`, for its own; None for all of this process.
        group: the ranks to compare; None for all.

    Raises:
        CollectiveError: names a rank that differs, and the first collective that does.
    """
    if not dist.is_initialized():
        return
    group = dist.group.WORLD if group is None else group
    ranks = dist.get_process_group_ranks(group)
    everyone: list = [None] * len(ranks)
    dist.all_gather_object(everyone, _programs(what), group=group)
    programs = dict(zip(ranks, everyone))
    # Most ranks are right: what the largest number has is the reference.
    kinds: dict[str, list[int]] = {}
    for rank, own in programs.items():
        kind = repr([({**found, "launches": None}, [call._replace(ranks=()) for call in calls]) for found, calls in own])
        kinds.setdefault(kind, []).append(rank)
    reference = max(kinds.values(), key=len)[0]
    for rank in ranks:
        difference = _difference(rank, reference, programs)
        if difference is not None:
            raise CollectiveError(f"the ranks compiled different programs: {difference}. Give all ranks the same "
                                  "model, options and sizes, and have them compile in the same order")


def _programs(what) -> list[tuple[dict[str, object], list[Collective]]]:
    """(options and layers of a graph, its collectives), the latest compile of each, in the order of the first."""
    if isinstance(what, Report):
        reports = [what]
    elif what is None or isinstance(what, nn.Module):
        reports = last_reports(what)
    else:
        reports = list(what)
    latest: dict[str, tuple] = {}
    for report in reports:
        if report.layers or report.collectives:
            options = {**report.config.to_dict(), "data_parallel": report.config.data_parallel is not None}
            del options["strict"]
            found = {"name": report.graph, **options, "layers found": len(report.layers),
                     "layers rewired": [layer.index for layer in report.layers if layer.rewired],
                     "reads": [f"layer {x.index}: {x.attention_reads}; {x.mlp_reads}" for x in report.layers],
                     "launches": [f"{c.op} ({c.block or 'no'} block of layer {c.layer})" for p in report.phases
                                  for c in sorted(p.after.collectives, key=lambda c: c.launch_index)]}
            latest[report.graph + json.dumps(options, sort_keys=True)] = (found, list(report.collectives))
    return list(latest.values())


def _difference(rank: int, reference: int, programs: dict[int, list]) -> str | None:
    """The first thing in which a rank differs: from the reference, or from the ranks it shares a collective with."""
    for number, (own, other) in enumerate(itertools.zip_longest(programs[rank], programs[reference])):
        calls = itertools.zip_longest(own[1] if own else (), other[1] if other else ())
        first = next((_at(index, rank, mine, reference, theirs) for index, (mine, theirs) in enumerate(calls)
                      if mine is None or theirs is None or not _alike(mine, theirs)), None)
        if own is None or other is None:
            missing = rank if own is None else reference
            return f"rank {missing} has no graph {number}; {first or 'it has no collectives'}"
        odd = {key: f"{key} is {value} on rank {rank}, and {other[0][key]} on rank {reference}"
               for key, value in own[0].items() if value != other[0][key]}
        # These follow from the others, and a rank that found its graph in a cache has no schedule.
        follow = [_first_unequal(key, rank, own[0][key], reference, other[0][key]) for key in ("reads", "launches")
                  if odd.pop(key, None) and own[0][key] and other[0][key]]
        if odd or follow or first is not None:
            return f"graph {number}: " + "; ".join([*(list(odd.values()) or follow), first or "their collectives are the same"])
        for index, mine in enumerate(own[1]):
            for member in mine.ranks:       # another group than the reference's, perhaps
                theirs = next(iter(programs.get(member, programs[rank])[number:]), ("", ()))[1][index:]
                if not theirs or theirs[0].ranks != mine.ranks:
                    return _at(index, rank, mine, member, theirs[0] if theirs else None)
    return None


def _first_unequal(key: str, rank: int, mine: Sequence[str], other: int, theirs: Sequence[str]) -> str:
    index, (one, two) = next((i, pair) for i, pair in enumerate(itertools.zip_longest(mine, theirs)) if pair[0] != pair[1])
    return f"{key}: number {index} is {one!r} on rank {rank}, and {two!r} on rank {other}"


def _at(index: int, rank: int, mine: Collective | None, other: int, theirs: Collective | None) -> str:
    return f"collective {index} is {mine or 'missing'} on rank {rank}, and {theirs or 'missing'} on rank {other}"


def _alike(a: Collective, b: Collective) -> bool:
    """Apart from which ranks: another expert group has others, but as many."""
    return (a.op == b.op and len(a.ranks) == len(b.ranks) and a.dtype == b.dtype and len(a.sizes) == len(b.sizes)
            and all(p == q or p is None or q is None for p, q in zip(a.sizes, b.sizes)))
