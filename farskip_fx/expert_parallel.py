"""Expert parallelism: each rank holds some of the experts, and tokens travel to them by functional collectives.

Contract
    `expert_parallel(model, group)` shards the experts of a model in place over the ranks of `group`. The model then
    computes what it computed before (1e-5 in fp32), forward and backward, eagerly and as **one** Dynamo graph; every
    exchange is a `_c10d_functional` op in that graph, so that passes can see it and move it. What the exchanges are, and
    what gradients mean: `exchanges.py`.

How a model is found
    Through transformers' experts interface (`transformers/integrations/moe.py`): modules decorated with
    `use_experts_implementation`, whatever their class or family. Layouts (gated or not, transposed, biases, interleaved,
    clamped activations) stay transformers' business: its own implementation runs on the local experts.

Importing this module registers the exchanges with transformers: each as `farskip_<name>` in `ALL_EXPERTS_FUNCTIONS`, and
`farskip` as an `ep_implementation` of transformers' own `DistributedConfig`.
"""
from __future__ import annotations

import copy
import dataclasses
import functools
import weakref
from collections.abc import Iterator
from typing import Literal

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from transformers.distributed.expert_parallel import EPImplementation, EPImplementationInterface
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from .calibrate import calibrate, sizes_of
from .chunks import chunks_for
from .collectives import all_gather
from .exchanges import CARRY_ROWS, EXCHANGES, all_to_all_experts
from .passes._torch import timeout_of
from .passes.costs import Rates
from .payload import PAYLOADS
from .replicated import ReplicateRows, TakeOwnRows
from .routes import ExpertGroup, Options
from .sharding import dense_shards

__all__ = [
    "EXCHANGES",
    "ExpertShard",
    "FarskipExpertParallel",
    "expert_parallel",
    "expert_parameters",
    "full_state_dict",
    "gather_experts",
    "load_full_state_dict",
]

# ---------------------------------------------------------------------------------------------------------------------
# Sharding a model in place
# ---------------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class ExpertShard:
    """What one experts module holds after `expert_parallel`; on the module as `_farskip_experts`, and on each of its
    expert parameters as `_farskip_expert_group` (data parallelism classifies parameters by that mark, never by name).

    Attributes:
        group: where the rest of the experts are.
        exchange: a key of `EXCHANGES`.
        num_experts: of the whole module; this rank has `num_experts / group.size`, from `first` on.
        local_implementation: the key of transformers' `ALL_EXPERTS_FUNCTIONS` that runs the local experts.
        parameters: names, in the module, of the sharded parameters.
        options: of the exchange.
    """

    group: ExpertGroup
    exchange: str
    num_experts: int
    local_implementation: str
    parameters: tuple[str, ...]
    options: Options = Options()

    @property
    def num_local_experts(self) -> int:
        return self.num_experts // self.group.size

    @property
    def first(self) -> int:
        return self.group.rank * self.num_local_experts

    def take(self, full: Tensor) -> Tensor:
        """[num_experts, ...] -> a view of this rank's [num_local_experts, ...]."""
        return full.narrow(0, self.first, self.num_local_experts)


