"""What travels in an exchange: rows as they are, or rounded to one byte a value with a scale for each row.

Rounding is an approximation. It is off by default, changes what the model computes on several ranks, and is recorded with
a converted checkpoint; self-distillation trains through it.

    ""       the rows in their own dtype
    "int8"   symmetric, scale = largest magnitude of the row / 127
    "fp8"    float8_e4m3fn, scale = largest magnitude of the row / 448

Gradients pass the rounding as if it were not there (straight-through) and travel by the payload of the backward, which
is a choice of its own. Rowwise dynamic scales are those of torchao (``torchao/float8``); its kernels multiply, ours travel,
so that here only the rounding is left: one fused loop on either side.
"""
from __future__ import annotations

import torch
from torch import Tensor

from .collectives import all_to_all

PAYLOADS = {"int8": (torch.int8, 127.0), "fp8": (torch.float8_e4m3fn, 448.0)}
"""Name -> element type, its largest value."""


def travel(rows: Tensor, beside: Tensor, receive: list[int], send: list[int], group_name: str, *, payload: str = "",
           backward_payload: str = "") -> tuple[Tensor, Tensor]:
    """One exchange.

    Args:
        rows: [sum(send), hidden], sorted by rank.
        beside: [sum(send), n], a few numbers that go with each row and are never rounded to a byte; n may be 0.
        receive, send: rows from and to each rank.
        payload, backward_payload: how rows, and their gradients, travel: "" or a key of ``PAYLOADS``.

    Returns:
        [sum(receive), hidden] and [sum(receive), n].
    """
    if payload or backward_payload:
        return rounded_all_to_all(rows, beside, receive, send, group_name, payload, backward_payload)
    return _as_they_are(rows, beside, receive, send, group_name)


def _as_they_are(rows: Tensor, beside: Tensor, receive: list[int], send: list[int], group_name: str) -> tuple[Tensor, Tensor]:
    hidden, together = rows.size(1), rows
    if beside.size(1):
        together = torch.cat([rows, beside.to(rows.dtype)], dim=1)
    arrived = all_to_all(together, receive, send, group_name)
    return arrived[:, :hidden], arrived[:, hidden:].to(beside.dtype)


def _as_bytes(rows: Tensor, beside: Tensor, receive: list[int], send: list[int], group_name: str,
              payload: str) -> tuple[Tensor, Tensor]:
    dtype, largest = PAYLOADS[payload]
    hidden, wide = rows.size(1), rows.float()
    scale = wide.abs().amax(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny) / largest
    scaled = (wide / scale).clamp(-largest, largest)
    small = scaled.round().to(dtype) if dtype == torch.int8 else scaled.to(dtype)
    exact = torch.cat([scale, beside.float()], dim=1)
    arrived = all_to_all(torch.cat([small.view(torch.uint8), exact.view(torch.uint8)], dim=1), receive, send, group_name)
    exact = arrived[:, hidden:].contiguous().view(torch.float32)
    large = arrived[:, :hidden].contiguous().view(dtype).float() * exact[:, :1]
    return large.to(rows.dtype), exact[:, 1:].to(beside.dtype)


def _exchange(rows: Tensor, beside: Tensor, receive: list[int], send: list[int], group_name: str,
              payload: str) -> tuple[Tensor, Tensor]:
    if payload:
        return _as_bytes(rows, beside, receive, send, group_name, payload)
    return _as_they_are(rows, beside, receive, send, group_name)


class _Rounded(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows: Tensor, beside: Tensor, receive: list[int], send: list[int], group_name: str, payload: str,
                backward_payload: str) -> tuple[Tensor, Tensor]:
        ctx.back = send, receive, group_name, backward_payload
        return _exchange(rows, beside, receive, send, group_name, payload)

    @staticmethod
    def backward(ctx, rows: Tensor, beside: Tensor):
        return *_exchange(rows, beside, *ctx.back), None, None, None, None, None


@torch.compiler.allow_in_graph
def rounded_all_to_all(rows: Tensor, beside: Tensor, receive: list[int], send: list[int], group_name: str, payload: str,
                       backward_payload: str) -> tuple[Tensor, Tensor]:
    """`_Rounded` as one node of a Dynamo graph, by a name that the passes know: traced into, it would hide in a subgraph."""
    return _Rounded.apply(rows, beside, receive, send, group_name, payload, backward_payload)
