"""A second module tree around the parameters of a model: other settings, the same weights and gradients."""
from __future__ import annotations

import copy

from torch import nn


def twin(model: nn.Module) -> nn.Module:
    """A copy that shares every parameter with ``model``; configurations are its own."""
    return copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})
