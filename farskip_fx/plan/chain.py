"""One step of a whole model as a problem for ``passes/simulate.py``: what must wait for what, and how long it takes.

    forward   attention (in parts) -> before -> first exchange -> inner -> second exchange -> after, and side beside them;
              which of them a layer waits for follows from the reads of its connectivity
    backward  the same edges turned round (``Problem.mirror``), with the backward's own seconds; weight gradients of experts
              wait for the first exchange that arrives, and nothing waits for them
    chunks    the same with each MoE's exchanges and experts in two halves, which wait for one another only on the link
    halves    two copies with half of the tokens each, original connectivity, their exchanges in turn: exact overlap of two
              micro-batches. The backward of one is not mixed with the forward of the other, as DualPipe does.

The simulation is the scheduler's own; what it searches for is the longest path first, by several rules, and the best counts.
"""
from __future__ import annotations

import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..connectivity import Reads, ask
from ..distill.exposed import Tasks
from ..passes.simulate import LAUNCH, Problem, list_schedule, run, tails
from .pieces import Piece

_ATTENTION_PARTS = 4
_RULES = [(patience, fill) for patience in (0.0, 0.15, 0.4, float("inf")) for fill in (False, True)]
ExchangeSeconds = Callable[[float, int], float]
"""(bytes of the traced model, launches) -> seconds."""


@dataclass(frozen=True, kw_only=True)
class Times:
    """Of one phase: ``seconds`` in all, of which compute stands still for ``exposed``; ``link`` is busy so long."""
    seconds: float
    exposed: float
    compute: float
    link: float


@dataclass(frozen=True, kw_only=True)
class Step:
    """What one step is made of.

    Args:
        layers: of each graph, see ``Traced.pieces``.
        head: seconds in front of the backward and behind the forward, of each graph; first: embedding and the like.
        chunk: layers with half of the tokens: exchanges and routed experts run as two of these; None: as one.
    """
    layers: Sequence[Sequence[Piece]]
    first: Sequence[float]
    head: Sequence[float]
    exchange: ExchangeSeconds
    chunk: Sequence[Sequence[Piece]] | None = None

    def times(self, reads: Sequence[Reads], *, copies: int = 1, **lanes: float) -> list[Times]:
        """Forward, and backward where there is one. ``copies`` of the step run beside each other; ``lanes``: see ``Rates.lanes``."""
        chain = _Chain(self)
        for i in range(len(self.layers[0])):
            chain.layer_of(i, reads[i])
        chain.end()
        found = [_best(_beside(chain.problem(**lanes), copies))]
        if len(self.layers) > 1:
            found.append(_best(_beside(chain.backward(**lanes), copies).mirror()))
        return found


def reads_of(pieces: Sequence[Piece], connectivity: str) -> list[Reads]:
    """What each layer may not see. All layers are converted."""
    if connectivity == "none":
        return [Reads()] * len(pieces)
    stand_ins = [types.SimpleNamespace(index=i, mlp=types.SimpleNamespace(kind=p.kind, shared=p.side > 0), attention=None)
                 for i, p in enumerate(pieces)]
    return [ask(connectivity, one, stand_ins[:i]) for i, one in enumerate(stand_ins)]


def _best(problem: Problem) -> Times:
    priority = tails(problem)
    found = min((run(problem, list_schedule(problem, priority, patience=patience, fill=fill)) for patience, fill in _RULES),
                key=lambda r: r.end)
    busy = sum(end - start for start, end in zip(found.link_start, found.link_finish))
    return Times(seconds=found.end, exposed=found.idle, compute=sum(problem.seconds), link=busy)


