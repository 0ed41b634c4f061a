"""The runs that ``bisect`` compares: one model and one call, at growing pipelines, with some layers converted; and what each
run should give.

    model's forward -> Dynamo -> rewire | causal | aot | inductor | schedule | fence | split       (each stage has all before it)

Terms
  names      the connectivity of each decoder layer
  oracle     what a run should give: the original model, run eagerly, where no layer is converted; else the direct
             interpretation of the traced graph (interpret.py), which no pass had its hands on

Contract: outside of these runs nothing changes, not the model and not PyTorch's settings. Runs do not use up recompiles of
others. On several ranks all do the same: what they decide by (a difference, a time) is the largest of all ranks, found
outside of any compile.
"""
from __future__ import annotations

import copy
import dataclasses
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import nn
from torch._dynamo.exc import BackendCompilerFailed
from torch.fx import GraphModule

from ..backend import plan_of
from ..caches import graph_caches_off
from ..capture import prepare
from ..config import FarskipConfig
from ..convert import Converted, converted_of, in_one_graph
from ..errors import ConfigError, FarskipError, NoMoEError
from ..interpret import Direct
from ..overlap import overlap_patches
from ..passes._torch import COMPILED_APART
from ..passes.checkpointing import inline_checkpoints
from ..passes.costs import Rates
from ..passes.fence import ScheduleBroken
from ..passes.normalize import normalize
from ..passes.rewire import readers
from ..verify import blocks_of, difference_of, tensors_in, tolerance_of
from .decoder import Reached, layers_of, owner_of, replaced, shortened

SEED = 0
_OF_GRADIENTS = 1e-4    # the least tolerance: their sums are longer than those of outputs
_NOTHING = 1e-3         # of the largest gradient: below it, a gradient is compared with that


# --- pipelines ---------------------------------------------------------------------------------------------------

@dataclass(frozen=True, kw_only=True)
class Stage:
    """One pipeline. ``name`` is what it has and the one before it has not."""
    name: str
    options: Mapping[str, object] = field(default_factory=dict)     # fields of the configuration
    schedule_alone: bool = False


_STAGES = (
    Stage(name="rewire", options={"inner": "eager", "causal_attention": False}),
    Stage(name="causal", options={"inner": "eager"}),                                   # masks skipped
    Stage(name="aot", options={"inner": "aot_eager", "overlap": False}),                # AOTAutograd
    Stage(name="inductor", options={"overlap": False}),                                 # stock
    Stage(name="schedule", options={"overlap": False}, schedule_alone=True),            # nothing that keeps its order
    Stage(name="fence", options={"attention_parts": 1}),
    Stage(name="split"),                                                                # attention in parts
)


def stages_of(config: FarskipConfig) -> tuple[Stage, ...]:
    """The pipelines up to that of ``config``, smallest first."""
    names = ["rewire", *(["causal"] if config.causal_attention else [])]
    if config.inner != "eager":
        names.append("aot")
    if config.inner == "inductor":
        names += ["inductor", *(["schedule", "fence"] if config.overlap else [])]
    if config.inner != "eager" and config.overlap and config.attention_parts > 1 and config.names:
        names.append("split")
    return tuple(stage for stage in _STAGES if stage.name in names)


# --- what a run said ---------------------------------------------------------------------------------------------

@dataclass(frozen=True, kw_only=True)
class Trial:
    """One run, compared. ``difference`` is relative to the largest value of the oracle; infinite where the run failed."""
    stage: str
    converted: str          # in words
    layers: int | None      # decoder layers that the model had; None: all
    difference: float
    tolerance: float
    error: str = ""
    seconds: float = 0.0

    @property
    def wrong(self) -> bool:
        return not self.difference <= self.tolerance

    def __str__(self) -> str:
        cut = f", {counted(self.layers)}" if self.layers is not None else ""
        said = self.error or f"differs by {self.difference:.1e}"
        return f"{self.stage}, {self.converted}{cut}: {said}: {'WRONG' if self.wrong else 'ok'} ({self.seconds:.1f} s)"


@dataclass(frozen=True, kw_only=True)
class Timing:
    """One pipeline, timed: the median step of the slowest rank."""
    stage: str
    converted: str
    step_s: float

    def __str__(self) -> str:
        return f"{self.stage}, {self.converted}: {self.step_s * 1e3:.1f} ms a step"


