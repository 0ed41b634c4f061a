"""Teacher and student of a conversion, side by side: the traced graph as it is, and a twin of it that is rewired.

Contract: the model is traced whole, once; its forward is left as it is. Both programs hold the same parameters, and every
node of the teacher has its twin in the student.
"""
from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from ..backend import plan_of
from ..capture import one_graph, way_to_one_graph
from ..config import FarskipConfig
from ..convert import converted_of
from ..errors import ConfigError, RefusedError, SplitModelError
from ..passes._torch import COMPILED_APART
from ..passes.checkpointing import inline_checkpoints
from ..passes.detect import Blocks
from ..passes.normalize import normalize
from ..passes.rewire import Rewired, readers, rewire
from ..verify import blocks_of
from .head import in_eval_mode
from .program import Program


@dataclass(frozen=True, kw_only=True)
class Pair:
    teacher: Program
    student: Program
    twin: dict[Node, Node]              # of the teacher's nodes
    blocks: Blocks                      # of the teacher
    hidden: frozenset[Node]             # contributions whose blocks read another stream in the student
    rewired: Rewired
    parameters: dict[Node, nn.Parameter]        # by the teacher's placeholder
    fixed: dict[Node, object]           # the teacher's other placeholders that are equal in every batch
    calls: list[dict[Node, object]]     # the rest, of each batch


def trace_pair(model: nn.Module, batches: Iterable, config: FarskipConfig) -> Pair:
    """Trace ``model`` on ``batches`` and rewire a copy of the graph.

    Args:
        batches: token ids [batch, sequence], or dicts of what the model is called with; all of one shape.

    Raises:
        ConfigError: a converted model; no batches, or batches of several shapes.
        SplitModelError: the model is not one graph.
        RefusedError: no stream that is understood, or a requested layer that cannot be rewired.
    """
    if converted_of(model) is not None:
        raise ConfigError("this model is converted, and a refit compares its original connectivity with the new one: call "
                          "farskip_fx.remove(model) first, and farskip_fx.apply after the refit")
    gm, calls = traced(model, batches, "a refit")
    twin_gm = copy.deepcopy(gm)
    twin = dict(zip(gm.graph.nodes, twin_gm.graph.nodes))
    blocks, twin_blocks = blocks_of(gm, "refit"), blocks_of(twin_gm, "refit")
    how = plan_of(config, len(blocks.layers))
    hidden = frozenset(one.block.node for one in readers(blocks, **how)) if config.names else frozenset()
    rewired = rewire(twin_gm.graph, twin_blocks, **how)
    if rewired.refused and config.strict:
        raise RefusedError(f"connectivity {config.connectivity!r} cannot be applied: {rewired.refusals}. Choose other layers or another "
                           "connectivity")
    parameters, fixed, varying = sorted_arguments(model, gm, calls)
    teacher = Program(gm, weights=parameters, inputs=varying[0])
    student = Program(twin_gm, weights=[twin[n] for n in parameters], inputs=[twin[n] for n in varying[0]])
    return Pair(teacher=teacher, student=student, twin=twin, blocks=blocks, hidden=hidden, rewired=rewired,
                parameters=parameters, fixed=fixed, calls=varying)


def traced(model: nn.Module, batches: Iterable, purpose: str) -> tuple[GraphModule, list[tuple]]:
    """The graph of the model's forward, normalized, and the arguments of that graph for each batch.

    Args:
        purpose: "a refit": who asks, for errors.

    Raises:
        ConfigError: no batches, or batches of several shapes.
        SplitModelError: the model is not one graph.
    """
    graphs, calls = [], []

    def backend(gm: GraphModule, example_inputs: list):
        graphs.append(gm)

        def run(*args):
            calls.append(args)
            raise _Recorded
        return run

    compiled = torch.compile(lambda **kwargs: model(**kwargs), backend=backend, fullgraph=True, dynamic=False,
                             **COMPILED_APART)
    with torch.no_grad(), in_eval_mode(model), one_graph(model), warnings.catch_warnings():
        for batch in batches:
            try:
                compiled(**_arguments(model, batch))
            except _Recorded:
                pass
            except torch._dynamo.exc.Unsupported as broken:
                way = way_to_one_graph(model)
                raise SplitModelError(
                    f"{type(model).__name__} is not one graph, so its stream cannot be followed: "
                    f"{str(broken).splitlines()[0]}. {way or 'Run with TORCH_LOGS=graph_breaks'}") from broken
            if len(graphs) > 1:
                raise ConfigError(f"the batches of {purpose} must all have one shape and the same arguments: cut or pack the "
                                  "calibration text to one length, and leave a last, smaller batch out")
    if not calls:
        raise ConfigError(f"{purpose} needs at least one batch of calibration text")
    inline_checkpoints(graphs[0], gradients=False)
    normalize(graphs[0].graph)
    return graphs[0], calls


class _Recorded(Exception):
    """Ends a forward whose arguments are known: the graph is run piece by piece later."""


def _arguments(model: nn.Module, batch) -> dict:
    given = dict(batch) if isinstance(batch, Mapping) else {"input_ids": batch}
    given.pop("labels", None)       # the loss is not needed
    accepts = inspect.signature(model.forward).parameters
    if "use_cache" in accepts and "use_cache" not in given:
        given["use_cache"] = False
    if not isinstance(batch, Mapping) and "input_ids" not in accepts:
        given[next(iter(accepts))] = given.pop("input_ids")
    return given


def sorted_arguments(model: nn.Module, gm: GraphModule, calls: list[tuple]):
    """(parameters, what is equal in every call, the rest of each call)."""
    own, buffers = {id(p) for p in model.parameters()}, {id(b) for b in model.buffers()}
    parameters: dict[Node, nn.Parameter] = {}
    fixed: dict[Node, object] = {}
    varying: list[dict[Node, object]] = [{} for _ in calls]
    for position, node in enumerate(n for n in gm.graph.nodes if n.op == "placeholder"):
        first = calls[0][position]
        if id(first) in own:
            parameters[node] = first
        elif id(first) in buffers or not isinstance(first, Tensor):
            fixed[node] = first
        else:
            for values, call in zip(varying, calls):
                values[node] = call[position]
    return parameters, fixed, varying
