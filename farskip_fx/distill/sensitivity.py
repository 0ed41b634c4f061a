"""How much does a model change when one layer is converted, or one half of it? KL to the original, layer by layer.

    found = sensitivity(model, batches)             # the unconverted model; its weights and forward are left as they are
    found.kl(12, "attn_only")                       # nats a token
    found.save("sensitivity.json")

What is measured
    For layer k and connectivity c: the KL of the original to the model in which only the blocks of layer k read another
    stream, the one that c gives them when the other layers are converted, too. Nothing else changes. So "attn_only" is the
    attention half, "mlp_only" the other half, and "farskip" both. (``apply(model, connectivity={k: "attn_only"})`` would
    change nothing: only contributions of converted layers are ever missing, and layer k - 1 is not one.) KLs of single
    layers do not quite add up; their sum is what ``choose`` goes by.

How
    The model is traced once, and what each block would read is built into the graph beside what it reads now
    (``passes.rewire.build_reads``). A batch goes through the graph stage by stage. At each layer the original's live values
    are where each choice begins: its blocks are computed from the other reads, the rest of the model as it is. Nothing is
    compiled. Time: (layers + 1) / 2 forwards for each choice that changes something; memory: two streams and one block.
"""
from __future__ import annotations

import dataclasses
import json
import math
from collections import ChainMap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.fx import Node

from ..config import refuse_unknown
from ..connectivity import ask
from ..convert import converted_of
from ..errors import ConfigError, RefusedError
from ..passes.detect import Blocks
from ..passes.rewire import Read, build_reads
from ..sharding import is_part
from ..verify import blocks_of
from .cache import fingerprint
from .evaluation import targets_of
from .exposed import CHOICES, require_choices
from .head import base_of, check_head, in_eval_mode
from .loss import NAMES, Dense, Head, distillation_loss
from .pair import sorted_arguments, traced
from .program import Program, Values
from .side import Side, stages_of
from .structure import LayerStructure, structure_of

VERSION = 1


@dataclass(frozen=True, kw_only=True)
class LayerSensitivity:
    """One decoder layer.

    Attributes:
        structure: what it computes and sends.
        kl: nats a token, by connectivity.
        refused: why a connectivity cannot be applied to this layer, by its name.
    """
    structure: LayerStructure
    kl: dict[str, float]
    refused: dict[str, str]