class Runs:
    """Runs of one call of one model.

    Args:
        model: converted or not.
        args, inputs: what it is called with.
        config: of the conversion in question.
        gradients: run the backward too, and compare the gradients of the parameters.
        tolerance: None: as in ``verify``, and at least 1e-4 with gradients.
        told: called with each ``Trial`` and ``Timing``.
    """

    def __init__(self, model: nn.Module, args: tuple, inputs: dict, config: FarskipConfig, *, gradients: bool = False,
                 tolerance: float | None = None, told: Callable[[Trial | Timing], None] | None = None) -> None:
        self.config, self.gradients, self._told = config, gradients, told or (lambda trial: None)
        converted = converted_of(model)
        self.owner = converted if converted is not None else model if config.data_parallel is not None else owner_of(model)
        self.forward = converted.forward.__wrapped__ if converted is not None else self.owner.forward
        self.call = self._called(model, args, inputs)
        self._given_tolerance = tolerance
        self._oracles: dict[tuple, _Result] = {}
        self._interpreters: dict[int | None, _Interpreter] = {}     # by decoder layers
        self._random = False
        self.trials: list[Trial | Timing] = []

    # --- what the model is ---
    @property
    def count(self) -> int:
        """Decoder layers that were found in the graph."""
        return len(self._interpreters[None].blocks.layers) if None in self._interpreters else 0

    def kind(self, layer: int) -> str:
        """Of a layer's second half: "moe" or "mlp"."""
        return self._interpreters[None].blocks.layers[layer].mlp.kind

    def label(self, layer: int) -> str:
        mlp = self._interpreters[None].blocks.layers[layer].mlp
        return mlp.label or mlp.node.name

    @property
    def decoder_layers(self) -> int:
        """In the list of layers of the model; 0 where there is no list that can be shortened."""
        return len(layers_of(self.owner)[1])

    def _called(self, model: nn.Module, args: tuple, inputs: dict) -> tuple[tuple, dict]:
        """What the decoder is called with when the model is. Nothing runs but what comes before it."""
        calls: list[tuple[tuple, dict]] = []

        def keep(*args, **kwargs):
            calls.append(copy.deepcopy((args, kwargs)))
            raise Reached

        with torch.no_grad(), replaced(self.owner, keep):
            try:
                model(*args, **inputs)
            except Reached:
                pass
        if not calls:
            raise NoMoEError(f"the call did not reach the decoder of {type(model).__name__} ({type(self.owner).__name__}): "
                             "call it as it runs, with input_ids for example")
        return calls[0]

    # --- one run, compared ---
    def traced(self) -> Trial:
        """Whether the traced and normalized graph, interpreted as it is, gives what the model does."""
        start = time.perf_counter()
        expected = self._oracle(None, None)
        return self._compared("trace", "nothing converted", None, start, lambda: self._interpreted(None, None), expected)

    def trial(self, names: Sequence[str] | None, stage: Stage, *, layers: int | None = None, caches: bool | str = False,
              label: str = "") -> Trial:
        """Run one pipeline.

        Args:
            names: of each decoder layer; None: no layer is converted.
            layers: shorten the model's list of decoder layers to so many.
            caches: False: compile anew; True: with PyTorch's caches as they are set; "inductor": without AOTAutograd's.
            label: what to call the pipeline.
        """
        start = time.perf_counter()
        expected = self._oracle(names, layers)      # what goes wrong here is no finding
        with self.shortened(layers), self._settings(stage, caches):
            return self._compared(label or stage.name, words(names), layers, start,
                                  self._compiled(names, stage), expected)

    def _compared(self, stage: str, converted: str, layers: int | None, start: float, run: Callable[[], _Result],
                  expected: _Result) -> Trial:
        error = ""
        try:
            difference = run().difference(expected)
        except Exception as raised:
            cause = raised.inner_exception if isinstance(raised, BackendCompilerFailed) else raised
            if isinstance(cause, FarskipError):
                raise cause from raised
            error = f"{type(cause).__name__}: {next(iter(str(cause).splitlines()), '')}"
            # Without the fence Inductor does not keep the planned order, and it is noticed: no fault of the schedule.
            unkept = stage == "schedule" and ScheduleBroken.__name__ in error
            difference = 0.0 if unkept else float("inf")
        done = Trial(stage=stage, converted=converted, layers=layers, difference=largest(difference), error=error,
                     tolerance=self.tolerance(expected), seconds=time.perf_counter() - start)
        self._tell(done)
        return done

    def tolerance(self, expected: _Result) -> float:
        if self._given_tolerance is not None:
            return self._given_tolerance
        return max(tolerance_of(expected.outputs), _OF_GRADIENTS if self.gradients else 0.0)

    # --- several pipelines, timed ---
    def times(self, pipelines: Sequence[tuple[Sequence[str] | None, Stage, str]], *, rounds: int, warmup: int = 2
              ) -> list[Timing]:
        """Median steps of pipelines (names, stage, label), measured in turn: what disturbs one disturbs all."""
        steps = []
        for names, stage, _ in pipelines:
            step = self._compiled(names, stage)
            with self._settings(stage, False):
                for _ in range(warmup):
                    step()
            steps.append(step)
        taken: list[list[float]] = [[] for _ in steps]
        for _ in range(rounds):
            for step, own in zip(steps, taken):
                _synchronize()
                start = time.perf_counter()
                step()
                _synchronize()
                own.append(time.perf_counter() - start)
        found = [Timing(stage=label, converted=words(names), step_s=largest(statistics.median(own)))
                 for (names, _, label), own in zip(pipelines, taken)]
        for timing in found:
            self._tell(timing)
        return found

    # --- how ---
    def _tell(self, done: Trial | Timing) -> None:
        self.trials.append(done)
        self._told(done)

    def _compiled(self, names: Sequence[str] | None, stage: Stage) -> Callable[[], _Result]:
        compiled = Converted(self.forward, dataclasses.replace(self._config(names), **stage.options))
        return lambda: self._run(compiled)

    def _config(self, names: Sequence[str] | None) -> FarskipConfig:
        if names is None:
            return dataclasses.replace(self.config, connectivity="none", layers="all")
        chosen = {str(i): name for i, name in enumerate(names) if name != "none"}
        return dataclasses.replace(self.config, connectivity=chosen or "none", layers="all")

    def _run(self, forward: Callable) -> _Result:
        """One step of the decoder; random numbers, and the gradients of its outputs, from one seed."""
        args, kwargs = copy.deepcopy(self.call)
        with _seeded(), torch.set_grad_enabled(self.gradients), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)        # Dynamo's remarks on the model's code, each time again
            outputs = tensors_in(forward(*args, **kwargs))
            if not self.gradients:
                return _Result(outputs=outputs)
            results = [t for t in outputs if t.requires_grad]
            parameters = [p for p in self.owner.parameters() if p.requires_grad]
            if not results or not parameters:
                raise ConfigError(f"gradients were asked for, and no output of {type(self.owner).__name__} depends on a "
                                  "parameter that requires one; pass gradients=False")
            torch.manual_seed(SEED)
            found = torch.autograd.grad(results, parameters, [torch.randn_like(t) for t in results], allow_unused=True)
        return _Result(outputs=[t.detach() for t in outputs], gradients=list(found))

    def _oracle(self, names: Sequence[str] | None, layers: int | None) -> _Result:
        none = names is None or set(names) == {"none"}
        key = (None if none else tuple(names), layers)
        if key not in self._oracles:
            if none:
                with self.shortened(layers):
                    self._oracles[key] = self._run(self._eager)
            else:
                self._oracles[key] = self._interpreted(names, layers)
        return self._oracles[key]

    def _eager(self, *args, **kwargs):
        before = _random_state()
        out = self.forward(*args, **kwargs)
        self._random = self._random or _random_state() != before
        return out

    def _interpreted(self, names: Sequence[str] | None, layers: int | None) -> _Result:
        if layers not in self._interpreters:
            self._interpreters[layers] = _Interpreter(self.owner, self.forward)
        interpreter = self._interpreters[layers]
        interpreter.config = self._config(names)
        with self.shortened(layers):
            return self._run(interpreter)

    @contextmanager
    def _settings(self, stage: Stage, caches: bool | str) -> Iterator[None]:
        import torch._inductor.config as inductor
        with ExitStack() as scoped:
            if caches is not True:
                scoped.enter_context(graph_caches_off(inductor=not caches))
            if self._random:        # Inductor's own random numbers are others than those of the oracle
                scoped.enter_context(inductor.patch(fallback_random=True))
            if stage.schedule_alone:
                alone = overlap_patches(self.config.rates or Rates())
                del alone["_pre_fusion_custom_pass"], alone["_post_fusion_custom_pass"]
                scoped.enter_context(inductor.patch(alone))
            yield

    @contextmanager
    def shortened(self, layers: int | None) -> Iterator[None]:
        """The model with its first ``layers`` decoder layers; the same objects, and afterwards all of them."""
        if layers is None:
            yield
            return
        if not self.decoder_layers:
            raise ConfigError(f"{type(self.owner).__name__} has no list of decoder layers that could be shortened")
        with shortened(self.owner, layers):
            yield


