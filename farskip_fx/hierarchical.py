"""The exchange in two legs: between nodes, then inside of a node.

A token crosses the network once for each *node* that holds some of its experts, to the rank with its sender's place there,
which hands it on to the ranks of its node over their faster link; results are summed on each leg of the way back. With n
nodes of l ranks each, every rank talks to n - 1 + l - 1 others instead of n * l - 1.

    counts  between nodes, then inside         (one host read after both)
    rows    between nodes -> inside -> experts -> inside -> between nodes

Rank r of the group is place r % l of node r // l; experts are contiguous by rank, so those of a node are, too.
"""
from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from .passes._torch import optimization_hint
from .routes import ExpertGroup, Once, Options, RunExperts, exchange_counts, on_host, parts_of, share_of_tokens


def hierarchical_experts(run_experts: RunExperts, num_local_experts: int, group: ExpertGroup, tokens: Tensor,
                         expert_ids: Tensor, weights: Tensor, options: Options = Options()) -> Tensor:
    """Like ``all_to_all_experts``. A payload is that of the leg between nodes; inside of a node rows travel as they are."""
    within, across = group.levels
    parts = [_TwoLegs(num_local_experts, group, options, *part) for part in parts_of(options.chunks, tokens, expert_ids, weights)]
    arriving = exchange_counts(torch.stack([part.leaving for part in parts], dim=1), across)
    passing = torch.stack([part.passing(arriving[:, i]) for i, part in enumerate(parts)], dim=1)
    staying = exchange_counts(passing, within)
    first = on_host(torch.stack([row for i, part in enumerate(parts) for row in (part.leaving[:, 0], arriving[:, i, 0])]),
                    [part.rows_between for part in parts for _ in range(2)])
    second = on_host(torch.stack([row for i in range(len(parts))
                                  for row in (passing[:, i, 0], staying[:, i, 0], staying[:, i, 1])]),
                     [hint for part in parts for hint in (part.rows_inside, part.rows_inside, part.pairs_inside)])
    for i, part in enumerate(parts):
        part.between.dispatch(*first[2 * i:2 * i + 2])
    for i, part in enumerate(parts):
        part.hand_on(*second[3 * i:3 * i + 3])
    done = [part.between.home(part.inside.combine(run_experts(*part.inside.arrived()))) for part in parts]
    return torch.cat(done) if len(done) > 1 else done[0]


class _TwoLegs:
    """``between`` carries tokens to nodes as ``Once`` carries them to ranks; ``inside`` does the same with what arrived."""

    def __init__(self, num_local_experts: int, group: ExpertGroup, options: Options, tokens: Tensor, expert_ids: Tensor,
                 weights: Tensor) -> None:
        self.num_local_experts, self.options = num_local_experts, options
        self.within, across = group.levels
        self.between = Once(num_local_experts * self.within.size, across, options, tokens, expert_ids, weights)
        on_rank = Once(num_local_experts, group, options, tokens, expert_ids, weights)      # for its counts
        # For each node: rows, then rows and pairs of each of its ranks.
        self.leaving = torch.cat([self.between.counts[:, :1], on_rank.counts.view(across.size, -1)], dim=1)
        # With balanced routing:
        count, top_k = (optimization_hint(size, 0) for size in expert_ids.shape)
        experts = num_local_experts * group.size
        self.rows_between = round(count * share_of_tokens(experts, num_local_experts * self.within.size, top_k))
        self.rows_inside = round(count * across.size * share_of_tokens(experts, num_local_experts, top_k))
        self.pairs_inside = count * top_k // self.within.size

    def passing(self, arriving: Tensor) -> Tensor:
        """[rank of the node, 2]: rows and pairs that this rank hands on to it."""
        return arriving[:, 1:].sum(0).view(self.within.size, 2)

    def hand_on(self, send: list[int], receive: list[int], pairs: list[int]) -> None:
        options = replace(self.options, payload="", backward_payload="")
        self.inside = Once(self.num_local_experts, self.within, options, self.between.rows, self.between.ids, self.between.here)
        self.inside.dispatch(send, receive, pairs)
