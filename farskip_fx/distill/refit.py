"""``refit``: repair the projections of a model for another connectivity, in closed form, before any training.

After a conversion some projections read another stream than the one they were trained on. Block by block, on the student's
own inputs (what lies before is refitted already), a weight W becomes

    W' = argmin |X_student W'^T - X_teacher W^T|^2 + lambda |W' - W|^2          (matched)

and the projections that end a block become

    W' = argmin w |U(s_student, X_student W'^T) - s_teacher|^2 / |s_teacher|^2 + lambda |W' - W|^2     (aimed)

where s are the values of the residual stream, U adds the block's output to it, and w says how much a token matters there
(``importance``): so each block also takes back what the blocks before it left wrong. No parameter is added, and nothing changes
at run time. The idea of closed-form repair is known for removed layers (ReplaceMe, arXiv 2505.02819); for connectivity it is
ours.

Steps, for each update of the stream
  1. Find the projections of its blocks (``projections``), by level.
  2. For each level: run every batch through teacher and student up to there, add up products of columns (``gram``), solve.
     The teacher's experts see the tokens that the *student* routes to them.
  3. Carry both streams over to the next update, with the new weights, and write them into the model.

Memory: the stream's live values of every batch (twice), the activations of one block on one batch, and at most
``gram_bytes`` of sums. Time: about two forward passes over the batches for each level of a block, so four to eight in all.
"""
from __future__ import annotations

import time
from collections import ChainMap
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.fx import Node

from ..config import FarskipConfig
from ..errors import ConfigError
from ..passes.dataflow import storages_of, written_arguments
from ..passes.residual import Update
from ..passes.sums import is_float
from ..sharding import is_part
from .gram import Gram, Missed
from .head import in_eval_mode
from .importance import logits_of, token_weights
from .pair import Pair, trace_pair
from .program import Program, Values
from .projections import Left, Projection, find_projections
from .side import Side, stages_of


@dataclass(frozen=True, kw_only=True)
class Refitted:
    """One parameter: what its outputs missed, as a share of their target's size (root of sums of squares)."""
    parameter: str
    kind: str                # "matched" or "aimed"
    before: float
    after: float
    rows: int                # tokens, or tokens at all experts together


@dataclass(frozen=True, kw_only=True)
class LayerRefit:
    """One block of the stream."""
    label: str
    refitted: tuple[Refitted, ...]
    left: tuple[Left, ...]


@dataclass(frozen=True, kw_only=True)
class RefitReport:
    connectivity: str
    layers: tuple[LayerRefit, ...]
    tokens: int
    seconds: float

    @property
    def refitted(self) -> tuple[Refitted, ...]:
        return tuple(one for layer in self.layers for one in layer.refitted)

    @property
    def left(self) -> tuple[Left, ...]:
        return tuple(one for layer in self.layers for one in layer.left)

    def __str__(self) -> str:
        lines = [f"refit for connectivity {self.connectivity}: {len(self.refitted)} parameters of "
                 f"{len(self.layers)} blocks, {self.tokens} tokens, {self.seconds:.1f} s"]
        for layer in self.layers:
            lines.append(f"  {layer.label}")
            lines += [f"    {one.parameter:60s} {one.kind:8s} missed {one.before:7.2%} -> {one.after:7.2%}"
                      for one in layer.refitted]
            lines += [f"    {one.parameter:60s} left: {one.reason}" for one in layer.left]
        return "\n".join(lines)


