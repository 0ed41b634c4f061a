"""The backend: the whole pipeline on one screen.

    Dynamo graph -> inline checkpoints -> skip causal masks -> normalize -> residual stream -> blocks -> rewire
                 -> means of gradients -> inner compiler
    (inner="inductor": its post-grad graphs, forward and backward -> schedule -> fence)

``torch.compile(model, backend=farskip_fx.farskip_backend, options={...})``; options are the fields of FarskipConfig.
Also registered as ``backend="farskip"``.
"""
from __future__ import annotations

import json
import time
import warnings
import weakref
from collections.abc import Callable
from contextlib import contextmanager

import torch
from torch.fx import GraphModule

from . import frame, inner, marker
from .artifacts import Shown, nobody
from .config import FarskipConfig, merge
from .connectivity import DENSE, ask
from .data_parallel import average_gradients
from .errors import ConfigError, FarskipWarning, NoMoEError, RefusedError, SplitModelError, WrongConnectivityError
from .passes.causal import skip_causal_masks
from .passes.checkpointing import inline_checkpoints
from .passes.dataflow import op_name
from .passes.describe import describe
from .passes.detect import NoBlocks, detect, is_busy
from .passes.normalize import normalize
from .passes.places import mark
from .passes.reasons import Reason
from .passes.residual import NoStream, find_streams
from .passes.rewire import rewire
from .passes.split import split_attention
from .report import Report, rank, record


def farskip_backend(gm: GraphModule, example_inputs: list, *, mode: str | None = None,
                    options: dict | None = None) -> Callable:
    """Rewire a Dynamo graph and compile it.

    Args:
        gm: graph of a model's forward, as Dynamo hands it over.
        example_inputs: its example inputs.
        mode: one of ``torch.compile``'s modes; passed on to Inductor.
        options: fields of ``FarskipConfig``.

    Raises (each inside Dynamo's ``BackendCompilerFailed``):
        ConfigError: an option is unknown or disagrees with the checkpoint's ``config.farskip``.
        NoMoEError: nothing to rewire in this model.
        RefusedError: a requested layer cannot be rewired; names it and says why.
        SplitModelError: a graph break left only a part of the layers in this graph.
        WrongConnectivityError: a KV cache that something else filled comes in.
    """
    where = frame.compiling()
    marked = marker.consume(gm.graph)
    config = _settle(options, marked, where.saved)
    report = Report(graph=where.name, config=config, marked=marked is not None, nodes=len(gm.graph.nodes), rank=rank(),
                    model=type(where.module).__name__ if where.module is not None else "",
                    module=weakref.ref(where.module) if where.module is not None else None)
    record(report)
    shown = Shown(report, example_inputs)
    if config.names or config.overlap and config.inner != "eager":      # without overlap exchanges may run twice
        with _timed(report, "checkpointing"):
            report.checkpoints = inline_checkpoints(gm, gradients=torch.is_grad_enabled())
    if config.causal_attention:
        with _timed(report, "causal"):
            report.causal = skip_causal_masks(gm.graph).calls
    if config.names:
        rewire_graph(gm, config, report, where, shown.graph)
    if config.data_parallel is not None:
        report.buckets = average_gradients(gm, example_inputs, config.data_parallel, paused=where.is_paused(config.data_parallel))
        shown.graph("after_data_parallel", gm)
    gm.recompile()
    compiled = inner.compile(gm, example_inputs, config=config, mode=mode, report=report, shown=shown)
    shown.report()
    return compiled


def rewire_graph(gm: GraphModule, config: FarskipConfig, report: Report, where: frame.Frame,
                 show: Callable[[str, GraphModule], None] = nobody) -> None:
    show("before_normalize", gm)
    if report.checkpoints.refused is not None:
        return _leave(report, where, gm, report.checkpoints.refused, part=True)
    with _timed(report, "normalize"):
        report.functionalized = normalize(gm.graph).functionalized
    show("after_normalize", gm)
    with _timed(report, "residual"):
        streams = find_streams(gm.graph, busy=is_busy)
    if isinstance(streams, NoStream):
        return _leave(report, where, gm, streams.reason, part=streams.length > 0)
    fragment = _fragment(streams[0], where)
    if fragment is not None:
        return _leave(report, where, gm, fragment, part=True)
    with _timed(report, "detect"):
        blocks = detect(streams)
    if isinstance(blocks, NoBlocks):
        return _leave(report, where, gm, blocks.reason, part=True)
    mark(blocks)
    report.found = describe(blocks)
    count = len(blocks.layers)
    if not blocks.moe_layers and (sparse := sorted(config.names - DENSE)):
        return _leave(report, where, gm, Reason(
            "no_moe", f"none of the {count} layers has a router and experts; connectivity "
            f"{', '.join(map(repr, sparse))} hides the exchanges of MoE blocks (a dense model can use 'ladder', or one "
            "of your own that is registered with dense=True)"), part=True)
    if blocks.idle and (dense := sorted(config.names & DENSE)):
        return _leave(report, where, gm, Reason(
            "several_streams", f"{len(blocks.idle)} more residual stream(s), of {blocks.idle[0].states[0].name} for one, have "
            f"no experts (a vision tower?), and connectivity {', '.join(map(repr, dense))} is for dense layers too; use "
            "'farskip', or compile the decoder alone"), part=True)
    plan = plan_of(config, count)
    if not report.marked and where.continues_unknown_cache(json.dumps(config.saved())):
        _refuse(config, WrongConnectivityError, f"{where.name!r} continues a KV cache that was not filled by this "
                "compiled model: the cached tokens would have another connectivity than the new ones. generate with a "
                "compile_config does this (it compiles the decoding step and not the prefill), and so does a prefill by "
                "the original model. Use farskip_fx.apply(model), or begin the sequence with the compiled model")
    with _timed(report, "rewire"):
        result = rewire(gm.graph, blocks, **plan)
    report.rewired = result
    show("after_rewire", gm)
    if config.overlap and config.inner != "eager":
        with _timed(report, "split"):
            calls = [node for layer, done in zip(blocks.layers, result.layers) if done.rewired and layer.mlp.exchange
                     for block in layer.leading for node in blocks.flow.members(block.contribution.branch)]
            report.split = split_attention(gm.graph, calls, parts=config.attention_parts).calls
        show("after_split", gm)
    if result.refused:
        _refuse(config, RefusedError, f"connectivity {config.connectivity!r} cannot be applied: {result.refusals}. Choose other "
                "layers or another connectivity, or pass strict=False to leave these layers as they are")


