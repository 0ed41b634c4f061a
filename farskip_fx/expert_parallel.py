"""Expert parallelism: each rank holds some of the experts, and tokens travel to them by functional collectives.

Contract
    `expert_parallel(model, group)` shards the experts of a model in place over the ranks of `group`. The model then
    computes what it computed before (1e-5 in fp32), forward and backward, eagerly and as **one** Dynamo graph; every
    exchange is a `_c10d_functional` op in that graph, so that passes can see it and move it.

Terms
    rows        (token, expert) pairs: `tokens * top_k` of them leave a rank, sorted by expert
    counts      how many rows each expert gets, exchanged first (the counts exchange)
    splits      counts summed per rank: the send and receive sizes of the two big exchanges, read back to the host
    dispatch    rows to the ranks that hold their experts
    combine     expert outputs back to the rows' home, where they are weighted and summed

Exchanges
    all_to_all  each rank has its own tokens (data-parallel attention). Splits are exact and data-dependent: no capacity,
                nothing dropped.
    all_reduce  every rank of the group has the *same* tokens (replicated attention, as inference servers run it); each
                applies its own experts to all of them, and one all-reduce sums.

Gradients
    all_to_all  with L_r the loss on rank r: an expert parameter's gradient is that of sum_r L_r (it saw all ranks' rows);
                a dense parameter's is that of L_r alone. Data parallelism therefore averages dense parameters over all
                ranks, and expert parameters over the ranks that hold the same experts, both divided by the global size.
    all_reduce  the loss is the same on each rank; expert gradients are complete for the local experts, and dense
                gradients are complete and equal on each rank (Megatron's f and g, arXiv 1909.08053 section 3).

How a model is found
    Through transformers' experts interface (`transformers/integrations/moe.py`): modules decorated with
    `use_experts_implementation`, whatever their class or family. Layouts (gated or not, transposed, biases, interleaved,
    clamped activations) stay transformers' business: its own implementation runs on the local experts.

Importing this module registers the exchanges with transformers: `farskip_all_to_all` and `farskip_all_reduce` in
`ALL_EXPERTS_FUNCTIONS`, and `farskip` as an `ep_implementation` of transformers' own `DistributedConfig`.
"""
from __future__ import annotations

import copy
import dataclasses
import functools
import weakref
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from transformers.distributed.expert_parallel import EPImplementation, EPImplementationInterface
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from .collectives import all_gather, all_reduce, all_to_all
from .passes._torch import (allow_scalar_outputs, optimization_hint, override_optimization_hint, patch_dynamo_config,
                            timeout_of)
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

RunExperts = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(rows [n, hidden], local expert ids [n, k], weights [n, k]) -> weighted sums [n, hidden], on the local experts."""


# ---------------------------------------------------------------------------------------------------------------------
# Replicated and partial tensors
# ---------------------------------------------------------------------------------------------------------------------


class _CopyToGroup(torch.autograd.Function):
    """Megatron's f: a replicated tensor enters computation that differs by rank. Its gradients are partial: sum them."""

    @staticmethod
    def forward(ctx, replicated: Tensor, group_name: str) -> Tensor:
        ctx.group_name = group_name
        return replicated.view_as(replicated)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        return all_reduce(gradient, ctx.group_name), None


class _SumOverGroup(torch.autograd.Function):
    """Megatron's g: partial results become one replicated sum, whose gradient is already complete on each rank."""

    @staticmethod
    def forward(ctx, partial: Tensor, group_name: str) -> Tensor:
        return all_reduce(partial, group_name)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        return gradient, None


@torch.compiler.allow_in_graph
def copy_to_group(replicated: Tensor, group_name: str) -> Tensor:
    """`_CopyToGroup` as one node of a Dynamo graph, by a name that the passes know: traced into, it would hide in a subgraph."""
    return _CopyToGroup.apply(replicated, group_name)