@torch.no_grad()
def refit(model: nn.Module, batches: Iterable, connectivity="farskip", layers="all", *, ridge: float = 1e-3,
          aim_outputs: bool = True, importance: bool = True, head: bool = True, progress: bool = True,
          group: dist.ProcessGroup | None = None, gram_bytes: int = 2 << 30,
          config: FarskipConfig | None = None) -> RefitReport:
    """Refit ``model`` in place for a connectivity; then convert it: ``farskip_fx.apply(model, connectivity=...)``.

    Args:
        model: not converted. A teacher for distillation must be a copy that was made before.
        batches: calibration text: token ids [batch, sequence], or dicts of what the model is called with, all of one shape
            and without padding. A few hundred tokens for each input of the widest projection; an expert that gets fewer
            tokens than it has inputs stays as it is.
        connectivity, layers: as in ``FarskipConfig``; or a ``config``.
        ridge: lambda, as a share of the mean square of the inputs.
        aim_outputs: the projections that end a block are aimed at the teacher's stream; False: they stay as they are.
        importance: there, tokens count by how much the teacher's predictions depend on them; False: all alike. One backward.
        head: the language-model head is matched, too, where it is a weight of its own.
        progress: show a bar.
        group: ranks that each hold other batches (equally many) of the same, whole model; sums are added up over them.
        gram_bytes: how much memory the sums may take; more experts than that are solved for in several passes.

    Raises:
        ConfigError: a converted or sharded model, batches that do not fit.
        RefusedError, SplitModelError: names the layer and why the connectivity cannot be applied.

    An error in the middle leaves the earlier blocks refitted.
    """
    if not ridge > 0:
        raise ConfigError(f"ridge must be above 0, got {ridge!r}")
    if any(map(is_part, model.parameters())):
        raise ConfigError("this model is sharded (expert_parallel, or data_parallel with shard=True), and a refit needs whole "
                          "parameters: refit before that, or farskip_fx.gather_experts(model) first")
    config = FarskipConfig(connectivity=connectivity, layers=layers) if config is None else config
    began = time.perf_counter()
    pair = trace_pair(model, batches, config)
    names = {id(p): name for name, p in reversed(list(model.named_parameters(remove_duplicate=False)))}
    with in_eval_mode(model):
        run = _Refit(pair, names, ridge=ridge, aim_outputs=aim_outputs, importance=importance, head=head, group=group,
                     gram_bytes=gram_bytes)
        done = run.all(progress)
    tokens = sum(max((v.shape[:2].numel() for v in call.values() if isinstance(v, Tensor)), default=0)
                 for call in pair.calls)
    return RefitReport(connectivity=str(config.connectivity), layers=done, tokens=tokens,
                       seconds=time.perf_counter() - began)


