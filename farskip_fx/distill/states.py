"""How far the states between a student's layers are from its teacher's: a second loss for short runs.

    sum over tokens of mean over layers of |student - teacher|^2 / |teacher|^2

The paper found such a term harmful over a long run (2511.11505, ablation); in a short one after a refit it helps, and it falls to zero
over the run, so that the end is KL alone (docs/distill.md).
"""
from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import ConfigError


def states_loss(student: Sequence[Tensor] | None, teacher: Sequence[Tensor] | None, targets: Tensor,
                items: Tensor | float | None = None, ignore_index: int = -100) -> Tensor:
    """
    Args:
        student, teacher: ``hidden_states`` of transformers: the embeddings first, then [batch, length, hidden] after each layer.
        targets: [batch, length]; positions with ``ignore_index`` do not count.
        items: as in ``distillation_loss``.

    Raises:
        ConfigError: a model returns none, or the two return different numbers of them.
    """
    if not student or not teacher or len(student) != len(teacher):
        raise ConfigError(f"hidden wants the states after each layer; the student returns {len(student or ())} and the teacher "
                          f"{len(teacher or ())} of them with output_hidden_states=True. Leave the option at 0")
    kept = targets != ignore_index
    with torch.autocast(targets.device.type, enabled=False):
        total = sum(_missed(own.float(), aim.float(), kept) for own, aim in zip(student[1:], teacher[1:]))
    items = kept.sum().clamp(min=1) if items is None else items
    return total / (len(student) - 1) / items


def _missed(own: Tensor, aim: Tensor, kept: Tensor) -> Tensor:
    """The sum over tokens. Each in its own units: some tokens have states many times as large as others (attention sinks).

    By a mask, because the gradient of picked rows is slow; what is masked may be NaN.
    """
    gap = torch.where(kept[..., None], own - aim, 0.0)
    size = torch.where(kept, aim.square().sum(-1), 1.0).clamp(min=1e-12)
    return (gap.square().sum(-1) / size).sum()