def plan_of(config: FarskipConfig, count: int) -> dict:
    """What ``rewire`` is to do with ``count`` layers: ``connectivity`` and ``layers``.

    Raises:
        ConfigError: the configuration names a layer that is not there.
    """
    names = config.of_layers(count)
    return {"layers": config.indices(count),
            "connectivity": lambda layer, earlier: ask(names[layer.index], layer, earlier)}


def _leave(report: Report, where: frame.Frame, gm: GraphModule, reason: Reason, *, part: bool) -> None:
    """Leave a graph as it is: an error where it holds (a part of) the model, silence where it is something else."""
    report.unchanged = reason
    config = report.config
    broken = where.break_of(gm)
    found = set(_telling_operations(gm))
    if not (part or found or report.marked or where.owns_layers and not where.resumed):
        return
    if report.marked and not found:
        _refuse(config, SplitModelError, f"graph {where.name!r} has the input of a converted model and none of its layers "
                f"({reason}): they would run with their original connectivity. {broken}Remove what breaks the graph or "
                "keeps the layers out of it (run with TORCH_LOGS=graph_breaks), or pass strict=False" + where.hint)
    elif broken or reason.code == "fragment":
        _refuse(config, SplitModelError, f"graph {where.name!r} holds only a part of the model ({reason}). {broken}"
                "Decoder layers would be missing from the rewiring. Remove the graph break (run with "
                "TORCH_LOGS=graph_breaks to see it), compile the whole model and not its layers, or pass "
                "strict=False to run the original connectivity" + where.hint)
    elif reason.code == "no_moe" or reason.code == "no_stream" and not found & _ROUTES:
        _refuse(config, NoMoEError, f"no MoE found in {where.name!r}: {reason}. Compile a model with "
                "mixture-of-experts layers, use connectivity='none', or pass strict=False to leave it as it is")
    else:
        _refuse(config, RefusedError, f"this model cannot be rewired as {config.connectivity!r}: {reason}. Use "
                "connectivity='none' (overlap only), or pass strict=False to leave it as it is" + where.hint)


def _refuse(config: FarskipConfig, error: type[Exception], text: str) -> None:
    if config.strict:
        raise error(text)
    warnings.warn(f"farskip_fx left this unchanged: {text}", FarskipWarning, stacklevel=2)


def _settle(options: dict | None, marked: FarskipConfig | None, saved: dict | None) -> FarskipConfig:
    """One configuration out of the options, the marker of ``apply`` and the checkpoint; a contradiction raises."""
    if marked is not None:
        agree(options or {}, marked.saved(), "the configuration given to farskip_fx.apply")
        return marked
    agree(options or {}, saved, "the checkpoint (config.farskip)")
    return FarskipConfig.from_dict(merge(saved, options or {}))


def agree(options: dict, saved: dict | None, what: str) -> None:
    """Raise where ``options`` contradict what the model was converted with."""
    if saved is None:
        return
    given, known = FarskipConfig.from_dict(merge(saved, options)), FarskipConfig.from_dict(saved)
    if given.meaning() == known.meaning():
        return
    given, known = given.to_dict(), known.to_dict()
    for key in ("connectivity", "layers", "payload", "backward_payload"):
        if given[key] != known[key]:
            raise ConfigError(f"option {key}={given[key]!r} disagrees with {what}, which says {known[key]!r}. Leave the "
                              "option out, or undo the conversion with farskip_fx.remove(model) first")


def _fragment(stream, where: frame.Frame) -> Reason | None:
    """A stream that enters the graph as an argument after a graph break begins in the middle of the model."""
    above = stream.flow.members(stream.flow.ancestors(stream.states[0])) or [stream.states[0]]
    if where.resumed and not any(op_name(n) == "embedding" for n in above):
        return Reason("fragment", f"the residual stream enters at {stream.states[0].name} after a graph break")
    return None


_ROUTES = {"topk", "_grouped_mm", "grouped_mm_fallback", "all_to_all_single"}
_MIXES = {"scaled_dot_product_attention", "flex_attention"}


def _telling_operations(gm: GraphModule):
    """What shows that a graph holds a part of a model: attention or routing, in it or in a subgraph of it (a
    checkpointed layer that was not inlined, say)."""
    for module in gm.modules():
        if isinstance(module, GraphModule):
            yield from {op_name(n) for n in module.graph.nodes} & (_ROUTES | _MIXES)


@contextmanager
def _timed(report: Report, name: str):
    start = time.perf_counter()
    yield
    report.seconds[name] = time.perf_counter() - start
