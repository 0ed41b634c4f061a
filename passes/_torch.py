"""Everything PyTorch-private that farskip_fx touches, in one place, each with its reader and the version it is from.

Public API is imported where it is used. What differs between versions is looked up here, so that a new PyTorch breaks
in this file and nowhere else. (Appended to by several modules; keep the sections.)
"""
from __future__ import annotations

import dataclasses
import inspect
import json

import torch

# --- Dynamo graphs: passes/dataflow.py, farskip_fx/frame.py ------------------------------------------------------
from torch._C._functorch import is_batchedtensor  # noqa: F401  2.0: a vmapped tensor has no storage to look at
from torch._dynamo.symbolic_convert import InstructionTranslator  # 2.0: which frame a backend compiles


def current_translator():
    """The translator of the frame that Dynamo compiles now, None outside of a compile."""
    try:
        return InstructionTranslator.current_tx()
    except AttributeError:      # a thread-local that is only set while Dynamo traces
        return None


def guard_that(translator, holds, text):
    """Have Dynamo compile the current frame again once ``holds()`` is no longer true (2.0: guards are functions that
    add to a guard manager; 2.4: a lambda on its root)."""
    from torch._dynamo.source import GlobalStateSource

    def farskip_guard(builder, guard):
        builder.guard_manager.root.add_lambda_guard(lambda _: holds(), [text], guard.user_stack)

    translator.output.guards.add(GlobalStateSource().make_guard(farskip_guard))


def ignored_in_graphs(*functions):
    """A context in which Dynamo drops calls of ``functions`` from what it traces (2.9); of this thread alone (2.13)."""
    import torch._dynamo.config as dynamo_config
    return dynamo_config.patch(ignore_logging_functions={*dynamo_config.ignore_logging_functions, *functions})


# ``torch.compile(isolate_recompiles=...)``: 2.13. Before, all conversions of one process share Dynamo's limit of recompiles.
COMPILED_APART = {"isolate_recompiles": True} if "isolate_recompiles" in inspect.signature(torch.compile).parameters else {}


# --- constants of a graph: passes/causal.py ----------------------------------------------------------------------
def real_tensors():
    """A context in which operations make real tensors although a fake mode is on (2.1)."""
    from torch._subclasses.fake_tensor import unset_fake_temporarily
    return unset_fake_temporarily()


# --- inner compilers: farskip_fx/inner.py ------------------------------------------------------------------------
def compile_fx(gm, example_inputs, *, config_patches):
    """Inductor (2.0). Imported late: importing Inductor takes a second, and ``inner="eager"`` does not need it."""
    from torch._inductor.compile_fx import compile_fx as inductor
    return inductor(gm, example_inputs, config_patches=config_patches)


def lowered(gm, example_inputs):
    """The graphs that Inductor would get, forward first: its own decompositions and partition (2.0), nothing compiled.

    ``gm`` is changed. A cached compile would hand out no graph, so the cache of AOTAutograd is off.
    """
    import torch._functorch.config as functorch
    from torch._inductor.compile_fx import compile_fx as inductor
    graphs = []

    def collect(graph, inputs, **kwargs):
        graphs.append(graph)
        return graph.forward

    # Without symbols in the graph the backward would be lowered at its first call, which never comes.
    with functorch.patch(enable_autograd_cache=False, force_non_lazy_backward_lowering=True):
        inductor(gm, example_inputs, inner_compile=collect)
    return graphs


def aot_eager(gm, example_inputs):
    """AOTAutograd with nothing behind it (2.0)."""
    from torch._dynamo.backends.registry import lookup_backend
    return lookup_backend("aot_eager")(gm, example_inputs)


def mode_options(mode):
    """Inductor's options behind one of ``torch.compile``'s modes (public ``torch._inductor.list_mode_options``)."""
    if mode is None or mode == "default":
        return {}
    import torch._inductor
    return dict(torch._inductor.list_mode_options(mode))


