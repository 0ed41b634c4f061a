"""The decoder of a model, for as long as somebody looks at it: another forward, or fewer layers. Afterwards it is as it was."""
from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from torch import nn

from ..convert import decoder_of
from ..errors import NoMoEError


class Reached(BaseException):
    """Unwinds the model's forward once its decoder was called. Not an Exception: models catch those."""


def owner_of(model: nn.Module) -> nn.Module:
    """Whose forward ``apply`` would compile: the decoder, or a model without a list of layers as a whole."""
    try:
        return decoder_of(model)
    except NoMoEError:
        return model


@contextmanager
def replaced(decoder: nn.Module, forward: Callable) -> Iterator[None]:
    """``decoder`` with another forward."""
    own = decoder.__dict__.get("forward")
    decoder.forward = forward
    try:
        yield
    finally:
        del decoder.forward
        if own is not None:
            decoder.forward = own


def layers_of(decoder: nn.Module) -> tuple[str, Sequence[nn.Module]]:
    """The largest list of modules, and what it is called; ("", ()) where there is none."""
    return max(((n, m) for n, m in decoder.named_children() if isinstance(m, nn.ModuleList)), key=lambda entry: len(entry[1]),
               default=("", ()))


@contextmanager
def shortened(decoder: nn.Module, count: int) -> Iterator[None]:
    """``decoder``, which has a list of layers, with the first ``count`` of them: the same objects."""
    name, whole = layers_of(decoder)
    setattr(decoder, name, nn.ModuleList(list(whole)[:count]))
    try:
        yield
    finally:
        setattr(decoder, name, whole)
