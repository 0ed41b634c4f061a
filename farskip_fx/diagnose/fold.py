"""Layers that repeat: trace a few of many equal decoder layers, and say what all of them do.

Contract: inside ``folded(model)`` the model has only its first layers, and the same objects; afterwards it is as it was.
``unfold`` writes a report of the few out to all. Layers count as equal if their modules, parameter sizes and settings
are, apart from their index.

Terms
  period   the number of layers after which everything repeats: 1, or 2 where sliding and full attention alternate
  steady   what is repeated: the last period but one. The last one keeps what the end of the model is: its exchanges
           have only the final norm and the head to hide behind.
"""
from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch
from torch import nn

from ..agreement import Collective
from ..passes.describe import Found
from ..passes.rewire import Change, LayerReport, Rewired
from ..passes.timeline import Timeline
from ..report import Folded, Report
from .decoder import layers_of, shortened

_PERIODS = 4        # that are traced: what the first does not repeat, two alike, and the last
_INDEX = {"layer_idx", "layer_index", "layer_id", "layer_number"}


@contextmanager
def folded(decoder: nn.Module) -> Iterator[Folded | None]:
    """``decoder`` owns a list of layers; None where there is nothing to fold."""
    how = fold_of([signature(layer) for layer in layers_of(decoder)[1]])
    with nullcontext() if how is None else shortened(decoder, how.traced):
        yield how


def fold_of(signatures: Sequence) -> Folded | None:
    """How many of the first layers stand for all: a part of its own (dense layers, say), then whole periods."""
    count = len(signatures)
    for period in range(1, 9):
        start = next((i for i in range(count - period - 1, -1, -1) if signatures[i] != signatures[i + period]), -1) + 1 \
            if count > period else count
        # Whole periods up to the end, so that the last traced layer is what the last one is.
        traced = start + period * _PERIODS + (count - start) % period
        if traced < count:
            return Folded(layers=count, traced=traced, period=period)
    return None


def signature(layer: nn.Module) -> tuple:
    """Equal for layers that compute the same with other weights."""
    parts = []
    for name, module in layer.named_modules():
        tensors = [(n, tuple(t.shape), t.dtype) for n, t in (*module.named_parameters(recurse=False),
                                                              *module.named_buffers(recurse=False))]
        settings = sorted((k, v) for k, v in vars(module).items()
                          if k not in _INDEX and not k.startswith("_") and isinstance(v, (int, float, str, bool, torch.dtype)))
        parts.append((name, type(module), repr(tensors), repr(settings)))
    return tuple(parts)


# --- from few layers to all --------------------------------------------------------------------------------------

def unfold(report: Report, how: Folded) -> Report:
    """``report`` of the traced layers, written out to all of them."""
    grow = _Grow(how)
    rewired = report.rewired
    if rewired is not None:
        rewired = Rewired(layers=tuple(grow.rows(rewired.layers, "index", grow.layer)),
                          changes=tuple(grow.rows(rewired.changes, "layer", grow.change)),
                          nodes_added=grow.number(rewired.nodes_added, rewired.changes))
    return dataclasses.replace(
        report, folded=how, rewired=rewired, collectives=tuple(grow.collectives(report.collectives)),
        found=tuple(grow.rows(report.found, "layer", grow.found)),
        explained=tuple(dataclasses.replace(phase, before=grow.timeline(phase.before), after=grow.timeline(phase.after),
                                            bound_s=phase.bound_s + grow.more(phase.after)) for phase in report.explained))


