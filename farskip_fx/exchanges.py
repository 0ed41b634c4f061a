"""How tokens reach the ranks that hold their experts, and how results come back.

Terms
    row         a token on its way to a rank
    pair        a (token, expert) pair: `tokens * top_k` of them
    counts      the few numbers that tell each rank what to expect, exchanged first (the counts exchange)
    splits      send and receive sizes of the two big exchanges in rows, read back to the host
    dispatch    rows to the ranks that hold their experts
    combine     results back to the rows' home

Exchanges
    all_to_all  each rank has its own tokens (data-parallel attention). Splits are exact and data-dependent: no capacity,
                nothing dropped. A token goes to each rank once, however many of its experts live there, with its router
                weights beside it, and comes back once, weighted and summed.
    all_to_all_pairs  the same, but each pair travels by itself, and home weights and sums: more bytes, fewer loops.
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

import dataclasses
import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor

from .collectives import all_gather, all_to_all, reduce_scatter
from .passes._torch import allow_scalar_outputs, optimization_hint, override_optimization_hint, patch_dynamo_config
from .payload import travel
from .replicated import copy_to_group, sum_over_group

RunExperts = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(rows [n, hidden], local expert ids [n, k], weights [n, k]) -> weighted sums [n, hidden], on the local experts."""


@dataclasses.dataclass(frozen=True)
class ExpertGroup:
    """The ranks that together hold all experts once, as plain values: Dynamo, deepcopy and pickle take them as they are."""

    name: str
    size: int
    rank: int


@dataclasses.dataclass(frozen=True)
class Options:
    """Of an exchange; the same on all ranks. See `expert_parallel` for what they mean."""

    chunks: int = 1
    payload: str = ""
    backward_payload: str = ""


# --- all_to_all ------------------------------------------------------------------------------------------------------


