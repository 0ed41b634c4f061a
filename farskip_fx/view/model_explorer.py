"""Two graphs for Model Explorer (github.com/google-ai-edge/model-explorer): a graph collection, to be written as JSON.

What differs from the other views: it draws graphs, so it takes graph modules. The layers that it nests are the modules of the
model (``nn_module_stack``). A changed read is an edge overlay in either graph, and its node has a border and says what it read
and what it reads now. Nodes have the same name in both graphs, so "sync navigation: match node id" walks through both.
"""
from __future__ import annotations

import operator
import re
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch.fx import GraphModule, Node

from ..passes.dataflow import op_name

BEFORE, AFTER = "1 before", "2 after"       # Model Explorer sorts them by name
_WAS, _NOW = "#d93025", "#188038"
_MOST = 100                                 # characters of a name
_MOST_ATTRIBUTE = 1000
_OUTSIDE = re.compile(r"^L\['[^']*'\](\.__self__)?\.?|\b_orig_mod\.?")     # how Dynamo begins a path


def graphs(before: GraphModule, after: GraphModule, changes: Iterable[dict], *, label: str = "farskip_fx") -> dict:
    """The collection of both graphs.

    Args:
        before, after: of one Dynamo graph, copied before it was rewired.
        changes: ``Report.to_dict()["changes"]``.
    """
    return collection(nodes_of(before), nodes_of(after), changes, label=label)


def collection(before: Sequence[dict], after: Sequence[dict], changes: Iterable[dict], *, label: str = "farskip_fx") -> dict:
    """As ``graphs``, of what ``nodes_of`` returned: graphs are changed in place."""
    changes = list(changes)
    return {"label": _short(label), "graphSorting": "name_asc",
            "graphs": [_graph(BEFORE, before, changes, "was", _WAS), _graph(AFTER, after, changes, "now", _NOW)]}


def nodes_of(gm: GraphModule) -> list[dict]:
    return [{"id": node.name, "label": _short(_label(node)), "namespace": _namespace(node), "attrs": list(_attributes(node)),
             "incomingEdges": [_edge(source, node, str(i)) for i, source in enumerate(node.all_input_nodes)],
             "outputsMetadata": list(_outputs(node))} for node in gm.graph.nodes]


def _graph(name: str, nodes: Sequence[dict], changes: Sequence[dict], read: str, color: str) -> dict:
    known = {node["id"] for node in nodes}
    changes = [c for c in changes if {c["node"], c[read]} <= known]
    of_node = {}
    for change in changes:
        of_node.setdefault(change["node"], []).append(change)
    overlay = {"type": "edge_overlays", "name": f"reads that change ({read})", "graphName": name, "overlays": [{
        "name": f"{len(changes)} reads", "edgeColor": color, "edgeWidth": 4, "edges": [
            {"sourceNodeId": c[read], "targetNodeId": c["node"], "label": _short(f"layer {c['layer']} {c['block']}")}
            for c in changes]}]}
    return {"id": name, "nodes": [_changed(node, of_node[node["id"]], known, color) if node["id"] in of_node else node
                                  for node in nodes],
            # The same in both panes: which of them shows a graph is up to the reader.
            "tasksData": {f"edgeOverlaysDataList{pane}Pane": [overlay] for pane in ("Left", "Right")}}


def _changed(node: dict, changes: Sequence[dict], known: set[str], color: str) -> dict:
    attributes = list(node["attrs"])
    for change in changes:
        about = f"layer {change['layer']} {change['block']} reads {change['now']}, was {change['was']}"
        attributes += [{"key": "farskip_fx", "value": _short(about, _MOST_ATTRIBUTE)},
                       {"key": "source", "value": _short(change["source"], _MOST_ATTRIBUTE)},
                       *({"key": f"farskip_fx: {key}", "value": {"type": "node_ids", "nodeIds": [change[key]]}}
                         for key in ("was", "now") if change[key] in known)]
    return {**node, "attrs": attributes, "style": {"borderColor": color}}


# --- one node ----------------------------------------------------------------------------------------------------

def _label(node: Node) -> str:
    return node.op if node.op in ("placeholder", "get_attr", "output") else op_name(node)


def _namespace(node: Node) -> str:
    """``model/layers/3/self_attn``. Model Explorer takes what stands between slashes and after a semicolon."""
    stack = node.meta.get("nn_module_stack") or node.meta.get("fwd_nn_module_stack") or {}
    path = next((entry[0] for entry in reversed(list(stack.values())) if isinstance(entry, tuple) and entry[0]), "")
    parts = _OUTSIDE.sub("", path).split(".")
    return "/".join(_short(re.sub(r"[/;]", "_", part)) for part in parts if part)


def _attributes(node: Node) -> Iterator[dict]:
    yield {"key": "op", "value": node.op}
    if node.op in ("placeholder", "output"):
        return
    name = getattr(node.target, "__qualname__", node.target)        # without the address that a function's str has
    for key, value in (("target", name), *((f"argument {i}", v) for i, v in enumerate(node.args)), *node.kwargs.items()):
        yield {"key": key, "value": _short(str(value), _MOST_ATTRIBUTE)}


def _edge(source: Node, node: Node, number: str) -> dict:
    item = node.args[1] if node.op == "call_function" and node.target is operator.getitem else 0
    output = item if isinstance(item, int) and item >= 0 and isinstance(_value(source), (tuple, list)) else 0
    return {"sourceNodeId": source.name, "sourceNodeOutputId": str(output), "targetNodeInputId": number}


def _outputs(node: Node) -> Iterator[dict]:
    value = _value(node)
    for i, one in enumerate(value if isinstance(value, (tuple, list)) else (value,)):
        if isinstance(one, torch.Tensor):
            shape = ",".join(str(size) for size in one.shape)
            dtype = str(one.dtype).removeprefix("torch.")
            yield {"id": str(i), "attrs": [{"key": "tensor_shape", "value": f"{dtype}[{shape}]"}]}


def _value(node: Node):
    return node.meta.get("example_value", node.meta.get("val"))


def _short(text: str, most: int = _MOST) -> str:
    return text if len(text) <= most else f"{text[:most - 3]}..."
