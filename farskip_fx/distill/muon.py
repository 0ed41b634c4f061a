"""Muon for the matrices of a model and AdamW for everything else, as one optimizer.

    M = momentum M + (1 - momentum) gradient          G = momentum M + (1 - momentum) gradient (Nesterov)
    W -= rate 0.2 sqrt(max(rows, columns)) U V^T      where G = U S V^T, by five Newton-Schulz steps

So all directions of a matrix move alike, and by as much as AdamW moves them (the factor of Moonlight, arXiv 2502.16982): a learning
rate means the same for both. Muon: Keller Jordan, kellerjordan.github.io/posts/muon. ``torch.optim.Muon`` takes single matrices only;
here experts that are stacked, [experts, rows, columns], are a matrix each.
"""
from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from .head import base_of

_LEAST = 8                                          # rows and columns: a short convolution is no matrix
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)           # of the quintic whose slope at zero is the steepest that still works
_STEPS = 5


class Muon(torch.optim.Optimizer):
    """
    Args:
        groups: parameter groups; those with ``matrices=True`` hold [..., rows, columns] and go Muon's way, others AdamW's.
        lr: of both.
        betas: AdamW's; the first is Muon's momentum, too.
    """

    def __init__(self, groups: list[dict], *, lr: float, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8,
                 weight_decay: float = 0.0) -> None:
        super().__init__(groups, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, matrices=False))

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                    (self._matrix if group["matrices"] else self._other)(parameter, group)
        return loss

    def _matrix(self, parameter: Tensor, group: dict) -> None:
        state, momentum = self.state[parameter], group["betas"][0]
        if not state:
            state["momentum"] = torch.zeros_like(parameter)
        state["momentum"].lerp_(parameter.grad, 1 - momentum)
        direction = orthogonal(parameter.grad.lerp(state["momentum"], momentum))
        parameter.add_(direction, alpha=-group["lr"] * 0.2 * math.sqrt(max(parameter.shape[-2:])))

    def _other(self, parameter: Tensor, group: dict) -> None:
        state, (first, second) = self.state[parameter], group["betas"]
        if not state:
            state |= {"step": 0, "mean": torch.zeros_like(parameter), "square": torch.zeros_like(parameter)}
        state["step"] += 1
        state["mean"].lerp_(parameter.grad, 1 - first)
        state["square"].lerp_(parameter.grad.square(), 1 - second)
        spread = (state["square"] / (1 - second ** state["step"])).sqrt_().add_(group["eps"])
        parameter.addcdiv_(state["mean"], spread, value=-group["lr"] / (1 - first ** state["step"]))


def orthogonal(gradient: Tensor) -> Tensor:
    """About U V^T of each [rows, columns] = U S V^T; its singular values are between 0.7 and 1.2. bf16 on a GPU."""
    x = gradient.to(torch.bfloat16 if gradient.is_cuda else torch.float32)
    tall = x.shape[-2] > x.shape[-1]
    x = (x.mT if tall else x).contiguous()
    x = x.view(-1, *x.shape[-2:])
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    a, b, c = _COEFFICIENTS
    for _ in range(_STEPS):         # x <- a x + (b s + c s s) x
        square = torch.bmm(x, x.mT)
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).reshape(gradient.shape).to(gradient.dtype)


def groups_of(model: nn.Module, weight_decay: float) -> list[dict]:
    """Matrices (decayed), what is neither (decayed if it has two dimensions or more): embeddings, head, norms, biases.

    Raises:
        ConfigError: parameters in slices (FSDP2): Muon needs whole matrices.
    """
    base = base_of(model)
    ends = {id(layer.weight) for layer in (base.get_input_embeddings(), base.get_output_embeddings()) if layer is not None}
    parts: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if hasattr(parameter, "placements"):
            raise ConfigError(f"optimizer='muon' needs whole matrices, and {name} is a DTensor (FSDP2); leave the option out")
        matrix = id(parameter) not in ends and parameter.dim() in (2, 3) and min(parameter.shape[-2:]) >= _LEAST
        parts.setdefault((matrix, parameter.dim() > 1), []).append(parameter)
    return [{"params": found, "matrices": matrix, "weight_decay": weight_decay if decayed else 0.0}
            for (matrix, decayed), found in parts.items()]


class MuonOf:
    """What Trainer's ``optimizer_cls_and_kwargs`` takes: called with the model."""

    def __call__(self, model: nn.Module, *, weight_decay: float, **options) -> Muon:
        return Muon(groups_of(model, weight_decay), **options)
