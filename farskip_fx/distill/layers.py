"""layers="auto" of a run: scan the original on some of its dataset, choose, and keep the choice beside the run.

    output_dir/layers.json      what was asked, the choice, and the scan; a run that is resumed takes it from there
    output_dir/layers.svg       the front
    output_dir/distill.yaml     the run as it was then: the connectivity of each layer, and layers: all
"""
from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from ..config import FarskipConfig
from ..errors import ConfigError
from .cache import fingerprint
from .calibration import own_batches, ranks_and_rank
from .choice import Choice, choose, hidden_time
from .config import DistillConfig
from .exposed import Deployment
from .front import front_svg
from .head import base_of
from .sensitivity import Sensitivity, sensitivity
from .teacher import require_original

FILE, PLOT = "layers.json", "layers.svg"
VERSION = 1


def with_chosen_layers(config: DistillConfig, model: nn.Module, dataset, collator: Callable, *, folder: str | Path, batch: int,
                       device: torch.device, resume: bool) -> DistillConfig:
    """``config`` with the connectivity of each layer in the place of layers="auto"; any other one as it is.

    Collective where there are several ranks: each scans its share of the batches, and all take rank 0's choice.

    Args:
        model: the original.
        collator: makes a batch of a list of examples. batch: rows of one.
        folder: of the run.
        resume: take the choice that is there already.

    Raises:
        ConfigError: the saved choice is of another model or another question; see also ``sensitivity`` and ``choose``.
    """
    if config.share is None:
        return config
    require_original(model, of="student")
    path = Path(folder) / FILE
    ranks, rank = ranks_and_rank()
    saved = _from_rank_0(lambda: _saved(path, config, model) if resume and path.exists() else None, ranks, rank)
    if saved is not None:
        return _chosen(config, saved)
    base = base_of(model).to(device)
    batches = own_batches(model, dataset, collator, count=config.scan_batches, batch=batch, device=device,
                          what=f"layers={config.layers!r}")
    with model.disable_adapter() if hasattr(model, "disable_adapter") else nullcontext():
        found = sensitivity(base, batches, config.choices, chunk_mb=config.chunk_mb, progress=rank == 0,
                            group=dist.group.WORLD if ranks > 1 else None)
    choice = choose(found, hidden_time(found, config.deployment), config.share)     # equal on all ranks; so are its errors
    if rank == 0:
        save(path, config, found, choice, _of(model))
    return _chosen(config, _from_rank_0(lambda: choice.connectivity, ranks, rank))


def _from_rank_0(ask: Callable[[], object], ranks: int, rank: int):
    """What ``ask`` returns on rank 0, or the ConfigError that it raises there, on all ranks."""
    answer: list = [None, None]
    if rank == 0:
        try:
            answer[0] = ask()
        except ConfigError as error:
            answer[1] = str(error)
    if ranks > 1:
        dist.broadcast_object_list(answer, src=0)
    if answer[1] is not None:
        raise ConfigError(answer[1])
    return answer[0]


def save(path: Path, config: DistillConfig, found: Sensitivity, choice: Choice, model: str) -> None:
    """The choice and where it comes from, and the plot of the front."""
    path.parent.mkdir(parents=True, exist_ok=True)
    data = {"version": VERSION, "asked": _asked(config), "model": model, "connectivity": choice.connectivity,
            "share": choice.share, "kl": choice.kl, "front": [[p.share, p.kl] for p in choice.front], "scan": found.to_dict()}
    part = path.with_name(f".{path.name}.partial")
    part.write_text(json.dumps(data, indent=1))
    os.replace(part, path)
    path.with_name(PLOT).write_text(front_svg(choice))


def _saved(path: Path, config: DistillConfig, model: nn.Module) -> Mapping:
    """The connectivity that an earlier start of this run chose."""
    try:
        data = json.loads(path.read_text())
        version, asked, of, connectivity = (data[name] for name in ("version", "asked", "model", "connectivity"))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"cannot read the choice of layers in {path} ({type(error).__name__}: {error}); remove it to choose "
                          "again, with resume=False") from error
    if version != VERSION:
        raise ConfigError(f"{path} has version {version!r}; this release reads version {VERSION}")
    for name, value in _asked(config).items():
        if not isinstance(asked, Mapping) or asked.get(name) != value:
            before = asked.get(name) if isinstance(asked, Mapping) else asked
            raise ConfigError(f"the layers of the run in {path.parent} were chosen with {name}={before!r}, and now it is "
                              f"{value!r}: go on with what was asked then, or use another output_dir")
    if of != _of(model):
        raise ConfigError(f"the layers of the run in {path.parent} were chosen for another model (fingerprint {of}, and this one "
                          f"has {_of(model)}): pass the original, or use another output_dir")
    return connectivity


def _of(model: nn.Module) -> str:
    """Which model it is. New adapters are drawn at random, so with them only that is said."""
    return "adapters" if hasattr(model, "disable_adapter") else fingerprint(model)


def _asked(config: DistillConfig) -> dict:
    return {"share": config.share, "choices": list(config.choices), "scan_batches": config.scan_batches,
            "deployment": Deployment.of(config.deployment).to_dict()}


def _chosen(config: DistillConfig, connectivity: Mapping) -> DistillConfig:
    FarskipConfig(connectivity=connectivity)        # refuses what is not known in this process
    return dataclasses.replace(config, connectivity=dict(connectivity), layers="all")
