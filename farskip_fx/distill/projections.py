"""The projections of a block: linear maps of tokens with a parameter as their weight, found in the traced graph.

Contract: nothing is changed. Class and module names decide nothing.

Terms
  weight   the operand of a linear map that is a view of one parameter: as it is, transposed, or one expert's slice of it
  rows     the inputs of a projection as [rows, in], one matrix for each expert where the weight is stacked [experts, ...]
  level    a projection stands above those that its input is computed from: q, k, v at 0, o_proj at 1. Those of one level
           can be solved for at once.
  final    its output reaches the stream by views, scales and sums only, so that it can be aimed at a value of the stream

Kinds
  matrix   ``linear``, ``matmul``, ``mm``, ``addmm``: one matrix for all rows
  grouped  ``grouped_mm``: rows sorted by expert, with the offset where each expert's rows end
  batched  ``bmm``, ``matmul`` of [experts, rows, in] with [experts, in, out]
"""
from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.node import map_arg

from ..passes.dataflow import op_name, value_of
from ..passes.operations import CASTS, EXCHANGES, LINEAR_MAPS, TRANSPOSES, VIEWS
from ..passes.sums import is_float
from .program import Program

_GROUPED = {"_grouped_mm", "grouped_mm", "grouped_mm_fallback"}
_MAPS = LINEAR_MAPS | _GROUPED
_OTHER_MAPS = {"scaled_grouped_mm", "_scaled_mm", "scaled_mm", "baddbmm", "addbmm", "einsum"}
_KEEPS_MEMORY = (VIEWS | TRANSPOSES | {"getattr", "T", "mT"}) - {"clone", "contiguous", "reshape"}
# What a contribution goes through on its way into the stream, linear in it; products need a factor that is none of it.
_PASSES_ON = VIEWS | CASTS | TRANSPOSES | EXCHANGES | {
    "mul", "imul", "div", "truediv", "add", "iadd", "sub", "sum", "index_add", "index_add_", "index_copy", "index_select",
    "scatter_add", "scatter_add_", "gather", "take_along_dim", "wait_tensor", "masked_fill", "masked_fill_", "dropout",
    "neg", "squeeze", "unsqueeze", "view_as", "type_as", "setitem", "stack", "cat"}


@dataclass(frozen=True, kw_only=True)
class Projection:
    """``output = x @ M`` (+ bias), M a view of ``parameter`` (a placeholder of the graph)."""
    node: Node
    kind: str
    data: Node               # x
    parameter: Node
    chain: tuple[Node, ...]  # from the parameter to the operand; casts left out
    transposed: bool         # whether the operand is [out, in], as that of ``linear``
    left: bool = False       # output = M^T @ x, where x is [..., in, rows]
    offsets: Node | None = None
    level: int = 0
    final: bool = False

    def matrix(self, parameter: Tensor) -> Tensor:
        """The view of ``parameter`` that is multiplied with: [in, out] or [experts, in, out]."""
        value: object = parameter
        for node in self.chain:
            value = _again(node, value)
        return value.mT if self.transposed else value

    def rows(self, x: Tensor, offsets: Tensor | None) -> Iterator[tuple[int, Tensor]]:
        """(expert, [rows, columns]) for what enters or leaves; expert 0 where the weight is one matrix."""
        if self.kind == "matrix":
            x = x.mT if self.left else x
            yield 0, x.reshape(-1, x.shape[-1])
        elif self.kind == "batched":
            yield from enumerate(x.unbind(0))
        else:
            ends = offsets.tolist()
            yield from ((e, x[start:end]) for e, (start, end) in enumerate(zip([0, *ends], ends)))


@dataclass(frozen=True, kw_only=True)
class Left:
    """A projection that stays as it is, and why."""
    parameter: str
    reason: str


def find_projections(program: Program, branch: int,
                     after: Node | None) -> tuple[list[Projection], list[tuple[Node, str]]]:
    """The projections of a branch in graph order, and the maps with weights that are not understood, with the reason.

    Args:
        branch: bit set of the branch's nodes.
        after: the state that it contributes to; None for the head.
    """
    found, left = [], []
    for node in program.flow.members(branch):
        name = op_name(node)
        if name not in _MAPS | _OTHER_MAPS:
            continue
        weights = [a for a in node.all_input_nodes if not program.flow.bit(a) & branch and _parameter_above(a) is not None]
        if not weights:
            continue
        one = _projection(program, node, name, branch)
        if isinstance(one, str):
            left += [(_parameter_above(weights[-1]), one)]
        else:
            found.append(one)
    found, shared = _used_once(found)
    left += shared
    return _levels(program, found, after), left


