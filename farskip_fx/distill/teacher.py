"""The teacher: the same weights before the conversion, frozen, with their original connectivity.

    teacher = make_teacher(config, model)       # before farskip_fx.apply(model)
    target = teacher(input_ids=ids)             # what loss.distillation_loss compares with, or None of it is kept

Modes
    copy    a second model: deepcopy, before the conversion. Twice the weights.
    int8    that copy with int8 weights (int8.py): a quarter of float32, half of bf16. The head and routers stay as they are.
    shared  a LoRA student (PEFT): its own weights with the adapters off. No second copy.
    cached  log-probabilities computed once and stored (cache.py). No second model, and no forward of one.

Contract
    A teacher runs in eval mode, without gradients, with connectivity "none". The copy is converted with "none", so its
    exchanges overlap as far as the original allows. ``shared`` keeps two compiled forwards for one module, the student's and
    one with "none", and puts the second in place for one call; each is compiled with its own marker, so neither can run in
    the place of the other. With inner="eager" there is nothing to overlap, and a teacher runs uncompiled.
"""
from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from ..config import FarskipConfig
from ..convert import Converted, apply, converted_of
from ..errors import ConfigError
from .head import base_of, check_head, hidden_states, in_eval_mode
from .loss import Dense, Head

MODES = ("copy", "int8", "shared", "cached")

# Initialisations of LoRA that change the base weights: with the adapters off that is another model.
_CHANGE_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


class Teacher:
    """A frozen model of its own."""

    def __init__(self, model: nn.Module, head: Head) -> None:
        self.model, self.head = model, head

    def __call__(self, **inputs) -> Dense:
        with torch.no_grad():
            hidden, output = hidden_states(self.model, **inputs)
        return Dense(hidden, self.head, getattr(output, "hidden_states", None) or ())

    def to(self, device: torch.device) -> None:
        """Move the model; nothing happens where it is there already."""
        if self.head.weight.device != device:
            self.model.to(device)
            layer = base_of(self.model).get_output_embeddings()
            self.head = self.head.with_weights(layer.weight, layer.bias)


class SharedTeacher(Teacher):
    """The student with its adapters off and its original connectivity."""

    def __init__(self, model: nn.Module, head: Head, *, inner: str) -> None:
        super().__init__(model, head)
        self._inner = inner
        self._original: tuple[Callable, Callable] | None = None         # the plain forward, and how the teacher runs it

    def __call__(self, **inputs) -> Dense:
        with self.model.disable_adapter(), in_eval_mode(self.model), self._original_connectivity():
            return super().__call__(**inputs)

    def to(self, device: torch.device) -> None:
        """The student is moved by its trainer."""

    @contextmanager
    def _original_connectivity(self) -> Iterator[None]:
        owner = converted_of(self.model)
        if owner is None:       # the student is not converted (yet): it has the original connectivity
            yield
            return
        student = owner.forward
        plain = student.__wrapped__
        if self._original is None or self._original[0] is not plain:
            config = FarskipConfig(connectivity="none", inner=self._inner)
            self._original = plain, plain if self._inner == "eager" else Converted(plain, config)
        owner.forward = self._original[1]
        try:
            yield
        finally:
            owner.forward = student


def make_teacher(mode: str, model: nn.Module, *, inner: str = "inductor", copy_of: nn.Module | None = None) -> Teacher:
    """The teacher of ``model``, which is not converted yet.

    Args:
        mode: "copy", "int8" or "shared" (a cache is made by cache.py).
        model: the student to be, with the original weights.
        inner: as in ``FarskipConfig``.
        copy_of: the original, where ``model`` is not it any more (a run that goes on from a converted checkpoint). Taken as
            it is and frozen, not copied.

    Raises:
        ConfigError: the model is converted already, or is no LoRA student in mode "shared".
        RefusedError: the model's logits are not understood (see head.py).
    """
    if mode not in ("copy", "int8", "shared"):
        raise ConfigError(f"teacher={mode!r} is not known; choose one of {', '.join(MODES)}")
    if mode == "shared":
        if copy_of is not None:
            raise ConfigError('teacher="shared" is the student itself; leave teacher_model out, or use teacher="copy"')
        require_adapters(model)
        require_original(model, of="student")
        with model.disable_adapter():
            return SharedTeacher(model, check_head(model), inner=inner)
    require_original(model if copy_of is None else copy_of, of="teacher")
    original = copy.deepcopy(model) if copy_of is None else copy_of
    original.requires_grad_(False).eval()
    head = check_head(original)
    if mode == "int8":
        from .int8 import quantize
        quantize(original)
    if inner != "eager":
        apply(original, connectivity="none", inner=inner)
    return Teacher(original, head)


def require_original(model: nn.Module, *, of: str) -> None:
    """Raise where ``model`` is converted, or was saved as a converted one."""
    saved = next((found for m in model.modules() if (config := getattr(m, "config", None)) is not None
                  and (found := getattr(config, "farskip", None)) is not None), None)
    if converted_of(model) is not None or saved is not None:
        raise ConfigError(
            f"the {of} is converted already ({saved}), so it is not the original that the student is to imitate. Give "
            "farskip_fx.distill the unconverted model: it converts the student itself. To go on from a converted "
            "checkpoint, pass the original as teacher_model=")


def require_adapters(model: nn.Module) -> None:
    """Raise where turning the adapters of ``model`` off does not give the original."""
    if not hasattr(model, "disable_adapter"):
        raise ConfigError('teacher="shared" needs a LoRA student: model = peft.get_peft_model(model, peft.LoraConfig(...)). '
                          'To train all weights use teacher="copy", "int8" or "cached"')
    prefix = getattr(model.base_model, "prefix", "lora_")
    others = [name for name, p in model.named_parameters() if p.requires_grad and prefix not in name]
    if others:
        raise ConfigError(f'teacher="shared", but {len(others)} trainable parameters are no adapters ({others[0]}, ...): '
                          'with them the teacher would change, too. Freeze them, or use teacher="copy"')
    for name, settings in model.peft_config.items():
        how = getattr(settings, "init_lora_weights", True)
        if isinstance(how, str) and how.lower().startswith(_CHANGE_THE_BASE):
            raise ConfigError(f'adapter {name!r} was made with init_lora_weights={how!r}, which changes the base weights: '
                              'with the adapters off that is not the original. Use the usual one, or teacher="copy"')
