"""PEFT adapters on expert or router *parameters* (``target_parameters``), in a form that Dynamo traces into one graph.

    model = get_peft_model(model, LoraConfig(target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]))
    farskip_fx.lora.traceable(model)        # after the adapters are there, before the first call
    farskip_fx.apply(model)                 # before or after

Why. PEFT's ``ParamWrapper.forward`` registers a parametrization for each call and removes it afterwards: that swaps the
class of the experts module and calls ``Tensor.set_`` on a parameter, so Dynamo breaks the graph in every MoE layer and
the decoder layers end up in pieces, which the backend refuses. Here the wrappers of *this* model get a subclass whose
forward computes the same weight, ``W + scaling * B A``, and hands it to the wrapped module for one call
(``torch.func.functional_call``). Merging, disabling, several adapters, saving and loading stay PEFT's code. Adapters on
``nn.Linear`` modules need none of this.

An adapter checkpoint holds no connectivity: load it onto a base model and convert that as the first one was.

Needs ``peft``, which farskip_fx does not depend on: import this module yourself.
"""
from __future__ import annotations

import torch
from peft.tuners.lora import layer as peft_layer
from torch import Tensor, nn
from torch.func import functional_call


class ParamWrapper(peft_layer.ParamWrapper):
    """PEFT's wrapper without a parametrization; of the same name, because PEFT also asks for the name."""

    def forward(self, x: Tensor, *args, **kwargs):
        adapters = [name for name in self.active_adapters if name in self.lora_A]
        if self.disable_adapters or self.merged or not adapters or not _adds_in_place_of(self.get_param()):
            return super().forward(x, *args, **kwargs)
        self._check_forward_args(x, *args, **kwargs)
        weight = self.get_param()
        for name in adapters:
            weight = self._adapted(weight, name)
        return functional_call(self.base_layer, {self._path(): weight}, (x, *args), kwargs)

    def _adapted(self, weight: Tensor, adapter: str) -> Tensor:
        if self.num_experts == 1:
            return weight + self.get_delta_weight(adapter)
        left, right, scaling = self.get_delta_factors(adapter)
        # In the weight's own type, also under autocast: PEFT's parametrization may not change it either.
        with torch.autocast(device_type=weight.device.type, enabled=False):
            return torch.baddbmm(weight, left, right, alpha=scaling)

    def _path(self) -> str:
        """Of the parameter, seen from the wrapped module: two parameters of one module make nested wrappers."""
        module, path = self.base_layer, self.parameter_name
        while isinstance(module, peft_layer.ParamWrapper):
            module, path = module.base_layer, f"base_layer.{path}"
        return path


def _adds_in_place_of(weight: Tensor) -> bool:
    """Float8 and the like cannot be added to; PEFT adds in a wider type and clamps, so leave them to PEFT."""
    return weight.dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def traceable(model: nn.Module) -> nn.Module:
    """Let Dynamo trace the parameter adapters of ``model``, in place; the numbers stay as they are.

    Call it again after adding adapters. Nothing happens to a model without such adapters.

    Returns:
        ``model``.
    """
    for module in model.modules():
        if type(module) is peft_layer.ParamWrapper:
            module.__class__ = ParamWrapper
    return model
