"""``from_pretrained``: a converted checkpoint from a folder or the hub, without a line of code of one's own.

    model = farskip_fx.from_pretrained("run")
    model = farskip_fx.from_pretrained("run", dtype=torch.bfloat16, expert_parallel=mesh["ep"])

Reading files and building the model is transformers' part: the class that the checkpoint names, its ``from_pretrained``, and
safetensors only. Nothing in a checkpoint is run: no pickle, and no code that comes with it.
"""
from __future__ import annotations

import dataclasses
import os

import transformers
from transformers import PreTrainedConfig, PreTrainedModel

from .config import FarskipConfig
from .convert import apply
from .errors import CheckpointError, ConfigError
from .expert_parallel import expert_parallel as shard_experts
from .saved import MODEL_TYPE, ORIGINAL

_OF_THE_FILE = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")
_REFUSED = {
    "config": "the checkpoint's own configuration says what it is; change model.config afterwards",
    "trust_remote_code": "no code of a checkpoint is run here; import the model's class and give it as model_class=",
    "use_safetensors": "weights are read from safetensors only, because a pickle can run code",
    "ignore_mismatched_sizes": "a weight that does not fit would be a random one",
    "output_loading_info": "weights that are missing or left over are an error here",
}
_HARMLESS = {"use_safetensors": True, "trust_remote_code": False, "ignore_mismatched_sizes": False, "output_loading_info": False,
             "config": None}


def from_pretrained(path: str | os.PathLike, *, model_class: type[PreTrainedModel] | None = None, expert_parallel=None,
                    dynamic: bool | None = None, **options) -> PreTrainedModel:
    """Load a checkpoint that was saved from a converted model, and convert it the same way.

    Args:
        path: a folder that ``save_pretrained`` wrote, or a name on the hub.
        model_class: where the model's class is not one of transformers: your own, or one that you imported.
        expert_parallel: a mesh of one dimension or a process group to shard the experts over. Collective: each rank reads
            the whole checkpoint first.
        dynamic: as in ``apply``.
        options: fields of ``FarskipConfig`` (``inner``, ``overlap``, ``data_parallel``, ...) go to ``apply``, all others
            (``dtype``, ``device_map``, ``attn_implementation``, ``revision``, ...) to transformers.

    Returns:
        The converted model, in eval mode; for training, inference and ``generate``.

    Raises:
        ConfigError: a checkpoint of a model that is not converted, one of an unknown class, options that disagree with its
            connectivity, or a connectivity of one's own that is not registered.
        CheckpointError: weights are missing, left over, or of other shapes.
        OSError: transformers finds no files.
    """
    for name, why in _REFUSED.items():
        if options.pop(name, _HARMLESS[name]) not in (_HARMLESS[name], None):
            raise ConfigError(f"farskip_fx.from_pretrained does not take {name}: {why}")
    fields = {f.name for f in dataclasses.fields(FarskipConfig)}
    conversion = {name: options.pop(name) for name in fields & set(options)}
    written, _ = PreTrainedConfig.get_config_dict(path, **{k: options[k] for k in _OF_THE_FILE if k in options})
    kind, original, saved = model_class, written.get(ORIGINAL, written), written.get("farskip")
    if saved is None or original.get("farskip") != saved:
        raise ConfigError(
            f"{path} is no checkpoint of a converted model (config.json has no farskip): load it with AutoModelForCausalLM and "
            "call farskip_fx.apply(model, connectivity=...)" if saved is None else
            f"{path}: config.json has two connectivities, {saved} and, under {ORIGINAL!r}, {original.get('farskip')}: it was "
            "edited by hand. Make them equal to what the model was trained with")
    FarskipConfig.from_dict(saved)      # refuses what is not known, before the weights are read
    if kind is None:
        kind = _class_named(path, original)
    model, found = kind.from_pretrained(path, use_safetensors=True, output_loading_info=True, **options)
    wrong = {what: sorted(map(str, found[what])) for what in ("missing_keys", "mismatched_keys", "unexpected_keys") if found[what]}
    if wrong:
        raise CheckpointError(f"{path} does not hold the weights of {kind.__name__}: " + "; ".join(
            f"{len(keys)} {what.replace('_', ' ')} ({', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''})"
            for what, keys in wrong.items()))
    if getattr(model.config, "model_type", None) in (None, MODEL_TYPE) or getattr(model.config, "farskip", None) != saved:
        raise ConfigError(f"{path} says that it is {original.get('model_type')!r} with {saved}, and {kind.__name__} read "
                          f"{model.config.model_type!r} with {getattr(model.config, 'farskip', None)}: give its class as model_class=")
    if expert_parallel is not None:
        shard_experts(model, expert_parallel)
    return apply(model, conversion, dynamic=dynamic)


def _class_named(path: str | os.PathLike, original: dict) -> type[PreTrainedModel]:
    names = original.get("architectures") or []
    found = [c for name in names if isinstance(c := getattr(transformers, name, None), type) and issubclass(c, PreTrainedModel)]
    if len(found) != 1:
        raise ConfigError(f"{path} is a {original.get('model_type')!r} model, and transformers {transformers.__version__} has no class "
                          f"{', '.join(names) or '(config.json names none)'}: import it and give it as model_class=")
    return found[0]