# --- sizes: passes/costs.py --------------------------------------------------------------------------------------
UNBACKED_SIZE = 8192    # of a symbol that nobody hinted; a constant, so that ranks agree


def size_hint(size) -> int:
    """``size`` (an int or a SymInt) as a number for estimates; never guards, never specialises.

    ``optimization_hint`` (2.11) honours ``torch._dynamo.override_optimization_hint``. Without it: what the symbol's
    own hint says, if it has one.
    """
    if not isinstance(size, torch.SymInt):
        return int(size)
    try:
        from torch.fx.experimental.symbolic_shapes import optimization_hint
    except ImportError:
        hint = getattr(size.node, "_hint", None)
        return UNBACKED_SIZE if hint is None else int(hint)
    return int(optimization_hint(size, UNBACKED_SIZE))


def flop_formula(packet):
    """``torch.utils.flop_counter``'s formula of an op packet, or None; it takes shapes in the place of tensors."""
    from torch.utils.flop_counter import flop_registry
    return flop_registry.get(packet)


def process_group(name: str):
    """The process group of that name, as functional collectives find it (2.1)."""
    from torch.distributed.distributed_c10d import _resolve_process_group
    return _resolve_process_group(name)


def default_store():
    """The store behind the default group (1.8), on a connection of its own where that is possible (2.7)."""
    from torch.distributed.distributed_c10d import _get_default_store
    store = _get_default_store()
    return store.clone() if hasattr(store, "clone") else store


def timeout_of(*groups):
    """The shortest timeout of these process groups' collectives, for a group that is made beside them: ``new_group`` (and
    a DeviceMesh) takes 30 minutes and not what ``init_process_group`` was given (gloo; 2.1: options of a backend). None,
    which means that default, where it cannot be told."""
    backends = [group._get_backend(device) for group in groups for device in getattr(group, "_device_types", ())]
    timeouts = [getattr(getattr(backend, "options", None), "_timeout", None) for backend in backends]
    return min((t for t in timeouts if t is not None), default=None)


def flight_records(last: int) -> list[dict]:
    """The last collectives that this process launched, as c10d's flight recorder keeps them (gloo 2.9, NCCL before);
    empty where there is none, or where it is off. With: group, description, number, op, sizes, done (in error, too)."""
    import torch.distributed as dist
    try:
        dump = torch._C._distributed_c10d._dump_fr_trace_json
    except AttributeError:
        return []
    entries = [e for e in json.loads(dump() or "{}").get("entries", []) if not e["is_p2p"]]
    now = set(dist.distributed_c10d._world.pg_names.values())       # it forgets nothing, and groups come and go
    return [{"group": e["process_group"][0], "description": e["process_group"][1], "number": e["collective_seq_id"],
             "op": e["profiling_name"].split(":")[-1], "sizes": e["input_sizes"], "done": e["retired"]}
            for e in entries if e["process_group"][0] in now][-last:]


def group_size(name: str) -> int:
    """Ranks of the process group of that name (2.1); 1 where there is none in this process."""
    try:
        return process_group(name).size()
    except (ImportError, KeyError, LookupError, RuntimeError, TypeError, ValueError):
        return 1


def group_shape(name: str) -> str:
    """How many ranks the process group of that name has and how far they are apart, "8x1" (2.1): the same on all of its ranks,
    and for all groups of a mesh dimension. "" where there is none in this process."""
    import torch.distributed as dist
    try:
        ranks = dist.get_process_group_ranks(process_group(name))
    except (ImportError, KeyError, LookupError, RuntimeError, TypeError, ValueError):
        return ""
    return f"{len(ranks)}x{ranks[1] - ranks[0] if len(ranks) > 1 else 0}"


def group_shapes() -> dict[str, str]:
    """Of every process group in this process, by name."""
    import torch.distributed as dist
    names = dist.distributed_c10d._world.pg_names.values() if dist.is_available() and dist.is_initialized() else ()
    return {name: group_shape(name) for name in sorted(names)}


