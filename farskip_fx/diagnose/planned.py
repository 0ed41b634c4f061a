"""A model that is only looked at: built from a configuration or a script, weights on no device, ranks that are not there.

    farskip explain config.json --ep 8 --tokens 4096
    farskip explain my_model.py            # has build() -> (model, inputs), or build() -> model

Nothing is downloaded, and no weight is ever written: a configuration of 235 billion parameters takes no memory.
"""
from __future__ import annotations

import os
import runpy
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from ..errors import ConfigError
from ..expert_parallel import expert_parallel
from ..passes._torch import fake_store


def planned(source: str | Path, *, tokens: int = 2048, batch: int = 1, training: bool = False, ep: int = 1,
            exchange: Mapping | None = None, weights: bool = False, attention: str | None = None) -> tuple[nn.Module, dict]:
    """The model of ``source``, split over groups of ``ep`` ranks (see ``ranks_for``), and inputs to call it with.

    Args:
        source: a Hugging Face ``config.json`` or the folder with it, or a Python file with ``build()``.
        tokens, batch: of the inputs, where the source has none.
        ep: ranks that its experts are split over.
        exchange: options of ``expert_parallel``.
        weights: a configuration's weights are drawn at random, the same on every rank; False: there are none.
        attention: transformers' name of the kernel; None: what the model chooses.

    Raises:
        ConfigError: says what is wrong with ``source``.
    """
    path = Path(source)
    if not path.exists():
        raise ConfigError(f"{source} is not there; give a config.json, the folder with it, or a Python file with build()")
    model, inputs = _scripted(path) if path.suffix == ".py" else (_configured(path, weights, attention), None)
    model.train(training)
    if ep > 1:
        expert_parallel(model, own_group(ep), **(exchange or {}))
    if any(t.is_meta for t in model.parameters()):
        # Kernels are chosen by device. Memory that is never touched is never taken.
        model.to_empty(device="cpu")
    if inputs is None:
        most = model.config.get_text_config().vocab_size
        inputs = {"input_ids": torch.randint(most, (batch, tokens)) if weights else torch.zeros(batch, tokens, dtype=torch.long),
                  "use_cache": False}
    return model, inputs


@contextmanager
def ranks_for(ep: int, *, real: bool = False) -> Iterator[None]:
    """Ranks to trace on: under torchrun those of the run; else ``ep`` ranks of which only this one, rank 0, exists.

    Raises:
        ConfigError: ``ep`` does not divide the ranks of the run, or there is no run and it must be ``real``.
    """
    if dist.is_initialized():
        yield
        return
    launched = dist.is_torchelastic_launched() and int(os.environ["WORLD_SIZE"]) > 1
    if launched and int(os.environ["WORLD_SIZE"]) % ep:
        raise ConfigError(f"--ep {ep} does not divide the {os.environ['WORLD_SIZE']} ranks of this run")
    if real and not launched and ep > 1:
        raise ConfigError(f"--ep {ep} needs {ep} ranks: torchrun --nproc-per-node {ep} -m farskip_fx.cli ...")
    if launched:
        dist.init_process_group("nccl" if real and torch.cuda.is_available() else "gloo")
    elif ep > 1:
        dist.init_process_group("fake", rank=0, world_size=ep, store=fake_store())
    try:
        yield
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def own_group(ep: int) -> dist.ProcessGroup:
    """The ``ep`` neighbours of this rank. Every rank makes every group, as torch.distributed asks for."""
    world = dist.get_world_size()
    if world == ep:
        return dist.group.WORLD
    groups = [dist.new_group(list(range(first, first + ep))) for first in range(0, world, ep)]
    return groups[dist.get_rank() // ep]


def _configured(path: Path, weights: bool, attention: str | None = None) -> nn.Module:
    from transformers import AutoConfig, AutoModelForCausalLM
    try:
        config = AutoConfig.from_pretrained(str(path), local_files_only=True)
        with torch.device("cpu" if weights else "meta"), torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.manual_seed(0)
            return AutoModelForCausalLM.from_config(config, dtype=getattr(config, "dtype", None) or torch.bfloat16,
                                                    **({"attn_implementation": attention} if attention else {}))
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"{path} is no configuration of a causal language model that transformers knows: {error}") from error


def _scripted(path: Path) -> tuple[nn.Module, dict | None]:
    build = runpy.run_path(str(path)).get("build")
    if not callable(build):
        raise ConfigError(f"{path} has no function build(); it returns the model, or (model, inputs) with a dict of what the "
                          "model is called with")
    made = build()
    model, inputs = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not isinstance(model, nn.Module) or not isinstance(inputs, Mapping | None):
        raise ConfigError(f"build() of {path} returned {type(made).__name__}; it returns the model, or (model, inputs) with a "
                          "dict of what the model is called with")
    return model, None if inputs is None else dict(inputs)
