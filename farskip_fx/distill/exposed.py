"""Communication that stays exposed when each layer has a connectivity of its own: a prediction, in milliseconds of work.

    hidden = HiddenTime(structures, Deployment(ep=8, tokens=8192, rates="h100-infiniband"))
    hidden.exposed(["none", "farskip", ...])        # seconds of one forward
    hidden.share(["none", "farskip", ...])          # of what the best uniform choice hides

Model
    A rank has two lanes: it computes one thing at a time, and its link carries one exchange at a time, in the order of the
    layers. A layer is attention (in four equal parts, so that it can run behind two exchanges), then the MLP, or
    router -> dispatch -> experts -> combine with the shared expert beside them. What must wait for what follows from the
    reads of the connectivity. The compute lane runs what is ready, longest path first (``passes.simulate``); exposed is the
    time in which it has nothing to run.

    seconds of compute      flops of the layer (``structure``) times tokens / rate + one kernel's overhead a part
    seconds of an exchange  latency + rows x bytes x (ep - 1) / ep / link rate, balanced routing

What it is not: a measurement. Loops (norms, activations, permutations of rows) take no time here, the counts exchange
neither, and kernels reach the same rate at every size. Shares are more reliable than seconds. The forward alone is
simulated; its backward has the same exchanges behind about twice the compute, in the opposite order.
"""
from __future__ import annotations

import dataclasses
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from ..config import refuse_unknown
from ..connectivity import CONNECTIVITIES, Missing, Reads, ask, known_names
from ..errors import ConfigError
from ..passes.costs import PRESETS, Rates
from ..passes.simulate import COMPUTE, LAUNCH, WAIT, Problem, list_schedule, run, tails
from .structure import LayerStructure

CHOICES = ("farskip", "attn_only", "mlp_only")
_PARTS = 4              # of attention: projections, the core in two groups of heads, output
_PATIENCE = (0.15, 0.4)      # of the rules of ``list_schedule`` those that come within a few percent of its search


def require_choices(choices: Sequence[str]) -> None:
    """Raise ConfigError for what is no list of known connectivities, or an empty one."""
    if not isinstance(choices, (list, tuple, set, frozenset)) or not choices:
        raise ConfigError(f"choices must be a list of connectivities, got {choices!r}")
    for name in choices:
        if not isinstance(name, str) or name not in CONNECTIVITIES:
            raise ConfigError(f"choices: {known_names(name)}")


@dataclass(frozen=True, kw_only=True)
class Deployment:
    """Where the converted model will run; the scan of accuracy does not depend on it, what can be hidden does.

    Args:
        ep: ranks that the experts are split over.
        tokens: on each rank, in one forward.
        context: tokens of one sequence.
        rates: figures of device and link: ``farskip_fx.Rates``, a mapping of its fields, or "cpu", "h100-nvlink",
            "h100-infiniband". None: ``Rates()``, one CPU core and a link of 31 MB/s; give your own.

    Raises:
        ConfigError: an option is unknown or has a value that it cannot have.
    """
    ep: int = 8
    tokens: int = 4096
    context: int = 4096
    rates: Rates | Mapping | str | None = None

    def __post_init__(self) -> None:
        for name, low in (("ep", 2), ("tokens", 1), ("context", 1)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < low:
                raise ConfigError(f"deployment: {name} must be a whole number of at least {low}, got {value!r}")
        object.__setattr__(self, "rates", _rates(self.rates))

    @classmethod
    def of(cls, options: Deployment | Mapping | None) -> Deployment:
        if isinstance(options, Deployment):
            return options
        if not isinstance(options, Mapping | None):
            raise ConfigError(f"deployment must be a mapping of {', '.join(f.name for f in dataclasses.fields(cls))}, got "
                              f"{options!r}")
        refuse_unknown(options or {}, [f.name for f in dataclasses.fields(cls)], "deployment: unknown ", "; known: ")
        return cls(**(options or {}))

    def to_dict(self) -> dict:
        """As JSON has it."""
        return dataclasses.asdict(self) | {"rates": self.rates.to_dict()}


def _rates(given) -> Rates:
    if given is None:
        return Rates()
    if isinstance(given, Rates):
        return given
    if isinstance(given, str) and given in PRESETS:
        return PRESETS[given]
    if not isinstance(given, Mapping):
        raise ConfigError(f"deployment: rates must be a mapping of the fields of farskip_fx.Rates or one of "
                          f"{', '.join(map(repr, PRESETS))}, got {given!r}")
    refuse_unknown(given, [f.name for f in dataclasses.fields(Rates)], "deployment, rates: unknown ", "; known: ")
    try:
        return Rates(**given)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"deployment, rates: {error}") from error


