"""Checkpoints in the middle of training: torch.distributed.checkpoint (DCP), readable by another number of ranks.

Contract
    `save_checkpoint` and `load_checkpoint` are collective over all ranks; the folder is one that all of them see. What
    was saved at one size of expert and data parallelism is read at any other, without `expert_parallel` too, to the
    last bit. The parameters, persistent buffers and the optimizer's state are kept under the parameter's name in the
    unsharded, unwrapped model. Replicas (data parallelism) write each tensor once: they must be equal.

        save_checkpoint(f"{run}/step-{step:06}", model, optimizer, step=step, extra=scheduler.state_dict())
        ...
        last = latest_checkpoint(run)
        if last is not None:
            start = load_checkpoint(last, model, optimizer)["step"]

What survives
    A checkpoint is written beside its place, as `.NAME.partial`, and renamed by rank 0 when every rank has written and
    synced its part. Until then the last good one is untouched, also one of the same name (for the moment between two
    renames it is `.NAME.old`, which loading finds). `farskip.json`, written last, lists all files with their sizes: a
    folder without it, or with other files, is refused, with the reason.

In the folder
    *.distcp, .metadata   DCP's own; tensors `model.NAME` and `optimizer.NAME.STATE` as global tensors
    optimizer.pt          the parameter groups' options, and state that is no tensor
    extra-RANK.pt         `extra` of each rank
    farskip.json          step, number of ranks, connectivity, the files

Safety
    DCP's `.metadata` is a pickle. It is read here with an unpickler that knows DCP's own descriptions of tensors and
    nothing else; tensors and .pt files are read by `torch.load(weights_only=True)`. So a checkpoint from elsewhere
    runs no code. (DCP's own `load` has no such care.)
"""
from __future__ import annotations

import inspect
import io
import json
import os
import pickle
import pickletools
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from .backend import agree
from .convert import Converted
from .errors import CheckpointError, ConfigError, FarskipWarning
from .expert_parallel import ExpertShard, _sharded_modules
from .passes._torch import process_group
from .saved import record
from .sharding import DenseShard, dense_shards

__all__ = ["latest_checkpoint", "load_checkpoint", "save_checkpoint"]

FORMAT = 1
_MANIFEST = "farskip.json"
_FIELDS = {"step": (int, type(None)), "world_size": int, "connectivity": (dict, type(None)), "files": dict}


def save_checkpoint(path: str | os.PathLike, model: nn.Module, optimizer: torch.optim.Optimizer | None = None, *,
                    step: int = 0, extra: Any = None) -> None:
    """Write a checkpoint to the folder `path`. Collective: every rank calls it; it is in place when this returns.

    Args:
        path: a new folder, or an old checkpoint, which is replaced once the new one is complete.
        model: sharded by `expert_parallel` or not, converted or not, wrapped by DDP or `torch.compile` or not.
        optimizer: of these parameters.
        step: kept for you; rank 0's.
        extra: this rank's own: numbers, strings, tensors, and lists and dicts of them (a scheduler's state, the
            position in the data, `torch.get_rng_state()`).

    Raises:
        ConfigError: something that cannot be stored: state of an unknown kind, an optimizer for other parameters.
        CheckpointError: another rank could not write its part (a full disk, say).
    """
    path = Path(path)
    partial, rank = path.with_name(f".{path.name}.partial"), _rank()

    def begin():
        tensors, rest = _tensors(model, optimizer)
        files = {f"extra-{rank}.pt": _safe_bytes(extra, "extra")}
        if rank == 0:
            if rest is not None:
                files["optimizer.pt"] = _safe_bytes(rest, "the optimizer's param_groups and state")
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        return tensors, files

    def write_rest():
        for name, data in files.items():
            _write(partial / name, data)

    def finish():
        if rank != 0:
            return
        manifest = {"format": FORMAT, "step": step, "world_size": _world_size(), "connectivity": _connectivity(model),
                    "files": {f.name: f.stat().st_size for f in sorted(partial.iterdir())}}
        _write(partial / _MANIFEST, json.dumps(manifest, indent=1).encode())
        _put_in_place(partial, path)

    tensors, files = _on_all_ranks(begin)
    with _dcp():
        dcp.save(tensors, storage_writer=dcp.FileSystemWriter(partial, sync_files=True))
    _on_all_ranks(write_rest)
    _on_all_ranks(finish)


