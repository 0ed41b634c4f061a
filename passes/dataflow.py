"""What a value depends on, mutations included.

Contract: a graph of call nodes whose tensors carry ``meta["example_value"]`` (Dynamo) or ``meta["val"]`` (ATen).
Nothing is changed. A plain ancestor walk over arguments misses writes (``index_copy_`` into a KV cache, ``setitem``,
``shared.add_(routed)``), so every reader of a storage also depends on the writes to it that come before the reader.

Terms
  storage   identity of the memory behind a node's tensors; views share it
  write     a node that changes the storage of one of its arguments
  value     a tensor's contents; ``zeros_like(x)`` and ``x.size()`` depend on x's shape, not on its value

Ancestor sets are Python integers used as bit sets: an 'or' of two of them is one machine loop, so 20,000 nodes take
a fraction of a second.
"""
from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterable, Iterator

import torch
from torch.fx import Graph, Node

from ._torch import is_batchedtensor
from .operations import TAKES_A_LIKENESS

_INPLACE_OPERATORS = {
    getattr(operator, f"i{name}")
    for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor", "matmul", "lshift",
                 "rshift")
}
_SHAPE_ONLY = {
    "zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like", "new_zeros", "new_ones",
    "new_empty", "new_full", "new_tensor", "size", "dim", "numel", "stride", "get_device", "is_floating_point",
}


def value_inputs(node: Node) -> list[Node]:
    """The inputs whose contents ``node`` takes in: of ``x.type_as(y)`` only x."""
    inputs = node.all_input_nodes
    return inputs[:1] if op_name(node) in TAKES_A_LIKENESS else inputs


def value_of(node: Node):
    """The example or fake value that tracing left on ``node``, or None."""
    return node.meta.get("example_value", node.meta.get("val"))


def op_name(node: Node) -> str:
    """Bare lower-case name of what a node calls: ``linear``, ``add``, ``all_to_all_single``. Empty for non-calls."""
    target = node.target
    if node.op == "call_method":
        return str(target)
    if node.op != "call_function":
        return ""
    if isinstance(target, torch._ops.OpOverload):
        return target._schema.name.split("::")[-1]
    return getattr(target, "__name__", str(target)).split(".")[-1]


def clean_path(path: str) -> str:
    """``L['self']._modules['model'].layers.3.mlp`` -> ``model.layers.3.mlp``."""
    path = re.sub(r"^L\['\w+'\](\.__self__|\[\d+\])*\.?", "", path)
    return path.replace("_modules['", "").replace("']", "").replace("_orig_mod.", "").replace("._orig_mod", "")


def same_sizes(x: torch.Tensor, y: torch.Tensor) -> bool:
    """Same rank and same static sizes. Symbolic sizes are never compared."""
    return x.dim() == y.dim() and all(p == q for p, q in zip(x.shape, y.shape) if isinstance(p, int) and isinstance(q, int))


def tensors_of(node: Node) -> Iterator[torch.Tensor]:
    value = value_of(node)
    for item in value if isinstance(value, (tuple, list)) else (value,):
        if isinstance(item, torch.Tensor):
            yield item


def storages_of(node: Node) -> set[int]:
    """Identities of the memory behind a node's tensors. Sparse and vmapped tensors show none."""
    return {t.untyped_storage()._cdata for t in tensors_of(node)
            if t.layout is torch.strided and not is_batchedtensor(t)}


