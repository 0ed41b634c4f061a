"""``verify``: does the converted model compute what its connectivity says? If not, from which layer on?"""
from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import nn
from torch.fx import GraphModule, Node

from . import inner
from .backend import plan_of
from .config import FarskipConfig
from .convert import Converted, converted_of
from .errors import ConfigError, RefusedError
from .interpret import Direct
from .passes._torch import COMPILED_APART
from .passes.checkpointing import inline_checkpoints
from .passes.detect import Blocks, detect, is_busy
from .passes.normalize import normalize
from .passes.residual import NoStream, find_streams
from .passes.rewire import readers, rewire
from .report import Report

# Two ways to round the same sum, in units of the dtype's own precision.
_ROUNDINGS = 64


@dataclass(frozen=True, kw_only=True)
class LayerDifference:
    """The stream after one layer: largest difference from the interpretation, relative to the largest value."""
    index: int
    label: str
    difference: float


@dataclass(frozen=True, kw_only=True)
class Verification:
    """Outcome of ``verify``. Differences are relative to the largest absolute value of the reference."""
    connectivity: str
    tolerance: float
    output: float                          # of what the converted model returned
    layers: tuple[LayerDifference, ...]    # of the rewired graph, compiled with its states as outputs

    @property
    def first(self) -> LayerDifference | None:
        """The first layer that differs."""
        return next((layer for layer in self.layers if not layer.difference <= self.tolerance), None)

    @property
    def ok(self) -> bool:
        return self.first is None and self.output <= self.tolerance

    def __bool__(self) -> bool:
        return self.ok

    def __str__(self) -> str:
        head = f"connectivity {self.connectivity}: outputs differ by {self.output:.1e} (tolerance {self.tolerance:.1e})"
        if self.ok:
            return f"{head}; all {len(self.layers)} layers agree with the direct interpretation"
        if self.first is None:
            return (f"{head}; yet every layer agrees where the states are outputs of the graph: the difference comes from "
                    "the schedule or from a fusion (try overlap=False, then inner='aot_eager')")
        return (f"{head}; the first layer that differs is {self.first.index} ({self.first.label}), by "
                f"{self.first.difference:.1e}")


def verify(model: nn.Module, *args, tolerance: float | None = None, **kwargs) -> Verification:
    """Run a converted model, and compare it with the direct interpretation of its connectivity.

    Runs the model as it is; traces its original forward; evaluates that graph eagerly, block by block, as the
    connectivity's definition says (see ``farskip_fx.interpret``); and compiles the rewired graph once more with the states
    of the stream as outputs, so that it can say which layer is the first to differ. Caches among the arguments are copied.
    Without gradients; random numbers (dropout) are drawn from the same seed.

    Args:
        model: converted with ``farskip_fx.apply``.
        args, kwargs: what the model is called with.
        tolerance: largest difference allowed, relative to the largest value; None: 1e-5 in float32, 64 roundings of a
            coarser dtype.

    Returns:
        A ``Verification``: true if everything agrees.

    Raises:
        ConfigError: the model was not converted with ``apply``.
        RefusedError: the traced graph has no stream that can be interpreted.
    """
    owner = converted_of(model)
    if owner is None or owner.forward._compiled is None:
        raise ConfigError("verify needs a model that was converted with farskip_fx.apply(model, ...)")
    converted = owner.forward
    calls: list[tuple] = []

    def keep(module, args, kwargs):
        calls.append(copy.deepcopy((args, kwargs)))

    with torch.no_grad():
        seed = torch.random.get_rng_state()
        handle = owner.register_forward_pre_hook(keep, with_kwargs=True)
        owner_output: list = []
        after = owner.register_forward_hook(lambda module, args, output: owner_output.append(output))
        try:
            model(*args, **kwargs)
        finally:
            handle.remove()
            after.remove()
        if not calls:
            raise ConfigError("the call did not run the converted decoder")
        trace = _Trace(converted.config, seed)
        _original(converted, trace)(*calls[0][0], **calls[0][1])
    reference, got = trace.reference, owner_output[0]
    tolerance = tolerance_of(reference) if tolerance is None else tolerance
    layers = [LayerDifference(index=i, label=label, difference=difference_of(a, b))
              for i, (label, a, b) in enumerate(zip(trace.labels, trace.compiled_states, trace.states))]
    return Verification(connectivity=str(converted.config.connectivity), tolerance=tolerance, layers=tuple(layers),
                        output=difference_of(got, reference))