@dataclass(frozen=True, kw_only=True)
class LayerSeconds:
    """Of one layer, when nothing else runs. ``shared`` is the whole MLP where the layer is dense."""
    attention: float
    router: float = 0.0
    shared: float = 0.0
    experts: float = 0.0
    dispatch: float = 0.0
    combine: float = 0.0


def seconds_of(layer: LayerStructure, where: Deployment) -> LayerSeconds:
    rates, tokens = where.rates, where.tokens

    def maps(flops: float) -> float:
        return flops * tokens / rates.matmul_flops + rates.kernel_overhead if flops else 0.0

    core = layer.core_flops * tokens * where.context / rates.attention_flops
    exchange = 0.0
    if layer.kind == "moe":
        payload = layer.rows * tokens * layer.row_bytes * (where.ep - 1) / where.ep
        exchange = rates.link_latency + payload / rates.link_bytes
    return LayerSeconds(attention=maps(layer.attention_flops) + core, router=maps(layer.router_flops),
                        shared=maps(layer.shared_flops), experts=maps(layer.expert_flops), dispatch=exchange, combine=exchange)


class HiddenTime:
    """Predicted exposed time of a model, for any connectivity of each of its layers.

    Args:
        layers: their structure, in order.
        where: tokens, ranks and rates.
        choices: connectivities to choose from; ``share`` is relative to the one that hides most in all layers.
        refused: {(layer, name)}: what cannot be applied; such a layer stays as it is.
    """

    def __init__(self, layers: Sequence[LayerStructure], where: Deployment | None = None, *,
                 choices: Sequence[str] = CHOICES, refused: Sequence[tuple[int, str]] = ()) -> None:
        self.layers, self.where, self.choices = tuple(layers), where or Deployment(), tuple(choices)
        self.refused = frozenset(refused)
        self.seconds = [seconds_of(layer, self.where) for layer in self.layers]
        self._stand_ins = [types.SimpleNamespace(
            index=i, mlp=types.SimpleNamespace(kind=layer.kind, shared=layer.shared), attention=None)
            for i, layer in enumerate(self.layers)]
        self._asked: dict[tuple[int, str], Reads] = {}
        numbers: dict[tuple, int] = {}      # layers that are alike have one number, and windows of them are simulated once
        self._alike = [numbers.setdefault((seconds, layer.kind, layer.stream, layer.has_attention), len(numbers))
                       for seconds, layer in zip(self.seconds, self.layers)]
        self._segments: dict[tuple, float] = {}

    def __len__(self) -> int:
        return len(self.layers)

    # --- reads -----------------------------------------------------------------------------------------------------------

    def asked(self, layer: int, name: str) -> Reads:
        """What ``layer`` may not see with connectivity ``name`` if all layers are converted."""
        if name == "none":
            return Reads()
        if (layer, name) not in self._asked:
            stream = self.layers[layer].stream
            earlier = [one for i, one in enumerate(self._stand_ins[:layer]) if self.layers[i].stream == stream]
            self._asked[layer, name] = ask(name, self._stand_ins[layer], earlier)
        return self._asked[layer, name]

    def reads(self, layer: int, names: Sequence[str], first: int = 0) -> Reads:
        """The same where layer ``first`` + i has ``names[i]``: contributions of layers with "none" are never missing.

        Layers before ``first`` count as converted.
        """
        return self.asked(layer, names[layer - first]).only(
            lambda m: (m.layer < first or names[m.layer - first] != "none")
            and (m.block == "mlp" or self.layers[m.layer].has_attention))

    @cached_property
    def reach(self) -> int:
        """How many layers back a read differs from the model's, at most."""
        return max((i - m.layer for i in range(len(self)) for name in self.choices if (i, name) not in self.refused
                    for side in self.asked(i, name).sides for m in side or ()), default=0)

    # --- time ------------------------------------------------------------------------------------------------------------

    def exposed(self, names: Sequence[str]) -> float:
        """Seconds of one forward in which the compute lane has nothing to run. ``names``: one for each layer."""
        return self.segment(0, tuple(names))

    def hidden(self, names: Sequence[str]) -> float:
        """How much less is exposed than in the original."""
        return self.exposed_by_none - self.exposed(names)

    def share(self, names: Sequence[str]) -> float:
        """``hidden``, of what the best of ``choices`` in all layers hides."""
        return self.hidden(names) / self.most

    def uniform(self, name: str) -> tuple[str, ...]:
        """``name`` in every layer that does not refuse it."""
        return tuple("none" if (i, name) in self.refused else name for i in range(len(self)))

    @cached_property
    def exposed_by_none(self) -> float:
        return self.exposed(("none",) * len(self))

    @cached_property
    def most(self) -> float:
        """Seconds that the best uniform choice hides.

        Raises:
            ConfigError: there is nothing to hide.
        """
        best = max((self.hidden(self.uniform(name)) for name in self.choices), default=0.0)
        if not best > 0:
            raise ConfigError(f"none of {', '.join(self.choices)} hides communication in this model (exposed as it is: "
                              f"{self.exposed_by_none:.2e} s a forward), so there is nothing to choose by: see ep, tokens and "
                              "rates of deployment, and the layers that are refused")
        return best

    def segment(self, first: int, names: tuple[str, ...]) -> float:
        """The same of the layers ``first``, ``first`` + 1, ... with ``names``, as if they were the model."""
        reads = [self.reads(first + i, names, first) for i in range(len(names))]
        key = tuple((self._alike[first + i], *(side and tuple((m.layer - first, m.block, m.part) for m in side)
                                               for side in one.sides)) for i, one in enumerate(reads))
        if key not in self._segments:
            problem = self._problem(first, reads)
            priority = tails(problem)
            self._segments[key] = min(run(problem, list_schedule(problem, priority, patience=patience, fill=True)).idle
                                      for patience in _PATIENCE)
        return self._segments[key]

    def _problem(self, first: int, reads: Sequence[Reads]) -> Problem:
        tasks = Tasks()
        for i, one in enumerate(reads, first):
            tasks.layer(i, self.layers[i], self.seconds[i], one)
        return tasks.problem(**self.where.rates.lanes)