@torch.no_grad()
def load_checkpoint(path: str | os.PathLike, model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> dict:
    """Read a checkpoint into `model` and `optimizer`, in place. Collective: every rank calls it.

    All is checked before the first tensor is read: a refusal leaves model and optimizer as they were.

    Args:
        model: with the same parameters, shapes and dtypes; sharded over any number of ranks, or not at all.
        optimizer: of these parameters, in the same groups; its state and the options of its groups are replaced.

    Returns:
        "step"; "extra", as this rank saved it (rank 0's on a rank that was not there); "world_size", of the ranks that
        saved: restore what belongs to a rank, such as `torch.set_rng_state`, only if it is the same now.

    Raises:
        CheckpointError: not a complete checkpoint, or not one for this model; names the file or the parameter.
        ConfigError: the model has another connectivity, or the optimizer other groups.
    """
    path = _current(Path(path))

    def prepare():
        manifest = _manifest(path)
        reader = _Reader(path)
        saved = reader.read_metadata().state_dict_metadata
        _check_connectivity(model, manifest["connectivity"])
        wanted = {f"model.{name}": value for name, value in _model_tensors(model).items()}
        _check(wanted, {k: v for k, v in saved.items() if k.startswith("model.")})
        own = path / f"extra-{_rank()}.pt"
        extra = _read(own if own.name in manifest["files"] else path / "extra-0.pt")
        set_optimizer = None
        if optimizer is not None:
            if "optimizer.pt" not in manifest["files"]:
                raise CheckpointError(f"{path} was saved without an optimizer: pass none here, or save it with one")
            tensors, set_optimizer = _optimizer_targets(model, optimizer, saved, _read(path / "optimizer.pt"))
            wanted.update(tensors)
        return manifest, reader, wanted, extra, set_optimizer

    manifest, reader, wanted, extra, set_optimizer = _on_all_ranks(prepare)
    with _dcp():
        dcp.load(wanted, storage_reader=reader)
    if set_optimizer is not None:
        set_optimizer()
    _take_connectivity(model, manifest["connectivity"])
    return {"step": manifest["step"], "extra": extra, "world_size": manifest["world_size"]}


def latest_checkpoint(folder: str | os.PathLike) -> Path | None:
    """The complete checkpoint in `folder` with the highest step; None if there is none. Not collective."""
    folder = Path(folder)
    names = [f.name for f in folder.iterdir()] if folder.is_dir() else []
    found = []
    for name in {_name_of_old(name) for name in names if not name.endswith(".partial")}:
        try:
            found.append((_manifest(_current(folder / name))["step"], name))
        except CheckpointError:
            continue
    return folder / max(found)[1] if found else None


# ---------------------------------------------------------------------------------------------------------------------
# Names and global tensors
# ---------------------------------------------------------------------------------------------------------------------


def _tensors(model: nn.Module, optimizer: torch.optim.Optimizer | None) -> tuple[dict[str, Tensor], dict | None]:
    """What DCP stores, as global tensors; and the rest of the optimizer."""
    tensors = {f"model.{name}": value for name, value in _model_tensors(model).items()}
    if optimizer is None:
        return tensors, None
    names, shards = _parameter_names(model, optimizer), _shards(model)
    values: dict[str, dict] = {}
    for parameter, state in optimizer.state.items():
        name = names[id(parameter)]
        for key, value in state.items():
            if not isinstance(value, Tensor):
                values.setdefault(name, {})[key] = value
            else:
                where = f"optimizer.{name}.{key}"
                tensors[where] = _global(where, value, shards.get(id(parameter)))
    groups = [{**{k: v for k, v in group.items() if k not in ("params", "param_names")},
               "params": [names[id(p)] for p in group["params"]]} for group in optimizer.param_groups]
    return tensors, {"groups": groups, "values": values}


def _model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers, each once, that share memory with the model's."""
    shards, known, tensors = _shards(model), set(), {}
    for name, value in model.state_dict(keep_vars=True).items():
        name = _plain_name(name)
        if not isinstance(value, Tensor):
            raise ConfigError(f"{name} in the model's state_dict is a {type(value).__name__}, not a tensor, and is not "
                              "kept in checkpoints: put it into extra and take it out of the state_dict")
        if name in tensors:
            raise ConfigError(f"two tensors of the model are called {name} without the prefixes of wrappers")
        if id(value) not in known:      # tied: once
            known.add(id(value))
            tensors[name] = _global(name, value.detach(), shards.get(id(value)))
    return tensors


def _global(name: str, value: Tensor, shard: ExpertShard | DenseShard | None) -> Tensor:
    """A tensor that DCP knows to be a part of a larger one, if it is; it shares memory with `value`."""
    if isinstance(value, DTensor):
        return value
    if type(value) not in (Tensor, nn.Parameter, nn.Buffer):
        raise ConfigError(f"{name} is a {type(value).__name__}; checkpoints hold plain tensors and DTensors only "
                          "(quantised parameters or optimizer states are not supported)")
    if isinstance(shard, DenseShard):
        return _global_dense(name, value, shard)
    if shard is None or shard.group.size == 1 or value.numel() == 1 and value.dim() <= 1:
        return value        # also the optimizer's count of steps
    if value.dim() == 0 or value.size(0) != shard.num_local_experts:
        raise ConfigError(f"{name} of shape {tuple(value.shape)} belongs to a rank's {shard.num_local_experts} of "
                          f"{shard.num_experts} experts, but is not one row for each of them: it cannot be read by "
                          "another number of ranks. Use an optimizer whose state has the shape of the parameter "
                          "(AdamW, SGD)")
    mesh = DeviceMesh.from_group(process_group(shard.group.name), value.device.type)
    return DTensor.from_local(value, mesh, [Shard(0)], run_check=False)


def _global_dense(name: str, value: Tensor, shard: DenseShard) -> Tensor:
    """The same of a slice of a dense parameter, without its padding."""
    if value.dim() == 0:
        return value
    if tuple(value.shape) != (shard.rows, *shard.shape[1:]):
        raise ConfigError(f"{name} of shape {tuple(value.shape)} belongs to a slice of {shard.rows} rows of a parameter of shape "
                          f"{shard.shape}, but has not its shape: it cannot be read by another number of ranks. Use an "
                          "optimizer whose state has the shape of the parameter (AdamW, SGD)")
    mesh = DeviceMesh.from_group(process_group(shard.group), value.device.type)
    shape = torch.Size(shard.shape)
    return DTensor.from_local(value[:shard.valid], mesh, [Shard(0)], run_check=False, shape=shape,
                              stride=torch.empty(shape, device="meta").stride())


def _shards(model: nn.Module) -> dict[int, ExpertShard | DenseShard]:
    """By id of the parameter."""
    experts = {id(getattr(module, name)): module._farskip_experts
               for _, module in _sharded_modules(model) for name in module._farskip_experts.parameters}
    return experts | {id(module._parameters[name]): shard for _, module, name, shard in dense_shards(model)}


def _plain_name(name: str) -> str:
    for wrapper in ("_orig_mod.", "_checkpoint_wrapped_module."):
        name = name.replace(wrapper, "")
    return name.removeprefix("module.")     # DDP


def _parameter_names(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[int, str]:
    names = {id(p): _plain_name(name) for name, p in model.named_parameters()}
    for number, group in enumerate(optimizer.param_groups):
        for parameter in group["params"]:
            if id(parameter) not in names:
                raise ConfigError(f"the optimizer's group {number} has a parameter of shape {tuple(parameter.shape)} "
                                  "that the model does not have: make the optimizer after farskip_fx.expert_parallel, "
                                  "of this model")
    return names


# ---------------------------------------------------------------------------------------------------------------------
# Reading
# ---------------------------------------------------------------------------------------------------------------------


def _check(wanted: dict[str, Tensor], saved: dict) -> None:
    missing, unknown = sorted(wanted.keys() - saved.keys()), sorted(saved.keys() - wanted.keys())
    if missing or unknown:
        texts = [f"{who} {', '.join(names[:3])}{' ...' if len(names) > 3 else ''}"
                 for who, names in (("it lacks", missing), ("the model lacks", unknown)) if names]
        raise CheckpointError(f"the checkpoint is of another model: {'; '.join(texts)}")
    for name, tensor in wanted.items():
        entry = saved[name]
        if not isinstance(entry, TensorStorageMetadata):
            raise CheckpointError(f"{name} is not a tensor in the checkpoint")
        if entry.size != tensor.shape or entry.properties.dtype != tensor.dtype:
            raise CheckpointError(f"{name} is {entry.properties.dtype} of shape {tuple(entry.size)} in the checkpoint, "
                                  f"and {tensor.dtype} of shape {tuple(tensor.shape)} in the model")


def _optimizer_targets(model: nn.Module, optimizer: torch.optim.Optimizer, saved: dict,
                       rest: dict) -> tuple[dict[str, Tensor], Callable[[], None]]:
    """Tensors for DCP to fill, and what to call afterwards."""
    names, shards = _parameter_names(model, optimizer), _shards(model)
    options = [_same_group(number, [names[id(p)] for p in group["params"]], rest["groups"])
               for number, group in enumerate(optimizer.param_groups)]
    states: dict[str, dict[str, TensorStorageMetadata]] = {}
    known = sorted(names.values(), key=len, reverse=True)       # the longest: one name may begin another
    for key in saved:
        if key.startswith("optimizer."):
            name = next((n for n in known if key.startswith(f"optimizer.{n}.")), None)
            if name is None:
                raise CheckpointError(f"{key} in the checkpoint belongs to no parameter of the model")
            states.setdefault(name, {})[key.removeprefix(f"optimizer.{name}.")] = saved[key]
    targets: dict[str, Tensor] = {}
    state: dict[Tensor, dict] = {}
    for group, chosen in zip(optimizer.param_groups, options):
        for parameter in group["params"]:
            name, shard = names[id(parameter)], shards.get(id(parameter))
            local = dict(rest["values"].get(name, {}))
            for key, entry in states.get(name, {}).items():
                if not isinstance(entry, TensorStorageMetadata):
                    raise CheckpointError(f"optimizer.{name}.{key} is not a tensor in the checkpoint")
                where = f"optimizer.{name}.{key}"
                local[key] = _empty(parameter, shard, entry, on_device=chosen.get("capturable") or chosen.get("fused"))
                targets[where] = _global(where, local[key], shard)
                if targets[where].shape != entry.size:
                    raise CheckpointError(f"{where} has shape {tuple(entry.size)} in the checkpoint, which does not "
                                          f"fit {name} of shape {tuple(parameter.shape)} here")
            if local:
                state[parameter] = local

    def put() -> None:
        optimizer.state.clear()
        optimizer.state.update(state)
        for group, chosen in zip(optimizer.param_groups, options):
            group.update({k: v for k, v in chosen.items() if k != "params"})

    return targets, put


def _same_group(number: int, names: list[str], groups: list[dict]) -> dict:
    """The saved group that these parameters were in, all together."""
    found = [group for group in groups if set(names) & set(group["params"])]
    if len(found) != 1 or set(found[0]["params"]) != set(names):
        raise ConfigError(f"group {number} of the optimizer (with {names[0] if names else 'no parameter'}) is none of "
                          "the checkpoint's groups: make the optimizer with the same groups of parameters")
    return found[0]


def _empty(parameter: Tensor, shard: ExpertShard | DenseShard | None, entry: TensorStorageMetadata, *, on_device: bool) -> Tensor:
    """Where one tensor of the optimizer's state goes; counts of steps stay on the CPU, as torch.optim keeps them."""
    size, dtype = tuple(entry.size), entry.properties.dtype
    if isinstance(parameter, DTensor):
        if size == tuple(parameter.shape):
            return torch.zeros_like(parameter, dtype=dtype)
    elif isinstance(shard, DenseShard):
        if size:
            return torch.zeros_like(parameter, dtype=dtype)
    elif shard is not None and size and size[0] == shard.num_experts:
        size = (shard.num_local_experts, *size[1:])
    device = parameter.device if size or on_device else "cpu"
    return torch.empty(size, dtype=dtype, device=device)


_KNOWN = {
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta", "TensorProperties",
        "TensorStorageMetadata", "_MEM_FORMAT_ENCODING"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size"},
    "pathlib": {"PosixPath", "WindowsPath"},
    "pathlib._local": {"PosixPath", "WindowsPath"},
}
"""What DCP's .metadata may name, besides dtypes."""


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str):
        dtype = getattr(torch, name, None) if module == "torch" else None
        if name in _KNOWN.get(module, ()) or isinstance(dtype, torch.dtype):
            return super().find_class(module, name)
        raise CheckpointError(f"the checkpoint's .metadata names {module}.{name}, which no checkpoint needs: it is "
                              "damaged, or made to run code when it is read")


def _require_small(data: bytes) -> None:
    """Raise where the pickle wants more memory than its own size explains: a flipped byte in the number of a memo makes the unpickler
    fill up to 32 GB, and one in a length makes it allocate that much (pickletools checks lengths by itself)."""
    for code, number, _ in pickletools.genops(data):
        if code.name in ("PUT", "BINPUT", "LONG_BINPUT") and number > len(data):
            raise ValueError(f"memo {number} in a pickle of {len(data)} bytes")


class _Reader(dcp.FileSystemReader):
    """Reads the metadata with `_Unpickler`."""

    def read_metadata(self, *args, **kwargs):
        path = Path(self.path, ".metadata")
        try:
            data = path.read_bytes()
            _require_small(data)
            metadata = _Unpickler(io.BytesIO(data)).load()
        except (CheckpointError, OSError):
            raise
        except Exception as error:      # a damaged pickle builds its objects from anything, and they raise anything
            raise CheckpointError(f"{path} is damaged: {type(error).__name__}: {error}") from error
        if not isinstance(metadata, dcp.metadata.Metadata):
            raise CheckpointError(f"{path} is damaged: it holds a {type(metadata).__name__}")
        if metadata.storage_meta is not None:
            metadata.storage_meta.load_id = self.load_id
        return metadata


# ---------------------------------------------------------------------------------------------------------------------
# Connectivity
# ---------------------------------------------------------------------------------------------------------------------


def _connectivity(model: nn.Module) -> dict | None:
    """The saved fields of the model's conversion: of `apply` or the decorator, or of its config; None without one."""
    for module in model.modules():
        forward = inspect.getattr_static(module, "forward", None)
        if isinstance(forward, Converted):
            return forward.config.saved()
    configs = (getattr(module, "config", None) for module in model.modules())
    return next((found for config in configs if (found := getattr(config, "farskip", None))), None)


def _check_connectivity(model: nn.Module, saved: dict | None) -> None:
    own = _connectivity(model)
    if own is not None:
        agree(own, saved or {"connectivity": "none"}, "the checkpoint")


def _take_connectivity(model: nn.Module, saved: dict | None) -> None:
    """A model without a connectivity gets the checkpoint's, for `apply` or `torch.compile` to find."""
    if saved is None or _connectivity(model) is not None:
        return
    for config in {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}.values():
        record(config, saved)
    warnings.warn(f"this checkpoint was trained with connectivity {saved['connectivity']!r}, and the model is not "
                  "converted: call farskip_fx.apply(model) before you run it", FarskipWarning, stacklevel=3)


# ---------------------------------------------------------------------------------------------------------------------
# Files and ranks
# ---------------------------------------------------------------------------------------------------------------------


def _old(path: Path) -> Path:
    return path.with_name(f".{path.name}.old")


def _name_of_old(name: str) -> str:
    return name[1:].removesuffix(".old") if name.startswith(".") and name.endswith(".old") else name


def _current(path: Path) -> Path:
    """`path`, or the one that it was to replace, if the process died between the two renames."""
    return _old(path) if not path.exists() and _old(path).exists() else path


def _put_in_place(partial: Path, path: Path) -> None:
    if path.exists():
        shutil.rmtree(_old(path), ignore_errors=True)
        path.rename(_old(path))
    partial.rename(path)
    if hasattr(os, "O_DIRECTORY"):
        folder = os.open(path.parent, os.O_DIRECTORY)
        os.fsync(folder)
        os.close(folder)
    shutil.rmtree(_old(path), ignore_errors=True)


def _manifest(path: Path) -> dict:
    if not path.is_dir():
        raise CheckpointError(f"{path} is not a folder that this rank can see: checkpoints need a file system that all "
                              "ranks share")
    try:
        manifest = json.loads((path / _MANIFEST).read_bytes())
    except FileNotFoundError:
        raise CheckpointError(f"{path} has no {_MANIFEST}, which is written last: the save was not finished, or this "
                              "is not a checkpoint of farskip_fx.save_checkpoint. Use another one "
                              "(farskip_fx.latest_checkpoint)") from None
    except ValueError as error:
        raise CheckpointError(f"{path / _MANIFEST} is damaged: {error}") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        found = manifest.get("format") if isinstance(manifest, dict) else type(manifest).__name__
        raise CheckpointError(f"{path} has format {found!r}; this farskip_fx reads {FORMAT}")
    for name, kinds in _FIELDS.items():
        if not isinstance(manifest.get(name), kinds) or name not in manifest:
            raise CheckpointError(f"{path / _MANIFEST} is damaged: its {name} is {manifest.get(name)!r}")
    for name, size in manifest["files"].items():
        if not _is_inside(name):
            raise CheckpointError(f"{path / _MANIFEST} is damaged: its files have the name {name!r}")
        file = path / name
        if not file.exists() or file.stat().st_size != size:
            found = f"has {file.stat().st_size}" if file.exists() else "is missing"
            raise CheckpointError(f"{path} is damaged: {name} {found}, and should have {size} bytes")
    return manifest


def _is_inside(name: str) -> bool:
    """A name below the checkpoint's folder."""
    return bool(name) and "\0" not in name and not Path(name).is_absolute() and ".." not in Path(name).parts


def _safe_bytes(value: Any, what: str) -> bytes:
    """Bytes that `_read` takes; found out now and not when the training is resumed."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    try:
        torch.load(io.BytesIO(buffer.getvalue()), weights_only=True)
    except pickle.UnpicklingError as error:
        raise ConfigError(f"{what} holds something that torch.load(weights_only=True) does not read, so it could be "
                          "saved and not loaded: keep numbers, strings, tensors, lists and dicts. "
                          + str(error).splitlines()[0]) from error
    return buffer.getvalue()


def _read(file: Path) -> Any:
    return torch.load(file, weights_only=True, map_location="cpu")


def _write(file: Path, data: bytes) -> None:
    with open(file, "wb") as out:
        out.write(data)
        out.flush()
        os.fsync(out.fileno())


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def _on_all_ranks(do: Callable[[], Any]) -> Any:
    """`do()` on each rank; returns when all have done it. If it fails on one it fails on all, with its reason."""
    result, error = None, None
    try:
        result = do()
    except Exception as caught:     # the other ranks must hear of any; raised below
        error = caught
    texts = [error and f"{type(error).__name__}: {error}"]
    if dist.is_initialized():
        own, texts = texts[0], [None] * _world_size()
        dist.all_gather_object(texts, own)
    if error is not None:
        raise error
    for rank, text in enumerate(texts):
        if text is not None:
            raise CheckpointError(f"rank {rank} failed: {text}")
    return result


@contextmanager
def _dcp() -> Iterator[None]:
    """Around DCP: without its warning about a single process, and its failures (not an Exception there) as ours."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
        try:
            yield
        except dcp.CheckpointException as error:
            texts = [f"rank {rank} failed: {type(e).__name__}: {e}" for rank, (e, _) in sorted(error.failures.items())]
            raise CheckpointError("; ".join(texts)) from error