@dataclass(frozen=True, kw_only=True)
class Sensitivity:
    """The scan of one model.

    Attributes:
        layers: in order.
        choices: the connectivities that were tried.
        tokens: targets that the KLs are means over.
        model: fingerprint of the weights.
    """
    layers: tuple[LayerSensitivity, ...]
    choices: tuple[str, ...]
    tokens: int
    model: str
    version: int = VERSION

    def kl(self, layer: int, name: str) -> float:
        """Nats a token; 0 for "none".

        Raises:
            ConfigError: it was not measured there.
        """
        if name == "none":
            return 0.0
        found = self.layers[layer]
        if name in found.refused:
            raise ConfigError(f"connectivity {name!r} cannot be applied to layer {layer} ({found.structure.label}): "
                              f"{found.refused[name]}")
        if name not in found.kl:
            raise ConfigError(f"this scan did not try connectivity {name!r}; it has {', '.join(self.choices)}. Scan again with "
                              f"choices=(..., {name!r})")
        return found.kl[name]

    @property
    def refused(self) -> frozenset[tuple[int, str]]:
        """(layer, connectivity)."""
        return frozenset((i, name) for i, layer in enumerate(self.layers) for name in layer.refused)

    def require(self, model: nn.Module) -> None:
        """Raise ConfigError where ``model`` is not the one that was scanned."""
        have = fingerprint(model)
        if have != self.model:
            raise ConfigError(f"this scan ({len(self.layers)} layers, fingerprint {self.model}) is of another model than "
                              f"{type(base_of(model)).__name__} with fingerprint {have}: other weights or other names. Scan "
                              "this model")

    def to_dict(self) -> dict:
        return {**dataclasses.asdict(self), "choices": list(self.choices),
                "layers": [dataclasses.asdict(layer) for layer in self.layers]}

    def save(self, path: str | Path) -> None:
        Path(path).write_text(json.dumps(self.to_dict(), indent=1))

    @classmethod
    def load(cls, path: str | Path, model: nn.Module | None = None) -> Sensitivity:
        """
        Args:
            model: refuse a scan of another one.

        Raises:
            ConfigError: no scan, a damaged one, one of another version or of another model.
        """
        try:
            data = json.loads(Path(path).read_text())
        except (OSError, ValueError) as error:
            raise ConfigError(f"cannot read the sensitivity scan {path}: {error}") from error
        found = cls.from_dict(data, where=str(path))
        if model is not None:
            found.require(model)
        return found

    @classmethod
    def from_dict(cls, data: Mapping, *, where: str = "a sensitivity scan") -> Sensitivity:
        if not isinstance(data, Mapping) or data.get("version") != VERSION:
            version = data.get("version") if isinstance(data, Mapping) else None
            raise ConfigError(f"{where} has version {version!r}; this release reads version {VERSION}: scan again")
        refuse_unknown(data, [f.name for f in dataclasses.fields(cls)], f"{where}: unknown ", "; known: ")
        try:
            choices = tuple(str(name) for name in data["choices"])
            layers = tuple(_layer(one, choices) for one in data["layers"])
            found = cls(layers=layers, choices=choices, tokens=int(data["tokens"]), model=str(data["model"]))
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise ConfigError(f"{where} is damaged ({type(error).__name__}: {error}): scan again") from error
        if not layers:
            raise ConfigError(f"{where} has no layers: scan again")
        return found


def _layer(data: Mapping, choices: Sequence[str]) -> LayerSensitivity:
    kl = {str(name): float(value) for name, value in data["kl"].items()}
    refused = {str(name): str(why) for name, why in data["refused"].items()}
    if {*kl, *refused} != set(choices) or not all(0 <= value < math.inf for value in kl.values()):
        raise ValueError(f"layer {data['structure']['label']!r} has no KL for each of {', '.join(choices)}")
    return LayerSensitivity(structure=LayerStructure(**data["structure"]), kl=kl, refused=refused)


@torch.no_grad()
def sensitivity(model: nn.Module, batches: Iterable, choices: Sequence[str] = CHOICES, *, chunk_mb: float = 64.0,
                progress: bool = True, group: dist.ProcessGroup | None = None) -> Sensitivity:
    """Convert each layer of ``model`` alone, in each way of ``choices``, and measure the KL to the original.

    Args:
        model: a causal language model of transformers, not converted and not sharded.
        batches: calibration text: token ids [batch, sequence], or dicts of what the model is called with, ``labels`` or
            ``attention_mask`` where they matter; all of one shape. Some 10,000 tokens order the layers well.
        choices: names of connectivities, your own ones, too.
        chunk_mb: MiB of one chunk of logits.
        progress: show a bar.
        group: ranks that each hold other batches; sums are added up over them, and all get the same result.

    Raises:
        ConfigError: a converted or sharded model, unknown choices, batches that do not fit.
        RefusedError: no stream or no head that is understood. A layer that refuses a choice is no error: see
            ``LayerSensitivity.refused``.
        SplitModelError: the model is not one graph.
    """
    choices = _checked(choices)
    if converted_of(model) is not None:
        raise ConfigError("this model is converted, and the scan begins with the original: call farskip_fx.remove(model) first")
    if any(map(is_part, model.parameters())):
        raise ConfigError("this model is sharded (expert_parallel, or data_parallel with shard=True), and the scan runs whole "
                          "layers: scan before that")
    head = check_head(model)
    scan = _Scan(model, [_on(head.weight.device, batch) for batch in batches], choices, head, chunk_mb)
    with in_eval_mode(model):
        sums = scan.run(progress)
    return scan.result(sums if group is None else _added_up(sums, group), fingerprint(model))


