"""The marker: an identity operator that only our backend understands.

``apply`` and the decorator put it on the tensor arguments of the converted forward. Rewiring changes numerics, so
a path that quietly runs the original connectivity is a wrong model: eager execution of the marker raises, and so does
any compiler other than ours, because it meets an operator that raises when it runs. Our backend removes it from the
graph and takes the configuration out of it.
"""
from __future__ import annotations

import torch
from torch.fx import Graph

from .config import FarskipConfig
from .errors import ConfigError, WrongConnectivityError


@torch.library.custom_op("farskip::marker", mutates_args=())
def _marker(x: torch.Tensor, config: str) -> torch.Tensor:
    raise WrongConnectivityError(
        "this model was converted with farskip_fx, and here it would run with its ORIGINAL connectivity: eagerly, or "
        "through a compiler other than the farskip backend (a graph break, torch._dynamo.disable, a reached recompile "
        "limit, TORCH_COMPILE_DISABLE, an outer torch.compile, generate with a generation config that does not say "
        "disable_compile=True, or a copy or a reloaded pickle of the model). Call farskip_fx.apply(model) again after "
        "copying or loading it, call it without an outer torch.compile, pass disable_compile=True to generate, or undo "
        f"the conversion with farskip_fx.remove(model). Its configuration: {config}")


@_marker.register_fake
def _(x: torch.Tensor, config: str) -> torch.Tensor:
    return torch.empty_like(x)


def mark(args: tuple, kwargs: dict, config: str) -> tuple[tuple, dict]:
    """Put the marker on every tensor among the arguments of a forward: one that the forward ignores would be dead code.

    Raises:
        WrongConnectivityError: there is no tensor to mark, so nothing would stop an eager run.
    """
    def marked(value):
        return torch.ops.farskip.marker(value, config) if isinstance(value, torch.Tensor) else value

    if not any(isinstance(value, torch.Tensor) for value in (*args, *kwargs.values())):
        raise WrongConnectivityError("the converted forward was called without a tensor argument; pass input_ids or "
                                     "inputs_embeds")
    return tuple(marked(value) for value in args), {name: marked(value) for name, value in kwargs.items()}


def consume(graph: Graph) -> FarskipConfig | None:
    """Remove the markers from a Dynamo graph; the configuration they carry, if there was one.

    Raises:
        ConfigError: two markers of one graph disagree.
    """
    found = None
    for node in list(graph.nodes):
        if node.op == "call_function" and node.target in (torch.ops.farskip.marker.default, torch.ops.farskip.marker):
            text = node.args[1]
            if found is not None and text != found:
                raise ConfigError(f"two converted modules with different configurations in one graph: {found} and "
                                  f"{text}; compile them apart")
            found = text
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
    return FarskipConfig.from_json(found) if found is not None else None