@torch.compiler.allow_in_graph
def sum_over_group(partial: Tensor, group_name: str) -> Tensor:
    """`_SumOverGroup`, likewise."""
    return _SumOverGroup.apply(partial, group_name)


class _TakeOwnRows(torch.autograd.Function):
    """[size * n, ...], replicated -> [n, ...], this rank's rows. Backward: every rank's rows put together again."""

    @staticmethod
    def forward(ctx, replicated: Tensor, rank: int, size: int, group_name: str) -> Tensor:
        ctx.size, ctx.group_name = size, group_name
        return replicated.chunk(size)[rank].clone()

    @staticmethod
    def backward(ctx, gradient: Tensor):
        return all_gather(gradient, ctx.size, ctx.group_name), None, None, None


class _ReplicateRows(torch.autograd.Function):
    """[n, ...], this rank's rows -> [size * n, ...], replicated. Backward: this rank's rows of the replicated gradient."""

    @staticmethod
    def forward(ctx, rows: Tensor, rank: int, size: int, group_name: str) -> Tensor:
        ctx.rank, ctx.size = rank, size
        return all_gather(rows, size, group_name)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        return gradient.chunk(ctx.size)[ctx.rank].clone(), None, None, None


# ---------------------------------------------------------------------------------------------------------------------
# The exchanges
# ---------------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class ExpertGroup:
    """The ranks that together hold all experts once, as plain values: Dynamo, deepcopy and pickle take them as they are."""

    name: str
    size: int
    rank: int


