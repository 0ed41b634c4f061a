"""FarskipConfig: the options of one conversion, frozen and versioned, with a JSON round trip."""
from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from .connectivity import CONNECTIVITIES, known_names
from .data_parallel import DataParallel
from .errors import ConfigError
from .passes.costs import Rates
from .payload import PAYLOADS
from .per_layer import PerLayer, Runs, runs_of

# Of the fields. A release that does not know a value of one (a connectivity for each layer, a registered name) refuses
# it, so a new kind of value needs no new version; a field that it would ignore, or read as something else, does.
VERSION = 1
_COSTS = ("analytic", "profiled")
_INNER = ("inductor", "aot_eager", "eager")
_PAYLOADS = ("payload", "backward_payload")


@dataclass(frozen=True, kw_only=True)
class FarskipConfig:
    """Options of a conversion.

    Args:
        connectivity: a name in ``farskip_fx.connectivity.CONNECTIVITIES`` (your own ones too, see
            ``register_connectivity``), or a name for each layer: ``{"0-3": "none", "4-": "farskip", "12":
            "attn_only"}``, where a single index wins over a range and a layer that no key names is "none". Kept as a
            ``PerLayer``.
        layers: ``"all"``, decoder layer indices (list, tuple or range), or ``"last:SHARE"``: the last SHARE (0 to 1)
            of the layers, rounded to whole layers. With a connectivity for each layer only ``"all"``.
        overlap: reorder collectives so that they run behind compute, and hold that order in Inductor.
        costs: ``"analytic"``: costs from formulas and ``rates``; ``"profiled"``: from ``rates`` that were measured, which
            ``apply`` does (``farskip_fx.calibrate``) where none are given.
        inner: what compiles the rewired graph: ``"inductor"``, ``"aot_eager"`` or ``"eager"``.
        strict: a requested layer that cannot be rewired, or a model split over several graphs, is an error. False:
            such layers stay as they are, with one warning.
        attention_parts: with ``overlap``, fused attention of a rewired layer runs in so many calls over groups of heads,
            so that it can cover two exchanges; 1 leaves it whole. The numbers are the same.
        causal_attention: attention whose mask is causal whatever the inputs runs as causal attention, half the work. What
            transformers does from torch 2.14 on; the numbers are the same but for rounding. False: as traced.
        data_parallel: average gradients inside the compiled backward: what ``farskip_fx.data_parallel(model, group)``
            returns. ``apply`` also takes the group itself (a DeviceMesh or a process group).
        rates: figures of device and link for the schedule; must be equal on all ranks. None: generic ones.
        payload, backward_payload: how rows of an exchange, and their gradients, travel between ranks; see
            ``expert_parallel``, which does it. Kept here because it is part of what a converted model computes.

    Raises:
        ConfigError: a field has a value that it cannot have.
    """
    connectivity: str | PerLayer = "farskip"
    layers: str | tuple[int, ...] = "all"
    overlap: bool = True
    costs: str = "analytic"
    inner: str = "inductor"
    strict: bool = True
    attention_parts: int = 2
    causal_attention: bool = True
    data_parallel: DataParallel | None = None
    rates: Rates | None = None
    payload: str = ""
    backward_payload: str = ""
    version: int = VERSION

    def __post_init__(self) -> None:
        if isinstance(self.connectivity, Mapping):
            object.__setattr__(self, "connectivity", PerLayer.of(self.connectivity))
        elif not isinstance(self.connectivity, str) or self.connectivity not in CONNECTIVITIES:
            raise ConfigError(known_names(self.connectivity))
        _one_of("costs", self.costs, _COSTS)
        _one_of("inner", self.inner, _INNER)
        for name in _PAYLOADS:
            _one_of(name, getattr(self, name), ("", *PAYLOADS))
        for name in ("overlap", "strict", "causal_attention"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name} must be True or False, got {getattr(self, name)!r}")
        if not isinstance(self.attention_parts, int) or self.attention_parts < 1:
            raise ConfigError(f"attention_parts must be 1 or more, got {self.attention_parts!r}")
        if self.costs == "profiled" and self.rates is None:
            raise ConfigError("costs='profiled' needs rates, equal on all ranks, and no compile may measure them: use "
                              "farskip_fx.apply(model, costs='profiled'), or pass rates=farskip_fx.calibrate(group)")
        if self.version != VERSION:
            raise ConfigError(f"version {self.version!r} of the farskip configuration; this release of farskip_fx "
                              f"reads version {VERSION}: install the release that wrote it, or convert again")
        object.__setattr__(self, "layers", _layers(self.layers))
        if isinstance(self.connectivity, PerLayer) and self.layers != "all":
            raise ConfigError(f"layers={self.layers!r} cannot be combined with a connectivity for each layer; write "
                              f"the layers into its keys ({self.connectivity!r}) and leave layers out")
        if isinstance(self.data_parallel, Mapping):
            object.__setattr__(self, "data_parallel", _averaging(self.data_parallel))
        elif self.data_parallel is not None and not isinstance(self.data_parallel, DataParallel):
            raise ConfigError(f"data_parallel is a {type(self.data_parallel).__name__}; process groups cannot be made while a "
                              "model is compiled: pass what farskip_fx.data_parallel(model, group) returns, or use "
                              "farskip_fx.apply(model, data_parallel=group)")
        if isinstance(self.rates, Mapping):
            object.__setattr__(self, "rates", _rates(self.rates))
        elif self.rates is not None and not isinstance(self.rates, Rates):
            raise ConfigError(f"rates must be a dict or a Rates, got {type(self.rates).__name__}")

    @classmethod
    def from_dict(cls, options: Mapping) -> FarskipConfig:
        """Build from ``torch.compile``'s ``options`` or from JSON; unknown keys are an error."""
        refuse_unknown(options, [f.name for f in dataclasses.fields(cls)], "unknown option ", "; known options: ")
        return cls(**options)

    @classmethod
    def from_json(cls, text: str) -> FarskipConfig:
        try:
            data = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"this is no farskip configuration: {error}") from error
        if not isinstance(data, dict):
            raise ConfigError(f"a farskip configuration is a JSON object, got {type(data).__name__}")
        return cls.from_dict(data)

    def to_dict(self) -> dict:
        data = dataclasses.asdict(self)
        data["connectivity"] = dict(self.connectivity) if isinstance(self.connectivity, PerLayer) else self.connectivity
        data["layers"] = self.layers if isinstance(self.layers, str) else list(self.layers)
        data["rates"] = None if self.rates is None else self.rates.to_dict()
        return data

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), sort_keys=True)

    def saved(self) -> dict:
        """What a checkpoint keeps (``config.farskip``): the fields that change numerics."""
        data = self.to_dict()
        kept = ("version", "connectivity", "layers", *(name for name in _PAYLOADS if data[name]))
        return {key: data[key] for key in kept}

    @property
    def names(self) -> frozenset[str]:
        """The connectivities that change something: all in use but "none"."""
        if isinstance(self.connectivity, PerLayer):
            return self.connectivity.names
        return frozenset({self.connectivity} - {"none"})

    def meaning(self) -> tuple[str, Runs, str, str]:
        """What the conversion is, apart from its spelling: equal for two configurations that convert the same layers
        in the same way. ``"last:SHARE"`` stays as it is, because the number of layers is not known here."""
        payload = self.payload, self.backward_payload
        if isinstance(self.connectivity, PerLayer):
            return "", self.connectivity.runs, *payload
        indices, share = (None, self.layers) if isinstance(self.layers, str) else (self.layers, "all")
        return share if self.names and share != "all" else "", runs_of(self.connectivity, indices), *payload

    def of_layers(self, count: int) -> tuple[str, ...]:
        """The connectivity of each of ``count`` decoder layers; "none" for those that are not converted.

        Raises:
            ConfigError: a layer was named that the model does not have.
        """
        if isinstance(self.connectivity, PerLayer):
            return self.connectivity.of_layers(count)
        converted = self.indices(count)
        return tuple(self.connectivity if i in converted else "none" for i in range(count))

    def indices(self, count: int) -> frozenset[int]:
        """Decoder layer indices to convert, of ``count``."""
        if isinstance(self.connectivity, PerLayer):
            return frozenset(i for i, name in enumerate(self.of_layers(count)) if name != "none")
        if self.layers == "all":
            return frozenset(range(count))
        if isinstance(self.layers, str):
            share = float(self.layers.removeprefix("last:"))
            return frozenset(range(count - round(share * count), count))
        outside = [i for i in self.layers if i >= count]
        if outside:
            raise ConfigError(f"layers {outside} requested, but the model has {count} decoder layers "
                              f"(0 to {count - 1})")
        return frozenset(self.layers)


