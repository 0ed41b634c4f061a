"""How long a node takes: formulas over shapes and a few rates.

Contract: a post-grad ATen graph whose nodes carry ``meta["val"]``. Nothing is changed and nothing is measured; the same
graph with the same ``Rates`` gives the same seconds. A symbolic size is never compared, only asked for its hint.

Terms
  kernel      a node that Inductor runs as one call (matmul, attention, sort, custom op), on its own
  light node  a pointwise op, reduction or gather that Inductor turns into loops and fuses with its neighbours
  region      light nodes that are joined by edges with no kernel in between: about one fused loop nest
  free        views, getitem, sizes, constants: no memory is touched

Formulas
  kernel      flops / rate + overhead, and never less than its bytes / memory rate; measured, where ``Rates.kernels`` has it
  light node  bytes it reads from outside its region (each source once a region) + bytes it writes for others to read
  exchange    latency + payload / link rate, of its group where ``Rates.links`` has it. Payload: what leaves one rank, or
              arrives there, whichever is more
"""
from __future__ import annotations

import math
import operator
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from functools import cached_property

import torch
from torch.fx import Graph, Node

from ._torch import flop_formula, group_shape, group_size, is_view_op, size_hint

_MATMUL = {"mm", "addmm", "bmm", "baddbmm", "_int_mm", "_scaled_mm", "_addmm_activation", "linear", "_linear_pointwise",
           "mkl_linear", "_mkl_linear", "_weight_int8pack_mm", "_weight_int4pack_mm"}
_GROUPED = {"_grouped_mm", "_scaled_grouped_mm", "grouped_mm_fallback", "grouped_mm"}
_GROUPED_BACKWARD = {"grouped_mm_fallback_backward"}
_CONVOLUTION = {"convolution", "_convolution_pointwise"}
_CONVOLUTION_BACKWARD = {"convolution_backward"}
_SORTS = {"sort", "topk", "argsort", "unique", "_unique2", "kthvalue", "median"}
_NOT_LOOPS = _SORTS | {"histc", "bincount", "nonzero", "cumsum", "cumprod", "logcumsumexp", "repeat_interleave",
                       "searchsorted", "index_put", "scatter", "scatter_add", "scatter_reduce", "index_add", "put",
                       "_fft_r2c", "_fft_c2r", "_fft_c2c", "embedding_dense_backward"}
_FREE = {"empty", "empty_strided", "empty_like", "new_empty", "full", "full_like", "zeros", "ones", "iota", "arange",
         "scalar_tensor", "sym_size", "sym_stride", "sym_numel", "sym_storage_offset", "_assert_scalar",
         "_assert_async",
         "_local_scalar_dense", "inductor_seeds", "inductor_lookup_seed", "detach", "lift_fresh_copy"}
_VIEWS_BY_COPY = {"reshape", "view", "_unsafe_view", "contiguous"}     # a view wherever strides allow it
_LIGHT_NAMESPACES = {"aten", "prims", "inductor", "quantized_decomposed"}
_COMMUNICATION = {"_c10d_functional", "c10d_functional", "_c10d_functional_autograd"}
_BACKWARD_OVER_FORWARD = 2.5    # attention: five matrix products against two