class _Chain(Tasks):
    """Items with the seconds of both phases."""

    def __init__(self, step: Step) -> None:
        super().__init__()
        self.step = step
        self.back: list[float] = []
        self.back_links: list[float] = []
        self._start = self._both(step.first, [])

    def layer_of(self, i: int, reads: Reads) -> None:
        pieces = [graph[i] for graph in self.step.layers]
        earlier = self._stream.setdefault(0, [])

        def item(part: str, before: list[int], share: float = 1.0) -> int:
            return self._both([getattr(p, part) * share for p in pieces], before or [self._start])

        before = self._state(i, earlier, reads.attention)
        for _ in range(_ATTENTION_PARTS):
            before = [item("attention", before, 1 / _ATTENTION_PARTS)]
        self._added[i, "attention", "all"] = before[0]
        read = self._read(i, earlier, reads.mlp)
        self._added[i, "mlp", "shared"] = item("side", read if reads.shared is None else self._read(i, earlier, reads.shared))
        if pieces[0].first_launches:
            one = [graph[i] for graph in self.step.chunk] if self.step.chunk else pieces
            self._added[i, "mlp", "routed"] = self._routed(one, read or [self._start], 2 if self.step.chunk else 1)
        parts = ((i, "attention", "all"), (i, "mlp", "shared"), (i, "mlp", "routed"))
        everything = [self._added[part] for part in parts if part in self._added]
        self._states[i] = [self._both([0.0, 0.0], [*everything, *(self._states[earlier[-1]] if earlier else ())])]
        earlier.append(i)

    def _routed(self, pieces: list[Piece], read: list[int], parts: int) -> int:
        # Turned round, what the forward's second exchange brings back is what the backward's first one sends.
        names = (("before", "inner", "after"), ("after", "inner", "before"))
        ready, done, home = ([getattr(p, name[k]) for p, name in zip(pieces, names)] for k in range(3))
        # Launches run in the order in which they are made: all that go first.
        arrived = [self._travel(self._both(ready, read), pieces, ("first", "second")) for _ in range(parts)]
        back = []
        for one in arrived:
            free = self._both([0.0, *(p.weights for p in pieces[1:])], [])
            back.append(self._travel(self._both(done, [one]), pieces, ("second", "first"), free))
        return self._both([0.0, 0.0], [self._both(home, [one]) for one in back])

    def end(self) -> None:
        self._both(self.step.head, self._states[self._stream[0][-1]])

    def _both(self, seconds: Sequence[float], before: list[int]) -> int:
        self.back.append(seconds[1] if len(seconds) > 1 else 0.0)
        return self._item(seconds[0], before)

    def _travel(self, source: int, pieces: Sequence[Piece], which: tuple[str, str], *more: int) -> int:
        parts = 2 if self.step.chunk else 1
        took = [self.step.exchange(getattr(p, name) / parts, getattr(p, f"{name}_launches")) for p, name in zip(pieces, which)]
        self.back_links.append(took[1] if len(took) > 1 else 0.0)
        wait = self._exchange(source, took[0])
        self.before[self._launch[0]] += more
        self.back += [0.0, 0.0]         # the launch and the wait
        return wait

    def backward(self, **lanes: float) -> Problem:
        """Still in the forward's direction."""
        forward = self.problem(**lanes)
        return Problem(seconds=self.back, role=forward.role, link=forward.link, before=forward.before,
                       link_seconds=self.back_links, link_group=forward.link_group, **lanes)


def _beside(p: Problem, copies: int) -> Problem:
    """``copies`` of a problem on one compute stream and one link; their launches take turns."""
    if copies == 1:
        return p
    count, items = len(p.link_seconds), len(p.seconds)
    launches = sorted((p.link[i], i) for i in range(items) if p.role[i] == LAUNCH)
    before = [[b + c * items for b in sources] for c in range(copies) for sources in p.before]
    in_turn = [i + c * items for _, i in launches for c in range(copies)]
    for one, other in zip(in_turn, in_turn[1:]):
        before[other] = sorted({*before[other], one})
    return Problem(
        seconds=p.seconds * copies, role=p.role * copies, before=before,
        link=[l * copies + c if l >= 0 else -1 for c in range(copies) for l in p.link],
        link_seconds=[s for s in p.link_seconds for _ in range(copies)], link_group=[0] * (count * copies),
        share=p.share, queued=p.queued)
