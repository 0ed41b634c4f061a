"""``explain``: what a conversion would do to a model, and what that would cost, without running or compiling it.

    model's forward -> Dynamo (fake tensors) -> the backend's passes, and beside them the graph as it was
                    -> AOTAutograd for each -> schedule both -> Report
"""
from __future__ import annotations

import copy
import dataclasses
import time
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext

import torch
from torch import nn
from torch._dynamo.exc import BackendCompilerFailed, Unsupported
from torch.fx import GraphModule

from .. import backend, frame
from ..agreement import collectives_of
from ..capture import prepare
from ..config import FarskipConfig
from ..convert import converted_of, in_one_graph, settings_of
from ..data_parallel import average_gradients
from ..errors import FarskipWarning, NoMoEError, RefusedError
from ..passes._torch import COMPILED_APART, lowered
from ..passes.causal import skip_causal_masks
from ..passes.checkpointing import inline_checkpoints
from ..passes.costs import Rates
from ..passes.describe import Found, describe
from ..passes.early_means import launch_means_early
from ..passes.normalize import normalize
from ..passes.places import mark
from ..passes.prefetch import prefetch
from ..passes.reasons import Reason
from ..passes.schedule import schedule
from ..report import Folded, Phase, Report, rank
from ..verify import blocks_of
from .decoder import Reached, owner_of, replaced
from .fold import folded, unfold

PHASES = ("forward", "backward")


def explain(model: nn.Module, *args, config: FarskipConfig | Mapping | None = None, gradients: bool | None = None,
            predict: bool = True, fold: bool = True, **inputs) -> Report:
    """What would change in ``model``, and why not; what would run when, before and after.

    Nothing of the model is run below its decoder, and nothing is compiled: weights may be on the meta device. Every rank of
    a model that is split over ranks gets its own report; no rank waits for another.

    Args:
        model: Hugging Face or not; split by ``expert_parallel`` or not (then there are no exchanges to hide).
        args, inputs: what the model is called with.
        config: a ``FarskipConfig`` or its fields; None: what the model was converted with, or its checkpoint says, or the
            defaults. Layers that cannot be rewired are in the report, whatever ``strict`` says.
        gradients: predict the backward too; None: if the model is in training mode and gradients are on.
        predict: lower the graph and simulate it; False: the rewiring alone.
        fold: trace a few of many equal layers; the report says so (``folded``).

    Returns:
        A ``Report``; ``phases`` has the original connectivity in the order of stock Inductor as ``before``.

    Raises:
        ConfigError: options that contradict the conversion.
        NoMoEError: the call did not reach a decoder.

    A graph that breaks is no error here: ``unchanged`` says where, and what helps.
    """
    tracer, how = _explained(model, args, inputs, config=config, gradients=gradients, predict=predict, fold=fold)
    report = tracer.report
    report.model, report.rank, report.module = type(model).__name__, rank(), weakref.ref(model)
    return unfold(report, how) if isinstance(how, Folded) else report


def predicted_graphs(model: nn.Module, *args, config: FarskipConfig | Mapping | None = None, gradients: bool | None = None,
                     **inputs) -> list[GraphModule]:
    """The graphs behind the ``phases`` of ``explain``: those of the original connectivity, then the rewired ones. Of many equal
    layers they have a few. Arguments and errors as of ``explain``."""
    return _explained(model, args, inputs, config=config, gradients=gradients, predict=True, fold=True)[0].graphs


def _explained(model: nn.Module, args: tuple, inputs: dict, *, config: FarskipConfig | Mapping | None,
               gradients: bool | None, predict: bool, fold: bool) -> tuple[_Tracer, Folded | None]:
    converted = converted_of(model)
    owner = converted if converted is not None else owner_of(model)
    forward = converted.forward.__wrapped__ if converted is not None else owner.forward
    if gradients is None:
        gradients = model.training and torch.is_grad_enabled()
    tracer = _Tracer(settings_of(model, config), f"{type(owner).__name__}.forward", gradients=gradients,
                     predict=predict)
    with (folded(owner) if fold else nullcontext()) as how, _traced(owner, forward, tracer):
        try:
            with torch.set_grad_enabled(tracer.gradients):
                model(*args, **inputs)
        except Reached:
            pass
    if tracer.report is None:
        raise NoMoEError(f"the call did not reach the decoder of {type(model).__name__} ({type(owner).__name__}), so there is "
                         "nothing to explain: call it as it runs, with input_ids for example")
    return tracer, how


def graphs_of(model: nn.Module, *args, gradients: bool, fold: bool = True, causal: bool = False,
              **inputs) -> tuple[list[GraphModule], Folded | None]:
    """The decoder of ``model`` as it is, as the graphs that Inductor would get, forward first; their nodes know their place.
    ``causal``: without masks that are causal whatever the inputs, as our backend compiles it.

    Raises:
        RefusedError: the graph breaks.
        NoMoEError: the call did not reach a decoder.
    """
    owner, tracer = owner_of(model), _Lowerer(causal)
    with (folded(owner) if fold else nullcontext()) as how, _traced(owner, owner.forward, tracer):
        try:
            with torch.set_grad_enabled(gradients):
                model(*args, **inputs)
        except Reached:
            return tracer.report, how
    raise NoMoEError(f"the call did not reach the decoder of {type(model).__name__}: call it as it runs, with input_ids for "
                     "example")


