"""Least squares from sums: rows stream by, and only products of their columns are kept.

    minimise over D:  sum_rows w |r - x D|^2 + lambda |D|^2,      lambda = ridge * mean diagonal of sum w x^T x

x [rows, in] are a projection's inputs, r [rows, out] what its output misses of its target, w [rows] weights, D [in, out]
the change of its weight. So the ridge draws towards the weight as it is, and where nothing is missed nothing changes.
Products are taken in float32, sums and the solution in float64. A sum over ranks is the sum over all their rows.
"""
from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


class Gram:
    """sum w x^T x [in, in] of one set of inputs; several projections may share it."""

    def __init__(self, width: int, device: torch.device) -> None:
        self.matrix = torch.zeros(width, width, dtype=torch.float64, device=device)
        self.rows = 0

    def add(self, x: Tensor) -> None:
        """x: [rows, in] float32, already multiplied with the root of its weights."""
        self.matrix += x.mT @ x
        self.rows += x.shape[0]

    def all_reduce(self, group: dist.ProcessGroup) -> None:
        rows = torch.tensor(self.rows, device=self.matrix.device)
        dist.all_reduce(self.matrix, group=group)
        dist.all_reduce(rows, group=group)
        self.rows = int(rows)


class Missed:
    """sum w x^T r [in, out], and what was missed before: of one projection over a ``Gram``.

    Of several over one Gram the ``first`` adds its rows to it.
    """

    def __init__(self, gram: Gram, outputs: int, *, first: bool = True) -> None:
        self.gram, self.first = gram, first
        self.cross = torch.zeros(gram.matrix.shape[0], outputs, dtype=torch.float64, device=gram.matrix.device)
        self.squares = torch.zeros(2, dtype=torch.float64, device=gram.matrix.device)     # of r, and of the targets

    def add(self, x: Tensor, r: Tensor, target: Tensor) -> None:
        """x: [rows, in]; r, target: [rows, out]; all float32 and multiplied with the root of the weights."""
        if self.first:
            self.gram.add(x)
        self.cross += x.mT @ r
        self.squares[0] += r.square().sum()
        self.squares[1] += target.square().sum()

    def all_reduce(self, group: dist.ProcessGroup) -> None:
        dist.all_reduce(self.cross, group=group)
        dist.all_reduce(self.squares, group=group)

    def solve(self, ridge: float) -> tuple[Tensor, float]:
        """(D [in, out] float64, what is missed with it: sum w |r - x D|^2)."""
        a = self.gram.matrix
        strength = ridge * a.diagonal().mean()
        if not strength > 0:        # no rows, or only zeros
            return torch.zeros_like(self.cross), self.squares[0].item()
        regular = a + strength * torch.eye(a.shape[0], dtype=a.dtype, device=a.device)
        factor, failed = torch.linalg.cholesky_ex(regular)
        change = torch.cholesky_solve(self.cross, factor) if not failed else torch.linalg.lstsq(regular, self.cross).solution
        left = self.squares[0] - 2 * (change * self.cross).sum() + (change * (a @ change)).sum()
        return change, max(left.item(), 0.0)