class Tasks:
    """Items of a chain of layers, for ``simulate``."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.role: list[int] = []
        self.link: list[int] = []
        self.before: list[list[int]] = []
        self.links: list[float] = []
        self._launch: list[int] = []                    # the last one
        self._added: dict[tuple[int, str, str], int] = {}       # (layer, block, part) -> the item that ends it
        self._stream: dict[int, list[int]] = {}         # the layers of each stream so far
        self._states: dict[int, list[int]] = {}         # behind layer i all that was added before is needed

    def layer(self, i: int, what: LayerStructure, seconds: LayerSeconds, reads: Reads) -> None:
        earlier = self._stream.setdefault(what.stream, [])
        before = self._state(i, earlier, reads.attention)
        for _ in range(_PARTS if what.has_attention else 0):
            before = [self._item(seconds.attention / _PARTS, before)]
        if what.has_attention:
            self._added[i, "attention", "all"] = before[0]
        read = self._read(i, earlier, reads.mlp)
        self._added[i, "mlp", "shared"] = self._item(
            seconds.shared, read if reads.shared is None else self._read(i, earlier, reads.shared))
        if what.kind == "moe":
            arrived = self._exchange(self._item(seconds.router, read), seconds.dispatch)
            self._added[i, "mlp", "routed"] = self._exchange(self._item(seconds.experts, [arrived]), seconds.combine)
        everything = [self._added[part] for part in _parts(i) if part in self._added]
        self._states[i] = [self._item(0.0, [*everything, *(self._states[earlier[-1]] if earlier else ())])]
        earlier.append(i)

    def _read(self, i: int, earlier: list[int], missing: tuple[Missing, ...]) -> list[int]:
        """What the read of an MLP or MoE needs."""
        own = [] if any(m.layer == i for m in missing) else [self._added[part] for part in _parts(i)[:1] if part in self._added]
        return [*self._state(i, earlier, missing), *own]

    def _state(self, i: int, earlier: list[int], missing: tuple[Missing, ...]) -> list[int]:
        """What a read of the stream in front of layer ``i`` needs."""
        gone = {(m.layer, m.block, m.part) for m in missing}
        since = min((m.layer for m in missing if m.layer < i), default=i)
        whole = [k for k in earlier if k < since]
        needed = list(self._states[whole[-1]]) if whole else []
        for k in earlier[len(whole):]:
            needed += [self._added[part] for part in _parts(k) if part in self._added and part not in gone
                       and not (part[1] == "mlp" and (k, "mlp", "all") in gone)]
        return needed

    def _item(self, seconds: float, before: list[int], role: int = COMPUTE, link: int = -1) -> int:
        self.seconds.append(seconds)
        self.role.append(role)
        self.link.append(link)
        self.before.append(list(dict.fromkeys(before)))
        return len(self.seconds) - 1

    def _exchange(self, source: int, seconds: float) -> int:
        """The wait that ends an exchange of what ``source`` computes; launches keep their order."""
        number = len(self.links)
        self.links.append(seconds)
        self._launch = [self._item(0.0, [source, *self._launch], LAUNCH, number)]
        return self._item(0.0, self._launch, WAIT, number)

    def problem(self, **lanes: float) -> Problem:
        """``lanes``: see ``Rates.lanes``."""
        return Problem(seconds=self.seconds, role=self.role, link=self.link, before=self.before, link_seconds=self.links,
                       link_group=[0] * len(self.links), **lanes)


def _parts(layer: int) -> tuple[tuple[int, str, str], ...]:
    return (layer, "attention", "all"), (layer, "mlp", "shared"), (layer, "mlp", "routed")
