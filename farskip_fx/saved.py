"""How a converted model's configuration is written, so that software which does not know about it refuses.

    {"model_type": "farskip_fx", "architectures": ["FarskipQwen3MoeForCausalLM"],
     "load_with": "farskip_fx.from_pretrained",
     "farskip": {"version": 1, "connectivity": "farskip", "layers": "all"},
     "original": {"model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], ..., "farskip": {...}}}

Who reads it
    AutoConfig and every Auto class of transformers, and what is built on them: an unknown model_type, or, where farskip_fx is
    imported, an error that names `farskip_fx.from_pretrained`. Loaders that choose by architecture: an unknown one. A
    remote-code checkpoint's `auto_map` stands inside "original", so trust_remote_code does not lead around it.
    `farskip_fx.from_pretrained` takes the class named in "original". So does a class that somebody names himself
    (`Qwen3MoeForCausalLM.from_pretrained`): transformers looks for its own model_type one level down. That model has
    `config.farskip`, which `farskip_fx.apply` and `torch.compile(backend="farskip")` find; called eagerly, it runs the original
    connectivity, and no file can prevent that.

How
    `PreTrainedModel.save_pretrained` sets `config.architectures` from the model's class and lets the config write itself, so the
    config decides. A converted model's config gets a subclass of its class, of the same name (transformers' tables go by name),
    that differs in one method: the JSON text. In memory model_type stays the original, by which transformers and PEFT find names
    of weights and target modules.
"""
from __future__ import annotations

import functools
import json

from transformers import AutoConfig, PreTrainedConfig

from .errors import ConfigError

MODEL_TYPE = "farskip_fx"
PREFIX = "Farskip"
ORIGINAL = "original"


def record(config: object, saved: dict) -> None:
    """Keep a connectivity in a model's config: ``config.farskip``, and the form in which it is written."""
    config.farskip = saved
    if isinstance(config, PreTrainedConfig) and not isinstance(config, WrittenAsConverted):
        config.__class__ = _as_converted(type(config))


def forget(config: object) -> None:
    """Undo ``record``."""
    if getattr(config, "farskip", None) is not None:
        del config.farskip
    if isinstance(config, WrittenAsConverted):
        config.__class__ = _class_of(config)


class WrittenAsConverted:
    """In front of a config's class. One that lost its ``farskip`` is written as usual."""

    def to_json_string(self, use_diff: bool = True) -> str:
        text = super().to_json_string(use_diff)
        if getattr(self, "farskip", None) is None:
            return text
        original = json.loads(text)
        written = {"model_type": MODEL_TYPE, "architectures": [PREFIX + name for name in original.get("architectures") or ()],
                   "load_with": "farskip_fx.from_pretrained", "farskip": original["farskip"], ORIGINAL: original,
                   "transformers_version": original.get("transformers_version")}
        return json.dumps(written, indent=2, sort_keys=True) + "\n"

    def __reduce_ex__(self, protocol):
        # Under this name pickle would find the class of transformers.
        return _blank, (_class_of(self),), self.__dict__


@functools.cache
def _as_converted(base: type[PreTrainedConfig]) -> type[PreTrainedConfig]:
    # With an __init__ of its own, or the dataclass that transformers makes of a subclass would hide one written by hand.
    members = {"__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__, "__init__": base.__init__}
    return type(base.__name__, (WrittenAsConverted, base), members)


def _class_of(config: WrittenAsConverted) -> type[PreTrainedConfig]:
    """As it is without a connectivity."""
    return type(config).__bases__[1]


def _blank(base: type[PreTrainedConfig]) -> PreTrainedConfig:
    kind = _as_converted(base)
    return kind.__new__(kind)


class FarskipPretrainedConfig(PreTrainedConfig):
    """What AutoConfig finds under "farskip_fx"."""
    model_type = MODEL_TYPE

    @classmethod
    def from_dict(cls, config_dict: dict, **kwargs):
        raise ConfigError(
            f"this checkpoint was converted with farskip_fx (connectivity {config_dict.get('farskip')}): as the plain "
            f"{', '.join(config_dict.get(ORIGINAL, {}).get('architectures') or ['architecture'])} it would run another connectivity "
            "than the one it was trained with. Load it with farskip_fx.from_pretrained(path)")


AutoConfig.register(MODEL_TYPE, FarskipPretrainedConfig, exist_ok=True)