class _Trace:
    """A backend: what Dynamo captures is interpreted, and the rewired graph runs beside it with its states as outputs."""

    def __init__(self, config: FarskipConfig, seed: torch.Tensor) -> None:
        self.config, self.seed = config, seed
        self.reference: object = None
        self.labels: list[str] = []
        self.states: list[torch.Tensor] = []
        self.compiled_states: list[torch.Tensor] = []

    def __call__(self, gm: GraphModule, example_inputs: list) -> Callable:
        twin = copy.deepcopy(gm)
        blocks, twin_blocks = self._detected(gm), self._detected(twin)
        how = plan_of(self.config, len(blocks.layers))
        direct = Direct(gm, blocks, readers(blocks, **how) if self.config.names else ())
        if self.config.names:
            rewire(twin.graph, twin_blocks, **how)
        compiled = inner.compile(self._with_states(twin, twin_blocks), example_inputs, config=self.config, mode=None,
                                 report=Report(graph="verify", config=self.config))
        self.labels = [layer.mlp.label or layer.mlp.node.name for layer in blocks.layers]

        def run(*args):
            self.compiled_states = list(self._seeded(compiled, *map(_own, args)))
            outputs = self._seeded(direct.run, *args)
            self.states = [direct.values[_after(layer)] for layer in blocks.layers]
            return outputs
        return run

    def _detected(self, gm: GraphModule) -> Blocks:
        inline_checkpoints(gm, gradients=False)
        normalize(gm.graph)
        return blocks_of(gm, "verify")

    def _with_states(self, gm: GraphModule, blocks: Blocks) -> GraphModule:
        output = next(iter(reversed(gm.graph.nodes)))
        output.args = (tuple(_after(layer) for layer in blocks.layers),)
        gm.recompile()
        return gm

    def _seeded(self, call: Callable, *args):
        torch.random.set_rng_state(self.seed)
        return call(*args)


def blocks_of(gm: GraphModule, purpose: str) -> Blocks:
    """The blocks of a normalized graph; RefusedError where there is nothing to ``purpose``."""
    streams = find_streams(gm.graph, busy=is_busy)
    blocks = streams if isinstance(streams, NoStream) else detect(streams)
    if not isinstance(blocks, Blocks):
        raise RefusedError(f"nothing to {purpose}: {blocks.reason}")
    return blocks


def _original(converted: Converted, trace: _Trace) -> Callable:
    """The original forward, traced, with the interpretation in place of the compiled graph."""
    forward = converted.__wrapped__
    compiled = torch.compile(lambda *args, **kwargs: forward(*args, **kwargs), backend=trace, **COMPILED_APART)

    def run(*args, **kwargs):
        trace.reference = compiled(*args, **kwargs)
    return run


def _after(layer) -> Node:
    """The state after a layer's MLP."""
    return layer.mlp.stream.states[layer.mlp.update + 1]


def _own(value):
    """A copy of what a graph may write into (a cache); parameters are shared."""
    return value.clone() if isinstance(value, torch.Tensor) and not isinstance(value, nn.Parameter) else value


def tensors_in(value) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value] if value.is_floating_point() else []
    if isinstance(value, Mapping):
        value = list(value.values())
    return [t for item in value for t in tensors_in(item)] if isinstance(value, (tuple, list)) else []


def difference_of(got, reference) -> float:
    """Largest difference over all tensors, relative to the largest value of each; not a number where one is."""
    pairs = list(zip(tensors_in(got), tensors_in(reference), strict=True))
    return max((((a - b).abs().max() / b.abs().max().clamp(min=1e-30)).item() for a, b in pairs if b.numel()), default=0.0)


def tolerance_of(reference) -> float:
    return max((max(1e-5, _ROUNDINGS * torch.finfo(t.dtype).eps) for t in tensors_in(reference)), default=1e-5)
