"""Data parallelism beside expert parallelism: gradients are averaged inside the compiled backward.

Contract
    `data_parallel(model, group)` makes the process groups and returns what the backend needs to know; nothing of the model
    is changed. Compiled with it, each gradient that `backward()` leaves in `.grad` is the mean over all ranks' data, and
    equal, bit for bit, on the ranks that hold the same parameter.

        mesh = init_device_mesh("cuda", (dp, ep), mesh_dim_names=("dp", "ep"))
        farskip_fx.expert_parallel(model, mesh["ep"])
        farskip_fx.apply(model, data_parallel=mesh["dp"])
        # or: torch.compile(model, backend="farskip", options={"data_parallel": farskip_fx.data_parallel(model, mesh["dp"])})

Which ranks
    dense       a parameter that every rank holds: mean over dp x ep, for each rank of the expert group has its own tokens
    expert      a shard of `expert_parallel` (by its mark, never by name): summed over dp, the ranks that hold the same
                experts. Its gradient is that of the sum over the expert group already, so it is divided by dp x ep
                (`exchange="all_to_all"`), or by dp (`"all_reduce"`, where the expert group shares one batch).

Sharded
    `shard=True` keeps of each dense parameter only this rank's rows (`sharding.py`): the whole is gathered in the graph in
    front of its use, in the forward and again in the backward, and the means come scattered. With the optimizer's state
    that is 1 / (dp x ep) of the dense memory.

How
    An identity over a bucket of parameters stands where they enter the graph; its backward is one all-reduce
    (`passes/data_parallel.py`). So AOTAutograd puts functional collectives into the backward graph, and our schedule moves
    them like the exchanges of the experts. They have process groups of their own: NCCL runs one group as one queue.
"""
from __future__ import annotations

import functools
import math
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.fx import GraphModule, Node

from .collectives import all_reduce
from .errors import ConfigError, GradientError
from .expert_parallel import ExpertShard, _sharded_modules
from .passes._torch import process_group, timeout_of
from .passes.data_parallel import Entrance, gathers_of, in_buckets, insert_gathers, insert_means
from .sharding import MARK, DenseShard, dense_shards, shard_dense, unshard_bucket

__all__ = ["DataParallel", "clip_grad_norm_", "data_parallel", "no_sync", "reduce_gradients"]


@dataclass(frozen=True, kw_only=True)
class DataParallel:
    """Which ranks share what, as plain values; made by `data_parallel`.

    Attributes:
        dense_group, dense_size: the group over which dense gradients are averaged (dp x ep), and its size.
        expert_group, expert_size: the group that holds the same experts (dp).
        bucket_mb: gradients of so many MiB travel together.
    """
    dense_group: str
    dense_size: int
    expert_group: str
    expert_size: int
    bucket_mb: float = 25.0

    def mean_of(self, parameter: Tensor) -> Mean:
        """How the gradients of one parameter are averaged."""
        shard = _shard_of(parameter)
        if shard is None:
            return Mean(self.dense_group, self.dense_size, self.dense_size)
        divisor = self.expert_size if shard.exchange == "all_reduce" else self.dense_size
        return Mean(self.expert_group, self.expert_size, divisor)


class Mean(NamedTuple):
    """The sum over a group, divided."""
    group: str
    size: int
    divisor: int