@dataclass(frozen=True, kw_only=True)
class _Result:
    outputs: list[torch.Tensor]
    gradients: list[torch.Tensor | None] = field(default_factory=list)

    def difference(self, expected: _Result) -> float:
        """Relative to the largest value of each tensor. A gradient that is nothing beside the others is rounding."""
        sizes = [0.0 if g is None else g.abs().max().item() if g.numel() else 0.0 for g in expected.gradients]
        least = max(_NOTHING * max(sizes, default=0.0), 1e-30)
        found = [difference_of(self.outputs, expected.outputs)]
        for got, want, size in zip(self.gradients, expected.gradients, sizes, strict=True):
            if got is None and want is None:
                continue
            apart = got - want if got is not None and want is not None else got if want is None else want
            found.append(apart.abs().max().item() / max(size, least) if apart.numel() else 0.0)
        return max((float("inf") if d != d else d for d in found), default=0.0)


class _Interpreter:
    """A forward that is traced once, and interpreted as ``config`` says."""

    def __init__(self, owner: nn.Module, forward: Callable) -> None:
        self.config, self.blocks = FarskipConfig(), None
        self._owner, self._scope = owner, prepare(owner)
        self._compiled = torch.compile(lambda *args, **kwargs: forward(*args, **kwargs), backend=self._interpret,
                                       **COMPILED_APART)

    def __call__(self, *args, **kwargs):
        try:
            with in_one_graph(self._scope, self._owner, kwargs):
                return self._compiled(*args, **kwargs)
        except BackendCompilerFailed as error:
            raise error.inner_exception from error

    def _interpret(self, gm: GraphModule, example_inputs: list) -> Callable:
        inline_checkpoints(gm, gradients=torch.is_grad_enabled())
        normalize(gm.graph)
        blocks = self.blocks = blocks_of(gm, "bisect")

        def run(*args):
            how = plan_of(self.config, len(blocks.layers))
            return Direct(gm, blocks, readers(blocks, **how) if self.config.names else ()).run(*args)
        return run


