"""PyTorch's caches of compiled graphs, off for a while: so that every pass runs, and there is code and a schedule to look at.

Not by ``force_disable_caches``: that also gives each compile a fresh folder for C++ kernels, which are found by their content and
safe to share (measured, torch 2.13: builds take twice as long, and the folders are never removed).
"""
from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def graph_caches_off(*, inductor: bool = True) -> Iterator[None]:
    """Within it graphs are compiled anew. ``inductor=False``: only AOTAutograd's caches are off."""
    import torch._functorch.config as functorch
    import torch._inductor.config as of_inductor

    local = {"fx_graph_cache": False, "fx_graph_remote_cache": False} if inductor else {}
    with of_inductor.patch(local), functorch.patch(enable_autograd_cache=False, enable_remote_autograd_cache=False):
        yield
