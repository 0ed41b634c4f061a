"""Step -1: checkpointed regions become part of the graph, and no exchange in them runs twice.

Contract: a Dynamo graph module in; the same module with equal values out. Each ``tag_activation_checkpoint`` call
(``torch.utils.checkpoint``, transformers' ``gradient_checkpointing_enable``) is replaced by the nodes of its body,
with their metadata, so that later passes see the layers. What is to be computed again in the backward stands on the
nodes, in the words of PyTorch's partitioner:

  meta["recompute"]     PREFER_RECOMPUTE: not kept, computed again; MUST_SAVE: kept. None: the partitioner may choose.
  meta["ac_graph_id"]   number of the region, counted in graph order: what a later region reads is kept (the
                        stream, once for each state that is read)

Both also stand in the node's name (``linear_3_ac2``, ``topk_ac2_kept``): AOTAutograd's cache finds a graph by its
code and not by its tags, and would give the same model without checkpointing for it.

AOTAutograd copies the tags from a node to the operations that it becomes. Nodes that later passes add take them from
the node that they are a copy of; any choice gives the same gradients, only other memory.

Kept in a region
  exchanges   launches and waits: a second exchange would cost the time that the connectivity saves
  decisions   whole numbers made from real ones (top-k, argmax), sorts, and what sizes are read from. A kernel for the
              backward may round otherwise than that of the forward; a router that decides otherwise then would not fit
              the rows that were exchanged. They are small: top_k numbers a token.

A region with a policy of its own (``context_fn``) says what to keep operation by operation, below the level of this
graph: then nothing is inlined, and ``Inlined.refused`` says why.
"""
from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg
from torch.utils.checkpoint import CheckpointPolicy

from .dataflow import op_name, tensors_of, value_inputs, value_of
from .operations import EXCHANGES, MAKES_MEMORY
from .reasons import Reason

TAGS = ("recompute", "ac_graph_id")
_SORTS = {"sort", "argsort"}


@dataclass(frozen=True, kw_only=True)
class Inlined:
    regions: int                    # calls that became part of the graph; regions inside of them count with them
    refused: Reason | None = None   # why they stay as they are


def inline_checkpoints(gm: GraphModule, *, gradients: bool = True) -> Inlined:
    """Inline every checkpointed region of ``gm`` and mark what is to be kept; does not recompile ``gm``.

    Without ``gradients``, or where no input needs one, nothing is marked: there is no backward, and AOTAutograd would
    look for one.
    """
    calls = list(_calls(gm.graph))
    marks = gradients and any(t.requires_grad for n in gm.graph.find_nodes(op="placeholder") for t in tensors_of(n))
    for call in calls:
        reason = _reason_against(gm, call)
        if reason is not None:
            return Inlined(regions=0, refused=reason)
    for number, call in enumerate(calls, start=1):
        _inline(gm, call, number if marks else None)
    if calls:
        gm.graph.lint()
    return Inlined(regions=len(calls))


def _calls(graph: Graph) -> Iterator[Node]:
    return (node for node in graph.nodes if op_name(node) == "tag_activation_checkpoint")


def _body(gm: GraphModule, call: Node) -> GraphModule:
    return gm.get_submodule(call.args[0].target)


def _reason_against(gm: GraphModule, call: Node) -> Reason | None:
    body = _body(gm, call)
    if body.meta.get("_checkpoint_context_fn") is not None:
        return Reason("checkpoint_policy", f"the checkpointed region {call.name} has a policy of its own (context_fn "
                      "of torch.utils.checkpoint), which hides its layer; leave context_fn out: exchanges and routing "
                      "are kept and the rest is computed again")
    if any(op_name(user) != "getitem" for user in call.users):      # Dynamo takes each result by its position
        return Reason("checkpoint_form", f"the results of the checkpointed region {call.name} are read all at once")
    inner = (_reason_against(body, inner) for inner in _calls(body.graph))
    return next((reason for reason in inner if reason is not None), None)