@dataclass(frozen=True, kw_only=True)
class Rates:
    """What the device and the link can do: a shared input, equal on all ranks, and part of the cache key.

    Args:
        matmul_flops: flop/s of matrix products as the model's shapes reach it.
        attention_flops: flop/s of fused attention.
        memory_bytes: bytes/s of loops that stream through memory.
        link_bytes: payload bytes/s of one rank.
        link_latency: seconds a collective takes with no payload.
        kernel_overhead: seconds a kernel takes with no work.
        link_queued: share of its seconds that a collective takes behind another that was launched before it ended. gloo sends what a
            rank receives and what it sends one after the other, unless two exchanges are in flight: about a half there.
        link_compute_share: share of the compute device that a running collective takes. gloo's threads run on the
            rank's own core; a GPU's copy engines do not (0).
        one_link: collectives of all process groups go over one link, one after the other; False: each group has its own
            (exchanges inside of a node and means of gradients between nodes, say).
        kernels: seconds of single kernels that were measured, by ``kernel_key``; formulas for all others.
        links: (bytes/s, latency) of process groups that have a link of their own, beside that of ``link_bytes``, by ranks and
            distance: {"8x1": (250e9, 15e-6)} for groups of eight neighbours, "4x8" for four ranks that are eight apart.
    """
    matmul_flops: float = 90e9
    attention_flops: float = 60e9
    memory_bytes: float = 10e9
    link_bytes: float = 31e6
    link_latency: float = 1e-3
    kernel_overhead: float = 5e-6
    link_queued: float = 1.0
    link_compute_share: float = 0.05
    one_link: bool = True
    kernels: tuple[tuple[str, float], ...] = ()
    links: tuple[tuple[str, tuple[float, float]], ...] = ()

    def __post_init__(self) -> None:
        pairs = self.kernels.items() if isinstance(self.kernels, Mapping) else self.kernels
        object.__setattr__(self, "kernels", tuple(sorted((str(key), float(seconds)) for key, seconds in pairs)))
        if any(not seconds > 0 for _, seconds in self.kernels):
            raise ValueError("kernels must take more than 0 seconds each")
        pairs = self.links.items() if isinstance(self.links, Mapping) else self.links
        object.__setattr__(self, "links", tuple(sorted((str(shape), (float(rate), float(latency)))
                                                       for shape, (rate, latency) in pairs)))
        if any(not rate > 0 or not latency >= 0 for _, (rate, latency) in self.links):
            raise ValueError("links must have more than 0 bytes/s and no negative latency each")
        for name in ("matmul_flops", "attention_flops", "memory_bytes", "link_bytes"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)!r}")
        for name in ("link_latency", "kernel_overhead"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)!r}")
        if not 0 < self.link_queued <= 1:
            raise ValueError(f"link_queued must be in (0, 1], got {self.link_queued!r}")
        if not 0 <= self.link_compute_share < 1:
            raise ValueError(f"link_compute_share must be in [0, 1), got {self.link_compute_share!r}")

    @cached_property
    def measured(self) -> Mapping[str, float]:
        """``kernels``, to look up."""
        return dict(self.kernels)

    @property
    def lanes(self) -> dict[str, float]:
        """What ``simulate.Problem`` wants to know of compute and links together."""
        return {"share": self.link_compute_share, "queued": self.link_queued}

    @cached_property
    def link_of_shape(self) -> Mapping[str, tuple[float, float]]:
        """``links``, to look up."""
        return dict(self.links)

    def to_dict(self) -> dict[str, object]:
        """As JSON has it, and as ``Rates(**data)`` takes it. What nobody measured is left out."""
        measured = {"kernels": dict(self.kernels), "links": {shape: list(link) for shape, link in self.links}}
        plain = {field.name: getattr(self, field.name) for field in fields(self) if field.name not in measured}
        return plain | {name: found for name, found in measured.items() if found}


PRESETS = {
    "cpu": Rates(),     # one core, emulated 400 Mbit/s link
    "h100-nvlink": Rates(matmul_flops=500e12, attention_flops=350e12, memory_bytes=2.5e12, link_bytes=300e9,
                         link_latency=15e-6, kernel_overhead=3e-6, link_compute_share=0.0),
    "h100-infiniband": Rates(matmul_flops=500e12, attention_flops=350e12, memory_bytes=2.5e12, link_bytes=40e9,
                             link_latency=30e-6, kernel_overhead=3e-6, link_compute_share=0.0),
}


# --- what a node is ----------------------------------------------------------------------------------------------
def namespace_of(node: Node) -> str:
    target = node.target
    return target.namespace if isinstance(target, torch._ops.OpOverload) else ""


def op_name(node: Node) -> str:
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return target._schema.name.split("::")[-1]
    return getattr(target, "__name__", str(target)) if node.op == "call_function" else ""


def is_wait(node: Node) -> bool:
    return namespace_of(node) in _COMMUNICATION and op_name(node) == "wait_tensor"


def is_launch(node: Node) -> bool:
    """A functional collective; its result must not be read before ``wait_tensor``."""
    return (namespace_of(node) in _COMMUNICATION and op_name(node) != "wait_tensor"
            and op_name(node) != "_wrap_tensor_autograd")


def launch_of(wait: Node) -> Node | None:
    """The launch behind a wait, through the getitems of a coalesced one and the views of an in-place one."""
    source = wait.args[0] if wait.args else None
    while isinstance(source, Node) and not is_launch(source):
        source = source.all_input_nodes[0] if source.op == "call_function" and source.all_input_nodes else None
    return source


