"""Everything PyTorch-private that farskip_fx touches, in one place, each with its reader and the version it is from.

Public API is imported where it is used. What differs between versions is looked up here, so that a new PyTorch breaks
in this file and nowhere else. (Appended to by several modules; keep the sections.)
"""
from __future__ import annotations

# --- Dynamo graphs: passes/dataflow.py, farskip_fx/frame.py ------------------------------------------------------
from torch._C._functorch import is_batchedtensor  # noqa: F401  2.0: a vmapped tensor has no storage to look at
from torch._dynamo.symbolic_convert import InstructionTranslator  # 2.0: which frame a backend compiles


def current_translator():
    """The translator of the frame that Dynamo compiles now, None outside of a compile."""
    try:
        return InstructionTranslator.current_tx()
    except AttributeError:      # a thread-local that is only set while Dynamo traces
        return None


# --- inner compilers: farskip_fx/inner.py ------------------------------------------------------------------------
def compile_fx(gm, example_inputs, *, config_patches):
    """Inductor (2.0). Imported late: importing Inductor takes a second, and ``inner="eager"`` does not need it."""
    from torch._inductor.compile_fx import compile_fx as inductor
    return inductor(gm, example_inputs, config_patches=config_patches)


def aot_eager(gm, example_inputs):
    """AOTAutograd with nothing behind it (2.0)."""
    from torch._dynamo.backends.registry import lookup_backend
    return lookup_backend("aot_eager")(gm, example_inputs)


def mode_options(mode):
    """Inductor's options behind one of ``torch.compile``'s modes (public ``torch._inductor.list_mode_options``)."""
    if mode is None or mode == "default":
        return {}
    import torch._inductor
    return dict(torch._inductor.list_mode_options(mode))