class _Grow:
    def __init__(self, how: Folded) -> None:
        self.period, self.times = how.period, (how.layers - how.traced) // how.period
        self.last = how.traced - how.period         # where the last period begins
        self.first = self.last - how.period         # and the one that is repeated

    def rows(self, rows: Sequence, key: str, moved) -> Iterator:
        """The rows of the layers in front, the repetitions, the last period; ``moved(row, by)`` is the row of a layer later."""
        early = [r for r in rows if getattr(r, key) < self.last]
        yield from early
        again = [r for r in early if getattr(r, key) >= self.first]
        for n in range(1, self.times + 1):
            yield from (moved(r, n * self.period) for r in again)
        yield from (moved(r, self.times * self.period) for r in rows if getattr(r, key) >= self.last)

    def collectives(self, calls: Sequence[Collective]) -> list[Collective]:
        """In the order of the model; those of no layer stay where they are."""
        early = [i for i, c in enumerate(calls) if c.layer is not None and c.layer < self.last]
        cut = early[-1] + 1 if early else 0
        again = [c for c in calls[:cut] if c.layer is not None and c.layer >= self.first]
        repeated = [c._replace(layer=c.layer + n * self.period) for n in range(1, self.times + 1) for c in again]
        rest = [c if c.layer is None else c._replace(layer=c.layer + self.times * self.period) for c in calls[cut:]]
        return [*calls[:cut], *repeated, *rest]

    def number(self, whole: int, changes: Sequence[Change]) -> int:
        steady = sum(self.first <= c.layer < self.last for c in changes)
        return whole + round(whole * self.times * steady / max(1, len(changes)))

    def layer(self, row: LayerReport, by: int) -> LayerReport:
        words = {f: _moved(getattr(row, f), row.index, by) for f in
                 ("attention_reads", "mlp_reads", "attention_read_before", "mlp_read_before")}
        return dataclasses.replace(row, index=row.index + by, label=_path(row.label, row.index, by), **words)

    def found(self, row: Found, by: int) -> Found:
        return dataclasses.replace(row, layer=row.layer + by, label=_path(row.label, row.layer, by))

    def change(self, row: Change, by: int) -> Change:
        return dataclasses.replace(row, layer=row.layer + by)

    def more(self, line: Timeline) -> float:
        """Seconds that the repetitions take."""
        return self.times * self._period_s(line)

    def timeline(self, line: Timeline) -> Timeline:
        """Event by event: a repetition is one period later for each that stands between."""
        each, more = self._period_s(line), self.more(line)
        forward = self._forward(line)

        def later(row, n: int):
            """``row`` of a layer ``n`` periods later. Backward, the first layers come last."""
            by = n * self.period
            moved = {"layer": row.layer + by}
            if hasattr(row, "start"):
                return dataclasses.replace(row, **moved, start=row.start + (n if forward else self.times - n) * each)
            return dataclasses.replace(row, **moved, name=f"{row.name}+{n}" if n else row.name,
                                       needed_by=_later(row.needed_by, by), behind=tuple(_later(b, by) for b in row.behind))

        begins, ends = self._steady(line)

        def grown(rows: Sequence) -> list:
            out = []
            for row in rows:
                where = row.layer
                if where is None and hasattr(row, "start"):     # of the stream itself: it belongs where it stands
                    steady = begins <= row.start < ends
                    shifts = [n * each for n in range(self.times + 1)] if steady else [more if row.start >= ends else 0.0]
                    out += [dataclasses.replace(row, start=row.start + shift) for shift in shifts]
                elif where is None:
                    out.append(row)
                elif self.first <= where < self.last:
                    out += [later(row, n) for n in range(self.times + 1)]
                else:
                    out.append(later(row, self.times if where >= self.last else 0))
            return out

        collectives = grown(line.collectives)
        repeated = sum(c.exposed_s for c in line.collectives if c.layer is not None and self.first <= c.layer < self.last)
        return Timeline(seconds=line.seconds + more, exposed_s=line.exposed_s + self.times * repeated,
                        peak_bytes=line.peak_bytes, events=tuple(sorted(grown(line.events), key=lambda e: e.start)),
                        collectives=tuple(collectives))

    def _starts(self, line: Timeline) -> dict[int, float]:
        starts: dict[int, float] = {}
        for event in line.events:
            if event.layer is not None and event.block == "attention" and event.lane == "compute":
                starts.setdefault(event.layer, event.start)
        return starts

    def _forward(self, line: Timeline) -> bool:
        starts = self._starts(line)
        return starts.get(self.first, 0.0) <= starts.get(self.last, 0.0)

    def _period_s(self, line: Timeline) -> float:
        """What one repetition adds. Not the time between two starts: a schedule moves work of one layer far into another."""
        def repeated(row) -> bool:
            return row.layer is not None and self.first <= row.layer < self.last

        own = [e for e in line.events if e.lane == "compute"]
        placed = [e for e in own if e.layer is not None]
        compute = sum(e.seconds for e in placed if repeated(e))
        if placed:      # of the stream itself: as much in every layer
            begin, end = min(e.start for e in placed), max(e.end for e in placed)
            between = sum(e.seconds for e in own if e.layer is None and begin <= e.start < end)
            compute += between * self.period / (self.last + self.period)
        exposed = sum(c.exposed_s for c in line.collectives if repeated(c))
        return max(compute + exposed, sum(c.seconds for c in line.collectives if repeated(c)))

    def _steady(self, line: Timeline) -> tuple[float, float]:
        """From when to when runs what is repeated."""
        starts = self._starts(line)
        one, other = (self.first, self.last) if self._forward(line) else (self.first, self.first - self.period)
        return starts.get(one, 0.0), starts.get(other, starts.get(one, 0.0))


def _later(path: str, by: int) -> str:
    """``layers.3.mlp: mm`` of a layer later; names without a layer stay."""
    return re.sub(r"(?<=\.)\d+(?=[.:])", lambda m: str(int(m[0]) + by), path, count=1)


def _moved(text: str, index: int, by: int) -> str:
    return re.sub(r"layer (\d+)", lambda m: f"layer {int(m[1]) + by}", text)


def _path(label: str, index: int, by: int) -> str:
    return re.sub(rf"(?<![\w]){index}(?![\w])", str(index + by), label, count=1)
