"""Replicated and partial tensors: what a group of ranks has in common, and how gradients go through it.

The four autograd functions of tensor parallelism (Megatron's f and g, arXiv 1909.08053 section 3, and their row-wise kin).
"""
from __future__ import annotations

import torch
from torch import Tensor

from .collectives import all_gather, all_reduce


class _CopyToGroup(torch.autograd.Function):
    """Megatron's f: a replicated tensor enters computation that differs by rank. Its gradients are partial: sum them."""

    @staticmethod
    def forward(ctx, replicated: Tensor, group_name: str) -> Tensor:
        ctx.group_name = group_name
        return replicated.view_as(replicated)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        return all_reduce(gradient, ctx.group_name), None


class _SumOverGroup(torch.autograd.Function):
    """Megatron's g: partial results become one replicated sum, whose gradient is already complete on each rank."""

    @staticmethod
    def forward(ctx, partial: Tensor, group_name: str) -> Tensor:
        return all_reduce(partial, group_name)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        return gradient, None


@torch.compiler.allow_in_graph
def copy_to_group(replicated: Tensor, group_name: str) -> Tensor:
    """`_CopyToGroup` as one node of a Dynamo graph, by a name that the passes know: traced into, it would hide in a subgraph."""
    return _CopyToGroup.apply(replicated, group_name)


@torch.compiler.allow_in_graph
def sum_over_group(partial: Tensor, group_name: str) -> Tensor:
    """`_SumOverGroup`, likewise."""
    return _SumOverGroup.apply(partial, group_name)


class TakeOwnRows(torch.autograd.Function):
    """[size * n, ...], replicated -> [n, ...], this rank's rows. Backward: every rank's rows put together again."""

    @staticmethod
    def forward(ctx, replicated: Tensor, rank: int, size: int, group_name: str) -> Tensor:
        ctx.size, ctx.group_name = size, group_name
        return replicated.chunk(size)[rank].clone()

    @staticmethod
    def backward(ctx, gradient: Tensor):
        return all_gather(gradient, ctx.size, ctx.group_name), None, None, None


class ReplicateRows(torch.autograd.Function):
    """[n, ...], this rank's rows -> [size * n, ...], replicated. Backward: this rank's rows of the replicated gradient."""

    @staticmethod
    def forward(ctx, rows: Tensor, rank: int, size: int, group_name: str) -> Tensor:
        ctx.rank, ctx.size = rank, size
        return all_gather(rows, size, group_name)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        return gradient.chunk(ctx.size)[ctx.rank].clone(), None, None, None