def _projection(program: Program, node: Node, name: str, branch: int) -> Projection | str:
    if name in _OTHER_MAPS:
        return f"{name} is not a form of product that is refitted"
    first, second = ((list(node.args) + [None] * 3)[1:3] if name == "addmm" else (list(node.args) + [None] * 2)[:2])
    if not isinstance(first, Node) or not isinstance(second, Node):
        return f"the arguments of {node.name} ({name}) are not understood"
    tokens = [bool(program.flow.bit(a) & branch) for a in (first, second)]
    left = tokens == [False, True] and name != "linear"
    if tokens != [True, False] and not left:
        return f"both factors of {node.name} ({name}) depend on tokens"
    if left:
        first, second = second, first
    chain = _chain(second)
    if isinstance(chain, str):
        return chain
    parameter, views = chain
    weight, x, out = value_of(second), value_of(first), value_of(node)
    if not is_float(weight) or not is_float(x) or not is_float(out):
        return "its weight is no plain floating-point tensor"
    if name in _GROUPED:
        offsets = node.kwargs.get("offs", node.args[2] if len(node.args) > 2 else None)
        if weight.dim() != 3 or x.dim() != 2 or not isinstance(offsets, Node):
            return f"{node.name} ({name}) has groups of another layout"
        return Projection(node=node, kind="grouped", data=first, parameter=parameter, chain=views, transposed=False,
                          offsets=offsets)
    if weight.dim() == 2 and x.dim() > 1:
        return Projection(node=node, kind="matrix", data=first, parameter=parameter, chain=views, left=left,
                          transposed=left or name == "linear")
    if weight.dim() == 3 and x.dim() == 3 and name != "linear" and not left:
        return Projection(node=node, kind="batched", data=first, parameter=parameter, chain=views, transposed=False)
    return f"a weight of {weight.dim()} axes in {name}"


def _chain(node: Node) -> tuple[Node, tuple[Node, ...]] | str:
    """(the parameter behind an operand, the views between)."""
    views: list[Node] = []
    while node.op != "placeholder":
        name = op_name(node)
        if name in CASTS:
            source, cast = value_of(node.args[0]), value_of(node)
            if not is_float(source) or not is_float(cast):
                return f"{node.name} makes the weight from something else than floating-point numbers"
        elif name in _KEEPS_MEMORY and len(node.all_input_nodes) == 1:
            views.append(node)
        else:
            return f"its weight is computed ({node.name}, {name or node.op}) from parameters"
        node = node.args[0]
        if not isinstance(node, Node):
            return "its weight is not understood"
    if not _is_parameter(node):
        return "its weight is no parameter"
    return node, tuple(reversed(views))


def _is_parameter(placeholder: Node) -> bool:
    return isinstance(value_of(placeholder), torch.nn.Parameter) or "_parameters" in str(placeholder.target)


def _parameter_above(node: Node) -> Node | None:
    """A parameter that ``node`` is made of; None if there is none, or if tokens are in it, too."""
    seen, todo, found = set(), [node], None
    while todo and len(seen) < 64:
        current = todo.pop()
        if current in seen:
            continue
        seen.add(current)
        if current.op == "placeholder":
            if not _is_parameter(current):
                return None
            found = current
        todo += current.all_input_nodes
    return found


def _again(node: Node, value: object) -> object:
    source = node.args[0]
    args, kwargs = (map_arg(a, lambda n: value if n is source else None) for a in (node.args, node.kwargs))
    return getattr(args[0], node.target)(*args[1:], **kwargs) if node.op == "call_method" else node.target(*args, **kwargs)


def _used_once(found: list[Projection]) -> tuple[list[Projection], list[tuple[Node, str]]]:
    """Projections whose part of the parameter nothing else reads."""
    kept, left = [], []
    by_parameter: dict[Node, list[Projection]] = {}
    for one in found:
        by_parameter.setdefault(one.parameter, []).append(one)
    for parameter, ones in by_parameter.items():
        slices = [_slice(one) for one in ones]
        apart = len(ones) == 1 or None not in slices and len(set(slices)) == len(slices)
        if len(ones) == _readers(parameter) and apart:
            kept += ones
        else:
            left.append((parameter, "it is used more than once"))
    order = {one.node: i for i, one in enumerate(found)}
    return sorted(kept, key=lambda one: order[one.node]), left


def _readers(parameter: Node) -> int:
    """How many nodes read the contents of a parameter behind views and casts."""
    count, todo = 0, [parameter]
    while todo:
        for user in todo.pop().users:
            if op_name(user) in _KEEPS_MEMORY | CASTS | {"contiguous", "reshape"}:
                todo.append(user)
            elif op_name(user) not in ("size", "dim", "numel", "stride", "getattr") or is_float(value_of(user)):
                count += user.op != "output"
    return count


def _slice(one: Projection) -> int | None:
    """The expert that a chain picks, where it picks one by a number."""
    picks = [n.args[1] for n in one.chain if op_name(n) == "getitem"]
    return picks[0] if len(picks) == 1 and isinstance(picks[0], int) else None


def _levels(program: Program, found: list[Projection], after: Node | None) -> list[Projection]:
    flow, level, done = program.flow, {}, []
    for one in found:
        level[one.node] = max((level[o.node] + 1 for o in done if flow.depends(one.data, o.node)), default=0)
        done.append(replace(one, level=level[one.node], final=after is not None and _is_final(program, one.node, after)))
    return done


def _is_final(program: Program, node: Node, after: Node) -> bool:
    """Whether ``after`` is linear in the output of ``node``, row by row."""
    flow = program.flow
    between = flow.descendants(flow.bit(node), flow.ancestors(after) | flow.bit(after))
    way = [n for n in flow.members(between) if n is not node]
    on_it = {node, *way}
    for n in way:
        name = op_name(n)
        if name not in _PASSES_ON:
            return False
        mine = [a for a in n.all_input_nodes if a in on_it]
        if name in ("mul", "imul", "div", "truediv") and (len(mine) != 1 or n.args[0] not in on_it and "div" in name):
            return False
    return bool(way)
