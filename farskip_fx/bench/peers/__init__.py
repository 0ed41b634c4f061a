"""What a user could pick instead, written by hand, for the same sharded model: a file each.

transformers_ep    transformers' own expert parallelism, compiled where the graph breaks allow it or eager, whichever is faster
two_batches        exact: the tokens of a rank in two halves, one half's exchanges behind the other's compute
overlapped_eager   farskip's connectivity by hand, as its authors wrote it: a loop over layers with asynchronous handles

A peer shares the parameters of the model and takes its token ids; without data parallelism, one sequence a rank. Between the
exchanges compute is compiled, and the local experts are those that the other variants run. Backward comes from autograd: it
runs nodes in the reverse order of the forward, so what a wait stood behind in forward its launch stands behind in backward.
"""
from __future__ import annotations

from collections.abc import Callable

from torch import nn

from ..spec import PEERS, Spec

WHAT = {
    "transformers_ep": "standard connectivity, transformers' own expert parallelism (all_to_all)",
    "two_batches": "standard connectivity, two halves of the tokens, overlapped by hand",
    "overlapped_eager": "farskip by hand: a loop with asynchronous handles, compiled between",
}
assert set(WHAT) == set(PEERS)
CONNECTIVITY = {"overlapped_eager": "farskip"}


def ways(name: str, model: nn.Module, spec: Spec) -> dict[str, Callable]:
    """Ways to run a peer, by what they are called; the fastest counts. Each takes ``(ids, use_cache=False)``. All ranks call
    this in the same order: it makes process groups."""
    if name == "transformers_ep":
        from .transformers_ep import ways as make
    elif name == "two_batches":
        from .two_batches import ways as make
    else:
        from .overlapped_eager import ways as make
    return make(model, spec)