def expert_parallel(model: nn.Module, group: DeviceMesh | dist.ProcessGroup | None = None, *, exchange: str = "all_to_all",
                    chunks: int | Literal["auto"] = 1, payload: str | None = None, backward_payload: str | None = None,
                    rates: Rates | None = None):
    """Shards the experts of `model` over `group`, in place, and returns it.

    Every rank of `group` calls this with the same full model (same weights). Each keeps a contiguous slice of every
    experts module and frees the rest. The exchanges get a process group of their own with the ranks of `group`, because
    NCCL runs one group as one queue in which data-parallel traffic would stand in their way; creating it is collective
    over `group` only. Make the optimizer afterwards: the expert parameters are new objects.

    Args:
        model: any module that contains experts of transformers' experts interface.
        group: a 1-D DeviceMesh (`mesh["ep"]`), a process group, or None for the default group. For `"hierarchical"` a 2-D
            DeviceMesh: nodes, and the ranks of a node.
        exchange: each rank has its own tokens: `"all_to_all"`; `"hierarchical"`, between nodes and then inside of a node;
            `"all_to_all_pairs"`, where a token travels once for each of its experts; or `"all_gather"`, without counts, for
            equally many tokens on each rank. All ranks have the same tokens: `"all_reduce"`. See exchanges.py.
        chunks: cut the tokens into so many parts, so that experts of one run while another travels. The same numbers. "auto": two
            where the exchanges take at least half of the experts' time by ``rates``, four where they take three times as long
            (``farskip_fx/chunks.py``), else one.
        payload: `"int8"` or `"fp8"`: rows travel rounded to a byte a value. Not the same numbers. `""`: as they are. None:
            as the model's conversion or checkpoint says (`config.farskip`), else as they are.
        backward_payload: likewise for gradients of rows.
        rates: of device and link, equal on all ranks, for chunks="auto"; None: `farskip_fx.calibrate(group)`, 20 seconds once.

    Raises:
        ValueError: unknown exchange or option; a mesh of several dimensions; a rank outside the group; no experts found; experts
            that are sharded already, that the group size does not divide, or that cannot be sharded.
        RuntimeError: torch.distributed is not initialised.
    """
    if exchange not in EXCHANGES:
        raise ValueError(f"exchange={exchange!r} is unknown: use one of {', '.join(map(repr, EXCHANGES))}")
    options = _options(exchange, chunks, _as_recorded(model, {"payload": payload, "backward_payload": backward_payload}))
    parent, levels = _process_group(group, exchange), _levels(group, exchange)
    modules = dict(_experts_modules(model))
    if not modules:
        raise ValueError(
            f"{type(model).__name__} has no experts that expert_parallel can find. It looks for modules decorated with "
            "transformers.integrations.moe.use_experts_implementation; decorate the experts class (quantised experts that "
            "replace it are not supported), or use a model family that has it."
        )
    for name, module in modules.items():  # all checks first: a refusal must leave the model whole on every rank
        _check_experts(name, module, parent.size(), exchange)
    own = dataclasses.replace(_expert_group(parent), levels=tuple(map(_expert_group, levels)))
    if chunks == "auto" and rates is None:
        rates = calibrate(parent, **sizes_of(model))

    configs: dict[int, object] = {}
    shared: dict[int, nn.Parameter] = {}
    for module in modules.values():
        chosen = dataclasses.replace(options, chunks=chunks_for(module, own.size, rates)) if chunks == "auto" else options
        _shard(module, own, exchange, chosen, configs, shared)
    _ignore_in_ddp(model, list(expert_parameters(model)))
    return model


def payload_of(model: nn.Module) -> dict[str, str] | None:
    """How rows of the sharded experts travel; None without sharded experts."""
    found = next((module._farskip_experts.options for _, module in _sharded_modules(model)), None)
    return None if found is None else {"payload": found.payload, "backward_payload": found.backward_payload}


def _as_recorded(model: nn.Module, given: dict[str, str | None]) -> dict[str, str]:
    """What was asked for, completed from what the model was converted with; a contradiction raises."""
    saved = getattr(getattr(model, "config", None), "farskip", None)
    if saved is None:
        return {name: value or "" for name, value in given.items()}
    for name, value in given.items():
        known = saved.get(name, "")
        if value is not None and value != known:
            raise ValueError(f"{name}={value!r} disagrees with what the model was converted with, {known!r}: leave it out, or "
                             "shard the model before farskip_fx.apply")
    return {name: saved.get(name, "") for name in given}