def is_free(node: Node) -> bool:
    if node.op != "call_function" or is_wait(node) or is_launch(node):
        return True
    if not isinstance(node.target, torch._ops.OpOverload):      # getitem, arithmetic on sizes; not a higher-order op
        return not isinstance(node.target, torch._ops.HigherOrderOperator)
    if op_name(node) in _FREE or op_name(node) in _VIEWS_BY_COPY or is_view_op(node.target):
        return True
    return not any(True for _ in tensors_of(node))


def is_light(node: Node) -> bool:
    """Inductor makes loops of it and fuses them."""
    if is_free(node) or flops(node):
        return False
    return namespace_of(node) in _LIGHT_NAMESPACES and op_name(node) not in _NOT_LOOPS and not _is_attention(node)


# --- bytes -------------------------------------------------------------------------------------------------------
def shape_of(tensor: torch.Tensor) -> tuple[int, ...]:
    return tuple(size_hint(size) for size in tensor.shape)


def bytes_of(tensor: torch.Tensor) -> int:
    return math.prod(shape_of(tensor)) * tensor.element_size()


def tensors_of(node: Node) -> Iterator[torch.Tensor]:
    yield from _tensors(node.meta.get("val"))


def bytes_out(node: Node) -> int:
    return sum(map(bytes_of, tensors_of(node)))


def bytes_moved(node: Node) -> int:
    """Read plus written, as if the node ran alone."""
    name = op_name(node)
    out = bytes_out(node)
    if name in ("embedding", "index", "gather", "index_select", "slice_scatter"):   # read as much as they write
        return 2 * out + sum(bytes_of(t) for source in node.all_input_nodes[1:] for t in tensors_of(source))
    return out + sum(bytes_out(source) for source in node.all_input_nodes)


# --- compute -----------------------------------------------------------------------------------------------------
def flops(node: Node) -> float:
    """Of a matrix product, an attention or a convolution; 0 for everything else."""
    name = op_name(node)
    if name in _MATMUL:
        return _matmul_flops(node, name)
    if name in _GROUPED:
        return _grouped_flops(_shapes(node)[:2])
    if name in _GROUPED_BACKWARD:
        return 2 * _grouped_flops(_shapes(node)[:2])
    if name in _CONVOLUTION or name in _CONVOLUTION_BACKWARD:
        return _convolution_flops(node, name)
    if _is_attention(node):
        return _attention_flops(node, name)
    return 0.0


def compute_seconds(node: Node, rates: Rates) -> float:
    """Of one node that runs alone; ``graph_seconds`` knows about fusion. Waits and launches take no compute."""
    if is_free(node):
        return 0.0
    if rates.measured and (seconds := rates.measured.get(kernel_key(node))) is not None:
        return seconds
    return max(_flop_seconds(node, rates), bytes_moved(node) * _passes(node) / rates.memory_bytes) + (
        rates.kernel_overhead)


def kernel_key(node: Node) -> str:
    """What ``Rates.kernels`` calls a matrix product, an attention or a convolution; "" for other nodes. Equal work has equal
    names: a product with a bias is one without."""
    if not flops(node):
        return ""
    name, added = op_name(node), 0
    if name in _WITH_SUM:
        name, added = _WITH_SUM[name], 1
    tensors = [t for source in _nodes((*node.args, *node.kwargs.values())) for t in tensors_of(source)][added:]
    shapes = (f"{str(t.dtype).removeprefix('torch.')}{list(shape_of(t))}" for t in tensors)
    return " ".join([name, *shapes, *(["causal"] if _is_causal(node) else [])])


_WITH_SUM = {"addmm": "mm", "_addmm_activation": "mm", "baddbmm": "bmm"}


def graph_seconds(graph: Graph, rates: Rates) -> dict[Node, float]:
    """Compute seconds of every node, as fused: what stays inside a region costs nothing."""
    nodes = list(graph.nodes)
    light = {node for node in nodes if is_light(node)}
    sources = {node: [through_views(source) for source in node.all_input_nodes] for node in nodes}
    region = _regions(nodes, light, sources)
    outside = _read_outside(nodes, light, sources, region)
    seconds, read, begun = {}, set(), set()
    for node in nodes:
        if node not in light:
            seconds[node] = compute_seconds(node, rates)
            continue
        moved = bytes_out(node) if node in outside else 0
        for source in sources[node]:
            if region.get(source) != region[node] and (region[node], source) not in read:
                read.add((region[node], source))
                moved += min(bytes_out(source), max(bytes_out(node), 1) if op_name(node) in _GATHERS else math.inf)
        seconds[node] = moved / rates.memory_bytes
        if moved and region[node] not in begun:
            begun.add(region[node])
            seconds[node] += rates.kernel_overhead
    return seconds