def data_parallel(model: nn.Module, group: DeviceMesh | dist.ProcessGroup | None = None, *,
                  bucket_mb: float = 25.0, shard: bool = False) -> DataParallel:
    """Make the process groups for averaging gradients. Collective: every rank calls it, after `expert_parallel`.

    A parameter whose gradient is made outside of the compiled graph would miss the average, and the replicas would drift
    apart; so from here on `backward()` raises `GradientError` for one that no compiled graph has averaged.

    Args:
        model: sharded by `expert_parallel`, or without experts (then every parameter is dense).
        group: the ranks with a replica of this rank's experts: a 1-D DeviceMesh (`mesh["dp"]`) or a process group. None: no
            replicas (dp = 1), only the ranks of the expert group average their dense parameters.
        bucket_mb: MiB of gradients in one collective, at most; a small model has smaller buckets.
        shard: keep of each dense parameter only this rank's rows, as FSDP2 does; in place, before the optimizer is made.
            Every rank must have equal weights.

    Raises:
        ConfigError: torch.distributed is not initialised; a mesh of several dimensions; experts in several groups; groups
            that do not form a grid.
    """
    if not (dist.is_available() and dist.is_initialized()):
        raise ConfigError("data_parallel needs torch.distributed: call torch.distributed.init_process_group first (under "
                          "torchrun)")
    if not isinstance(bucket_mb, (int, float)) or bucket_mb <= 0:
        raise ConfigError(f"bucket_mb must be a positive number of MiB, got {bucket_mb!r}")
    replicas, expert = _ranks(group), _expert_ranks(model)
    # Each replica tells the ranks of its expert group; with the replicas of those, that is the grid.
    rows = [expert] * len(replicas)
    if len(replicas) > 1:
        dist.all_gather_object(rows, expert, group=_process_group(group))
    everyone = sorted({rank for row in rows for rank in row})
    if len(everyone) != len(replicas) * len(expert):
        raise ConfigError(f"the {len(replicas)} replicas {replicas} and their expert groups {rows} do not form a grid: build "
                          'both from one 2-D mesh, init_device_mesh(device, (dp, ep), mesh_dim_names=("dp", "ep"))')
    parallel = DataParallel(dense_group=_own_group(tuple(everyone)), dense_size=len(everyone),
                            expert_group=_own_group(tuple(replicas), "experts"), expert_size=len(replicas),
                            bucket_mb=float(bucket_mb))
    model._farskip_data_parallel = parallel
    mark_shards(model)
    if shard:
        shard_dense(model, parallel.dense_group, len(everyone), everyone.index(dist.get_rank()))
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter not in _watched and not hasattr(parameter, MARK):
            _watched.add(parameter)
            parameter.register_post_accumulate_grad_hook(functools.partial(_require_average, name))
    return parallel


def _process_group(group) -> dist.ProcessGroup:
    if isinstance(group, DeviceMesh):
        if group.ndim != 1:
            raise ConfigError(f"data_parallel needs one mesh dimension, got {group.ndim} ({group.mesh_dim_names}): pass e.g. "
                              'mesh["dp"], the ranks with the same experts; expert_parallel knows the others')
        return group.get_group()
    if not isinstance(group, dist.ProcessGroup):
        raise ConfigError(f"data_parallel takes a DeviceMesh, a process group or None, got {type(group).__name__}")
    return group


def _ranks(group) -> list[int]:
    return [dist.get_rank()] if group is None else sorted(dist.get_process_group_ranks(_process_group(group)))


def _expert_ranks(model: nn.Module) -> list[int]:
    """The ranks that together hold this rank's experts once."""
    names = {shard.group.name for p in model.parameters() if (shard := _shard_of(p)) is not None}
    if len(names) > 1:
        raise ConfigError(f"the experts of this model are sharded over {len(names)} different groups; data_parallel needs one: "
                          "call expert_parallel once for the whole model")
    if not names:
        return [dist.get_rank()]
    return sorted(dist.get_process_group_ranks(process_group(names.pop())))


def _shard_of(parameter: Tensor) -> ExpertShard | None:
    """The mark of `expert_parallel`."""
    return getattr(parameter, "_farskip_expert_group", None)


def _slice_of(parameter: Tensor) -> DenseShard | None:
    """The mark of `sharding`."""
    return getattr(parameter, MARK, None)


def mark_shards(model: nn.Module) -> None:
    """Put the marks on the parameters of a model that may be a deepcopy of a sharded one: a copied parameter has none."""
    for _, module in _sharded_modules(model):
        for name in module._farskip_experts.parameters:
            getattr(module, name)._farskip_expert_group = module._farskip_experts
    for _, module, name, shard in dense_shards(model):
        setattr(module._parameters[name], MARK, shard)


_groups: weakref.WeakKeyDictionary[dist.ProcessGroup, dict] = weakref.WeakKeyDictionary()
"""Default group -> {(ranks, use): the group of our own}."""


def _own_group(ranks: tuple[int, ...], use: str = "dense") -> str:
    """A group for one kind of traffic, made once. Only its ranks take part in making it."""
    made = _groups.setdefault(dist.group.WORLD, {})
    if (ranks, use) not in made:
        made[ranks, use] = dist.new_group(list(ranks), use_local_synchronization=True, timeout=timeout_of(dist.group.WORLD),
                                          group_desc=f"farskip_{use}_gradients")
    return made[ranks, use].group_name


# ---------------------------------------------------------------------------------------------------------------------
# In the graph
# ---------------------------------------------------------------------------------------------------------------------


class _Average(torch.autograd.Function):
    """Parameters as they are; their gradients averaged, in one collective."""

    @staticmethod
    def forward(ctx, mean: Mean, *parameters: Tensor):
        ctx.mean = mean
        return tuple(p.view_as(p) for p in parameters)

    @staticmethod
    def backward(ctx, *gradients: Tensor):
        return None, *_averages(gradients, ctx.mean)