def _options(exchange: str, chunks: int | str, payloads: dict[str, str]) -> Options:
    chunks = 1 if chunks == "auto" else chunks
    if not isinstance(chunks, int) or isinstance(chunks, bool) or chunks < 1:
        raise ValueError(f"chunks must be 'auto' or a whole number of at least 1, got {chunks!r}")
    for name, value in payloads.items():
        if value and value not in PAYLOADS:
            raise ValueError(f"{name}={value!r} is unknown: use one of {', '.join(map(repr, ('', *PAYLOADS)))}")
        if value and exchange not in CARRY_ROWS:
            raise ValueError(f"{name}={value!r}: exchange={exchange!r} sums on its way, and bytes with scales cannot be "
                             "summed; use exchange='all_to_all'")
    return Options(chunks, **payloads)


def _process_group(group: DeviceMesh | dist.ProcessGroup | None, exchange: str) -> dist.ProcessGroup:
    if not (dist.is_available() and dist.is_initialized()):
        raise RuntimeError(
            "expert_parallel needs torch.distributed: call torch.distributed.init_process_group first (under torchrun)"
        )
    dimensions = group.ndim if isinstance(group, DeviceMesh) else 1
    if exchange == "hierarchical" and dimensions != 2:
        raise ValueError("exchange='hierarchical' needs a mesh of two dimensions, nodes and the ranks of a node: pass e.g. "
                         "mesh['node', 'local']")
    if exchange != "hierarchical" and dimensions != 1:
        raise ValueError(f"expert_parallel needs one mesh dimension, got {dimensions} ({group.mesh_dim_names}): pass e.g. "
                         "mesh['ep'], or exchange='hierarchical' for nodes and the ranks of a node")
    if isinstance(group, DeviceMesh):
        group = group.get_group() if group.ndim == 1 else _whole(group)
    group = dist.group.WORLD if group is None else group
    if not isinstance(group, dist.ProcessGroup):
        raise ValueError(
            f"rank {dist.get_rank()} is not in the group given to expert_parallel: call it on the group's ranks only"
        )
    return group


def _whole(mesh: DeviceMesh) -> dist.ProcessGroup:
    ranks = mesh.mesh.flatten().tolist()
    if ranks == list(range(dist.get_world_size())):
        return dist.group.WORLD
    return dist.new_group(ranks, use_local_synchronization=True, timeout=timeout_of(dist.group.WORLD))


def _levels(group: DeviceMesh | dist.ProcessGroup | None, exchange: str) -> tuple[dist.ProcessGroup, ...]:
    """Inside of a node, between nodes."""
    return (group.get_group(1), group.get_group(0)) if exchange == "hierarchical" else ()


def _expert_group(parent: dist.ProcessGroup) -> ExpertGroup:
    own = _exchange_group(parent)
    return ExpertGroup(own.group_name, own.size(), own.rank())


_exchange_groups: weakref.WeakKeyDictionary[dist.ProcessGroup, dist.ProcessGroup] = weakref.WeakKeyDictionary()
"""Parent group -> the group of our own. One for all models: a communicator costs memory, and exchanges queue anyway."""


def _exchange_group(parent: dist.ProcessGroup) -> dist.ProcessGroup:
    own = _exchange_groups.get(parent)
    if own is None:
        ranks = dist.get_process_group_ranks(parent)
        if ranks != sorted(ranks):
            raise ValueError(f"the expert group's ranks must ascend, got {ranks}: build the mesh from ascending ranks")
        # Local synchronisation: only the group's ranks take part, so a stage without experts need not call us.
        own = dist.new_group(ranks, use_local_synchronization=True, timeout=timeout_of(parent, dist.group.WORLD),
                             group_desc="farskip_expert_parallel")
        _exchange_groups[parent] = own
    return own


_INTERFACE_ATTRIBUTES = ("has_gate", "has_bias", "is_transposed", "is_concatenated", "_is_expert_parallel")
"""What `use_experts_implementation` leaves on each instance (transformers/integrations/moe.py)."""


def _experts_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, module in model.named_modules():
        if all(attribute in module.__dict__ for attribute in _INTERFACE_ATTRIBUTES):
            yield name, module


