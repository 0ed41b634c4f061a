"""A program that is run stage by stage along its residual stream, on several batches: what a refit and a scan walk over."""
from __future__ import annotations

from collections import ChainMap
from dataclasses import dataclass, field

from torch.fx import Node

from ..passes.detect import Blocks
from ..passes.residual import Update
from .program import Program, Values


@dataclass
class Side:
    """One program and where it stands: the live values of each batch, behind the last stage."""
    program: Program
    states: list[Node]              # the first of each stream
    given: Values                   # weights and other constants, by placeholder
    batches: list[Values]           # the other placeholders of each batch, and what does not depend on the stream
    live: list[Values] = field(default_factory=list)

    def __post_init__(self) -> None:
        flow, changing = self.program.flow, self.program.flow.mask(self.batches[0])
        nodes, kept = self.program.beside(self.states)
        alike = [n for n in kept if not flow.ancestors(n) & changing]
        for i, batch in enumerate(self.batches):
            values = self.program.run_all(nodes, ChainMap(batch, self.given))
            if not i:       # what is equal in every batch (a causal mask) is kept once
                self.given.update({n: values[n] for n in alike})
            batch.update({n: values[n] for n in kept if n not in self.given})
        self.live = [{} for _ in self.batches]

    def known(self, batch: int, *more: Values) -> ChainMap:
        return ChainMap(*more, self.live[batch], self.batches[batch], self.given)

    def ahead(self, batch: int, stage: int, end: Node, *, every: bool = False) -> Values:
        """The live values of one batch behind ``stage``; ``every``: by way of every node of it, in order."""
        program, known = self.program, self.known(batch)
        if every:
            known = ChainMap(program.run_all(program.members(stage), known), known)
        return program.evaluate([*self.changing(batch, stage), end], known)

    def changing(self, batch: int, stage: int) -> list[Node]:
        """The live nodes behind ``stage``, without those whose values are kept beside the stream."""
        return [n for n in self.program.live(stage) if n not in self.given and n not in self.batches[batch]]


def stages_of(blocks: Blocks) -> list[tuple[Node, set[Node], Update | None, list]]:
    """(last node, nodes, update, its blocks), in graph order; the first of each stream is what leads to it."""
    stages = []
    every = [b for layer in blocks.layers for b in layer.blocks]
    for stream in sorted(blocks.streams, key=lambda s: blocks.flow.position[s.states[0]]):
        stages.append((stream.states[0], set(), None, []))
        for index, update in enumerate(stream.updates):
            members = set(stream.flow.members(update.nodes)) - {update.before}
            stages.append((update.after, members, update, [b for b in every if b.stream is stream and b.update == index]))
    return stages