class _Refit:
    def __init__(self, pair: Pair, names: dict[int, str], *, ridge: float, aim_outputs: bool, importance: bool, head: bool,
                 group, gram_bytes: int) -> None:
        self.pair, self.names, self.ridge, self.aim, self.head = pair, names, ridge, aim_outputs, head
        self.group, self.gram_bytes = group, gram_bytes
        given = {**{node: p.detach() for node, p in pair.parameters.items()}, **pair.fixed}
        twin, states = pair.twin, [s.states[0] for s in pair.blocks.streams]
        self.teacher = Side(pair.teacher, states, dict(given), [dict(call) for call in pair.calls])
        self.student = Side(pair.student, [twin[s] for s in states], {twin[n]: v for n, v in given.items()},
                             [{twin[n]: v for n, v in call.items()} for call in pair.calls])
        self.weigh = importance and aim_outputs
        self.weights: list[dict[Node, Tensor]] = []     # of tokens, for each batch, by the last node of a stage
        self.changed = False        # whether the student's stream is another one by now

    def all(self, progress: bool) -> tuple[LayerRefit, ...]:
        twin, done = self.pair.twin, []
        stages = stages_of(self.pair.blocks)
        self.teacher.program.set_stages([(end, members) for end, members, _, _ in stages])
        self.student.program.set_stages([(twin[end], {twin[n] for n in members}) for end, members, _, _ in stages])
        logits = logits_of(self.teacher.program, stages[-1][0]) if self.weigh else None
        if logits is not None:
            try:
                self.weights = [token_weights(self.teacher, stages, logits, i) for i in range(len(self.teacher.batches))]
            except RuntimeError as error:
                raise ConfigError("tokens are weighed by a gradient, and this model has none here: "
                                  f"{error}. Pass importance=False") from error
        columns = (TextColumn("refit"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"),
                   TimeRemainingColumn())
        with Progress(*columns, disable=not progress, transient=True) as bar:
            task = bar.add_task("", total=len(stages))
            for stage, (end, _, update, blocks) in enumerate(stages):
                label = next((b.label for b in reversed(blocks) if b.label), end.name)
                bar.update(task, description=label)
                found = self._stage(stage, end, update, blocks, label)
                done += [found] if found is not None else []
                bar.advance(task)
            if self.head and self.changed:
                found = self._solve(None, [], "head", [], branch=_head(self.pair))
                self._commit()
                done += [found] if found.refitted or found.left else []
        return tuple(done)

    # --- one stage: what leads to a stream, or one update of it -----------------------------------------------------

    def _stage(self, stage: int, end: Node, update: Update | None, blocks, label: str) -> LayerRefit | None:
        teacher, student, twin = self.teacher, self.student, self.pair.twin
        every, count = update is None, range(len(teacher.batches))
        ahead = [teacher.ahead(i, stage, end, every=every) for i in count]
        result = None
        if update is not None:
            self.changed |= any(c.node in self.pair.hidden for c in update.contributions)
            if self.changed:
                result = self._solve(update, blocks, label, [values[end] for values in ahead])
        after = [student.ahead(i, stage, twin[end], every=every) for i in count]
        teacher.live, student.live = ahead, after
        if result is not None:
            self._commit()
        return result

    def _commit(self) -> None:
        """The stage is done, and the teacher never comes back to it: write what is new into the model."""
        for node, changed in self.fresh.items():
            self.pair.parameters[node].copy_(changed)
            self.student.given[self.pair.twin[node]] = self.pair.parameters[node].detach()

    def _solve(self, update: Update | None, blocks, label: str, targets: list[Tensor], branch: int = 0) -> LayerRefit:
        routers = routed = 0
        for contribution in update.contributions if update is not None else ():
            branch |= contribution.branch
        for block in blocks:
            routers, routed = routers | block.routers, routed | block.routed
        program = self.teacher.program
        self.imposed = _imposed(program, branch, routers, self.pair.blocks.streams)
        found, unknown = find_projections(program, branch, update.after if update is not None else None)
        left = [Left(parameter=self._name(node), reason=why) for node, why in unknown]
        self.fresh: Values = {}
        refitted: dict[Node, list] = {}
        found = [one for one in found if self._takes(one, left)]
        for level in sorted({one.level for one in found}):
            here = [one for one in found if one.level == level]
            aimed = [one for one in here if one.final and self.aim]
            matched = [one for one in here if not one.final]
            experts = [one for one in aimed if routed >> program.position[one.node] & 1]
            jobs = [(False, matched)] + [(True, [one]) for one in aimed if one not in experts]
            jobs.append((True, experts))
            for aims, ones in jobs:
                for part in self._parts(ones):
                    self._pass(part, update and update.after, targets if aims else None, refitted, left)
        report = [Refitted(parameter=self._name(node), kind=kind, rows=rows, before=_root(before, size),
                           after=_root(after, size)) for node, (kind, rows, before, after, size) in refitted.items()]
        return LayerRefit(label=label, refitted=tuple(report), left=tuple(left))

    def _takes(self, one: Projection, left: list[Left]) -> bool:
        parameter = self.pair.parameters.get(one.parameter)
        why = None
        if parameter is None:
            why = "it is no parameter of the model"
        elif sum(p.untyped_storage()._cdata == parameter.untyped_storage()._cdata
                 for p in self.pair.parameters.values()) > 1:
            why = "it shares its memory with another parameter"
        elif one.matrix(parameter.detach()).untyped_storage()._cdata != parameter.untyped_storage()._cdata:
            why = "its weight is no view of the parameter"
        if why is not None:
            left.append(Left(parameter=self._name(one.parameter), reason=why))
        return why is None

    def _name(self, node: Node) -> str:
        parameter = self.pair.parameters.get(node)
        return self.names.get(id(parameter), node.name)

    def _parts(self, ones: list[Projection]) -> list[list[tuple[Projection, range]]]:
        """Projections and ranges of their experts, in parts whose sums fit into memory."""
        parts, size = [[]] if ones else [], 0
        for one in ones:
            shape = one.matrix(self.pair.parameters[one.parameter].detach()).shape
            experts = shape[0] if len(shape) == 3 else 1
            each = 8 * shape[-2] * (shape[-2] + shape[-1])
            first = 0
            while first < experts:
                count = min(experts - first, max(1, (self.gram_bytes - size) // each))
                if size and each > self.gram_bytes - size:
                    parts.append([])
                    size = 0
                    continue
                parts[-1].append((one, range(first, first + count)))
                size += count * each
                first += count
        return parts

    # --- one pass over the batches --------------------------------------------------------------------------------

    def _pass(self, part: list[tuple[Projection, range]], after: Node, targets: list[Tensor] | None, refitted: dict,
              left: list[Left]) -> None:
        grams: dict[tuple, Gram] = {}
        missed: dict[tuple[Projection, int], Missed] = {}
        for batch in range(len(self.teacher.batches)):
            rows = self._matched(part, batch) if targets is None else self._aimed(part, batch, after, targets[batch])
            for one, expert, x, r, target in rows:
                sums = missed.get((one, expert))
                if sums is None:        # equal inputs have one sum; those of aimed projections have weights of their own
                    key = (one.data if targets is None else one.node, one.offsets, expert)
                    first = key not in grams
                    gram = grams.setdefault(key, Gram(x.shape[1], x.device))
                    sums = missed[one, expert] = Missed(gram, r.shape[1], first=first)
                sums.add(x, r, target)
        if self.group is not None:
            self._reduce(grams, missed)
        for (one, expert), sums in missed.items():
            self._write(one, expert, sums, "matched" if targets is None else "aimed", refitted, left)

    def _write(self, one: Projection, expert: int, sums: Missed, kind: str, refitted: dict, left: list[Left]) -> None:
        parameter = self.pair.parameters[one.parameter]
        weight = one.matrix(self._fresh(one.parameter))
        weight = weight[expert] if weight.dim() == 3 else weight
        if sums.gram.rows < weight.shape[0]:
            name = self._name(one.parameter) + (f"[{expert}]" if parameter.dim() == 3 else "")
            left.append(Left(parameter=name, reason=f"only {sums.gram.rows} rows for {weight.shape[0]} inputs"))
            return
        if not sums.squares[0]:     # it reads what the teacher reads
            return
        change, after = sums.solve(self.ridge)
        weight += change.to(weight.dtype)
        entry = refitted.setdefault(one.parameter, [kind, 0, 0.0, 0.0, 0.0])
        before, size = sums.squares.tolist()
        for i, value in enumerate((sums.gram.rows, before, after, size), 1):
            entry[i] += value

    def _fresh(self, node: Node) -> Tensor:
        """The student's own copy of a parameter that is being changed; the teacher still needs the original."""
        if node not in self.fresh:
            self.fresh[node] = self.pair.parameters[node].detach().clone()
            self.student.given[self.pair.twin[node]] = self.fresh[node]
        return self.fresh[node]

    def _current(self, one: Projection) -> tuple[Tensor, Tensor]:
        """(the original weight, the weight now), as float32 [in, out] or [experts, in, out]."""
        original = self.pair.parameters[one.parameter].detach()
        now = self.fresh.get(one.parameter, original)
        return tuple(one.matrix(w) for w in (original, now))

    def _matched(self, part, batch: int):
        """(projection, expert, x, r, target): r is what the student's output lacks of the teacher's."""
        twin, teacher, student = self.pair.twin, self.teacher, self.student
        data = list(dict.fromkeys(one.data for one, _ in part))
        read = {one: _read(twin[one.node], one) for one, _ in part}
        needed = teacher.program.needs(data, ChainMap(self.imposed, teacher.known(batch)))
        boundary = [n for n in needed if n in self.imposed]
        offsets = [one.offsets for one, _ in part if one.offsets is not None]
        wanted = [*read.values(), *(twin[n] for n in (*boundary, *offsets))]
        own = student.program.evaluate(wanted, student.known(batch))
        forced = {n: own[twin[n]] for n in boundary}
        theirs = teacher.program.evaluate(data, teacher.known(batch, forced))
        for one, experts in part:
            ends = own[twin[one.offsets]] if one.offsets is not None else None
            original, now = self._current(one)
            for (expert, x), (_, t) in zip(one.rows(own[read[one]], ends), one.rows(theirs[one.data], ends)):
                if expert not in experts or not x.shape[0]:
                    continue
                old, new = ((w[expert] if w.dim() == 3 else w).float() for w in (original, now))
                x, target = x.float(), t.float() @ old
                yield one, expert, x, target - x @ new, target

    def _aimed(self, part, batch: int, after: Node, target: Tensor):
        """The same for outputs that are aimed at the stream: r is the change of the output that would close the gap.

        A token's gap is shared among its experts by their squared weights, which is the smallest change that closes it; and
        it counts relative to the size of the stream there, because every block reads the stream through a norm, and by how
        much the token matters.
        """
        twin, student = self.pair.twin, self.student
        program, known = student.program, student.known(batch)
        ends_of = [twin[one.offsets] for one, _ in part if one.offsets is not None]
        ones = list(dict.fromkeys(one for one, _ in part))
        outs, end = [twin[one.node] for one in ones], twin[after]
        beside = _beside(program, outs, end)
        own = program.evaluate([_read(n, one) for n, one in zip(outs, ones)] + outs + ends_of + beside, known)

        def stream(*values: Tensor) -> Tensor:
            given = {**{n: own[n] for n in beside}, **dict(zip(outs, values))}
            return program.evaluate([end], ChainMap(given, known))[end]

        with torch.enable_grad():
            leaves = [own[n].detach().requires_grad_() for n in outs]
            now = stream(*leaves)
            back = lambda v: torch.autograd.grad(now, leaves, v, retain_graph=True)       # noqa: E731
            share = back(torch.ones_like(now))
            zero = stream(*(torch.zeros_like(leaf) for leaf in leaves)).detach()
            strength = (stream(*share).detach() - zero).float()     # sum of squared weights at each token
            gap = target.float() - now.detach().float()
            size = target.float().square().mean(-1, keepdim=True).clamp_min(1e-12).rsqrt()
            if self.weights and after in self.weights[batch]:
                size = size * self.weights[batch][after].sqrt()
            weights = back(size.expand_as(target).to(now.dtype))
            wanted = back(torch.where(strength > 1e-9, gap / strength.clamp_min(1e-9), 0.0).to(now.dtype))
        for one, experts in part:
            i = ones.index(one)
            ends = own[twin[one.offsets]] if one.offsets is not None else None
            pieces = zip(*(one.rows(v, ends) for v in (own[_read(outs[i], one)], wanted[i], weights[i], own[outs[i]])))
            for (expert, x), (_, r), (_, g), (_, out) in pieces:
                if expert in experts and x.shape[0]:
                    g = g.float().mean(-1, keepdim=True)
                    x, r, out = x.float(), r.float(), out.float()
                    yield one, expert, x * g, r * g, (out + r) * g

    def _reduce(self, grams, missed) -> None:
        for sums in (*grams.values(), *missed.values()):
            sums.all_reduce(self.group)


def _head(pair: Pair) -> int:
    """Bit set of what follows the last states: the final norm, and the head where the model has one."""
    flow = pair.teacher.flow
    covered, last = 0, 0
    for stream in pair.blocks.streams:
        covered, last = covered | stream.covered, last | flow.bit(stream.states[-1])
    above = flow.ancestors(flow.nodes[-1]) & ~covered
    return flow.descendants(last, above)


def _root(squares: float, size: float) -> float:
    return (squares / size) ** 0.5 if size > 0 else 0.0


def _read(node: Node, one: Projection) -> Node:
    """What the twin of a projection multiplies: a copy of the teacher's node where the rewiring had to make one."""
    return node.args[one.node.args.index(one.data)]


def _imposed(program: Program, branch: int, routers: int, streams) -> dict[Node, None]:
    """What the teacher takes from the student, so that both have the same rows: what the router alone decides, and indices.

    Everything that is made of the router's outputs and of nothing else that the block reads.
    """
    flow = program.flow
    first = flow.mask(s.states[0] for s in streams)
    carriers: set[Node] = set()
    imposed: dict[Node, None] = {}
    for node in flow.members(branch):
        bit = flow.bit(node)
        if not bit & routers and any(
                a in carriers if flow.bit(a) & branch else bool((flow.ancestors(a) | flow.bit(a)) & first)
                for a in program.inputs(node)):
            carriers.add(node)
        value = node.meta.get("example_value")
        whole = isinstance(value, (int, torch.SymInt)) or isinstance(value, Tensor) and not is_float(value)
        if whole or node not in carriers and (bit | flow.ancestors(node)) & routers:
            imposed[node] = None
    return imposed


def _beside(program: Program, outs: list[Node], end: Node) -> list[Node]:
    """What else than ``outs`` the way from them to ``end`` takes in, apart from memory that is written on the way."""
    flow = program.flow
    way = flow.descendants(flow.mask(outs), flow.ancestors(end) | flow.bit(end)) & ~flow.mask(outs)
    members = flow.members(way)
    written = {memory for n in members for argument in written_arguments(n) for memory in storages_of(argument)}
    return list(dict.fromkeys(
        a for n in members for a in program.inputs(n) if not flow.bit(a) & way and a not in outs and a.op != "placeholder"
        and not any(storages_of(b) & written for b in (a, *written_arguments(a)))))