def _check_experts(name: str, module: nn.Module, size: int, exchange: str) -> None:
    what = f"{name or 'the model'} ({type(module).__name__})"
    if getattr(module, "_farskip_experts", None) is not None:
        raise ValueError(f"{what} is sharded already: call gather_experts(model) first to shard it differently")
    if module._is_expert_parallel:
        raise ValueError(
            f"{what} is sharded already, by transformers: drop ep_size from its DistributedConfig, or choose "
            'ep_implementation="farskip" there instead of calling expert_parallel'
        )
    if module.num_experts % size:
        raise ValueError(
            f"{what} has {module.num_experts} experts, which {size} ranks do not divide: use a group whose size divides it"
        )
    tensors = {"parameter": module.named_parameters(recurse=False), "buffer": module.named_buffers(recurse=False)}
    for kind, named in tensors.items():
        for tensor_name, tensor in named:
            by_expert = tensor.dim() > 0 and tensor.size(0) == module.num_experts
            quantised = tensor.element_size() < 2  # fp8 experts look alike but dispatch through another interface
            if by_expert != (kind == "parameter") or quantised:
                raise ValueError(
                    f"{what}: {kind} {tensor_name} is {tensor.dtype} of shape {tuple(tensor.shape)}; expert_parallel shards "
                    f"parameters of leading size {module.num_experts} and no buffers, and no quantised experts. Load the model "
                    "unquantised, or shard this module another way"
                )
    if exchange == "all_reduce" and any(p.requires_grad for child in module.children() for p in child.parameters()):
        raise ValueError(
            f"{what} has trainable parameters that all experts share; with exchange='all_reduce' each rank would get part "
            "of their gradient. Use exchange='all_to_all', or freeze them"
        )


def _shard(
    module: nn.Module, group: ExpertGroup, exchange: str, options: Options, configs: dict[int, object],
    shared: dict[int, nn.Parameter],
) -> None:
    """`configs` and `shared` keep, over all modules, one new object for each old one (by id; every old one that is still to
    come is alive, so no id is reused meanwhile)."""
    shard = ExpertShard(
        group=group,
        exchange=exchange,
        num_experts=module.num_experts,
        local_implementation=_local_implementation(module.config),
        parameters=tuple(name for name, _ in module.named_parameters(recurse=False)),
        options=options,
    )
    for name in shard.parameters:
        full = getattr(module, name)
        if id(full) not in shared:
            local = nn.Parameter(shard.take(full.detach()).clone(), requires_grad=full.requires_grad)
            local.__dict__.update(full.__dict__, _farskip_expert_group=shard)
            shared[id(full)] = local
        setattr(module, name, shared[id(full)])

    # A config of their own: a second model built from the same config must not start to exchange, and whoever sets the
    # model's implementation later (transformers' generate does) must not switch the exchange off.
    module._farskip_config = module.config
    if id(module.config) not in configs:
        configs[id(module.config)] = copy.deepcopy(module.config)
        configs[id(module.config)]._experts_implementation = f"farskip_{exchange}"
    module.config = configs[id(module.config)]
    module.num_experts = shard.num_local_experts
    module._is_expert_parallel = exchange not in CARRY_ROWS  # makes transformers' implementations mask routes elsewhere
    module._farskip_experts = shard


def _local_implementation(config: object) -> str:
    """The implementation the model was to use, if it is one of the interface's; else the grouped matmul: the "eager" loop
    over experts breaks the graph."""
    requested = config._experts_implementation
    ours = {f"farskip_{exchange}" for exchange in EXCHANGES}  # set by the user beforehand: would call itself
    return requested if requested in ALL_EXPERTS_FUNCTIONS and requested not in ours else "grouped_mm"