def _averages(gradients, mean: Mean) -> list[Tensor]:
    """Divided before the sum: it does not overflow then in 16 bits."""
    if mean.size == 1:
        return [g / mean.divisor for g in gradients]
    flat = all_reduce(torch.cat([g.reshape(-1) for g in gradients]) / mean.divisor, mean.group)
    parts = flat.split([g.numel() for g in gradients])
    return [part.view(g.shape) for part, g in zip(parts, gradients)]


def averaged(kind: tuple, *parameters: Tensor) -> tuple[Tensor, ...]:
    """What stands in the Dynamo graph: a bucket of parameters of one ``kind``, which begins with the fields of a Mean."""
    return _Average.apply(Mean(*kind[:3]), *parameters)


_PARTS, _SMALLEST = 8, 1 << 18      # buckets at least, bytes of a bucket worth a collective


def average_gradients(gm: GraphModule, example_inputs: list, parallel: DataParallel, *, paused: bool = False) -> int:
    """Insert the means into a Dynamo graph, for each trainable parameter that enters it; the number of buckets.

    Args:
        paused: inside `no_sync`. Slices are gathered, and their gradients averaged and scattered, all the same.
    """
    limit = int(parallel.bucket_mb * 2**20)
    found: dict[int, tuple[nn.Parameter, list[Node]]] = {}      # a tied one comes in several times
    for node, value in zip(gm.graph.find_nodes(op="placeholder"), example_inputs):
        if isinstance(value, nn.Parameter):
            found.setdefault(id(value), (value, []))[1].append(node)
    gathered = in_buckets(gm.graph, _gathers(found.values()), limit)
    if gathered:
        insert_gathers(gm.graph, gathered, unshard_bucket)
    if paused:
        return len(gathered)
    entrances = []
    for parameter, nodes in found.values():
        if not parameter.requires_grad or hasattr(parameter, MARK):
            continue
        _averaged.add(parameter)
        mean = parallel.mean_of(parameter)
        if mean.divisor > 1:
            kind = (*mean, str(parameter.dtype), str(parameter.device))
            entrances.append(Entrance(nodes=tuple(nodes), kind=kind, size=parameter.nbytes))
    # What leaves last is hidden by nothing, so a small model must not be one bucket.
    limit = min(limit, max(sum(e.size for e in entrances) // _PARTS, _SMALLEST))
    buckets = in_buckets(gm.graph, entrances, limit)
    if buckets:
        insert_means(gm.graph, buckets, averaged)
    return len(gathered) + len(buckets)


def _gathers(parameters: Iterable[tuple[nn.Parameter, list[Node]]]) -> list[Entrance]:
    """Sliced parameters that become whole in this graph."""
    entrances = []
    for part, entering in parameters:
        shard = _slice_of(part)
        nodes = tuple(gather for node in entering for gather in gathers_of(node)) if shard is not None else ()
        if nodes:
            kind = (shard.group, shard.size, part.requires_grad, str(part.dtype), str(part.device))
            entrances.append(Entrance(nodes=nodes, kind=kind, size=part.nbytes * shard.size, length=shard.shape[0]))
    return entrances


class _Parameters:
    """A set of parameters that does not keep them alive (tensors compare elementwise, so no WeakSet)."""

    def __init__(self) -> None:
        self._known: dict[int, weakref.ref] = {}

    def add(self, parameter: Tensor) -> None:
        key = id(parameter)
        self._known[key] = weakref.ref(parameter, lambda _: self._known.pop(key, None))

    def __contains__(self, parameter: Tensor) -> bool:
        known = self._known.get(id(parameter))
        return known is not None and known() is parameter


_averaged, _watched = _Parameters(), _Parameters()      # by a compiled graph; with the hook below


def _require_average(name: str, parameter: Tensor) -> None:
    if parameter not in _averaged and not _paused:
        raise GradientError(
            f"{name} has a gradient that is not averaged over the data-parallel ranks: it was computed outside of the graphs "
            "that farskip_fx compiled with data_parallel, so the replicas would drift apart. Compile the whole model (with "
            "farskip_fx.apply(model, data_parallel=...), call that model and not a part of it), or freeze the parameter")


# ---------------------------------------------------------------------------------------------------------------------
# Accumulation, clipping
# ---------------------------------------------------------------------------------------------------------------------

_paused: list[str] = []         # dense groups of the models inside `no_sync`


@contextmanager
def no_sync(model: nn.Module) -> Iterator[None]:
    """Inside, `backward()` accumulates this rank's own gradients; `reduce_gradients(model)` averages them afterwards.

    Sharded parameters average in each `backward()` all the same: no rank has room for the whole gradient.
    One more graph is compiled. All ranks must enter together. Without it every micro-step averages, which gives the same
    gradients, hides behind the backward, and costs the traffic each time.
    """
    parallel = _parallel_of(model)
    _paused.append(parallel.dense_group)
    try:
        yield
    finally:
        _paused.remove(parallel.dense_group)


def is_paused(parallel: DataParallel) -> bool:
    return parallel.dense_group in _paused


@torch.no_grad()
def reduce_gradients(model: nn.Module) -> None:
    """Average what `no_sync` accumulated, in place, in buckets. Collective over all ranks; nothing hides it."""
    parallel = _parallel_of(model)
    waiting: dict[tuple, list[Tensor]] = {}
    for parameter in (p for p in model.parameters() if p.requires_grad and not hasattr(p, MARK)):
        if parameter.grad is None:      # no token came here; elsewhere one may have
            parameter.grad = torch.zeros_like(parameter)
        mean = parallel.mean_of(parameter)
        bucket = waiting.setdefault((mean, parameter.dtype, parameter.device), [])
        if bucket and sum(g.nbytes for g in bucket) + parameter.grad.nbytes > parallel.bucket_mb * 2**20:
            torch._foreach_copy_(bucket, _averages(bucket, mean))
            bucket.clear()
        bucket.append(parameter.grad)
    for (mean, *_), bucket in waiting.items():
        torch._foreach_copy_(bucket, _averages(bucket, mean))


def _parallel_of(model: nn.Module) -> DataParallel:
    found = next((p for m in model.modules() if (p := m.__dict__.get("_farskip_data_parallel")) is not None), None)
    if found is None:
        raise ConfigError("this model has no data parallelism: call farskip_fx.data_parallel(model, group) or "
                          "farskip_fx.apply(model, data_parallel=group) first")
    return found


@torch.no_grad()
def clip_grad_norm_(model: nn.Module | Iterable[Tensor], max_norm: float, norm_type: float = 2.0, *,
                    error_if_nonfinite: bool = False) -> Tensor:
    """`torch.nn.utils.clip_grad_norm_` over all shards: the norm of the whole model, equal on every rank.

    A local norm would scale each rank's gradients differently, and the replicas would drift apart. Collective over the
    expert group, and with `shard=True` over all ranks.

    Args:
        model: the model, or its parameters (all of them: the experts' shards are found by their mark).
        max_norm: of all gradients together.
        norm_type: 2, another p, or inf.

    Returns:
        The norm before clipping, float32, 0-d.

    Raises:
        RuntimeError: the norm is not finite, if `error_if_nonfinite`.
    """
    parameters = [p for p in (model.parameters() if isinstance(model, nn.Module) else model) if p.requires_grad]
    dense, shards = [], {}
    for parameter in parameters:
        if (shard := _shard_of(parameter)) is not None:
            shards.setdefault(shard.group.name, []).append(parameter)
        elif (part := _slice_of(parameter)) is not None:
            shards.setdefault(part.group, []).append(parameter)
        else:
            dense.append(parameter)
    device = parameters[0].device if parameters else torch.device("cpu")
    total = _power(dense, norm_type, device)
    for group in sorted(shards):
        own = _power(shards[group], norm_type, device)
        reduced = all_reduce(own, group, "max" if math.isinf(norm_type) else "sum")
        total = torch.maximum(total, reduced) if math.isinf(norm_type) else total + reduced
    total = total if math.isinf(norm_type) else total ** (1 / norm_type)
    if error_if_nonfinite and not torch.isfinite(total):
        raise RuntimeError(f"the total norm of order {norm_type} of the gradients is {total.item()}, so it cannot be clipped")
    gradients = [p.grad for p in parameters if p.grad is not None]
    factor = (max_norm / (total + 1e-6)).clamp(max=1.0)
    for gradient in gradients:
        gradient.mul_(factor.to(gradient.dtype))
    return total


def _power(parameters: list[Tensor], norm_type: float, device: torch.device) -> Tensor:
    """Sum of |g|^p over all gradients in float32; the maximum for p = inf."""
    norms = [torch.linalg.vector_norm(p.grad, norm_type, dtype=torch.float32) for p in parameters if p.grad is not None]
    if not norms:
        return torch.zeros((), device=device)
    stacked = torch.stack(norms)
    return stacked.max() if math.isinf(norm_type) else stacked.pow(norm_type).sum()
