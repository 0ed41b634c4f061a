"""Sharded dense parameters (ZeRO stage 3; FSDP2's `fully_shard`): a rank keeps a slice, and the whole exists while it is used.

Contract
    `shard_dense(model, group)` replaces each parameter that every rank holds by this rank's rows of it. The model computes
    what it computed before, forward and backward, eagerly and compiled; gradients come as the mean over the group, already
    sliced. Names in `state_dict()` and `named_parameters()` stay; shapes are those of the slices.

How
    Reading `module.weight` gathers it: the module's class gets a property of that name. In a Dynamo graph that is one node,
    `unshard`; `passes/data_parallel.py` joins those nodes in buckets, and our schedule moves the all-gathers and
    reduce-scatters that they become. Not DTensors: with activation checkpointing they fail inside of AOTAutograd (torch 2.13).

Rows
    Rank r of n keeps rows [r * k, (r + 1) * k) with k = ceil(rows / n), as `torch.chunk` and DTensor's Shard(0) cut; what
    goes beyond the end is padded with zeros, so that all ranks have equal shapes and, therefore, equal graphs.
"""
from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .collectives import all_gather, reduce_scatter
from .errors import ConfigError

__all__ = ["DenseShard", "dense_shards", "shard_dense", "unshard"]

MARK = "_farskip_dense_shard"
"""Attribute of a sliced parameter."""


