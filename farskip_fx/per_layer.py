"""A connectivity for each layer: ``{"0-3": "none", "4-": "farskip", "12": "attn_only"}``.

Terms
  key    "7" (one layer), "0-3" (from 0 to 3, both included) or "4-" (from 4 to the last layer)
  runs   what the keys say, in one normal form: (first, last or None, name), in order, without overlaps, neighbours of
         one name joined, "none" left out. Two choices that mean the same have equal runs, however they are spelled.

Rules: a single index wins over a range; two ranges that overlap are an error; a layer that no key names is "none".
"""
from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field

from .connectivity import CONNECTIVITIES, known_names
from .errors import ConfigError

_KEY = re.compile(r"([0-9]+)(-([0-9]*))?")
_HELP = 'a key is "7" (one layer), "0-3" (from 0 to 3, both included) or "4-" (from 4 to the last layer)'

Runs = tuple[tuple[int, int | None, str], ...]


@dataclass(frozen=True)
class _Span:
    key: str
    first: int
    last: int | None        # None: to the last layer
    single: bool
    name: str

    def covers(self, index: int) -> bool:
        return self.first <= index and (self.last is None or index <= self.last)


@dataclass(frozen=True, repr=False)
class PerLayer(Mapping):
    """The choice as it was given (a read-only mapping with string keys); equal and hashed by what it means."""
    given: tuple[tuple[str, str], ...] = field(compare=False)
    runs: Runs

    @classmethod
    def of(cls, choice: Mapping) -> PerLayer:
        """Read a mapping. Indices may be ints.

        Raises:
            ConfigError: names the key and what is wrong with it.
        """
        if not choice:
            raise ConfigError(f'connectivity={{}} names no layer; {_HELP}, and {{"0-": "farskip"}} is all layers')
        spans = [_span(key, name) for key, name in choice.items()]
        spans.sort(key=lambda s: (s.first, s.single, s.last is None, s.last or 0, s.key))
        for i, one in enumerate(spans):
            for other in spans[i + 1:]:
                if one.single == other.single and (one.covers(other.first) or other.covers(one.first)):
                    raise ConfigError(f"connectivity: keys {one.key!r} ({one.name}) and {other.key!r} ({other.name}) "
                                      "name the same layer; only a single index may lie in a range, and then it wins")
        return cls(given=tuple((s.key, s.name) for s in spans), runs=_runs(spans))

    @property
    def names(self) -> frozenset[str]:
        """The connectivities in use, apart from "none"."""
        return frozenset(name for _, _, name in self.runs)

    def of_layers(self, count: int) -> tuple[str, ...]:
        """The name for each of ``count`` layers.

        Raises:
            ConfigError: a key names a layer that is not there.
        """
        beyond = [key for key, name in self.given
                  if (span := _span(key, name)).first >= count or span.last is not None and span.last >= count]
        if beyond:
            raise ConfigError(f"connectivity names layers {', '.join(map(repr, beyond))}, but the model has {count} "
                              f"decoder layers (0 to {count - 1})")
        return tuple(next((name for first, last, name in self.runs
                           if first <= i and (last is None or i <= last)), "none") for i in range(count))

    def __getitem__(self, key: str) -> str:
        return dict(self.given)[key]

    def __iter__(self) -> Iterator[str]:
        return iter(dict(self.given))

    def __len__(self) -> int:
        return len(self.given)

    def __repr__(self) -> str:
        return repr(dict(self.given))

    def __str__(self) -> str:
        return "per layer (" + ", ".join(f"{key}: {name}" for key, name in self.given) + ")"


def runs_of(name: str, indices: Collection[int] | None) -> Runs:
    """One connectivity for some layers (None: for all), in the normal form."""
    if indices is None:
        return _runs([_Span("0-", 0, None, False, name)])
    return _runs([_Span(str(i), i, i, True, name) for i in indices])


def _span(key, name) -> _Span:
    text = str(key) if isinstance(key, int) and not isinstance(key, bool) else key
    match = _KEY.fullmatch(text) if isinstance(text, str) else None
    if match is None:
        raise ConfigError(f"connectivity: key {key!r} is not understood; {_HELP}; indices count from 0 and are never "
                          "negative")
    if not isinstance(name, str) or name not in CONNECTIVITIES:
        raise ConfigError(f"connectivity, key {text!r}: {known_names(name)}")
    first, is_range, end = int(match[1]), match[2] is not None, match[3]
    last = first if not is_range else int(end) if end else None
    if last is not None and last < first:
        raise ConfigError(f"connectivity: key {text!r} ends before it begins; {_HELP}")
    return _Span(text, first, last, not is_range, name)


def _runs(spans: list[_Span]) -> Runs:
    """Between two neighbouring cuts all layers have the same name; after the last cut only open ranges reach."""
    cuts = sorted({0, *(s.first for s in spans), *(s.last + 1 for s in spans if s.last is not None)})
    runs: list[tuple[int, int | None, str]] = []
    for first, after in zip(cuts, [*cuts[1:], None]):
        covering = [s for s in spans if s.covers(first)]
        name = next((s.name for s in covering if s.single), None) or next((s.name for s in covering), "none")
        if name == "none":
            continue
        last = None if after is None else after - 1
        if runs and runs[-1][2] == name and runs[-1][1] == first - 1:
            runs[-1] = (runs[-1][0], last, name)
        else:
            runs.append((first, last, name))
    return tuple(runs)