def _ignore_in_ddp(model: nn.Module, names: list[str]) -> None:
    """DDP must not average experts over ranks that hold different ones. It reads this list from the module it wraps, and
    a compiled module spells its parameters with a prefix."""
    ignored = list(getattr(model, "_ddp_params_and_buffers_to_ignore", ()))
    model._ddp_params_and_buffers_to_ignore = ignored + names + [f"_orig_mod.{name}" for name in names]


def expert_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The sharded parameters, by name. (The mark on a parameter does not survive deepcopy; this does.)"""
    return {
        key: getattr(module, parameter)
        for name, module in _sharded_modules(model)
        for key, parameter in zip(_state_keys(name, module), module._farskip_experts.parameters, strict=True)
    }


def _sharded_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, module in model.named_modules():
        if isinstance(module.__dict__.get("_farskip_experts"), ExpertShard):
            yield name, module


# ---------------------------------------------------------------------------------------------------------------------
# The way back
# ---------------------------------------------------------------------------------------------------------------------


def gather_experts(model: nn.Module) -> nn.Module:
    """Undoes `expert_parallel`, in place: every rank has all experts again. Collective over the expert group.

    Raises:
        ValueError: the model has no sharded experts.
    """
    modules, names = _require_sharded(model), set(expert_parameters(model))
    gathered: dict[int, nn.Parameter] = {}
    for _, module in modules:
        shard = module._farskip_experts
        for name in shard.parameters:
            local = getattr(module, name)
            if id(local) not in gathered:
                full = nn.Parameter(_gather(local.detach(), shard), requires_grad=local.requires_grad)
                full.__dict__.update(local.__dict__)
                del full._farskip_expert_group
                gathered[id(local)] = full
            setattr(module, name, gathered[id(local)])
        module.num_experts = shard.num_experts
        module.config = module._farskip_config
        module._is_expert_parallel = False
        del module._farskip_experts, module._farskip_config
    model._ddp_params_and_buffers_to_ignore = [
        name for name in model._ddp_params_and_buffers_to_ignore if name.removeprefix("_orig_mod.") not in names
    ]
    return model


def full_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """`model.state_dict()` with the experts, and dense parameters in slices, gathered: names and shapes of the single process,
    on every rank.

    Collective over the expert group, and with `data_parallel(shard=True)` over all ranks. `model.save_pretrained(path,
    state_dict=full_state_dict(model))` on one rank writes an ordinary checkpoint.

    Raises:
        ValueError: the model has no sharded experts, and no dense parameters in slices.
    """
    state, slices = model.state_dict(), list(dense_shards(model))
    for name, module in _sharded_modules(model) if slices else _require_sharded(model):
        for key in _state_keys(name, module):
            state[key] = _gather(state[key], module._farskip_experts)
    whole: dict[int, Tensor] = {}       # tied ones once
    for key, module, name, shard in slices:
        part = module._parameters[name]
        if id(part) not in whole:
            whole[id(part)] = shard.gather(part.detach())
        state[key] = whole[id(part)]
    return state


def load_full_state_dict(model: nn.Module, state: dict[str, Tensor], *, strict: bool = True):
    """Loads a single-process state dict: each rank takes its experts and its slices, and everything else as it is. Not
    collective.

    Raises:
        ValueError: the model has no sharded experts and no slices, or a tensor lacks the leading size of the whole.
    """
    local, slices = dict(state), list(dense_shards(model))
    for key, _, _, shard in slices:
        if key in local:
            if tuple(local[key].shape) != shard.shape:
                raise ValueError(f"{key} has shape {tuple(local[key].shape)} in the state dict, the model {shard.shape}: pass a full "
                                 "state dict (from full_state_dict, or from the unsharded model)")
            local[key] = shard.take(local[key])
    for name, module in _sharded_modules(model) if slices else _require_sharded(model):
        shard = module._farskip_experts
        for key in _state_keys(name, module):
            if key in local:
                if local[key].size(0) != shard.num_experts:
                    raise ValueError(
                        f"{key} has {local[key].size(0)} experts in the state dict, the model {shard.num_experts}: pass a "
                        "full state dict (from full_state_dict, or from the unsharded model)"
                    )
                local[key] = shard.take(local[key])
    return model.load_state_dict(local, strict=strict)


def _require_sharded(model: nn.Module) -> list[tuple[str, nn.Module]]:
    modules = list(_sharded_modules(model))
    if not modules:
        raise ValueError(f"{type(model).__name__} has no sharded experts: call expert_parallel(model, group) first")
    return modules


def _state_keys(name: str, module: nn.Module) -> list[str]:
    return [f"{name}.{parameter}" if name else parameter for parameter in module._farskip_experts.parameters]


def _gather(local: Tensor, shard: ExpertShard) -> Tensor:
    return all_gather(local, shard.group.size, shard.group.name)


# ---------------------------------------------------------------------------------------------------------------------
# transformers' extension points
# ---------------------------------------------------------------------------------------------------------------------


def _exchanged_forward(
    exchange: str, self: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """An experts implementation in the interface's form: `self` is the experts module, shapes as in `all_to_all_experts`."""
    shard = self.__dict__.get("_farskip_experts")
    if shard is None:
        raise RuntimeError(
            f"{type(self).__name__} is set to experts_implementation='farskip_{exchange}' but its experts are not sharded: "
            "call farskip_fx.expert_parallel(model, group) instead of setting the implementation yourself"
        )
    run_experts = functools.partial(ALL_EXPERTS_FUNCTIONS[shard.local_implementation], self)
    return EXCHANGES[exchange](run_experts, shard.num_local_experts, shard.group, hidden_states, top_k_index, top_k_weights,
                               shard.options)


