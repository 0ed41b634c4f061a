"""From a model to its hidden states and its head, without its logits.

    head = Head of the model, checked once: head_of(model)
    hidden = hidden_states(model, input_ids=ids)            # [batch, length, hidden], what the head reads

Contract
    ``hidden_states`` calls the model itself (so DDP, FSDP, autocast wrappers and hooks see a forward), asks it for the
    logits of one position only (``logits_to_keep=1``, which transformers' causal models have) and takes the decoder's result
    on its way to the head by a forward hook.
    ``head_of`` reads from the config what the model does to its logits. ``check_head`` compares that with the logits of the
    model, on a few tokens: a model that does something else is refused, never approximated.
"""
from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..convert import decoder_of
from ..errors import RefusedError
from .loss import Head

# config field -> the factor on the logits. Granite divides by logits_scaling, some relatives multiply: the check decides.
_FACTORS = {
    "logits_scaling": (lambda x: 1 / x, lambda x: x),
    "logit_scale": (lambda x: x,),
    "logits_mup_width_multiplier": (lambda x: 1 / x,),
    "output_multiplier": (lambda x: x,),
    "lm_head_multiplier": (lambda x: x,),
}
_CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
_TOLERANCE = 1e-3       # of the largest logit, for a model in float32


def base_of(model: nn.Module) -> nn.Module:
    """The transformers model inside wrappers of DDP, FSDP and PEFT."""
    while True:
        if hasattr(model, "get_base_model"):        # PEFT
            model = model.get_base_model()
        elif isinstance(inner := getattr(model, "module", None), nn.Module):
            model = inner
        else:
            return model


def text_config(base: nn.Module):
    """The config of the language model, where that of ``base`` holds several."""
    return base.config.get_text_config() if hasattr(base.config, "get_text_config") else base.config


def decoder_under_head(model: nn.Module) -> nn.Module:
    """The module whose result the head reads.

    Raises:
        RefusedError: the model has no separate decoder and head, or computes the logits of all positions at once.
    """
    base = base_of(model)
    decoder = base.get_decoder() if hasattr(base, "get_decoder") else None
    if decoder is base:             # Llama4ForCausalLM, whose base_model_prefix names no module of it
        decoder = decoder_of(base)
    if decoder in (None, base) or not hasattr(base, "get_output_embeddings"):
        raise RefusedError(f"{type(base).__name__} is no causal language model with a decoder and a head "
                           "(get_decoder and get_output_embeddings of transformers); distill a ...ForCausalLM")
    if "logits_to_keep" not in inspect.signature(base.forward).parameters:
        raise RefusedError(f"{type(base).__name__}.forward has no logits_to_keep: it would compute the logits of all "
                           "positions at once. Give its forward that argument, as transformers' causal models have it")
    return decoder


def hidden_states(model: nn.Module, **inputs) -> tuple[Tensor, object]:
    """Run ``model`` on ``inputs`` (no labels among them): the hidden states before the head, and the model's output."""
    found: list[Tensor] = []

    def keep(module, args, output):
        found.append(output[0] if isinstance(output, tuple) else output.last_hidden_state)

    handle = decoder_under_head(model).register_forward_hook(keep)
    try:
        output = model(**inputs, logits_to_keep=1)
    finally:
        handle.remove()
    if len(found) != 1:
        raise RefusedError(f"{type(base_of(model)).__name__} ran its decoder {len(found)} times in one forward; a causal "
                           "language model runs it once")
    return found[0], output


def head_of(model: nn.Module) -> Head:
    """The head of ``model``, as its config describes it; its tensors are the model's own.

    Raises:
        RefusedError: the head is no plain linear layer (adapters on it, quantized).
    """
    return candidates(model)[0]


def candidates(model: nn.Module) -> list[Head]:
    base = base_of(model)
    decoder_under_head(base)
    layer = base.get_output_embeddings()
    if type(layer) is not nn.Linear or type(layer.weight.data) is not Tensor:
        kind = "" if getattr(layer, "weight", None) is None else f" with a weight of type {type(layer.weight.data).__name__}"
        raise RefusedError(f"the head of {type(base).__name__} is {type(layer).__name__}{kind}, and the loss reads a plain "
                           "nn.Linear: leave the head out of LoRA's target_modules and modules_to_save, and out of "
                           "quantization")
    config = text_config(base)
    caps = [value for name in _CAPS if (value := getattr(config, name, None))]
    scales = [[function(value) for function in functions] for name, functions in _FACTORS.items()
              if (value := getattr(config, name, None)) not in (None, 0, 1, 1.0)] or [[1.0]]
    if len(caps) > 1 or len(scales) > 1:
        names = ", ".join(name for name in (*_CAPS, *_FACTORS) if getattr(config, name, None))
        raise RefusedError(f"the config of {type(base).__name__} has several fields that change logits ({names}): their "
                           "order is not known")
    return [Head(weight=layer.weight, bias=layer.bias, scale=float(scale), softcap=caps[0] if caps else None)
            for scale in scales[0]]


@torch.no_grad()
def check_head(model: nn.Module, input_ids: Tensor | None = None) -> Head:
    """The head of ``model``, compared with its logits on a few tokens.

    Args:
        model: not converted yet, or converted (then it is compiled for these tokens, too).
        input_ids: [batch, length]; None: eight tokens from the vocabulary.

    Raises:
        RefusedError: the model's logits are not what its config says.
    """
    base = base_of(model)
    found = candidates(base)
    weight = found[0].weight
    if input_ids is None:
        input_ids = torch.arange(1, 9, device=weight.device)[None] % weight.shape[0]
    with in_eval_mode(base):
        hidden, output = hidden_states(base, input_ids=input_ids)
    want = output.logits[:, -1].float()
    tolerance = _TOLERANCE if want.dtype is weight.dtype else 3e-2
    off = {head.scale: _off(head.logits(hidden[:, -1]), want) for head in found}
    best = min(off, key=off.get)
    if not off[best] <= tolerance:
        raise RefusedError(
            f"the logits of {type(base).__name__} are not head(hidden states) with scale {best} and soft cap "
            f"{found[0].softcap}: off by {off[best]:.1e} of the largest. The model does something to its hidden states or "
            "logits that farskip_fx.distill does not know, so its KL would be that of another model")
    return next(head for head in found if head.scale == best)


def _off(got: Tensor, want: Tensor) -> float:
    return ((got - want).abs().max() / want.abs().max().clamp(min=1e-30)).item()


@contextmanager
def in_eval_mode(model: nn.Module) -> Iterator[None]:
    """Every module in eval mode; afterwards each as it was."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True
