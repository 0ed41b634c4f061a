"""How much each token's place in the residual stream matters: what a refit weighs its tokens by.

A block's output is aimed at the teacher's stream, and what is missed there costs more at some tokens than at others. The
measure is the norm of the gradient, with respect to the stream at that token, of the log-probability of a next token that is
drawn from the teacher's own distribution (the square of it is the trace of the Fisher information there).

The backward goes stage by stage, like the refit: the live values of each stage of one batch, and the activations of one stage,
are in memory.
"""
from __future__ import annotations

import torch
from torch import Tensor
from torch.fx import Node

from ..passes.dataflow import value_of
from ..passes.sums import is_float

LARGEST = 10.0      # a token counts at most so much more than the mean


def logits_of(program, state: Node) -> Node | None:
    """The output of the graph that is [tokens, vocabulary]; None where there is none: a model without a head."""
    shape = value_of(state).shape
    for node in program.flow.nodes[-1].all_input_nodes:
        value = value_of(node)
        if is_float(value) and value.shape[:-1] == shape[:-1] and value.shape[-1] != shape[-1]:
            return node
    return None


def token_weights(side, stages, logits: Node, batch: int) -> dict[Node, Tensor]:
    """The last node of each stage -> weights [tokens, 1] with a mean of about one, for one batch.

    Args:
        side: the teacher, in front of the first stage.
        stages: as ``stages_of`` gives them. Those before the last one that leads to a stream (an encoder's) have no weights.
    """
    begin, before = side.live[batch], []
    for stage, (end, _, update, _) in enumerate(stages):
        before.append(side.live[batch])
        side.live[batch] = side.ahead(batch, stage, end, every=update is None)
    weights: dict[Node, Tensor] = {}
    leaves = _as_leaves(side, batch)
    with torch.enable_grad():
        found = side.program.evaluate([logits], side.known(batch))[logits].float().log_softmax(-1).flatten(0, -2)
        drawn = torch.multinomial(found.detach().exp(), 1, generator=torch.Generator(found.device).manual_seed(batch))
        likely = found.gather(-1, drawn).sum()
    gradients = _backward([likely], [None], leaves)
    for stage, (end, _, update, _) in reversed(list(enumerate(stages))):
        if update is None:
            break
        if end in gradients:
            weights[end] = _weight(gradients[end])
        side.live[batch] = before[stage]
        leaves = _as_leaves(side, batch)
        with torch.enable_grad():
            after = side.ahead(batch, stage, end)
        moved = [n for n in gradients if after[n].requires_grad]
        gradients = _backward([after[n] for n in moved], [gradients[n] for n in moved], leaves)
    side.live[batch] = begin
    return weights


def _as_leaves(side, batch: int) -> dict[Node, Tensor]:
    """The floating-point values that are alive, as what a gradient is asked for; they replace those of ``side``."""
    leaves = {n: v.detach().requires_grad_() for n, v in side.live[batch].items()
              if isinstance(v, Tensor) and v.is_floating_point()}
    side.live[batch] = {**side.live[batch], **leaves}
    return leaves


def _backward(outputs: list[Tensor], gradients: list[Tensor | None], leaves: dict[Node, Tensor]) -> dict[Node, Tensor]:
    if not outputs or not leaves:
        return {}
    found = torch.autograd.grad(outputs, list(leaves.values()), gradients, allow_unused=True)
    return {node: gradient for node, gradient in zip(leaves, found) if gradient is not None}


def _weight(gradient: Tensor) -> Tensor:
    size = gradient.float().square().mean(-1, keepdim=True).sqrt()
    mean = size.mean().clamp_min(1e-30)
    return size.clamp(max=LARGEST * mean) / mean