@dataclass(frozen=True)
class DenseShard:
    """What is known of one sliced parameter.

    Attributes:
        group, size, rank: the ranks that hold the slices, and this one's place among them.
        shape: of the whole parameter.
    """
    group: str
    size: int
    rank: int
    shape: tuple[int, ...]

    @property
    def rows(self) -> int:
        """Of a slice, padding included."""
        return -(-self.shape[0] // self.size)

    @property
    def valid(self) -> int:
        """Rows of this rank's slice that are not padding."""
        return min(max(self.shape[0] - self.rank * self.rows, 0), self.rows)

    def take(self, whole: Tensor) -> Tensor:
        """[rows of all, ...] -> this rank's [rows, ...], a copy."""
        mine = whole.new_zeros(self.rows, *self.shape[1:])
        first = self.rank * self.rows
        mine[:self.valid] = whole[first:first + self.valid]
        return mine

    def gather(self, part: Tensor) -> Tensor:
        """This rank's [rows, ...] -> [rows of all, ...]. Collective over the group."""
        return all_gather(part, self.size, self.group)[:self.shape[0]]


# ---------------------------------------------------------------------------------------------------------------------
# Together and apart
# ---------------------------------------------------------------------------------------------------------------------


class _Unshard(torch.autograd.Function):
    """Slices -> whole parameters, in one all-gather; gradients -> their mean's slices, in one reduce-scatter."""

    @staticmethod
    def forward(ctx, group: str, size: int, lengths: tuple[int, ...], *slices: Tensor):
        ctx.group, ctx.size, ctx.rows = group, size, [s.size(0) for s in slices]
        whole = all_gather(_joined([s.reshape(1, -1) for s in slices]).reshape(-1), size, group).view(size, -1)
        parts = whole.split([s.numel() for s in slices], dim=1)
        return tuple(part.reshape(-1, *s.shape[1:])[:length] for part, s, length in zip(parts, slices, lengths))

    @staticmethod
    def backward(ctx, *gradients: Tensor):
        padded = [nn.functional.pad(g, [0, 0] * (g.dim() - 1) + [0, rows * ctx.size - g.size(0)])
                  for g, rows in zip(gradients, ctx.rows)]
        # Divided before the sum: it does not overflow then in 16 bits.
        sent = _joined([g.reshape(ctx.size, -1) for g in padded]) / ctx.size
        mine = reduce_scatter(sent.reshape(-1), ctx.size, ctx.group)
        parts = mine.split([g.numel() // ctx.size for g in padded])
        return None, None, None, *(part.view(rows, *g.shape[1:]) for part, rows, g in zip(parts, ctx.rows, gradients))


def _joined(flat: list[Tensor]) -> Tensor:
    return flat[0] if len(flat) == 1 else torch.cat(flat, dim=1)


@torch.compiler.allow_in_graph
def unshard(part: Tensor, length: int, group: str, size: int) -> Tensor:
    """[rows, ...] of each rank -> the whole parameter, [length, ...]. One node of a Dynamo graph."""
    return _Unshard.apply(group, size, (length,), part)[0]


def unshard_bucket(kind: tuple, lengths: tuple[int, ...], *parts: Tensor) -> tuple[Tensor, ...]:
    """The same for a bucket of parameters; ``kind`` begins with the group and its size."""
    return _Unshard.apply(kind[0], kind[1], lengths, *parts)


# ---------------------------------------------------------------------------------------------------------------------
# A model in place
# ---------------------------------------------------------------------------------------------------------------------


def shard_dense(model: nn.Module, group: str, size: int, rank: int) -> None:
    """Slice every parameter of ``model`` that is no shard of the experts, in place. Not collective: ranks have equal weights.

    Left whole: scalars, parameters with fewer rows than ranks, and those of modules that keep their own list of weights
    (RNNs); data parallelism averages their gradients.
    """
    if size == 1:
        return
    made: dict[int, nn.Parameter] = {}
    for module in list(model.modules()):
        if hasattr(module, "_flat_weights"):
            continue
        sliced = {}
        for name, whole in list(module._parameters.items()):
            if id(whole) not in made:
                if not _can_slice(whole, size):
                    continue
                shard = DenseShard(group, size, rank, tuple(whole.shape))
                part = nn.Parameter(shard.take(whole.detach()), requires_grad=whole.requires_grad)
                part.__dict__.update({**whole.__dict__, MARK: shard})
                made[id(whole)] = part
            module._parameters[name] = made[id(whole)]
            sliced[name] = getattr(made[id(whole)], MARK)
        if sliced:
            _gather_on_reading(module, sliced)
    # `made` has kept no whole parameter alive: only ids, and every one that is still to come is in the model.


def is_part(parameter: Tensor) -> bool:
    """Whether this rank holds a part of a parameter: a slice, or a shard of `expert_parallel`."""
    return hasattr(parameter, MARK) or hasattr(parameter, "_farskip_expert_group")


def _can_slice(whole: Tensor | None, size: int) -> bool:
    return (isinstance(whole, nn.Parameter) and whole.dim() > 0 and whole.size(0) >= size and not whole.is_meta
            and not is_part(whole))


def _gather_on_reading(module: nn.Module, shards: dict[str, DenseShard]) -> None:
    """Give ``module`` a class of its own, a subclass in which the names in ``shards`` are properties."""
    kind = type(module)
    known = {**kind.__dict__.get("_farskip_dense_shards", {}), **shards}
    base = kind.__mro__[1] if "_farskip_dense_shards" in kind.__dict__ else kind
    properties = {name: property(lambda self, name=name, shard=shard: _whole(self, name, shard)) for name, shard in known.items()}
    module.__class__ = type(kind.__name__, (base,), {"__module__": kind.__module__, "__qualname__": kind.__qualname__,
                                                     "_farskip_dense_shards": known, **properties})


def _whole(module: nn.Module, name: str, shard: DenseShard) -> Tensor:
    part = module._parameters[name]
    if part.size(0) != shard.rows:
        raise ConfigError(f"{name} of {type(module).__name__} was replaced by a tensor of {part.size(0)} rows after data_parallel("
                          f"shard=True), which keeps {shard.rows} of {shard.shape[0]} on each rank: change the model before that")
    return unshard(part, shard.shape[0], shard.group, shard.size)


def dense_shards(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, DenseShard]]:
    """(name of the parameter in the model, its module, its name there, what is known of it); tied ones several times."""
    for prefix, module in model.named_modules():
        for name, shard in type(module).__dict__.get("_farskip_dense_shards", {}).items():
            yield f"{prefix}.{name}" if prefix else name, module, name, shard
