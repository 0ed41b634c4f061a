"""Peer: transformers' own expert parallelism, as ``DistributedConfig(ep_size=2, ep_implementation="all_to_all")`` installs it.

The experts are sharded already, so only its exchange (``AllToAllEP``) is put around them. It breaks the graph in every layer;
compiled without ``fullgraph`` as a user would, or eager: the run says which was faster and counts that one.
"""
from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.distributed as dist
from torch import nn

from ..families import moe_layers
from ..spec import EP, Spec
from .twin import twin


def ways(model: nn.Module, spec: Spec) -> dict[str, Callable]:
    peer = installed(model)
    found = {"eager": partial(_eager, peer)}
    if spec.inner != "eager":
        found["compiled, graph breaks"] = partial(_as_by_default, torch.compile(peer, backend=spec.inner))
    return found


def installed(model: nn.Module) -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from transformers.distributed.expert_parallel import AllToAllEP

    mesh = init_device_mesh("cpu", (dist.get_world_size() // EP, EP, 1), mesh_dim_names=("dp", "ep", "tp"))
    peer = twin(model)
    for layer in moe_layers(peer):
        experts = layer.mlp.experts
        experts.config = experts._farskip_config
        del experts._farskip_experts, experts._farskip_config
        experts._is_expert_parallel = True          # as its own sharding sets it
        experts.forward = AllToAllEP(experts, mesh["ep"], mesh["tp"])
    return peer


def _as_by_default(compiled: Callable, ids: torch.Tensor, use_cache: bool = False):
    # The bench lets Dynamo trace split sizes, for the variants that are one graph; a user has the default.
    with torch._dynamo.config.patch(capture_scalar_outputs=False):
        return compiled(ids, use_cache=use_cache)


@torch.compiler.disable
def _eager(peer: nn.Module, ids: torch.Tensor, use_cache: bool = False):
    return peer(ids, use_cache=use_cache)