def all_to_all_experts(
    run_experts: RunExperts, num_local_experts: int, group: ExpertGroup, tokens: Tensor, expert_ids: Tensor, weights: Tensor,
    options: Options = Options(), *, route: type[_Once] | type[_Pairs] | None = None,
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
    route = route or _Once
    parts = [route(num_local_experts, group, options, *part) for part in _parts(options.chunks, tokens, expert_ids, weights)]
    received = _exchange_counts(torch.stack([part.counts for part in parts], dim=1), group)
    tables = torch.cat([part.sizes(received[:, i]) for i, part in enumerate(parts)])
    sizes = _on_host(tables, [hint for part in parts for hint in part.hints()])
    rows = len(sizes) // len(parts)
    for i, part in enumerate(parts):
        part.dispatch(*sizes[i * rows:(i + 1) * rows])
    done = [part.combine(run_experts(*part.arrived())) for part in parts]
    return torch.cat(done) if len(done) > 1 else done[0]


def _parts(chunks: int, *tensors: Tensor) -> list[tuple[Tensor, ...]]:
    """Equal parts of the leading size. Always ``chunks`` of them, on every rank, whatever its number of tokens."""
    if chunks == 1:
        return [tensors]
    size = tensors[0].size(0)
    ends = [size * i // chunks for i in range(chunks + 1)]
    return [tuple(t[first:end] for t in tensors) for first, end in zip(ends, ends[1:])]


def _exchange_counts(counts: Tensor, group: ExpertGroup) -> Tensor:
    """[rank, part, n], what goes to each rank -> [rank, part, n], what comes from each."""
    even = [counts.numel() // group.size] * group.size
    return all_to_all(counts.flatten(), even, even, group.name).view(counts.shape)


def _on_host(table: Tensor, hints: list[int]) -> list[list[int]]:
    """[rows, size] -> numbers of the host; what the compiler shall assume of each row is ``hints``.

    One tensor, and that one copied to the host first: `.tolist()` on a device tensor synchronises once an element.
    """
    on_host = table.cpu()
    if not torch.compiler.is_compiling():
        return on_host.tolist()
    allow_scalar_outputs()
    with patch_dynamo_config(capture_scalar_outputs=True):  # for the tracing of this line only
        rows = on_host.tolist()
    for row, hint in zip(rows, hints):
        for number in row:
            torch._check(number >= 0)
            override_optimization_hint(number, hint)  # or the compiler's estimates assume absurd sizes
    return rows


class _Once:
    """A token goes to each rank that holds some of its experts, once.

    Beside a row travel top_k weights, 0 where the expert is elsewhere, and top_k local ids, ``num_local_experts`` there.
    """

    def __init__(self, num_local_experts: int, group: ExpertGroup, options: Options, tokens: Tensor, expert_ids: Tensor,
                 weights: Tensor) -> None:
        _require_whole_numbers(num_local_experts, tokens.dtype)
        self.num_local_experts, self.group, self.options = num_local_experts, group, options
        self.tokens, self.expert_ids, self.weights = tokens, expert_ids, weights
        self.rank_of = expert_ids // num_local_experts                                  # [tokens, top_k]
        self.goes = torch.zeros(group.size, tokens.size(0), dtype=torch.bool, device=tokens.device)
        self.goes = self.goes.scatter(0, self.rank_of.t(), torch.ones_like(self.rank_of.t(), dtype=torch.bool))
        pairs = torch.zeros(group.size, dtype=torch.int64, device=tokens.device)
        flat = self.rank_of.reshape(-1)
        pairs = pairs.scatter_add(0, flat, torch.ones_like(flat, dtype=torch.int64))
        self.counts = torch.stack([self.goes.sum(dim=1), pairs], dim=1)

    def sizes(self, received: Tensor) -> Tensor:
        return torch.stack([self.counts[:, 0], received[:, 0], received[:, 1]])

    def hints(self) -> list[int]:
        """With balanced routing: rows to a rank, rows from a rank, pairs from a rank."""
        count, top_k = (optimization_hint(size, 0) for size in self.expert_ids.shape)
        rows = round(count * share_of_tokens(self.num_local_experts * self.group.size, self.num_local_experts, top_k))
        return [rows, rows, count * top_k // self.group.size]

    def dispatch(self, send: list[int], receive: list[int], pairs: list[int]) -> None:
        self.send, self.receive, self.pairs = send, receive, sum(pairs)
        count, top_k = self.expert_ids.shape
        self.going = _places_of(self.goes.flatten(), sum(send))                         # rows by rank, then by token
        self.token_of = self.going % count
        elsewhere = self.rank_of[self.token_of] != (self.going // count).unsqueeze(-1)
        ids = (self.expert_ids % self.num_local_experts)[self.token_of].masked_fill(elsewhere, self.num_local_experts)
        weights = self.weights[self.token_of].masked_fill(elsewhere, 0.0)
        beside = torch.cat([weights, ids.to(weights.dtype)], dim=1)
        self.rows, beside = _travel(self, self.tokens[self.token_of], beside, receive, send)
        self.here = beside[:, :top_k]
        self.ids = beside[:, top_k:].detach().to(torch.int64)

    def arrived(self) -> tuple[Tensor, Tensor, Tensor]:
        """The pairs of the local experts; the other slots of a row are left out before they cost anything."""
        ids = self.ids.flatten()
        pairs = _places_of(ids < self.num_local_experts, self.pairs)
        self.row_of = pairs // self.ids.size(1)
        return self.rows[self.row_of], ids[pairs].unsqueeze(-1), self.here.flatten()[pairs].unsqueeze(-1)

    def combine(self, outputs: Tensor) -> Tensor:
        sums = outputs.new_zeros(self.rows.size(0), outputs.size(1)).index_add(0, self.row_of, outputs)
        back, _ = _travel(self, sums, sums[:, :0], self.send, self.receive)
        home = back.new_zeros(self.tokens.size(0), back.size(1)).index_add(0, self.token_of, back)
        return home.to(self.tokens.dtype)


def share_of_tokens(experts: int, local: int, top_k: int) -> float:
    """Of all tokens, those that go to a rank with ``local`` of the experts; balanced routing."""
    return 1 - math.comb(experts - local, top_k) / math.comb(experts, top_k)


def _require_whole_numbers(most: int, dtype: torch.dtype) -> None:
    if most > 2 / torch.finfo(dtype).eps:
        raise ValueError(f"ids of {most} experts would travel as {dtype}, which has no whole numbers so large; use "
                         "exchange='all_to_all_pairs'")


def _places_of(mask: Tensor, count: int) -> Tensor:
    """Where ``mask`` [n] is true, ascending; ``count`` places. Without a sort, and without asking the device how many."""
    slot = torch.where(mask, mask.cumsum(0) - 1, count)         # the others all go into one slot more, which is cut off
    places = torch.arange(mask.numel(), device=mask.device)
    return torch.zeros(count + 1, dtype=torch.int64, device=mask.device).scatter(0, slot, places)[:count]


class _Pairs:
    """Each (token, expert) pair is a row, sorted by expert; weights and sums stay at home, so that only rows have
    gradients to carry back."""

    def __init__(self, num_local_experts: int, group: ExpertGroup, options: Options, tokens: Tensor, expert_ids: Tensor,
                 weights: Tensor) -> None:
        self.num_local_experts, self.group, self.options = num_local_experts, group, options
        self.tokens, self.expert_ids, self.weights = tokens, expert_ids, weights
        flat = expert_ids.reshape(-1)
        counts = torch.zeros(group.size * num_local_experts, dtype=torch.int64, device=flat.device)
        counts = counts.scatter_add(0, flat, torch.ones_like(flat, dtype=torch.int64))
        self.order = torch.argsort(flat, stable=True)
        self.counts = counts.view(group.size, num_local_experts)

    def sizes(self, received: Tensor) -> Tensor:
        self.received = received
        return torch.stack([self.counts.sum(1), received.sum(1)])

    def hints(self) -> list[int]:
        return [optimization_hint(self.order.numel(), 0) // self.group.size] * 2

    def dispatch(self, send: list[int], receive: list[int]) -> None:
        self.send, self.receive = send, receive
        rows = self.tokens[self.order // self.expert_ids.size(-1)]
        self.rows, _ = _travel(self, rows, rows[:, :0], receive, send)

    def arrived(self) -> tuple[Tensor, Tensor, Tensor]:
        """Rows arrive by sender, and within a sender by expert."""
        ids = torch.arange(self.num_local_experts, device=self.received.device).repeat(self.group.size)
        ids = ids.repeat_interleave(self.received.reshape(-1), output_size=sum(self.receive)).unsqueeze(-1)
        return self.rows, ids, torch.ones_like(ids, dtype=self.rows.dtype)

    def combine(self, outputs: Tensor) -> Tensor:
        # index_copy undoes the sort; its backward is a gather, where indexing by the inverse would scatter.
        outputs, _ = _travel(self, outputs, outputs[:, :0], self.send, self.receive)
        unsorted = outputs.new_empty(self.order.numel(), outputs.size(-1)).index_copy(0, self.order, outputs)
        weighted = unsorted.view(*self.expert_ids.shape, outputs.size(-1)) * self.weights.unsqueeze(-1)
        return weighted.sum(dim=1).to(self.tokens.dtype)


def _travel(part: _Once | _Pairs, rows: Tensor, beside: Tensor, receive: list[int], send: list[int]) -> tuple[Tensor, Tensor]:
    return travel(rows, beside, receive, send, part.group.name, payload=part.options.payload,
                  backward_payload=part.options.backward_payload)


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
    sums = [sum_over_group(run_experts(*part), group.name) for part in _parts(options.chunks, tokens, local_ids, weights)]
    return torch.cat(sums) if len(sums) > 1 else sums[0]


def all_gather_experts(
    run_experts: RunExperts, num_local_experts: int, group: ExpertGroup, tokens: Tensor, expert_ids: Tensor, weights: Tensor,
    options: Options = Options(),
) -> Tensor:
    """Like `all_to_all_experts`, for equally many tokens on each rank. `run_experts` as in `all_reduce_experts`."""
    # Tokens travel by themselves: they need not wait for the router, and are no part of what it decides.
    exact = torch.promote_types(weights.dtype, torch.float32)       # has whole numbers up to 2^24
    beside = torch.cat([weights.to(exact), expert_ids.to(exact)], dim=1)
    arrived = [[all_gather(t, group.size, group.name) for t in part] for part in _parts(options.chunks, tokens, beside)]
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
    "all_to_all_pairs": functools.partial(all_to_all_experts, route=_Pairs),
    "all_gather": all_gather_experts,
    "all_reduce": all_reduce_experts,
}
"""Name -> exchange; each is registered with transformers as `farskip_<name>`."""