def all_to_all_experts(
    run_experts: RunExperts, num_local_experts: int, group: ExpertGroup, tokens: Tensor, expert_ids: Tensor, weights: Tensor
) -> Tensor:
    """Runs each token's experts where they are.

    Args:
        run_experts: the local experts.
        num_local_experts: experts on each rank; rank r holds ids [r * num_local_experts, (r + 1) * num_local_experts).
        group: the ranks to exchange with.
        tokens: [tokens, hidden], this rank's own.
        expert_ids: [tokens, top_k], global ids.
        weights: [tokens, top_k], the router's.

    Returns:
        [tokens, hidden], weighted and summed over top_k, in the dtype of `tokens`.
    """
    top_k = expert_ids.size(-1)
    order, counts = _sort_by_expert(expert_ids, group.size * num_local_experts)
    received_counts = _exchange_counts(counts, group)
    send, receive = _splits(counts, received_counts, group.size, order.numel())

    # Dispatch. The home rank keeps the router's weights: a row travels unweighted, so that only rows have gradients to
    # carry back.
    rows = all_to_all(tokens[order // top_k], receive, send, group.name)
    local_ids = _local_expert_ids(received_counts, num_local_experts, group.size, sum(receive))
    outputs = run_experts(rows, local_ids, torch.ones_like(local_ids, dtype=rows.dtype))

    # Combine. index_copy undoes the sort; its backward is a gather, where indexing by the inverse would scatter.
    outputs = all_to_all(outputs, send, receive, group.name)
    unsorted = outputs.new_empty(order.numel(), outputs.size(-1)).index_copy(0, order, outputs)
    return (unsorted.view(*expert_ids.shape, outputs.size(-1)) * weights.unsqueeze(-1)).sum(dim=1).to(tokens.dtype)


def _sort_by_expert(expert_ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """Order of the rows by expert [tokens * top_k], and rows for each expert [num_experts]; both int64."""
    flat = expert_ids.reshape(-1)
    counts = torch.zeros(num_experts, dtype=torch.int64, device=flat.device)
    counts = counts.scatter_add(0, flat, torch.ones_like(flat, dtype=torch.int64))
    return torch.argsort(flat, stable=True), counts


def _exchange_counts(counts: Tensor, group: ExpertGroup) -> Tensor:
    """Rows for each expert of mine, by sender: [size * num_local_experts], sender major."""
    even = [counts.numel() // group.size] * group.size
    return all_to_all(counts, even, even, group.name)


def _splits(counts: Tensor, received_counts: Tensor, size: int, rows: int) -> tuple[list[int], list[int]]:
    """Rows to send to and to receive from each rank, on the host; `rows` of them leave in all.

    Both in one tensor, and that one copied to the host first: `.tolist()` on a device tensor synchronises once an element.
    """
    on_host = torch.stack([counts.view(size, -1).sum(1), received_counts.view(size, -1).sum(1)]).cpu()
    if not torch.compiler.is_compiling():
        return tuple(on_host.tolist())
    allow_scalar_outputs()
    with patch_dynamo_config(capture_scalar_outputs=True):  # for the tracing of this line only
        send, receive = on_host.tolist()
    balanced = optimization_hint(rows, 0) // size
    for split in send + receive:
        torch._check(split >= 0)
        override_optimization_hint(split, balanced)  # or the compiler's estimates assume absurd sizes
    return send, receive


def _local_expert_ids(received_counts: Tensor, num_local_experts: int, size: int, num_rows: int) -> Tensor:
    """Local expert of each received row, [num_rows, 1]: rows arrive by sender, and within a sender by expert."""
    ids = torch.arange(num_local_experts, device=received_counts.device).repeat(size)
    return ids.repeat_interleave(received_counts, output_size=num_rows).unsqueeze(-1)


def all_reduce_experts(
    run_experts: RunExperts, num_local_experts: int, group: ExpertGroup, tokens: Tensor, expert_ids: Tensor, weights: Tensor
) -> Tensor:
    """Like `all_to_all_experts`, for tokens that every rank of the group has: nothing travels but the partial sums.

    `run_experts` must skip the id `num_local_experts` (the interface's own convention for a route that belongs elsewhere).
    """
    tokens = copy_to_group(tokens, group.name)
    weights = copy_to_group(weights, group.name)
    elsewhere = expert_ids // num_local_experts != group.rank
    local_ids = (expert_ids % num_local_experts).masked_fill(elsewhere, num_local_experts)
    partial = run_experts(tokens, local_ids, weights.masked_fill(elsewhere, 0.0))
    return sum_over_group(partial, group.name)


EXCHANGES: dict[str, Callable[..., Tensor]] = {"all_to_all": all_to_all_experts, "all_reduce": all_reduce_experts}
"""Name -> exchange; each is registered with transformers as `farskip_<name>`."""


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
    """

    group: ExpertGroup
    exchange: str
    num_experts: int
    local_implementation: str
    parameters: tuple[str, ...]

    @property
    def num_local_experts(self) -> int:
        return self.num_experts // self.group.size

    @property
    def first(self) -> int:
        return self.group.rank * self.num_local_experts

    def take(self, full: Tensor) -> Tensor:
        """[num_experts, ...] -> a view of this rank's [num_local_experts, ...]."""
        return full.narrow(0, self.first, self.num_local_experts)


def expert_parallel(model: nn.Module, group: DeviceMesh | dist.ProcessGroup | None = None, *, exchange: str = "all_to_all"):
    """Shards the experts of `model` over `group`, in place, and returns it.

    Every rank of `group` calls this with the same full model (same weights). Each keeps a contiguous slice of every
    experts module and frees the rest. The exchanges get a process group of their own with the ranks of `group`, because
    NCCL runs one group as one queue in which data-parallel traffic would stand in their way; creating it is collective
    over `group` only. Make the optimizer afterwards: the expert parameters are new objects.

    Args:
        model: any module that contains experts of transformers' experts interface.
        group: a 1-D DeviceMesh (`mesh["ep"]`), a process group, or None for the default group.
        exchange: `"all_to_all"` (each rank has its own tokens) or `"all_reduce"` (all ranks have the same tokens).

    Raises:
        ValueError: unknown exchange; a mesh of several dimensions; a rank outside the group; no experts found; experts
            that are sharded already, that the group size does not divide, or that cannot be sharded.
        RuntimeError: torch.distributed is not initialised.
    """
    if exchange not in EXCHANGES:
        raise ValueError(f"exchange={exchange!r} is unknown: use one of {', '.join(map(repr, EXCHANGES))}")
    parent = _process_group(group)
    modules = dict(_experts_modules(model))
    if not modules:
        raise ValueError(
            f"{type(model).__name__} has no experts that expert_parallel can find. It looks for modules decorated with "
            "transformers.integrations.moe.use_experts_implementation; decorate the experts class (quantised experts that "
            "replace it are not supported), or use a model family that has it."
        )
    for name, module in modules.items():  # all checks first: a refusal must leave the model whole on every rank
        _check_experts(name, module, parent.size(), exchange)
    own = _exchange_group(parent)

    configs: dict[int, object] = {}
    shared: dict[int, nn.Parameter] = {}
    for module in modules.values():
        _shard(module, ExpertGroup(own.group_name, own.size(), own.rank()), exchange, configs, shared)
    _ignore_in_ddp(model, list(expert_parameters(model)))
    return model


def _process_group(group: DeviceMesh | dist.ProcessGroup | None) -> dist.ProcessGroup:
    if not (dist.is_available() and dist.is_initialized()):
        raise RuntimeError(
            "expert_parallel needs torch.distributed: call torch.distributed.init_process_group first (under torchrun)"
        )
    if isinstance(group, DeviceMesh):
        if group.ndim != 1:
            raise ValueError(
                f"expert_parallel needs one mesh dimension, got {group.ndim} ({group.mesh_dim_names}): pass e.g. mesh['ep']"
            )
        group = group.get_group()
    group = dist.group.WORLD if group is None else group
    if not isinstance(group, dist.ProcessGroup):
        raise ValueError(
            f"rank {dist.get_rank()} is not in the group given to expert_parallel: call it on the group's ranks only"
        )
    return group


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
    module: nn.Module, group: ExpertGroup, exchange: str, configs: dict[int, object], shared: dict[int, nn.Parameter]
) -> None:
    """`configs` and `shared` keep, over all modules, one new object for each old one (by id; every old one that is still to
    come is alive, so no id is reused meanwhile)."""
    shard = ExpertShard(
        group=group,
        exchange=exchange,
        num_experts=module.num_experts,
        local_implementation=_local_implementation(module.config),
        parameters=tuple(name for name, _ in module.named_parameters(recurse=False)),
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
    module._is_expert_parallel = exchange == "all_reduce"  # makes transformers' implementations mask routes elsewhere
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

    Collective over the expert group, and with `data_parallel(shard=True)` over all ranks. `model.save_pretrained(path, state_dict=full_state_dict(model))` on one rank writes
    an ordinary checkpoint.

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
    return EXCHANGES[exchange](run_experts, shard.num_local_experts, shard.group, hidden_states, top_k_index, top_k_weights)


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
        own, sharing = _exchange_group(ep_mesh.get_group()), tp_mesh.get_group()
        self.experts_group = ExpertGroup(own.group_name, own.size(), own.rank())
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
        part = [_TakeOwnRows.apply(t, batch.rank, batch.size, batch.name) for t in whole]
        return _ReplicateRows.apply(self._exchange(*part), batch.rank, batch.size, batch.name)[:num_tokens]

    def _exchange(self, tokens: Tensor, expert_ids: Tensor, weights: Tensor) -> Tensor:
        return all_to_all_experts(
            self.experts_forward, self.num_local_experts, self.experts_group, tokens, expert_ids, weights
        )


for _name in EXCHANGES:
    ALL_EXPERTS_FUNCTIONS.register(f"farskip_{_name}", functools.partial(_exchanged_forward, _name))
EPImplementationInterface.register("farskip", FarskipExpertParallel)
