"""How tokens reach the ranks that hold their experts, and how results come back.

Terms: `routes.py`.

Exchanges
    all_to_all  each rank has its own tokens (data-parallel attention). Splits are exact and data-dependent: no capacity,
                nothing dropped. A token goes to each rank once, however many of its experts live there, with its router
                weights beside it, and comes back once, weighted and summed.
    all_to_all_pairs  the same, but each pair travels by itself, and home weights and sums: more bytes, fewer loops.
    hierarchical  the same as all_to_all in two legs, between nodes and inside of a node; a token crosses the network once for
                each node (`hierarchical.py`).
    all_gather  the same again, without counts and without a word from the host: every rank gets all tokens, applies its own
                experts, and partial sums are scattered back. All shapes are static (CUDA graphs), nothing is dropped, all
                ranks must have equally many tokens. More bytes than all_to_all, by ranks / min(ranks, top_k) and more.
    all_reduce  every rank of the group has the *same* tokens (replicated attention, as inference servers run it); each
                applies its own experts to all of them, and one all-reduce sums.

Chunks (``Options.chunks``)
    The tokens are cut into so many parts. All dispatches are launched first, then each part's experts run and its combine
    is launched: the experts of one part can run while another travels, in any connectivity. Exact, forward and backward;
    an expert's weight gradient is the sum over parts. The counts travel together, in one exchange.

Gradients
    own tokens  with L_r the loss on rank r: an expert parameter's gradient is that of sum_r L_r (it saw all ranks' rows); a
                dense parameter's is that of L_r alone. Data parallelism therefore averages dense parameters over all ranks,
                and expert parameters over the ranks that hold the same experts, both divided by the global size.
    all_reduce  the loss is the same on each rank; expert gradients are complete for the local experts, and dense
                gradients are complete and equal on each rank (Megatron's f and g, arXiv 1909.08053 section 3).
"""
from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from .collectives import all_gather, reduce_scatter
from .hierarchical import hierarchical_experts
from .replicated import copy_to_group, sum_over_group
from .routes import ExpertGroup, Once, Options, Pairs, RunExperts, exchange_counts, on_host, parts_of

# --- all_to_all ------------------------------------------------------------------------------------------------------


def all_to_all_experts(
    run_experts: RunExperts, num_local_experts: int, group: ExpertGroup, tokens: Tensor, expert_ids: Tensor, weights: Tensor,
    options: Options = Options(), *, route: type[Once] | type[Pairs] = Once,
) -> Tensor:
    """Runs each token's experts where they are.

    Args:
        run_experts: the local experts.
        num_local_experts: experts on each rank; rank r holds ids [r * num_local_experts, (r + 1) * num_local_experts).
        group: the ranks to exchange with.
        tokens: [tokens, hidden], this rank's own.
        expert_ids: [tokens, top_k], global ids.
        weights: [tokens, top_k], the router's.

    Returns:
        [tokens, hidden], weighted and summed over top_k, in the dtype of `tokens`.
    """
    parts = [route(num_local_experts, group, options, *part) for part in parts_of(options.chunks, tokens, expert_ids, weights)]
    received = exchange_counts(torch.stack([part.counts for part in parts], dim=1), group)
    tables = torch.cat([part.sizes(received[:, i]) for i, part in enumerate(parts)])
    sizes = on_host(tables, [hint for part in parts for hint in part.hints()])
    rows = len(sizes) // len(parts)
    for i, part in enumerate(parts):
        part.dispatch(*sizes[i * rows:(i + 1) * rows])
    done = [part.combine(run_experts(*part.arrived())) for part in parts]
    return torch.cat(done) if len(done) > 1 else done[0]


# --- all_reduce ------------------------------------------------------------------------------------------------------


def all_reduce_experts(
    run_experts: RunExperts, num_local_experts: int, group: ExpertGroup, tokens: Tensor, expert_ids: Tensor, weights: Tensor,
    options: Options = Options(),
) -> Tensor:
    """Like `all_to_all_experts`, for tokens that every rank of the group has: nothing travels but the partial sums.

    `run_experts` must skip the id `num_local_experts` (the interface's own convention for a route that belongs elsewhere).
    """
    tokens = copy_to_group(tokens, group.name)
    weights = copy_to_group(weights, group.name)
    elsewhere = expert_ids // num_local_experts != group.rank
    local_ids = (expert_ids % num_local_experts).masked_fill(elsewhere, num_local_experts)
    weights = weights.masked_fill(elsewhere, 0.0)
    sums = [sum_over_group(run_experts(*part), group.name) for part in parts_of(options.chunks, tokens, local_ids, weights)]
    return torch.cat(sums) if len(sums) > 1 else sums[0]


def all_gather_experts(
    run_experts: RunExperts, num_local_experts: int, group: ExpertGroup, tokens: Tensor, expert_ids: Tensor, weights: Tensor,
    options: Options = Options(),
) -> Tensor:
    """Like `all_to_all_experts`, for equally many tokens on each rank. `run_experts` as in `all_reduce_experts`."""
    # Tokens travel by themselves: they need not wait for the router, and are no part of what it decides.
    exact = torch.promote_types(weights.dtype, torch.float32)       # has whole numbers up to 2^24
    beside = torch.cat([weights.to(exact), expert_ids.to(exact)], dim=1)
    arrived = [[all_gather(t, group.size, group.name) for t in part] for part in parts_of(options.chunks, tokens, beside)]
    done = []
    for rows, there in arrived:
        weights_there, ids = there.chunk(2, dim=1)
        ids = ids.detach().to(torch.int64)
        elsewhere = ids // num_local_experts != group.rank
        local_ids = (ids % num_local_experts).masked_fill(elsewhere, num_local_experts)
        here = weights_there.to(weights.dtype).masked_fill(elsewhere, 0.0)
        done.append(reduce_scatter(run_experts(rows, local_ids, here), group.size, group.name))
    return torch.cat(done) if len(done) > 1 else done[0]


EXCHANGES: dict[str, Callable[..., Tensor]] = {
    "all_to_all": all_to_all_experts,
    "all_to_all_pairs": functools.partial(all_to_all_experts, route=Pairs),
    "hierarchical": hierarchical_experts,
    "all_gather": all_gather_experts,
    "all_reduce": all_reduce_experts,
}
"""Name -> exchange; each is registered with transformers as `farskip_<name>`."""

CARRY_ROWS = frozenset({"all_to_all", "all_to_all_pairs", "hierarchical"})
"""Those that carry rows to their experts, so that a payload can be rounded and each rank meets only its own experts' pairs."""