# --- helpers -----------------------------------------------------------------------------------------------------

def words(names: Sequence[str] | None) -> str:
    """Which layers are converted: "layers 0-2 and 5 farskip"."""
    spans: list[list] = []
    for i, name in enumerate(names or ()):
        if spans and spans[-1][2] == name and spans[-1][1] == i - 1:
            spans[-1][1] = i
        elif name != "none":
            spans.append([i, i, name])
    if not spans:
        return "nothing converted"
    return ", ".join(f"layer{'s' if a != b else ''} {a if a == b else f'{a}-{b}'} {name}" for a, b, name in spans)


def counted(layers: int) -> str:
    return f"{layers} decoder layer{'s' if layers != 1 else ''}"


def largest(number: float) -> float:
    """Of all ranks; not a number counts as infinite. Never called inside a compile."""
    number = float("inf") if number != number else number
    if not dist.is_initialized() or dist.get_backend() == "fake" or dist.get_world_size() == 1:
        return number
    device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else "cpu"
    all_of_them = torch.tensor(number, dtype=torch.float64, device=device)
    dist.all_reduce(all_of_them, dist.ReduceOp.MAX)
    return all_of_them.item()


@contextmanager
def _seeded() -> Iterator[None]:
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(SEED)
        yield


def _random_state() -> bytes:
    states = [torch.random.get_rng_state(), *([torch.cuda.get_rng_state()] if torch.cuda.is_initialized() else [])]
    return b"".join(state.numpy().tobytes() for state in states)


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