# --- ops by what they do to the world: passes/schedule.py --------------------------------------------------------
def is_view_op(target) -> bool:
    """Returns an alias of an argument and writes nothing (schema alias annotations, 1.0)."""
    schema = getattr(target, "_schema", None)
    if schema is None or any(_is_write(r) for r in schema.returns):
        return False
    return any(r.alias_info is not None for r in schema.returns)


def writes_memory(target) -> bool:
    schema = getattr(target, "_schema", None)
    return schema is not None and any(_is_write(a) for a in schema.arguments)


def draws_random(target) -> bool:
    """Advances a generator (tag ``nondeterministic_seeded``, 2.0); Inductor's own seeds are ordinary values."""
    tag = torch.Tag.nondeterministic_seeded
    return isinstance(target, torch._ops.OpOverload) and tag in target.tags


def has_effect(target) -> bool:
    """An op registered as effectful (2.4), or the higher-order op that threads its token."""
    name = getattr(target, "__name__", "")
    if name == "with_effects":
        return True
    try:
        from torch._higher_order_ops.effects import _get_effect as effect_of            # 2.11
    except ImportError:
        try:
            from torch._higher_order_ops.effects import get_effect_key as effect_of     # 2.4 to 2.10
        except ImportError:
            return False
    if not isinstance(target, torch._ops.OpOverload):
        return False
    try:
        return effect_of(target) is not None
    except TypeError:       # get_effect_key(op, args, kwargs)
        return effect_of(target, (), {}) is not None


def _is_write(argument) -> bool:
    return argument.alias_info is not None and argument.alias_info.is_write


# --- Inductor's scheduler: passes/fence.py -----------------------------------------------------------------------
# torch._inductor.scheduler, .dependencies and .ir are "prototype, subject to change" by their own words. Imported
# late: importing Inductor takes a second.
RENAMES_MAY_BE_LOST = tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 14)
"""CPU, up to 2.13: ``SchedulerNode.recompute_size_and_body`` drops the renames of mutated buffers."""


def scheduler_of(snodes):
    return snodes[0].scheduler if snodes else None


def is_extern(snode) -> bool:
    """A kernel that Inductor does not generate loops for, and that computes something: mm, attention, a collective."""
    from torch._inductor import ir
    node = snode.node
    return isinstance(node, ir.ExternKernel) and not isinstance(node, (ir.MultiOutput, ir.NopKernel))


def is_template(snode) -> bool:
    from torch._inductor import ir
    return isinstance(snode.node, ir.TemplateBuffer)


def is_launch(snode) -> bool:
    from torch._inductor.utils import is_collective
    return is_collective(snode.node)


def is_wait(snode) -> bool:
    from torch._inductor.utils import is_wait
    return is_wait(snode.node)


def order_after(snode, earlier) -> bool:
    """Make ``snode`` run after ``earlier``, by a dependency without data. False if there is nothing to hang it on."""
    from torch._inductor.dependencies import WeakDep
    mine, theirs = _a_buffer(snode), _a_buffer(earlier)
    if mine is None or theirs is None:
        return False
    snode.add_fake_dep(WeakDep(theirs, mutating_buf=mine, is_fake=True))    # is_fake: 2.9, does not extend lifetimes
    return True


def depend_on_buffer(snode, buffer: str) -> None:
    """A dependency that a loop has anyway, once more without data. It names ``buffer`` as what it mutates: Inductor
    drops what looks redundant (``_prune_redundant_deps``) only if the node itself writes what is mutated."""
    from torch._inductor.dependencies import WeakDep
    snode.add_fake_dep(WeakDep(buffer, mutating_buf=buffer, is_fake=True))


def resort(scheduler, snodes):
    """Topological order that stays near the given one, and ancestors that know the new dependencies."""
    scheduler.nodes = scheduler.topological_sort_schedule(snodes)
    scheduler.compute_ancestors()
    return scheduler.nodes