_GATHERS = {"embedding", "index", "gather", "index_select", "slice"}


def through_views(node: Node) -> Node:
    """The node whose memory this is."""
    while node.op == "call_function" and node.all_input_nodes and (
            node.target is operator.getitem or op_name(node) in _VIEWS_BY_COPY or is_view_op(node.target)):
        node = node.all_input_nodes[0]
    return node


def _regions(nodes: list[Node], light: set[Node], sources: dict[Node, list[Node]]) -> dict[Node, int]:
    """Light nodes at the same depth, counted in kernels, and joined by edges, share a number."""
    depth: dict[Node, int] = {}
    region: dict[Node, int] = {}
    for i, node in enumerate(nodes):
        depth[node] = max((depth[s] + (s not in light and not is_free(s) or is_wait(s)) for s in sources[node]),
                          default=0)
        if node in light:
            joined = [region[s] for s in sources[node] if s in region and depth[s] == depth[node]]
            region[node] = min(joined, default=i)
    return region


def _read_outside(nodes, light, sources, region) -> set[Node]:
    outside = set()
    for node in nodes:
        for source in sources[node]:
            if source in light and region.get(node) != region[source]:
                outside.add(source)
    return outside


def _flop_seconds(node: Node, rates: Rates) -> float:
    rate = rates.attention_flops if _is_attention(node) else rates.matmul_flops
    return flops(node) / rate


def _passes(node: Node) -> float:
    """How often a kernel goes through its data: sorts do so about log2(row) times."""
    if op_name(node) not in _SORTS:
        return 1.0
    rows = [s for s in _shapes(node) if s]
    return max(1.0, math.log2(max(2, rows[0][-1]))) if rows else 1.0


# --- formulas ----------------------------------------------------------------------------------------------------
def _matmul_flops(node: Node, name: str) -> float:
    shapes = [s for s in _shapes(node) if len(s) >= 2]
    if name in ("addmm", "baddbmm", "_addmm_activation"):
        arguments = [a for a in node.args[1:3] if isinstance(a, Node)]
        shapes = [shape_of(t) for a in arguments for t in tensors_of(a)]
    if len(shapes) < 2:
        return 0.0
    # Every output element is a dot product over the inner dimension of the first factor.
    out = math.prod(next((shape_of(t) for t in tensors_of(node)), ()))
    return 2.0 * out * shapes[0][-1]


def _grouped_flops(shapes: list[tuple[int, ...]]) -> float:
    """Each row of a meets one group's matrix: rows split over the groups, whatever is three-dimensional."""
    if len(shapes) < 2:
        return 0.0
    a, b = shapes
    flop = 2.0 * math.prod(a) * b[-1]
    return flop / a[0] if len(a) == 3 and len(b) == 2 else flop     # columns are split: each meets one group of a


def _convolution_flops(node: Node, name: str) -> float:
    out = next((shape_of(t) for t in tensors_of(node)), ())
    if name == "_convolution_pointwise":        # mkldnn: (x, weight, ...); weight is [out, in / groups, *kernel]
        shapes = _shapes(node)
        return 2.0 * math.prod(out) * math.prod(shapes[1][1:]) if len(shapes) > 1 and shapes[1] else 0.0
    packet = node.target.overloadpacket
    formula = flop_formula(packet)
    if formula is None:
        return 0.0
    outs = [shape_of(t) if isinstance(t, torch.Tensor) else t for t in _as_list(node.meta.get("val"))]
    out_shape = outs if name in _CONVOLUTION_BACKWARD else outs[0]
    return float(formula(*_as_shapes(node.args), out_val=out_shape, **_as_shapes(node.kwargs)))


def _is_attention(node: Node) -> bool:
    name = op_name(node)
    return name.startswith(("_scaled_dot_product", "scaled_dot_product", "_flash_attention", "_efficient_attention",
                            "flex_attention"))


