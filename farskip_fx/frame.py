"""Which Python frame Dynamo is compiling while it calls a backend.

A backend gets a graph and nothing else, but some safety checks need to know more: is this the rest of a frame after a
graph break, and does the module carry a saved connectivity (``module.config.farskip``)?
"""
from __future__ import annotations

import copy
from dataclasses import dataclass

from torch import nn

from .passes._torch import current_translator, guard_that


@dataclass(frozen=True)
class Frame:
    name: str
    module: nn.Module | None
    resumed: bool           # the rest of a frame after a graph break

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
        modules = self.module.modules() if self.module is not None else ()
        kinds = {f"{type(m).__module__}.{type(m).__name__}" for m in modules}
        if "peft.tuners.lora.layer.ParamWrapper" in kinds:
            return (". Here PEFT adapters on parameters (target_parameters) break it: call "
                    "farskip_fx.lora.traceable(model) after get_peft_model, or model.merge_and_unload()")
        return ""


def compiling() -> Frame:
    """The frame being compiled; an empty one where a backend is called by hand.

    Dynamo compiles the frame again once a saved connectivity is another one than now.
    """
    translator = current_translator()
    if translator is None:
        return Frame(name="<called directly>", module=None, resumed=False)
    name = translator.f_code.co_name
    owner = next((v for v in translator.output.local_scope.values() if isinstance(v, nn.Module)), None)
    where = Frame(name=name, module=owner, resumed=name.startswith("torch_dynamo_resume_in"))
    saved = [(c, copy.deepcopy(getattr(c, "farskip", None))) for c in where.configs]
    guard_that(translator, lambda: all(getattr(c, "farskip", None) == then for c, then in saved),
               "config.farskip is what this graph was compiled with")
    return where