def _inline(gm: GraphModule, call: Node, region: int | None) -> None:
    """Put the body of ``call`` in its place, marked with the number of its ``region``."""
    body = _body(gm, call)
    for inner in list(_calls(body.graph)):
        _inline(body, inner, region)
    arguments = iter(call.args[1:])
    made: dict[Node, object] = {}
    for node in body.graph.nodes:
        if node.op == "placeholder":
            made[node] = next(arguments)
            continue
        if node.op == "output":
            results = node.args[0]
            break
        name = node.name
        if region is not None:
            _mark(node, region, body)
            name += f"_ac{region}" + "_kept" * (node.meta.get("recompute") is CheckpointPolicy.MUST_SAVE)
        target = _adopt(gm, body, node.target, call.args[0].target) if node.op == "get_attr" else node.target
        with gm.graph.inserting_before(call):
            made[node] = gm.graph.create_node(node.op, target, map_arg(node.args, made.__getitem__),
                                              map_arg(node.kwargs, made.__getitem__), name)
        made[node].meta = dict(node.meta)
    for user in list(call.users):
        result = made[results[user.args[1]]]
        user.replace_all_uses_with(result)
        gm.graph.erase_node(user)
    handle = call.args[0]
    gm.graph.erase_node(call)
    if not handle.users:
        gm.graph.erase_node(handle)
        if not any(n.op == "get_attr" and n.target == handle.target for n in gm.graph.nodes):
            gm.delete_submodule(handle.target)


def _adopt(gm: GraphModule, body: GraphModule, target: str, prefix: str) -> str:
    """Give ``gm`` what ``body`` holds as ``target``, under a name that is free; the name."""
    held = body
    for part in target.split("."):
        held = getattr(held, part)
    name = start = f"{prefix}_{target}".replace(".", "_")
    count = 0
    while hasattr(gm, name):
        count += 1
        name = f"{start}_{count}"
    if isinstance(held, torch.Tensor) and not isinstance(held, torch.nn.Parameter):
        gm.register_buffer(name, held)
    else:
        setattr(gm, name, held)
    return name


# --- what is kept -----------------------------------------------------------------------------------------------

def _mark(node: Node, region: int, owner: GraphModule) -> None:
    """Say on ``node``, and on the nodes of what it calls, whether it is kept."""
    policy = _policy(node)
    if policy is not None:
        node.meta["recompute"], node.meta["ac_graph_id"] = policy, region
    # The second subgraph of an autograd.Function is its backward, which is not computed again.
    bodies = [a for a in node.args if isinstance(a, Node) and a.op == "get_attr"]
    for handle in bodies[:1] if op_name(node) == "autograd_function_apply" else bodies:
        inside = getattr(owner, handle.target, None)
        if isinstance(inside, GraphModule):
            for inner in inside.graph.nodes:
                if inner.op not in ("placeholder", "output", "get_attr"):
                    _mark(inner, region, inside)


def _policy(node: Node) -> CheckpointPolicy | None:
    if node.op == "get_attr":
        return None
    if is_exchange(node) or _decides(node):
        return CheckpointPolicy.MUST_SAVE
    source = node.args[0] if op_name(node) == "getitem" else None
    if isinstance(source, Node) and isinstance(value_of(source), (tuple, list)) and "recompute" in source.meta:
        return source.meta["recompute"]
    # A size, an assertion, a context: no memory to save.
    return CheckpointPolicy.PREFER_RECOMPUTE if any(True for _ in tensors_of(node)) else None


def is_exchange(node: Node) -> bool:
    """Whether ``node`` launches a collective or waits for one."""
    target = node.target
    name = target.name() if isinstance(target, torch._ops.OpOverload) else getattr(target, "_qualified_op_name", "")
    return node.op == "call_function" and ("c10d" in name or "symm_mem" in name or op_name(node) in EXCHANGES)


def _decides(node: Node) -> bool:
    """Whether ``node`` makes whole numbers out of real ones, sorts, or makes sizes out of values."""
    if node.meta.get("unbacked_bindings") or op_name(node) in _SORTS:
        return True
    if op_name(node) in MAKES_MEMORY or node.op not in ("call_function", "call_method"):
        return False
    return any(map(_is_whole, tensors_of(node))) and any(
        t.is_floating_point() for source in value_inputs(node) for t in tensors_of(source))


def _is_whole(tensor: torch.Tensor) -> bool:
    return not (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype is torch.bool)