def rename_reads(snode, renames: dict[str, str]) -> bool:
    """Let ``snode`` (not a fused one) read the given versions of buffers; False if it does already."""
    renamed = snode.read_writes.rename(renames)
    if renamed == snode.read_writes:
        return False
    snode.set_read_writes(renamed)
    return True


def refresh_group(snode) -> None:
    from torch._inductor.scheduler import FusedSchedulerNode, refresh_group_node_dependencies
    if isinstance(snode, FusedSchedulerNode):
        refresh_group_node_dependencies(snode)


def operation_number(name: str) -> int:
    """Inductor names operations op0, op1, ... as it lowers them: the planned order."""
    return int(name.rpartition("op")[2])


def data_reads(snode) -> list[str]:
    """Buffers whose contents a node reads. Weak dependencies only order."""
    return [d.name for d in _data_dependencies(snode)]


def _data_dependencies(snode) -> list:
    from torch._inductor.dependencies import WeakDep
    return [d for d in snode.read_writes.reads if not isinstance(d, WeakDep)]


def bytes_of(snode) -> int:
    """What a kernel or a call reads and writes. Inductor's own count takes a dependency that only orders for a read of its buffer."""
    from torch.utils._ordered_set import OrderedSet
    whole = snode.read_writes
    snode.read_writes = dataclasses.replace(whole, reads=OrderedSet(_data_dependencies(snode)))
    try:
        return snode.get_read_write_buffers_sizes_impl(include_reads=True, include_writes=True)
    finally:
        snode.read_writes = whole


def writer_of(scheduler, buffer: str) -> str:
    return scheduler.name_to_buf[buffer].defining_op_name()


def when_order_is_final(scheduler, check) -> None:
    """Call ``check(nodes)`` after the last reordering. There is no hook there, so this instance's next step carries it.

    ``Scheduler._init`` calls ``compute_last_usage`` right after the reorders for peak memory and partitions (2.5).
    """
    step = scheduler.compute_last_usage

    def checked_step():
        check(scheduler.nodes)
        return step()

    scheduler.compute_last_usage = checked_step


def _a_buffer(snode) -> str | None:
    return next(iter(snode.get_buffer_names()), None)


# --- Inductor's settings: farskip_fx/overlap.py ------------------------------------------------------------------
OVERLAP_SETTINGS = {
    "reorder_for_compute_comm_overlap": False,
    "bucket_all_gathers_fx": "none",
    "bucket_reduce_scatters_fx": "none",
    "bucket_all_reduces_fx": "none",
    "combo_kernels": False,
    "_micro_pipeline_tp": False,
    "_fuse_ddp_communication": False,
    "_collective.auto_select": False,
    "enable_simple_overlap": False,                                             # only in some builds
    "aten_distributed_optimizations.enable_simple_overlap": False,              # only in some builds
    "aten_distributed_optimizations.enable_overlap_scheduling": False,          # 2.9
    "aten_distributed_optimizations.enable_low_contention_collectives": False,  # 2.12
    "aten_distributed_optimizations.allow_comms_decompositions": False,         # 2.13
    "triton.reorder_for_reducing_graph_partitions": False,                      # 2.9
}
"""What else in Inductor moves, merges or replaces collectives or the kernels around them."""


def inductor_setting(name: str):
    import torch._inductor.config as inductor_config
    value = inductor_config
    for part in name.split("."):
        value = getattr(value, part)
    return value


def settings_off() -> dict[str, object]:
    """The part of ``OVERLAP_SETTINGS`` that this version knows."""
    return {name: value for name, value in OVERLAP_SETTINGS.items() if _has_setting(name)}


def _has_setting(name: str) -> bool:
    try:
        inductor_setting(name)
    except AttributeError:
        return False
    return True