def _checked(choices: Sequence[str]) -> tuple[str, ...]:
    require_choices(choices)
    return tuple(dict.fromkeys(name for name in choices if name != "none"))


def _on(device: torch.device, batch) -> dict:
    given = dict(batch) if isinstance(batch, Mapping) else {"input_ids": batch}
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in given.items()}


def _added_up(sums: Tensor, group: dist.ProcessGroup) -> Tensor:
    dist.all_reduce(sums, group=group)
    return sums


@dataclass
class _Walk:
    """A batch behind one stage: what is alive there, and the other reads that could be computed by then."""
    live: Values
    reads: Values


class _Scan:
    def __init__(self, model: nn.Module, batches: list[dict], choices: tuple[str, ...], head: Head, chunk_mb: float) -> None:
        self.choices, self.head, self.chunk_mb = choices, head, chunk_mb
        self.targets = [targets_of(dict(batch)) for batch in batches]
        inputs = [{name: value for name, value in batch.items() if name not in ("labels", "shift_labels")} for batch in batches]
        gm, calls = traced(model, inputs, "a scan")
        self.blocks: Blocks = blocks_of(gm, "scan")
        ids = self.targets[0]
        self.structures = structure_of(self.blocks, tokens=ids.numel(), length=ids.shape[-1])
        parameters, fixed, varying = sorted_arguments(model, gm, calls)
        self.hidden = _before_the_head(gm, parameters, model)
        self.found, self.refused = build_reads(gm.graph, self.blocks, connectivities={name: _asking(name) for name in choices})
        self.program = Program(gm, weights=parameters, inputs=varying[0])
        self.stages = stages_of(self.blocks)
        self.program.set_stages([(end, members) for end, members, _, _ in self.stages])
        given = {**{node: p.detach() for node, p in parameters.items()}, **fixed}
        self.side = Side(self.program, [s.states[0] for s in self.blocks.streams], given, [dict(call) for call in varying])
        self.inside = {read.reader.ends: frozenset(self.blocks.flow.members(read.reader.nodes))
                       for reads in self.found.values() for read in reads}
        self.stage_of = {block.node: i for i, (_, _, _, blocks) in enumerate(self.stages) for block in blocks}
        self._ready: dict[int, list[Node]] = {}         # reads, by the stage behind which they can be computed
        for read in dict.fromkeys(read.value for reads in self.found.values() for read in reads):
            known = read in self.blocks.flow.position   # a state ends its stage; what was built stands behind that
            self._ready.setdefault(self.program.stage[read] - (not known), []).append(read)

    def run(self, progress: bool) -> Tensor:
        """[layers, choices, len(NAMES)] sums over the tokens of all batches, float64."""
        sums = torch.zeros(len(self.blocks.layers), len(self.choices), len(NAMES), dtype=torch.float64,
                           device=self.head.weight.device)
        begins: dict[int, list[int]] = {}           # stage -> the layers whose first block is computed there
        for layer in self.blocks.layers:
            begins.setdefault(self.stage_of[layer.blocks[0].node], []).append(layer.index)
        columns = (TextColumn("sensitivity"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"),
                   TimeRemainingColumn())
        with Progress(*columns, disable=not progress, transient=True) as bar:
            task = bar.add_task("", total=len(self.targets) * len(self.blocks.layers))
            for batch in range(len(self.targets)):
                original = self._to_the_end(batch, None, 0, ())
                unchanged = self._sums(original, original, batch)
                walk = None
                for stage in range(len(self.stages)):
                    for index in begins.get(stage, ()):
                        bar.update(task, description=f"batch {batch}, layer {index}")
                        self._layer(batch, index, walk, stage, original, unchanged, sums[index])
                        bar.advance(task)
                    walk = self._step(batch, walk, stage, ())
        return sums

    def _layer(self, batch: int, index: int, walk: _Walk, stage: int, original: Tensor, unchanged: Tensor,
               sums: Tensor) -> None:
        """Each choice for one layer, from the original's values in front of it."""
        known: dict[tuple, Tensor] = {(): unchanged}
        for row, name in zip(sums, self.choices):
            reads = self.found.get((index, name))
            if reads is None:
                continue
            same = tuple((read.reader.ends, read.value) for read in reads)
            if same not in known:
                known[same] = self._sums(self._to_the_end(batch, walk, stage, reads), original, batch)
            row += known[same]

    def _sums(self, hidden: Tensor, original: Tensor, batch: int) -> Tensor:
        _, sums = distillation_loss(hidden, self.head, Dense(original, self.head), self.targets[batch], chunk_mb=self.chunk_mb)
        return sums.values

    def _to_the_end(self, batch: int, walk: _Walk | None, stage: int, reads: Sequence[Read]) -> Tensor:
        """Hidden states in front of the head, from what is known before ``stage``."""
        for at in range(stage, len(self.stages)):
            walk = self._step(batch, walk, at, [read for read in reads if self.stage_of[read.reader.block.node] == at])
        return self.program.evaluate([self.hidden], self._known(batch, walk))[self.hidden]

    def _step(self, batch: int, walk: _Walk | None, stage: int, reads: Sequence[Read]) -> _Walk:
        """Over one stage; what reads otherwise is computed from ``reads``."""
        end, _, update, _ = self.stages[stage]
        walk = walk or _Walk(live={}, reads={})
        fresh: Values = {}
        for read in sorted(reads, key=lambda read: read.reader.half == "routed"):       # to which the shared one is added
            reader, inside = read.reader, self.inside[read.reader.ends]
            before = {node: value for node, value in walk.live.items() if node not in inside}
            beside = self.program.evaluate(reader.beside, self._known(batch, walk, fresh))
            wanted = [*reader.ends, *(node for node in self.program.live(stage) if node in inside)]
            fresh |= self.program.evaluate(wanted, self._known(batch, _Walk(live=before, reads={}), beside,
                                                               {read.state: walk.reads[read.value]}))
        known = self._known(batch, walk, fresh)
        if update is None:      # what leads to a stream, every node of it: a mask may be made under vmap
            known = ChainMap(self.program.run_all(self.program.members(stage), known), known)
        live = self.program.evaluate([*self.side.changing(batch, stage), end], known)
        ready = self._ready.get(stage, ())
        after = ChainMap(live, known)
        return _Walk(live=live, reads={**walk.reads, **self.program.evaluate(ready, after)} if ready else walk.reads)

    def _known(self, batch: int, walk: _Walk, *more: Values) -> ChainMap:
        return ChainMap(*more, walk.live, self.side.batches[batch], self.side.given)

    def result(self, sums: Tensor, model: str) -> Sensitivity:
        means = (sums[..., NAMES.index("kl")] / sums[..., NAMES.index("tokens")].clamp(min=1)).clamp(min=0).tolist()
        layers = tuple(LayerSensitivity(
            structure=structure, refused={name: str(self.refused[i, name]) for name in self.choices if (i, name) in self.refused},
            kl={name: means[i][j] for j, name in enumerate(self.choices) if (i, name) not in self.refused})
            for i, structure in enumerate(self.structures))
        return Sensitivity(layers=layers, choices=self.choices, model=model,
                           tokens=int(sums[..., NAMES.index("tokens")].max().item()))


def _asking(name: str):
    return lambda layer, earlier: ask(name, layer, earlier)


def _before_the_head(gm, parameters: Mapping[Node, nn.Parameter], model: nn.Module) -> Node:
    """The node that the head multiplies."""
    weight = base_of(model).get_output_embeddings().weight
    place = next((node for node, p in parameters.items() if p is weight), None)
    found = [n for n in gm.graph.nodes if place is not None and n.op == "call_function" and len(n.args) > 1
             and n.args[1] is place and n.target is nn.functional.linear]
    if len(found) != 1:
        raise RefusedError(f"{len(found)} products with the weight of the head were found in the traced graph of "
                           f"{type(base_of(model)).__name__}, and one is expected: where its hidden states end is not known")
    return found[0].args[0]
