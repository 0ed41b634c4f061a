"""``apply`` and ``remove``: conversion in place, for everything that calls the model; and the decorator."""
from __future__ import annotations

import dataclasses
import functools
import logging
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from .backend import agree, farskip_backend
from .calibrate import calibrate_for
from .capture import prepare
from .config import FarskipConfig, merge
from .data_parallel import data_parallel
from .errors import ConfigError, NoMoEError, WrongConnectivityError
from .expert_parallel import payload_of
from .marker import mark
from .passes._torch import COMPILED_APART, ignored_in_graphs
from .saved import forget, record


class Converted:
    """A forward that only runs through the farskip backend.

    Copies and unpickled instances have lost their compiled function; they raise instead of running the original.
    """

    def __init__(self, forward: Callable, config: FarskipConfig, *, dynamic: bool | None = None) -> None:
        functools.update_wrapper(self, forward)
        text = config.to_json()

        def marked(*args, **kwargs):
            args, kwargs = mark(args, kwargs, text)
            return forward(*args, **kwargs)

        self.config = config
        owner = getattr(forward, "__self__", None)
        self._scope = prepare(owner) if isinstance(owner, nn.Module) else nullcontext
        self.disable_compile = None     # what the model's generation_config said before
        # Isolated: every conversion runs this same code object, and must not use up another one's recompiles.
        self._compiled = torch.compile(marked, backend=farskip_backend, options=config.to_dict(), dynamic=dynamic,
                                       **COMPILED_APART)

    def __call__(self, *args, **kwargs):
        if self._compiled is None:
            raise WrongConnectivityError(
                "this is a copy of a model that was converted with farskip_fx.apply, or one read back from a pickle: "
                "the compiled forward did not travel with it. Call farskip_fx.apply(model) on it")
        if torch.compiler.is_exporting():
            raise WrongConnectivityError(
                "torch.export of a model converted with farskip_fx: an exported program does not go through the "
                "farskip backend, so it would hold the ORIGINAL connectivity. There is no export of a converted model; "
                "undo the conversion with farskip_fx.remove(model) to export the original")
        if torch.compiler.is_compiling():       # inside another torch.compile: its backend answers for the marker
            return self._compiled(*args, **kwargs)
        module = args[0] if args and isinstance(args[0], nn.Module) else getattr(self.__wrapped__, "__self__", None)
        with in_one_graph(self._scope, module, kwargs):
            return self._compiled(*args, **kwargs)

    def __get__(self, instance, owner=None):
        return self if instance is None else functools.partial(self, instance)

    def __getstate__(self) -> dict:
        return {"config": self.config, "disable_compile": self.disable_compile, "_compiled": None, "_scope": None}