def custom_pass_bases():
    """(CustomGraphPass, CustomSchedulerPass): 2.5 and 2.13. A pass with a ``uuid`` does not switch the caches off."""
    import torch._inductor.custom_graph_pass as module
    if hasattr(module, "CustomSchedulerPass"):
        return module.CustomGraphPass, module.CustomSchedulerPass
    # Before, a scheduler's pass had to be a graph pass for the caches to know its uuid: two kinds of it, to tell them apart.
    return type("GraphPass", (module.CustomGraphPass,), {}), type("SchedulerPass", (module.CustomGraphPass,), {})


def takes_several_passes() -> bool:
    """Whether a custom graph pass may be a tuple of passes (2.13)."""
    import torch._inductor.custom_graph_pass as module
    return hasattr(module, "get_custom_graph_passes")


def inference_aware_pass():
    """A graph pass that is called with ``is_inference`` (2.9), or None."""
    import torch._inductor.custom_graph_pass as module
    return getattr(module, "CustomInferenceAwareGraphPass", None)


# --- a fake process group: farskip_fx/bench/passes.py -------------------------------------------------------------
def fake_ranks(size: int) -> None:
    """Start a process group of ``size`` ranks of which only this one exists (2.0); collectives return at once."""
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore
    dist.init_process_group("fake", rank=0, world_size=size, store=FakeStore())


# --- tracing with split sizes: farskip_fx/expert_parallel.py -----------------------------------------------------
from torch._dynamo import patch_dynamo_config  # noqa: E402, F401  2.9: config for a few traced lines
from torch._guards import TracingContext  # noqa: E402  2.0

try:        # 2.12: a size for the estimators of whoever meets an unbacked symbol
    from torch._dynamo import override_optimization_hint  # noqa: F401
    from torch.fx.experimental.symbolic_shapes import optimization_hint  # noqa: F401
except ImportError:
    def override_optimization_hint(symbol, hint) -> None:
        """Before 2.12 Inductor estimates with its own default."""

    def optimization_hint(size, fallback):
        return size if isinstance(size, int) else fallback


@torch.compiler.assume_constant_result
def allow_scalar_outputs() -> bool:
    """Let the graph being traced read split sizes, whatever ``fullgraph`` and the global config say.

    ``patch_dynamo_config`` alone is not enough: Dynamo copies ``capture_scalar_outputs`` into the graph's ShapeEnv before
    it traces a line (2.13, ``_dynamo/output_graph.py``), so without ``fullgraph=True`` each ``.tolist()`` would break the
    graph. Dynamo runs this function while tracing; it touches that one ShapeEnv and nothing global.
    """
    context = TracingContext.try_get()
    if context is not None and context.fake_mode is not None and context.fake_mode.shape_env is not None:
        shape_env = context.fake_mode.shape_env
        shape_env.settings = dataclasses.replace(shape_env.settings, allow_scalar_outputs=True)
    return True


# --- ranks that are not there: farskip_fx/diagnose/planned.py -------------------------------------------------------------
def fake_store():
    """The store of ``init_process_group("fake")`` (2.1); importing it registers that backend."""
    from torch.testing._internal.distributed.fake_pg import FakeStore
    return FakeStore()


# --- what others look at: farskip_fx/artifacts.py, farskip_fx/dumps.py -------------------------------------------
from torch._logging import trace_structured  # noqa: E402  2.3: what tlparse reads; asks for a payload only if it is written


def trace_artifact(name: str, payload, *, encoding: str = "string") -> None:
    trace_structured("artifact", metadata_fn=lambda: {"name": name, "encoding": encoding}, payload_fn=payload)


def readable(gm) -> str:
    """A graph as Dynamo and Inductor show theirs, with what ``rewire`` noted at its reads (``additional_meta``: 2.13)."""
    return gm.print_readable(print_output=False, include_stride=True, include_device=True, additional_meta=["farskip"])


def module_of_op(name: str) -> str | None:
    """The module that registers ``namespace::op`` with ``torch.library.custom_op`` (2.4), for it to be imported."""
    from torch._library.custom_ops import OPDEFS
    return OPDEFS[name]._init_fn.__module__ if name in OPDEFS else None