class _Traced(Exception):
    """Ends Dynamo's compile once the graph was looked at."""


@contextmanager
def _traced(owner: nn.Module, forward: Callable, tracer: _Tracer) -> Iterator[None]:
    """``owner`` traces its forward instead of running it."""
    def traced(*args, **kwargs):
        return forward(*args, **kwargs)

    scope = prepare(owner)

    def run(*args, **kwargs):
        with in_one_graph(scope, owner, kwargs), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)        # Dynamo's remarks on the model's code
            for whole in (False, True):     # where Dynamo gave up on the frame, the second time says why
                compiled = torch.compile(traced, backend=tracer, fullgraph=whole, **COMPILED_APART)
                try:
                    compiled(*args, **kwargs)
                except BackendCompilerFailed as error:
                    if not isinstance(error.inner_exception, _Traced):
                        raise error.inner_exception from error
                except Unsupported as error:
                    tracer.broken(str(error))
                if tracer.report is not None:
                    raise Reached

    with replaced(owner, run):
        yield


class _Tracer:
    """The backend: takes the first graph, and compiles nothing."""

    def __init__(self, config: FarskipConfig, name: str, *, gradients: bool, predict: bool) -> None:
        self.config, self.name, self.gradients, self.predict = config, name, gradients, predict
        self.report: Report | None = None
        self.graphs: list[GraphModule] = []

    def __call__(self, gm: GraphModule, example_inputs: list) -> Callable:
        where = frame.compiling()
        # Whatever cannot be rewired is what the report is about.
        lenient = dataclasses.replace(self.config, strict=False)
        report = Report(graph=self.name, config=lenient, nodes=len(gm.graph.nodes))
        report.checkpoints = inline_checkpoints(gm, gradients=self.gradients)
        if lenient.causal_attention:        # in both graphs: what is compared is the connectivity
            report.causal = skip_causal_masks(gm.graph).calls
        report.found = _mark(gm)
        before = copy.deepcopy(gm)
        if lenient.names:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FarskipWarning)
                backend.rewire_graph(gm, lenient, report, where)
        broken = where.break_of(gm)
        if broken:
            report.rewired, report.unchanged = None, Reason("graph_break", f"{broken}{report.unchanged or ''}".strip())
        if lenient.data_parallel is not None:
            for graph in (before, gm):
                report.buckets = average_gradients(graph, example_inputs, lenient.data_parallel,
                                                   paused=where.is_paused(lenient.data_parallel))
        report.collectives = collectives_of(gm)
        if self.predict and not broken:
            start = time.perf_counter()
            report.explained = self._phases(before, gm, example_inputs)
            report.seconds["predict"] = time.perf_counter() - start
        report.config = self.config
        self.report = report
        raise _Traced

    def broken(self, why: str) -> None:
        """Dynamo made no graph at all."""
        lines = [line.strip() for line in why.splitlines() if line.strip()]
        at = next((line for line in reversed(lines) if line.startswith("File ")), "")
        self.report = Report(graph=self.name, config=self.config, unchanged=Reason(
            "graph_break", f"The graph breaks{at and f' at {at}'}: {lines[0] if lines else 'no reason given'}. Remove what "
            "breaks it (run with TORCH_LOGS=graph_breaks)"))

    def _phases(self, before: GraphModule, after: GraphModule, example_inputs: list) -> tuple[Phase, ...]:
        rates = self.config.rates or Rates()
        original, converted = lowered(before, example_inputs), lowered(after, example_inputs)
        self.graphs = [*original, *converted]
        old = [schedule(graph.graph, rates=rates) for graph in original]
        new = []
        for graph in converted:
            prefetch(graph.graph)
            launch_means_early(graph.graph)
            new.append(schedule(graph.graph, rates=rates))
        return tuple(Phase(name=name, before=one.before, after=other.after if self.config.overlap else other.before,
                           bound_s=other.bound_s, reason=other.reason, operations=other.operations)
                     for name, one, other in zip(PHASES, old, new))


class _Lowerer:
    """Takes the first graph, and lowers it as it is."""
    report: list[GraphModule] | None = None

    def __init__(self, causal: bool = False) -> None:
        self.causal = causal

    def __call__(self, gm: GraphModule, example_inputs: list) -> Callable:
        if self.causal:
            skip_causal_masks(gm.graph)
        _mark(gm)
        self.report = lowered(gm, example_inputs)
        raise _Traced

    def broken(self, why: str) -> None:
        raise RefusedError(f"the graph breaks: {why.strip().splitlines()[0] if why.strip() else 'no reason given'}; "
                           "farskip explain says where")


def _mark(gm: GraphModule) -> tuple[Found, ...]:
    """The blocks, marked in the graph; none where they are not understood (``rewire_graph`` says why)."""
    normalize(gm.graph)
    gm.recompile()
    try:
        blocks = blocks_of(gm, "explain")
    except RefusedError:
        return ()
    mark(blocks)
    return describe(blocks)