def _attention_flops(node: Node, name: str) -> float:
    shapes = [s for s in _shapes(node) if len(s) >= 3]
    backward = "backward" in name
    if backward and not name.startswith("flex"):    # gradient of the output comes first
        shapes = shapes[1:]
    if len(shapes) < 3:
        return 0.0
    q, k, v = shapes[:3]
    flop = 2.0 * math.prod(q[:-1]) * k[-2] * (q[-1] + v[-1])
    return flop * (_BACKWARD_OVER_FORWARD if backward else 1.0) * (0.5 if _is_causal(node) else 1.0)


def _is_causal(node: Node) -> bool:
    """Kernels skip the upper half; a mask given as a tensor is computed in full."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    for position, argument in enumerate(node.target._schema.arguments):
        if argument.name == "is_causal":
            value = node.args[position] if position < len(node.args) else node.kwargs.get("is_causal", False)
            return value is True
    return False


# --- link --------------------------------------------------------------------------------------------------------
def payload(node: Node) -> int:
    """Bytes that one rank puts on the link, or takes from it, whichever is more."""
    name = op_name(node)
    if not is_launch(node):
        return 0
    sent = sum(bytes_of(t) for source in node.all_input_nodes for t in tensors_of(source))
    received = bytes_out(node)
    size = _group_size(node)
    if "all_reduce" in name:
        return int(2 * sent * (size - 1) / size)            # ring: reduce-scatter, then all-gather
    if "all_to_all" in name:
        return int(max(sent, received) * (size - 1) / size)
    if "all_gather" in name:
        return int(received * (size - 1) / size)
    if "reduce_scatter" in name:
        return int(sent * (size - 1) / size)
    return max(sent, received)


def link_seconds(node: Node, rates: Rates) -> float:
    """Of one collective that has the link to itself; 0 for every other node."""
    if not is_launch(node):
        return 0.0
    rate, latency = rates.link_of_shape.get(_shape(node, rates), (rates.link_bytes, rates.link_latency))
    return latency + payload(node) / rate


def lane_of(node: Node, rates: Rates) -> str:
    """The link that a collective goes over: those with one lane follow each other."""
    if (shape := _shape(node, rates)) in rates.link_of_shape:
        return shape
    return "" if rates.one_link else group_of(node)


def _shape(node: Node, rates: Rates) -> str:
    return group_shape(group_of(node)) if rates.links else ""


def group_of(node: Node) -> str:
    """Name of a collective's process group: the last string among its arguments."""
    names = [a for a in (*node.args, *node.kwargs.values()) if isinstance(a, str)]
    return names[-1] if names else ""


def _group_size(node: Node) -> int:
    """From the arguments where they say it, else of the group that they name; two ranks are the least there can be."""
    name = op_name(node)
    if "all_to_all" in name and len(node.args) > 1 and isinstance(node.args[1], (list, tuple)) and node.args[1]:
        return len(node.args[1])
    if "all_gather" in name or "reduce_scatter" in name:
        sizes = [a for a in (*node.args, *node.kwargs.values()) if isinstance(a, int) and not isinstance(a, bool)]
        if sizes:
            return max(2, sizes[-1])
    return max(2, group_size(group_of(node)))


# --- meta --------------------------------------------------------------------------------------------------------
def _tensors(value) -> Iterator[torch.Tensor]:
    for item in value if isinstance(value, (tuple, list)) else (value,):
        if isinstance(item, torch.Tensor):
            yield item


def _shapes(node: Node) -> list[tuple[int, ...]]:
    """Shapes of the tensor arguments, in order and with repetitions."""
    return [shape_of(t) for source in _nodes((*node.args, *node.kwargs.values())) for t in tensors_of(source)]


def _nodes(value) -> Iterator[Node]:
    if isinstance(value, Node):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _nodes(item)


def _as_list(value) -> list:
    return list(value) if isinstance(value, (tuple, list)) else [value]


def _as_shapes(value):
    """Arguments as the flop formulas take them: a shape for a tensor, numbers for symbols."""
    if isinstance(value, Node):
        got = value.meta.get("val")
        return shape_of(got) if isinstance(got, torch.Tensor) else size_hint(got) if got is not None else None
    if isinstance(value, dict):
        return {key: _as_shapes(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_as_shapes(item) for item in value]
    return value