def apply(model: nn.Module, config: FarskipConfig | dict | None = None, *, dynamic: bool | None = None,
          **options) -> nn.Module:
    """Convert ``model`` in place, so that ``model(...)``, ``generate``, its backbone and HF Trainer all use it.

    Replaces the forward of the module that owns the decoder layers by a compiled one, and marks its input: eager
    execution, or another backend, then raises instead of running the original connectivity. The choice is kept in
    ``model.config.farskip``; ``save_pretrained`` writes it, under an architecture of its own that other software refuses (see
    saved.py), and ``farskip_fx.from_pretrained`` loads that. On a reloaded model ``apply(model)`` needs no options.
    ``generate`` is told not to compile the model a second time (``model.generation_config.disable_compile``), which it
    does by itself on a GPU with a static cache.

    Args:
        model: a model with a list of decoder layers, Hugging Face or not.
        config: a ``FarskipConfig`` or a dict of its fields; alternatively give the fields as keywords. With
            ``data_parallel`` (a DeviceMesh or a process group) the whole forward of ``model`` is compiled, head and loss
            included, and its gradients are averaged in the backward; collective, after ``expert_parallel``. With
            ``costs="profiled"`` and no ``rates`` they are measured here; collective over the ranks that share the experts.
        dynamic: as in ``torch.compile``.

    Returns:
        ``model``.

    Raises:
        ConfigError: unknown options, options that disagree with ``model.config.farskip``, or a model that is
            converted already.
        NoMoEError: the model has no list of layers.
    """
    given = _options(config, options)
    if isinstance(given.get("data_parallel"), (DeviceMesh, ProcessGroup)):
        given["data_parallel"] = data_parallel(model, given["data_parallel"])
    if given.get("costs") == "profiled" and given.get("rates") is None:
        given["rates"] = calibrate_for(model)
    earlier = converted_of(model)
    if earlier is not None:
        if earlier.forward._compiled is not None:
            raise ConfigError("this model is converted already; call farskip_fx.remove(model) first")
        del earlier.forward
    # Gradients are averaged inside the graph, so the graph holds the head, too.
    owner = model if given.get("data_parallel") is not None else decoder_of(model)
    settings = [c for c in (getattr(model, "config", None), getattr(owner, "config", None)) if c is not None]
    saved = next((c.farskip for c in settings if getattr(c, "farskip", None) is not None), None)
    agree(given, saved, "the checkpoint (config.farskip)")
    chosen = _with_payload(FarskipConfig.from_dict(merge(saved, given)), payload_of(model))
    owner.forward = Converted(owner.forward, chosen, dynamic=dynamic)
    for holder in settings:
        record(holder, chosen.saved())
    generation = getattr(model, "generation_config", None)
    if hasattr(generation, "disable_compile"):
        owner.forward.disable_compile = generation.disable_compile
        generation.disable_compile = True
    return model


def _with_payload(config: FarskipConfig, travels: dict[str, str] | None) -> FarskipConfig:
    """``config`` with what the sharded experts do."""
    for name, value in (travels or {}).items():
        if getattr(config, name) not in ("", value):
            raise ConfigError(f"{name}={getattr(config, name)!r}, but the experts are sharded with {value!r}: call farskip_fx."
                              f"expert_parallel(model, group, {name}={getattr(config, name)!r}) before apply, or load the "
                              "checkpoint with farskip_fx.from_pretrained(..., expert_parallel=group)")
    return dataclasses.replace(config, **travels) if travels else config


def remove(model: nn.Module) -> nn.Module:
    """Undo ``apply``: the model runs its original connectivity again, and its checkpoint says so."""
    owner = converted_of(model)
    if owner is None:
        raise ConfigError("this model is not converted: farskip_fx.apply was not called on it")
    current = owner.forward
    # An instance attribute hides the method of the class; an earlier instance attribute is put back.
    del owner.forward
    wrapped = getattr(current, "__wrapped__", None)
    if wrapped is not None and getattr(wrapped, "__func__", None) is not type(owner).forward:
        owner.forward = wrapped
    for holder in (getattr(model, "config", None), getattr(owner, "config", None)):
        forget(holder)
    if hasattr(getattr(model, "generation_config", None), "disable_compile"):
        model.generation_config.disable_compile = current.disable_compile
    return model


def farskip(config: FarskipConfig | dict | None = None, **options) -> Callable:
    """Decorator for a model's ``forward``: ``@farskip_fx.farskip(connectivity="farskip")``.

    The decorated function is compiled with the farskip backend, and raises where it would run uncompiled.

    Args:
        config: a ``FarskipConfig`` or a dict of its fields; alternatively give the fields as keywords.
    """
    if callable(config):
        raise ConfigError("use @farskip_fx.farskip() with parentheses")
    chosen = FarskipConfig.from_dict(_options(config, options))
    return lambda forward: Converted(forward, chosen)


@contextmanager
def in_one_graph(scope: Callable[[], AbstractContextManager], module: nn.Module | None, kwargs: dict) -> Iterator[None]:
    """Call what was compiled of ``module`` in here, with ``kwargs``: ``scope`` is what ``capture.prepare`` returns for it."""
    install_capture_hooks(module, kwargs)
    # A warning on the way is no reason to split the model over two graphs. PyTorch's create_block_mask has one, and
    # transformers, by a method that it gives to loggers, where a cache is asked for under gradient checkpointing.
    once = getattr(logging.Logger, "warning_once", warnings.warn)
    with scope(), ignored_in_graphs(warnings.warn, once):
        yield


