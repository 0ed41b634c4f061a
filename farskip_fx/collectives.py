"""The functional collectives that the model's forward and backward are made of, each awaited where it stands.

The raw ops, because the wrappers of `torch.distributed._functional_collectives` put a second wait into a traced graph and
hand out a pending tensor in eager. They carry their own autograd formulas (torch 2.13). In a compiled graph launch and wait
are nodes of their own, which our schedule moves apart. Two lines each: `guard.py` reads the launch's name from the source.
"""
from __future__ import annotations

import torch
from torch import Tensor


def all_to_all(rows: Tensor, receive: list[int], send: list[int], group_name: str) -> Tensor:
    """[sum(send), ...] -> [sum(receive), ...]; sizes in rows, one for each rank of the group."""
    launched = torch.ops._c10d_functional.all_to_all_single(rows, receive, send, group_name)
    return torch.ops._c10d_functional.wait_tensor(launched)


def all_reduce(partial: Tensor, group_name: str, operation: str = "sum") -> Tensor:
    launched = torch.ops._c10d_functional.all_reduce(partial.contiguous(), operation, group_name)
    return torch.ops._c10d_functional.wait_tensor(launched)


def all_gather(rows: Tensor, group_size: int, group_name: str) -> Tensor:
    """[n, ...] -> [group_size * n, ...], by rank."""
    launched = torch.ops._c10d_functional.all_gather_into_tensor(rows.contiguous(), group_size, group_name)
    return torch.ops._c10d_functional.wait_tensor(launched)


def reduce_scatter(whole: Tensor, group_size: int, group_name: str) -> Tensor:
    """[group_size * n, ...] -> this rank's [n, ...], summed over the group."""
    launched = torch.ops._c10d_functional.reduce_scatter_tensor(whole.contiguous(), "sum", group_size, group_name)
    return torch.ops._c10d_functional.wait_tensor(launched)