class FarskipExpertParallel(EPImplementation):
    """Our exchange behind transformers' own configuration, which shards while it reads the checkpoint:

        config = DistributedConfig(tp_size=2, ep_size=2, ep_implementation="farskip")
        AutoModelForCausalLM.from_pretrained(path, distributed_config=config)

    Like transformers' `AllToAllEP`, whose semantics it keeps; that one breaks the Dynamo graph in every layer. The ranks
    of a tensor-parallel group share a batch, so each exchanges an equal part of it (padded to a multiple of the group's
    size) and the parts are gathered back.
    """

    def __init__(self, experts: nn.Module, ep_mesh: DeviceMesh, tp_mesh: DeviceMesh):
        super().__init__(experts, ep_mesh, tp_mesh)
        sharing = tp_mesh.get_group()
        self.experts_group = _expert_group(ep_mesh.get_group())
        self.batch_group = ExpertGroup(sharing.group_name, sharing.size(), sharing.rank())

    def __call__(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """[tokens, hidden], [tokens, top_k] global ids, [tokens, top_k] -> [tokens, hidden]."""
        batch = self.batch_group
        if batch.size == 1:
            return self._exchange(hidden_states, top_k_index, top_k_weights)
        num_tokens = hidden_states.size(0)
        padding = -num_tokens % batch.size
        whole = [hidden_states, top_k_index, top_k_weights]
        if padding:  # with weight 0, to expert 0
            whole = [nn.functional.pad(t, (0, 0, 0, padding)) for t in whole]
        part = [TakeOwnRows.apply(t, batch.rank, batch.size, batch.name) for t in whole]
        return ReplicateRows.apply(self._exchange(*part), batch.rank, batch.size, batch.name)[:num_tokens]

    def _exchange(self, tokens: Tensor, expert_ids: Tensor, weights: Tensor) -> Tensor:
        return all_to_all_experts(
            self.experts_forward, self.num_local_experts, self.experts_group, tokens, expert_ids, weights
        )


for _name in EXCHANGES:
    ALL_EXPERTS_FUNCTIONS.register(f"farskip_{_name}", functools.partial(_exchanged_forward, _name))
EPImplementationInterface.register("farskip", FarskipExpertParallel)
