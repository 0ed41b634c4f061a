"""Batches of a run's own dataset, for what is measured or repaired before training."""
from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..errors import ConfigError
from .head import base_of


def ranks_and_rank() -> tuple[int, int]:
    return (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)


def some_batches(dataset, collator: Callable, *, count: int, batch: int) -> list[dict]:
    """``count`` batches (fewer, of a small dataset), evenly spread over a dataset with a length, else its first ones."""
    if hasattr(dataset, "__len__"):
        size = min(batch, len(dataset))
        count = max(1, min(count, len(dataset) // size))
        starts = [(len(dataset) - size) * i // max(count - 1, 1) for i in range(count)]
        rows = [[dataset[start + i] for i in range(size)] for start in starts]
    else:
        examples = iter(dataset)
        rows = [list(itertools.islice(examples, batch)) for _ in range(count)]
    return [{name: value for name, value in dict(collator(some)).items() if isinstance(value, Tensor)} for some in rows if some]


def own_batches(model: nn.Module, dataset, collator: Callable, *, count: int, batch: int, device: torch.device,
                what: str) -> list[dict]:
    """This rank's share of ``count`` batches, on ``device``, of what the model is called with; equally many on every rank.

    Args:
        what: names the option that asks for them, in errors.

    Raises:
        ConfigError: there are fewer batches than ranks.
    """
    ranks, rank = ranks_and_rank()
    takes = {"labels", "shift_labels", *inspect.signature(base_of(model).forward).parameters}
    found = some_batches(dataset, collator, count=max(count, ranks), batch=batch)
    if len(found) < ranks:
        raise ConfigError(f"{what} needs a batch of {batch} rows on each of {ranks} ranks, and the dataset has {len(found)}")
    found = found[:len(found) // ranks * ranks]
    return [{name: value.to(device) for name, value in one.items() if name in takes} for one in found[rank::ranks]]