def merge(saved: Mapping | None, options: Mapping) -> dict:
    """``options`` on top of what a checkpoint kept; a connectivity for each layer replaces the checkpoint's layers."""
    merged = {**(saved or {}), **options}
    if isinstance(options.get("connectivity"), Mapping) and "layers" not in options:
        merged.pop("layers", None)
    return merged


def refuse_unknown(given: Mapping, known: Iterable[str], before: str, between: str) -> None:
    """Raise ConfigError for keys that are not ``known``: "BEFORE 'key' BETWEEN a, b, c"."""
    unknown = sorted(set(given) - set(known))
    if unknown:
        raise ConfigError(f"{before}{', '.join(map(repr, unknown))}{between}{', '.join(known)}")


def _one_of(field: str, value, known) -> None:
    if not isinstance(value, str) or value not in known:
        raise ConfigError(f"{field}={value!r} is not known; choose one of {', '.join(known)}")


def _layers(value) -> str | tuple[int, ...]:
    help_text = 'layers must be "all", "last:SHARE" with 0 < SHARE <= 1, or indices such as range(4, 32)'
    if isinstance(value, str):
        if value == "all":
            return value
        share = value.removeprefix("last:")
        try:
            good = value.startswith("last:") and 0 < float(share) <= 1
        except ValueError:
            good = False
        if not good:
            raise ConfigError(f"{help_text}; got {value!r}")
        return value
    try:
        indices = tuple(value)
    except TypeError:
        indices = (None,)
    if not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in indices):
        raise ConfigError(f"{help_text}; got {value!r}")
    return tuple(sorted(set(indices)))


def _averaging(data: Mapping) -> DataParallel:
    try:
        return DataParallel(**data)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"data_parallel: {error}; pass what farskip_fx.data_parallel(model, group) returns") from error


def _rates(data: Mapping) -> Rates:
    refuse_unknown(data, [f.name for f in dataclasses.fields(Rates)], "unknown rate ", "; known rates: ")
    try:
        return Rates(**data)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"rates: {error}; each is a number, see farskip_fx.Rates") from error