_OUTPUTS = ("output_hidden_states", "output_attentions", "output_router_logits")


def install_capture_hooks(module: nn.Module | None, kwargs: dict) -> None:
    """Install transformers' output hooks if this call asks for hidden states, attentions or router logits.

    transformers does it inside the first such forward and under a lock, which breaks the graph in front of the layers.
    Not earlier than asked for: a hooked model cannot be pickled.
    """
    library = sys.modules.get("transformers.utils.output_capturing")
    if library is None or module is None:
        return
    config = getattr(module, "config", None)
    names = {*_OUTPUTS, *(name for name in kwargs if name.startswith("output_"))}
    if not any(kwargs.get(name, getattr(config, name, False)) for name in names):
        return
    from transformers import PreTrainedModel
    found = [m for m in module.modules() if isinstance(m, PreTrainedModel)]
    for one in found:
        # Innermost only: a model installs the hooks of those inside it too, and does not look whether they are there.
        if not any(isinstance(m, PreTrainedModel) and m is not one for m in one.modules()):
            library.maybe_install_capturing_hooks(one)


def settings_of(model: nn.Module, config: FarskipConfig | Mapping | None = None) -> FarskipConfig:
    """What ``model`` was converted with, or would be by ``apply(model, config)``.

    Raises:
        ConfigError: ``config`` contradicts the conversion, or what the checkpoint says.
    """
    given, converted = _options(config, {}), converted_of(model)
    if converted is not None:
        known = converted.forward.config
        agree(given, known.saved(), "the configuration given to farskip_fx.apply")
        return FarskipConfig.from_dict(merge(known.to_dict(), given))
    saved = getattr(getattr(model, "config", None), "farskip", None)
    agree(given, saved, "the checkpoint (config.farskip)")
    return FarskipConfig.from_dict(merge(saved, given))


def _options(config: FarskipConfig | Mapping | None, options: dict) -> dict:
    return {**(config.to_dict() if isinstance(config, FarskipConfig) else config or {}), **options}


def converted_of(model: nn.Module) -> nn.Module | None:
    """The module that ``apply`` gave a compiled forward: ``model`` itself with ``data_parallel``, or its decoder."""
    return next((m for m in model.modules() if isinstance(m.__dict__.get("forward"), Converted)), None)


def decoder_of(model: nn.Module) -> nn.Module:
    """The module that owns the decoder layers.

    Of several lists of modules: the one with experts, and the module around all of them where several have experts (an
    encoder and a decoder); without experts the largest.
    """
    lists = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) > 1 and not any(name.startswith(f"{outer}.") for outer in lists):
            lists[name] = module
    if not lists:
        raise NoMoEError(f"no MoE found: {type(model).__name__} has no list of decoder layers (an nn.ModuleList with "
                         "two or more entries); compile its forward with @farskip_fx.farskip() instead")
    chosen = [name for name in lists if _has_experts(lists[name])]
    chosen = chosen or [max(lists, key=lambda name: sum(p.numel() for p in lists[name].parameters()))]
    owners = [name.split(".")[:-1] for name in chosen]
    shared = 0
    while all(len(o) > shared and o[shared] == owners[0][shared] for o in owners):
        shared += 1
    return model.get_submodule(".".join(owners[0][:shared]))


def _has_experts(layers: nn.ModuleList) -> bool:
    """Stacked weights, or a list of experts in a layer."""
    for module in layers.modules():
        if module is not layers and isinstance(module, (nn.ModuleList, nn.ModuleDict)) and len(module) > 1:
            return True
        convolves = isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d))
        if not convolves and any(p.dim() > 2 for p in module.parameters(recurse=False)):
            return True
    return False
