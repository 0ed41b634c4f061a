"""Which Python frame Dynamo is compiling while it calls a backend.

A backend gets a graph and nothing else, but some safety checks need to know more: is this the rest of a frame after a
graph break, and where was that; does the module carry a saved connectivity (``module.config.farskip``); was the KV
cache that comes in filled by this conversion?
"""
from __future__ import annotations

import copy
import os
import weakref
from dataclasses import dataclass

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.fx import GraphModule
from torch.nn.parallel import DistributedDataParallel

from .capture import way_to_one_graph
from .data_parallel import DataParallel, is_paused
from .passes._torch import current_translator, guard_that

# Which conversions (their saved fields) have compiled a graph of this module that began without a filled cache.
_BEGAN: weakref.WeakKeyDictionary[nn.Module, set[str]] = weakref.WeakKeyDictionary()

# What to do about breaks that are not in the user's code.
_ADVICE = {
    "output_capturing.py": "transformers installs its output hooks inside the first forward that asks for router "
    "logits, hidden states or attentions: use farskip_fx.apply(model), which does it before, or call the model once with "
    "that option before compiling it",
    "modeling_utils.py": "if it is make_inputs_require_grads: transformers makes the embeddings' output require gradients, "
    "for reentrant checkpointing outside of a graph; call model.disable_input_require_grads()",
}


@dataclass(frozen=True)
class Frame:
    name: str
    module: nn.Module | None
    resumed: bool           # the rest of a frame after a graph break
    file: str = ""
    filled_cache: bool = False      # a KV cache comes in that holds tokens

    @property
    def saved(self) -> dict | None:
        """``config.farskip`` of the compiled module or of one inside it: what the checkpoint was converted with."""
        return next((found for c in self.configs if (found := getattr(c, "farskip", None)) is not None), None)

    @property
    def configs(self) -> list:
        """Of the compiled module and of those inside it, each once."""
        modules = self.module.modules() if self.module is not None else ()
        return list({id(c): c for m in modules if (c := getattr(m, "config", None)) is not None}.values())

    @property
    def owns_layers(self) -> bool:
        """Whether the module holds a list of layers, so that its first graph must hold the stream."""
        return self.module is not None and any(
            isinstance(m, (nn.ModuleList, nn.Sequential)) and len(m) > 1 for m in self.module.modules())

    @property
    def hint(self) -> str:
        """What is known to break the graph of such a module, for the end of an error message; empty if nothing is."""
        modules = list(self.module.modules()) if self.module is not None else []
        kinds = {f"{type(m).__module__}.{type(m).__name__}" for m in modules}
        if "peft.tuners.lora.layer.ParamWrapper" in kinds:
            return (". Here PEFT adapters on parameters (target_parameters) break it: call "
                    "farskip_fx.lora.traceable(model) after get_peft_model, or model.merge_and_unload()")
        if any(getattr(c, "_attn_implementation", None) == "flex_attention" for c in self.configs):
            return (". Here flex attention breaks it, which warns while it builds the mask: use "
                    "farskip_fx.apply(model), which skips the warning, or add warnings.warn to "
                    "torch._dynamo.config.ignore_logging_functions")
        if any(kind.rpartition(".")[2].startswith("FSDP") for kind in kinds):
            return (". Here FSDP2 stands around single layers: call fully_shard on the whole model once (and not on its layers), "
                    "or use data_parallel=")
        if DistributedDataParallel._get_active_ddp_module() is not None and \
                torch._dynamo.config.optimize_ddp in (True, "ddp_optimizer"):
            return (". Here DDPOptimizer splits the model: set torch._dynamo.config.optimize_ddp = \"no_optimization\", or use "
                    "data_parallel= and no DDP")
        if any(isinstance(p, DTensor) for m in modules for p in m.parameters(recurse=False)):
            return (". Here the parameters are DTensors (transformers' tp_plan?), whose redistribution is not understood: load the "
                    "model without it and use farskip_fx.expert_parallel(model, group, exchange=\"all_reduce\")")
        way = way_to_one_graph(self.module) if self.module is not None else None
        if way:
            return f". Here {way}"
        if any(m.training and getattr(m, "gradient_checkpointing", False) for m in modules):
            return (". Here gradient checkpointing is on: what breaks the graph in a layer breaks it around the whole "
                    "layer. Without farskip_fx.apply, a cache (pass use_cache=False) and router logits that are asked for "
                    "do so too")
        return ""

    def break_of(self, gm: GraphModule) -> str:
        """A sentence: where and why the graph breaks, and what helps; empty if it does not break."""
        reason = getattr(gm, "compile_subgraph_reason", None)
        if getattr(reason, "graph_break", False):
            at = reason.user_stack[-1] if reason.user_stack else None
            file = os.path.basename(at.filename) if at is not None else ""
            place = f" at {file}:{at.lineno} in {at.name}" if at is not None else ""
            lines = [line.strip() for line in reason.reason.splitlines() if line.strip()]
            why = "; ".join(line for line in lines[:2] if not line.startswith("Hint"))
            text = f"The graph breaks{place}: {why.rstrip('.')}"
        elif self.resumed:
            file = os.path.basename(self.file)
            text = f"The graph breaks at {file}:{self.name.rpartition('_at_')[2]}"
        else:
            return ""
        return text + (f" ({_ADVICE[file]}). " if file in _ADVICE else ". ")

    def is_paused(self, parallel: DataParallel) -> bool:
        """Whether `no_sync` holds the averages of gradients back; this graph is for that state only."""
        now = is_paused(parallel)
        translator = current_translator()
        if translator is not None:
            guard_that(translator, lambda: is_paused(parallel) == now, "inside or outside of farskip_fx.no_sync")
        return now

    def continues_unknown_cache(self, conversion: str) -> bool:
        """Whether a filled KV cache comes in before this conversion of this module ever began a sequence.

        Then something else filled it, most likely the original model.
        """
        if self.module is None:
            return False
        began = _BEGAN.setdefault(self.module, set())
        if not self.filled_cache:
            began.add(conversion)
        return conversion not in began


