"""Which Python frame Dynamo is compiling while it calls a backend.

A backend gets a graph and nothing else, but two safety checks need to know more: is this the rest of a frame after a
graph break, and does the module carry a saved connectivity (``module.config.farskip``)?
"""
from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from .passes._torch import current_translator


@dataclass(frozen=True)
class Frame:
    name: str
    module: nn.Module | None
    resumed: bool           # the rest of a frame after a graph break

    @property
    def saved(self) -> dict | None:
        """``config.farskip`` of the compiled module or of one inside it: what the checkpoint was converted with."""
        modules = self.module.modules() if self.module is not None else ()
        return next((found for m in modules if (found := getattr(getattr(m, "config", None), "farskip", None)) is not None),
                    None)

    @property
    def owns_layers(self) -> bool:
        """Whether the module holds a list of layers, so that its first graph must hold the stream."""
        return self.module is not None and any(
            isinstance(m, (nn.ModuleList, nn.Sequential)) and len(m) > 1 for m in self.module.modules())


def compiling() -> Frame:
    """The frame being compiled; an empty one where a backend is called by hand."""
    translator = current_translator()
    if translator is None:
        return Frame(name="<called directly>", module=None, resumed=False)
    name = translator.f_code.co_name
    owner = next((v for v in translator.output.local_scope.values() if isinstance(v, nn.Module)), None)
    return Frame(name=name, module=owner, resumed=name.startswith("torch_dynamo_resume_in"))
