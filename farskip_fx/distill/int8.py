"""Weight-only int8 for a frozen model, experts included.

torchao's ``quantize_`` handles ``nn.Linear``. Experts are 3-D parameters that grouped matmuls and loops read in many ways,
so here a wrapper around the module that owns them keeps int8 values with one scale for each row (torchao's ``Int8Tensor``,
symmetric) and hands the module widened weights for one call (``torch.func.functional_call``): those of one layer exist at a
time.

Left as they are: the head (the loss reads it), embeddings, norms, and routers (a small change of a router changes which
experts a token gets).
"""
from __future__ import annotations

import torch
from torch import nn
from torch.func import functional_call

from .head import base_of, text_config


class Int8Experts(nn.Module):
    """A module of experts whose stacked weights are kept in int8."""

    def __init__(self, experts: nn.Module, names: list[str]) -> None:
        from torchao.quantization import Int8Tensor, PerRow
        super().__init__()
        self.experts = experts
        self.names = tuple(names)
        for name in names:
            weight = getattr(experts, name)
            small = Int8Tensor.from_hp(weight.detach(), granularity=PerRow())
            self.register_buffer(f"{name}_int8", small.qdata)
            self.register_buffer(f"{name}_scale", small.scale)
            # Of no size, and still of three dimensions: that is how farskip_fx.apply knows experts.
            setattr(experts, name, nn.Parameter(weight.detach().new_empty((0,) * weight.dim()), requires_grad=False))

    def forward(self, *args, **kwargs):
        return functional_call(self.experts, {name: self.widened(name) for name in self.names}, args, kwargs)

    def widened(self, name: str) -> torch.Tensor:
        dtype = getattr(self.experts, name).dtype
        return (getattr(self, f"{name}_int8").to(torch.float32) * getattr(self, f"{name}_scale")).to(dtype)

    def __getattr__(self, name: str):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("experts"), name)       # what a block asks its experts for (num_experts)


@torch.no_grad()
def quantize(model: nn.Module) -> nn.Module:
    """Keep the weights of ``model`` in int8, in place. Linear layers through torchao, experts by ``Int8Experts``.

    Returns:
        ``model``, for inference only.
    """
    from torchao.quantization import Int8WeightOnlyConfig, quantize_
    base = base_of(model)
    head = base.get_output_embeddings()
    config = text_config(base)
    counts = {getattr(config, name, None) for name in ("num_experts", "num_local_experts", "n_routed_experts",
                                                       "moe_num_experts")} - {None}

    def wanted(module: nn.Module, name: str) -> bool:
        router = name.rpartition(".")[2] in ("gate", "router") or ".router." in name or getattr(
            module, "out_features", None) in counts
        return isinstance(module, nn.Linear) and module is not head and not router

    # set_inductor_config would change Inductor's settings for every other model of the process.
    quantize_(base, Int8WeightOnlyConfig(set_inductor_config=False), filter_fn=wanted)
    for name, module in list(base.named_modules()):
        stacked = [n for n, p in module.named_parameters(recurse=False) if p.dim() == 3 and p.is_floating_point()]
        if stacked and not isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
            base.set_submodule(name, Int8Experts(module, stacked))
    return model