def compiling() -> Frame:
    """The frame being compiled; an empty one where a backend is called by hand.

    Dynamo compiles the frame again once a saved connectivity is another one than now.
    """
    translator = current_translator()
    if translator is None:
        return Frame(name="<called directly>", module=None, resumed=False)
    name, scope = translator.f_code.co_name, translator.output.local_scope
    # A bound method: the forward that ``apply`` closes over.
    modules = (v if isinstance(v, nn.Module) else getattr(v, "__self__", None) for v in scope.values())
    owner = next((m for m in modules if isinstance(m, nn.Module)), None)
    where = Frame(name=name, module=owner, resumed=name.startswith("torch_dynamo_resume_in"),
                  file=translator.f_code.co_filename, filled_cache=any(map(_is_filled, _arguments(scope))))
    saved = [(c, copy.deepcopy(getattr(c, "farskip", None))) for c in where.configs]
    guard_that(translator, lambda: all(getattr(c, "farskip", None) == then for c, then in saved),
               "config.farskip is what this graph was compiled with")
    return where


def _arguments(scope: dict):
    """The values of a frame's locals, with what ``*args`` and ``**kwargs`` hold."""
    for value in scope.values():
        if isinstance(value, dict):
            yield from value.values()
        elif isinstance(value, tuple):
            yield from value
        else:
            yield value


def _is_filled(value) -> bool:
    """Whether a value is a KV cache of transformers (a list of layers) that holds tokens already."""
    layers = getattr(value, "layers", None)
    if not isinstance(layers, list) or not hasattr(value, "get_seq_length"):
        return False
    return any(_holds_tokens(layer) for layer in layers)


def _holds_tokens(layer) -> bool:
    state = getattr(layer, "has_previous_state", None)
    if isinstance(state, dict) and any(state.values()):
        return True
    return hasattr(layer, "get_seq_length") and bool(layer.get_seq_length() > 0)