def written_arguments(node: Node) -> list[Node]:
    """The argument nodes whose memory ``node`` changes."""
    first = node.args[0] if node.args and isinstance(node.args[0], Node) else None
    out = node.kwargs.get("out")
    written = [out] if isinstance(out, Node) else []
    if node.op == "call_method":
        name = str(node.target)
        if name.endswith("_") and not name.endswith("__") and name != "requires_grad_" and first is not None:
            written.append(first)
    elif node.op == "call_function":
        target = node.target
        if isinstance(target, torch._ops.OpOverload):
            for position, argument in enumerate(target._schema.arguments):
                if argument.alias_info is not None and argument.alias_info.is_write:
                    value = node.args[position] if position < len(node.args) else node.kwargs.get(argument.name)
                    written += [v for v in (value if isinstance(value, (list, tuple)) else [value])
                                if isinstance(v, Node)]
        elif target is operator.setitem or target in _INPLACE_OPERATORS:
            written += [first] if first is not None else []
        elif getattr(target, "__module__", "") != "_operator":      # and_, or_ and not_ write nothing
            name = getattr(target, "__name__", "")
            inplace = node.kwargs.get("inplace") is True or (name.endswith("_") and not name.endswith("__"))
            written += [first] if inplace and first is not None else []
            if "triton_kernel_wrapper_mutation" in str(target):
                written += node.all_input_nodes
    return [w for w in written if any(True for _ in tensors_of(w))]


class Dataflow:
    """Ancestors by value, as bit sets over positions in ``graph``."""

    def __init__(self, graph: Graph) -> None:
        self.nodes = list(graph.nodes)
        self.position = {node: i for i, node in enumerate(self.nodes)}
        self.storage_writes: dict[int, list[Node]] = {}
        self._ancestors: list[int] = []
        self._marked: dict[str, int] = {}
        last_write: dict[int, Node] = {}
        storages = {node: storages_of(node) for node in self.nodes}
        self._storages = storages
        for node in self.nodes:
            mask = 0
            if op_name(node) not in _SHAPE_ONLY:
                for source in value_inputs(node):
                    mask |= self._ancestors[self.position[source]] | (1 << self.position[source])
                    for storage in storages[source]:
                        write = last_write.get(storage)
                        if write is not None:
                            mask |= self._ancestors[self.position[write]] | (1 << self.position[write])
            self._ancestors.append(mask)
            for argument in written_arguments(node):
                for storage in storages[argument]:
                    last_write[storage] = node
                    self.storage_writes.setdefault(storage, []).append(node)

    def ancestors(self, node: Node) -> int:
        return self._ancestors[self.position[node]]

    def bit(self, node: Node) -> int:
        return 1 << self.position[node]

    def depends(self, node: Node, on: Node) -> bool:
        return bool(self.ancestors(node) >> self.position[on] & 1)

    def mask(self, nodes: Iterable[Node]) -> int:
        mask = 0
        for node in nodes:
            mask |= self.bit(node)
        return mask

    def marked(self, name: str, test: Callable[[Node], bool]) -> int:
        """The nodes for which ``test`` holds; computed once for each ``name``."""
        if name not in self._marked:
            self._marked[name] = self.mask(n for n in self.nodes if test(n))
        return self._marked[name]

    def members(self, mask: int) -> list[Node]:
        """Nodes of a bit set, in graph order; time is proportional to the span of the set, not to the graph."""
        if not mask:
            return []
        base = (mask & -mask).bit_length() - 1
        digits = bin(mask >> base)[:1:-1]
        found, at = [], 0
        while at >= 0:
            found.append(self.nodes[base + at])
            at = digits.find("1", at + 1)
        return found

    def descendants(self, seeds: int, within: int) -> int:
        """Members of ``within`` whose value depends on a member of ``seeds``, seeds in ``within`` included."""
        result = seeds & within
        for node in self.members(within):
            if self.ancestors(node) & seeds:
                result |= self.bit(node)
        return result

    def writes_to(self, node: Node) -> list[Node]:
        """Every node of the graph that writes into the memory of ``node``, before or after it."""
        return [w for s in self._storages[node] for w in self.storage_writes.get(s, ())]

    def late_writes(self, node: Node) -> list[Node]:
        """Those of them that come after ``node``: its value cannot be read again later."""
        return [w for w in self.writes_to(node) if self.position[w] > self.position[node]]
